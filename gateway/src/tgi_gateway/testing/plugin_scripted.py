"""`--backend scripted`: the gateway on answers from a file, to replay exact outputs, delays and failures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tgi_gateway.backend import Backend, BackendPlugin, EngineOptions, Flag
from tgi_gateway.errors import StartError
from tgi_gateway.hooks import hookimpl
from tgi_gateway.testing import script_file
from tgi_gateway.testing.echo import toy_model_from
from tgi_gateway.testing.scripted import SCRIPTED_CAPABILITIES, ScriptedBackend

SCRIPT = Flag("--script", str, None, "JSON file with the answers of the scripted engine.")


def create(options: EngineOptions) -> Backend:
    path = options.extra.get("script")
    if not isinstance(path, str) or not path:
        raise StartError("backend `scripted` needs its answers: add --script FILE")
    script = script_file.read(Path(path))
    model = toy_model_from(options)
    if script.eos_token_ids is not None:
        model = replace(model, eos_token_ids=script.eos_token_ids)
    features = SCRIPTED_CAPABILITIES.features | script.features
    return ScriptedBackend(script.scripts, model, capabilities=replace(SCRIPTED_CAPABILITIES, features=features))


@hookimpl
def tgi_backend() -> BackendPlugin:
    return BackendPlugin(
        name="scripted",
        summary="replays answers, delays and failures from a file (--script); needs only a tokenizer",
        capabilities=SCRIPTED_CAPABILITIES,
        create=create,
        flags=(SCRIPT,),
        needs_model=False,
    )
