"""ScriptedBackend: answers that were written down beforehand, with their delays and failures.

A script file is JSON::

    {"eos_token_ids": [2], "features": ["sampling", "seed"], "scripts": [
      {"prompt": [5, 6], "tokens": [7, {"id": 8, "logprob": -0.1, "top": [[8, -0.1], [9, -2.5]], "delay_s": 0.5}]},
      {"tokens": [7, 7], "then": "fail"}
    ]}

A request gets the first script whose `prompt` occurs in its own, in one piece; one without `prompt` fits every request.
What comes after the last token says `then`: "end" (end-of-sequence tokens, the default), "repeat" (from the first
token again), "fail" (this request fails), "hang" (the engine makes no further step), "crash" (the engine dies).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from tgi_gateway.backend import Capabilities, Feature, ModelInfo
from tgi_gateway.errors import BackendFailed, ValidationError
from tgi_gateway.stepping import HEALTH_TIMEOUT_S, Row
from tgi_gateway.testing import distribution
from tgi_gateway.testing.echo import EchoBackend, toy_model
from tgi_gateway.types import NO_LOGPROB, Request, Token

SCRIPTED_CAPABILITIES = Capabilities(
    features=frozenset({"logprobs", "top_n_tokens", "ignore_eos", "stop_token_ids"}),
    max_top_n_tokens=20,
)
After = Literal["end", "repeat", "fail", "hang", "crash"]


@dataclass(frozen=True, slots=True)
class ScriptedToken:
    """One token of an answer. Log-probabilities that are not given come from `distribution`."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    delay_s: float = 0.0
    """Seconds between the token before, or the first step, and this one. Other requests go on meanwhile."""


@dataclass(frozen=True, slots=True)
class Script:
    """The answer to the requests whose prompt contains `prompt`."""

    tokens: tuple[ScriptedToken, ...]
    prompt: tuple[int, ...] = ()
    then: After = "end"

    @staticmethod
    def of(*token_ids: int, prompt: SequenceOf[int] = (), then: After = "end") -> Script:
        """A script of plain tokens."""
        return Script(tuple(ScriptedToken(token_id) for token_id in token_ids), tuple(prompt), then)

    def fits(self, prompt: SequenceOf[int]) -> bool:
        n = len(self.prompt)
        return any(tuple(prompt[at : at + n]) == self.prompt for at in range(len(prompt) - n + 1))


@dataclass(frozen=True, slots=True)
class ScriptFile:
    """What a file says; None and () leave the model and the capabilities as they are."""

    scripts: tuple[Script, ...]
    eos_token_ids: tuple[int, ...] | None = None
    features: frozenset[Feature] = frozenset()


class EngineCrashed(Exception):
    """A script asked for it."""


class ScriptedBackend(EchoBackend):
    """Sampling parameters change nothing: who declares `sampling` and the like vouches for what the scripts say."""

    def __init__(
        self,
        scripts: SequenceOf[Script],
        model: ModelInfo | None = None,
        *,
        step_s: float = 0.0,
        capabilities: Capabilities = SCRIPTED_CAPABILITIES,
        health_timeout_s: float = HEALTH_TIMEOUT_S,
    ) -> None:
        model = model or toy_model(model_id="scripted", eos_token_ids=(0,))
        super().__init__(model, step_s=step_s, capabilities=capabilities, health_timeout_s=health_timeout_s)
        self._scripts = tuple(scripts)
        self._find = lru_cache(maxsize=1024)(self._first_that_fits)
        self._hangs = False

    def expected_token(self, row: Row) -> int:
        """The script's token; see the first page for what follows the last one."""
        script, at = self._script(row), len(row.output)
        if at < len(script.tokens):
            return script.tokens[at].token_id
        match script.then:
            case "fail":
                raise BackendFailed("the script ends in a failure")
            case "crash":
                raise EngineCrashed("the script ends in a crash")
            case "end" if self.model.eos_token_ids:
                return self.model.eos_token_ids[0]
        return script.tokens[at % len(script.tokens)].token_id

    def next_token(self, row: Row) -> Token:
        request, vocab_size = row.request, self.model.vocab_size
        token_id = self.expected_token(row)
        scripted = self._scripted_token(row)
        logprob = distribution.logprob(token_id, token_id, vocab_size)
        top = distribution.most_likely(token_id, request.top_n_tokens, vocab_size)
        if scripted is not None:
            logprob = logprob if scripted.logprob is None else scripted.logprob
            top = scripted.top[: request.top_n_tokens] or top
        return Token(request.request_id, token_id, logprob if request.logprobs else NO_LOGPROB, top)

    def delay_s(self, row: Row) -> float:
        if len(row.output) >= len(self._script(row).tokens) and self._script(row).then == "hang":
            self._hangs = True
        scripted = self._scripted_token(row)
        return 0.0 if scripted is None else scripted.delay_s

    def _script(self, row: Row) -> Script:
        script = self._find(row.request.input_ids)
        assert script is not None, "_check comes first"
        return script

    def _scripted_token(self, row: Row) -> ScriptedToken | None:
        """None after the script's last token."""
        tokens, at = self._script(row).tokens, len(row.output)
        if at < len(tokens):
            return tokens[at]
        return tokens[at % len(tokens)] if self._script(row).then == "repeat" else None

    def _first_that_fits(self, prompt: tuple[int, ...]) -> Script | None:
        return next((script for script in self._scripts if script.fits(prompt)), None)

    def _check(self, request: Request) -> None:
        super()._check(request)
        if self._find(request.input_ids) is None:
            raise ValidationError("no script fits this prompt; one without `prompt` would fit every request")

    async def _until_there_is_work(self) -> None:
        if self._hangs:
            await self._loop.create_future()  # for ever, or until `stop` cancels the task
        await super()._until_there_is_work()
