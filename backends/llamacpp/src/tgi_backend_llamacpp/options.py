"""What the command line says of llama.cpp, checked and complete, without loading it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tgi_gateway.backend import EngineOptions, Flag
from tgi_gateway.errors import SettingsError
from tgi_model_server import machine

MAX_SEQUENCES = 255
"""llama.cpp can tell 256 apart (LLAMA_MAX_SEQ); one is for prefixes on their way."""
DEFAULT_SEQUENCES = 32
DEFAULT_STEP_TOKENS = 512
NUMA: Final[Mapping[str, int]] = {"disabled": 0, "distribute": 1, "isolate": 2, "numactl": 3, "mirror": 4}
KV_TYPES: Final[Mapping[str, int]] = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "iq4_nl": 20,
}  # fmt: skip
"""Name -> number of the ggml types that a KV cache can have."""
_KV_BYTES: Final[Mapping[str, float]] = {
    "f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}  # fmt: skip

FLAGS = (
    Flag(
        "--model-gguf",
        Path,
        None,
        "GGUF file to serve; --model-id then names the folder of its tokenizer.",
        replaces_weights=True,
    ),
    Flag("--n-threads", int, None, "Threads for steps in which no prompt is read. Default: all usable cores but one."),
    Flag("--n-threads-batch", int, None, "Threads for steps that read prompts. Default: as --n-threads."),
    Flag("--n-gpu-layers", int, 0, "Layers to put on the GPU; -1: all."),
    Flag("--split-mode", str, "layer", "How to use several GPUs: none, layer, row, or the number of the one to use."),
    Flag("--numa", str, "disabled", "Spread over NUMA nodes.", choices=tuple(NUMA)),
    Flag("--disable-mmap", bool, False, "Read the file into memory instead of mapping it."),
    Flag("--use-mlock", bool, False, "Keep the model in memory, never swapped out."),
    Flag("--disable-offload-kqv", bool, False, "Keep the KV cache off the GPU."),
    Flag("--disable-flash-attention", bool, False, "Compute attention in the plain way."),
    Flag("--type-k", str, "f16", "Type of cached keys.", choices=tuple(KV_TYPES)),
    Flag("--type-v", str, "f16", "Type of cached values; other than f16 and f32 need flash attention.",
         choices=tuple(KV_TYPES)),
    Flag("--max-physical-batch-total-tokens", int, DEFAULT_STEP_TOKENS, "Tokens that are computed at once."),
    Flag("--saved-prefix-mib", int, None, "Most memory for prefixes that no running request has, in MiB, beside the KV "
         "cache; 0: none are kept. Default: as much as the KV cache."),
    Flag("--defrag-threshold", float, -1.0, "Without effect: any free cell of the KV cache can be used."),
    Flag("--gguf-type", str, "q8_0", "Type that the weights of a safetensors model are converted to."),
    Flag("--gguf-cache", Path, "~/.cache/tgi-gateway/gguf", "Folder where converted models are kept."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """What a llama.cpp model and context are made with."""

    threads: int
    threads_batch: int
    gpu_layers: int
    split_mode: str
    """none, layer or row"""
    main_gpu: int
    numa: str
    mmap: bool
    mlock: bool
    offload_kv: bool
    flash_attention: bool
    type_k: str
    type_v: str
    max_sequences: int
    step_tokens: int
    """Prompt tokens of a step."""
    physical_tokens: int
    """Tokens that are computed at once."""
    kv_tokens: int | None
    """None: as many as are sensible for the model and this machine."""
    saved_prefix_bytes: int | None
    """Most memory for prefixes that no running request has; None: they are bounded by the size of the KV cache."""

    @property
    def kv_element_bytes(self) -> tuple[float, float]:
        """Bytes of one element of a key and of a value."""
        return _KV_BYTES[self.type_k], _KV_BYTES[self.type_v]

    @staticmethod
    def of(options: EngineOptions) -> LlamaOptions:
        """Raises `SettingsError` for values that are wrong or contradict each other."""
        given = {flag.name.removeprefix("--").replace("-", "_"): flag.default for flag in FLAGS} | dict(options.extra)
        _refuse(options)
        threads = _whole(given, "n_threads", 1) or machine.usable_cores()
        split_mode, main_gpu = _split(str(given["split_mode"]))
        flash = not given["disable_flash_attention"]
        type_k, type_v = str(given["type_k"]), str(given["type_v"])
        if not flash and type_v not in ("f16", "f32", "bf16"):
            raise SettingsError(f"--type-v {type_v} needs flash attention; leave out --disable-flash-attention")
        sequences = options.max_batch_size or DEFAULT_SEQUENCES
        if sequences > MAX_SEQUENCES:
            raise SettingsError(
                f"--max-batch-size is {sequences}; llama.cpp can do {MAX_SEQUENCES} sequences at a time"
            )
        step = options.max_batch_prefill_tokens or DEFAULT_STEP_TOKENS
        physical = _whole(given, "max_physical_batch_total_tokens", 1) or DEFAULT_STEP_TOKENS
        saved_mib = _whole(given, "saved_prefix_mib", 0)
        return LlamaOptions(
            threads=threads,
            threads_batch=_whole(given, "n_threads_batch", 1) or threads,
            gpu_layers=_whole(given, "n_gpu_layers", -1) or 0,
            split_mode=split_mode,
            main_gpu=main_gpu,
            numa=str(given["numa"]),
            mmap=not given["disable_mmap"],
            mlock=bool(given["use_mlock"]),
            offload_kv=not given["disable_offload_kqv"],
            flash_attention=flash,
            type_k=type_k,
            type_v=type_v,
            max_sequences=sequences,
            step_tokens=step,
            physical_tokens=min(physical, step + sequences),
            kv_tokens=options.max_batch_total_tokens,
            saved_prefix_bytes=None if saved_mib is None else saved_mib << 20,
        )


def _refuse(options: EngineOptions) -> None:
    """What the torch engines know and llama.cpp does not is refused rather than ignored."""
    wrong = {
        "--quantize": options.quantize and "choose a GGUF file of that type, or --gguf-type for a safetensors model",
        "--dtype": options.dtype and "the GGUF file says of what type the weights are; see --gguf-type",
        "--kv-cache-dtype": options.kv_cache_dtype and "use --type-k and --type-v",
        "--num-shard": options.num_shard > 1 and "use --split-mode",
        "--speculate": options.speculate and "leave it out",
        "--rope-scaling": options.rope_scaling and "the GGUF file says how positions are encoded",
        "--load-format dummy": options.load_format == "dummy" and "name a GGUF file",
    }
    for flag, way_out in wrong.items():
        if way_out:
            raise SettingsError(f"{flag} is not for the llamacpp backend: {way_out}")


def _whole(given: Mapping[str, object], name: str, least: int) -> int | None:
    value = given[name]
    if value is None or (value == 0 and least == 1):  # 0 means "not set", as it does to TGI
        return None
    if not isinstance(value, int) or value < least:
        raise SettingsError(f"--{name.replace('_', '-')} is {value}; it must be a whole number of at least {least}")
    return value


def _split(text: str) -> tuple[str, int]:
    if text in ("none", "layer", "row"):
        return text, 0
    if text.isdigit():
        return "none", int(text)
    raise SettingsError(f"--split-mode is `{text}`; allowed are none, layer, row, or the number of one GPU")
