"""The Backend protocol: what the gateway asks of an engine, and the values they exchange at start."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, get_args, runtime_checkable

import msgspec

from tgi_gateway.errors import SettingsError, Unsupported, ValidationError
from tgi_gateway.types import Request, StepEvents, TokenIds

API_VERSION = 1
"""Raised when a method or field changes meaning. The gateway accepts plug-ins of this version and the one before."""

Emit = Callable[[StepEvents], None]

Feature = Literal[
    "sampling",
    "seed",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "watermark",
    "grammar",
    "logprobs",
    "top_n_tokens",
    "prefill_logprobs",
    "prefill_top_n_tokens",
    "ignore_eos",
    "min_new_tokens",
    "stop_token_ids",
    "lora",
]
"""What a request may ask for. Most are named as the field that asks: of `SamplingParams`, `StopRules` or `Request`.
`seed` promises that draws repeat, `sampling` is `do_sample` with `temperature`, `lora` is `adapter_id`."""
ALL_FEATURES: frozenset[Feature] = frozenset(get_args(Feature))


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do, declared once and readable without its runtime. The rest is refused with `Unsupported`."""

    features: frozenset[Feature] = frozenset()
    """What requests may ask for; see `Feature`."""
    prefix_cache: bool = False
    """Whether prompts that begin alike share what was computed for the beginning."""
    batching: bool = True
    """Whether requests share steps; False means one request at a time."""
    max_top_n_tokens: int = 20
    """Most alternatives that can be reported beside a token."""
    batch_invariant: bool = True
    """Greedy tokens do not depend on who shares the batch, or on a warm prefix cache. False: `tolerance` applies."""
    tolerance: float = 0.0
    """Largest difference of a token's log-probability, alone against batched or cold against warm."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine has free now; admission works with it."""

    max_sequences: int
    """Requests that can run at once."""
    free_sequences: int
    """How many more could."""
    total_kv_tokens: int
    """As `ModelInfo.max_batch_total_tokens`."""
    free_kv_tokens: int
    """Counting cached but unreferenced pages as free."""
    preemptions: int = 0
    """How often since its start the engine took a running sequence's pages away, to compute them again later."""
    drafted_tokens: int = 0
    """Tokens that speculation has guessed since the start."""
    accepted_tokens: int = 0
    """Those of them that the model would have chosen too."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an engine serves, known once it has started."""

    model_id: str
    """As in `EngineOptions`."""
    max_input_tokens: int
    """Longest prompt of one request."""
    max_total_tokens: int
    """Prompt and output of one request."""
    max_batch_total_tokens: int
    """KV tokens of all running requests: a promise that memory suffices."""
    max_batch_prefill_tokens: int
    """Most prompt tokens of one step: shown to clients, nothing more. The engine keeps to it, in chunks or not at all;
    `SteppingBackend` gives `step` whole prompts."""
    max_sequences: int
    """Requests that can run at once; more wait."""
    vocab_size: int
    """Token ids are below it, in prompts and answers."""
    eos_token_ids: tuple[int, ...]
    """Any of these ends a request, unless it says `ignore_eos`."""
    dtype: str = ""
    """For people: type of the weights."""
    device: str = ""
    """For people: what it runs on."""
    model_type: str = ""
    """For people: the model's family."""

    def unknown_token(self, token_ids: Sequence[int]) -> int | None:
        """The first of `token_ids` that is none of this model's, if there is one. Quick also for long prompts."""
        if isinstance(token_ids, TokenIds):
            token_ids = token_ids.tolist()
        try:
            msgspec.convert(token_ids, _ids_below(self.vocab_size))
        except msgspec.ValidationError:
            return next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
        return None


