"""Loads GGUF files with the real backend, each in a fork: reads paths, writes what became of each as a line of JSON.

python corrupt_child.py SECONDS BYTES    # that a file may take
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import select
import signal
import sys
from pathlib import Path

import llama_cpp.llama_cpp  # noqa: F401 - loaded once, for all forks

from tgi_backend_llamacpp.plugin import create
from tgi_gateway.backend import EngineOptions
from tgi_gateway.errors import ModelError, SettingsError, StartError
from tgi_gateway.types import Failed, Finished, Request, SamplingParams, StepEvents, StopRules

ADDRESSES = 8 << 30
"""Bytes of address space, so that a lying size fails at once: threads have large stacks that they do not use."""


def main() -> None:
    limit_s, memory = float(sys.argv[1]), int(sys.argv[2])
    for line in sys.stdin:
        print(json.dumps(_apart(Path(line.strip()), limit_s, memory)), flush=True)


def _apart(path: Path, limit_s: float, memory: int) -> tuple[str, str, int]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.dup2(2, 1)  # native code that ends the process says so anywhere
        _limit()
        kind, told = _load(path)
        os.write(writing, json.dumps([kind, told[:2000]]).encode())
        os._exit(0)
    os.close(writing)
    answered, _, _ = select.select([reading], [], [], limit_s)
    if not answered:
        os.kill(pid, signal.SIGKILL)
    raw = os.read(reading, 1 << 16) if answered else b""
    os.close(reading)
    _, status, usage = os.wait4(pid, 0)
    peak_mib = usage.ru_maxrss >> 10
    if usage.ru_maxrss << 10 > memory:
        return "memory", f"more than {memory >> 20} MiB", peak_mib
    if raw:
        kind, told = json.loads(raw)
        return kind, told, peak_mib
    if not answered:
        return "hang", f"nothing after {limit_s:.0f} s", peak_mib
    if os.WIFSIGNALED(status):
        return "signal", signal.Signals(os.WTERMSIG(status)).name, peak_mib
    return "unclear", f"ended with code {os.waitstatus_to_exitcode(status)}", peak_mib


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _load(path: Path) -> tuple[str, str]:
    try:
        return asyncio.run(_serve(path))
    except MemoryError:
        return "memory", "MemoryError"
    except (ModelError, SettingsError) as error:
        return "refused", str(error)
    except StartError as error:
        told = str(error)
        return ("unclear" if told.startswith("the engine cannot start:") else "refused"), told
    except BaseException as error:
        return "unclear", f"{type(error).__name__}: {error}"


async def _serve(path: Path) -> tuple[str, str]:
    """One greedy and one drawn answer, with log-probabilities."""
    sizes = {"max_total_tokens": 48, "max_batch_size": 2, "max_batch_total_tokens": 128, "max_batch_prefill_tokens": 32}
    backend = create(EngineOptions(path, "corrupt", extra={"n_threads": 1}, **sizes))  # type: ignore[arg-type]
    ends: list[Finished | Failed] = []
    loop, all_ended = asyncio.get_running_loop(), asyncio.Event()

    def emit(events: StepEvents) -> None:
        ends.extend([*events.finished, *events.failed])
        if len(ends) == 2:
            loop.call_soon_threadsafe(all_ended.set)

    info = await backend.start(emit)
    try:
        for request_id, drawn in enumerate((False, True)):
            sampling = SamplingParams(do_sample=drawn, seed=1, top_p=0.9 if drawn else 1.0)
            prompt = tuple(token % info.vocab_size for token in (1, 5, 9))
            backend.submit(Request(request_id, prompt, sampling, StopRules(3), logprobs=True, top_n_tokens=2))
        await all_ended.wait()
    finally:
        await backend.stop(0.0)
    return "works", "; ".join(end.message for end in ends if isinstance(end, Failed))


if __name__ == "__main__":
    main()
