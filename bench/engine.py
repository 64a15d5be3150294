"""The engine without HTTP: step times, prefill speed, the host's part, and how close they come to the device's limits.

    python bench/engine.py --backend cuda                                the shape of Llama 3.1 8B, random weights
    python bench/engine.py --backend cuda --decode 1x512,32x4096         some batch sizes and contexts
    python bench/engine.py --backend cuda --trace steps.json             also a profiler trace, and the busy time in it
    python bench/engine.py --backend cpu --quick                         the demo model on this machine's cores

The real step loop runs in this thread, on the real engine; only requests and events stay here. Limits are measured on
the device first. A decode step must read all weights and the KV of its rows and compute two operations per weight and
row; the table says which part of that limit a step reaches. `host` is the time of one step's work on the host, split
into plan (batcher), launch (engine and kernels' launches), read (waiting for a result) and emit (batcher and events):
at depth 2 all but the reading runs while the device works.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from limits import measure_ceilings
from machine import machine
from model_folder import write_model_folder
from steps import TRACE_CONTEXT, Bench, Work

from tgi_gateway import plugins
from tgi_gateway.backend import EngineOptions
from tgi_gateway.errors import StartError
from tgi_model_server.backend import TorchBackend, batch_limits, model_info
from tgi_model_server.batcher import BatchLimits
from tgi_model_server.engine import Engine, load_engine
from tgi_model_server.stepped import warm_up

DECODES = "1x128,1x8192,1x32768,8x512,32x512,32x4096,64x512,128x512,256x512,256x1024"
PREFILLS = "512x8192,2048x16384,8192x32768"
QUICK_DECODES, QUICK_PREFILLS = "1x16,4x64", "64x192"
TRACED = (1, 32, 256)


def load(options: argparse.Namespace, folder: Path) -> tuple[Engine, BatchLimits, torch.device]:
    """Raises `StartError`, `PluginError`."""
    chosen = EngineOptions(
        model_path=folder,
        model_id="bench",
        dtype=options.dtype,
        load_format="auto" if options.quick else "dummy",
        max_batch_size=options.max_batch_size,
        max_batch_prefill_tokens=options.max_batch_prefill_tokens,
        max_batch_total_tokens=8192 if options.quick else None,
    )
    plugin = plugins.load(options.backend)
    missing = plugin.missing()
    if missing is not None:
        raise StartError(f"backend `{plugin.name}` cannot run on this machine: {missing}")
    backend = plugin.create(chosen)
    if not isinstance(backend, TorchBackend):
        raise StartError(f"backend `{plugin.name}` is no torch engine; bench/targets.py measures it through HTTP")
    device = backend.device_factory()
    began_s = time.perf_counter()
    engine = load_engine(device, chosen)
    limits = batch_limits(engine, model_info(engine, chosen), chosen)
    warm_up(engine, limits, engine.eos_token_ids)
    print(f"loaded and warm after {time.perf_counter() - began_s:.1f} s", file=sys.stderr)
    return engine, limits, device.torch_device


def pairs(text: str) -> Iterator[tuple[int, int]]:
    """``1x128,32x512``"""
    for part in text.split(","):
        one, _, other = part.partition("x")
        yield int(one), int(other)


def table(document: dict[str, Any]) -> str:
    """For people."""
    limits = document["limits"]
    lines = [
        f"limits measured here: {limits['bytes_per_s'] / 1e9:,.0f} GB/s copied, "
        f"{limits['flops_per_s'] / 1e12:,.1f} TFLOP/s",
        "",
        f"{'decode':>12}{'step ms':>10}{'longest':>9}{'tokens/s':>10}{'limit ms':>10}{'of limit':>9}"
        f"{'plan us':>9}{'launch':>8}{'read':>9}{'emit':>8}",
    ]
    for row in document["decode"]:
        host = row["host_us"]
        lines.append(
            f"{row['rows']:>5} x{row['context']:>5}{row['step_ms']:>10.3f}{row['longest_ms']:>9.2f}"
            f"{row['tokens_per_s']:>10,.0f}{row['limit_ms']:>10.3f}{row['of_limit']:>9.1%}"
            f"{host['plan']:>9.0f}{host['launch']:>8.0f}{host['read']:>9.0f}{host['emit']:>8.0f}"
        )
    lines += ["", f"{'prefill':>12}{'context':>9}{'step ms':>10}{'tokens/s':>10}{'limit ms':>10}{'of limit':>9}"]
    for row in document["prefill"]:
        lines.append(
            f"{row['chunk']:>12}{row['context']:>9}{row['step_ms']:>10.2f}{row['tokens_per_s']:>10,.0f}"
            f"{row['limit_ms']:>10.2f}{row['of_limit']:>9.1%}"
        )
    for row in document["trace"]:
        busy = "the trace shows no accelerator" if row["busy_share"] is None else f"busy {row['busy_share']:.1%}"
        lines.append(f"trace of {row['steps']} decode steps, {row['rows']} rows: {busy}   {row['file']}")
    lines += [f"left out: {text}" for text in document["left_out"]]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="engine.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--backend", default="cuda", help="default %(default)s")
    add("--model-folder", type=Path, metavar="DIR", help="config.json of another shape")
    add("--quick", action="store_true", help="small, with the demo model's own weights")
    add("--decode", metavar="ROWSxCONTEXT,...", help=f"default {DECODES}")
    add("--prefill", metavar="CHUNKxPROMPT,...", help=f"default {PREFILLS}")
    add("--steps", type=int, help="decode steps per measurement (default 100, quick 10)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the engine's choice")
    add("--max-batch-size", type=int, default=256)
    add("--max-batch-prefill-tokens", type=int, default=8192)
    add("--trace", type=Path, metavar="FILE", help="chrome traces of steady decode, the number of rows in their names")
    add("--seed", type=int, default=time.time_ns() % 1_000_000)
    add("--json", type=Path, metavar="FILE")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tgi-bench-") as scratch:
        folder = options.model_folder
        if options.quick:
            options.max_batch_size, options.max_batch_prefill_tokens = 8, 256
            folder = folder or Path(importlib.import_module("tgi_demo_model").model_path())
        elif folder is None:
            folder = Path(scratch)
            write_model_folder(folder)
        try:
            document = measure(options, folder)
        except StartError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(table(document))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return 0


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything, in order; what does not fit is left out by name."""
    engine, limits, device = load(options, folder)
    dtype = getattr(torch, engine.dtype)
    ceilings = measure_ceilings(device, dtype)
    config = engine.config
    kv_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
    steps = options.steps or (10 if options.quick else 100)
    bench = Bench(
        engine, limits, device, ceilings, Work(config, dtype.itemsize, kv_bytes), steps, random.Random(options.seed)
    )
    document: dict[str, Any] = {
        "machine": machine(),
        "engine": {"device": engine.device_name, "dtype": engine.dtype, "pages": engine.num_pages},
        "limits": dataclasses.asdict(ceilings),
        "decode": [],
        "prefill": [],
        "trace": [],
        "left_out": [],
    }
    for rows, context in pairs(options.decode or (QUICK_DECODES if options.quick else DECODES)):
        why = bench.fits(rows, context)
        if why is None:
            document["decode"].append(bench.decode(rows, context))
        else:
            document["left_out"].append(f"decode {rows}x{context}: {why}")
    for chunk, length in pairs(options.prefill or (QUICK_PREFILLS if options.quick else PREFILLS)):
        if chunk > options.max_batch_prefill_tokens or length >= limits.max_total_tokens:
            document["left_out"].append(f"prefill {chunk}x{length}: the engine was started with smaller limits")
        else:
            document["prefill"] += bench.prefill(chunk, length)
    if options.trace:
        for rows in TRACED:
            why = bench.fits(rows, TRACE_CONTEXT)
            path = options.trace.with_stem(f"{options.trace.stem}-{rows}")
            if why is None:
                document["trace"].append(bench.trace(rows, path))
            else:
                document["left_out"].append(f"trace of {rows} rows: {why}")
    return document


if __name__ == "__main__":
    sys.exit(main())
