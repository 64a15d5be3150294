from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LENGTH: _ClassVar[FinishReason]
    EOS_TOKEN: _ClassVar[FinishReason]
    STOP_SEQUENCE: _ClassVar[FinishReason]
    CANCELLED: _ClassVar[FinishReason]
LENGTH: FinishReason
EOS_TOKEN: FinishReason
STOP_SEQUENCE: FinishReason
CANCELLED: FinishReason

class HealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealthReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("tenant", "name")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    name: str
    def __init__(self, tenant: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ("cancelled",)
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    cancelled: int
    def __init__(self, cancelled: _Optional[int] = ...) -> None: ...

class FromWorker(_message.Message):
    __slots__ = ("hello", "submits", "cancels")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMITS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    submits: _containers.RepeatedCompositeFieldContainer[Request]
    cancels: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., submits: _Optional[_Iterable[_Union[Request, _Mapping]]] = ..., cancels: _Optional[_Iterable[int]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("worker", "api_version")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    API_VERSION_FIELD_NUMBER: _ClassVar[int]
    worker: int
    api_version: int
    def __init__(self, worker: _Optional[int] = ..., api_version: _Optional[int] = ...) -> None: ...

class FromHost(_message.Message):
    __slots__ = ("welcome", "step")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    step: StepEvents
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., step: _Optional[_Union[StepEvents, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("model", "capabilities", "capacity")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    model: ModelInfo
    capabilities: Capabilities
    capacity: Capacity
    def __init__(self, model: _Optional[_Union[ModelInfo, _Mapping]] = ..., capabilities: _Optional[_Union[Capabilities, _Mapping]] = ..., capacity: _Optional[_Union[Capacity, _Mapping]] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("model_id", "max_input_tokens", "max_total_tokens", "max_batch_total_tokens", "max_batch_prefill_tokens", "max_sequences", "vocab_size", "eos_token_ids", "dtype", "device", "model_type")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    max_input_tokens: int
    max_total_tokens: int
    max_batch_total_tokens: int
    max_batch_prefill_tokens: int
    max_sequences: int
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    device: str
    model_type: str
    def __init__(self, model_id: _Optional[str] = ..., max_input_tokens: _Optional[int] = ..., max_total_tokens: _Optional[int] = ..., max_batch_total_tokens: _Optional[int] = ..., max_batch_prefill_tokens: _Optional[int] = ..., max_sequences: _Optional[int] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., model_type: _Optional[str] = ...) -> None: ...

class Capabilities(_message.Message):
    __slots__ = ("features", "prefix_cache", "batching", "max_top_n_tokens", "batch_invariant", "tolerance")
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    BATCHING_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BATCH_INVARIANT_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    features: _containers.RepeatedScalarFieldContainer[str]
    prefix_cache: bool
    batching: bool
    max_top_n_tokens: int
    batch_invariant: bool
    tolerance: float
    def __init__(self, features: _Optional[_Iterable[str]] = ..., prefix_cache: bool = ..., batching: bool = ..., max_top_n_tokens: _Optional[int] = ..., batch_invariant: bool = ..., tolerance: _Optional[float] = ...) -> None: ...

class Capacity(_message.Message):
    __slots__ = ("max_sequences", "free_sequences", "total_kv_tokens", "free_kv_tokens", "preemptions", "drafted_tokens", "accepted_tokens")
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    FREE_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_sequences: int
    free_sequences: int
    total_kv_tokens: int
    free_kv_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    def __init__(self, max_sequences: _Optional[int] = ..., free_sequences: _Optional[int] = ..., total_kv_tokens: _Optional[int] = ..., free_kv_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., drafted_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("request_id", "input_ids", "sampling", "stop", "logprobs", "top_n_tokens", "prefill_logprobs", "adapter_id", "cache_salt", "priority", "name", "tenant", "traceparent", "prefill_top_n_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOP_N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    input_ids: bytes
    sampling: SamplingParams
    stop: StopRules
    logprobs: bool
    top_n_tokens: int
    prefill_logprobs: bool
    adapter_id: str
    cache_salt: str
    priority: int
    name: str
    tenant: str
    traceparent: str
    prefill_top_n_tokens: int
    def __init__(self, request_id: _Optional[int] = ..., input_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., stop: _Optional[_Union[StopRules, _Mapping]] = ..., logprobs: bool = ..., top_n_tokens: _Optional[int] = ..., prefill_logprobs: bool = ..., adapter_id: _Optional[str] = ..., cache_salt: _Optional[str] = ..., priority: _Optional[int] = ..., name: _Optional[str] = ..., tenant: _Optional[str] = ..., traceparent: _Optional[str] = ..., prefill_top_n_tokens: _Optional[int] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias_ids", "logit_bias_values", "watermark", "grammar")
    DO_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    TYPICAL_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    seed: int
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias_ids: _containers.RepeatedScalarFieldContainer[int]
    logit_bias_values: _containers.RepeatedScalarFieldContainer[float]
    watermark: bool
    grammar: Grammar
    def __init__(self, do_sample: bool = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., typical_p: _Optional[float] = ..., seed: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., logit_bias_ids: _Optional[_Iterable[int]] = ..., logit_bias_values: _Optional[_Iterable[float]] = ..., watermark: bool = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("kind", "source")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    source: str
    def __init__(self, kind: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class StopRules(_message.Message):
    __slots__ = ("max_new_tokens", "min_new_tokens", "ignore_eos", "stop_token_ids", "stop_strings")
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    min_new_tokens: int
    ignore_eos: bool
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    stop_strings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, max_new_tokens: _Optional[int] = ..., min_new_tokens: _Optional[int] = ..., ignore_eos: bool = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., stop_strings: _Optional[_Iterable[str]] = ...) -> None: ...

class StepEvents(_message.Message):
    __slots__ = ("request_ids", "token_ids", "logprobs", "top_rows", "top_counts", "top_ids", "top_logprobs", "finished_ids", "finished_reasons", "prompt_tokens", "generated_tokens", "cached_tokens", "queue_s", "prefill_counts", "prefill_logprobs", "failed", "capacity", "prefill_top_positions", "prefill_top_counts", "prefill_top_ids", "prefill_top_logprobs")
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_ROWS_FIELD_NUMBER: _ClassVar[int]
    TOP_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_REASONS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_COUNTS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOP_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOP_COUNTS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_rows: _containers.RepeatedScalarFieldContainer[int]
    top_counts: _containers.RepeatedScalarFieldContainer[int]
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    finished_ids: _containers.RepeatedScalarFieldContainer[int]
    finished_reasons: _containers.RepeatedScalarFieldContainer[FinishReason]
    prompt_tokens: _containers.RepeatedScalarFieldContainer[int]
    generated_tokens: _containers.RepeatedScalarFieldContainer[int]
    cached_tokens: _containers.RepeatedScalarFieldContainer[int]
    queue_s: _containers.RepeatedScalarFieldContainer[float]
    prefill_counts: _containers.RepeatedScalarFieldContainer[int]
    prefill_logprobs: _containers.RepeatedScalarFieldContainer[float]
    failed: _containers.RepeatedCompositeFieldContainer[Failed]
    capacity: Capacity
    prefill_top_positions: _containers.RepeatedScalarFieldContainer[int]
    prefill_top_counts: _containers.RepeatedScalarFieldContainer[int]
    prefill_top_ids: _containers.RepeatedScalarFieldContainer[int]
    prefill_top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, request_ids: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., top_rows: _Optional[_Iterable[int]] = ..., top_counts: _Optional[_Iterable[int]] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ..., finished_ids: _Optional[_Iterable[int]] = ..., finished_reasons: _Optional[_Iterable[_Union[FinishReason, str]]] = ..., prompt_tokens: _Optional[_Iterable[int]] = ..., generated_tokens: _Optional[_Iterable[int]] = ..., cached_tokens: _Optional[_Iterable[int]] = ..., queue_s: _Optional[_Iterable[float]] = ..., prefill_counts: _Optional[_Iterable[int]] = ..., prefill_logprobs: _Optional[_Iterable[float]] = ..., failed: _Optional[_Iterable[_Union[Failed, _Mapping]]] = ..., capacity: _Optional[_Union[Capacity, _Mapping]] = ..., prefill_top_positions: _Optional[_Iterable[int]] = ..., prefill_top_counts: _Optional[_Iterable[int]] = ..., prefill_top_ids: _Optional[_Iterable[int]] = ..., prefill_top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("request_id", "error_type", "message", "retry_after_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_TYPE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    error_type: str
    message: str
    retry_after_s: float
    def __init__(self, request_id: _Optional[int] = ..., error_type: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...