@cache
def _ids_below(vocab_size: int) -> Any:
    return tuple[Annotated[int, msgspec.Meta(ge=0, lt=vocab_size)], ...]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The part of the settings that an engine needs, each the flag of the same name unless another one is named.

    None means: the engine decides and reports it in `ModelInfo`. See `refuse_options` for what it does not honour.
    """

    model_path: Path
    """Local folder (or file) of the model, or what `BackendPlugin.prepare` made of it."""
    model_id: str
    """What the user called it; what clients are told."""
    tokenizer_path: Path | None = None
    """Folder with tokenizer.json, for grammars and the like."""
    dtype: str | None = None
    """``--dtype``: of weights and activations, float16, bfloat16 or float32."""
    quantize: str | None = None
    """``--quantize``: how weights are quantized; None: as the model says."""
    kv_cache_dtype: str | None = None
    """``--kv-cache-dtype``: of keys and values; None or auto: as `dtype`."""
    max_input_tokens: int | None = None
    """As in `ModelInfo`, as the four that follow."""
    max_total_tokens: int | None = None
    """Prompt and output of one request."""
    max_batch_prefill_tokens: int | None = None
    """Prompt tokens of one step."""
    max_batch_total_tokens: int | None = None
    """KV tokens of all running requests."""
    max_batch_size: int | None = None
    """`ModelInfo.max_sequences`."""
    num_shard: int = 1
    """Devices to split the model over."""
    memory_fraction: float = 1.0
    """``--cuda-memory-fraction``: part of the device's memory that may be used."""
    cuda_graphs: tuple[int, ...] | None = None
    """Batch sizes to capture or compile for; (): none."""
    rope_scaling: str | None = None
    """linear or dynamic: stretch the position encoding by `rope_factor`."""
    rope_factor: float | None = None
    """Factor of `rope_scaling`."""
    speculate: int | None = None
    """Tokens to guess ahead per step."""
    lora_adapters: tuple[str, ...] = ()
    """Adapters to load, each as ID or ID=PATH."""
    prefix_caching: bool = True
    """False: even an engine that has a prefix cache shares nothing."""
    prefill_chunking: bool = True
    """False: no prompt is cut without need."""
    prefill_logprobs: bool = False
    """``--enable-prefill-logprobs``: requests for these may come."""
    trust_remote_code: bool = False
    """Code that comes with the model may run."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: make up random weights of the model's shape."""
    watermark_gamma: float = 0.5
    """Part of the vocabulary that a watermark favours."""
    watermark_delta: float = 2.0
    """How much it adds to their logits."""
    extra: Mapping[str, object] = field(default_factory=dict)
    """Values of the plug-in's own flags, by `Flag.key`."""


OPTIONS: frozenset[str] = frozenset(each.name for each in fields(EngineOptions)) - {
    "model_path",
    "model_id",
    "tokenizer_path",
    "trust_remote_code",
    "prefill_logprobs",
    "extra",
}
"""Fields of EngineOptions that an engine may not honour. The others name the model, allow something, or are its own."""


def refuse_options(options: EngineOptions, honoured: Collection[str]) -> None:
    """Raise `SettingsError`, which is a StartError, naming what the user set and an engine would ignore.

    `honoured`: those of `OPTIONS` that it does not ignore. What switches something off may be ignored.
    """
    defaults = {each.name: each.default for each in fields(EngineOptions)}
    wanted = {name: getattr(options, name) for name in sorted(OPTIONS - set(honoured))}
    ignored = [
        f"{flag_of(name)} {_typed(value)}" for name, value in wanted.items() if value and value != defaults[name]
    ]
    if ignored:
        raise SettingsError(f"this engine does not support {', '.join(ignored)}. Leave that out")


def flag_of(option: str) -> str:
    """What is typed for a field of EngineOptions."""
    return "--cuda-memory-fraction" if option == "memory_fraction" else f"--{option.replace('_', '-')}"


