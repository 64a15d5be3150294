"""The file of API keys, changed under a running server of two HTTP workers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
from launched import WAIT_S, Gateway, serving


def answers(gateway: Gateway, key: str) -> set[int]:
    """The statuses that `key` gets over so many connections that each worker has had some."""
    return {
        httpx.get(f"{gateway.url}/info", headers={"authorization": f"Bearer {key}"}, verify=False).status_code
        for _ in range(16)
    }


def until_answers(gateway: Gateway, key: str, status: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while (got := answers(gateway, key)) != {status}:
        assert time.monotonic() < deadline, f"{got}, not {status}:\n{gateway.log}"


def test_keys_of_a_changed_file_count_in_all_workers_and_a_broken_file_changes_nothing(
    byte_model: Path, tmp_path: Path
) -> None:
    file, new = tmp_path / "keys", tmp_path / "new"
    file.write_text("old-secret\nkept-secret\n")
    arguments = ("--http-workers", "2", "--api-key", "flag-secret", "--echo-step-ms", "20")
    with serving(byte_model, *arguments, API_KEYS_FILE=str(file)) as gateway:
        assert answers(gateway, "old-secret") == answers(gateway, "flag-secret") == {200}
        body = {"inputs": "abc", "parameters": {"max_new_tokens": 400}}
        old = {"authorization": "Bearer old-secret"}
        with httpx.stream("POST", f"{gateway.url}/generate_stream", json=body, headers=old, timeout=WAIT_S) as open_one:
            lines = open_one.iter_lines()
            next(lines)
            new.write_text("kept-secret\nnew-secret\n")
            new.replace(file)
            until_answers(gateway, "new-secret", 200)
            until_answers(gateway, "old-secret", 401)
            assert answers(gateway, "kept-secret") == answers(gateway, "flag-secret") == {200}
            assert sum(line.startswith("data:") for line in lines) == 399, "a request that was taken is finished"
        gateway.wait_for("3 API keys are in force: 1 new, 1 gone")

        file.write_text("# all gone\n")
        gateway.wait_for("holds no key")
        gateway.wait_for("The 3 API keys from before stay in force")
        assert answers(gateway, "new-secret") == {200}
        # One that starts now cannot read them from the file either.
        os.kill(gateway.children()["http_process"], signal.SIGKILL)
        gateway.wait_for("is back after")
        assert answers(gateway, "new-secret") == {200}
        assert answers(gateway, "old-secret") == {401}

        file.write_text("last-secret\n")
        until_answers(gateway, "last-secret", 200)
        until_answers(gateway, "new-secret", 401)
        assert "-secret" not in gateway.log
