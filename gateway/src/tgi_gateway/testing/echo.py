"""EchoBackend: an engine without a model. It answers with the prompt's own tokens, round and round."""

from __future__ import annotations

import json
import time

from tgi_gateway.backend import Capabilities, EngineOptions, ModelInfo
from tgi_gateway.errors import GatewayError, ModelError
from tgi_gateway.stepping import HEALTH_TIMEOUT_S, Row, SteppingBackend
from tgi_gateway.testing import distribution
from tgi_gateway.types import NO_LOGPROB, StepEvents, Token

ECHO_CAPABILITIES = Capabilities(
    features=frozenset(
        {
            "sampling",
            "seed",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "frequency_penalty",
            "presence_penalty",
            "logit_bias",
            "logprobs",
            "top_n_tokens",
            "prefill_logprobs",
            "prefill_top_n_tokens",
            "ignore_eos",
            "min_new_tokens",
            "stop_token_ids",
        }
    ),
    max_top_n_tokens=20,
)


def toy_model(
    *,
    model_id: str = "echo",
    vocab_size: int = 32_000,
    eos_token_ids: tuple[int, ...] = (),
    max_total_tokens: int = 4096,
    max_input_tokens: int | None = None,
    max_sequences: int = 128,
    max_batch_total_tokens: int | None = None,
    max_batch_prefill_tokens: int | None = None,
) -> ModelInfo:
    """The ModelInfo of an engine without a model; by default every sequence can have its full length."""
    max_input_tokens = max_total_tokens - 1 if max_input_tokens is None else max_input_tokens
    return ModelInfo(
        model_id=model_id,
        max_input_tokens=max_input_tokens,
        max_total_tokens=max_total_tokens,
        max_batch_total_tokens=max_batch_total_tokens or max_sequences * max_total_tokens,
        max_batch_prefill_tokens=max_batch_prefill_tokens or max_input_tokens,
        max_sequences=max_sequences,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        device="none",
    )


def toy_model_from(options: EngineOptions) -> ModelInfo:
    """As the options say; vocabulary, end token and length come from the folder's config.json, if there is one."""
    config_path = options.model_path / "config.json"
    try:
        config = json.loads(config_path.read_text("utf-8")) if config_path.is_file() else {}
    except ValueError as error:
        raise ModelError(f"{config_path} is not JSON: {error}") from error
    eos = config.get("eos_token_id")
    return toy_model(
        model_id=options.model_id,
        vocab_size=config.get("vocab_size") or 32_000,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        max_total_tokens=options.max_total_tokens or config.get("max_position_embeddings") or 4096,
        max_input_tokens=options.max_input_tokens,
        max_sequences=options.max_batch_size or 128,
        max_batch_total_tokens=options.max_batch_total_tokens,
        max_batch_prefill_tokens=options.max_batch_prefill_tokens,
    )


class EchoBackend(SteppingBackend):
    """One step every `step_s` seconds gives one token to each running row; 0 is as fast as possible.

    Its steps are so cheap that they run in the event loop.
    """

    def __init__(
        self,
        model: ModelInfo | None = None,
        *,
        step_s: float = 0.0,
        capabilities: Capabilities = ECHO_CAPABILITIES,
        health_timeout_s: float = HEALTH_TIMEOUT_S,
    ) -> None:
        super().__init__(capabilities, health_timeout_s=health_timeout_s)
        self.model = model or toy_model()
        self._step_s = step_s

    def load(self) -> ModelInfo:
        return self.model

    async def _advance(self, events: StepEvents) -> None:
        now = time.monotonic()
        if now >= self._next_step_at:
            self._next_step_at = now + self._step_s
            self._step(events, now)

    async def _probe(self) -> None:
        """A step loop that turns can generate: there is nothing else here that could break."""

    def _step(self, events: StepEvents, now: float) -> None:
        for row in list(self._running.values()):
            if not row.output and not row.not_before:
                row.not_before = row.started_at + self.delay_s(row)
            if now < row.not_before:
                continue
            try:
                token: Token | GatewayError = self.next_token(row)
            except GatewayError as error:  # this request's failure, and only this one's
                token = error
            self._give(row, token, events)
            row.not_before = now + self.delay_s(row)

    # The model, so to speak.

    def delay_s(self, row: Row) -> float:  # noqa: ARG002
        """How long the row sits out before its next token, on top of the step interval."""
        return 0.0

    def expected_token(self, row: Row) -> int:
        """The most likely next token."""
        prompt = row.request.input_ids
        return prompt[len(row.output) % len(prompt)]

    def next_token(self, row: Row) -> Token:
        """Choose the row's next token. A GatewayError ends this row, any other exception the engine."""
        request, vocab_size = row.request, self.model.vocab_size
        expected = self.expected_token(row)
        banned = self.held_back(row)
        token_id = distribution.choose(expected, vocab_size, request.sampling, request.input_ids, row.output, banned)
        return Token(
            request.request_id,
            token_id,
            distribution.logprob(expected, token_id, vocab_size) if request.logprobs else NO_LOGPROB,
            distribution.most_likely(expected, request.top_n_tokens, vocab_size),
        )

    def prompt_logprobs(self, row: Row) -> tuple[float, ...]:
        """Each prompt token, after the ones before it."""
        prompt = row.request.input_ids
        expected = distribution.expected_in_prompt(prompt)
        known = zip(expected, prompt[1:], strict=True)
        return (NO_LOGPROB, *(distribution.logprob(guess, actual, self.model.vocab_size) for guess, actual in known))

    def prompt_top(self, row: Row) -> tuple[tuple[tuple[int, float], ...], ...]:
        expected = distribution.expected_in_prompt(row.request.input_ids)
        wanted = row.request.prefill_top_n_tokens
        return ((), *(distribution.most_likely(guess, wanted, self.model.vocab_size) for guess in expected))
