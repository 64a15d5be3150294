"""EchoBackends with one defect each, and the contract over every one of them: `test_broken_backends` runs this file."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from queue import SimpleQueue
from typing import ClassVar

import pytest

from tgi_contract_tests import BackendContract
from tgi_contract_tests.engine import Engine
from tgi_contract_tests.groups.grammars import ANYTHING, BROKEN, GRAMMARS
from tgi_gateway.backend import Backend, Capabilities, Capacity, Emit, ModelInfo
from tgi_gateway.errors import GatewayError, ValidationError
from tgi_gateway.stepping import Row
from tgi_gateway.testing import EchoBackend, toy_model
from tgi_gateway.types import NO_LOGPROB, Failed, Finished, FinishReason, Grammar, Request, StepEvents, Token

MODEL = toy_model(vocab_size=1000, eos_token_ids=(2,), max_total_tokens=96, max_sequences=4)


class Sound(EchoBackend):
    """No defect: a place to put one. `spoil` sees each step before the gateway does."""

    through_http: ClassVar[bool] = False
    """Whether the HTTP surface is run too: its tests notice most defects, at the cost of a whole application each."""
    patience_s: ClassVar[float] = 4.0
    hangs = False

    def __init__(self) -> None:
        super().__init__(MODEL, health_timeout_s=0.5)

    async def _until_there_is_work(self) -> None:
        await super()._until_there_is_work()
        if self.hangs:
            await self._loop.create_future()

    def _step(self, events: StepEvents, now: float) -> None:
        time.sleep(0.0002)  # slow enough to be cancelled, and finer than the event loop's timer
        super()._step(events, now)

    async def start(self, emit: Emit) -> ModelInfo:
        return await super().start(lambda step: emit(self.spoil(step)))

    def spoil(self, step: StepEvents) -> StepEvents:
        return step


class EndsTwice(Sound):
    def spoil(self, step: StepEvents) -> StepEvents:
        step.finished.extend(list(step.finished))
        return step


class ForgetsTheEnd(Sound):
    """Does not look for the end at the first token, which comes from the prefill."""

    def spoil(self, step: StepEvents) -> StepEvents:
        step.finished[:] = [
            each for each in step.finished if each.reason != "length" or each.usage.generated_tokens > 1
        ]
        return step


class TokenAfterTheEnding(Sound):
    def __init__(self) -> None:
        super().__init__()
        self._ended_ids: list[int] = []

    def spoil(self, step: StepEvents) -> StepEvents:
        for request_id in self._ended_ids:
            step.request_ids.append(request_id)
            step.token_ids.append(5)
            step.logprobs.append(-1.0)
        self._ended_ids = [finished.request_id for finished in step.finished]
        return step


class EventsOfStrangers(Sound):
    def spoil(self, step: StepEvents) -> StepEvents:
        step.request_ids.append(0)
        step.token_ids.append(5)
        step.logprobs.append(-1.0)
        return step


class RaggedColumns(Sound):
    def spoil(self, step: StepEvents) -> StepEvents:
        step.top[len(step.request_ids)] = ((5, -1.0),)
        return step


class CountsOneTooMany(Sound):
    """Counts the step that found the end."""

    def spoil(self, step: StepEvents) -> StepEvents:
        step.finished[:] = [
            replace(each, usage=replace(each.usage, generated_tokens=each.usage.generated_tokens + 1))
            for each in step.finished
        ]
        return step


class SoundThroughHttp(Sound):
    through_http = True


class RefusesStopStrings(Sound):
    """They are the gateway's business: an engine takes them and looks at none."""

    through_http = True

    def _check(self, request: Request) -> None:
        super()._check(request)
        if request.stop.stop_strings:
            raise ValidationError("stop strings are not supported")


class ForgetsStopStrings(Sound):
    """Whoever names one waits for ever, which only the HTTP surface does."""

    through_http = True

    def submit(self, request: Request) -> None:
        if not request.stop.stop_strings:
            super().submit(request)


class LeaksOnCancel(Sound):
    through_http = True

    def _take_inbox(self, events: StepEvents) -> None:
        free = self._free_kv_tokens
        super()._take_inbox(events)
        self._free_kv_tokens = free


