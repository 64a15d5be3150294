"""How long short requests wait for their first token, alone and while prompts of 100,000 tokens are being computed.

    python bench/giants.py --giants 2 --giant-tokens 100000

Runs the CPU engine on random weights of a model that is as small as can be, so that one machine can compute such
prompts at all: what is measured is how requests share the engine, not how fast it is.
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
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

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
SHORT_TOKENS = 40
START_S = 120.0


def first_token_s(port: int, tokens: int, dice: random.Random) -> float:
    """Of one request whose prompt nobody has sent before."""
    text = "".join(dice.choices("abcdefghijklmnopqrstuvwxyz ", k=tokens))
    body = json.dumps({"inputs": text, "parameters": {"max_new_tokens": 4, "ignore_eos": True}})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    began = time.perf_counter()
    connection.request("POST", "/generate_stream", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        sys.exit(f"the server answers {answer.status}: {answer.read()[:300]!r}")
    answer.readline()
    took_s = time.perf_counter() - began
    answer.read()
    connection.close()
    return took_s


def told(name: str, waits_s: list[float]) -> None:
    ordered = sorted(waits_s)
    slow = ordered[math.ceil(0.95 * (len(ordered) - 1))]
    print(f"{name:<28}{len(ordered):>5}  median {statistics.median(ordered) * 1e3:8.0f} ms  p95 {slow * 1e3:8.0f} ms")


def measure(port: int, giants: int, giant_tokens: int) -> None:
    dice = random.Random(1)
    told("short, alone", [first_token_s(port, SHORT_TOKENS, dice) for _ in range(30)])
    giant_waits_s: list[float] = []

    def giant(seed: int) -> None:
        giant_waits_s.append(first_token_s(port, giant_tokens, random.Random(seed)))

    threads = [threading.Thread(target=giant, args=(number,)) for number in range(giants)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    short_waits_s: list[float] = []
    while any(thread.is_alive() for thread in threads):
        short_waits_s.append(first_token_s(port, SHORT_TOKENS, dice))
        time.sleep(0.1)
    told(f"short, beside {giants} giants", short_waits_s)
    told(f"{giant_tokens} tokens", giant_waits_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--giants", type=int, default=2)
    parser.add_argument("--giant-tokens", type=int, default=100_000)
    parser.add_argument("--prefill", type=int, default=2048, help="Tokens of a step")
    parser.add_argument("--port", type=int, default=3999)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_byte_model(folder)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        total = asked.giant_tokens + 1000
        command = [sys.executable, "-m", "tgi_gateway", "--hostname", "127.0.0.1", "--port", str(asked.port)]
        command += ["--model-id", name, "--load-format", "dummy", "--max-total-tokens", str(total)]
        command += ["--max-batch-total-tokens", str((asked.giants + 1) * total)]
        command += ["--max-batch-prefill-tokens", str(asked.prefill)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "LOG_LEVEL": "error"})
        try:
            until_ready(asked.port, server)
            measure(asked.port, asked.giants, asked.giant_tokens)
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
