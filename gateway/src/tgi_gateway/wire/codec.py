"""Our types as protobuf messages and back."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from itertools import chain, islice
from typing import TypeVar, cast, get_args

from tgi_gateway.backend import ALL_FEATURES, Capabilities, Capacity, ModelInfo
from tgi_gateway.types import (
    Failed,
    Finished,
    FinishReason,
    Grammar,
    GrammarKind,
    Request,
    SamplingParams,
    StepEvents,
    StopRules,
    TokenIds,
    Usage,
)
from tgi_gateway.wire import engine_pb2 as pb

_REASON_CODES: dict[FinishReason, pb.FinishReason] = {
    "length": pb.LENGTH,
    "eos_token": pb.EOS_TOKEN,
    "stop_sequence": pb.STOP_SEQUENCE,
    "cancelled": pb.CANCELLED,
}
_REASONS: dict[int, FinishReason] = {int(code): reason for reason, code in _REASON_CODES.items()}
_UINT32 = "I"
ID_BYTES = array(_UINT32).itemsize
assert ID_BYTES == 4, "the wire has 4 bytes for each token id"
_Ids = TypeVar("_Ids", bound="array[int]")
_GRAMMAR_KINDS: frozenset[str] = frozenset(get_args(GrammarKind))


def encode_request(request: Request) -> pb.Request:
    """Raises ValueError or TypeError for values the wire has no room for, such as a negative token id."""
    sampling, stop = request.sampling, request.stop
    return pb.Request(
        request_id=request.request_id,
        input_ids=_pack_ids(request.input_ids),
        sampling=pb.SamplingParams(
            do_sample=sampling.do_sample,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            typical_p=sampling.typical_p,
            seed=sampling.seed,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            logit_bias_ids=[token_id for token_id, _ in sampling.logit_bias],
            logit_bias_values=[bias for _, bias in sampling.logit_bias],
            watermark=sampling.watermark,
            grammar=pb.Grammar(kind=sampling.grammar.kind, source=sampling.grammar.source)
            if sampling.grammar
            else None,
        ),
        stop=pb.StopRules(
            max_new_tokens=stop.max_new_tokens,
            min_new_tokens=stop.min_new_tokens,
            ignore_eos=stop.ignore_eos,
            stop_token_ids=stop.stop_token_ids,
            stop_strings=stop.stop_strings,
        ),
        logprobs=request.logprobs,
        top_n_tokens=request.top_n_tokens,
        prefill_logprobs=request.prefill_logprobs,
        prefill_top_n_tokens=request.prefill_top_n_tokens,
        adapter_id=request.adapter_id,
        cache_salt=request.cache_salt,
        priority=request.priority,
        name=request.name,
        tenant=request.tenant,
        traceparent=request.traceparent,
    )


def _pack_ids(ids: Sequence[int]) -> bytes:
    try:
        packed = array(ids.typecode if isinstance(ids, TokenIds) else _UINT32, ids)
    except OverflowError as error:
        raise ValueError(f"a token id has no place in 32 bits: {error}") from None
    return _little_endian(packed).tobytes()


def _unpack_ids(packed: bytes) -> TokenIds:
    """Raises ValueError for a part of an id. Ids that need the 32nd bit become negative, which no vocabulary has."""
    return _little_endian(TokenIds(packed))


def _little_endian(ids: _Ids) -> _Ids:
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


def decode_request(message: pb.Request) -> Request:
    """Raises ValueError for what no `encode_request` makes."""
    sampling, stop = message.sampling, message.stop
    grammar: Grammar | None = None
    if sampling.HasField("grammar"):
        kind = sampling.grammar.kind
        if kind not in _GRAMMAR_KINDS:
            raise ValueError(f"grammar kind {kind!r} is unknown; allowed: {', '.join(sorted(_GRAMMAR_KINDS))}")
        grammar = Grammar(cast(GrammarKind, kind), sampling.grammar.source)
    return Request(
        request_id=message.request_id,
        input_ids=_unpack_ids(message.input_ids),
        sampling=SamplingParams(
            do_sample=sampling.do_sample,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            typical_p=sampling.typical_p,
            seed=sampling.seed,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            logit_bias=tuple(zip(sampling.logit_bias_ids, sampling.logit_bias_values, strict=True)),
            watermark=sampling.watermark,
            grammar=grammar,
        ),
        stop=StopRules(
            max_new_tokens=stop.max_new_tokens,
            min_new_tokens=stop.min_new_tokens,
            ignore_eos=stop.ignore_eos,
            stop_token_ids=tuple(stop.stop_token_ids),
            stop_strings=tuple(stop.stop_strings),
        ),
        logprobs=message.logprobs,
        top_n_tokens=message.top_n_tokens,
        prefill_logprobs=message.prefill_logprobs,
        prefill_top_n_tokens=message.prefill_top_n_tokens,
        adapter_id=message.adapter_id if message.HasField("adapter_id") else None,
        cache_salt=message.cache_salt,
        priority=message.priority,
        name=message.name,
        tenant=message.tenant,
        traceparent=message.traceparent,
    )


def encode_step(events: StepEvents, capacity: Capacity | None) -> pb.StepEvents:
    """One message for all of `events`, with the engine's capacity if known."""
    message = pb.StepEvents(request_ids=events.request_ids, token_ids=events.token_ids, logprobs=events.logprobs)
    for row, top in events.top.items():
        message.top_rows.append(row)
        message.top_counts.append(len(top))
        message.top_ids.extend([token_id for token_id, _ in top])
        message.top_logprobs.extend([logprob for _, logprob in top])
    if events.finished:
        finished = events.finished
        message.finished_ids.extend([event.request_id for event in finished])
        message.finished_reasons.extend([_REASON_CODES[event.reason] for event in finished])
        message.prompt_tokens.extend([event.usage.prompt_tokens for event in finished])
        message.generated_tokens.extend([event.usage.generated_tokens for event in finished])
        message.cached_tokens.extend([event.usage.cached_tokens for event in finished])
        message.queue_s.extend([event.queue_s for event in finished])
        message.prefill_counts.extend([len(event.prefill_logprobs) for event in finished])
        for event in finished:
            message.prefill_logprobs.extend(event.prefill_logprobs)
        message.prefill_top_positions.extend([len(event.prefill_top) for event in finished])
        for position in chain.from_iterable(event.prefill_top for event in finished):
            message.prefill_top_counts.append(len(position))
            message.prefill_top_ids.extend([token_id for token_id, _ in position])
            message.prefill_top_logprobs.extend([logprob for _, logprob in position])
    for failed in events.failed:
        message.failed.add(
            request_id=failed.request_id,
            error_type=failed.error_type,
            # A library's text may hold lone surrogates, which UTF-8 has no bytes for.
            message=failed.message.encode("utf-8", "replace").decode(),
            retry_after_s=failed.retry_after_s,
        )
    if capacity is not None:
        message.capacity.CopyFrom(encode_capacity(capacity))
    return message


