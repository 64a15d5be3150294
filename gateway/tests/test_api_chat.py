from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from tgi_gateway.api.bodies import ChatBody
from tgi_gateway.prompt.chat_template import ChatTemplate
from tgi_gateway.testing.echo import ECHO_CAPABILITIES, EchoBackend
from tgi_gateway.testing.scripted import Script, ScriptedBackend
from tgi_gateway.testing.worker import FIRST_BYTE, Worker, byte_toy, error_text

PROMPT = "<user>abc<bot>"
CHAT = "/v1/chat/completions"


def body(content: object = "abc", **parameters: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "temperature": 0} | parameters


def text_of(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


async def test_a_chat_is_answered_in_openais_form(worker: Worker) -> None:
    answer = await worker.answer(CHAT, body(max_tokens=8))
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1.7e9
    assert answer.pop("system_fingerprint").endswith("-native")
    assert answer == {
        "object": "chat.completion",
        "model": "echo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "<user>ab"},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": 14,
            "completion_tokens": 8,
            "total_tokens": 22,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_the_named_model_is_echoed_whatever_it_is(worker: Worker) -> None:
    assert (await worker.answer(CHAT, body(max_tokens=1, model="gpt-x")))["model"] == "gpt-x"
    assert (await worker.answer(CHAT, body(max_tokens=1, model="tgi")))["model"] == "echo"


async def test_a_model_that_is_an_adapter_is_used_as_such(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(lora_adapters=("one", "two=/somewhere"))
    for name in ("one", "two"):
        assert "does not support `lora`" in await worker.error(CHAT, body(model=name))
    await worker.answer(CHAT, body(model="echo", max_tokens=1))
    listed = await worker.client.get("/v1/models")
    assert [model["id"] for model in listed.json()["data"]] == ["echo", "one", "two"]


async def test_parts_are_joined_without_separator(worker: Worker) -> None:
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    assert text_of(await worker.answer(CHAT, body(parts, max_tokens=14))) == PROMPT


async def test_images_are_refused(worker: Worker) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]
    assert await worker.error(CHAT, body(parts)) == "Input validation error: image modality is not supported"


async def test_every_role_reaches_the_template(worker: Worker) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "T", "tool_call_id": "1", "name": "f"},
    ]
    answer = await worker.answer("/chat_tokenize", {"messages": messages})
    assert answer["templated_text"] == "<system>S<user>U<assistant><tool>T<bot>"
    assert len(answer["tokenize_response"]) == len(answer["templated_text"])
    assert answer["tokenize_response"][1]["text"] == "s"


async def test_a_last_assistant_message_is_continued(worker: Worker) -> None:
    messages = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A "}]
    answer = await worker.answer("/chat_tokenize", {"messages": messages})
    assert answer["templated_text"] == "<user>U<assistant>A"


async def test_a_stop_string_is_removed_and_reads_stop(worker: Worker) -> None:
    for stop in ("r>", ["zz", "r>"]):
        answer = await worker.answer(CHAT, body(stop=stop))
        assert text_of(answer) == "<use"
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 6
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        events = await worker.events(CHAT, body(stop=stop, stream=True))
        assert "".join(event["choices"][0]["delta"]["content"] for event in events[:-1]) == "<use"
        assert events[-2]["choices"][0]["finish_reason"] == "stop"


async def test_an_end_of_sequence_reads_stop_and_shows_no_text(start_worker: Callable[..., Any]) -> None:
    engine = ScriptedBackend([Script.of(FIRST_BYTE + 40, FIRST_BYTE + 41)], byte_toy())
    worker: Worker = await start_worker(engine)
    answer = await worker.answer(CHAT, body())
    assert text_of(answer) == "IJ"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 3
    events = await worker.events(CHAT, body(stream=True))
    assert [event["choices"][0]["delta"]["content"] for event in events[:-1]] == ["I", "J", ""]
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None, None, "stop"]


