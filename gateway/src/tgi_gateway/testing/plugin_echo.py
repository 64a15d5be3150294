"""`--backend echo`: the gateway without a model. Any folder with a tokenizer will do."""

from __future__ import annotations

from tgi_gateway.backend import Backend, BackendPlugin, EngineOptions, Flag
from tgi_gateway.hooks import hookimpl
from tgi_gateway.testing.echo import ECHO_CAPABILITIES, EchoBackend, toy_model_from

STEP_MS = Flag("--echo-step-ms", float, 0.0, "Milliseconds between two steps of the echo engine; 0: no pause.")


def create(options: EngineOptions) -> Backend:
    step_ms = options.extra.get("echo_step_ms", STEP_MS.default)
    assert isinstance(step_ms, (int, float))
    return EchoBackend(toy_model_from(options), step_s=step_ms / 1000)


@hookimpl
def tgi_backend() -> BackendPlugin:
    return BackendPlugin(
        name="echo",
        summary="answers with the prompt's own tokens; needs no model, only a tokenizer",
        capabilities=ECHO_CAPABILITIES,
        create=create,
        flags=(STEP_MS,),
        needs_model=False,
    )
