"""Reads the script file of a ScriptedBackend and says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from tgi_gateway.backend import ALL_FEATURES
from tgi_gateway.errors import StartError
from tgi_gateway.testing.scripted import After, Script, ScriptedToken, ScriptFile


def read(path: Path) -> ScriptFile:
    """Raises `StartError` naming the file and the place."""
    try:
        return _file(json.loads(path.read_text("utf-8")))
    except OSError as error:
        raise StartError(f"script file {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        detail = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
        raise StartError(f"script file {path}: {detail}. Its format: see tgi_gateway.testing.scripted") from error


def _file(data: Any) -> ScriptFile:
    _only(data, "the file", {"eos_token_ids", "features", "scripts"})
    unknown = set(data.get("features", ())) - ALL_FEATURES
    if unknown:
        raise ValueError(f"unknown features {sorted(unknown)}; known are {sorted(ALL_FEATURES)}")
    scripts = tuple(_script(item, f"script {n}") for n, item in enumerate(data["scripts"]))
    if not scripts:
        raise ValueError("`scripts` is empty; at least one is needed")
    eos = data.get("eos_token_ids")
    return ScriptFile(scripts, None if eos is None else _ids(eos), frozenset(data.get("features", ())))


def _script(data: Any, where: str) -> Script:
    _only(data, where, {"prompt", "tokens", "then"})
    then: After = data.get("then", "end")
    if then not in get_args(After):
        raise ValueError(f"{where}: `then` is {then!r}; allowed are {', '.join(get_args(After))}")
    tokens = tuple(_token(item, f"{where}, token {n}") for n, item in enumerate(data["tokens"]))
    if then == "repeat" and not tokens:
        raise ValueError(f"{where}: there is no token to repeat")
    return Script(tokens, _ids(data.get("prompt", ())), then)


def _token(data: Any, where: str) -> ScriptedToken:
    if isinstance(data, int):
        return ScriptedToken(data)
    _only(data, where, {"id", "logprob", "top", "delay_s"})
    top = tuple((int(token_id), float(logprob)) for token_id, logprob in data.get("top", ()))
    logprob = data.get("logprob")
    return ScriptedToken(
        int(data["id"]), None if logprob is None else float(logprob), top, float(data.get("delay_s", 0))
    )


def _ids(data: Any) -> tuple[int, ...]:
    return tuple(int(token_id) for token_id in data)


def _only(data: Any, where: str, allowed: set[str]) -> None:
    if not isinstance(data, dict):
        raise TypeError(f"{where} is {type(data).__name__}; it must be an object with {', '.join(sorted(allowed))}")
    if unknown := sorted(data.keys() - allowed):
        raise ValueError(f"{where} has unknown fields {unknown}; allowed are {', '.join(sorted(allowed))}")
