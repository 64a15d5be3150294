"""A request inside the engine: the only mutable per-request object."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tgi_gateway.types import NO_LOGPROB, Finished, FinishReason, Request, Usage
from tgi_model_server.kv.prefix import Node

if TYPE_CHECKING:
    from tgi_model_server.sampling.grammar import Constraint

State = Literal["waiting", "running", "finished"]


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's tokens, pages and progress. Owned by the batcher."""

    request: Request
    rank: tuple[int, int]
    """(priority, arrival number): lower runs first and is preempted last."""
    arrived_s: float
    """time.monotonic() at submission."""
    tokens: array[int]
    """Prompt and output as far as the host knows them."""
    stops: Mapping[int, FinishReason]
    """Tokens that end the request."""
    constraint: Constraint | None = None
    """What its grammar allows; for the Runner, which moves it on."""
    prompt_len: int = 0
    length: int = 0
    """Tokens including those that steps in flight will add: ``len(tokens)`` once these are done."""
    final_length: int = 0
    """Length at which `max_new_tokens` is reached."""
    eos_length: int = 0
    """Length from which end-of-sequence and stop tokens may be chosen."""

    state: State = "waiting"
    slot: int = -1
    last_step: int = -1
    """Number of the last step that had a row of this sequence."""
    started_s: float | None = None
    """time.monotonic() when it first entered a step."""

    computed: int = 0
    """Tokens whose keys and values are in the pages, counting steps in flight."""
    pages: list[int] = field(default_factory=list)
    """The first `shared_pages` belong to the prefix cache, the rest to this sequence."""
    shared_pages: int = 0
    prefix_node: Node | None = None
    """Where `shared_pages` end in the prefix cache; this sequence is one of its users."""
    prefix_key: bytes = b""
    """`tokens` as the prefix cache wants them, while a prompt is being prefilled."""
    namespace: bytes = b""
    """What besides the tokens must agree for a prefix to be shared: cache salt and adapter."""

    cached_tokens: int | None = None
    """Prompt tokens that came from the prefix cache when the sequence first ran."""
    prompt_logprobs: list[float] = field(default_factory=list)
    """Of the prompt's tokens so far, the first `NO_LOGPROB`."""
    prompt_top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """Where they are wanted: the most likely tokens beside each of these, for the first none."""

    def __post_init__(self) -> None:
        stop = self.request.stop
        self.prompt_len = self.length = len(self.tokens)
        self.final_length = self.prompt_len + stop.max_new_tokens
        self.eos_length = self.prompt_len + stop.min_new_tokens
        salt, adapter = self.request.cache_salt, self.request.adapter_id
        if salt or adapter:
            # The length keeps (adapter "a", salt "bc") apart from (adapter "ab", salt "c").
            adapter = adapter or ""
            self.namespace = f"{len(adapter)}:{adapter}{salt}".encode("utf-8", "surrogatepass")

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some of the prompt's log-probabilities are wanted and not known yet."""
        return self.request.prefill_logprobs and len(self.prompt_logprobs) < self.prompt_len

    @property
    def output_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.tokens[self.prompt_len :].tolist()

    def finished(self, reason: FinishReason, now_s: float) -> Finished:
        """The request's last event."""
        complete = self.request.prefill_logprobs and len(self.prompt_logprobs) == self.prompt_len
        return Finished(
            self.request.request_id,
            reason,
            Usage(self.prompt_len, len(self.tokens) - self.prompt_len, self.cached_tokens or 0),
            queue_s=(now_s if self.started_s is None else self.started_s) - self.arrived_s,
            prefill_logprobs=tuple(self.prompt_logprobs) if complete else (),
            prefill_top=tuple(self.prompt_top) if complete else (),
        )

    def restart_prompt_logprobs(self) -> None:
        """The prompt is about to be prefilled from its first token."""
        self.prompt_logprobs = [NO_LOGPROB]
        self.prompt_top = [()] if self.request.prefill_top_n_tokens else []
