"""The llama.cpp backend through HTTP, beside a bare llama_decode loop and beside llama-cpp-python's own server.

    python bench/llamacpp.py                      # a random model of 40 M parameters, in Q8_0
    python bench/llamacpp.py --size medium        # of 320 M
    python bench/llamacpp.py --size medium --type f16
    python bench/llamacpp.py --model some.gguf --threads 8

All have the same file and as many threads. Bare loop and gateway are measured in turns, each first in every second
round, so that a change of the machine's mood meets both: what counts is the median of what they are to each other in a
round. The other server runs by itself, at its best setting: it does not cut running streams off, and its threads never
sleep. It needs `pip install "llama-cpp-python[server]"`, and is left out without.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from served import NotServing, serve
from streams import Pool, Target

SIZES = {
    "small": {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1536, "num_attention_heads": 8},
    "medium": {"hidden_size": 1024, "num_hidden_layers": 26, "intermediate_size": 3072, "num_attention_heads": 16},
}
HEADS = {"head_dim": 64, "num_key_value_heads": 4, "max_position_embeddings": 8192}
READY_S = 120.0
STEP_TOKENS = 512
TARGETS = {"1 stream": 0.95, "8 streams": 0.9, "prompt": 0.95}
"""Least part of the bare loop's speed."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="GGUF", help="default: a random one, made for this run")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the random model (default small)")
    parser.add_argument("--type", choices=("q8_0", "f16"), default="q8_0", help="of its weights (default q8_0)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each (default 1)")
    parser.add_argument("--streams", type=int, default=8, metavar="N", help="beside a single one (default 8)")
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="of each answer (default 96)")
    parser.add_argument(
        "--prompt", type=int, default=1024, metavar="N", help="tokens of the long prompt (default 1024)"
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="the median counts (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tgi-bench-") as scratch:
        model = options.model or random_model(Path(scratch), options.size, options.type)
        try:
            figures = measure(options, model, Path(scratch) / "server.log")
        except NotServing as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    document = {"machine": machine(), "threads": options.threads, "model": model.name, "figures": figures}
    print(table(document))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return 0


def random_model(folder: Path, size: str, kind: str) -> Path:
    """A GGUF file with the demo model's tokenizer and random weights."""
    from safetensors.numpy import save_file

    from tgi_backend_llamacpp.convert import convert
    from tgi_gateway.hub import demo_model

    source = folder / "random"
    shutil.copytree(demo_model(), source, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text()) | SIZES[size] | HEADS
    (source / "config.json").write_text(json.dumps(config))
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    rows, kv_rows = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (kv_rows, hidden) for name in "kv"}
        shapes |= {f"{at}.self_attn.q_proj.weight": (rows, hidden), f"{at}.self_attn.o_proj.weight": (hidden, rows)}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
    rng = np.random.default_rng(0)
    weights = {
        name: np.ones(shape, np.float16)
        if len(shape) == 1
        else (rng.standard_normal(shape, np.float32) / shape[-1] ** 0.5).astype(np.float16)
        for name, shape in shapes.items()
    }
    save_file(weights, source / "model.safetensors")
    target = folder / f"random-{size}-{kind}.gguf"
    convert(source, target, kind)
    return target


def measure(options: argparse.Namespace, model: Path, log: Path) -> dict[str, dict[str, list[float]]]:
    """Workload -> who -> tokens/s in each round."""
    loads = {"1 stream": 1, f"{options.streams} streams": options.streams}
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in (*loads, "prompt")}
    flags = ["--backend", "llamacpp", "--model-id", str(model), "--n-threads", str(options.threads)]
    flags += ["--max-batch-prefill-tokens", str(STEP_TOKENS), "--max-batch-total-tokens", "8192"]
    flags += ["--max-total-tokens", "4096", "--json-output"]
    with serve(flags, log, environ={"LOG_LEVEL": "warn"}, timeout_s=READY_S) as ours, bare_loop(model, options) as bare:

        def turn(load: str, who: str, number: int) -> float:
            if who == "bare":
                work = ("decode", loads[load]) if load in loads else ("prompt", options.prompt)
                return ask(bare, (*work, number))
            if load in loads:
                return asyncio.run(streamed(ours.url, "/generate_stream", loads[load], options.tokens, number))
            return prompt_rate(ours.url, options.prompt, number)

        for number in range(options.rounds + 1):  # the first warms up
            for load, rates in figures.items():
                for who in ("bare", "ours") if number % 2 else ("ours", "bare"):
                    rate = turn(load, who, number)
                    if number:
                        rates.setdefault(who, []).append(rate)
    if importlib.util.find_spec("sse_starlette") is None:
        print("llama_cpp.server is left out: its packages are not installed", file=sys.stderr)
        return figures
    with other_server(model, options, log) as url:
        for number in range(3):
            for load, streams in loads.items():
                rate = asyncio.run(streamed(url, "/v1/completions", streams, options.tokens, number))
                figures[load].setdefault("llama_cpp.server", []).append(rate)
    return figures


# The bare loop.


