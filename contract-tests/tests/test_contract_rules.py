"""Every rule is explained where a failing test sends its reader."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from tgi_contract_tests.rules import DEVICE_RULES, RULES, DeviceRule, Rule

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "rules", "names"),
    [("write-a-backend.md", RULES, get_args(Rule)), ("write-a-device.md", DEVICE_RULES, get_args(DeviceRule))],
)
def test_every_rule_has_a_sentence_and_a_paragraph(page: str, rules: dict[str, str], names: tuple[str, ...]) -> None:
    explained = set(re.findall(r"\*\*`([a-z-]+)`\*\*", (DOCS / page).read_text("utf-8")))
    assert explained == set(rules) == set(names)
