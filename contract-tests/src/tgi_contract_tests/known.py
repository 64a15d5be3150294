"""Failures that a vendor knows of: listed with a reason, and expected to happen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class KnownFailures:
    """Base of every contract class."""

    known_failures: ClassVar[Mapping[str, str]] = {}
    """Test name, with or without its parameters -> reason. It must fail (strict xfail): the list cannot grow old."""
