"""Short exchanges between ranks: real processes with shared memory, kernels in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tgi_model_server.parallel import Shard

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
            [sys.executable, str(HERE / "exchange_rank.py"), str(file), str(rank), str(ranks), "40", str(seed)],
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


def test_exchanges_compile_to_loads_and_stores_that_pass_the_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from tgi_backend_cuda.exchange import Exchange
    from tgi_model_server.kernels.ahead import build, launches
    from tgi_model_server.kernels.launch import interpreted

    assert not interpreted()

    def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    exchange = Exchange(Shard(1, 2), empty(2, 2, 1 << 16, dtype=torch.int64), empty(2, dtype=torch.int64), early=True)
    rows = empty(4, 4096, dtype=torch.bfloat16)
    for call in (
        lambda: exchange.sum(rows, rows),
        lambda: exchange.gather(empty(1, 1000, dtype=torch.float32)),
        lambda: exchange.broadcast(empty(4, dtype=torch.int32)),
    ):
        (launch,) = launches(call)
        built = build(launch, "sm_90")
        assert built.spilled_bytes == 0
        assert "st.global.wt" in built.assembly
        assert "ld.volatile.global" in built.assembly
        assert "griddepcontrol.launch_dependents" in built.assembly
        waits, loads = (built.assembly.index(each) for each in ("griddepcontrol.wait", "ld.global"))
        assert waits < loads, "counts and input are the work of kernels that may still run"
