"""The pluggy hooks that a backend distribution implements."""

from __future__ import annotations

import pluggy

from tgi_gateway.backend import BackendPlugin

PROJECT = "tgi_gateway"
ENTRY_POINT_GROUP = "tgi_gateway.backends"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class BackendHooks:
    """The specification; `plugins` loads the one module that was named and calls these."""

    @hookspec(firstresult=True)
    def tgi_backend(self) -> BackendPlugin:
        """Describe the backend. Import nothing heavy here."""
        raise AssertionError("a hook specification is never called")