def decode_step(message: pb.StepEvents) -> StepEvents:
    """Raises ValueError if columns do not fit together."""
    events = StepEvents(message.request_ids[:], message.token_ids[:], message.logprobs[:])
    if message.top_rows:
        _decode_top(message, events)
    if message.finished_ids:
        _decode_finished(message, events)
    for failed in message.failed:
        events.failed.append(Failed(failed.request_id, failed.error_type, failed.message, failed.retry_after_s))
    return events


def _decode_top(message: pb.StepEvents, events: StepEvents) -> None:
    pairs = zip(message.top_ids, message.top_logprobs, strict=True)
    for row, count in zip(message.top_rows, message.top_counts, strict=True):
        events.top[row] = tuple(islice(pairs, count))


def _decode_finished(message: pb.StepEvents, events: StepEvents) -> None:
    logprobs = iter(message.prefill_logprobs[:])
    top = zip(message.prefill_top_ids, message.prefill_top_logprobs, strict=True)
    positions = (tuple(islice(top, count)) for count in message.prefill_top_counts)
    columns = zip(
        message.finished_ids,
        message.finished_reasons,
        message.prompt_tokens,
        message.generated_tokens,
        message.cached_tokens,
        message.queue_s,
        message.prefill_counts,
        message.prefill_top_positions,
        strict=True,
    )
    for request_id, reason, prompt_tokens, generated_tokens, cached_tokens, queue_s, count, told in columns:
        usage = Usage(prompt_tokens, generated_tokens, cached_tokens)
        prefill, prefill_top = tuple(islice(logprobs, count)), tuple(islice(positions, told))
        events.finished.append(Finished(request_id, _REASONS[reason], usage, queue_s, prefill, prefill_top))


def encode_capacity(capacity: Capacity) -> pb.Capacity:
    return pb.Capacity(
        max_sequences=capacity.max_sequences,
        free_sequences=max(capacity.free_sequences, 0),
        total_kv_tokens=capacity.total_kv_tokens,
        free_kv_tokens=max(capacity.free_kv_tokens, 0),
        preemptions=capacity.preemptions,
        drafted_tokens=capacity.drafted_tokens,
        accepted_tokens=capacity.accepted_tokens,
    )


def decode_capacity(message: pb.Capacity) -> Capacity:
    return Capacity(
        max_sequences=message.max_sequences,
        free_sequences=message.free_sequences,
        total_kv_tokens=message.total_kv_tokens,
        free_kv_tokens=message.free_kv_tokens,
        preemptions=message.preemptions,
        drafted_tokens=message.drafted_tokens,
        accepted_tokens=message.accepted_tokens,
    )


def encode_welcome(model: ModelInfo, capabilities: Capabilities, capacity: Capacity) -> pb.Welcome:
    return pb.Welcome(
        model=pb.ModelInfo(
            model_id=model.model_id,
            max_input_tokens=model.max_input_tokens,
            max_total_tokens=model.max_total_tokens,
            max_batch_total_tokens=model.max_batch_total_tokens,
            max_batch_prefill_tokens=model.max_batch_prefill_tokens,
            max_sequences=model.max_sequences,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            dtype=model.dtype,
            device=model.device,
            model_type=model.model_type,
        ),
        capabilities=pb.Capabilities(
            features=sorted(capabilities.features),
            prefix_cache=capabilities.prefix_cache,
            batching=capabilities.batching,
            max_top_n_tokens=capabilities.max_top_n_tokens,
            batch_invariant=capabilities.batch_invariant,
            tolerance=capabilities.tolerance,
        ),
        capacity=encode_capacity(capacity),
    )


def decode_model(message: pb.ModelInfo) -> ModelInfo:
    return ModelInfo(
        model_id=message.model_id,
        max_input_tokens=message.max_input_tokens,
        max_total_tokens=message.max_total_tokens,
        max_batch_total_tokens=message.max_batch_total_tokens,
        max_batch_prefill_tokens=message.max_batch_prefill_tokens,
        max_sequences=message.max_sequences,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        dtype=message.dtype,
        device=message.device,
        model_type=message.model_type,
    )


def decode_capabilities(message: pb.Capabilities) -> Capabilities:
    """Features that this version does not know are left out: nothing here could ask for them."""
    return Capabilities(
        features=ALL_FEATURES.intersection(message.features),
        prefix_cache=message.prefix_cache,
        batching=message.batching,
        max_top_n_tokens=message.max_top_n_tokens,
        batch_invariant=message.batch_invariant,
        tolerance=message.tolerance,
    )
