"""The HTTP surface on top of the backend: the real application, calling the engine under test directly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tgi_contract_tests import shapes
from tgi_contract_tests.base import ContractBase
from tgi_contract_tests.engine import Engine, Guest
from tgi_contract_tests.rules import broken, demand
from tgi_gateway.testing.worker import Worker, running_worker

T = TypeVar("T")
PROMPT = "Grüße, 世界 🎉"
"""Characters of one to four bytes: tokens end inside of them."""
LENGTH = 24
CHAT = {"messages": [{"role": "user", "content": "Say it."}], "max_tokens": LENGTH, "temperature": 0}


class Http(ContractBase):
    """Bodies ask for nothing that the engine may not declare, so that every backend can answer them."""

    def test_info_and_health_tell_of_the_engine(self, engine: Engine, tmp_path: Path) -> None:
        async def ask(worker: Worker) -> tuple[Any, int]:
            info, health = await worker.client.get("/info"), await worker.client.get("/health")
            return info.json(), health.status_code

        info, health = self._on(engine, tmp_path, ask)
        self._check_shape(info, shapes.INFO, "/info")
        told = (info["model_id"], info["max_input_tokens"], info["max_total_tokens"])
        model = engine.model
        demand(told[1:] == (model.max_input_tokens, model.max_total_tokens), "http", f"/info: {told}; {model}")
        demand(health == 200, "http", f"/health of a running engine: {health}")

    def test_generate_has_its_golden_shape(self, engine: Engine, tmp_path: Path) -> None:
        answer = self._on(engine, tmp_path, lambda worker: worker.answer("/generate", _native(details=True)))
        self._check_shape(answer, shapes.GENERATE, "/generate")
        details = answer["details"]
        counted = details["generated_tokens"] == len(details["tokens"]) and 1 <= details["generated_tokens"] <= LENGTH
        demand(counted, "http", f"/generate of {LENGTH} tokens: {details}")

    def test_a_stream_of_generate_has_its_golden_shape(self, engine: Engine, tmp_path: Path) -> None:
        events = self._on(engine, tmp_path, lambda worker: worker.events("/generate_stream", _native(details=True)))
        for event in events[:-1]:
            self._check_shape(event, shapes.STREAMED, "/generate_stream")
        self._check_shape(events[-1], shapes.LAST_STREAMED, "/generate_stream, last event")
        indices = [event["index"] for event in events]
        demand(indices == list(range(1, len(events) + 1)), "http", f"/generate_stream: `index` runs {indices}")

    def test_a_stream_says_what_the_whole_answer_says(self, engine: Engine, tmp_path: Path) -> None:
        """Also where tokens end inside a character: pieces never hold half of one."""

        async def ask(worker: Worker) -> tuple[str, list[Any]]:
            whole = await worker.answer("/generate", _native())
            return whole["generated_text"], await worker.events("/generate_stream", _native())

        whole, events = self._on(engine, tmp_path, ask)
        pieces = [event["token"]["text"] for event in events if not event["token"]["special"]]
        demand("".join(pieces) == events[-1]["generated_text"], "http", f"{pieces} are not {events[-1]}")
        if self.capabilities().batch_invariant:
            demand(events[-1]["generated_text"] == whole, "http", f"streamed {events[-1]}, whole {whole!r}")

    def test_chat_has_its_golden_shape(self, engine: Engine, tmp_path: Path) -> None:
        answer = self._on(engine, tmp_path, lambda worker: worker.answer("/v1/chat/completions", CHAT))
        self._check_shape(answer, shapes.CHAT, "/v1/chat/completions")
        usage = answer["usage"]
        adds_up = usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        demand(adds_up and usage["completion_tokens"] <= LENGTH, "http", f"/v1/chat/completions: {usage}")

    def test_a_stream_of_chat_has_its_golden_shape(self, engine: Engine, tmp_path: Path) -> None:
        body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}

        async def ask(worker: Worker) -> tuple[Any, list[Any]]:
            return await worker.answer("/v1/chat/completions", CHAT), await worker.events("/v1/chat/completions", body)

        whole, (*chunks, usage, done) = self._on(engine, tmp_path, ask)
        for chunk in chunks:
            self._check_shape(chunk, shapes.CHAT_CHUNK, "a chunk of /v1/chat/completions")
        demand(done == "[DONE]", "http", f"the stream ended in {done}")
        self._check_shape(usage, {"choices": [{}], "usage": shapes.USAGE}, "the usage chunk")
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        demand(deltas[0].get("role") == "assistant", "http", f"the first chunk says {deltas[0]}")
        text = "".join(delta.get("content") or "" for delta in deltas)
        if self.capabilities().batch_invariant:
            expected = whole["choices"][0]["message"]["content"]
            demand(text == expected, "http", f"streamed {text!r}, whole {expected!r}")

    @pytest.mark.needs("logprobs", "top_n_tokens")
    def test_chat_logprobs_have_their_golden_shape(self, engine: Engine, tmp_path: Path) -> None:
        body = CHAT | {"logprobs": True, "top_logprobs": 2}
        answer = self._on(engine, tmp_path, lambda worker: worker.answer("/v1/chat/completions", body))
        logprobs = answer["choices"][0]["logprobs"]
        self._check_shape(logprobs, shapes.CHAT_LOGPROBS, "`logprobs` of /v1/chat/completions")
        completion_tokens = answer["usage"]["completion_tokens"]
        per_token = len(logprobs["content"]) == completion_tokens
        demand(per_token, "http", f"{len(logprobs['content'])} log-probabilities for {completion_tokens} tokens")

    def test_completions_have_their_golden_shape(self, engine: Engine, tmp_path: Path) -> None:
        body = {"prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0}
        answer = self._on(engine, tmp_path, lambda worker: worker.answer("/v1/completions", body))
        self._check_shape(answer, shapes.COMPLETION, "/v1/completions")

    def test_a_stop_string_ends_the_answer_and_frees_the_engine(self, engine: Engine, tmp_path: Path) -> None:
        """It is found in the HTTP worker, which cancels: the engine must take `stop_strings` and do nothing."""

        async def ask(worker: Worker) -> tuple[str, str, Any]:
            whole = str((await worker.answer("/generate", _native()))["generated_text"])
            at = next((at for at in range(1, len(whole) - 3) if whole[at : at + 2].strip()), None)
            if at is None:
                pytest.skip(f"the model answered {whole!r}: nothing to stop at")
            stop = whole[at : at + 2]
            return whole, stop, await worker.answer("/generate", _native(stop=[stop], details=True))

        whole, stop, answer = self._on(engine, tmp_path, ask)
        wanted = whole[: whole.index(stop) + len(stop)]
        if self.capabilities().batch_invariant:
            told = (answer["generated_text"], answer["details"]["finish_reason"])
            demand(told == (wanted, "stop_sequence"), "http", f"stop string {stop!r}: {told}; without it {whole!r}")
        engine.wait_whole("cancel", "after a stop string was found")

    def test_what_the_engine_refuses_is_a_422(self, engine: Engine, tmp_path: Path) -> None:
        """One token more than fits. The gateway knows most limits itself; the engine's word is the same."""
        body = _native(max_new_tokens=engine.model.max_total_tokens)
        response = self._on(engine, tmp_path, lambda worker: worker.post("/generate", body))
        demand(response.status_code == 422, "http", f"{response.status_code}: {response.text}")
        self._check_shape(response.json(), shapes.ERROR, "an error")
        demand(response.json()["error_type"] == "validation", "http", response.text)

    def test_a_client_that_hangs_up_frees_the_engine(self, engine: Engine, tmp_path: Path) -> None:
        model = engine.model
        body = _native(max_new_tokens=model.max_total_tokens - min(100, model.max_total_tokens // 2))

        async def hang_up(worker: Worker) -> None:
            sent, gone = asyncio.Queue[Any](), asyncio.Event()
            messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

            async def receive() -> Any:
                if messages:
                    return messages.pop()
                await gone.wait()
                return {"type": "http.disconnect"}

            path = "/generate_stream"
            scope: dict[str, Any] = {
                "type": "http",
                "asgi": {"version": "3.0"},
                "http_version": "1.1",
                "method": "POST",
            }
            scope |= {"scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b""}
            scope |= {"server": ("worker", 80), "client": ("test", 1)}
            headers = [(b"host", b"worker"), (b"content-type", b"application/json")]
            handling = asyncio.create_task(worker.app(scope | {"headers": headers}, receive, sent.put))
            await asyncio.wait_for(sent.get(), self.patience_s)  # the head: the first event is there
            gone.set()
            await asyncio.wait_for(handling, self.patience_s)

        self._on(engine, tmp_path, hang_up)
        engine.wait_whole("cancel", "after a client had hung up")

    def test_an_engine_that_dies_ends_its_streams_with_an_error(self, own_engine: Engine, tmp_path: Path) -> None:
        model = own_engine.model
        body = _native(max_new_tokens=model.max_total_tokens - min(100, model.max_total_tokens // 2))

        async def ask(worker: Worker) -> str:
            asked = asyncio.create_task(worker.post("/generate_stream", body))
            await asyncio.to_thread(
                own_engine.wait_until,
                lambda: own_engine.capacity().free_sequences < model.max_sequences or asked.done(),
                "http",
                lambda: "the engine never began with a request",
            )
            await asyncio.to_thread(self.kill, own_engine.backend)
            return (await asyncio.wait_for(asked, self.patience_s)).text

        text = self._on(own_engine, tmp_path, ask)
        last = json.loads(text.strip().rpartition("data: ")[2].rpartition("data:")[2] or text)
        if "generated_text" in last and last["generated_text"] is not None:
            pytest.skip(
                "the engine was through before it could be killed: raise max_total_tokens, by --set or in `options`"
            )
        self._check_shape(last, shapes.ERROR, "what a stream of a dead engine ends in")

    def _on(self, engine: Engine, folder: Path, ask: Callable[[Worker], Awaitable[T]]) -> T:
        """What `ask` returns, asked of an HTTP worker that calls `engine`."""
        files = self.tokenizer_files(engine, folder)

        async def main() -> T:
            async with running_worker(Guest(engine), files) as worker:
                return await asyncio.wait_for(ask(worker), self.patience_s)

        try:
            return asyncio.run(main())
        except TimeoutError:
            broken("http", f"no answer within {self.patience_s:g} s: does every request end? See `one-ending`")
        except AssertionError as error:  # the worker's own: another status, or a stream that is none
            broken("http", str(error))

    def _check_shape(self, value: Any, shape: Any, what: str) -> None:
        problem = shapes.misfit(value, shape)
        demand(problem is None, "http", f"{what}: {problem}")


def _native(**parameters: Any) -> dict[str, Any]:
    return {"inputs": PROMPT, "parameters": {"max_new_tokens": LENGTH} | parameters}
