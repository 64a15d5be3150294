"""Which GGUF file of a folder or repository is meant by ``MODEL:FILE`` or ``MODEL:Q4_K_M``; parts go together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tgi_gateway.errors import ModelError

SUFFIX = ".gguf"
USUAL_TYPE = "Q4_K_M"
"""Taken where there are several and none was named."""
_PART = re.compile(r"-\d{5}-of-\d{5}$")


def split_model_id(model_id: str) -> tuple[str, str | None]:
    """The model, and what follows its last colon: a file or a type. A path that exists is taken whole."""
    model, colon, choice = model_id.rpartition(":")
    if not colon or not model or not choice or Path(model_id).expanduser().exists():
        return model_id, None
    return model, choice


def choose(model: str, names: Iterable[str], choice: str | None) -> list[str]:
    """The GGUF files among `names` that `choice` names, the parts of one model, in order. Empty if there are none.

    Raises `ModelError` that lists what there is, if nothing or more than one model fits.
    """
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        # A vision tower is no model of its own.
        if name.endswith(SUFFIX) and "mmproj" not in name.lower():
            models.setdefault(_PART.sub("", name.removesuffix(SUFFIX)), []).append(name)
    if not models:
        if choice is None:
            return []
        raise ModelError(f"`{model}` has no GGUF file, so `:{choice}` chooses nothing. Leave it out")
    if choice is None:
        fitting = list(models) if len(models) == 1 else [stem for stem in models if _has_type(stem, USUAL_TYPE)]
        problem = "has several GGUF files"
    else:
        named = choice.removesuffix(SUFFIX)
        fitting = [stem for stem in models if stem in (named, _PART.sub("", named))]
        fitting = fitting or [stem for stem in models if _has_type(stem, choice)]
        problem = f"has {'several GGUF files' if fitting else 'no GGUF file'} for `{choice}`"
    if len(fitting) != 1:
        raise ModelError(f"`{model}` {problem}. Name one as {model}:FILE; there are {', '.join(models)}")
    return models[fitting[0]]


def _has_type(stem: str, kind: str) -> bool:
    """Whether a name says that its weights are of this type, as in ``model-Q4_K_M`` or ``model.q4_k_m``."""
    return re.search(rf"(^|[-./_]){re.escape(kind.lower())}($|[-./])", stem.lower()) is not None
