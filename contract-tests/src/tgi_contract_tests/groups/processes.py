"""The plug-in in many processes, and one process with many engines: nothing is shared, nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tgi_contract_tests.base import ContractBase, close
from tgi_contract_tests.engine import Engine
from tgi_contract_tests.rules import demand

HEAVY = ("torch", "transformers", "jax", "tensorflow", "tensorrt_llm", "llama_cpp", "torch_xla", "numpy", "triton")
LOAD = """
import io, json, logging, os, signal, sys, threading
from tgi_gateway import plugins

def process():
    return {
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "signal handlers": [str(signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM)],
        "log handlers": len(logging.getLogger().handlers),
        "open files": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
        "umask": os.umask(0o22) or os.umask(0o22),
    }

out, sys.stdout = sys.stdout, io.StringIO()
modules, before = set(sys.modules), process()
plugin = plugins.load(sys.argv[1])
plugin.missing()
after = process()
changed = [name for name in before if before[name] != after[name]]
printed = sys.stdout.getvalue()
told = [plugin.name, plugin.summary, repr(sorted(plugin.capabilities.features)), plugin.capabilities.tolerance]
told += [plugin.capabilities.prefix_cache, plugin.capabilities.batching, plugin.needs_model, plugin.api_version]
told += [[flag.name, flag.kind.__name__, repr(flag.default), flag.help] for flag in plugin.flags]
again = plugins.load(sys.argv[1])
json.dump(
    {
        "imported": sorted(set(sys.modules) - modules),
        "changed": changed + ["standard output"] * bool(printed),
        "told": told,
        "same again": again.capabilities == plugin.capabilities and again.flags == plugin.flags,
    },
    out,
)
"""


class Processes(ContractBase):
    def test_loading_the_plugin_imports_no_heavy_runtime(self) -> None:
        imported = {name.split(".")[0] for name in self._load(1)[0]["imported"]}
        heavy = sorted(imported & set(HEAVY))
        demand(not heavy, "imports", f"loading the plug-in `{self.backend}` imported {', '.join(heavy)}")

    def test_loading_the_plugin_changes_nothing_in_its_process(self) -> None:
        changed = self._load(1)[0]["changed"]
        demand(not changed, "re-entrancy", f"loading the plug-in `{self.backend}` changed: {', '.join(changed)}")

    def test_every_process_is_told_the_same(self) -> None:
        """The launcher, the engine host and each HTTP worker load it, at about the same time."""
        one, other = self._load(2)
        demand(one["told"] == other["told"], "re-entrancy", f"{one['told']} in one process, {other['told']} in another")
        again = one["same again"] and other["same again"]
        demand(again, "re-entrancy", "loading the plug-in twice in one process gave two different descriptions")

    def test_a_restart_leaves_nothing_behind(self) -> None:
        left: list[tuple[int, int]] = []
        for _ in range(3):
            engine = Engine(self.make(), self.patience_s)
            try:
                engine.start()
                engine.run_one(self.request(self.prompt(engine)))
            finally:
                close(engine)
            left.append(self._settled(left[0] if left else None))
        grew = left[-1][0] > left[0][0] or left[-1][1] > left[0][1]
        demand(not grew, "lifecycle", f"(threads, open files) after each of three runs in one process: {left}")

    def _settled(self, wanted: tuple[int, int] | None) -> tuple[int, int]:
        """Threads and open files of this process, once they are no more than `wanted` or will not become so."""
        deadline = time.monotonic() + min(2.0, self.patience_s)
        while True:
            found = (threading.active_count(), _open_files())
            if wanted is None or (found[0] <= wanted[0] and found[1] <= wanted[1]) or time.monotonic() > deadline:
                return found
            time.sleep(0.01)

    def _load(self, processes: int) -> list[dict[str, Any]]:
        """What processes that load the plug-in at the same time say of it."""
        name = self.plugin().name
        command = [sys.executable, "-c", LOAD, name]
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        found = []
        for process in running:
            out, errors = process.communicate(timeout=self.patience_s)
            demand(process.returncode == 0, "imports", f"loading failed: {errors.strip()[-500:]}")
            found.append(json.loads(out))
        return found


def _open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(os.listdir(folder)) if folder.is_dir() else 0
