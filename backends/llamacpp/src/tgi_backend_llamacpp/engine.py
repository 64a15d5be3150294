"""LlamaBackend: the Backend of llama.cpp. Loads a checked GGUF file and says what it can promise."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tgi_backend_llamacpp.gguf_file import GgufFile, read_gguf, read_model
from tgi_backend_llamacpp.native import Context, Model
from tgi_backend_llamacpp.options import LlamaOptions
from tgi_backend_llamacpp.prepare import prepare
from tgi_backend_llamacpp.runner import OUTPUT_ROWS, PAGE_SIZE, LlamaRunner
from tgi_gateway.backend import Capabilities, EngineOptions, ModelFiles, ModelInfo
from tgi_gateway.errors import ModelError, SettingsError
from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_model_server import machine
from tgi_model_server.batcher import BatchLimits
from tgi_model_server.sampling.grammar import Vocabulary
from tgi_model_server.stepped import Loaded, LoadingProgress, SteppedBackend, request_limits

log = logging.getLogger(__name__)

DEFAULT_KV_TOKENS = 65_536
"""Most KV tokens where nobody says how many; enough for 32 requests of 2,000."""
KV_PART_OF_MEMORY = 0.25
GPU_KV_TOKENS = 32_768
"""The same where the KV cache is on a GPU, of which this process does not know how much is free."""
_SAMPLE_TEXTS = ("Hello, World! 12345", "  two  spaces\n\n\tand a tab", "Größe, naïve — 日本語 🙂", "it's I'LL don't")


class LlamaBackend(SteppedBackend):
    """`options` name what `prepare` made of the model, or the model itself, which is then prepared at start."""

    def __init__(self, options: EngineOptions, capabilities: Capabilities) -> None:
        super().__init__(capabilities)
        self._options = options

    def load(self) -> Loaded:
        options = self._options
        settings = LlamaOptions.of(options)
        with contextlib.ExitStack() as opened:
            files = _files(options, opened)
            parts = read_model(files.model)
            model = _load_model(files.model, settings)
            opened.callback(model.close)
            adapters = _load_adapters(model, options.lora_adapters)
            kv_tokens = settings.kv_tokens or _kv_tokens(parts, model, settings, options)
            num_pages = -(-kv_tokens // PAGE_SIZE) + 1
            context = Context(
                model,
                settings,
                kv_tokens=num_pages * PAGE_SIZE,
                outputs=max(OUTPUT_ROWS, settings.max_sequences),
            )
            opened.callback(context.close)
            step_tokens = min(settings.step_tokens, context.max_tokens)
            info = _model_info(model, parts[0], settings, options, (num_pages - 1) * PAGE_SIZE, step_tokens)
            limits = BatchLimits(
                page_size=PAGE_SIZE,
                num_pages=num_pages,
                max_sequences=settings.max_sequences,
                max_step_tokens=step_tokens,
                max_input_tokens=info.max_input_tokens,
                max_total_tokens=info.max_total_tokens,
                vocab_size=info.vocab_size,
                chunked_prefill=options.prefill_chunking,
                prefix_caching=options.prefix_caching and model.remembers_everything,
            )
            runner = LlamaRunner(
                model,
                context,
                num_pages=num_pages,
                max_sequences=settings.max_sequences,
                adapters=adapters,
                max_saved_pages=_max_saved_pages(parts[0], settings),
            )
            _compare_tokenizers(model, files.tokenizer)
            return Loaded(
                runner=runner,
                limits=limits,
                info=info,
                vocabulary=lambda: Vocabulary.load(files.tokenizer, model.vocab_size, model.end_token_ids),
                close=opened.pop_all().close,
            )


def _files(options: EngineOptions, opened: contextlib.ExitStack) -> ModelFiles:
    if options.tokenizer_path is not None:
        return ModelFiles(options.model_path, options.tokenizer_path)
    return prepare(options, Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="tgi-llamacpp-"))))


def _load_model(path: Path, settings: LlamaOptions) -> Model:
    progress = LoadingProgress()
    return Model(path, settings, lambda part: progress(int(part * 1000), 1000))


def _load_adapters(model: Model, named: tuple[str, ...]) -> Mapping[str, Any]:
    """The adapters of --lora-adapters by id. Raises `ModelError`."""
    adapters: dict[str, Any] = {}
    for text in named:
        name, _, place = text.partition("=")
        path = Path(place or name).expanduser()
        if not path.is_file():
            raise ModelError(
                f"--lora-adapters: there is no file {path}. The llamacpp backend takes NAME=FILE, where FILE is an "
                "adapter converted to GGUF"
            )
        if read_gguf(path).metadata.get("general.type") != "adapter":
            raise ModelError(f"--lora-adapters: {path} is no adapter")
        adapters[name] = model.load_adapter(path)
    return adapters


def _kv_tokens(parts: list[GgufFile], model: Model, settings: LlamaOptions, options: EngineOptions) -> int:
    """As many as every sequence could use, within bounds and a part of the memory that is free."""
    longest = options.max_total_tokens or model.trained_tokens
    wanted = min(longest * settings.max_sequences, max(longest, DEFAULT_KV_TOKENS))
    if settings.gpu_layers and settings.offload_kv:
        return min(wanted, max(options.max_total_tokens or 0, GPU_KV_TOKENS))
    free = int(machine.available_bytes() * options.memory_fraction * KV_PART_OF_MEMORY)
    fits = free // max(1, round(_token_bytes(parts[0], settings)))
    if options.max_total_tokens is not None and fits < options.max_total_tokens:
        raise SettingsError(
            f"--max-total-tokens is {options.max_total_tokens}, but memory for {fits} KV tokens is free. Lower it, or "
            "choose smaller --type-k and --type-v"
        )
    return max(2, min(wanted, fits))


def _max_saved_pages(header: GgufFile, settings: LlamaOptions) -> int | None:
    if settings.saved_prefix_bytes is None:
        return None
    return int(settings.saved_prefix_bytes / max(_token_bytes(header, settings) * PAGE_SIZE, 1))


def _token_bytes(header: GgufFile, settings: LlamaOptions) -> float:
    """Bytes of one token's keys and values in all layers."""
    arch = header.architecture
    layers = header.whole(f"{arch}.block_count")
    heads = header.metadata.get(f"{arch}.attention.head_count", 1)
    kv_heads = header.metadata.get(f"{arch}.attention.head_count_kv", heads)
    most = max(heads) if isinstance(heads, list) else heads
    assert isinstance(most, int)
    size = header.whole(f"{arch}.embedding_length") // max(most, 1)
    per_layer = kv_heads if isinstance(kv_heads, list) else [kv_heads] * layers
    key_bytes, value_bytes = settings.kv_element_bytes
    each = header.whole(f"{arch}.attention.key_length", size) * key_bytes
    each += header.whole(f"{arch}.attention.value_length", size) * value_bytes
    return each * sum(count for count in per_layer if isinstance(count, int))


