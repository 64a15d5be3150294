"""A model may have tokens that are as likely: which of them is drawn is nobody's fault."""

from __future__ import annotations

import pytest

from tgi_contract_tests import BackendContract
from tgi_contract_tests.engine import Answer, Engine
from tgi_gateway.types import Finished, Request, SamplingParams, StopRules, Token, Usage


def answer(*tokens: tuple[int, float]) -> Answer:
    request = Request(1, (5,), SamplingParams(), StopRules(len(tokens)))
    made = [Token(1, token_id, logprob) for token_id, logprob in tokens]
    return Answer(request, made, [Finished(1, "length", Usage(1, len(tokens)))])


class Contract(BackendContract):
    """Its engine answers greedily, then as `drawn`."""

    backend = "echo"
    __test__ = False

    def __init__(self, greedy: Answer, drawn: Answer) -> None:
        self.answers = [greedy, drawn]

    def _answer(self, engine: Engine, sampling: SamplingParams | None = None, length: int = 24) -> Answer:  # noqa: ARG002
        return self.answers[sampling is not None]


def greedy() -> Answer:
    return answer((5, -1.0), (0, -1.5), (7, -1.0))


@pytest.mark.parametrize("after", [(8, -3.0), (7, -1.0)])
def test_a_tie_may_be_drawn_either_way(after: tuple[int, float]) -> None:
    drawn = answer((5, -1.0), (43, -1.5), after)
    Contract(greedy(), drawn).test_top_k_of_one_is_greedy(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("drawn", [answer((5, -1.0), (43, -1.6), (7, -1.0)), answer((6, -1.2), (43, -1.5), (7, -1.0))])
def test_what_is_less_likely_may_not_be_drawn(drawn: Answer) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"greedy and top_k 1: token \d is"):
        Contract(greedy(), drawn).test_top_k_of_one_is_greedy(None)  # type: ignore[arg-type]
