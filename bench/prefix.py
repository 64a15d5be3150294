"""Time of a prefix-cache lookup against prompt length and cache size.

    python bench/prefix.py [--json out.json]

One table: rows are prompt lengths in tokens, columns are cache sizes in pages. `find` is the lookup; `take` is the
lookup, becoming a user of the prefix with its page list, and releasing it. `cold find` asks for a different cached
prompt each time, so that neither the tree nor the key is in the processor's cache. `key` turns the token list into the
bytes that the tree compares, once per request. All prompts hit. The cache holds many branches off shared stems, and its
size counts all of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import time
from array import array
from collections.abc import Callable
from pathlib import Path

from tgi_model_server.kv.pages import PageAllocator
from tgi_model_server.kv.prefix import PrefixCache

PAGE_SIZE = 16
PROMPTS = [128, 1024, 8192, 32768, 131072]
CACHES = [1_000, 10_000, 100_000, 1_000_000]
COLD_PROMPTS = 64


def key_of(draw: random.Random, tokens: int) -> bytes:
    """Random token ids below 2**17, as the cache wants them."""
    return array("i", [word & 0x1FFFF for word in array("I", draw.randbytes(4 * tokens))]).tobytes()


def insert(cache: PrefixCache, allocator: PageAllocator, key: bytes) -> int:
    """Cache `key` and leave; returns how many pages that took."""
    whole = len(key) // (4 * PAGE_SIZE)
    node, pages = cache.use(cache.find(key, whole, step=1))
    fresh = allocator.take(whole - len(pages))
    node, _, _ = cache.extend(node, len(pages), key, pages + fresh)
    cache.release(node)
    return len(fresh)


def fill(cache: PrefixCache, allocator: PageAllocator, draw: random.Random, pages: int) -> None:
    """Branches of 1 to 64 pages off 100 stems of 8 pages, until about `pages` are cached."""
    stems = [key_of(draw, 8 * PAGE_SIZE) for _ in range(100)]
    tail = key_of(draw, 64 * PAGE_SIZE)
    while cache.cached_pages < pages:
        length = draw.randint(1, 64) * PAGE_SIZE * 4
        insert(cache, allocator, draw.choice(stems) + draw.randbytes(PAGE_SIZE * 4) + tail[:length])


def best_us(call: Callable[[], object], repeat: int) -> tuple[float, float]:
    """Median and 99th percentile over batches of single calls, microseconds."""
    times = []
    clock = time.perf_counter_ns
    for _ in range(repeat):
        start = clock()
        call()
        times.append((clock() - start) / 1000)
    times.sort()
    return statistics.median(times), times[int(len(times) * 0.99)]


def measure(cache_pages: int, prompts: list[int], seed: int, repeat: int) -> list[dict[str, float]]:
    draw = random.Random(seed)
    own = sum(COLD_PROMPTS * tokens // PAGE_SIZE for tokens in prompts if tokens <= 8192)
    own += sum(4 * tokens // PAGE_SIZE for tokens in prompts)
    allocator = PageAllocator(cache_pages + own + 1000)
    cache = PrefixCache(PAGE_SIZE, allocator)
    fill(cache, allocator, draw, cache_pages)
    gc.collect()
    gc.freeze()
    rows = []
    for tokens in prompts:
        count = COLD_PROMPTS if tokens <= 8192 else 4
        keys = [key_of(draw, tokens) for _ in range(count)]
        for key in keys:
            insert(cache, allocator, key)
        # Half a page more than what is cached, as a prompt that goes on; no key object is the one in the tree.
        asked = [key + b"\1" * (2 * PAGE_SIZE) for key in keys]
        whole = tokens // PAGE_SIZE
        key = asked[0]
        assert cache.find(key, whole, step=1).pages == whole

        def take(key: bytes = key, whole: int = whole) -> None:
            node, _ = cache.use(cache.find(key, whole, step=1))
            cache.release(node)

        turn = iter(asked * (repeat // count + 1))
        ids = list(array("i", key))
        find_us, find_p99 = best_us(lambda key=key, whole=whole: cache.find(key, whole, step=1), repeat)  # type: ignore[misc]
        cold_us, cold_p99 = best_us(lambda turn=turn, whole=whole: cache.find(next(turn), whole, step=1), repeat)  # type: ignore[misc]
        take_us, _ = best_us(take, repeat)
        key_us, _ = best_us(lambda ids=ids: array("i", ids).tobytes(), max(20, repeat // 20))  # type: ignore[misc]
        rows.append(
            {
                "prompt_tokens": tokens,
                "cached_pages": cache.cached_pages,
                "nodes": sum(1 for _ in cache.nodes()),
                "find_us": round(find_us, 2),
                "find_p99_us": round(find_p99, 2),
                "cold_find_us": round(cold_us, 2),
                "cold_find_p99_us": round(cold_p99, 2),
                "take_us": round(take_us, 2),
                "key_us": round(key_us, 2),
            }
        )
    gc.unfreeze()
    return rows


def hardware() -> dict[str, str]:
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "cpu": model,
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="prompt lengths in tokens")
    parser.add_argument("--caches", type=int, nargs="+", default=CACHES, help="cache sizes in pages")
    parser.add_argument("--repeat", type=int, default=2000, help="lookups per figure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    about = hardware()
    print(", ".join(f"{name} {value}" for name, value in about.items()), f"page size {PAGE_SIZE}", sep=", ")
    rows = []
    for pages in args.caches:
        rows += measure(pages, args.prompts, args.seed, args.repeat)
    print("\nmedian microseconds (99th percentile)")
    print(f"{'prompt':>8} {'cached pages':>13} {'nodes':>7} {'find':>16} {'cold find':>16} {'take':>8} {'key':>8}")
    for row in sorted(rows, key=lambda row: (row["prompt_tokens"], row["cached_pages"])):
        find = f"{row['find_us']:.2f} ({row['find_p99_us']:.2f})"
        cold = f"{row['cold_find_us']:.2f} ({row['cold_find_p99_us']:.2f})"
        print(
            f"{row['prompt_tokens']:>8} {row['cached_pages']:>13} {row['nodes']:>7} {find:>16} {cold:>16} "
            f"{row['take_us']:>8.2f} {row['key_us']:>8.1f}"
        )
    if args.json:
        args.json.write_text(json.dumps({"about": about, "page_size": PAGE_SIZE, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
