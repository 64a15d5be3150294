"""What runs in the next step: sequences and budgets in, a StepPlan out; a StepResult in, events out. No torch.

Decode rows come first, then chunks of the prompts that are being prefilled, then new sequences, all in one step, up to
the token budget, which prompts share as `shares` says. A sequence gets the pages of its prompt when it enters and one
page at a time as it grows. When none is left, cached prefixes are evicted, then the youngest sequence is preempted: it
gives its pages up, the prefix cache keeps what it can, and it waits at the front to be computed again. The oldest
sequence is never preempted for another, so there is always progress.

Steps may be planned ahead of the results: a row whose token is not known yet says `PREVIOUS_TOKEN`, and what a step in
flight may still touch (slots, pages) is given back only when that step is done.
"""

from __future__ import annotations

import logging
import time
from array import array
from bisect import insort
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, SupportsFloat

from tgi_gateway.errors import BackendFailed, GatewayError, ValidationError
from tgi_gateway.types import Failed, Finished, FinishReason, Request, StepEvents, Usage
from tgi_model_server.kv.pages import PageAllocator
from tgi_model_server.kv.prefix import Node, PrefixCache
from tgi_model_server.plan import PREVIOUS_TOKEN, StepPlan, StepResult
from tgi_model_server.runner import HoldsPages
from tgi_model_server.sampling.checks import check_token_ids
from tgi_model_server.sequence import Sequence
from tgi_model_server.shares import prefill_shares

if TYPE_CHECKING:
    from tgi_model_server.sampling.grammar import Constraint

log = logging.getLogger(__name__)

GROWTH_STEPS = 16
"""A sequence enters only if the running ones still find pages for so many steps: else it would soon be preempted."""

FEW_DECODE_ROWS = 16
"""Up to so many, larger steps for prompts are worth the wait of the rows that decode beside them."""

MAX_NEWCOMERS = 64
"""So many of the waiting sequences are looked through for short ones."""

Verdict = Literal["entered", "full", "later", "failed"]
"""Of a waiting sequence: it runs; it and all behind it must wait; it alone should wait a step; it cannot be set up."""


