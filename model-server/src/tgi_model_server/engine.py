"""Engine: a model, its pages and its sampler on one device; `run` turns a StepPlan into sampled tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from tgi_gateway.backend import OPTIONS, EngineOptions, refuse_options
from tgi_gateway.errors import GatewayError
from tgi_gateway.telemetry import logs
from tgi_gateway.types import NO_LOGPROB, FinishReason, Request
from tgi_model_server.buckets import choose_bucket, pad_plan
from tgi_model_server.device import AttentionShape, Bucket, Device, Forward, StepLimits
from tgi_model_server.kv.pool import PagePool
from tgi_model_server.models.config import ModelConfig, find_eos, load_config
from tgi_model_server.models.registry import Model, build_model
from tgi_model_server.parallel import ALONE, Group, Shard
from tgi_model_server.plan import PREVIOUS_TOKEN, StepPlan, StepResult
from tgi_model_server.sampling.grammar import Constraint
from tgi_model_server.sampling.sampler import Sampled, Sampler
from tgi_model_server.sampling.watermark import Watermark
from tgi_model_server.sizing import (
    attention_shape,
    compute_dtype,
    kept_dtype,
    num_pages,
    step_limits,
)
from tgi_model_server.step import AttentionPlan, StepInput, refill, step_input
from tgi_model_server.transfer import HostCopy, to_device
from tgi_model_server.weights.dummy import DummyWeights
from tgi_model_server.weights.loader import CheckpointWeights, Progress, Weights
from tgi_model_server.worst_case import run_largest_steps

log = logging.getLogger(__name__)

HONOURED = OPTIONS - {"quantize", "lora_adapters", "speculate"}
_PROMPT_LOGPROB_ROWS = 128
"""Prompt tokens whose logits exist at a time."""


class Engine:
    """Implements `runner.Runner`. Everything but construction is called from one thread.

    Of several ranks each runs the same plans, and rank 0 alone samples: the others get the tokens from it, and know
    nothing of requests and slots.
    """

    def __init__(
        self,
        device: Device,
        model: Model,
        config: ModelConfig,
        *,
        shape: AttentionShape,
        num_pages: int,
        limits: StepLimits,
        eos_token_ids: Sequence[int],
        watermark: Watermark | None = None,
        group: Group = ALONE,
        capture: bool = True,
    ) -> None:
        """`capture`: run in the device's buckets, made fast now."""
        self.config = config
        self.eos_token_ids = tuple(eos_token_ids)
        self.limits = limits
        self._device = device
        self._model = model
        self._shape = shape
        self._layout = device.kv_layout(shape)
        self._group = group
        self._sampler: Sampler | None = None
        with torch.inference_mode():
            self._kv = PagePool(num_pages, config.num_layers, self._layout, shape, device.zeros)
            if group.rank == 0:
                self._sampler = Sampler(
                    vocab_size=config.vocab_size,
                    max_sequences=limits.max_rows,
                    eos_token_ids=eos_token_ids,
                    device=device.torch_device,
                    watermark=watermark,
                    greedy=device.ops.greedy,
                    peek=device.pipeline_depth == 1,
                )
            self._captured = self._capture(device.buckets(limits) if capture else ())

    @property
    def page_size(self) -> int:
        return self._layout.page_size

    @property
    def num_pages(self) -> int:
        return self._kv.num_pages

    @property
    def max_sequences(self) -> int:
        return self.limits.max_rows

    @property
    def pipeline_depth(self) -> int:
        return self._device.pipeline_depth

    @property
    def max_mixed_tokens(self) -> int | None:
        return self._device.defaults.mixed_tokens

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def dtype(self) -> str:
        return str(self._shape.dtype).removeprefix("torch.")

    @property
    def device_name(self) -> str:
        return self._device.name

    def admit(
        self, slot: int, request: Request, output_ids: Sequence[int], constraint: Constraint | None = None
    ) -> None:
        assert self._sampler is not None, "rank 0 knows the requests"
        with torch.inference_mode():
            self._sampler.admit(slot, request, output_ids, constraint)

    def release(self, slot: int) -> None:
        assert self._sampler is not None, "rank 0 knows the requests"
        self._sampler.release(slot)

    def run(self, plan: StepPlan) -> EngineOutput:
        with torch.inference_mode():
            pending = self._sampler.begin(plan) if self._sampler is not None else None
            try:
                logits, scores = self._logits_and_scores(plan)
            finally:
                masks = pending() if pending is not None else None
            rows = len(plan.sample_rows)
            sampled = self._sampler.sample(logits[:rows], plan, masks) if rows and self._sampler is not None else None
            output = EngineOutput(rows, sampled, scores, {} if masks is None else masks.endings)
            if masks is not None and self._sampler is not None:
                self._sampler.sampled(plan, output)
            return output

    def close(self) -> None:
        """Give the memory back and leave the group; nothing may be called afterwards."""
        # Captured steps come first: they hold on to the exchanges that are recorded in them.
        del self._captured, self._kv, self._model, self._sampler
        self._group.close()

    def _logits_and_scores(self, plan: StepPlan) -> tuple[torch.Tensor, dict[int, list[HostCopy]]]:
        """Run the model, in the smallest captured form that fits. Captured steps keep no hidden states."""
        bucket = None
        if self._captured and not plan.prompt_targets and self._device.prefers_captured(plan):
            bucket = choose_bucket(plan, self._captured)
        if bucket is not None:
            captured = self._captured[bucket]
            padded = pad_plan(plan, bucket, self.page_size)
            return captured.forward(refill(captured.step, padded, self._attention(padded, bucket))), {}
        ahead = PREVIOUS_TOKEN in plan.token_ids
        step = step_input(plan, self._attention(plan), self._device.torch_device, ahead=ahead)
        if not step.whole:
            return self._forward(step), {}
        hidden = self._model.forward(self._known(step), self._kv)
        return self._model.logits(hidden.index_select(0, step.last_token)), self._prompt_scores(plan, hidden)

    def _attention(self, plan: StepPlan, bucket: Bucket | None = None) -> AttentionPlan:
        return self._device.plan_attention(plan, self._shape, self._layout, bucket)

    def _forward(self, step: StepInput) -> torch.Tensor:
        return self._model.logits(self._model.forward(self._known(step), self._kv))

    def _known(self, step: StepInput) -> StepInput:
        """The step with what the slots sampled last put in where the host did not know it yet."""
        if step.slots is None:
            return step
        if self._sampler is not None:
            previous = self._sampler.last_tokens.index_select(0, step.slots).to(step.input_ids.dtype)
        else:
            previous = torch.empty_like(step.input_ids)
        self._group.broadcast(previous)
        ids = torch.where(step.input_ids == PREVIOUS_TOKEN, previous, step.input_ids)
        return replace(step, input_ids=ids, slots=None)

    def _prompt_scores(self, plan: StepPlan, hidden: torch.Tensor) -> dict[int, list[HostCopy]]:
        """Row -> on their way to the host, float32 [targets], log-probabilities of the prompt tokens that follow; and
        where they are wanted the most likely tokens' int64 ids and float32 log-probabilities [targets, wanted]."""
        out: dict[int, list[HostCopy]] = {}
        starts = [0]
        for query_len in plan.query_lens:
            starts.append(starts[-1] + query_len)
        for row, targets in plan.prompt_targets.items():
            parts: list[tuple[torch.Tensor, ...]] = []
            top = min(plan.prompt_top.get(row, 0), self.vocab_size)
            for begin in range(0, len(targets), _PROMPT_LOGPROB_ROWS):
                wanted = self._tensor(targets[begin : begin + _PROMPT_LOGPROB_ROWS])
                first = starts[row] + begin
                logits = self._model.logits(hidden[first : first + wanted.shape[0]])
                whole = logits.logsumexp(-1, keepdim=True)
                logprobs = (logits.gather(1, wanted[:, None]) - whole)[:, 0]
                best = logits.topk(top, dim=-1) if top else None
                parts.append((logprobs,) if best is None else (logprobs, best.indices, best.values - whole))
            out[row] = [HostCopy(torch.cat(each)) for each in zip(*parts, strict=True)]
        return out

    def _capture(self, buckets: Sequence[Bucket]) -> dict[Bucket, _Captured]:
        """Every bucket's forward pass made fast, by running it once on padding alone."""
        captured: dict[Bucket, _Captured] = {}
        for number, bucket in enumerate(buckets):
            if self._group.rank == 0:
                logs.progress(log, "Recording steps", number / len(buckets))
            plan = pad_plan(StepPlan(), bucket, self.page_size)
            example = step_input(
                plan,
                self._attention(plan, bucket),
                self._device.torch_device,
                sampled=bucket.num_rows,
                ahead=self.pipeline_depth > 1,
            )
            captured[bucket] = _Captured(self._device.capture(self._forward, example, bucket), example)
        return captured

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return to_device(values, torch.int64, self._device.torch_device)


