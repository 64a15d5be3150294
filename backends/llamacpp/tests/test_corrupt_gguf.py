"""Corrupt GGUF files through the native code: refused with a reason or served. No crash, no hang, no memory taken."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from corrupt_gguf import Loader, combinations, corpus, small_model, taken_apart

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: see `make test`")

CASES = int(os.environ.get("CORRUPT_GGUF_CASES", "24"))
"""How many of some thousand; all of them: python backends/llamacpp/tests/support/corrupt_gguf.py"""


@pytest.fixture(scope="module")
def loader() -> Iterator[Loader]:
    with Loader() as made:
        yield made


def test_the_sound_file_works_and_is_put_together_as_it_was(loader: Loader, tmp_path: Path) -> None:
    path = small_model(tmp_path / "sound.gguf")
    outcome = loader.load("sound", path)
    assert (outcome.kind, outcome.told) == ("works", "")
    assert taken_apart(path.read_bytes()).written() == path.read_bytes()


def test_no_damage_ends_hangs_or_bloats_the_process_or_is_told_unclearly(loader: Loader, tmp_path: Path) -> None:
    rng = random.Random(7)
    sound = small_model(tmp_path / "sound.gguf").read_bytes()
    mixed = combinations(sound, rng)
    cases = [*rng.sample(list(corpus(sound)), CASES), *(next(mixed) for _ in range(CASES // 4))]
    path = tmp_path / "case.gguf"
    wrong, refused = [], 0
    for case in cases:
        path.write_bytes(case.content)
        outcome = loader.load(case.name, path)
        refused += outcome.kind == "refused"
        if outcome.wrong:
            wrong.append(outcome)
    assert not wrong
    assert refused > len(cases) // 4