class SlotState(Protocol):
    """The part of a Runner that holds per-sequence state; see `runner.Runner`."""

    def admit(
        self, slot: int, request: Request, output_ids: Seq[int], constraint: Constraint | None = None
    ) -> None: ...

    def release(self, slot: int) -> None: ...


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What a step and a sequence may be."""

    page_size: int
    num_pages: int
    max_sequences: int
    max_step_tokens: int
    """Tokens of a step, unless decode rows alone are more."""
    max_input_tokens: int
    """Prompt of one sequence."""
    max_total_tokens: int
    """Prompt and output of one sequence."""
    vocab_size: int
    chunked_prefill: bool = True
    """False: a prompt is cut only if it exceeds `max_step_tokens` by itself."""
    prefix_caching: bool = True
    max_mixed_tokens: int | None = None
    """Tokens of a step in which many sequences decode: their next tokens wait for all of it. None: as any other."""

    even_context: int | None = None
    """Context at which attention takes a prompt's token as long as all else; beyond it, tokens count for more than one
    of a step's, so that a step takes about as long however long its prompts are. None: they all count for one."""

    def step_tokens(self, decode_rows: int) -> int:
        """Tokens that a step with so many decode rows may have: twice as many while only a few wait for it."""
        if not decode_rows or self.max_mixed_tokens is None:
            return self.max_step_tokens
        return min(self.max_step_tokens, self.max_mixed_tokens * (2 if decode_rows <= FEW_DECODE_ROWS else 1))

    def cost(self, tokens: int, context: int) -> int:
        """What so many tokens of a prompt, after `context` others, take of a step's."""
        if self.even_context is None or context <= self.even_context:
            return tokens
        return -(-tokens * context // self.even_context)

    def affordable(self, cost: int, context: int) -> int:
        """Tokens of a prompt for that `cost`, at least one."""
        if self.even_context is None or context <= self.even_context:
            return cost
        return max(cost * self.even_context // context, 1) if cost > 0 else 0


@dataclass(slots=True)
class BatchStats:
    """Counters since start."""

    steps: int = 0
    prefill_tokens: int = 0
    """Computed, hence without those from the prefix cache."""
    generated_tokens: int = 0
    surplus_tokens: int = 0
    """Computed for sequences that had ended meanwhile, and thrown away."""
    prompt_tokens: int = 0
    """Of the sequences that entered."""
    cached_tokens: int = 0
    """Of these, from the prefix cache."""
    preemptions: int = 0
    failed_steps: int = 0


@dataclass(slots=True)
class Step:
    """A planned step and whose rows it has."""

    number: int
    plan: StepPlan = field(default_factory=StepPlan)
    rows: list[Sequence] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    """As `plan.sample_rows`."""


@dataclass(slots=True)
class _Limbo:
    """What a sequence gave up while step number `step` may still touch it."""

    step: int
    pages: list[int]
    node: Node | None = None
    slot: int | None = None


class Batcher:
    """All open sequences of an engine. Not thread-safe: belongs to the step loop's thread."""

    def __init__(self, limits: BatchLimits, slots: SlotState, eos_token_ids: Iterable[int]) -> None:
        self.limits = limits
        self.stats = BatchStats()
        self.pages = PageAllocator(limits.num_pages)
        self.prefix = PrefixCache(limits.page_size, self.pages) if limits.prefix_caching else None
        self._slots = slots
        if isinstance(slots, HoldsPages):
            slots.attach(self.pages, self.prefix)
        self._free_slots = list(range(limits.max_sequences - 1, -1, -1))
        self._eos: dict[int, FinishReason] = dict.fromkeys(eos_token_ids, "eos_token")
        self._open: dict[int, Sequence] = {}
        # Both sorted by rank. All running sequences have a slot and the pages of the tokens known at their entry.
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._limbo: list[_Limbo] = []
        self._arrivals = 0
        self._planned = 0
        """Number of the newest step."""
        self._completed = 0
        """Number of the newest step whose result is in."""
        self._events = StepEvents()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def available_pages(self) -> int:
        """Pages that new sequences could have: free, cached without users, or about to come back."""
        idle = self.prefix.idle_pages if self.prefix is not None else 0
        return self.pages.free_pages + idle + sum(len(limbo.pages) for limbo in self._limbo)

    def add(self, request: Request, arrived_s: float, constraint: Constraint | None = None) -> None:
        """Queue the request, or tell by an event why it can never run."""
        request_id = request.request_id
        try:
            if request_id in self._open:
                raise ValidationError(f"request id {request_id} is in use")
            self._check(request)
            try:
                tokens = array("i", request.input_ids)
            except (OverflowError, TypeError):
                raise ValidationError("the prompt holds a number that is no token id") from None
            check_token_ids(request, tokens, self.limits.vocab_size)
        except GatewayError as error:
            self.refuse(request_id, error)
            return
        rank = (request.priority, self._arrivals)
        sequence = Sequence(request, rank, arrived_s, tokens, self._stops(request), constraint)
        self._arrivals += 1
        self._open[request_id] = sequence
        insort(self._waiting, sequence, key=_rank)

    def refuse(self, request_id: int, error: GatewayError) -> None:
        """Tell that a request was not taken."""
        self._events.failed.append(Failed(request_id, error.error_type, error.detail))

    def withdraw(self, request: Request) -> None:
        """Tell that a request was cancelled before it came here."""
        self._events.finished.append(Finished(request.request_id, "cancelled", Usage(len(request.input_ids), 0)))

    def cancel(self, request_id: int) -> None:
        """End the request with `cancelled`; an unknown id has ended already."""
        sequence = self._open.get(request_id)
        if sequence is not None:
            self._leave(sequence)
            self._finish(sequence, "cancelled")

    def fail_all(self, error: GatewayError) -> None:
        """End every request with `error`."""
        for sequence in list(self._open.values()):
            self._leave(sequence)
            self._fail(sequence, error)

    def abandon(self, error: GatewayError) -> None:
        """The same when nothing else can be relied on: pages and slots stay as they are."""
        for sequence in list(self._open.values()):
            self._fail(sequence, error)

    def take_events(self) -> StepEvents:
        """What happened since the last call."""
        events, self._events = self._events, StepEvents()
        return events

    def plan(self) -> Step | None:
        """The next step, counted as started; None if nothing can run now (perhaps until a step in flight is done)."""
        step = Step(self._planned + 1)
        preemptions = self.stats.preemptions
        prefills, stalled = self._plan_decodes(step)
        budget = self.limits.step_tokens(len(step.rows)) - len(step.rows)
        shares = self._shares(prefills, budget)
        for sequence, share in zip(prefills, shares, strict=False):
            budget -= self._plan_prefill(step, sequence, min(share, budget))
        if not stalled and self.stats.preemptions == preemptions:
            self._plan_newcomers(step, budget, shares[len(prefills) :])
        if not step.rows:
            return None
        self._planned = step.number
        self.stats.steps += 1
        return step

    def complete(self, step: Step, result: StepResult) -> None:
        """Take in the result of the oldest step in flight."""
        assert step.number == self._completed + 1
        self._completed = step.number
        for row in step.plan.prompt_targets:
            step.rows[row].prompt_logprobs.extend(result.prompt_logprobs[row])
        for row in step.plan.prompt_top:
            step.rows[row].prompt_top.extend(result.prompt_top[row])
        events = self._events
        request_ids, token_ids = events.request_ids, events.token_ids
        logprobs: list[SupportsFloat] = events.logprobs  # type: ignore[assignment]  # `StepLoop` makes numbers of them
        ended: list[tuple[Sequence, FinishReason | GatewayError]] = []
        surplus = 0
        for index, (sequence, token, logprob) in enumerate(
            zip(step.sampled, result.token_ids, result.logprobs, strict=True)
        ):
            if sequence.state == "finished":
                surplus += 1
                continue
            if index in result.endings:
                surplus += 1
                ended.append((sequence, result.endings[index]))
                continue
            tokens = sequence.tokens
            tokens.append(token)
            if index in result.top:
                events.top[len(request_ids)] = result.top[index]
            request_ids.append(sequence.request.request_id)
            token_ids.append(token)
            logprobs.append(logprob)
            if len(tokens) >= sequence.final_length:
                ended.append((sequence, "length"))
            elif token in sequence.stops:
                ended.append((sequence, sequence.stops[token]))
        self.stats.generated_tokens += len(step.sampled) - surplus
        self.stats.surplus_tokens += surplus
        for sequence, reason in ended:
            self._leave(sequence)
            if isinstance(reason, GatewayError):
                self._fail(sequence, reason)
            else:
                self._finish(sequence, reason)
        self._empty_limbo()

    def fail(self, steps: Iterable[Step], error: GatewayError) -> None:
        """These steps, all in flight, broke: end their requests. The others go on."""
        for step in steps:
            self._completed = step.number
            self.stats.failed_steps += 1
            for sequence in step.rows:
                if sequence.state != "finished":
                    self._leave(sequence)
                    self._fail(sequence, error)
        assert self._completed == self._planned
        self._empty_limbo()
        if self.prefix is not None:
            # It may hold pages that the broken steps should have filled. Whoever still uses any was in none of these
            # steps, so those pages are older.
            self.prefix.clear()

    def check(self) -> None:
        """Assert the invariants of pages and slots. O(pages): for tests and debugging."""
        owned: list[Iterable[int]] = [sequence.pages[sequence.shared_pages :] for sequence in self._running]
        owned += [limbo.pages for limbo in self._limbo]
        if self.prefix is not None:
            self.prefix.check()
            owned.append(self.prefix.owned())
        self.pages.check(*owned)
        slots = [sequence.slot for sequence in self._running] + self._free_slots
        slots += [limbo.slot for limbo in self._limbo if limbo.slot is not None]
        assert sorted(slots) == list(range(self.limits.max_sequences))
        assert sorted(self._running, key=_rank) == self._running
        assert sorted(self._waiting, key=_rank) == self._waiting
        assert len(self._open) == len(self._running) + len(self._waiting)
        for sequence in self._running:
            assert sequence.state == "running"
            assert len(sequence.pages) * self.limits.page_size >= sequence.computed
        for sequence in self._waiting:
            assert sequence.state == "waiting"
            assert not sequence.pages

    # Planning.

    def _plan_decodes(self, step: Step) -> tuple[list[Sequence], bool]:
        """Rows of the sequences that grow by one token. Returns those in prefill, and whether any row found no page."""
        number, page_size = step.number, self.limits.page_size
        plan, rows, sampled = step.plan, step.rows, step.sampled
        slots, query_lens, kv_lens, pages = plan.slots, plan.query_lens, plan.kv_lens, plan.pages
        token_ids, sample_rows = plan.token_ids, plan.sample_rows
        allow_eos, output_lens = plan.allow_eos, plan.output_lens
        prefills: list[Sequence] = []
        stalled = False
        row = at = 0
        running = self._running
        while at < len(running):  # preemption shortens the list from its end
            sequence = running[at]
            at += 1
            length, computed = sequence.length, sequence.computed
            if length - computed > 1:
                prefills.append(sequence)
                continue
            if length >= sequence.final_length:
                continue  # the rest of its tokens are in flight
            if computed == len(sequence.pages) * page_size and not self._grow(sequence):
                stalled = True
                continue
            tokens = sequence.tokens
            slots.append(sequence.slot)
            kv_lens.append(length)
            pages.append(sequence.pages)
            token_ids.append(tokens[computed] if computed < len(tokens) else PREVIOUS_TOKEN)
            sample_rows.append(row)
            allow_eos.append(length >= sequence.eos_length)
            output_lens.append(length - sequence.prompt_len)
            sampled.append(sequence)
            sequence.computed = length
            sequence.length = length + 1
            sequence.last_step = number
            row += 1
        query_lens.extend([1] * row)
        rows.extend(sampled)
        return prefills, stalled

    def _shares(self, prefills: list[Sequence], budget: int) -> list[int]:
        """What each of `prefills`, and then of those that could enter in this step, may take of `budget`."""
        remaining = [self.limits.cost(each.length - each.computed, each.computed) for each in prefills]
        if not self.limits.chunked_prefill:
            return [budget] * len(prefills)
        if sum(remaining) > budget > 0:
            remaining += self._newcomers()
        return prefill_shares(remaining, budget)

    def _newcomers(self) -> list[int]:
        """Tokens of the waiting sequences that could enter now, in order; prefixes count in full."""
        lengths: list[int] = []
        pages = self.pages.free_pages + (self.prefix.idle_pages if self.prefix is not None else 0) - self._reserve()
        for sequence in self._waiting[: min(len(self._free_slots), MAX_NEWCOMERS)]:
            pages -= -(-sequence.length // self.limits.page_size)
            if pages < 0 or sequence.last_step > self._completed:
                break
            lengths.append(sequence.length)
        return lengths

    def _reserve(self) -> int:
        """Pages that the running sequences will need soon."""
        return -(-len(self._running) * GROWTH_STEPS // self.limits.page_size)

    def _plan_prefill(self, step: Step, sequence: Sequence, budget: int) -> int:
        """A row with as much of the sequence's known tokens as `budget` allows; returns what they take of it."""
        start, length, prompt_len = sequence.computed, sequence.length, sequence.prompt_len
        chunk = self._chunk(length - start, self.limits.affordable(budget, start))
        if not chunk:
            return 0
        end = start + chunk
        plan, row = step.plan, len(step.rows)
        step.rows.append(sequence)
        plan.slots.append(sequence.slot)
        plan.query_lens.append(chunk)
        plan.kv_lens.append(end)
        plan.pages.append(sequence.pages)
        plan.token_ids.extend(sequence.tokens[start:end])
        if sequence.wants_prompt_logprobs and start + 1 < prompt_len:
            plan.prompt_targets[row] = sequence.tokens[start + 1 : min(end + 1, prompt_len)].tolist()
            if sequence.request.prefill_top_n_tokens:
                plan.prompt_top[row] = sequence.request.prefill_top_n_tokens
        if end == length:
            step.sampled.append(sequence)
            plan.sample_rows.append(row)
            plan.allow_eos.append(length >= sequence.eos_length)
            plan.output_lens.append(length - prompt_len)
            sequence.length = length + 1
        sequence.computed = end
        sequence.last_step = step.number
        self.stats.prefill_tokens += chunk
        if self.prefix is not None:
            left_over = self._share(sequence, end // self.limits.page_size, step.number)
            if left_over:
                self._limbo.append(_Limbo(step.number, left_over))
        if end == length:
            sequence.prefix_key = b""
        return self.limits.cost(chunk, start)

    def _chunk(self, remaining: int, budget: int) -> int:
        if remaining <= budget:
            return remaining
        if not self.limits.chunked_prefill and remaining <= self.limits.max_step_tokens:
            return 0
        return max(budget, 0)

    def _plan_newcomers(self, step: Step, budget: int, shares: list[int]) -> None:
        """Let waiting sequences enter, in order, while slots, pages and budget last.

        What `shares` gives to the first of them is theirs, so that a long one does not stand in the way of a short one.
        """
        waiting, at = self._waiting, 0
        promised, left = sum(shares), iter(shares)
        while at < min(len(waiting), self.limits.max_sequences) and self._free_slots and budget > 0:
            sequence = waiting[at]
            if sequence.last_step > self._completed:
                break  # its newest token is still in flight
            promised -= next(left, 0)
            allowed = budget - promised
            if allowed <= 0:
                at += 1
                continue
            verdict = self._enter(sequence, step.number, allowed)
            if verdict == "full":
                break
            if verdict == "later":
                at += 1
                continue
            del waiting[at]
            if verdict == "entered":
                budget -= self._plan_prefill(step, sequence, allowed)

    def _enter(self, sequence: Sequence, number: int, budget: int) -> Verdict:
        """Give the sequence a slot and the pages of its tokens, if they are there."""
        page_size, length = self.limits.page_size, sequence.length
        cached = 0
        node: Node | None = None
        pages: list[int] = []
        if self.prefix is not None:
            if len(sequence.prefix_key) != length * sequence.tokens.itemsize:
                sequence.prefix_key = sequence.tokens.tobytes()
            if not sequence.wants_prompt_logprobs:
                # At least one token is left to compute: its logits choose the next.
                prefix = self.prefix.find(
                    sequence.prefix_key, (length - 1) // page_size, namespace=sequence.namespace, step=number
                )
                if prefix.forming:
                    return "later"  # by the next step it need not be computed again
                if prefix.pages:
                    cached = prefix.pages
                    node, pages = self.prefix.use(prefix)
        needed = -(-length // page_size) - cached
        idle = self.prefix.idle_pages if self.prefix is not None else 0
        if (
            self.pages.free_pages + idle < needed + self._reserve()
            or not self._chunk(length - cached * page_size, budget)
            or not self._prepare_slot(sequence)
        ):
            if node is not None and self.prefix is not None:
                self.prefix.release(node)
            return "failed" if sequence.state == "finished" else "full"
        if needed > self.pages.free_pages and self.prefix is not None:
            self.prefix.evict(needed - self.pages.free_pages)
        sequence.pages = pages + self.pages.take(needed)
        sequence.prefix_node, sequence.shared_pages = node, cached
        sequence.computed = cached * page_size
        sequence.state = "running"
        insort(self._running, sequence, key=_rank)
        if sequence.wants_prompt_logprobs:
            sequence.restart_prompt_logprobs()
        if sequence.started_s is None:
            sequence.started_s = time.monotonic()
            sequence.cached_tokens = sequence.computed
            self.stats.prompt_tokens += sequence.prompt_len
            self.stats.cached_tokens += sequence.computed
        return "entered"

    def _prepare_slot(self, sequence: Sequence) -> bool:
        slot = self._free_slots[-1]
        try:
            self._slots.admit(slot, sequence.request, sequence.output_ids, sequence.constraint)
        except Exception as error:
            # Only this request is concerned.
            if isinstance(error, GatewayError):
                self._fail(sequence, error)
            else:
                log.exception("request %d cannot be set up", sequence.request.request_id)
                self._fail(sequence, BackendFailed("the request could not be set up"))
            return False
        sequence.slot = self._free_slots.pop()
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """One page more. False: not in this step."""
        while not self.pages.free_pages and not (self.prefix is not None and self.prefix.evict(1)):
            if self._limbo:
                return False  # pages come back when the step in flight is done
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages += self.pages.take(1)
        return True

    # Leaving.

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.state = "waiting"
        insort(self._waiting, sequence, key=_rank)
        self.stats.preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        """Take the sequence out of its queue. A running one gives up slot and pages; computed pages are cached."""
        if sequence.state != "running":
            self._waiting.remove(sequence)
            return
        if self._running[-1] is sequence:
            self._running.pop()
        else:
            self._running.remove(sequence)
        left_over: list[int] = []
        if self.prefix is not None:
            # A sampled token that was never fed back has no keys and values; one in flight is not known here.
            known = min(sequence.computed, len(sequence.tokens)) // self.limits.page_size
            if known > sequence.shared_pages:
                sequence.prefix_key = sequence.tokens[: known * self.limits.page_size].tobytes()
                left_over = self._share(sequence, known, self._planned)
        own = sequence.pages[sequence.shared_pages :]
        self._limbo.append(_Limbo(sequence.last_step, left_over + own, sequence.prefix_node, sequence.slot))
        if sequence.last_step <= self._completed:
            self._empty_limbo()
        sequence.pages = []
        sequence.shared_pages = sequence.computed = 0
        sequence.prefix_node, sequence.prefix_key = None, b""
        sequence.slot = -1

    def _share(self, sequence: Sequence, pages: int, number: int) -> list[int]:
        """Put the first `pages` pages into the prefix cache, filled by step `number`; returns those it had already."""
        assert self.prefix is not None
        if pages <= sequence.shared_pages:
            return []
        node, shared, left_over = self.prefix.extend(
            sequence.prefix_node or self.prefix.root,
            sequence.shared_pages,
            sequence.prefix_key,
            sequence.pages[:pages],
            namespace=sequence.namespace,
            step=number,
        )
        if left_over:
            # A new list: the plan of this step still refers to the old one.
            sequence.pages = shared + sequence.pages[pages:]
        sequence.prefix_node, sequence.shared_pages = node, pages
        return left_over

    def _empty_limbo(self) -> None:
        if not self._limbo:
            return
        kept: list[_Limbo] = []
        for limbo in self._limbo:
            if limbo.step > self._completed:
                kept.append(limbo)
                continue
            self.pages.give(limbo.pages)
            if limbo.node is not None and self.prefix is not None:
                self.prefix.release(limbo.node)
            if limbo.slot is not None:
                self._slots.release(limbo.slot)
                self._free_slots.append(limbo.slot)
        self._limbo = kept

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._close(sequence)
        self._events.finished.append(sequence.finished(reason, time.monotonic()))

    def _fail(self, sequence: Sequence, error: GatewayError) -> None:
        self._close(sequence)
        self.refuse(sequence.request.request_id, error)

    def _close(self, sequence: Sequence) -> None:
        sequence.state = "finished"
        del self._open[sequence.request.request_id]

    # Arrival.

    def _check(self, request: Request) -> None:
        """Raise `ValidationError` for what can never run."""
        prompt, new = len(request.input_ids), request.stop.max_new_tokens
        if prompt < 1:
            raise ValidationError("the prompt has no tokens; at least 1 is needed")
        if new < 1:
            raise ValidationError(f"`max_new_tokens` is {new}; it must be at least 1")
        if prompt > self.limits.max_input_tokens:
            raise ValidationError(
                f"the prompt has {prompt} tokens; this engine takes at most {self.limits.max_input_tokens}"
            )
        if prompt + new > self.limits.max_total_tokens:
            raise ValidationError(
                f"{prompt} prompt tokens and `max_new_tokens` {new} are {prompt + new} tokens; this engine holds at "
                f"most {self.limits.max_total_tokens} per request"
            )
        # The last token is never fed back, so it needs no page.
        if prompt + new - 1 > self.pages.total * self.limits.page_size:
            raise ValidationError(
                f"{prompt} prompt tokens and `max_new_tokens` {new} need more than the "
                f"{self.pages.total * self.limits.page_size} tokens of the whole KV pool"
            )

    def _stops(self, request: Request) -> dict[int, FinishReason]:
        stop = request.stop
        # A constrained answer gets an end-of-sequence that it ignores only where nothing else can follow.
        ignore_eos = stop.ignore_eos and request.sampling.grammar is None
        if not stop.stop_token_ids:
            return {} if ignore_eos else self._eos
        stops: dict[int, FinishReason] = dict.fromkeys(stop.stop_token_ids, "stop_sequence")
        if not ignore_eos:
            stops.update(self._eos)
        return stops

    def __iter__(self) -> Iterator[Sequence]:
        """All open sequences."""
        return iter(self._open.values())


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
