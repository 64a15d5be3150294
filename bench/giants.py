"""How long short requests wait for their first token, alone and while prompts of 100,000 tokens are being computed.

    python bench/giants.py --giants 2 --giant-tokens 100000
    python bench/giants.py --backend cpu --giants 1 --prefill 512

By default around a device that only waits, about as long as an H200 computes for 8 billion parameters, attention to
long contexts included: the host's part is the real one. With `--backend cpu` the engine computes, with random weights
of a model as small as can be, whose time is nearly all attention. What is measured is how requests share the engine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import random
import signal
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import simulated
from model_folder import WORDS, write_model_folder

from tgi_gateway.testing.worker import VOCAB_SIZE, write_byte_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
CONTEXT_US = 1.0
"""Attention of 32 layers of 32 heads of 128 is 0.5 TFLOP for a thousand tokens after a thousand others."""
SHORT_TOKENS = 40
START_S = 120.0


@dataclass(frozen=True)
class Server:
    """Where to send prompts, and what they are made of: pieces of a token each."""

    port: int
    pieces: Sequence[str]


def first_token_s(server: Server, tokens: int, dice: random.Random) -> float:
    """Of one request whose prompt nobody has sent before."""
    text = "".join(dice.choices(server.pieces, k=tokens))
    body = json.dumps({"inputs": text, "parameters": {"max_new_tokens": 4, "ignore_eos": True}})
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    began = time.perf_counter()
    connection.request("POST", "/generate_stream", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        sys.exit(f"the server answers {answer.status}: {answer.read()[:300]!r}")
    while not answer.readline().startswith(b"data:"):
        pass  # comments that keep the connection
    took_s = time.perf_counter() - began
    answer.read()
    connection.close()
    return took_s


def told(name: str, waits_s: list[float]) -> None:
    ordered = sorted(waits_s)
    slow = ordered[math.ceil(0.95 * (len(ordered) - 1))]
    print(f"{name:<28}{len(ordered):>5}  median {statistics.median(ordered) * 1e3:8.0f} ms  p95 {slow * 1e3:8.0f} ms")


def measure(server: Server, giants: int, giant_tokens: int) -> None:
    dice = random.Random(1)
    told("short, alone", [first_token_s(server, SHORT_TOKENS, dice) for _ in range(30)])
    giant_waits_s: list[float] = []

    def giant(seed: int) -> None:
        giant_waits_s.append(first_token_s(server, giant_tokens, random.Random(seed)))

    threads = [threading.Thread(target=giant, args=(number,)) for number in range(giants)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    short_waits_s: list[float] = []
    while any(thread.is_alive() for thread in threads):
        short_waits_s.append(first_token_s(server, SHORT_TOKENS, dice))
        time.sleep(0.1)
    told(f"short, beside {giants} giants", short_waits_s)
    told(f"{giant_tokens} tokens", giant_waits_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("cpu", simulated.NAME), default=simulated.NAME)
    parser.add_argument("--giants", type=int, default=2)
    parser.add_argument("--giant-tokens", type=int, default=100_000)
    parser.add_argument("--prefill", type=int, help="Tokens of a step (default: the engine's)")
    parser.add_argument("--port", type=int, default=3999)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = asked.giant_tokens + 1000
        command = [sys.executable, "-m", "tgi_gateway", "--hostname", "127.0.0.1", "--port", str(asked.port)]
        command += ["--model-id", name, "--load-format", "dummy", "--backend", asked.backend]
        command += ["--max-total-tokens", str(total)]
        command += ["--max-batch-prefill-tokens", str(asked.prefill)] if asked.prefill else []
        environ = {**os.environ, "LOG_LEVEL": "error"}
        pieces: Sequence[str] = string.ascii_lowercase
        if asked.backend == simulated.NAME:
            write_model_folder(folder)
            pieces = [f" {word}" for word in (folder / WORDS).read_text().split()]
            environ |= simulated.install(folder)
            command += ["--device-context-us", str(CONTEXT_US)]
        else:
            write_byte_model(folder)
            (folder / "config.json").write_text(json.dumps(CONFIG))
            command += ["--max-batch-total-tokens", str((asked.giants + 1) * total)]
        server = subprocess.Popen(command, stdout=sys.stderr, env=environ)
        try:
            until_ready(asked.port, server)
            measure(Server(asked.port, pieces), asked.giants, asked.giant_tokens)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


def until_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.2)
    sys.exit("the server did not start")


if __name__ == "__main__":
    main()