@contextmanager
def bare_loop(model: Path, options: argparse.Namespace) -> Iterator[Connection]:
    """A process with a model and a context, and nothing else."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=_loop, args=(far, model, options.threads, options.streams, options.tokens))
    process.start()
    try:
        yield near
    finally:
        near.send(None)
        process.join(10)
        process.kill()


def ask(loop: Connection, work: tuple[str, int, int]) -> float:
    loop.send(work)
    rate: float = loop.recv()
    return rate


def _loop(pipe: Connection, path: Path, threads: int, streams: int, tokens: int) -> None:
    from tgi_backend_llamacpp.native import Context, Model
    from tgi_backend_llamacpp.options import LlamaOptions
    from tgi_gateway.backend import EngineOptions

    sizes = {"max_batch_size": max(streams, 8), "max_batch_prefill_tokens": STEP_TOKENS}
    options = LlamaOptions.of(EngineOptions(path, "bench", extra={"n_threads": threads}, **sizes))  # type: ignore[arg-type]
    model = Model(path, options)
    context = Context(model, options, kv_tokens=8192, outputs=128)
    while (work := pipe.recv()) is not None:
        kind, size, number = work
        context.clear()
        began = time.perf_counter()
        if kind == "prompt":
            words = prompt_ids(model, size, number)
            for start in range(0, len(words), STEP_TOKENS):
                part = words[start : start + STEP_TOKENS]
                last = np.array([len(part) - 1]) if start + len(part) == len(words) else np.array([], np.intp)
                context.decode(part, range(start, start + len(part)), [0] * len(part), last)
            pipe.send(len(words) / (time.perf_counter() - began))
            continue
        prompts = [model.tokenize(short_prompt(stream, number)) for stream in range(size)]
        flat = [token for prompt in prompts for token in prompt]
        places = [place for prompt in prompts for place in range(len(prompt))]
        owners = [stream for stream, prompt in enumerate(prompts) for _ in prompt]
        ends = np.cumsum([len(prompt) for prompt in prompts]) - 1
        chosen = context.decode(flat, places, owners, ends).argmax(1)
        lengths = np.array([len(prompt) for prompt in prompts])
        rows = np.arange(size)
        for step in range(tokens - 1):
            chosen = context.decode(chosen, lengths + step, rows, rows).argmax(1)
        pipe.send(size * tokens / (time.perf_counter() - began))


def short_prompt(stream: int, number: int) -> str:
    """A new one in every round, so that no cache helps."""
    return f"{stream} {number} tell me a story about a dog and a cat"


def long_prompt(size: int, number: int) -> str:
    return f"{number} " + "the dog and the cat went to the house " * (size // 9 + 1)


def prompt_ids(model: Any, size: int, number: int) -> list[int]:
    ids: list[int] = model.tokenize(long_prompt(size, number))
    return ids


# Servers.


async def streamed(url: str, route: str, streams: int, tokens: int, number: int) -> float:
    """Tokens/s of so many streams that begin together, from the first request to the last answer."""
    pool = Pool(Target.of(url, route), timeout_s=300.0)
    requests = [pool.target.request(body(route, short_prompt(stream, number), tokens)) for stream in range(streams)]
    began = time.perf_counter()
    answers = await asyncio.gather(*(pool.post(request) for request in requests))
    seconds = max(answer.ended_at for answer in answers) - began
    pool.close()
    return streams * tokens / seconds


def body(route: str, prompt: str, tokens: int) -> bytes:
    if route == "/generate_stream":
        asked: dict[str, Any] = {"inputs": prompt, "parameters": {"max_new_tokens": tokens, "ignore_eos": True}}
    else:
        asked = {
            "prompt": prompt,
            "max_tokens": tokens,
            "stream": True,
            "temperature": 0.0,
            "logit_bias": {"2": -100, "0": -100},
        }
    return json.dumps(asked).encode()


def prompt_rate(url: str, size: int, number: int) -> float:
    """Prompt tokens/s until the first token, in one answer."""
    asked = {"inputs": long_prompt(size, number), "parameters": {"max_new_tokens": 1, "details": True}}
    request = urllib.request.Request(
        f"{url}/generate", json.dumps(asked).encode(), {"content-type": "application/json"}
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=300) as answer:
        answer.read()
        return int(answer.headers["x-prompt-tokens"]) / (time.perf_counter() - began)


@contextmanager
def other_server(model: Path, options: argparse.Namespace, log: Path) -> Iterator[str]:
    """``python -m llama_cpp.server`` at its best: one request at a time, none cut off, its threads awake."""
    port = "38947"
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--host", "127.0.0.1", "--port", port]
    command += ["--n_threads", str(options.threads), "--n_threads_batch", str(options.threads), "--n_ctx", "4096"]
    command += ["--interrupt_requests", "false", "--n_batch", str(STEP_TOKENS), "--flash_attn", "true"]
    url = f"http://127.0.0.1:{port}"
    with log.open("ab") as out:
        environ = {**os.environ, "OMP_WAIT_POLICY": "active"}
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environ)
    try:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise NotServing(f"llama_cpp.server did not come up; its log: {log.read_text()[-2000:]}") from None
                time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait()


def table(document: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{document['model']}, {document['threads']} thread(s), {document['machine']['cpu']}, commit "
        f"{document['machine']['commit']}, load average {document['machine']['load_average']:.1f}",
        "",
        "| tokens/s | bare loop | through HTTP | part of it | target | llama_cpp.server | times it |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for load, rates in document["figures"].items():
        bare, ours = rates["bare"], rates["ours"]
        other = rates.get("llama_cpp.server")
        part = statistics.median(mine / theirs for mine, theirs in zip(ours, bare, strict=True))
        cells = [load, *(f"{statistics.median(each):.0f}" for each in (bare, ours)), f"{part:.2f}"]
        cells.append(str(TARGETS.get(load, "")))
        if other:
            cells += [f"{max(other):.0f}", f"{statistics.median(ours) / max(other):.1f}"]
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