class CancelsLate(Sound):
    """Looks at its inbox once in sixteen steps."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0

    def _step(self, events: StepEvents, now: float) -> None:
        super()._step(events, now)
        self._steps += 1

    def _take_inbox(self, events: StepEvents) -> None:
        if not self._running or self._steps % 16 == 0:
            super()._take_inbox(events)


class FreesLate(Sound):
    """What a cancelled request held comes back sixteen steps later, or when nothing runs."""

    def __init__(self) -> None:
        super().__init__()
        self._owed: list[int] = []

    def _step(self, events: StepEvents, now: float) -> None:
        super()._step(events, now)
        self._owed = [left - 1 for left in self._owed if left > 1]

    def spoil(self, step: StepEvents) -> StepEvents:
        self._owed += [16 for each in step.finished if each.reason == "cancelled"]
        return step

    def capacity(self) -> Capacity:
        now = super().capacity()
        return replace(now, free_sequences=max(0, now.free_sequences - len(self._owed))) if self._running else now


class SendsFortyTokensAtATime(Sound):
    """Streams in name only."""

    def __init__(self) -> None:
        super().__init__()
        self._kept = StepEvents()

    async def start(self, emit: Emit) -> ModelInfo:
        def emit_rarely(step: StepEvents) -> None:
            kept = self._kept = StepEvents.pack([*self._kept.events(), *step.events()])
            if len(kept.request_ids) >= 40 or kept.finished or kept.failed:
                self._kept = StepEvents()
                emit(kept)

        return await EchoBackend.start(self, emit_rarely)


class SwapsTwoTokens(Sound):
    """As speculation does that emits its rows in the wrong order."""

    def expected_token(self, row: Row) -> int:
        swapped = {10: 11, 11: 10} if row.request.stop.max_new_tokens > 17 else {}
        at = swapped.get(len(row.output), len(row.output))
        return row.request.input_ids[at % len(row.request.input_ids)]


class LosesWhatASlowGatewayMisses(Sound):
    """Sends a step's tokens only to a gateway that took the ones before in time."""

    async def start(self, emit: Emit) -> ModelInfo:
        slow = 0

        def emit_in_time(step: StepEvents) -> None:
            nonlocal slow
            if slow >= 6 and not (step.finished or step.failed):
                slow = 0
                return
            began = time.monotonic()
            emit(step)
            slow = slow + 1 if time.monotonic() - began > 0.003 else 0

        return await EchoBackend.start(self, emit_in_time)


class RunsAhead(Sound):
    """Hands its steps to a thread that tells the gateway, however far that lags behind."""

    async def start(self, emit: Emit) -> ModelInfo:
        told: SimpleQueue[StepEvents] = SimpleQueue()

        def tell() -> None:
            while True:
                emit(told.get())

        threading.Thread(target=tell, daemon=True).start()
        return await EchoBackend.start(self, told.put)


class NewestFirst(Sound):
    def _admit(self) -> None:
        self._waiting = dict(reversed(self._waiting.items()))
        super()._admit()
        self._waiting = dict(reversed(self._waiting.items()))


class CancelledIsAnError(Sound):
    def spoil(self, step: StepEvents) -> StepEvents:
        for each in [each for each in step.finished if each.reason == "cancelled"]:
            step.finished.remove(each)
            step.failed.append(Failed(each.request_id, "generation", "cancelled"))
        return step


class IgnoresStopTokens(Sound):
    def _stop_reason(self, row: Row) -> FinishReason | None:
        reason = super()._stop_reason(row)
        return None if reason == "stop_sequence" else reason


class EndOfSequenceBeforeLength(Sound):
    def _stop_reason(self, row: Row) -> FinishReason | None:
        ends = row.output[-1] in self.model.eos_token_ids and not row.request.stop.ignore_eos
        return "eos_token" if ends else super()._stop_reason(row)


class EndsEarly(Sound):
    """Ends at end-of-sequence even when told to ignore it."""

    def _stop_reason(self, row: Row) -> FinishReason | None:
        return super()._stop_reason(row) or ("length" if row.output[-1] in self.model.eos_token_ids else None)


class IgnoresMinNewTokens(Sound):
    def next_token(self, row: Row) -> Token:
        request = row.request
        stop = replace(request.stop, min_new_tokens=0)
        return super().next_token(replace(row, request=replace(request, stop=stop)))


class DependsOnBatchMates(Sound):
    def expected_token(self, row: Row) -> int:
        return (super().expected_token(row) + len(self._running) - 1) % self.model.vocab_size


