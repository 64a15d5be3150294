"""The demo model: where its weights lie on this machine."""

from pathlib import Path

__version__ = "0.1.0"


def model_path() -> Path:
    """Folder of the demo model, as transformers and the gateway load it."""
    return _folder("weights")


def draft_path() -> Path:
    """Folder of the smaller draft with the same tokenizer, for speculation."""
    return _folder("draft")


def _folder(name: str) -> Path:
    folder = Path(__file__).parent / name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model. Run `python train.py` in demo-model to make it.")
    return folder
