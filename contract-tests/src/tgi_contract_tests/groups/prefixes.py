"""A warm prefix cache changes no token, says what it found, and keeps apart what does not belong together."""

from __future__ import annotations

import pytest

from tgi_contract_tests.base import ContractBase
from tgi_contract_tests.engine import Engine
from tgi_contract_tests.rules import demand


class Prefixes(ContractBase):
    @pytest.mark.needs("prefix_cache")
    def test_a_warm_prefix_gives_the_same_tokens(self, engine: Engine) -> None:
        prompt = self.prompt(engine, engine.model.max_input_tokens * 3 // 4, seed=77)
        request = self.request(prompt, cache_salt="warm")
        cold, warm = engine.run_one(request), engine.run_one(self.again(request))
        self.check_same(cold, warm, "prefix-cache", "cold and warm")
        found = (cold.finished.usage.cached_tokens, warm.finished.usage.cached_tokens)
        demand(found[0] == 0 < found[1], "prefix-cache", f"cached_tokens is {found[0]} cold and {found[1]} warm")

    @pytest.mark.needs("prefix_cache")
    def test_salts_do_not_share_prefixes(self, engine: Engine) -> None:
        prompt = self.prompt(engine, engine.model.max_input_tokens * 3 // 4, seed=78)
        request = self.request(prompt, cache_salt="one")
        engine.run_one(request)
        other = engine.run_one(self.again(request, cache_salt="other"))
        demand(other.finished.usage.cached_tokens == 0, "prefix-cache", f"another salt, but {other.finished.usage}")

    def test_no_cached_tokens_are_reported_without_a_prefix_cache(self, engine: Engine) -> None:
        if self.capabilities().prefix_cache:
            pytest.skip("declared: `prefix_cache`")
        request = self.request(self.prompt(engine, engine.model.max_input_tokens // 2))
        for answer in (engine.run_one(request), engine.run_one(self.again(request))):
            usage = answer.finished.usage
            demand(usage.cached_tokens == 0, "prefix-cache", f"{usage}, but `prefix_cache` is not declared")

    @pytest.mark.needs("prefix_cache")
    def test_a_prefix_is_used_as_far_as_it_agrees(self, engine: Engine) -> None:
        """The second half of the prompt differs: what was cached of it must not be used."""
        half = engine.model.max_input_tokens * 3 // 8
        start = self.prompt(engine, half, seed=79)
        first, second = ((*start, *self.prompt(engine, half, seed=seed)) for seed in (80, 81))
        cold = engine.run_one(self.request(second, cache_salt="cold"))
        engine.run_one(self.request(first, cache_salt="shared"))
        mixed = engine.run_one(self.request(second, cache_salt="shared"))
        self.check_same(cold, mixed, "prefix-cache", "cold and after a prompt that begins alike")
        cached = mixed.finished.usage.cached_tokens
        demand(0 < cached <= half, "prefix-cache", f"{half} tokens begin alike, but cached_tokens is {cached}")
