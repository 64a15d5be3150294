"""The rules of the contract: one sentence each. A failing test quotes its rule; docs/write-a-backend.md explains it."""

from __future__ import annotations

from typing import Literal, NoReturn

import pytest

Rule = Literal[
    "lifecycle",
    "one-ending",
    "events",
    "counts",
    "limits",
    "stop-rules",
    "determinism",
    "sampling",
    "isolation",
    "prefix-cache",
    "cancel",
    "capacity",
    "overload",
    "memory",
    "refusal",
    "grammar",
    "health",
    "logprobs",
    "imports",
    "threads",
    "drain",
    "back-pressure",
    "re-entrancy",
    "lora",
    "http",
]

RULES: dict[Rule, str] = {
    "lifecycle": "`start` returns a ModelInfo that makes sense, or raises StartError; `stop` may be called again",
    "one-ending": "every submitted request ends in exactly one Finished, or Failed if it is at fault; nothing follows",
    "events": "`emit` gets well-formed steps, one at a time, that name only open requests",
    "counts": "the Usage of a Finished agrees with the prompt and with the tokens that were emitted",
    "limits": "what exceeds the limits in ModelInfo ends in Failed(validation); what just fits is served whole",
    "stop-rules": "length comes first, then end-of-sequence, then stop tokens (`stop_sequence`); all are emitted",
    "determinism": "the same greedy request gives the same tokens each time",
    "sampling": "a declared sampling parameter does what SamplingParams says; the same seed gives the same tokens",
    "isolation": "neither the tokens nor the failure of a request depend on, or touch, who shares the batch",
    "prefix-cache": "a warm prefix cache changes no token, is reported in `cached_tokens`, and keeps salts apart",
    "cancel": "a cancelled request ends within one step and gives back what it held at once; unknown ids are ignored",
    "capacity": "`capacity` agrees with ModelInfo, counts what runs, and is whole again when nothing is open",
    "overload": "more requests than fit are kept waiting in the engine, never dropped",
    "memory": "the KV tokens promised as `max_batch_total_tokens` can be used to the last one",
    "refusal": "what is not declared in Capabilities is refused with Failed(validation), never ignored",
    "grammar": "a constrained answer holds to its grammar and ends with it; a broken grammar fails its own request",
    "health": "`health` returns while the engine can generate and raises Unhealthy when it cannot",
    "logprobs": "log-probabilities are those of the model's own distribution: log-softmax of the raw logits",
    "imports": "loading the plug-in imports no heavy runtime; that happens in `BackendPlugin.create` or in `start`",
    "threads": "`submit`, `cancel` and `capacity` return at once, raise nothing, and may be called from any thread",
    "drain": "`stop` lets open requests finish for `drain_s` seconds and fails the rest",
    "back-pressure": "an engine waits for a slow `emit`: it loses nothing and does not run ahead of it",
    "re-entrancy": "the plug-in is loaded in every process: it says the same in each and changes nothing there",
    "lora": "an adapter changes its own requests and no other; an unknown one is refused",
    "http": "the gateway's HTTP surface works on top of the backend: native and chat answers have their golden shapes",
}

DeviceRule = Literal["facts", "memory-figures", "kv-layout", "ops", "attention", "plan", "buckets", "collectives"]

DEVICE_RULES: dict[DeviceRule, str] = {
    "facts": "name, collective backend, pipeline depth and default dtype are such as the engine can use",
    "memory-figures": "`memory` gives bytes, and no more free than there are",
    "kv-layout": "`kv_layout` is one that PagePool can make",
    "ops": "every operation agrees with the reference in float32, at every dtype and number of tokens",
    "attention": "write_kv and attention agree with the reference over any page table, and read no other slot",
    "plan": "`plan_attention` copies what it needs: the lists of a StepPlan change while the step runs",
    "collectives": "what ranks exchange comes whole, in order of rank, with the same bits everywhere, captured or not",
    "buckets": "a captured or padded step gives what the eager one gives, and every decode step has a bucket",
}


def broken(rule: Rule, seen: str) -> NoReturn:
    """Fail the test: the rule, what was seen instead, where to read on."""
    _fail(RULES[rule], seen, f"docs/write-a-backend.md, rule `{rule}`")


def broken_device(rule: DeviceRule, seen: str) -> NoReturn:
    """The same for a device."""
    _fail(DEVICE_RULES[rule], seen, f"docs/write-a-device.md, rule `{rule}`")


def demand(kept: bool, rule: Rule, seen: str) -> None:
    """Fail the test unless the rule was kept."""
    if not kept:
        broken(rule, seen)


def _fail(text: str, seen: str, page: str) -> NoReturn:
    message = f"the contract demands: {text}\nseen: {seen}\nread: {page}"
    raise pytest.fail.Exception(message, pytrace=False) from None