def _typed(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


class Backend(Protocol):
    """A whole engine. Everything but `start`, `health` and `stop` returns at once and may be called from any thread.

    Every submitted request ends in exactly one `Finished` or `Failed`; a cancelled one in ``Finished(cancelled)``,
    unless its ending was already on the way. Unknown ids in `cancel` are ignored.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    async def start(self, emit: Emit) -> ModelInfo:
        """Load and warm up; afterwards `emit` is called once per step, from any thread, one call at a time.

        Raises `StartError`.
        """
        ...

    def submit(self, request: Request) -> None:
        """Take the request. What cannot be done with it is told by a `Failed` event, never by an exception."""
        ...

    def cancel(self, request_id: int) -> None:
        """End the request and free its capacity within one step."""
        ...

    def capacity(self) -> Capacity:
        """What is free now. It may be asked after `stop`, too."""
        ...

    async def health(self) -> None:
        """Return if the engine can generate; raise `Unhealthy` if not. Cheap while steps make progress."""
        ...

    async def stop(self, drain_s: float) -> None:
        """Finish open requests for up to `drain_s` seconds, fail the rest, free everything. Idempotent."""
        ...


@runtime_checkable
class ReportsLoss(Protocol):
    """What a Backend may offer besides: to tell that its engine is gone for good. The server then ends."""

    async def lost(self) -> str:
        """Return why the engine can never generate again, once that is so and all its requests have ended."""
        ...


@runtime_checkable
class CancelsByName(Protocol):
    """What a Backend may offer besides: requests that came through other HTTP workers, cancelled by name."""

    async def cancel_named(self, tenant: str, name: str) -> int:
        """Cancel the tenant's open requests of that name; returns how many there were. Raises `Unhealthy`."""
        ...


@runtime_checkable
class ReportsProgress(Protocol):
    """What a Backend may offer besides: to tell of steps that have no events, such as the chunks of a long prompt."""

    def silent_s(self) -> float:
        """Seconds since the last step was done, or work came; 0.0 while there is none. From any thread, at once."""
        ...


@dataclass(frozen=True, slots=True)
class Flag:
    """A command-line flag that a plug-in adds, such as ``Flag("--n-threads", int, 4, "Threads of a step.")``.

    Also read from the environment variable N_THREADS; its value is ``EngineOptions.extra["n_threads"]``.
    """

    name: str
    """As typed: two dashes, then lower-case words with dashes between them."""
    kind: type
    """bool, int, float, pathlib.Path or str: what the text on the command line has to be. A path arrives as str."""
    default: object
    """The value when it is not given, passed on as it is."""
    help: str
    """A sentence for ``tgi-gateway --backend NAME --help``."""
    choices: tuple[str, ...] = ()
    """What a text may be; empty: anything."""
    replaces_weights: bool = False
    """When it is given, the model's own weights are not needed."""

    def __post_init__(self) -> None:
        if not _FLAG.fullmatch(self.name):
            raise ValueError(f"a flag is named as it is typed, such as --n-threads; got {self.name!r}")

    @property
    def key(self) -> str:
        """Its name in `EngineOptions.extra`."""
        return self.name.removeprefix("--").replace("-", "_")


_FLAG = re.compile(r"--[a-z][a-z0-9]*(-[a-z0-9]+)*")

WeightFormat = Literal["safetensors", "gguf"]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What the processes of a server read of a model."""

    model: Path
    """What the engine loads: a folder or a file."""
    tokenizer: Path
    """The folder with tokenizer.json and its companions; a prepared one without tokenizer.json is a start error."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a backend needs of the machine, for `tgi-gateway doctor`."""

    name: str
    """What is looked at: a program, a library, a driver."""
    found: str
    """What is there: a version, a path, or that there is none."""
    problem: str | None = None
    """None if that will do; else what for it is needed, and the command that mends it."""
    advice: str | None = None
    """What would be better with something more, and the command that brings it; the backend runs without."""


@dataclass(frozen=True, slots=True)
class BackendPlugin:
    """What a distribution registers. Importing the module that makes it must import no heavy runtime."""

    name: str
    """As in ``--backend NAME``, and in the entry point."""
    summary: str
    """A few words for ``tgi-gateway backends``."""
    capabilities: Capabilities
    """What its engines declare as well."""
    create: Callable[[EngineOptions], Backend]
    """Called in the engine host process; heavy imports happen in here."""
    missing: Callable[[], str | None] = lambda: None
    """None if this machine can run it; else what is missing and how to get it. Imports no runtime."""
    flags: tuple[Flag, ...] = ()
    """Command-line flags of its own."""
    needs_model: bool = True
    """False for engines without weights: the model's folder needs a tokenizer.json and nothing else, and the contract
    runs without a model."""
    weights: tuple[WeightFormat, ...] = ("safetensors",)
    """The formats that it can serve, the preferred one first; the folder must have one of them before an engine starts.
    safetensors: ``*.safetensors`` and config.json; gguf: ``*.gguf``; (): files of its own, that `load` looks for."""
    prepare: Callable[[EngineOptions, Path], ModelFiles] | None = None
    """Make of the model what engine and HTTP workers need, where it is not there already, such as the tokenizer.json,
    which is otherwise asked for first. Called in a process of its own before the engine starts; the folder is private
    to the server and removed at its end. Raises `StartError`. None: the model's folder is all that they need."""
    converters: Mapping[str, Callable[[Path, Path, str | None], None]] = field(default_factory=dict)
    """Format -> what writes it, from a model's folder to a file, as a type of that format (None: its usual one)."""
    api_version: int = 1
    """The version that the plug-in was written for: a number in its own source, not the gateway's `API_VERSION`."""
    checks: Callable[[], Sequence[Check]] = tuple
    """For `tgi-gateway doctor`: driver, compiler, devices. Python and packages it reads from the metadata. May be slow
    and may import the runtime; see `tgi_gateway.doctor` for ready-made ones."""


def required_features(request: Request) -> set[Feature]:
    """The features that `request` uses, by comparing it with the neutral values."""
    sampling, stop = request.sampling, request.stop
    used: dict[Feature, bool] = {
        "sampling": sampling.do_sample,
        "top_k": sampling.do_sample and sampling.top_k > 0,
        "top_p": sampling.do_sample and sampling.top_p < 1.0,
        "min_p": sampling.do_sample and sampling.min_p > 0.0,
        "typical_p": sampling.do_sample and sampling.typical_p < 1.0,
        "repetition_penalty": sampling.repetition_penalty != 1.0,
        "frequency_penalty": sampling.frequency_penalty != 0.0,
        "presence_penalty": sampling.presence_penalty != 0.0,
        "logit_bias": bool(sampling.logit_bias),
        "watermark": sampling.watermark,
        "grammar": sampling.grammar is not None,
        "top_n_tokens": request.top_n_tokens > 0,
        "prefill_logprobs": request.prefill_logprobs,
        "prefill_top_n_tokens": request.prefill_top_n_tokens > 0,
        "ignore_eos": stop.ignore_eos,
        "min_new_tokens": stop.min_new_tokens > 0,
        "stop_token_ids": bool(stop.stop_token_ids),
        "lora": request.adapter_id is not None,
    }
    return {feature for feature, is_used in used.items() if is_used}


def refuse_unsupported(request: Request, capabilities: Capabilities) -> None:
    """Raise `Unsupported` naming what `request` uses and the engine lacks."""
    lacking = sorted(required_features(request) - capabilities.features)
    if lacking:
        raise Unsupported(f"this engine does not support {', '.join(f'`{name}`' for name in lacking)}")
    for name, wanted in (
        ("top_n_tokens", request.top_n_tokens),
        ("prefill_top_n_tokens", request.prefill_top_n_tokens),
    ):
        if wanted > capabilities.max_top_n_tokens:
            raise Unsupported(f"`{name}` is {wanted}; this engine reports at most {capabilities.max_top_n_tokens}")


def check_request(request: Request, capabilities: Capabilities, model: ModelInfo) -> None:
    """What every engine asks of a request before it runs: raise `ValidationError` for what it cannot honour.

    `Unsupported` names features that are not declared; the rest are the limits in `model`.
    """
    refuse_unsupported(request, capabilities)
    prompt, new = len(request.input_ids), request.stop.max_new_tokens
    if not 1 <= prompt <= model.max_input_tokens:
        raise ValidationError(f"the prompt has {prompt} tokens; allowed are 1 to {model.max_input_tokens}")
    if new < 1:
        raise ValidationError(f"`max_new_tokens` is {new}; it must be at least 1")
    limit = min(model.max_total_tokens, model.max_batch_total_tokens)
    if prompt + new > limit:
        raise ValidationError(f"prompt ({prompt}) and `max_new_tokens` ({new}) exceed {limit} tokens")
    if request.prefill_top_n_tokens and not request.prefill_logprobs:
        raise ValidationError("`prefill_top_n_tokens` comes with `prefill_logprobs` only")
    if request.sampling.do_sample and not request.sampling.temperature > 0:
        raise ValidationError(f"`temperature` is {request.sampling.temperature}; it must be above 0")
    if model.unknown_token(request.input_ids) is not None:
        raise ValidationError(f"the prompt has token ids outside the vocabulary of {model.vocab_size}")