@dataclass(frozen=True, slots=True)
class _Captured:
    """A bucket's forward pass, and the tensors that it reads."""

    forward: Forward
    step: StepInput


class EngineOutput:
    """A started step, its results on their way to the host. Implements `runner.StepOutput`."""

    def __init__(
        self,
        rows: int,
        sampled: Sampled | None,
        prompt_scores: dict[int, list[HostCopy]],
        endings: dict[int, FinishReason | GatewayError],
    ) -> None:
        self._rows = rows
        self._sampled = sampled
        self._tokens = None if sampled is None else HostCopy(sampled.tokens)
        self._scores = [
            HostCopy(each)
            for each in ((sampled.logprobs, sampled.top_ids, sampled.top_logprobs) if sampled is not None else ())
            if each is not None
        ]
        self._prompt_scores = prompt_scores
        self._endings = endings
        self._result: StepResult | None = None

    def wait(self) -> StepResult:
        if self._result is None:
            self._result = self._read()
        return self._result

    def _read(self) -> StepResult:
        result = StepResult([], [], endings=self._endings)
        for row, told in self._prompt_scores.items():
            logprobs, *top = [each.wait().tolist() for each in told] or [[]]  # none: a chunk without targets
            result.prompt_logprobs[row] = logprobs
            if top:
                result.prompt_top[row] = [tuple(zip(*pair, strict=True)) for pair in zip(*top, strict=True)]
        sampled = self._sampled
        if sampled is None or self._tokens is None:
            return result
        result.token_ids = self._tokens.wait().tolist()
        result.logprobs = [NO_LOGPROB] * self._rows
        scores = [each.wait().tolist() for each in self._scores]
        if scores:
            for index, value in zip(sampled.scored, scores[0], strict=True):
                result.logprobs[index] = value
        if len(scores) > 1:
            for index, size, ids, values in zip(sampled.scored, sampled.top_sizes, *scores[1:], strict=True):
                if size:
                    result.top[index] = tuple(zip(ids[:size], values[:size], strict=True))
        return result


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is known of an engine before its weights are read."""

    options: EngineOptions
    """With the dtype that was chosen, so that all ranks compute in the same."""
    config: ModelConfig
    limits: StepLimits
    shape: AttentionShape


def prepare(device: Device, options: EngineOptions, shard: Shard) -> Preparation:
    """Check `options` against the model and the device.

    Raises `ModelError` for what is wrong with the model's files, `SettingsError` for options that do not fit.
    """
    refuse_options(options, HONOURED)
    config = load_config(options.model_path, rope_scaling=options.rope_scaling, rope_factor=options.rope_factor)
    dtype = compute_dtype(device, options, config)
    shape = attention_shape(config, shard, dtype, kept_dtype(device, options, dtype))
    options = replace(options, dtype=str(dtype).removeprefix("torch."))
    return Preparation(options, config, step_limits(device, options, config), shape)


def load_engine(
    device: Device, options: EngineOptions, progress: Progress | None = None, group: Group = ALONE
) -> Engine:
    """Read this rank's part of the model onto `device`; `progress` is told (bytes done, bytes in all) of its weights.

    Raises as `prepare`, and `MemoryError`. Ranks do it together: the smallest memory decides how many pages all have.
    """
    try:
        return _load_engine(device, options, progress, group)
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error


def _load_engine(device: Device, options: EngineOptions, progress: Progress | None, group: Group) -> Engine:
    assert options.num_shard == group.world_size
    shard = group.shard
    ready = prepare(device, options, shard)
    options, config, limits, shape = ready.options, ready.config, ready.limits, ready.shape
    dtype = shape.dtype
    weights: Weights
    if options.load_format == "dummy":
        weights = DummyWeights(dtype=dtype, device=device.torch_device, shard=shard)
    else:
        weights = CheckpointWeights(
            options.model_path, dtype=dtype, device=device.torch_device, shard=shard, progress=progress
        )
    with torch.inference_mode():
        model = build_model(
            config, shape, weights, device.ops, device=device.torch_device, max_positions=limits.max_kv_len, group=group
        )
    build = partial(
        Engine,
        device,
        model,
        config,
        shape=shape,
        limits=limits,
        eos_token_ids=find_eos(options.model_path, config),
        watermark=Watermark(config.vocab_size, options.watermark_gamma, options.watermark_delta),
        group=group,
    )

    def largest_steps(within: StepLimits, plain: bool) -> None:
        run_largest_steps(build(num_pages=1, capture=False), within, samples=group.rank == 0, plain=plain)

    if group.rank == 0:
        logs.progress(log, "Measuring the largest steps", None)
    return build(num_pages=group.minimum(num_pages(device, options, config, shape, limits, largest_steps)))
