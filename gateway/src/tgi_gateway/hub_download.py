"""Fetch a model into the hub's cache: only what is needed, resumable, with errors that name the next step."""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib.util
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tgi_gateway import gguf_choice
from tgi_gateway.errors import ModelError
from tgi_gateway.settings import Settings

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo as HubModel

    from tgi_gateway.hub import Needs

logger = logging.getLogger(__name__)

Report = Callable[[int, int], None]
"""Called with (bytes that are here, bytes in all), a few times a second."""

TRIES = 5
FIRST_PAUSE_S = 1.0
REPORT_EVERY_S = 0.25
SUFFIXES = (".safetensors", ".json", ".txt", ".jinja", ".model")
"""Everything an engine or tokenizer reads. No pickles: .bin, .pt and .pth stay where they are."""
SKIPPED = ("consolidated", "arguments", "args", "training")
"""Parts of names that mark a second copy of the weights, or what the training left behind."""
TEMPLATES = "additional_chat_templates/"


def download(settings: Settings, *, needs: Needs, report: Report | None = None) -> Path:
    """Fetch the model into the hub's cache, or find it there. Broken transfers resume where they stopped.

    Returns its folder, or of GGUF weights the (first) file. Raises `ModelError`.
    """
    if importlib.util.find_spec("hf_transfer") is None:
        os.environ.pop("HF_HUB_ENABLE_HF_TRANSFER", None)  # images set it; the library would insist on the package
    # Imported late: a server on a local folder needs none of it.
    import huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    assert settings.model_id is not None, "the caller names the model"
    place = _Place.of(settings)
    with _explained(place):
        if place.offline:
            cached = _cached(place, needs)
            if cached is None:
                raise ModelError(
                    f"{place} is not, or not completely, in {place.cache}, and HF_HUB_OFFLINE forbids asking the hub. "
                    "Unset it for the first download, or give a local folder with --model-id"
                )
            return cached
        disable_progress_bars()
        pause_s = FIRST_PAUSE_S
        for left in reversed(range(TRIES)):
            try:
                found = huggingface_hub.HfApi(token=place.token).model_info(
                    place.model_id, revision=place.revision, files_metadata=True
                )
                wanted, first = _wanted(place, list(_files(found)), needs)
                _check_room(place, wanted)
                with _watched(place, wanted, report):
                    return _snapshot(place, [file.name for file in wanted]) / first
            except _broken() as error:
                if not _is_transient(error):
                    raise
                if (cached := _cached(place, needs)) is not None:
                    logger.warning("The hub does not answer (%s); using what is in the cache", type(error).__name__)
                    return cached
                if not left:
                    raise
                logger.warning(
                    "The transfer broke (%s); going on in %g s, %d tries left", type(error).__name__, pause_s, left
                )
                time.sleep(pause_s)
                pause_s *= 2
    raise AssertionError("the last try returns or raises")


@dataclass(frozen=True, slots=True)
class _Place:
    """Which model, and how to get at it."""

    model_id: str
    choice: str | None
    """Which of its GGUF files."""
    revision: str | None
    token: str | None
    cache: Path
    offline: bool

    @staticmethod
    def of(settings: Settings) -> _Place:
        from huggingface_hub import constants

        model_id, choice = gguf_choice.split_model_id(settings.model_id or "")
        return _Place(
            model_id=model_id,
            choice=choice,
            revision=settings.revision,
            token=settings.hf_token,
            cache=Path(settings.huggingface_hub_cache or constants.HF_HUB_CACHE).expanduser(),
            offline=settings.hf_hub_offline,
        )

    @property
    def blobs(self) -> Path:
        """Where the hub's library keeps the files of this model, by their hash."""
        return self.cache / f"models--{self.model_id.replace('/', '--')}" / "blobs"

    def __str__(self) -> str:
        return f"`{self.model_id}`" + (f" (revision {self.revision})" if self.revision else "")


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    size: int
    blob: str
    """Name in the cache: the hash of the content."""


def _snapshot(place: _Place, names: Iterable[str]) -> Path:
    """The library's own download, of exactly the files in `names`."""
    import huggingface_hub

    folder = huggingface_hub.snapshot_download(
        place.model_id,
        revision=place.revision,
        cache_dir=str(place.cache),
        token=place.token,
        allow_patterns=[glob.escape(name) for name in names],
    )
    return Path(str(folder))


def _cached(place: _Place, needs: Needs) -> Path | None:
    """What an earlier download left, if that was finished."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    from tgi_gateway.hub import check_folder

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                place.model_id, revision=place.revision, cache_dir=str(place.cache), local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        return None
    if "gguf" in needs.weights:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob(f"*{gguf_choice.SUFFIX}")]
        with contextlib.suppress(ModelError):
            if chosen := gguf_choice.choose(place.model_id, names, place.choice):
                return folder / chosen[0]
    try:
        check_folder(folder, needs)
    except ModelError:
        return None
    return folder


def _files(found: HubModel) -> Iterator[_File]:
    """The files worth having."""
    for sibling in found.siblings or ():
        name: str = sibling.rfilename
        place, _, last = name.rpartition("/")
        gguf = name.endswith(gguf_choice.SUFFIX)
        if place and f"{place}/" != TEMPLATES and not gguf:
            continue
        if not (gguf or name.endswith(SUFFIXES)) or any(part in last for part in SKIPPED):
            continue
        blob = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        yield _File(name, sibling.size or 0, blob or "")


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights that can be loaded."""
    return name.endswith(".safetensors") and not any(part in name for part in SKIPPED)


