"""Every deliberately broken backend is caught, by the tests that name its fault and by no other."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tgi_contract_tests.groups.grammars import ANYTHING, GRAMMARS
from tgi_contract_tests.groups.grammars import BROKEN as BROKEN_GRAMMARS

BROKEN = Path(__file__).with_name("broken_backends.py")
CAUGHT_BY: dict[str, tuple[str, ...]] = {
    "Sound": (),
    "SoundThroughHttp": (),
    "RefusesStopStrings": ("test_a_stop_string_ends_the_answer_and_frees_the_engine",),
    "ForgetsStopStrings": ("test_a_stop_string_ends_the_answer_and_frees_the_engine",),
    "SendsFortyTokensAtATime": (
        "test_tokens_come_as_they_are_made",
        "test_an_engine_does_not_run_ahead_of_a_busy_gateway",
    ),
    "SwapsTwoTokens": ("test_tokens_come_in_the_order_of_generation",),
    "LosesWhatASlowGatewayMisses": ("test_a_slow_gateway_loses_nothing",),
    "RunsAhead": ("test_an_engine_does_not_run_ahead_of_a_busy_gateway", "test_a_restart_leaves_nothing_behind"),
    "NewestFirst": ("test_an_early_request_is_not_starved_by_later_ones",),
    "LeavesAThreadBehind": ("test_a_restart_leaves_nothing_behind",),
    "FreesLate": ("test_capacity_is_back_within_the_steps_under_way",),
    "MakesUpCachedTokens": ("test_no_cached_tokens_are_reported_without_a_prefix_cache",),
    "CachesPrefixes": (),
    "SharesPrefixesOfAllSalts": (
        "test_salts_do_not_share_prefixes",
        "test_a_warm_prefix_gives_the_same_tokens",
        "test_a_prefix_is_used_as_far_as_it_agrees",
    ),
    "SaysNothingOfItsCache": (
        "test_a_warm_prefix_gives_the_same_tokens",
        "test_a_prefix_is_used_as_far_as_it_agrees",
    ),
    "UsesWholePagesOfPrefix": ("test_a_prefix_is_used_as_far_as_it_agrees",),
    "WarmPrefixIsOffByOne": (
        "test_a_warm_prefix_gives_the_same_tokens",
        "test_a_prefix_is_used_as_far_as_it_agrees",
        "test_greedy_tokens_do_not_depend_on_the_batch",
    ),
    "KnowsAnAdapter": (),
    "IgnoresTheAdapter": ("test_an_adapter_changes_the_answer",),
    "AdaptsTheWholeBatch": ("test_an_adapter_reaches_no_other_request_of_the_batch",),
    "UnknownAdapterIsTheModel": ("test_an_unknown_adapter_is_refused",),
    "AdapterSharesPrefixes": ("test_an_adapter_shares_no_prefix_with_the_model",),
    "TopAfterTemperature": ("test_logprobs_do_not_depend_on_how_the_token_is_chosen",),
    "EndsTwice": ("test_every_request_ends_exactly_once",),
    "ForgetsTheEnd": (
        "test_length_is_exact",
        "test_the_longest_prompt_is_served",
        "test_prompt_logprobs_are_one_per_token",
        "test_prompt_logprobs_repeat_those_of_generation",
        "test_top_tokens_of_a_prompt_agree_with_its_logprobs",
        "test_top_tokens_of_a_prompt_repeat_those_of_generation",
        "test_logprobs_do_not_depend_on_how_the_token_is_chosen",
    ),
    "TokenAfterTheEnding": ("test_no_token_follows_the_ending",),
    "EventsOfStrangers": ("test_no_event_names_an_unknown_request",),
    "RaggedColumns": ("test_steps_are_well_formed",),
    "StepsOverlap": ("test_steps_are_emitted_one_at_a_time",),
    "CountsOneTooMany": ("test_usage_agrees_with_what_was_emitted",),
    "LeaksOnCancel": (
        "test_cancel_of_a_running_request_frees_its_capacity",
        "test_cancel_of_a_waiting_request_ends_it",
        "test_a_storm_of_cancels_ends_them_all_and_frees_everything",
        "test_a_stop_string_ends_the_answer_and_frees_the_engine",
        "test_a_client_that_hangs_up_frees_the_engine",
    ),
    "CancelsLate": ("test_no_more_than_the_steps_under_way_follow_a_cancel",),
    "CancelledIsAnError": ("test_a_cancelled_request_ends_as_cancelled",),
    "IgnoresStopTokens": (
        "test_a_stop_token_ends_the_answer_and_is_its_last_token",
        "test_ignore_eos_does_not_ignore_stop_tokens",
    ),
    "EndOfSequenceBeforeLength": ("test_length_comes_before_end_of_sequence",),
    "EndsEarly": ("test_ignore_eos_goes_on_to_the_full_length",),
    "IgnoresMinNewTokens": (
        "test_min_new_tokens_holds_stop_tokens_back",
        "test_min_new_tokens_holds_end_of_sequence_back",
    ),
    "DependsOnBatchMates": (
        "test_greedy_tokens_do_not_depend_on_the_batch",
        "test_sampled_tokens_do_not_depend_on_the_batch",
        "test_penalties_do_not_reach_the_neighbours",
        "test_a_cancel_leaves_the_others_alone",
        "test_a_bad_request_leaves_its_neighbours_alone",
    ),
    "IgnoresSeed": ("test_different_seeds_give_different_tokens",),
    "DrawsFromOneGenerator": (
        "test_the_same_seed_gives_the_same_tokens",
        "test_sampled_tokens_do_not_depend_on_the_batch",
    ),
    "PromisesTooMuchMemory": ("test_the_promised_kv_tokens_can_all_be_used",),
    "DropsOnOverload": ("test_many_more_requests_than_fit_are_all_served",),
    "TruncatesLongPrompts": ("test_a_prompt_over_the_limit_is_refused",),
    "IgnoresWhatItLacks": (
        "test_an_undeclared_feature_is_refused[top_k]",
        "test_an_undeclared_feature_is_refused[prefill_logprobs]",
        "test_an_undeclared_feature_is_refused[prefill_top_n_tokens]",
    ),
    "BadRequestsFailTheBatch": ("test_a_bad_request_leaves_its_neighbours_alone",),
    "RaisesFromSubmit": ("test_an_empty_prompt_is_refused", "test_a_bad_request_leaves_its_neighbours_alone"),
    "SubmitWaitsForTheStep": (
        "test_submit_and_cancel_return_while_emit_is_busy",
        "test_emit_may_submit_and_cancel",
    ),
    "AlwaysHealthy": (
        "test_health_is_unhealthy_after_stop",
        "test_a_dead_engine_is_unhealthy_and_fails_its_requests",
        "test_an_engine_that_hangs_is_unhealthy",
    ),
    "HealthGeneratesAloud": ("test_health_emits_nothing", "test_no_event_names_an_unknown_request"),
    "StopsWithoutDraining": ("test_stop_lets_open_requests_finish",),
    "StopsWithoutAWord": (
        "test_stop_fails_what_it_does_not_wait_for",
        "test_a_request_after_stop_fails",
        "test_a_dead_engine_is_unhealthy_and_fails_its_requests",
    ),
    "StopsOnce": ("test_stop_may_be_called_twice",),
    "CapacityIsAlwaysWhole": ("test_capacity_counts_what_runs",),
    "CapacityCountsTheQueue": ("test_capacity_stays_within_its_bounds_under_load",),
    "NanLogprobs": (
        "test_logprobs_are_at_most_zero",
        "test_the_greedy_token_is_the_most_likely",
        "test_prompt_logprobs_repeat_those_of_generation",
    ),
    "TopIsUnsorted": ("test_top_tokens_are_sorted_distinct_and_sum_to_at_most_one",),
    "LogprobsAfterTemperature": (
        "test_the_greedy_token_is_the_most_likely",
        "test_prompt_logprobs_repeat_those_of_generation",
    ),
    "PromptLogprobsWithoutTheFirst": (
        "test_prompt_logprobs_are_one_per_token",
        "test_prompt_logprobs_repeat_those_of_generation",
        "test_top_tokens_of_a_prompt_agree_with_its_logprobs",
    ),
    "PromptTopIsOneLate": ("test_top_tokens_of_a_prompt_repeat_those_of_generation",),
    "KnowsGrammars": (),
    "IgnoresGrammars": (
        *(f"test_no_special_token_is_part_of_a_constrained_answer[{kind}]" for kind in ANYTHING),
        *(f"test_an_answer_holds_to_its_grammar[{kind}]" for kind in GRAMMARS),
        "test_grammars_share_a_batch_with_free_requests",
        *(f"test_a_broken_grammar_fails_its_own_request[{grammar.kind}]" for grammar in BROKEN_GRAMMARS),
    ),
    "WritesSpecialTokens": tuple(f"test_no_special_token_is_part_of_a_constrained_answer[{kind}]" for kind in ANYTHING),
    "StopsOneTokenEarly": (
        *(f"test_an_answer_holds_to_its_grammar[{kind}]" for kind in GRAMMARS),
        "test_grammars_share_a_batch_with_free_requests",
        *(f"test_a_broken_grammar_fails_its_own_request[{grammar.kind}]" for grammar in BROKEN_GRAMMARS),
    ),
    "GeneratesBeforeItCompiles": tuple(
        f"test_a_broken_grammar_fails_its_own_request[{grammar.kind}]" for grammar in BROKEN_GRAMMARS
    ),
    "BadGrammarsFailTheBatch": tuple(
        f"test_a_broken_grammar_fails_its_own_request[{grammar.kind}]" for grammar in BROKEN_GRAMMARS
    ),
    "ModelInfoContradictsItself": (
        "test_model_info_is_sane",
        "test_the_longest_prompt_is_served",
        "test_prompt_logprobs_are_one_per_token",
        "test_top_tokens_of_a_prompt_agree_with_its_logprobs",
    ),
}
SIDE_EFFECTS: dict[str, tuple[str, ...]] = {
    "CancelsLate": ("test_an_engine_does_not_run_ahead_of_a_busy_gateway",),
    # What its thread has not told yet when it stops is never told.
    "RunsAhead": ("test_stop_lets_open_requests_finish",),
    # Its threads may overtake each other.
    "StepsOverlap": (
        "test_a_bad_request_leaves_its_neighbours_alone",
        "test_a_greedy_request_gives_the_same_tokens_again",
        "test_an_engine_does_not_run_ahead_of_a_busy_gateway",
        "test_a_slow_gateway_loses_nothing",
        "test_greedy_tokens_do_not_depend_on_the_batch",
        "test_penalties_do_not_reach_the_neighbours",
        "test_sampled_tokens_do_not_depend_on_the_batch",
        "test_the_same_seed_gives_the_same_tokens",
        "test_tokens_come_in_the_order_of_generation",
    ),
    "LeaksOnCancel": ("test_cancel_before_the_first_token_frees_its_capacity",),
    "DependsOnBatchMates": ("test_a_slow_gateway_loses_nothing",),
    # Whatever submits while the gateway is busy.
    "SubmitWaitsForTheStep": (
        "test_a_bad_request_leaves_its_neighbours_alone",
        "test_an_early_request_is_not_starved_by_later_ones",
        "test_a_step_holds_the_tokens_of_all_who_ran",
        "test_capacity_stays_within_its_bounds_under_load",
        "test_greedy_tokens_do_not_depend_on_the_batch",
        "test_many_more_requests_than_fit_are_all_served",
        "test_penalties_do_not_reach_the_neighbours",
        "test_sampled_tokens_do_not_depend_on_the_batch",
        "test_steps_are_emitted_one_at_a_time",
        "test_the_promised_kv_tokens_can_all_be_used",
    ),
}
"""Tests that may catch it as well, depending on how far a step had got."""


Failures = dict[str, dict[str, str]]
"""Test class -> test -> message."""


@pytest.fixture(scope="module")
def failures(run_inner: Callable[[Path, Sequence[str], int], Failures]) -> Failures:
    return run_inner(BROKEN, [f"Test{defect}" for defect in CAUGHT_BY], 3)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("defect", CAUGHT_BY)
def test_a_broken_backend_is_caught_by_the_tests_that_name_its_fault(failures: Failures, defect: str) -> None:
    failed = failures[f"Test{defect}"]
    assert set(CAUGHT_BY[defect]) <= set(failed)
    assert set(failed) <= {*CAUGHT_BY[defect], *SIDE_EFFECTS.get(defect, ())}
    for text in failed.values():
        assert "the contract demands: " in text
        assert "read: docs/write-a-backend.md, rule `" in text


def test_every_broken_backend_is_listed() -> None:
    spec = importlib.util.spec_from_file_location("broken_backends_listed", BROKEN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {defect.__name__ for defect in module.DEFECTS} == set(CAUGHT_BY)