async def test_logprobs_tell_token_bytes_and_alternatives(worker: Worker) -> None:
    wanted = body("é", max_tokens=8, logprobs=True, top_logprobs=2)
    content = (await worker.answer(CHAT, wanted))["choices"][0]["logprobs"]["content"]
    assert [each["token"] for each in content] == [*"<user>", "\ufffd", "\ufffd"]
    assert bytes(byte for each in content for byte in each["bytes"]).decode() == "<user>é"
    assert content[0]["bytes"] == [ord("<")]
    assert [each["token"] for each in content[0]["top_logprobs"]] == ["<", "="]
    assert content[0]["logprob"] == content[0]["top_logprobs"][0]["logprob"] < 0
    events = await worker.events(CHAT, wanted | {"stream": True})
    streamed = [event["choices"][0]["logprobs"]["content"] for event in events[:-1]]
    assert all(len(each) == 1 for each in streamed)
    assert [each[0] for each in streamed] == content


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, False),
        ({"logprobs": True}, True),
        ({"top_logprobs": 1}, True),
        ({"logprobs": False, "top_logprobs": 1}, False),
    ],
)
async def test_logprobs_are_told_if_asked_for(worker: Worker, asked: dict[str, Any], told: bool) -> None:
    answer = await worker.answer(CHAT, body(max_tokens=1, **asked))
    assert (answer["choices"][0]["logprobs"] is not None) is told


