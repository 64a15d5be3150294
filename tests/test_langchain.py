"""LangChain's own suite for chat models, with its OpenAI client pointed at running servers.

Most tests run on the demo model. Those that assert what the model says have an engine that says it, written down
beforehand: everything else, from prompt and grammar to parsed and streamed calls, is the server's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from servers import Server, run_server

from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_gateway.testing.recorded import HERMES
from tgi_gateway.testing.worker import EOS, write_byte_model

JOKE = {"setup": "Why did the cat sit on the computer?", "punchline": "To keep an eye on the mouse."}


def call(name: str, arguments: Mapping[str, object]) -> str:
    """A call as Hermes writes it."""
    told = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{told}\n</tool_call>"


WRITTEN = {
    "of magic_function(3)": call("magic_function", {"input": 3}),
    "of magic_function_no_args()": call("magic_function_no_args", {}),
    "你好啊集团": call("unicode_customer", {"customer_name": "你好啊集团", "description": "技术公司"}),
    "こんにちは株式会社": call("unicode_customer", {"customer_name": "こんにちは株式会社", "description": "会社"}),
    # Offered as a function, then as the answer's schema.
    "</tools><tool_call><user>Tell me a joke": call("Joke", JOKE),
    "joke about cats, no punchline": json.dumps(JOKE | {"punchline": None}),
    "joke about cats": json.dumps(JOKE),
}
"""What the prompt holds -> the answer to it."""
ABOUT_ANSWERS = (
    "test_tool_calling",
    "test_tool_calling_async",
    "test_tool_calling_with_no_arguments",
    "test_unicode_tool_call_integration",
    "test_structured_output",
    "test_structured_output_async",
    "test_structured_output_pydantic_2_v1",
    "test_structured_output_optional_param",
)
"""Tests that assert what the demo model does not know."""


@pytest.fixture(scope="module")
def written_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("written")
    write_byte_model(folder, HERMES)
    tokenizer = Tokenizer.from_folder(folder)
    scripts = [
        {"prompt": tokenizer.encode(prompt, False).ids, "tokens": tokenizer.encode(answer, False).ids}
        for prompt, answer in WRITTEN.items()
    ]
    script = folder / "script.json"
    script.write_text(json.dumps({"eos_token_ids": [EOS], "features": ["grammar"], "scripts": scripts}))
    with run_server(folder, "--backend", "scripted", "--model-id", str(folder), "--script", str(script)) as server:
        yield server


# LangChain keeps its connections from one test to the next, also in tests that use none.
@pytest.mark.asyncio(loop_scope="class")
@pytest.mark.filterwarnings("ignore::pytest.PytestWarning")
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings", "ignore:Received a Pydantic BaseModel V1 schema")
class TestChatOpenAI(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _served(self, request: pytest.FixtureRequest) -> None:
        written = request.node.originalname in ABOUT_ANSWERS
        server: Server = request.getfixturevalue("written_server" if written else "demo_server")
        self.url = f"{server.url}/v1"
        self.max_tokens = 400 if written else 60  # written answers have a token for each byte

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "base_url": self.url,
            "api_key": "unused",
            "model": "tgi",
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "stream_usage": True,
        }