class IgnoresSeed(Sound):
    def next_token(self, row: Row) -> Token:
        request = row.request
        sampling = replace(request.sampling, seed=0)
        return super().next_token(replace(row, request=replace(request, sampling=sampling)))


class DrawsFromOneGenerator(Sound):
    """All requests share a random state, as torch's global generator would be."""

    def __init__(self) -> None:
        super().__init__()
        self._random = random.Random(0)

    def next_token(self, row: Row) -> Token:
        request = row.request
        sampling = replace(request.sampling, seed=self._random.getrandbits(32))
        return super().next_token(replace(row, request=replace(request, sampling=sampling)))


class PromisesTooMuchMemory(Sound):
    """Has three quarters of the pages it promised."""

    def _admit(self) -> None:
        super()._admit()
        for request_id, row in list(self._running.items()):
            if self._free_kv_tokens < self.model.max_batch_total_tokens // 4 and not row.output:
                self._remove(request_id)
                self._fail([request_id], GatewayError("out of memory"))


class DropsOnOverload(Sound):
    def _admit(self) -> None:
        super()._admit()
        while len(self._waiting) > 12:
            self._waiting.popitem()


class TruncatesLongPrompts(Sound):
    def submit(self, request: Request) -> None:
        super().submit(replace(request, input_ids=request.input_ids[: self.model.max_input_tokens]))


class IgnoresWhatItLacks(Sound):
    """Declares little, accepts everything."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(self._capabilities, features=self._capabilities.features - {"prefill_logprobs", "top_k"})


class BadRequestsFailTheBatch(Sound):
    def spoil(self, step: StepEvents) -> StepEvents:
        if step.failed:
            for request_id in list(self._running):
                self._remove(request_id)
                step.failed.append(Failed(request_id, "generation", "the batch failed"))
        return step


class RaisesFromSubmit(Sound):
    def submit(self, request: Request) -> None:
        if not request.input_ids:
            raise ValueError("empty prompt")
        super().submit(request)


class SubmitWaitsForTheStep(Sound):
    patience_s = 1.0

    def __init__(self) -> None:
        super().__init__()
        self._taken = threading.Event()

    def submit(self, request: Request) -> None:
        self._taken.clear()
        super().submit(request)
        if not self._ended:
            self._taken.wait(1.5)

    def _take_inbox(self, events: StepEvents) -> None:
        super()._take_inbox(events)
        self._taken.set()


class AlwaysHealthy(Sound):
    async def health(self) -> None:
        return


class HealthGeneratesAloud(Sound):
    async def health(self) -> None:
        await super().health()
        self._emit(StepEvents([2**64 - 1], [5], [-1.0]))


class StopsWithoutDraining(Sound):
    async def stop(self, drain_s: float) -> None:  # noqa: ARG002
        await super().stop(0.0)


class StopsWithoutAWord(Sound):
    def _fail(self, request_ids: list[int], error: GatewayError) -> None:
        pass


class StopsOnce(Sound):
    async def stop(self, drain_s: float) -> None:
        assert not self._ended, "already stopped"
        await super().stop(drain_s)


class CapacityIsAlwaysWhole(Sound):
    def capacity(self) -> Capacity:
        model = self.model
        return Capacity(
            model.max_sequences, model.max_sequences, model.max_batch_total_tokens, model.max_batch_total_tokens
        )


class CapacityCountsTheQueue(Sound):
    """Below zero when more wait than fit."""

    def capacity(self) -> Capacity:
        now = super().capacity()
        return replace(now, free_sequences=now.free_sequences - len(self._waiting))


class NanLogprobs(Sound):
    def next_token(self, row: Row) -> Token:
        return replace(super().next_token(row), logprob=NO_LOGPROB)


class TopAfterTemperature(Sound):
    """`top` of the distribution that it drew from."""

    def next_token(self, row: Row) -> Token:
        token, sampling = super().next_token(row), row.request.sampling
        heat = sampling.temperature if sampling.do_sample else 1.0
        return replace(token, top=tuple((token_id, logprob / heat) for token_id, logprob in token.top))


class TopIsUnsorted(Sound):
    def next_token(self, row: Row) -> Token:
        token = super().next_token(row)
        return replace(token, top=token.top[::-1])


class LogprobsAfterTemperature(Sound):
    """Those of the distribution it drew from, not of the model's own."""

    def next_token(self, row: Row) -> Token:
        token = super().next_token(row)
        return replace(token, logprob=0.0)


