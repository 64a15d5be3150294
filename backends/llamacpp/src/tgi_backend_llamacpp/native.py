"""What is used of llama.cpp: its low-level API, with errors where C gives null pointers and numbers.

Everything but loading is called from one thread, which llama.cpp wants of a context.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tgi_backend_llamacpp.filters import Logits
from tgi_backend_llamacpp.options import KV_TYPES, NUMA, LlamaOptions
from tgi_backend_llamacpp.sequences import Saved
from tgi_gateway.errors import ModelError, StartError

log = logging.getLogger(__name__)

Indices: TypeAlias = npt.NDArray[np.intp]
Numbers: TypeAlias = Sequence[int] | npt.NDArray[Any]

SPIN_COUNT = "2000000"
"""How long OpenMP's threads look for the next operation before they fall asleep: some tens of milliseconds, so that
they stay awake between steps, and an idle server costs nothing."""
_SPLIT_MODES = {"none": 0, "layer": 1, "row": 2}
_ERROR = 4
"""ggml's level; what is below it, warnings included, is about its own inside."""
_held_by_c: list[object] = []
_last_errors: list[str] = []


@cache
def library() -> Any:
    """llama-cpp-python's bindings, set up on the first call."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when OpenMP is loaded
    import llama_cpp.llama_cpp as api

    callback = api.llama_log_callback(_on_log)
    _held_by_c.append(callback)
    api.llama_log_set(callback, ctypes.c_void_p(0))
    api.llama_backend_init()
    return api


def _on_log(level: int, text: bytes, _data: object) -> None:
    line = text.decode("utf-8", "replace").strip()
    if level == _ERROR and line:
        _last_errors.append(line)
        del _last_errors[:-4]
    if line:
        log.log(logging.WARNING if level == _ERROR else logging.DEBUG, "%s", line)


def _why() -> str:
    """What llama.cpp said last of an error."""
    return _last_errors[-1].partition(": ")[2] or _last_errors[-1] if _last_errors else "it does not say why"


class Model:
    """Weights and vocabulary of one GGUF file, which has been checked."""

    def __init__(self, path: Path, options: LlamaOptions, progress: Callable[[float], None] | None = None) -> None:
        """Raises `ModelError` with what llama.cpp says. `progress` is told parts of 1."""
        api = self._api = library()
        if options.numa != "disabled":
            api.llama_numa_init(NUMA[options.numa])
        if options.gpu_layers and not api.llama_supports_gpu_offload():
            raise StartError(
                f"--n-gpu-layers is {options.gpu_layers}, but llama-cpp-python was compiled without a GPU. Compile it "
                'for yours, for example: CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-cache-dir '
                "llama-cpp-python"
            )
        params = api.llama_model_default_params()
        params.n_gpu_layers = options.gpu_layers
        params.split_mode = _SPLIT_MODES[options.split_mode]
        params.main_gpu = options.main_gpu
        params.load_mode = (api.LLAMA_LOAD_MODE_MMAP if options.mmap else api.LLAMA_LOAD_MODE_NONE) | (
            api.LLAMA_LOAD_MODE_MLOCK if options.mlock else 0
        )

        def on_progress(part: float, _data: object) -> bool:
            if progress is not None:
                progress(part)
            return True

        params.progress_callback = kept = api.llama_progress_callback(on_progress)
        _last_errors.clear()
        self.handle = api.llama_model_load_from_file(os.fsencode(path), params)
        del kept
        if not self.handle:
            raise ModelError(f"llama.cpp cannot load {path}: {_why()}")
        self._vocab = api.llama_model_get_vocab(self.handle)
        self.vocab_size: int = api.llama_vocab_n_tokens(self._vocab)
        self.trained_tokens: int = api.llama_model_n_ctx_train(self.handle)
        """Longest sequence that the model was made for."""
        self.end_token_ids = tuple(
            token for token in range(self.vocab_size) if api.llama_vocab_is_eog(self._vocab, token)
        )
        """Those that end a generation (EOS, and what else llama.cpp takes for an end)."""
        self.remembers_everything = not (
            api.llama_model_is_recurrent(self.handle)
            or api.llama_model_is_hybrid(self.handle)
            or api.llama_model_n_swa(self.handle) > 0
        )
        """Whether any beginning of a sequence can be taken over by another one."""
        self.description = self._described()

    def tokenize(self, text: str) -> list[int]:
        """As llama.cpp does it, special tokens recognised, none added."""
        raw = text.encode()
        room = len(raw) + 8
        tokens = (ctypes.c_int32 * room)()
        count: int = self._api.llama_tokenize(self._vocab, raw, len(raw), tokens, room, False, True)
        return list(tokens[: max(count, 0)])

    def load_adapter(self, path: Path) -> Any:
        """A LoRA adapter in a GGUF file, which has been checked. Lives as long as the model. Raises `ModelError`."""
        _last_errors.clear()
        adapter = self._api.llama_adapter_lora_init(self.handle, os.fsencode(path))
        if not adapter:
            raise ModelError(f"llama.cpp cannot use the adapter {path}: {_why()}")
        return adapter

    def close(self) -> None:
        self._api.llama_model_free(self.handle)

    def _described(self) -> str:
        buffer = ctypes.create_string_buffer(256)
        self._api.llama_model_desc(self.handle, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")


class Context:
    """One KV cache with many sequences, and the batch that a step is written into."""

    def __init__(self, model: Model, options: LlamaOptions, *, kv_tokens: int, outputs: int) -> None:
        """`outputs`: rows of logits that a step may have at once. Raises `StartError`."""
        api = self._api = library()
        params = api.llama_context_default_params()
        params.n_ctx = kv_tokens
        params.n_batch = min(options.step_tokens + options.max_sequences, kv_tokens)
        params.n_ubatch = min(options.physical_tokens, params.n_batch)
        params.n_seq_max = options.max_sequences + 1
        params.n_outputs_max = outputs
        params.n_threads = options.threads
        params.n_threads_batch = options.threads_batch
        params.type_k, params.type_v = KV_TYPES[options.type_k], KV_TYPES[options.type_v]
        params.flash_attn_type = 1 if options.flash_attention else 0
        params.offload_kqv = options.offload_kv
        params.kv_unified = True
        params.swa_full = True
        params.no_perf = True
        _last_errors.clear()
        self._handle = api.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise StartError(
                f"llama.cpp cannot make room for {kv_tokens} tokens: {_why()}. Lower --max-batch-total-tokens, or "
                "choose smaller --type-k and --type-v"
            )
        self._memory = api.llama_get_memory(self._handle)
        self._vocab_size = model.vocab_size
        self._adapter: Any = None
        self._logits_place = (0, 0)
        self._logits_array: Logits = np.empty((0, model.vocab_size), np.float32)
        self.max_tokens: int = api.llama_n_batch(self._handle)
        """Tokens of one `decode`."""
        self._make_batch(self.max_tokens)

    def decode(self, tokens: Numbers, positions: Numbers, sequences: Numbers, wanted: Numbers) -> Logits:
        """Compute these tokens; float32 [wanted, vocabulary], the logits at those indices, ascending.

        They are llama.cpp's own memory, good until the next call. Raises `RuntimeError`.
        """
        count = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._sequences[:count] = sequences
        if len(wanted) == count:
            self._outputs[:count] = 1
        else:
            self._outputs[:count] = 0
            self._outputs[wanted] = 1
        self._batch.n_tokens = count
        _last_errors.clear()
        status = self._api.llama_decode(self._handle, self._batch)
        if status:
            meaning = {1: "no room in the KV cache", 2: "aborted", -1: "a batch that it refuses"}
            raise RuntimeError(f"llama_decode returned {status}: {meaning.get(status, 'it failed')} ({_why()})")
        if not len(wanted):
            self._api.llama_synchronize(self._handle)
            return np.empty((0, self._vocab_size), np.float32)
        return self._logits(len(wanted))

    def _logits(self, rows: int) -> Logits:
        """What llama.cpp has just computed. The array is made anew only where it is another one than after the last
        step: making it takes longer than all else that is done here."""
        first = self._api.llama_get_logits(self._handle)
        place = (ctypes.addressof(first.contents), rows)
        if place != self._logits_place:
            self._logits_place = place
            self._logits_array = np.ctypeslib.as_array(first, (rows, self._vocab_size))
        return self._logits_array

    def use_adapter(self, adapter: Any) -> None:
        """For the following calls of `decode`; None: no adapter."""
        if adapter is self._adapter:
            return
        if adapter is None:
            self._api.llama_set_adapters_lora(self._handle, None, 0, None)
        else:
            one = (self._api.llama_adapter_lora_p_ctypes * 1)(adapter)
            self._api.llama_set_adapters_lora(self._handle, one, 1, (ctypes.c_float * 1)(1.0))
        self._adapter = adapter

    def copy(self, source: int, target: int, begin: int, end: int) -> None:
        """Let sequence `target` have the positions ``begin .. end - 1`` of `source` too. Moves no keys and values."""
        self._api.llama_memory_seq_cp(self._memory, source, target, begin, end)

    def remove(self, sequence: int, begin: int = -1, end: int = -1) -> None:
        """Take positions ``begin .. end - 1``, or all, from a sequence. What no sequence has any more is free."""
        self._api.llama_memory_seq_rm(self._memory, sequence, begin, end)

    def save(self, sequence: int) -> Saved:
        """The keys and values of a sequence, with their positions."""
        saved = np.empty(self._api.llama_state_seq_get_size(self._handle, sequence), np.uint8)
        written = self._api.llama_state_seq_get_data(self._handle, _bytes_of(saved), len(saved), sequence)
        return saved[:written]

    def load(self, sequence: int, saved: Saved) -> None:
        """What `save` gave, as the content of `sequence`. Raises `RuntimeError`."""
        if not self._api.llama_state_seq_set_data(self._handle, _bytes_of(saved), len(saved), sequence):
            raise RuntimeError(f"a cached prefix cannot be loaded ({_why()})")

    def clear(self) -> None:
        self._api.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        self._api.llama_free(self._handle)

    def _make_batch(self, size: int) -> None:
        """Arrays that live as long as the context, and the structure that points to them."""
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._sequences = np.zeros(size, np.int32)
        self._outputs = np.zeros(size, np.int8)
        self._ones = np.ones(size, np.int32)
        # Each token has a list of sequences, here of one: a pointer into `_sequences`.
        first = self._sequences.ctypes.data
        self._lists = np.arange(first, first + 4 * size, 4, dtype=np.uintp)
        batch = self._batch = self._api.llama_batch()
        for name, array in (
            ("token", self._tokens),
            ("pos", self._positions),
            ("n_seq_id", self._ones),
            ("seq_id", self._lists),
            ("logits", self._outputs),
        ):
            kind = dict(type(batch)._fields_)[name]
            setattr(batch, name, ctypes.cast(array.ctypes.data, kind))


def _bytes_of(array: Saved) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def quantize(source: Path, target: Path, kind: int, threads: int) -> None:
    """Write `source` again with its weights as file type `kind` (LLAMA_FTYPE_*). Raises `ModelError`."""
    api = library()
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread = kind, threads
    _last_errors.clear()
    if api.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)):
        raise ModelError(f"llama.cpp cannot quantize {source}: {_why()}")
