"""The clients people use, unchanged, against a running server with the demo model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from openai.types.chat import ChatCompletionMessageParam
from servers import Server, run_server

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its pydantic models are of an older style
    from text_generation import AsyncClient, Client

OLD_PYDANTIC = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
QUESTION: ChatCompletionMessageParam = {"role": "user", "content": "What is the capital of France?"}


@pytest.fixture(scope="session", params=["cpu", "llamacpp"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model, served by two unlike engines."""
    if request.param == "cpu":
        yield request.getfixturevalue("demo_server")
        return
    if find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: see `make test`")
    folder = tmp_path_factory.mktemp("llamacpp-server")
    cache = str(tmp_path_factory.mktemp("gguf-cache"))
    with run_server(folder, "--backend", "llamacpp", "--n-threads", "1", "--gguf-cache", cache) as it:
        yield it


def test_openai_chat_answers_whole(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        answer = client.chat.completions.create(model="tgi", messages=[QUESTION], max_tokens=40, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_openai_chat_streams_the_same_text_as_it_answers_whole(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        whole = client.chat.completions.create(model="tgi", messages=[QUESTION], max_tokens=40, temperature=0)
        stream = client.chat.completions.create(
            model="tgi",
            messages=[QUESTION],
            max_tokens=40,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage


def test_openai_completions_answer_each_prompt_at_its_index(server: Server) -> None:
    prompts = ["The capital of France is", "Once upon a time"]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        together = client.completions.create(model="tgi", prompt=prompts, max_tokens=12, temperature=0)
        alone = [client.completions.create(model="tgi", prompt=one, max_tokens=12, temperature=0) for one in prompts]
    assert [choice.index for choice in together.choices] == [0, 1]
    assert [choice.text for choice in together.choices] == [one.choices[0].text for one in alone]


def test_openai_lists_the_model(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        models = client.models.list().data
    assert [model.id for model in models] == [httpx.get(f"{server.url}/info").json()["model_id"]]


def test_openai_reads_our_validation_error(server: Server) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client,
        pytest.raises(openai.UnprocessableEntityError) as raised,
    ):
        client.chat.completions.create(model="tgi", messages=[QUESTION], max_tokens=10_000_000)
    assert raised.value.response.json()["error_type"] == "validation"


def test_openai_names_the_parameter_that_nobody_knows(server: Server) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client,
        pytest.raises(openai.BadRequestError) as raised,
    ):
        client.chat.completions.create(model="tgi", messages=[QUESTION], extra_body={"max_toknes": 3})
    assert (raised.value.param, raised.value.code) == ("max_toknes", "unknown_parameter")
    assert "did you mean `max_tokens`?" in raised.value.message
    assert raised.value.request_id


def test_openai_puts_a_stream_together_as_the_whole_answer(server: Server) -> None:
    ask: Any = {"model": "tgi", "messages": [QUESTION], "max_tokens": 40, "temperature": 0, "logprobs": True}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        whole = client.chat.completions.create(**ask)
        with client.chat.completions.stream(**ask) as stream:
            joined = stream.get_final_completion()
    assert joined.choices[0].message.role == "assistant"
    assert joined.choices[0].message.content == whole.choices[0].message.content
    assert joined.choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.choices[0].logprobs is not None
    told = whole.choices[0].logprobs.content or []
    text = b"".join(bytes(token.bytes or []) for token in told)
    assert (whole.choices[0].message.content or "") in text.decode()


def test_inference_client_generates_with_details_and_streams(server: Server) -> None:
    client = InferenceClient(base_url=server.url)
    whole = client.text_generation("The capital of France is", max_new_tokens=12, details=True)
    stream = list(client.text_generation("The capital of France is", max_new_tokens=12, details=True, stream=True))
    assert whole.details is not None
    assert [event.token.id for event in stream] == [token.id for token in whole.details.tokens]
    assert stream[-1].generated_text == whole.generated_text
    assert stream[-1].details is not None
    assert stream[-1].details.finish_reason == whole.details.finish_reason


def test_inference_client_chats(server: Server) -> None:
    client = InferenceClient(base_url=server.url)
    answer = client.chat_completion([dict(QUESTION)], max_tokens=40, temperature=0)
    stream = client.chat_completion([dict(QUESTION)], max_tokens=40, temperature=0, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert text == answer.choices[0].message.content


@OLD_PYDANTIC
def test_text_generation_client_generates_and_streams(server: Server) -> None:
    client = Client(server.url)
    whole = client.generate("The capital of France is", max_new_tokens=12)
    stream = list(client.generate_stream("The capital of France is", max_new_tokens=12))
    assert whole.details is not None
    assert stream[-1].generated_text == whole.generated_text
    assert len(stream) == whole.details.generated_tokens


@OLD_PYDANTIC
async def test_text_generation_async_client_keeps_seeds(server: Server) -> None:
    client = AsyncClient(server.url)
    ask = {"max_new_tokens": 20, "do_sample": True, "temperature": 1.5, "seed": 7}
    first = await client.generate("Once upon a time", **ask)
    second = await client.generate("Once upon a time", **ask)
    assert first.generated_text == second.generated_text
    assert first.details is not None
    assert first.details.seed == 7