class PromptLogprobsWithoutTheFirst(Sound):
    def prompt_logprobs(self, row: Row) -> tuple[float, ...]:
        return super().prompt_logprobs(row)[1:]


class PromptTopIsOneLate(Sound):
    """Those of the token after."""

    def prompt_top(self, row: Row) -> tuple[tuple[tuple[int, float], ...], ...]:
        first, *others = super().prompt_top(row)
        return (first, *others[1:], *others[:1])


class StepsOverlap(Sound):
    """Emits from a new thread each time, without waiting for the one before."""

    def _step(self, events: StepEvents, now: float) -> None:
        super()._step(events, now)
        copy = StepEvents(list(events.request_ids), list(events.token_ids), list(events.logprobs), dict(events.top))
        if copy:
            events.request_ids.clear()
            events.token_ids.clear()
            events.logprobs.clear()
            events.top.clear()
            threading.Thread(target=self._emit, args=(copy,), daemon=True).start()
            time.sleep(0.001)


class LeavesAThreadBehind(Sound):
    async def start(self, emit: Emit) -> ModelInfo:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return await super().start(emit)


class MakesUpCachedTokens(Sound):
    def spoil(self, step: StepEvents) -> StepEvents:
        step.finished[:] = [replace(each, usage=replace(each.usage, cached_tokens=1)) for each in step.finished]
        return step


class CachesPrefixes(Sound):
    """No defect: it remembers the prompts that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self._capabilities = replace(self._capabilities, prefix_cache=True)
        self._seen: list[tuple[str, Sequence[int]]] = []

    def found(self, request: Request) -> int:
        """How many tokens of its prompt are cached."""
        prompts = (prompt for key, prompt in self._seen if key == self.key(request))
        mine = request.input_ids[:-1]
        same = (takewhile(lambda pair: pair[0] == pair[1], zip(prompt, mine, strict=False)) for prompt in prompts)
        return max((len(list(each)) for each in same), default=0)

    def key(self, request: Request) -> str:
        return request.cache_salt

    def _finished(self, row: Row, reason: FinishReason) -> Finished:
        cached = self.found(row.request)
        self._seen.append((self.key(row.request), row.request.input_ids))
        finished = super()._finished(row, reason)
        return replace(finished, usage=replace(finished.usage, cached_tokens=cached))


class SharesPrefixesOfAllSalts(CachesPrefixes):
    def key(self, request: Request) -> str:  # noqa: ARG002
        return ""


class SaysNothingOfItsCache(CachesPrefixes):
    def found(self, request: Request) -> int:  # noqa: ARG002
        return 0


class UsesWholePagesOfPrefix(CachesPrefixes):
    """Of pages of 16 tokens it compares the first one."""

    def found(self, request: Request) -> int:
        return min(-(-super().found(request) // 16) * 16, len(request.input_ids) - 1)


class WarmPrefixIsOffByOne(CachesPrefixes):
    def expected_token(self, row: Row) -> int:
        return (super().expected_token(row) + (self.found(row.request) > 16)) % self.model.vocab_size


ADAPTER = "contract"


class KnowsAnAdapter(CachesPrefixes):
    """No defect: with the adapter, each token is the one after."""

    def __init__(self) -> None:
        super().__init__()
        self._capabilities = replace(self._capabilities, features=self._capabilities.features | {"lora"})

    def _check(self, request: Request) -> None:
        super()._check(request)
        if request.adapter_id not in (None, ADAPTER):
            raise ValidationError(f"there is no adapter {request.adapter_id}")

    def expected_token(self, row: Row) -> int:
        return (super().expected_token(row) + self.shift(row)) % self.model.vocab_size

    def shift(self, row: Row) -> int:
        return int(row.request.adapter_id is not None)

    def key(self, request: Request) -> str:
        return f"{request.adapter_id} {request.cache_salt}"


class IgnoresTheAdapter(KnowsAnAdapter):
    def shift(self, row: Row) -> int:  # noqa: ARG002
        return 0


class AdaptsTheWholeBatch(KnowsAnAdapter):
    def shift(self, row: Row) -> int:  # noqa: ARG002
        return int(any(each.request.adapter_id is not None for each in self._running.values()))


class UnknownAdapterIsTheModel(KnowsAnAdapter):
    def _check(self, request: Request) -> None:
        CachesPrefixes._check(self, request)

    def shift(self, row: Row) -> int:
        return int(row.request.adapter_id == ADAPTER)


class AdapterSharesPrefixes(KnowsAnAdapter):
    def key(self, request: Request) -> str:
        return request.cache_salt


class ModelInfoContradictsItself(Sound):
    async def start(self, emit: Emit) -> ModelInfo:
        return replace(await super().start(emit), max_input_tokens=self.model.max_total_tokens)


SPECIAL = 3
KNOWN = [grammar for grammar, _ in GRAMMARS.values()]


class KnowsGrammars(Sound):
    """No defect: it has an answer for every grammar of the contract."""

    ANSWERS: ClassVar = {
        "json": '{"ok": true, "n": 7}',
        "json_schema": '{"n":0,"ok":false}',
        "regex": "abc-12",
        "choice": "left",
        "lark": "xyx",
    }

    def __init__(self) -> None:
        super().__init__()
        self._capabilities = replace(self._capabilities, features=self._capabilities.features | {"grammar"})

    def _check(self, request: Request) -> None:
        super()._check(request)
        if request.sampling.grammar in BROKEN:
            raise ValidationError("grammar is not valid")

    def next_token(self, row: Row) -> Token:
        grammar = row.request.sampling.grammar
        if grammar is None:
            return super().next_token(row)
        answer = self.answer(grammar)
        at = len(row.output)
        return Token(row.request.request_id, ord(answer[at]) if at < len(answer) else 2, -0.5)

    def answer(self, grammar: Grammar) -> str:
        return self.ANSWERS[grammar.kind] if grammar in KNOWN else "a" * self.model.max_total_tokens


class IgnoresGrammars(KnowsGrammars):
    def next_token(self, row: Row) -> Token:
        return Sound.next_token(self, row)


class StopsOneTokenEarly(KnowsGrammars):
    def answer(self, grammar: Grammar) -> str:
        return super().answer(grammar)[:-1]


class WritesSpecialTokens(KnowsGrammars):
    """Where the grammar leaves the text free, it takes a special token's text for one."""

    def next_token(self, row: Row) -> Token:
        token = super().next_token(row)
        return replace(token, token_id=SPECIAL) if row.request.sampling.grammar in ANYTHING.values() else token


