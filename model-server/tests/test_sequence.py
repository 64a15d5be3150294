"""What a Sequence derives from its request."""

import math
from array import array

from tgi_gateway.types import Request, SamplingParams, StopRules
from tgi_model_server.sequence import Sequence


def sequence(request: Request) -> Sequence:
    return Sequence(request, (0, 0), 10.0, array("i", request.input_ids), {})


def request(**fields: object) -> Request:
    values: dict[str, object] = {"sampling": SamplingParams(), "stop": StopRules(4, min_new_tokens=2)}
    return Request(1, (5, 6, 7), **(values | fields))  # type: ignore[arg-type]


def test_lengths_follow_from_prompt_and_stop_rules() -> None:
    made = sequence(request())
    assert (made.prompt_len, made.length, made.eos_length, made.final_length) == (3, 3, 5, 7)


def test_namespaces_keep_every_pair_of_adapter_and_salt_apart() -> None:
    pairs = [(None, ""), (None, "a"), ("a", ""), ("a", "bc"), ("ab", "c"), ("1:a", ""), (None, "1:a"), (None, "é")]
    spaces = [sequence(request(adapter_id=adapter, cache_salt=salt)).namespace for adapter, salt in pairs]
    assert spaces[0] == b""
    assert len(set(spaces)) == len(pairs)


def test_finished_tells_what_was_used() -> None:
    made = sequence(request())
    made.tokens.extend([8, 9])
    made.started_s = 12.5
    made.cached_tokens = 2
    end = made.finished("length", 20.0)
    assert (end.usage.prompt_tokens, end.usage.generated_tokens, end.usage.cached_tokens) == (3, 2, 2)
    assert end.queue_s == 2.5
    assert made.output_ids == [8, 9]


def test_a_sequence_that_never_ran_queued_until_its_end() -> None:
    assert sequence(request()).finished("cancelled", 13.0).queue_s == 3.0


def test_prompt_logprobs_are_told_only_when_complete() -> None:
    made = sequence(request(prefill_logprobs=True))
    made.restart_prompt_logprobs()
    made.prompt_logprobs.append(-1.0)
    assert made.wants_prompt_logprobs
    assert made.finished("cancelled", 11.0).prefill_logprobs == ()
    made.prompt_logprobs.append(-2.0)
    assert not made.wants_prompt_logprobs
    told = made.finished("length", 11.0).prefill_logprobs
    assert math.isnan(told[0])
    assert told[1:] == (-1.0, -2.0)
