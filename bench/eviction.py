"""Shared prefixes, three times as many as the KV cache holds: are the answers those of a server without a cache?

    python bench/eviction.py                    the CPU engine with the demo model
    python bench/eviction.py --backend cuda     Llama 3.1 8B's shape, random weights

First each prefix with its first question is asked alone and without a cached token. Then many clients ask all prefixes,
some far more often than others, with questions old and new, so that prefixes are cached, used, pushed out and computed
again all the time. A question from the beginning must have the first token that it had, at the same log-probability but
for rounding; afterwards no KV token may be in use.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import machine
from model_folder import WORDS, write_model_folder
from served import NotServing, Served, serve
from workload import PromptMaker

from tgi_gateway.hub import demo_model

NEW_TOKENS = 8
EXACT, ROUNDED = 1e-3, 0.4
"""What a log-probability may be off by in float32, and in bfloat16: after 32 layers another rounding of attention's
weights alone makes a difference of 0.06 (standard deviation).
"""
SAME_SHARE = 0.9
"""Of first tokens; the others are ties but for rounding."""
HIT = "tgi_prefix_cache_hit_tokens"
EMPTY_S = 20.0


@dataclass
class Found:
    """`wrong` is empty if all is well."""

    wrong: list[str] = field(default_factory=list)
    answers: int = 0
    compared: int = 0
    same: int = 0
    largest_difference: float = 0.0
    """Between log-probabilities of the same first token."""
    median_difference: float = 0.0
    prompt_tokens: int = 0
    cached_share: float = 0.0
    """Of the prompt tokens under pressure."""
    seconds: float = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cpu", help="of the server (default cpu); cuda gets random weights")
    parser.add_argument("--prefixes", type=int, default=24, metavar="N", help="different ones (default 24)")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="of each prefix (default 8000; 320 with the demo model)"
    )
    parser.add_argument("--requests", type=int, default=240, metavar="N", help="under pressure (default 240)")
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="that ask at once (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="of texts and their order")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args(arguments)
    options.tokens = options.tokens or (320 if options.backend == "cpu" else 8000)
    with tempfile.TemporaryDirectory(prefix="tgi-bench-") as scratch:
        model = demo_model() if options.backend == "cpu" else Path(scratch) / "model"
        words = None
        if options.backend != "cpu":
            write_model_folder(model)
            words = model / WORDS
        prompts = PromptMaker(options.seed, 0, model, words)
        longest = options.tokens + 128
        held = options.prefixes * options.tokens // 3
        flags = ["--backend", options.backend, "--model-id", str(model), "--max-total-tokens", str(longest)]
        flags += ["--max-batch-total-tokens", str(max(held, 2 * longest)), "--max-concurrent-requests", "256"]
        flags += ["--load-format", "dummy"] if options.backend != "cpu" else []
        try:
            with serve(flags, Path(scratch) / "server.log", environ={"LOG_LEVEL": "warn"}, timeout_s=400.0) as served:
                found = press(served, prompts, options)
        except NotServing as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    document: dict[str, Any] = {"machine": machine(), "backend": options.backend, "found": vars(found)}
    print(json.dumps(document, indent=1))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return 1 if found.wrong else 0


def press(served: Served, prompts: PromptMaker, options: argparse.Namespace) -> Found:
    """Ask everything, and compare."""
    draw, found = random.Random(options.seed), Found()
    prefixes = [prompts.make(options.tokens)[0] for _ in range(options.prefixes)]
    questions = [prompts.make(32)[0] for _ in range(4)]
    alone = {}
    for number, prefix in enumerate(prefixes):
        before = hits(served)
        alone[number] = ask(served.url, f"{prefix} {questions[0]}")
        if hits(served) > before:
            found.wrong.append(f"prefix {number} was cached when it was asked for the first time")
    often = [1.0 / (1 + number) for number in range(options.prefixes)]
    draw.shuffle(often)
    turns = [
        (number, draw.choice((0, 0, 1, 2, 3)))
        for number in draw.choices(range(options.prefixes), often, k=options.requests)
    ]
    cached, began = hits(served), time.perf_counter()
    with ThreadPoolExecutor(options.clients) as clients:
        answers = list(clients.map(lambda turn: ask(served.url, f"{prefixes[turn[0]]} {questions[turn[1]]}"), turns))
    found.seconds = time.perf_counter() - began
    found.answers = len(answers)
    found.prompt_tokens = sum(answer.prompt_tokens for answer in answers)
    found.cached_share = (hits(served) - cached) / found.prompt_tokens
    again = [(alone[number], answer) for (number, asked), answer in zip(turns, answers, strict=True) if asked == 0]
    differences = [abs(one.logprob - other.logprob) for one, other in again if one.token == other.token]
    found.compared, found.same = len(again), len(differences)
    found.largest_difference = max(differences, default=0.0)
    found.median_difference = statistics.median(differences or [0.0])
    judge(found, served, EXACT if options.backend == "cpu" else ROUNDED)
    return found


def judge(found: Found, served: Served, allowed: float) -> None:
    if found.same < SAME_SHARE * found.compared:
        found.wrong.append(f"only {found.same} of {found.compared} first tokens are those of a cold server")
    if found.largest_difference > allowed:
        found.wrong.append(f"a log-probability is off by {found.largest_difference:.3f}, at most {allowed}")
    if not 0.05 < found.cached_share < 0.95:
        found.wrong.append(f"{found.cached_share:.0%} of the prompts came from the cache: this proves nothing")
    left = served.drained(EMPTY_S)
    if left:
        found.wrong.append(f"{EMPTY_S:.0f} s after the last answer there are still {left}")


@dataclass(frozen=True, slots=True)
class Answer:
    """The first token, and what the prompt took."""

    token: int
    logprob: float
    prompt_tokens: int


def ask(url: str, prompt: str) -> Answer:
    parameters = {"max_new_tokens": NEW_TOKENS, "details": True, "ignore_eos": True}
    body = json.dumps({"inputs": prompt, "parameters": parameters}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        first = json.load(answer)["details"]["tokens"][0]
        return Answer(first["id"], first["logprob"], int(answer.headers["x-prompt-tokens"]))


def hits(served: Served) -> float:
    return served.metrics().get(HIT, 0.0)


if __name__ == "__main__":
    sys.exit(main())