def _model_info(
    model: Model, header: GgufFile, settings: LlamaOptions, options: EngineOptions, pool_tokens: int, step_tokens: int
) -> ModelInfo:
    allowed = request_limits(
        options.max_input_tokens, options.max_total_tokens, longest=model.trained_tokens, pool_tokens=pool_tokens
    )
    return ModelInfo(
        model_id=options.model_id,
        max_input_tokens=allowed.max_input_tokens,
        max_total_tokens=allowed.max_total_tokens,
        max_batch_total_tokens=pool_tokens,
        max_batch_prefill_tokens=step_tokens,
        max_sequences=settings.max_sequences,
        vocab_size=model.vocab_size,
        eos_token_ids=model.end_token_ids,
        dtype=model.description,
        device=f"llama.cpp, {settings.threads} threads"
        + (f", {settings.gpu_layers} layers on GPU" if settings.gpu_layers else ""),
        model_type=header.architecture,
    )


def _compare_tokenizers(model: Model, folder: Path) -> None:
    """Warn if the HTTP workers' tokenizer and llama.cpp's do not agree: answers would suffer silently."""
    tokenizer = Tokenizer.from_folder(folder)
    for text in _SAMPLE_TEXTS:
        ours, theirs = tokenizer.encode(text, add_special_tokens=False).ids, model.tokenize(text)
        if ours != theirs:
            log.warning(
                "the tokenizer does not agree with the GGUF file: %r is %s here and %s to llama.cpp", text, ours, theirs
            )
            return
