"""What every group of backend tests shares: how the backend is made, and requests that fit it."""

from __future__ import annotations

import itertools
import math
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tgi_contract_tests.engine import Answer, Engine
from tgi_contract_tests.known import KnownFailures
from tgi_contract_tests.rules import Rule, broken, demand
from tgi_gateway import plugins
from tgi_gateway.backend import Backend, BackendPlugin, Capabilities, EngineOptions, Feature, ModelFiles
from tgi_gateway.errors import PluginError, StartError
from tgi_gateway.prompt.chat_template import ChatTemplate
from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_gateway.testing import worker
from tgi_gateway.types import Request, SamplingParams, StopRules

_ids = itertools.count(1)
_engines: dict[type, Engine] = {}
"""The running engine of the class under test: starting one may take a minute, so that tests share it."""
_prepared: dict[type, tuple[tempfile.TemporaryDirectory[str], ModelFiles]] = {}
"""What a plug-in made of the model of the class under test, and the folder that it lies in."""
IN_A_CLASS = "in a test class of your own: docs/write-a-backend.md, section 4"


class ContractBase(KnownFailures):
    """Set `backend` to the name of an installed plug-in, or override `make`."""

    backend: ClassVar[str | None] = None
    """Name of the plug-in, as in ``--backend NAME``."""
    model: ClassVar[Path | None] = None
    """Folder (or file) of the model."""
    model_id: ClassVar[str] = "contract"
    options: ClassVar[Mapping[str, Any]] = {}
    """Fields of EngineOptions, over the small sizes that the contract asks for."""
    patience_s: ClassVar[float] = 60.0
    """How long an engine may make no progress, start-up included, before the test fails."""
    tokens_after_cancel: ClassVar[int] = 4
    """Steps that may be under way when a cancel arrives."""
    adapter: ClassVar[tuple[str, Path] | None] = None
    """Name and folder (or file) of a LoRA adapter of the model, for engines that declare `lora`."""
    end_prompt: ClassVar[tuple[int, ...] | None] = None
    """A prompt that the model answers with end-of-sequence within 32 tokens; found by trial if None."""

    def make(self) -> Backend:
        """A new backend, not started."""
        return self.plugin().create(self.engine_options())

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of generated tokens, by the model's tokenizer. Override for a model without one."""
        folder = self.tokenizer_folder()
        if folder is None:
            pytest.skip(f"the model has no tokenizer.json: override `text_of` {IN_A_CLASS}")
        return Tokenizer.from_folder(folder).decode(list(token_ids))

    def special_ids(self) -> Sequence[int]:
        """Token ids that are no text, by the model's tokenizer. Override for a model without one."""
        folder = self.tokenizer_folder()
        return () if folder is None else sorted(Tokenizer.from_folder(folder).special_texts)

    def tokenizer_folder(self) -> Path | None:
        """Where the model's tokenizer.json lies: in its folder, or where the plug-in's `prepare` writes it."""
        if self.model is None:
            return None
        if (self.model / "tokenizer.json").is_file():
            return self.model
        prepared = self.prepared()
        return None if prepared is None else prepared.tokenizer

    def prepared(self) -> ModelFiles | None:
        """What the plug-in's `prepare` makes of the model, as the server would have it made. Raises `StartError`."""
        prepare = None if self.backend is None or self.model is None else self.plugin().prepare
        if prepare is None:
            return None
        if type(self) not in _prepared:
            folder = tempfile.TemporaryDirectory(prefix="tgi-contract-")
            _prepared[type(self)] = folder, prepare(self._named_options(), Path(folder.name))
        return _prepared[type(self)][1]

    def tokenizer_files(self, engine: Engine, folder: Path) -> Path:
        """A folder for the HTTP surface with tokenizer and chat template: the model's own, as far as it has them.

        What it lacks is made in `folder`: one token per byte, so that any engine understands it.
        """
        own = self.tokenizer_folder()
        if own is not None and ChatTemplate.from_folder(own) is not None:
            return own
        if own is None and engine.model.vocab_size < worker.VOCAB_SIZE:
            pytest.skip(f"the model has no tokenizer.json, and a vocabulary of less than {worker.VOCAB_SIZE}")
        worker.write_byte_model(folder)
        if own is not None:
            shutil.copy(own / "tokenizer.json", folder)
        return folder

    def kill(self, backend: Backend) -> None:  # noqa: ARG002
        """Override to make a running engine die as it would on a device error."""
        pytest.skip(f"nothing says how to kill the engine: override `kill` {IN_A_CLASS}")

    def hang(self, backend: Backend) -> None:  # noqa: ARG002
        """Override to make a running engine hang in its next step, as it would on a device that does not answer.

        The thread that hangs must be a daemon, as that of a SteppingBackend is: Python waits for others when it ends.
        """
        pytest.skip(f"nothing says how to make the engine hang: override `hang` {IN_A_CLASS}")

    def plugin(self) -> BackendPlugin:
        if self.backend is None:
            pytest.skip("the class under test names no installed plug-in: set `backend`")
        try:
            plugin = plugins.load(self.backend)
        except PluginError as error:
            broken("lifecycle", f"the plug-in cannot be loaded: {error}")
        if (missing := plugin.missing()) is not None:
            pytest.skip(f"this machine cannot run `{self.backend}`: {missing}")
        return plugin

    def engine_options(self) -> EngineOptions:
        """Small limits, so that tests can reach them, on the model's files as the server gives them to the engine."""
        options, prepared = self._named_options(), self.prepared()
        if prepared is None:
            return options
        return replace(options, model_path=prepared.model, tokenizer_path=prepared.tokenizer)

    def _named_options(self) -> EngineOptions:
        """The same on the model as it was named."""
        sizes: dict[str, Any] = {"max_total_tokens": 256, "max_batch_size": 4, "max_batch_total_tokens": 1024}
        if self.adapter is not None:
            sizes["lora_adapters"] = (f"{self.adapter[0]}={self.adapter[1]}",)
        sizes |= self.options
        model = self.model if self.model is not None else Path()
        return EngineOptions(model_path=model, model_id=self.model_id, **sizes)

    # Engines.

    @pytest.fixture
    def engine(self) -> Engine:
        """The shared engine, running and idle; a new one if an earlier test left it otherwise."""
        engine = _engines.get(type(self))
        if engine is None or not engine.is_clean:
            if engine is not None:
                del _engines[type(self)]
                close(engine)
            engine = self._started()
            _engines[type(self)] = engine
        return engine

    @pytest.fixture
    def own_engine(self) -> Iterator[Engine]:
        """A running engine for a test that stops or breaks it."""
        engine = self._started()
        yield engine
        close(engine)

    def _started(self) -> Engine:
        try:
            engine = Engine(self.make(), self.patience_s)
        except StartError as error:
            broken("lifecycle", f"the engine does not start: {error}")
        try:
            engine.start()
        except StartError as error:
            close(engine)
            broken("lifecycle", f"the engine does not start: {error}")
        except BaseException:
            close(engine)
            raise
        return engine

    @pytest.fixture(autouse=True)
    def _declared_features_only(self, request: pytest.FixtureRequest) -> None:
        marker = request.node.get_closest_marker("needs")
        if marker is None:
            return
        capabilities = self.capabilities()
        for need in marker.args:
            if need in ("batching", "prefix_cache"):
                declared = bool(getattr(capabilities, need))
            else:
                declared = need in capabilities.features
            if not declared:
                pytest.skip(f"not declared: `{need}`")

    def capabilities(self) -> Capabilities:
        engine = _engines.get(type(self))
        return (engine.backend if engine is not None else self.make()).capabilities

    def declares(self, feature: Feature) -> bool:
        return feature in self.capabilities().features

    # Requests.

    def prompt(self, engine: Engine, length: int = 8, seed: int = 0) -> tuple[int, ...]:
        """Tokens of the vocabulary, none of which ends a sequence."""
        model = engine.model
        choices = random.Random(f"{seed} {length}")
        tokens = (choices.randrange(model.vocab_size) for _ in itertools.count())
        return tuple(itertools.islice((token for token in tokens if token not in model.eos_token_ids), length))

    def request(
        self,
        prompt: tuple[int, ...],
        max_new_tokens: int = 8,
        sampling: SamplingParams | None = None,
        **changes: Any,
    ) -> Request:
        """A greedy request of fixed length, as far as the engine can ignore end-of-sequence."""
        stop = StopRules(max_new_tokens, ignore_eos=self.declares("ignore_eos"))
        sampling = sampling or SamplingParams()
        logprobs = self.declares("logprobs")
        return replace(Request(next(_ids), prompt, sampling, stop, logprobs=logprobs), **changes)

    def again(self, request: Request, **changes: Any) -> Request:
        """The same request under a new id."""
        return replace(request, request_id=next(_ids), **changes)

    def long_request(self, engine: Engine, seed: int = 0) -> Request:
        """As many tokens as the engine allows: enough to be cancelled half-way."""
        prompt = self.prompt(engine, 8, seed)
        return self.request(prompt, engine.model.max_total_tokens - len(prompt))

    def together(self, engine: Engine, *requests: Request) -> list[Answer]:
        """All requests as one: they come in while the engine waits for the gateway to take a step's events."""
        running = engine.submit(self.long_request(engine, 999))
        engine.wait_tokens(running, 1)
        with engine.held_emit(running):
            engine.cancel(running.request.request_id)
            answers = [engine.submit(request) for request in requests]
        engine.wait_ended(running)
        return answers

    def check_served(self, answer: Answer, rule: Rule) -> None:
        """It finished by its own rules, whole."""
        ending, wanted = answer.ending, answer.request.stop.max_new_tokens
        whole = ending.__class__.__name__ == "Finished" and (
            len(answer.tokens) == wanted or getattr(ending, "reason", "") == "eos_token"
        )
        demand(
            whole,
            rule,
            f"request {answer.request.request_id} of {len(answer.request.input_ids)} + {wanted} tokens "
            f"got {len(answer.tokens)} tokens and ended in {ending}",
        )

    def check_same(self, one: Answer, other: Answer, rule: Rule, what: str) -> None:
        """Same tokens; within `Capabilities.tolerance`, once the engine says that it is not batch-invariant.

        Then a draw may fall on the other side of a border that has moved, whatever the two tokens' probabilities are.
        """
        capabilities = self.capabilities()
        allowed = capabilities.tolerance
        for at, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)):
            gap = abs(a.logprob - b.logprob)
            comparable = not (math.isnan(a.logprob) or math.isnan(b.logprob))
            if a.token_id != b.token_id:
                drawn = one.request.sampling.do_sample
                excused = not capabilities.batch_invariant and (drawn or not comparable or gap <= allowed)
                demand(excused, rule, f"{what}: token {at} is {a.token_id} once and {b.token_id} the other time")
                return  # from here on they answer different texts
            demand(
                not comparable or gap <= allowed,
                rule,
                f"{what}: the log-probability of token {at} differs by {gap:.3g}; declared tolerance is {allowed:g}",
            )
        demand(
            len(one.tokens) == len(other.tokens),
            rule,
            f"{what}: {len(one.tokens)} tokens once, {len(other.tokens)} the other time",
        )


def close(engine: Engine) -> None:
    """Stop and end it, whatever state a test left it in."""
    # A backend that cannot stop is reported by the tests of `stop`; here the next test must be able to go on.
    with suppress(Exception, pytest.fail.Exception):
        engine.stop(0.0)
        engine.close()


def close_all() -> None:
    """At the end of the run."""
    while _engines:
        close(_engines.popitem()[1])
    while _prepared:
        _prepared.popitem()[1][0].cleanup()
