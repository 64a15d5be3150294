"""Settings: everything a user may choose, read once from argv and environ, then frozen.

This is the only reader of the command line and of environment variables. Child processes get the settings as one JSON
document through a pipe, so secrets are neither in their argv nor in their environment.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from tgi_gateway import plugins
from tgi_gateway.backend import EngineOptions, Flag
from tgi_gateway.cores import default_http_workers, logical_cores
from tgi_gateway.errors import PluginError, SettingsError
from tgi_gateway.flags import (
    FILE,
    SWITCH,
    TEXT,
    YES_NO,
    Kind,
    Option,
    comma_list,
    number,
    one_of,
    parser_of,
    read_flags,
    whole,
)
from tgi_gateway.prompt.reasoning import REASONING
from tgi_gateway.prompt.tools import FAMILIES

QUANTIZERS = (
    "awq",
    "compressed-tensors",
    "eetq",
    "exl2",
    "gptq",
    "marlin",
    "bitsandbytes",
    "bitsandbytes-nf4",
    "bitsandbytes-fp4",
    "fp8",
)

MODEL, SERVER, LIMITS, BATCH, ENGINE, LOGS, NO_EFFECT = (
    "Model",
    "Server",
    "Limits of one request",
    "Batching and memory",
    "Engine",
    "Logs and traces",
    "Accepted, without effect",
)
_GROUPS = {
    NO_EFFECT: "So that command lines of text-generation-launcher go on working. Setting one prints a warning.",
}


def _flag(default: Any, group: str, kind: Kind, help: str, **more: Any) -> Any:
    """A field of `Settings` that is also a flag; `Option.name` is filled in from the field."""
    option = Option("", kind, help, group, default, **more)
    return field(default=default, repr=not option.secret, metadata={"option": option})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Field names are flag names in snake_case. None: not given, found out at start."""

    # Model
    model_id: str | None = _flag(
        None, MODEL, TEXT, "Model hub id, or local folder.", shown_default="the bundled demo model, if installed"
    )
    revision: str | None = _flag(None, MODEL, TEXT, "Hub revision: branch, tag or commit.")
    tokenizer_config_path: str | None = _flag(
        None, MODEL, FILE, "A tokenizer_config.json to use instead of the model's, e.g. for its chat template."
    )
    tool_call_parser: str = _flag(
        "auto", MODEL, one_of("auto", *sorted(FAMILIES)), "How the model writes tool calls; auto: as its template says."
    )
    reasoning_parser: str = _flag(
        "auto", MODEL, one_of("auto", "none", *sorted(REASONING)),
        "How the model writes its thoughts; auto: as its template says; none: they stay in the text.",
    )  # fmt: skip
    load_format: Literal["auto", "dummy"] = _flag(
        "auto", MODEL, one_of("auto", "dummy"), "dummy: random weights, to measure without downloading them."
    )
    dtype: Literal["float16", "bfloat16", "float32"] | None = _flag(
        None, MODEL, one_of("float16", "bfloat16", "float32"), "Type of weights and activations.",
        shown_default="the engine's choice for the model",
    )  # fmt: skip
    quantize: str | None = _flag(
        None,
        MODEL,
        one_of(*QUANTIZERS),
        "Quantization of the weights.",
        shown_default="what the model's config.json says",
    )
    kv_cache_dtype: str | None = _flag(
        None,
        MODEL,
        one_of("auto", "fp8_e4m3", "fp8_e4m3fn", "fp8_e5m2"),
        "Type of the KV cache; auto: as --dtype. 8 bits hold twice the tokens, less exactly.",
        shown_default="auto",
    )
    trust_remote_code: bool = _flag(False, MODEL, SWITCH, "Allow running code that comes with the model.")
    lora_adapters: tuple[str, ...] = _flag((), MODEL, comma_list(TEXT, "ID[=PATH],..."), "LoRA adapters to load.")
    rope_scaling: Literal["linear", "dynamic"] | None = _flag(
        None, MODEL, one_of("linear", "dynamic"), "Stretch the position encoding.", shown_default="as the model says"
    )
    rope_factor: float | None = _flag(None, MODEL, number(0), "Factor of --rope-scaling.")
    huggingface_hub_cache: str | None = _flag(
        None, MODEL, FILE, "Where downloads are kept.", shown_default="the cache of huggingface_hub"
    )
    weights_cache_override: str | None = _flag(
        None, MODEL, FILE, "Folder that holds the model's files; nothing is downloaded."
    )
    hf_token: str | None = _flag(
        None, MODEL, TEXT, "Hub token, for gated and private models.", typed=False, secret=True,
        more_variables=("HF_API_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    )  # fmt: skip
    hf_hub_offline: bool = _flag(False, MODEL, SWITCH, "Never ask the hub.", typed=False)

    # Server
    hostname: str = _flag("0.0.0.0", SERVER, TEXT, "Address to listen on.")
    port: int = _flag(3000, SERVER, whole(0, 65535), "Port to listen on; 0: any free one.", short="-p")
    http_workers: int | None = _flag(
        None, SERVER, whole(1, 256), "HTTP worker processes: one core each handles validation, text and JSON.",
        shown_default="one for every 4 cores, 1 to 4",
    )  # fmt: skip
    api_key: str | None = _flag(
        None, SERVER, TEXT, "Key that clients must send. Prefer the variable: a command line is visible to others.",
        secret=True,
    )  # fmt: skip
    api_keys: tuple[str, ...] = _flag(
        (), SERVER, comma_list(TEXT, "KEY,...", repeatable=True), "Further keys, any of which will do.", secret=True
    )
    api_keys_file: str | None = _flag(
        None,
        SERVER,
        FILE,
        "File of further keys, one a line: the key itself, or sha256: and its digest in hex. "
        "What is changed in it counts within seconds.",
    )
    public_routes: tuple[str, ...] = _flag(
        ("/health", "/health/ready", "/ping", "/v2/health/live", "/v2/health/ready"),
        SERVER,
        comma_list(TEXT, "ROUTE,..."),
        "Routes that need no API key.",
    )
    compute_type: str | None = _flag(
        None, SERVER, TEXT, "Told in the header x-compute-type.", shown_default="number and kind of the devices",
        typed=False,
    )  # fmt: skip
    aip_predict_route: str | None = _flag(None, SERVER, TEXT, "On Vertex AI: a further path of /vertex.", typed=False)
    aip_health_route: str | None = _flag(
        None, SERVER, TEXT, "On Vertex AI: a further path of /health; it needs no API key.", typed=False
    )
    aip_http_port: str | None = _flag(None, SERVER, TEXT, "On Vertex AI: replaces --port.", typed=False)
    cors_allow_origin: tuple[str, ...] = _flag(
        (), SERVER, comma_list(TEXT, "ORIGIN", repeatable=True), "Origin that browsers may call from; repeatable.",
        shown_default="every origin",
    )  # fmt: skip
    payload_limit: int = _flag(2_000_000, SERVER, whole(1), "Largest request body in bytes.")
    request_timeout: float | None = _flag(
        None, SERVER, number(0), "Longest time of one request in seconds, its answer included.",
        shown_default="no limit",
    )  # fmt: skip
    slow_client_timeout: float = _flag(
        60.0, SERVER, number(0), "Seconds without reading after which a client is cut off."
    )
    shutdown_timeout: int = _flag(
        90,
        SERVER,
        whole(0),
        "Seconds that accepted requests get to finish when the server is told to stop.",
        short="-g",
    )
    restart_engine: bool = _flag(
        True, SERVER, YES_NO, "Start the engine again when it ends or hangs; false: end the server, with an error."
    )
    engine_timeout: float = _flag(
        300.0, SERVER, number(-1), "Seconds without a step after which a busy engine counts as dead; 0: never."
    )
    shard_uds_path: str | None = _flag(
        None, SERVER, FILE, "Folder in which this server makes its private folder of Unix sockets.",
        shown_default="the system's folder for temporary files",
    )  # fmt: skip

    # Limits of one request
    max_concurrent_requests: int = _flag(
        128, LIMITS, whole(1), "Requests that may be open at once; more are told when to come again."
    )
    max_queued_tokens: int | None = _flag(
        None, LIMITS, whole(1), "Prompt tokens that may wait for the engine; further requests are told to come later.",
        shown_default="8 times --max-batch-total-tokens",
    )  # fmt: skip
    max_concurrent_requests_per_key: int | None = _flag(
        None, LIMITS, whole(1), "Requests that one API key may have open at once; more are answered with 429.",
        shown_default="no limit of its own",
    )  # fmt: skip
    max_input_tokens: int | None = _flag(
        None, LIMITS, whole(1), "Longest prompt, in tokens.", shown_default="--max-total-tokens less one"
    )
    max_total_tokens: int | None = _flag(
        None, LIMITS, whole(1), "Longest prompt and answer together.", shown_default="what model and memory allow"
    )
    max_best_of: int = _flag(2, LIMITS, whole(1), "Largest `best_of`.")
    max_stop_sequences: int = _flag(4, LIMITS, whole(0), "Most stop sequences.")
    max_top_n_tokens: int = _flag(5, LIMITS, whole(0), "Largest `top_n_tokens`.")
    max_client_batch_size: int = _flag(4, LIMITS, whole(1), "Most inputs in one client batch.")
    validation_workers: int = _flag(2, LIMITS, whole(0), "Threads for tokenization, per HTTP worker.")
    share_prefixes_across_keys: bool = _flag(
        False,
        LIMITS,
        SWITCH,
        "Let requests of one API key use cached prefixes of another's, who may then notice by the time it takes.",
    )
    disable_grammar_support: bool = _flag(False, LIMITS, SWITCH, "Refuse requests with a grammar.")
    strict: bool = _flag(False, LIMITS, SWITCH, "Refuse unknown request fields, instead of ignoring them as TGI does.")

    # Batching and memory
    max_batch_size: int | None = _flag(
        None, BATCH, whole(0), "Most sequences in one step.", shown_default="the engine's choice"
    )
    max_batch_prefill_tokens: int | None = _flag(
        None, BATCH, whole(1), "Most new tokens in one step; longer prompts are done in chunks.",
        shown_default="the engine's choice",
    )  # fmt: skip
    max_batch_total_tokens: int | None = _flag(
        None, BATCH, whole(1), "KV cache tokens of all running requests.", shown_default="what fits in memory"
    )
    prefix_caching: bool = _flag(True, BATCH, YES_NO, "Reuse the KV cache of equal prompt beginnings.")
    prefill_chunking: bool = _flag(True, BATCH, YES_NO, "Do long prompts in chunks, mixed with decoding.")
    cuda_memory_fraction: float = _flag(1.0, BATCH, number(0, 1), "Part of the device's memory that may be used.")
    cuda_graphs: tuple[int, ...] | None = _flag(
        None,
        BATCH,
        comma_list(whole(0), "N,..."),
        "Batch sizes to capture; 0: none.",
        shown_default="the engine's choice",
    )

    # Engine
    backend: str = _flag("cpu", ENGINE, TEXT, "The engine; `tgi-gateway backends` lists what is installed.")
    sharded: bool | None = _flag(
        None,
        ENGINE,
        YES_NO,
        "Split the model over several devices: all visible ones, or --num-shard.",
        shown_default="true if --num-shard is above 1",
    )
    num_shard: int | None = _flag(None, ENGINE, whole(0), "Devices to split the model over.", shown_default="1")
    speculate: int | None = _flag(
        None, ENGINE, whole(0), "Tokens to guess ahead per step.", shown_default="what the model brings"
    )
    enable_prefill_logprobs: bool = _flag(
        False, ENGINE, SWITCH, "Allow `decoder_input_details`: log-probabilities of the prompt."
    )
    watermark_gamma: float = _flag(0.5, ENGINE, number(0, 1), "Part of the vocabulary that a watermark favours.")
    watermark_delta: float = _flag(2.0, ENGINE, number(0), "How much a watermark adds to a favoured logit.")

    # Logs
    json_output: bool = _flag(False, LOGS, SWITCH, "Log one JSON object per line.")
    log_level: str = _flag("info", LOGS, TEXT, "trace, debug, info, warn or error.", typed=False)
    log_prompts: bool = _flag(
        False, LOGS, SWITCH, "Log the beginnings of prompts and answers; otherwise they are in no log."
    )
    otlp_endpoint: str | None = _flag(
        None, LOGS, TEXT, "Send traces there, over OTLP and gRPC, e.g. http://localhost:4317; needs tgi-gateway[otel].",
        shown_default="no traces",
    )  # fmt: skip
    otlp_service_name: str = _flag("text-generation-inference.router", LOGS, TEXT, "Name of this server in its traces.")
    env: bool = _flag(False, LOGS, SWITCH, "Log versions and hardware at start.", short="-e", from_environ=False)

    # Accepted, without effect: the help text is the reason, also of the warning.
    waiting_served_ratio: float = _flag(
        0.3, NO_EFFECT, number(-1), "Waiting prompts are mixed into running batches; there is nothing to trade off."
    )
    max_waiting_tokens: int = _flag(
        20, NO_EFFECT, whole(0), "Waiting prompts are mixed into running batches; none waits for decode steps."
    )
    prometheus_port: int = _flag(9000, NO_EFFECT, whole(0, 65535), "Metrics are served at /metrics of --port.")
    usage_stats: str = _flag(
        "off", NO_EFFECT, one_of("on", "no-stack", "off"), "This server never sends anything about its use anywhere."
    )
    max_image_fetch_size: int = _flag(1_073_741_824, NO_EFFECT, whole(0), "This version takes no images.")
    disable_custom_kernels: bool = _flag(False, NO_EFFECT, SWITCH, "There are no model-specific kernels to disable.")
    master_addr: str = _flag(
        "localhost", NO_EFFECT, TEXT, "Engine processes of one host find each other by themselves."
    )
    master_port: int = _flag(
        29500, NO_EFFECT, whole(0, 65535), "Engine processes of one host find each other by themselves."
    )

    extra: Mapping[str, object] = field(default_factory=dict)
    """Values of the flags that the chosen plug-in adds, by snake_case name."""
    given: tuple[str, ...] = field(default=(), compare=False)
    """Names of the fields that the user set."""

    @staticmethod
    def parse(
        argv: Sequence[str],
        environ: Mapping[str, str],
        *,
        flags_of: Callable[[str], Sequence[Flag]] | None = None,
        prog: str = "tgi-gateway",
    ) -> Settings:
        """Read flags and variables; the command line wins. `flags_of(backend)` gives the plug-in's own flags.

        Raises `SettingsError`, or `PluginError` if the chosen backend cannot be loaded. ``--help`` prints and exits.
        """
        backend = _backend_name(argv, environ)
        try:
            added = (flags_of or _flags_of_plugin)(backend)
        except PluginError:
            if not {"-h", "--help"} & set(argv):
                raise
            added = ()
        plugin_options = [plugin_option(flag, backend) for flag in added]
        options = [*_OPTIONS.values(), *_ALIASES.values(), *plugin_options]
        parser = parser_of(
            options,
            prog=prog,
            description="Serve a language model over TGI's HTTP API and the OpenAI API.",
            epilog="Flags win over environment variables. Every flag of text-generation-launcher is known.",
            groups=_GROUPS,
        )
        values = read_flags(parser, options, argv, environ)
        own = {option.name: values.get(option.name, option.default) for option in plugin_options}
        values = {name: value for name, value in values.items() if name not in own}
        _refuse_ngrok(values)
        _merge_alias(values, "max_input_length", "max_input_tokens", "its older name")
        _merge_alias(values, "graceful_termination_timeout", "shutdown_timeout", "TGI's name of it")
        _ignore_container_hostname(values, argv)
        _use_vertex_port(values)
        given = tuple(sorted(values))
        _count_shards(values, environ)
        settings = Settings(**values, extra=own, given=given)  # type: ignore[arg-type]
        settings.check()
        return settings

    def check(self) -> None:
        """Raise `SettingsError` for values that contradict each other. The texts are TGI's where it has one."""
        for wrong, text in self._contradictions():
            if wrong:
                raise SettingsError(f"Invalid argument: {text}")

    def _contradictions(self) -> list[tuple[bool, str]]:
        longest, total = self.max_input_tokens, self.max_total_tokens
        prefill, batch = self.max_batch_prefill_tokens, self.max_batch_total_tokens
        shards = self.num_shard
        adapter = next((name for name in self.lora_adapters if name.split("=")[0].count("@") > 1), None)
        return [
            (
                longest is not None and total is not None and longest >= total,
                f"`max_input_tokens`({longest}) must be < `max_total_tokens`({total})",
            ),
            (
                total is not None and batch is not None and total > batch,
                f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {total} and {batch}",
            ),
            (
                prefill is not None and batch is not None and prefill > batch,
                f"`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: {prefill} and {batch}",
            ),
            (
                not self.prefill_chunking and prefill is not None and longest is not None and prefill < longest,
                f"`max_batch_prefill_tokens` must be >= `max_input_tokens`. Given: {prefill} and {longest}",
            ),
            (self.validation_workers < 1, "`validation_workers` must be > 0"),
            (self.max_batch_size == 0, "`max_batch_size` must be > 0"),
            (bool(self.sharded) and shards is not None and shards <= 1, "`sharded` is true but `num_shard` <= 1"),
            (shards is not None and shards < 1, "`num_shard` cannot be < 1"),
            (
                self.quantize == "exl2" and (shards or 1) > 1,
                "Sharding is currently not supported with `exl2` quantization",
            ),
            (
                any(
                    route is not None and not route.startswith("/")
                    for route in (self.aip_predict_route, self.aip_health_route)
                ),
                "`AIP_PREDICT_ROUTE` and `AIP_HEALTH_ROUTE` must begin with a slash",
            ),
            (adapter is not None, f"Invalid LoRA adapter format: {adapter}"),
            (
                self.log_level.lower() not in LOG_LEVELS,
                f"`LOG_LEVEL` is {self.log_level!r}; allowed: {' | '.join(LOG_LEVELS)}",
            ),
        ]

    @property
    def open_routes(self) -> tuple[str, ...]:
        """Routes that need no API key."""
        return (*self.public_routes, *((self.aip_health_route,) if self.aip_health_route else ()))

    def resolved(self) -> Settings:
        """The same with what follows from other settings filled in; what the engine decides stays None."""
        scaling, factor = self.rope_scaling, self.rope_factor
        if scaling is not None or factor is not None:
            scaling, factor = scaling or "linear", factor or 1.0
        return dataclasses.replace(
            self,
            num_shard=self.num_shard or 1,
            sharded=(self.num_shard or 1) > 1,
            http_workers=self.http_workers or default_http_workers(logical_cores()),
            rope_scaling=scaling,
            rope_factor=factor,
            max_input_tokens=self.max_input_tokens or (self.max_total_tokens - 1 if self.max_total_tokens else None),
        )

    def warnings(self) -> list[str]:
        """One sentence for each setting that was given and has no effect."""
        return [
            f"{option.flag} has no effect: {option.help}"
            for option in _OPTIONS.values()
            if option.group == NO_EFFECT
            and option.name in self.given
            and (option.name, getattr(self, option.name)) != ("usage_stats", "off")  # which is what happens
        ]

    def public(self) -> dict[str, object]:
        """Every setting by name, secrets as ``***``: what is logged at start."""
        shown: dict[str, object] = {}
        for name, option in _OPTIONS.items():
            value = getattr(self, name)
            shown[name] = "***" if option.secret and value else value
        return shown | dict(self.extra)

    def engine_options(self, model_path: Path, tokenizer_path: Path | None = None) -> EngineOptions:
        """What the engine is started with; `model_path` is the local folder (or file) of the model."""
        known = self.resolved()
        return EngineOptions(
            model_path=model_path,
            model_id=self.model_id or model_path.name,
            tokenizer_path=tokenizer_path,
            dtype=known.dtype,
            quantize=known.quantize,
            kv_cache_dtype=known.kv_cache_dtype,
            max_input_tokens=known.max_input_tokens,
            max_total_tokens=known.max_total_tokens,
            max_batch_prefill_tokens=known.max_batch_prefill_tokens,
            max_batch_total_tokens=known.max_batch_total_tokens,
            max_batch_size=known.max_batch_size,
            num_shard=known.num_shard or 1,
            memory_fraction=known.cuda_memory_fraction,
            cuda_graphs=None if known.cuda_graphs is None else tuple(size for size in known.cuda_graphs if size),
            rope_scaling=known.rope_scaling,
            rope_factor=known.rope_factor,
            speculate=known.speculate,
            lora_adapters=known.lora_adapters,
            prefix_caching=known.prefix_caching,
            prefill_chunking=known.prefill_chunking,
            prefill_logprobs=known.enable_prefill_logprobs,
            trust_remote_code=known.trust_remote_code,
            load_format=known.load_format,
            watermark_gamma=known.watermark_gamma,
            watermark_delta=known.watermark_delta,
            extra=known.extra,
        )

    def without_secrets(self) -> Settings:
        """For processes that need none."""
        return dataclasses.replace(
            self,
            **{name: option.default for name, option in _OPTIONS.items() if option.secret},  # type: ignore[arg-type]
        )

    def to_json(self) -> bytes:
        """For a child process; contains the secrets."""
        return msgspec.json.encode(self)

    @staticmethod
    def from_json(document: bytes) -> Settings:
        """Inverse of `to_json`."""
        return msgspec.json.decode(document, type=Settings)


LOG_LEVELS = ("trace", "debug", "info", "warn", "error")

_OPTIONS: dict[str, Option] = {
    item.name: dataclasses.replace(item.metadata["option"], name=item.name)
    for item in dataclasses.fields(Settings)
    if "option" in item.metadata
}
SECRET_VARIABLES: frozenset[str] = frozenset(
    variable for option in _OPTIONS.values() if option.secret for variable in option.variables
)
"""Environment variables that child processes do not inherit."""
_NGROK = "Tunnels are not part of this server: `--ngrok` is refused. Run a reverse proxy in front of --port."
_ALIASES: dict[str, Option] = {
    option.name: option
    for option in (
        Option("max_input_length", whole(1), "Older name of --max-input-tokens.", LIMITS),
        Option("graceful_termination_timeout", whole(0), "TGI's name of --shutdown-timeout.", SERVER),
        Option("ngrok", SWITCH, "Refused: tunnels are not part of this server.", NO_EFFECT),
        Option("ngrok_authtoken", TEXT, "Refused, as --ngrok.", NO_EFFECT, secret=True),
        Option("ngrok_edge", TEXT, "Refused, as --ngrok.", NO_EFFECT),
    )
}


def _flags_of_plugin(backend: str) -> Sequence[Flag]:
    return plugins.load(backend).flags


def _backend_name(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """First phase of parsing: which plug-in may add flags. Of several, the last counts, as for every flag."""
    option = _OPTIONS["backend"]
    for place, argument in reversed(list(enumerate(argv))):
        if argument == option.flag and place + 1 < len(argv):
            return argv[place + 1]
        if argument.startswith(f"{option.flag}="):
            return argument.partition("=")[2]
    return environ.get("BACKEND", "") or str(option.default)


def plugin_option(flag: Flag, backend: str) -> Option:
    """A plug-in's flag as one of ours. Raises `PluginError` if there is one of that name."""
    name = flag.key
    if name in _OPTIONS or name in _ALIASES:
        raise PluginError(f"backend `{backend}` adds a flag `{flag.name}` that already exists; this is its defect")
    kinds: dict[type, Kind] = {
        bool: YES_NO,
        int: Kind(int, "a whole number", "N"),
        float: Kind(float, "a number", "X"),
        Path: FILE,
    }
    kind = one_of(*flag.choices) if flag.choices else kinds.get(flag.kind, TEXT)
    return Option(name, kind, flag.help, f"Of backend {backend}", flag.default)


def _count_shards(values: dict[str, object], environ: Mapping[str, str]) -> None:
    """``--sharded true`` alone means all devices that this process may see, as in TGI."""
    if not values.get("sharded") or "num_shard" in values:
        return
    named = next(
        (
            environ[name]
            for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
            if environ.get(name)
        ),
        "all",
    )
    if named in ("all", "void"):
        count = len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])
    else:
        count = len([item for item in named.split(",") if item.strip()])
    if count <= 1:
        raise SettingsError(
            f"Invalid argument: `sharded` is true, but {count or 'no'} device is seen; "
            "say over how many with `--num-shard`"
        )
    values["num_shard"] = count


def _refuse_ngrok(values: dict[str, object]) -> None:
    given = [values.pop(name, None) for name in ("ngrok", "ngrok_authtoken", "ngrok_edge")]
    if any(given):
        raise SettingsError(f"Invalid argument: {_NGROK}")


def _merge_alias(values: dict[str, object], alias: str, name: str, what: str) -> None:
    given = values.pop(alias, None)
    if given is None:
        return
    if name in values:
        raise SettingsError(
            f"Invalid argument: Both `{name}` ({values[name]}) and `{alias}` ({given}) are set. "
            f"Set only `{name}`; `{alias}` is {what}"
        )
    values[name] = given


def _use_vertex_port(values: dict[str, object]) -> None:
    """Vertex AI tells the port by a variable; as TGI, what is no port is no reason to fail."""
    text = str(values.get("aip_http_port", ""))
    if text.isascii() and text.isdecimal() and int(text) <= 65535:
        values["port"] = int(text)


def _ignore_container_hostname(values: dict[str, object], argv: Sequence[str]) -> None:
    """Docker and many shells set HOSTNAME to the machine's name, which is no address to listen on."""
    if any(argument.split("=", 1)[0] == "--hostname" for argument in argv):
        return
    name = str(values.get("hostname", "localhost"))
    if name != "localhost":
        try:
            ipaddress.ip_address(name)
        except ValueError:
            del values["hostname"]
