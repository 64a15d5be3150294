"""From what the user named to two things that exist: a GGUF file, and a folder with its tokenizer."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from tgi_backend_llamacpp.gguf_file import read_model
from tgi_backend_llamacpp.vocabulary import write_tokenizer
from tgi_gateway.backend import EngineOptions, ModelFiles
from tgi_gateway.errors import ModelError

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"


def prepare(options: EngineOptions, folder: Path) -> ModelFiles:
    """The files of the model that `options` name; what has to be made for one server goes into `folder`.

    A safetensors model is converted once and kept in --gguf-cache. Raises `ModelError`.
    """
    named = options.extra.get("model_gguf")
    place = options.model_path
    has_tokenizer = place.is_dir() and (place / TOKENIZER).is_file()
    if isinstance(named, Path | str):
        path = Path(named).expanduser()
        if not path.is_file():
            raise ModelError(f"--model-gguf: there is no file {path}")
    elif place.is_file():
        path = place
    else:
        path = _in_folder(place) or _converted(options)
    parts = read_model(path)  # before anything native sees it
    if has_tokenizer:
        return ModelFiles(path, place)
    tokenizer = folder / "tokenizer"
    write_tokenizer(parts[0], tokenizer)
    return ModelFiles(path, tokenizer)


def _in_folder(folder: Path) -> Path | None:
    """The GGUF file of a folder, or the first part of a split one; None if there is none."""
    found = sorted(folder.glob("*.gguf"))
    first = [path for path in found if "-of-" not in path.stem or "-00001-of-" in path.stem]
    if len(first) > 1:
        raise ModelError(
            f"{folder} has several GGUF files: {', '.join(path.name for path in first)}. Name one of them, or add "
            f"what tells it apart: --model-id {folder}:Q4_K_M"
        )
    return first[0] if first else None


def _converted(options: EngineOptions) -> Path:
    """A safetensors model as GGUF, from the cache or made now."""
    from tgi_backend_llamacpp.convert import convert

    source, kind = options.model_path, str(options.extra.get("gguf_type") or "q8_0")
    cache = Path(str(options.extra.get("gguf_cache") or "~/.cache/tgi-gateway/gguf")).expanduser()
    target = cache / f"{source.name}-{_fingerprint(source)}-{kind}.gguf"
    if target.is_file():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            log.info("converting %s to GGUF (%s); this is done once", source, kind)
            convert(source, part, kind)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ModelError(
            f"the converted model cannot be written to {cache}: {error.strerror}. Make room, or choose another folder "
            "with --gguf-cache"
        ) from error
    return target


def _fingerprint(folder: Path) -> str:
    """Changes when the folder's files do."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