class GeneratesBeforeItCompiles(KnowsGrammars):
    """Finds out in the middle of the answer that the grammar is broken."""

    def _check(self, request: Request) -> None:
        Sound._check(self, request)

    def next_token(self, row: Row) -> Token:
        if row.request.sampling.grammar in BROKEN and row.output:
            raise ValidationError("grammar is not valid")
        return super().next_token(row)


class BadGrammarsFailTheBatch(KnowsGrammars):
    def spoil(self, step: StepEvents) -> StepEvents:
        if any(failed.message == "grammar is not valid" for failed in step.failed):
            for request_id in list(self._running):
                self._remove(request_id)
                step.failed.append(Failed(request_id, "generation", "the batch failed"))
        return step


class _Contract(BackendContract):
    """The contract over the class that `defect` names."""

    end_prompt = (5, 6, 2, 7)
    adapter = (ADAPTER, Path("none"))
    defect: ClassVar[type[Sound]] = Sound

    def make(self) -> Backend:
        return self.defect()

    def text_of(self, token_ids: Iterable[int]) -> str:
        return "".join(chr(token) for token in token_ids if token != 2)

    def special_ids(self) -> Sequence[int]:
        return (2, SPECIAL)

    def tokenizer_files(self, engine: Engine, folder: Path) -> Path:
        if not self.defect.through_http:
            pytest.skip("the defect does not show there")
        return super().tokenizer_files(engine, folder)

    def hang(self, backend: Backend) -> None:
        assert isinstance(backend, Sound)
        backend.hangs = True

    def kill(self, backend: Backend) -> None:
        assert isinstance(backend, EchoBackend)
        backend._inbox.append("not an item")  # type: ignore[arg-type]


DEFECTS = [each for each in list(globals().values()) if isinstance(each, type) and issubclass(each, Sound)]
for _defect in DEFECTS:
    _settings = {"defect": _defect, "patience_s": _defect.patience_s}
    globals()[f"Test{_defect.__name__}"] = type(f"Test{_defect.__name__}", (_Contract,), _settings)
