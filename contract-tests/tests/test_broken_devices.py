"""Every deliberately broken device is caught, by the tests that name its fault and by no other."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

BROKEN = Path(__file__).with_name("broken_devices.py")
ATTENTION = {
    "test_rope_attention",
    "test_attention_at_each_length",
    "test_attention_of_mixed_rows",
    "test_attention_of_many_decode_rows",
    "test_attention_of_head_groups",
    "test_attention_of_head_dims",
    "test_attention_in_a_sliding_window",
    "test_rows_may_share_the_pages_of_a_prefix",
    "test_many_rows_may_share_a_long_prefix",
}
ODD = "test_operations_at_odd_widths"
CAUGHT_BY: dict[str, set[str]] = {
    "SoundDevice": set(),
    "ForgetsTheBias": {"test_linear", "test_linear_add", "test_norm_linear", "test_norm_gated"},
    "RoundsInLinear": {"test_linear", "test_linear_add", "test_norm_linear", "test_norm_gated", "test_logits", ODD},
    "NormsOverTheWholeRow": {"test_rms_norm_of_heads", "test_rope_attention"},
    "DropsTheResidual": {"test_linear_add", ODD},
    "NormsAfterTheProduct": {"test_norm_linear", "test_norm_gated", "test_logits", ODD},
    "LogitsWithoutTheNorm": {"test_logits", ODD},
    "ChoosesTheLastOfEquals": {"test_greedy_takes_the_first_of_the_largest"},
    "SumsHalfTheVocabulary": {"test_greedy_sums_the_whole_vocabulary"},
    "RotatesTheValues": {"test_rope_attention"},
    "RotatesNeighbours": {"test_rope", "test_rope_attention"},
    "GatesTheWrongHalf": {"test_silu_mul", "test_norm_gated", ODD},
    "NormsInPlace": {"test_operations_leave_their_inputs_alone", ODD},
    "WritesOneFurther": ATTENTION | {"test_write_kv_changes_the_named_slots_and_no_other"},
    "IgnoresTheWindow": {"test_attention_in_a_sliding_window"},
    "WindowIsOneTooWide": {"test_attention_in_a_sliding_window"},
    "ReadsToTheEndOfThePage": ATTENTION,
    "MixesUpHeadGroups": ATTENTION,
    "DropsTheLastOddColumn": {ODD},
    "TakesEveryPageForItsOwn": {
        "test_rows_may_share_the_pages_of_a_prefix",
        "test_many_rows_may_share_a_long_prefix",
    },
    "AddsNothingUp": {f"test_ranks_exchange[2-{check}]" for check in ("all_reduce", "linear_reduce", "order")},
    "AddsToOtherBits": {f"test_ranks_exchange[2-{check}]" for check in ("all_reduce", "linear_reduce", "order")},
    "KeepsItsOwnProduct": {"test_ranks_exchange[2-linear_reduce]"},
    "LeavesTheSumUnfinished": {"test_ranks_exchange[2-linear_reduce]"},
    "GathersBackwards": {"test_ranks_exchange[2-all_gather]", "test_ranks_exchange[2-order]"},
    "KeepsItsOwn": {"test_ranks_exchange[2-broadcast]"},
    "KeepsThePlansLists": {"test_a_plan_may_be_changed_after_it_was_handed_over"},
    "MoreFreeThanThereIs": {"test_memory_figures_are_bytes_of_this_device"},
    "HandsOutUsedMemory": {"test_pool_memory_is_zero_and_can_be_written"},
    "LacksABucket": {"test_every_decode_step_has_a_bucket"},
    "RepeatsTheCapturedStep": {"test_capture_equals_eager"},
}
Failures = dict[str, dict[str, str]]
"""Test class -> test -> message."""


@pytest.fixture(scope="module")
def failures(run_inner: Callable[[Path, Sequence[str], int], Failures]) -> Failures:
    return run_inner(BROKEN, [f"Test{defect}" for defect in CAUGHT_BY], 1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("defect", CAUGHT_BY)
def test_a_broken_device_is_caught_by_the_tests_that_name_its_fault(failures: Failures, defect: str) -> None:
    failed = failures[f"Test{defect}"]
    whole = {name.partition("[")[0] for name in CAUGHT_BY[defect] if "[" in name}
    assert {name if name.partition("[")[0] in whole else name.partition("[")[0] for name in failed} == CAUGHT_BY[defect]
    for text in failed.values():
        assert "the contract demands: " in text
        assert "read: docs/write-a-device.md, rule `" in text


def test_every_broken_device_is_listed() -> None:
    spec = importlib.util.spec_from_file_location("broken_devices_listed", BROKEN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {defect.__name__ for defect in module.DEFECTS} == set(CAUGHT_BY)
