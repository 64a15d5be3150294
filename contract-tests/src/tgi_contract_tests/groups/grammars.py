"""A constrained answer holds to its grammar, whoever shares the batch; a broken grammar fails its own request."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from tgi_contract_tests.base import ContractBase
from tgi_contract_tests.engine import Answer, Engine
from tgi_contract_tests.rules import demand
from tgi_gateway.types import Failed, Finished, Grammar, Request, SamplingParams, StopRules

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
CHOICES = ["left", "right", "le"]


def _keeps_schema(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    if not (isinstance(value, dict) and value.keys() == {"ok", "n"} and isinstance(value["ok"], bool)):
        return False
    return isinstance(value["n"], int) and not isinstance(value["n"], bool) and 0 <= value["n"] <= 9


GRAMMARS: Mapping[str, tuple[Grammar, Callable[[str], bool]]] = {
    "json": (Grammar("json", json.dumps(SCHEMA)), _keeps_schema),
    "json_schema": (Grammar("json_schema", json.dumps(SCHEMA)), _keeps_schema),
    "regex": (Grammar("regex", "[a-c]{3}-[0-9]{2}"), lambda text: bool(re.fullmatch("[a-c]{3}-[0-9]{2}", text))),
    "choice": (Grammar("choice", json.dumps(CHOICES)), lambda text: text in CHOICES),
    "lark": (Grammar("lark", 'start: "x" ("y" | "z") "x"'), lambda text: text in ("xyx", "xzx")),
}
"""Each ends within a few tokens, and a model that knows nothing of it will hardly hit it."""
ANYTHING = {
    "regex": Grammar("regex", r"(.|\n){8,24}"),
    "json": Grammar("json", '{"type": "string", "minLength": 8, "maxLength": 24}'),
}
"""Grammars that leave the text free, so that a special token's own text would do."""
BROKEN = (Grammar("regex", "[a-"), Grammar("json", '{"type": "strin"}'), Grammar("lark", "start: missing"))


class Grammars(ContractBase):
    @pytest.mark.needs("grammar")
    @pytest.mark.parametrize("kind", GRAMMARS)
    def test_an_answer_holds_to_its_grammar(self, engine: Engine, kind: str) -> None:
        self._check_answers(engine.run(*(self._constrained(engine, kind, seed) for seed in range(4))), kind)

    @pytest.mark.needs("grammar")
    def test_grammars_share_a_batch_with_free_requests(self, engine: Engine) -> None:
        free = self.request(self.prompt(engine, seed=3), 24)
        alone = engine.run_one(free)
        together = self.together(
            engine, *(self._constrained(engine, kind, 7) for kind in GRAMMARS), self.again(free), self.again(free)
        )
        engine.wait_ended(*together)
        for kind, answer in zip(GRAMMARS, together, strict=False):
            self._check_answers([answer], kind)
        for answer in together[-2:]:
            self.check_same(alone, answer, "isolation", "alone against beside constrained requests")

    @pytest.mark.needs("grammar", "logit_bias")
    @pytest.mark.parametrize("kind", ANYTHING)
    def test_no_special_token_is_part_of_a_constrained_answer(self, engine: Engine, kind: str) -> None:
        """It would end a turn or begin another, and its text is shown to nobody. Ends of sequence are exempt."""
        special = [token_id for token_id in self.special_ids() if token_id not in engine.model.eos_token_ids]
        if not special:
            pytest.skip("the tokenizer has no special tokens but those that end a sequence")
        wish = tuple((token_id, 100.0) for token_id in special[:64])
        sampling = SamplingParams(logit_bias=wish, grammar=ANYTHING[kind])
        prompts = (self.prompt(engine, 8, seed) for seed in range(3))
        for answer in engine.run(*(self.request(each, 32, sampling, stop=StopRules(32)) for each in prompts)):
            found = set(special).intersection(answer.ids)
            demand(not found, "grammar", f"{ANYTHING[kind]} was answered with special tokens {sorted(found)}")

    @pytest.mark.needs("grammar")
    @pytest.mark.parametrize("broken", BROKEN, ids=lambda grammar: grammar.kind)
    def test_a_broken_grammar_fails_its_own_request(self, engine: Engine, broken: Grammar) -> None:
        good = self._constrained(engine, "regex", 1)
        bad = self.again(good, sampling=SamplingParams(grammar=broken))
        answers = self.together(engine, good, bad, self.again(good))
        engine.wait_ended(*answers)
        ending = answers[1].ending
        refused = isinstance(ending, Failed) and ending.error_type == "validation" and bool(ending.message)
        demand(refused, "grammar", f"{broken} ended in {ending} after {len(answers[1].tokens)} tokens")
        demand(not answers[1].tokens, "grammar", f"{broken} gave tokens before it was refused")
        self._check_answers([answers[0], answers[2]], "regex")

    @pytest.mark.needs("grammar")
    def test_a_cancelled_constrained_request_gives_everything_back(self, engine: Engine) -> None:
        long = self.long_request(engine)
        new = long.stop.max_new_tokens
        endless = replace(long, sampling=SamplingParams(grammar=Grammar("regex", f"[ab]{{{new}}}")))
        running = engine.submit(endless)
        engine.wait_tokens(running, 2)
        engine.cancel(endless.request_id)
        early = engine.submit(self.again(endless, sampling=SamplingParams(grammar=Grammar("regex", f"[cd]{{{new}}}"))))
        engine.cancel(early.request.request_id)
        engine.wait_ended(running, early, rule="cancel")
        for answer in (running, early):
            ending = answer.ending
            cancelled = isinstance(ending, Finished) and ending.reason == "cancelled"
            demand(cancelled, "cancel", f"a cancelled request with a grammar ended in {ending}")
        engine.wait_whole("cancel", "after the cancel of constrained requests")

    def _constrained(self, engine: Engine, kind: str, seed: int) -> Request:
        hot = self.declares("sampling") and self.declares("seed")
        sampling = SamplingParams(do_sample=hot, temperature=4.0 if hot else 1.0, seed=seed, grammar=GRAMMARS[kind][0])
        return self.request(self.prompt(engine, 8, seed), 64, sampling, stop=StopRules(64))

    def _check_answers(self, answers: list[Answer], kind: str) -> None:
        grammar, holds = GRAMMARS[kind]
        for answer in answers:
            ending = answer.ending
            ended = isinstance(ending, Finished) and ending.reason == "eos_token"
            demand(ended, "grammar", f"{grammar} is complete after a few tokens, but the answer ended in {ending}")
            text = self.text_of(answer.ids)
            demand(holds(text), "grammar", f"{grammar} was answered by {text!r}")