async def test_a_stream_ends_with_its_reason_and_done(worker: Worker) -> None:
    events = await worker.events(CHAT, body(max_tokens=3, stream=True))
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    first, *others = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert first == {"role": "assistant", "content": "<"}  # told once: clients put the deltas' texts together
    assert others == [{"content": "u"}, {"content": "s"}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"


async def test_a_stream_tells_its_usage_on_request(worker: Worker) -> None:
    wanted = body(max_tokens=3, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = await worker.events(CHAT, wanted)
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 14,
        "completion_tokens": 3,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_n_gives_independent_answers_that_the_seed_fixes(worker: Worker) -> None:
    wanted = body(max_tokens=20, n=3, temperature=20.0, seed=7)
    answer = await worker.answer(CHAT, wanted)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer["usage"]["prompt_tokens"] == 14
    assert answer["usage"]["completion_tokens"] == 60
    again = await worker.events(CHAT, wanted | {"stream": True, "stream_options": {"include_usage": True}})
    streamed = ["", "", ""]
    for event in again[:-2]:
        (choice,) = event["choices"]
        streamed[choice["index"]] += choice["delta"]["content"]
    assert streamed == texts
    assert again[-2]["usage"] == answer["usage"]
    assert sum(event["choices"][0]["finish_reason"] == "length" for event in again[:-2]) == 3


async def test_too_many_choices_are_refused(worker: Worker) -> None:
    for stream in (False, True):
        assert "ask for 129 generations at once; allowed are 128" in await worker.error(
            CHAT, body(n=129, stream=stream)
        )
    many = await worker.answer(CHAT, body(n=20, max_tokens=1))
    assert [choice["index"] for choice in many["choices"]] == list(range(20))


async def test_one_failing_choice_ends_all_with_one_error(start_worker: Callable[..., Any]) -> None:
    letters = [FIRST_BYTE + 40] * 3
    worker: Worker = await start_worker(ScriptedBackend([Script.of(*letters, then="fail")], byte_toy()))
    response = await worker.post(CHAT, body(n=2))
    assert response.status_code == 424
    events = await worker.events(CHAT, body(n=2, stream=True))
    assert events[-1] == "[DONE]"
    assert events[-2]["error"]["http_status_code"] == 424
    assert error_text(events[-2]) == error_text(response.json())
    assert all("choices" in event for event in events[:-2])
    assert len(worker.services.generations) == 0


async def test_temperature_zero_is_greedy_and_none_samples(worker: Worker) -> None:
    greedy = {text_of(await worker.answer(CHAT, body(max_tokens=14, top_p=0.5, top_k=9))) for _ in range(2)}
    assert greedy == {PROMPT}
    drawn = {text_of(await worker.answer(CHAT, body(max_tokens=14, temperature=None))) for _ in range(4)}
    assert len(drawn) > 1


@pytest.mark.parametrize("neutral", [{"top_p": 1.0}, {"top_p": 1}, {"top_k": -1}, {"top_k": 0}, {"min_p": 0}])
async def test_openais_neutral_values_are_accepted(worker: Worker, neutral: dict[str, Any]) -> None:
    await worker.answer(CHAT, body(max_tokens=1, **neutral, temperature=0.7))


async def test_null_means_not_given(worker: Worker) -> None:
    names = [field.name for field in msgspec.structs.fields(ChatBody) if field.name not in ("messages", "temperature")]
    given: dict[str, Any] = dict.fromkeys(names)
    given["max_completion_tokens"] = 3
    answer = await worker.answer(CHAT, body(**given))
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("seed", [-1, 0, 2**64 - 1])
async def test_any_64_bit_seed_is_accepted(worker: Worker, seed: int) -> None:
    answers = {text_of(await worker.answer(CHAT, body(max_tokens=20, temperature=9.0, seed=seed))) for _ in range(2)}
    assert len(answers) == 1


async def test_penalties_are_the_models_own(worker: Worker) -> None:
    # Every step's favourite is punished once it has been said, so the echo goes astray.
    for penalty in ("presence_penalty", "frequency_penalty"):
        plain = text_of(await worker.answer(CHAT, body("a", max_tokens=30)))
        punished = text_of(await worker.answer(CHAT, body("a", max_tokens=30, **{penalty: 2.0})))
        assert plain != punished
    assert "`presence_penalty` must be" in await worker.error(CHAT, body(presence_penalty=2.5))


async def test_logit_bias_is_a_map_from_token_to_bias(worker: Worker) -> None:
    forced = FIRST_BYTE + ord("z") - ord("!")
    answer = await worker.answer(CHAT, body(max_tokens=5, logit_bias={str(forced): 100}))
    assert text_of(answer) == "zzzzz"
    banned = FIRST_BYTE + ord("<") - ord("!")
    assert not text_of(await worker.answer(CHAT, body(max_tokens=5, logit_bias={str(banned): -100}))).startswith("<")
    assert "names token 9999" in await worker.error(CHAT, body(logit_bias={"9999": 1}))


async def test_logit_bias_is_refused_by_an_engine_without_it(start_worker: Callable[..., Any]) -> None:
    features = ECHO_CAPABILITIES.features - {"logit_bias"}
    able = replace(ECHO_CAPABILITIES, features=features)
    worker: Worker = await start_worker(EchoBackend(byte_toy(), capabilities=able))
    assert "does not support `logit_bias`" in await worker.error(CHAT, body(logit_bias={"5": 1}), 400)


async def test_more_alternatives_may_be_asked_for_than_on_native_routes(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker()
    (told,) = (await worker.answer(CHAT, body(max_tokens=1, top_logprobs=20)))["choices"][0]["logprobs"]["content"]
    assert len(told["top_logprobs"]) == 20
    refused = await worker.error(CHAT, body(top_logprobs=21))
    assert refused == "Input validation error: `top_n_tokens` must be >= 0 and <= 20. Given: 21"
    native = {"inputs": "a", "parameters": {"top_n_tokens": 6}}
    assert "must be >= 0 and <= 5. Given: 6" in await worker.error("/generate", native)
    told_how_many: Worker = await start_worker(max_top_n_tokens=3, given=("max_top_n_tokens",))
    assert "<= 3. Given: 4" in await told_how_many.error(CHAT, body(top_logprobs=4))


async def test_an_answer_that_is_too_long_is_told_by_openais_code(worker: Worker) -> None:
    response = await worker.post(CHAT, body(max_tokens=512))
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "context_length_exceeded"
    refused = await worker.post(CHAT, body(min_tokens=9, max_tokens=3))
    assert refused.json()["error"]["param"] == "min_tokens"


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": "http://127.0.0.1/x.png"}, "image"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "audio"),
        ({"type": "file", "file": {"file_id": "f"}}, "file"),
        ({"type": "video_url", "video_url": {"url": "http://127.0.0.1/x"}}, "video"),
    ],
)
async def test_media_are_refused(worker: Worker, part: dict[str, Any], kind: str) -> None:
    for stream in (False, True):
        refused = await worker.error(CHAT, body([{"type": "text", "text": "a"}, part], stream=stream), 400)
        assert refused == f"Input validation error: {kind} modality is not supported"


async def test_the_last_message_is_continued_or_answered_as_asked(worker: Worker) -> None:
    async def prompt(*turns: tuple[str, str], **fields: Any) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return str((await worker.answer("/chat_tokenize", {"messages": messages} | fields))["templated_text"])

    turns = (("user", "q"), ("assistant", "a b "))
    assert await prompt(*turns) == "<user>q<assistant>a b"
    assert await prompt(*turns, continue_final_message=True) == "<user>q<assistant>a b"
    assert await prompt(*turns, continue_final_message=True, add_generation_prompt=False) == "<user>q<assistant>a b"
    assert await prompt(*turns, continue_final_message=False) == "<user>q<assistant>a b <bot>"
    assert await prompt(*turns, add_generation_prompt=True) == "<user>q<assistant>a b <bot>"
    assert await prompt(*turns, add_generation_prompt=False) == "<user>q<assistant>a b "
    assert await prompt(("user", "Once upon"), continue_final_message=True) == "<user>Once upon"
    wrong = {"messages": [{"role": "user", "content": "q"}], "continue_final_message": True}
    assert "exclude each other" in await worker.error(CHAT, wrong | {"add_generation_prompt": True})
    empty = {"messages": [{"role": "user", "content": ""}], "continue_final_message": True}
    assert "needs a last message with text" in await worker.error(CHAT, empty)


async def test_only_arguments_that_the_template_reads_may_be_given(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate(
        {"default": "{{ bos_token }}{{ style or 'plain' }}: {{ messages[0].content }}"}, {"bos_token": "<s>"}
    )
    monkeypatch.setattr(worker.services, "chat_template", template)

    async def shown(**arguments: Any) -> str:
        asked = body("hi", chat_template_kwargs=arguments)
        return str((await worker.answer("/chat_tokenize", asked))["templated_text"])

    assert await shown() == "<s>plain: hi"
    assert await shown(style="bold") == "<s>bold: hi"
    assert await shown(enable_thinking=False) == "<s>plain: hi"
    for name in ("messages", "bos_token", "tokenize", "add_generation_prompt", "raise_exception", "other"):
        response = await worker.post(CHAT, body(chat_template_kwargs={name: "x"}))
        assert response.status_code == 400
        assert response.json()["error"]["param"] == f"chat_template_kwargs.{name}"
        assert "it reads: `style`" in error_text(response.json())


async def test_logprobs_tell_each_tokens_own_text_and_bytes(worker: Worker) -> None:
    answer = await worker.answer(CHAT, body([{"type": "text", "text": "ä"}], max_tokens=13, logprobs=True))
    told = answer["choices"][0]["logprobs"]["content"]
    text = bytes(byte for each in told for byte in each["bytes"]).decode()
    assert text == text_of(answer) == "<user>ä<bot>"
    assert [each["bytes"] for each in told[6:8]] == [[0xC3], [0xA4]]
    stopped = await worker.answer(CHAT, body("abc", max_tokens=14, logprobs=True, stop=["c<bo"]))
    assert text_of(stopped) == "<user>ab"
    assert "".join(each["token"] for each in stopped["choices"][0]["logprobs"]["content"]) == "<user>abc<bo"


async def test_stop_tokens_minimum_and_ignored_ends_are_honoured(worker: Worker) -> None:
    answer = await worker.answer(CHAT, body("a</s>", max_tokens=20, ignore_eos=True))
    assert answer["usage"]["completion_tokens"] == 20
    assert text_of(answer).startswith("<user>a<bot>")
    stopped = await worker.answer(CHAT, body("ab", stop_token_ids=[FIRST_BYTE + ord("a") - ord("!")]))
    assert stopped["usage"]["completion_tokens"] == 7
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert "`min_new_tokens` must be <=" in await worker.error(CHAT, body(min_tokens=9, max_tokens=3))


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
        {"response_format": {"type": "json", "value": {"properties": {}}}},
        {"audio": {"voice": "x"}},
        {"modalities": ["text", "audio"]},
        {"functions": [{}]},
        {"function_call": "auto"},
        {"web_search_options": {}},
        {"chat_template": "{{ messages }}"},
        {"guided_whitespace_pattern": " *"},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_honoured_is_refused(worker: Worker, field: dict[str, Any], stream: bool) -> None:
    message = await worker.error(CHAT, body(stream=stream, **field))
    assert "not support" in message


@pytest.mark.parametrize(
    "field",
    [
        {"tools": []},
        {"tools": [TOOL], "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"user": "me"},
        {"metadata": {"a": "b"}, "store": True, "service_tier": "auto", "verbosity": "low"},
        {"prompt_cache_key": "k", "safety_identifier": "s", "prediction": {"type": "content", "content": "x"}},
        {"stream_options": {"include_obfuscation": True}},
        {"messages": [{"role": "user", "content": "abc", "refusal": None, "annotations": [], "audio": None}]},
    ],
)
async def test_what_changes_nothing_is_accepted(worker: Worker, field: dict[str, Any]) -> None:
    assert text_of(await worker.answer(CHAT, body(max_tokens=14, **field))) == PROMPT


async def test_a_template_that_refuses_is_a_template_error(
    start_worker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker: Worker = await start_worker()
    strict = ChatTemplate({"default": "{{ raise_exception('roles must alternate') }}"}, {})
    monkeypatch.setattr(worker.services, "chat_template", strict)
    for stream in (False, True):
        response = await worker.post(CHAT, body(stream=stream))
        assert response.status_code == 422
        assert error_text(response.json()) == "Template error: roles must alternate"
        assert response.json()["error_type"] == response.json()["error"]["code"] == "template_error"
    monkeypatch.setattr(worker.services, "chat_template", None)
    assert (await worker.error(CHAT, body())).startswith("Template error: this model has no chat template")


async def test_a_template_that_once_was_slow_is_rendered_in_a_thread(worker: Worker) -> None:
    class Watched(ChatTemplate):
        def render(self, *arguments: Any, **more: Any) -> str:
            threads.append(threading.current_thread() is threading.main_thread())
            time.sleep(0.06 if len(threads) == 2 else 0)
            return super().render(*arguments, **more)

    threads: list[bool] = []
    worker.services.chat_template = Watched({"default": "{{ messages[0].content }}"}, {})
    for text in ("short", "short", "short", "short"):
        answer = await worker.answer("/chat_tokenize", body(text))
        assert answer["templated_text"] == "short"
    assert threads == [True, True, False, False]
    worker.services.slow_template = False
    await worker.answer("/chat_tokenize", body("long" * 2000))
    assert threads[-1] is False


async def test_messages_are_needed(worker: Worker) -> None:
    response = await worker.post(CHAT, {"messages": []})
    assert error_text(response.json()) == "Input validation error: `messages` cannot be empty"
    response = await worker.post(CHAT, {"messages": [{"role": "user"}]})
    assert response.status_code == 422
    assert "a message needs `content` or `tool_calls`" in response.text


async def test_two_contradicting_limits_are_rejected(worker: Worker) -> None:
    response = await worker.post(CHAT, body(max_tokens=3, max_completion_tokens=4))
    assert response.status_code == 422
    assert "duplicate field `max_tokens`" in response.text


async def test_headers_of_chat_tell_counts(worker: Worker) -> None:
    response = await worker.post(CHAT, body(max_tokens=3, n=2))
    assert response.headers["x-compute-characters"] == "14"
    assert response.headers["x-generated-tokens"] == "6"
    streamed = await worker.post(CHAT, body(max_tokens=3, stream=True))
    assert streamed.headers["x-compute-characters"] == "14"


async def test_an_engine_that_cannot_sample_refuses_what_does(start_worker: Callable[..., Any]) -> None:
    features = ECHO_CAPABILITIES.features - {"sampling"}
    worker: Worker = await start_worker(
        EchoBackend(byte_toy(), capabilities=replace(ECHO_CAPABILITIES, features=features))
    )
    assert "does not support `sampling`" in await worker.error(CHAT, body(temperature=0.5))
    await worker.answer(CHAT, body(max_tokens=1))
