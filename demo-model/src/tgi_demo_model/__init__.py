"""The demo model: where its weights lie on this machine."""

from pathlib import Path

__version__ = "0.1.0"


def model_path() -> Path:
    """Folder of the demo model, as transformers and the gateway load it."""
    folder = Path(__file__).parent / "weights"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model. Run `python train.py` in demo-model to make it.")
    return folder
