"""The device contract on a GPU: every kernel against the float32 reference, graphs against eager steps."""

from __future__ import annotations

import pytest
import torch

from tgi_contract_tests.device import DeviceContract
from tgi_model_server.device import Device, KVLayout
from tgi_model_server.plan import StepPlan
from tgi_model_server.reference import reference_plan
from tgi_model_server.step import StepInput, refill, step_input

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


class TestCudaDevice(DeviceContract):
    dtypes = ("bfloat16", "float16", "float32")

    def make_device(self) -> Device:
        from tgi_backend_cuda.device import CudaDevice

        return CudaDevice()


def test_a_graph_may_give_a_part_of_a_wider_result() -> None:
    """As the logits of several ranks are, where the vocabulary does not come out even."""
    from tgi_backend_cuda.graphs import Recorder

    device, recorder = torch.device("cuda", 0), Recorder()
    factors = torch.rand(516, device=device)

    def forward(step: StepInput) -> torch.Tensor:
        return (step.input_ids.float()[:, None] * factors)[:, :515]

    def planned(*tokens: int) -> StepPlan:
        rows = len(tokens)
        return StepPlan(list(range(rows)), [1] * rows, [1] * rows, [[0]] * rows, list(tokens), list(range(rows)))

    attention = reference_plan(planned(1, 2, 3), KVLayout(16), device)
    example = step_input(planned(1, 2, 3), attention, device)
    with torch.inference_mode():
        first = recorder.record(forward, example)
        recorder.record(forward, example)  # may use the memory of the first
        for tokens in ((5, 6, 7), (9, 8, 4)):
            step = refill(example, planned(*tokens), attention)
            assert torch.equal(first(step), torch.tensor(tokens, device=device)[:, None] * factors[:515])
