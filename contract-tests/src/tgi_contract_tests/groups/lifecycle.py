"""Start, health, stop, and what importing the plug-in may load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tgi_contract_tests.base import ContractBase, close
from tgi_contract_tests.engine import Engine
from tgi_contract_tests.rules import broken, demand
from tgi_gateway import hub
from tgi_gateway.backend import ALL_FEATURES
from tgi_gateway.errors import ModelError, StartError
from tgi_gateway.settings import Settings
from tgi_gateway.types import Failed


class Lifecycle(ContractBase):
    def test_model_info_is_sane(self, engine: Engine) -> None:
        model = engine.model
        checks = {
            "max_input_tokens is at least 1": model.max_input_tokens >= 1,
            "max_total_tokens exceeds max_input_tokens": model.max_total_tokens > model.max_input_tokens,
            "max_batch_total_tokens holds at least one request": model.max_batch_total_tokens >= model.max_total_tokens,
            "max_batch_prefill_tokens is at least 1": model.max_batch_prefill_tokens >= 1,
            "max_sequences is at least 1": model.max_sequences >= 1,
            "vocab_size is at least 2": model.vocab_size >= 2,
            "eos_token_ids lie in the vocabulary": all(0 <= eos < model.vocab_size for eos in model.eos_token_ids),
            "model_id is set": bool(model.model_id),
        }
        failed = [rule for rule, kept in checks.items() if not kept]
        demand(not failed, "lifecycle", f"not true: {'; '.join(failed)}, in {model}")

    def test_capabilities_are_known_words_and_do_not_change(self, engine: Engine) -> None:
        capabilities = engine.backend.capabilities
        unknown = capabilities.features - ALL_FEATURES
        demand(not unknown, "lifecycle", f"Capabilities names features that do not exist: {sorted(unknown)}")
        demand(capabilities.tolerance >= 0, "lifecycle", f"tolerance is {capabilities.tolerance}")
        before = self.make().capabilities
        demand(before == capabilities, "lifecycle", f"{before} before start, {capabilities} after")

    def test_stop_may_be_called_twice(self, own_engine: Engine) -> None:
        own_engine.run_one(self.request(self.prompt(own_engine)))
        own_engine.stop()
        own_engine.stop()

    def test_an_engine_that_was_stopped_leaves_room_for_the_next(self, own_engine: Engine) -> None:
        request = self.request(self.prompt(own_engine))
        first = own_engine.run_one(request)
        own_engine.stop()
        second = Engine(self.make(), self.patience_s)
        second.start()
        try:
            self.check_same(first, second.run_one(self.again(request)), "lifecycle", "before and after a restart")
        finally:
            close(second)

    def test_a_missing_model_is_a_start_error(self, tmp_path: Path) -> None:
        plugin = self.plugin()
        if not plugin.needs_model:
            pytest.skip("the plug-in needs no model")
        options = replace(self.engine_options(), model_path=tmp_path / "nothing")
        try:
            engine = Engine(plugin.create(options), self.patience_s)
            engine.start()
        except StartError:
            return
        close(engine)
        broken("lifecycle", "the engine started on a model folder that does not exist")

    def test_the_server_takes_the_model(self) -> None:
        """The gateway looks at the model's folder before any engine does, and reads its tokenizer."""
        plugin, model = self.plugin(), self.model
        if model is None:
            pytest.skip("the class under test names no model: set `model`")
        try:
            settings = Settings(model_id=str(model), load_format=self.engine_options().load_format)
            hub.resolve(settings, needs=hub.Needs.of(plugin, self.engine_options().extra))
            if self.tokenizer_folder() is None:
                raise ModelError(f"{model} has no tokenizer.json, and `prepare` makes none")
        except ModelError as error:
            broken("lifecycle", f"`tgi-gateway --backend {plugin.name} --model-id {model}` would end with: {error}")

    def test_stop_lets_open_requests_finish(self, own_engine: Engine) -> None:
        requests = [
            self.request(self.prompt(own_engine, seed=seed)) for seed in range(own_engine.model.max_sequences + 2)
        ]
        answers = [own_engine.submit(request) for request in requests]
        own_engine.stop(self.patience_s)
        for answer in answers:
            demand(answer.ended, "drain", f"request {answer.request.request_id} never ended")
            self.check_served(answer, "drain")

    def test_stop_fails_what_it_does_not_wait_for(self, own_engine: Engine) -> None:
        answers = [
            own_engine.submit(self.long_request(own_engine, seed)) for seed in range(own_engine.model.max_sequences + 2)
        ]
        own_engine.wait_tokens(answers[0], 1)
        own_engine.stop(0.0)
        own_engine.wait_ended(*answers, rule="drain")

    def test_a_request_after_stop_fails(self, own_engine: Engine) -> None:
        request = self.request(self.prompt(own_engine))
        own_engine.stop()
        answer = own_engine.submit(request)
        own_engine.wait_ended(answer, rule="drain")
        demand(isinstance(answer.ending, Failed), "drain", f"a request after `stop` ended in {answer.ending}")

    def test_a_stopped_engine_still_tells_its_capacity(self, own_engine: Engine) -> None:
        """The host asks for it while it tells the HTTP workers what has ended."""
        own_engine.stop()
        own_engine.capacity()


class Health(ContractBase):
    def test_health_is_ok_when_idle_and_when_busy(self, engine: Engine) -> None:
        demand(engine.healthy(), "health", "an idle engine says that it is unhealthy")
        answer = engine.submit(self.long_request(engine))
        engine.wait_tokens(answer, 1)
        demand(engine.healthy(), "health", "a busy engine says that it is unhealthy")
        engine.cancel(answer.request.request_id)
        engine.wait_ended(answer)

    def test_health_emits_nothing(self, engine: Engine) -> None:
        steps = len(engine.steps)
        engine.healthy()
        demand(len(engine.steps) == steps, "health", f"`health` of an idle engine emitted {engine.steps[steps:]}")

    def test_health_is_unhealthy_after_stop(self, own_engine: Engine) -> None:
        own_engine.stop()
        demand(not own_engine.healthy(), "health", "`health` returned after `stop`")

    def test_a_dead_engine_is_unhealthy_and_fails_its_requests(self, own_engine: Engine) -> None:
        answer = own_engine.submit(self.long_request(own_engine))
        own_engine.wait_tokens(answer, 1)
        self.kill(own_engine.backend)
        own_engine.wait_ended(answer, rule="health")
        demand(isinstance(answer.ending, Failed), "health", f"a request of a dead engine ended in {answer.ending}")
        demand(not own_engine.healthy(), "health", "`health` returned after the engine had died")

    def test_an_engine_that_hangs_is_unhealthy(self, own_engine: Engine) -> None:
        """Health means that the engine can generate, not that a process is there."""
        demand(own_engine.healthy(), "health", "an idle engine says that it is unhealthy")
        self.hang(own_engine.backend)
        demand(not own_engine.healthy(), "health", "`health` returned while the engine could make no step")