def _wanted(place: _Place, files: list[_File], needs: Needs) -> tuple[list[_File], str]:
    """What to fetch, and the name of the file that stands for the model ("": the folder does).

    Decided before gigabytes are fetched. Raises `ModelError`.
    """
    others = [file for file in files if not is_weights(file.name) and not file.name.endswith(gguf_choice.SUFFIX)]
    if "gguf" in needs.weights and (
        chosen := gguf_choice.choose(place.model_id, (each.name for each in files), place.choice)
    ):
        return [file for file in files if file.name in chosen], chosen[0]
    if place.choice is not None:
        raise ModelError(
            f"`{place.model_id}:{place.choice}` chooses a GGUF file, which this backend cannot serve. Leave the choice "
            "out, or use --backend llamacpp"
        )
    wanted = [*others, *(file for file in files if is_weights(file.name))] if needs.weights else others
    lacking = needs.lacking({file.name for file in wanted})
    if lacking:
        raise ModelError(f"the hub's model {place} has no {', no '.join(lacking)}. Choose another model or --revision")
    return wanted, ""


def _check_room(place: _Place, files: list[_File]) -> None:
    """Raise `ModelError` if what is still to be fetched does not fit on the disk."""
    absent = sum(file.size - _present(place, file) for file in files)
    with contextlib.suppress(OSError):  # a folder that cannot be asked fails at its first write, with its own message
        place.cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place.cache).free
        if absent > free:
            raise ModelError(
                f"{place} needs {absent / 1e9:.1f} GB more in {place.cache}, where {free / 1e9:.1f} GB are free. "
                "Make room, or choose another folder with --huggingface-hub-cache"
            )


def _present(place: _Place, file: _File) -> int:
    """Bytes of `file` that are here, whole or in part."""
    try:
        return min((place.blobs / file.blob).stat().st_size, file.size)
    except OSError:
        pass
    # Version 0 of the library goes on with HASH.incomplete, version 1 makes a HASH.RANDOM.incomplete each time.
    partial = [path.stat().st_size for path in place.blobs.glob(f"{file.blob}*.incomplete") if path.exists()]
    return min(max(partial, default=0), file.size)


@contextlib.contextmanager
def _watched(place: _Place, files: list[_File], report: Report | None) -> Iterator[None]:
    """Tell `report` how many bytes are here, from a thread, until the block ends."""
    if report is None:
        yield
        return
    total = sum(file.size for file in files)
    ended = threading.Event()

    def watch() -> None:
        while True:
            last = ended.wait(REPORT_EVERY_S)
            report(sum(_present(place, file) for file in files), total)
            if last:
                return

    thread = threading.Thread(target=watch, name="download-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


_LOCAL = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ENOENT,
}


def _broken() -> tuple[type[Exception], ...]:
    """What a broken transfer raises: the hub's library changed from requests, whose errors are OSError, to httpx."""
    httpx = sys.modules.get("httpx")
    return (OSError, httpx.HTTPError) if httpx is not None else (OSError,)


def _is_transient(error: Exception) -> bool:
    """Whether trying again may help: the network, or a server in trouble; not a refusal, not this machine's disk."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        response = getattr(error, "response", None)
        return response is not None and (response.status_code >= 500 or response.status_code == 429)
    if isinstance(error, errors.LocalEntryNotFoundError):
        return True
    return not isinstance(error, OSError) or error.errno not in _LOCAL


@contextlib.contextmanager
def _explained(place: _Place) -> Iterator[None]:
    """Turn what the hub's library raises into `ModelError` with the next step."""
    from huggingface_hub import constants, errors

    elsewhere = "or give a local folder with --model-id"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{place} is gated. Accept its terms at {constants.ENDPOINT}/{place.model_id} and set HF_TOKEN to a "
            "token of the account that did"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"the model `{place.model_id}` has no revision `{place.revision}`; correct --revision"
        ) from error
    except errors.RepositoryNotFoundError as error:
        token = "the token in HF_TOKEN may not read it" if place.token else "set HF_TOKEN if it is private"
        raise ModelError(
            f"there is no model {place} on {constants.ENDPOINT}, and no such folder here. Correct --model-id; {token}"
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(
            f"{place} is neither a folder that exists nor a hub id of the form NAME or OWNER/NAME. Correct --model-id"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise ModelError(_unreachable(place, error)) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        raise ModelError(
            f"the hub {constants.ENDPOINT} answered {status} for {place}. Try again later, {elsewhere}"
        ) from error
    except _broken() as error:
        if isinstance(error, OSError) and error.errno in _LOCAL:
            raise ModelError(
                f"cannot write the download to {place.cache}: {error.strerror}. Mend that, or choose another "
                "folder with --huggingface-hub-cache"
            ) from error
        raise ModelError(_unreachable(place, error)) from error
    except ValueError as error:
        raise ModelError(
            f"the hub's answer for {place} cannot be understood: {error}. Try again, {elsewhere}"
        ) from error


def _unreachable(place: _Place, error: Exception) -> str:
    from huggingface_hub import constants

    return (
        f"cannot get {place} from {constants.ENDPOINT}: the hub does not answer or the transfer broke "
        f"({type(error).__name__}). What is here is kept: try again, check network and HTTPS_PROXY, or give a local "
        "folder with --model-id"
    )
