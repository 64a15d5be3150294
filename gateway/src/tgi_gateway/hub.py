"""From a model's name to a complete local folder: given, bundled, cached, or downloaded."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from tgi_gateway.errors import ModelError
from tgi_gateway.hub_download import Report, download, is_weights
from tgi_gateway.settings import Settings

DEMO_MODEL_ID = "tgi-demo-model"
"""What the API calls the model that is served when none was named."""


def resolve(settings: Settings, *, needs_weights: bool = True, report: Report | None = None) -> Path:
    """The local folder (or file) of ``settings.model_id``, complete and readable.

    `needs_weights`: False for engines that only need a tokenizer. Raises `ModelError` with the next step.
    """
    needs_weights = needs_weights and settings.load_format != "dummy"
    if settings.weights_cache_override is not None:
        folder = Path(settings.weights_cache_override).expanduser()
        if not folder.is_dir():
            raise ModelError(f"--weights-cache-override: there is no folder {folder}")
    elif settings.model_id is None:
        folder = demo_model()
    elif needs_download(settings):
        folder = download(settings, needs_weights=needs_weights, report=report)
    else:
        folder = Path(settings.model_id).expanduser()
        if folder.is_file():
            return folder.resolve()
    check_folder(folder, needs_weights=needs_weights)
    return folder.resolve()


def needs_download(settings: Settings) -> bool:
    """Whether `resolve` would ask the hub."""
    if settings.weights_cache_override is not None or settings.model_id is None:
        return False
    return not Path(settings.model_id).expanduser().exists()


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


def check_folder(folder: Path, *, needs_weights: bool) -> None:
    """Raise `ModelError` naming the first file that is missing or unreadable."""
    if not folder.is_dir():
        raise ModelError(f"the model folder {folder} does not exist")
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json. Name a model folder that has one; convert an older tokenizer once: "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    if not needs_weights:
        return
    _read_json(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = _read_json(index).get("weight_map")
        if not isinstance(named, dict):
            raise ModelError(f"{index} has no weight_map; download the model again")
        missing = sorted({str(name) for name in named.values() if not (folder / str(name)).is_file()})
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of its weight files, first {missing[0]}. Finish the download: "
                "tgi-gateway download MODEL"
            )
    elif not any(is_weights(path.name) for path in folder.iterdir()):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise ModelError(
                f"{folder} has only pickled weights ({pickled[0]}), which are never loaded because they can run code. "
                "Convert them once: transformers.AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
            )
        raise ModelError(f"{folder} has no *.safetensors weights. Name a folder or hub id that has them")


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
