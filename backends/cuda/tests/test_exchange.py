"""Short exchanges between ranks: real processes with shared memory, kernels in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it exists for Linux only)"),
    pytest.mark.slow,
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_exchange_through_shared_memory_all_get_the_same_right_numbers(ranks: int, tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    file = tmp_path / "inboxes"
    file.write_bytes(bytes(ranks * 2 * ranks * 3 * 512 * 8))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "exchange_rank.py"), str(file), str(rank), str(ranks), "60", str(seed)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, complaint) in zip(started, said, strict=True):
        assert process.returncode == 0, complaint[-3000:]
    assert len({told for told, _ in said}) == 1, "the same bits on all ranks"
    assert said[0][0].endswith("done\n")
