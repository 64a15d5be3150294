"""From a model's name to a complete local folder: given, bundled, cached, or downloaded."""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tgi_gateway import gguf_choice
from tgi_gateway.backend import BackendPlugin, WeightFormat
from tgi_gateway.errors import ModelError
from tgi_gateway.hub_download import Report, download, is_weights
from tgi_gateway.settings import Settings

DEMO_MODEL_ID = "tgi-demo-model"
"""What the API calls the model that is served when none was named."""

TOKENIZER, CONFIG, INDEX = "tokenizer.json", "config.json", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a server reads of a model's folder."""

    weights: tuple[WeightFormat, ...] = ("safetensors",)
    """The formats that will do, the preferred one first; none for engines that only need a tokenizer."""
    tokenizer: bool = True
    """False: where tokenizer.json is missing, the plug-in's `prepare` may make it."""

    @staticmethod
    def of(plugin: BackendPlugin, extra: Mapping[str, object]) -> Needs:
        """Those of a server with this plug-in, whose own flags have the values `extra`."""
        replaced = any(extra.get(flag.key) for flag in plugin.flags if flag.replaces_weights)
        weights = () if replaced or not plugin.needs_model else plugin.weights
        return Needs(weights, tokenizer=plugin.prepare is None)

    def lacking(self, names: Collection[str]) -> list[str]:
        """What is not among the files `names`."""
        gguf = "gguf" in self.weights and any(name.endswith(gguf_choice.SUFFIX) for name in names)
        safetensors = "safetensors" in self.weights and not gguf
        wanted = [TOKENIZER] * self.tokenizer + [CONFIG] * safetensors
        lacking = [name for name in wanted if name not in names]
        if self.weights and not gguf and not (safetensors and any(map(is_weights, names))):
            lacking.append(" or ".join(f"*.{each}" for each in self.weights) + " weights")
        return lacking


SAFETENSORS = Needs()


def resolve(settings: Settings, *, needs: Needs = SAFETENSORS, report: Report | None = None) -> Path:
    """The local folder (or file) of ``settings.model_id``, complete and readable.

    Raises `ModelError` with the next step.
    """
    if settings.load_format == "dummy":
        needs = replace(needs, weights=())
    if settings.weights_cache_override is not None:
        folder = Path(settings.weights_cache_override).expanduser()
        if not folder.is_dir():
            raise ModelError(f"--weights-cache-override: there is no folder {folder}")
    elif settings.model_id is None:
        folder = demo_model()
    elif needs_download(settings):
        folder = download(settings, needs=needs, report=report)
        if folder.is_file():
            return folder
    else:
        folder, choice = _local(settings.model_id)
        if folder.is_file():
            return _file(folder, needs)
        if choice is not None:
            chosen = gguf_choice.choose(str(folder), (path.name for path in folder.iterdir()), choice)
            return _file(folder / chosen[0], needs)
    if settings.load_format == "dummy" and (folder / CONFIG).is_file():
        return folder.resolve()  # all that random weights need
    check_folder(folder, needs)
    return folder.resolve()


def needs_download(settings: Settings) -> bool:
    """Whether `resolve` would ask the hub."""
    if settings.weights_cache_override is not None or settings.model_id is None:
        return False
    return not _local(settings.model_id)[0].exists()


def _local(model_id: str) -> tuple[Path, str | None]:
    """`model_id` as a path, and the GGUF file that is chosen of it."""
    model, choice = gguf_choice.split_model_id(model_id)
    return Path(model).expanduser(), choice


def _file(path: Path, needs: Needs) -> Path:
    if "gguf" not in needs.weights or path.suffix != gguf_choice.SUFFIX:
        raise ModelError(
            f"{path} is a file. This backend serves model folders; files that end in {gguf_choice.SUFFIX} are served "
            "by --backend llamacpp"
        )
    return path.resolve()


def demo_model() -> Path:
    """The folder of the bundled model."""
    try:
        module: Any = importlib.import_module("tgi_demo_model")
    except ModuleNotFoundError as error:
        if error.name != "tgi_demo_model":
            raise ModelError(f"the demo model cannot be loaded: {error}. Reinstall tgi-demo-model") from error
        raise ModelError(
            "no model was named. Add --model-id with a folder or a hub id, or install the demo model: "
            'pip install "tgi-gateway[demo]"'
        ) from None
    try:
        return Path(module.model_path())
    except FileNotFoundError as error:  # a checkout whose weights have not been trained
        raise ModelError(f"the demo model is not here: {error} Or name a model with --model-id") from error


def check_folder(folder: Path, needs: Needs) -> None:
    """Raise `ModelError` naming what is missing or unreadable."""
    if not folder.is_dir():
        raise ModelError(f"the model folder {folder} does not exist")
    names = {path.name for path in folder.iterdir()}
    if "safetensors" in needs.weights and INDEX in names:
        _check_index(folder / INDEX)
    lacking = needs.lacking(names)
    if lacking:
        raise ModelError(f"{folder} has no {', no '.join(lacking)}. {_way_out(names, lacking)}")
    if "safetensors" in needs.weights and CONFIG in names:
        _read_json(folder / CONFIG)


def _check_index(index: Path) -> None:
    """Raise `ModelError` if a weight file that it names is not there."""
    named = _read_json(index).get("weight_map")
    if not isinstance(named, dict):
        raise ModelError(f"{index} has no weight_map; download the model again")
    missing = sorted({str(name) for name in named.values() if not (index.parent / str(name)).is_file()})
    if missing:
        raise ModelError(
            f"{index.parent} lacks {len(missing)} of its weight files, first {missing[0]}. Finish the download: "
            "tgi-gateway download MODEL"
        )


def _way_out(names: Collection[str], lacking: Sequence[str]) -> str:
    """What to do about a folder of the files `names`."""
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
    if pickled and lacking[-1].endswith("weights"):
        return (
            f"Its pickled weights ({pickled[0]}) are never loaded because they can run code. Convert them once: "
            "transformers.AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    if lacking == [TOKENIZER]:
        return (
            "Name a model folder that has one; convert an older tokenizer once: "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return "Name a folder or hub id of a complete model"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}. Name a folder or hub id of a complete model") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}). Download the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds {type(content).__name__}, not an object. Download the model again")
    return content
