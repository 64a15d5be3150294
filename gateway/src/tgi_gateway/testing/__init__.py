"""The smallest correct backends, for tests and measurements without a model."""

from tgi_gateway.testing.echo import EchoBackend, toy_model
from tgi_gateway.testing.scripted import Script, ScriptedBackend, ScriptedToken

__all__ = ["EchoBackend", "Script", "ScriptedBackend", "ScriptedToken", "toy_model"]
