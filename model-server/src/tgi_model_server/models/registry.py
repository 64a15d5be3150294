"""Which class builds which architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from tgi_model_server.device import AttentionShape, Ops
from tgi_model_server.kv.pool import PagePool
from tgi_model_server.models.config import ModelConfig
from tgi_model_server.models.llama import Llama
from tgi_model_server.parallel import ALONE, Group
from tgi_model_server.step import StepInput
from tgi_model_server.weights.loader import Weights


class Model(Protocol):
    """A decoder with its weights on one rank."""

    def forward(self, step: StepInput, kv: PagePool) -> torch.Tensor:
        """The residual stream of the tokens that `step.wanted` names, [wanted, hidden]; the keys and values of all new
        tokens go into `kv`.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of what `forward` gave, [rows, hidden] -> float32 [rows, vocabulary]"""
        ...


class Build(Protocol):
    """A model class."""

    def __call__(
        self,
        config: ModelConfig,
        shape: AttentionShape,
        weights: Weights,
        ops: Ops,
        *,
        device: torch.device,
        max_positions: int,
        group: Group,
    ) -> Model: ...


ARCHITECTURES: Mapping[str, Build] = {"llama": Llama, "mistral": Llama, "qwen2": Llama, "qwen3": Llama}


def build_model(
    config: ModelConfig,
    shape: AttentionShape,
    weights: Weights,
    ops: Ops,
    *,
    device: torch.device,
    max_positions: int,
    group: Group = ALONE,
) -> Model:
    """Take every weight of `config`'s architecture. Raises `ModelError` for a wrong or missing one."""
    model = ARCHITECTURES[config.model_type](
        config, shape, weights, ops, device=device, max_positions=max_positions, group=group
    )
    weights.finish()
    return model
