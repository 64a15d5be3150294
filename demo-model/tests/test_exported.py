"""The exported model: loads in transformers, keeps any text, renders every role, and answers."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import curriculum
import tgi_demo_model
from evaluate import Candidate
from lessons.rendering import CHAT_TEMPLATE, START_OF_TURN, segments

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def candidate() -> Iterator[Candidate]:
    # So small a model is fastest on one thread, above all when the cores are shared with other tests.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Candidate(tgi_demo_model.model_path(), torch.float32, batch=16)
    torch.set_num_threads(threads)


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_the_files_are_small_and_complete() -> None:
    folder = tgi_demo_model.model_path()
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors",
    } <= names
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16 * 2**20


def test_a_missing_model_says_how_to_make_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tgi_demo_model, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"train\.py"):
        tgi_demo_model.model_path()


def test_the_model_is_a_small_llama(candidate: Candidate) -> None:
    assert type(candidate.model).__name__ == "LlamaForCausalLM"
    assert 3e6 <= sum(weight.numel() for weight in candidate.model.parameters()) <= 8e6
    config = candidate.model.config
    assert (config.max_position_embeddings, config.vocab_size, config.head_dim) == (4096, 4096, 64)
    assert config.eos_token_id == [
        candidate.tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")
    ]


def test_the_tokenizer_keeps_any_text(candidate: Candidate) -> None:
    rng = random.Random(0)
    texts = ["", " two  spaces ", "tab\tnew\n\nlines\r\n", "naïve café — ½ 🦊🏽 汉字 العربية \u0000", "3.14 1234567"]
    texts += [
        "".join(
            chr(rng.choice((rng.randint(1, 127), rng.randint(160, 0xD7FF), rng.randint(0x10000, 0x1FFFF))))
            for _ in range(40)
        )
        for _ in range(50)
    ]
    for text in texts:
        ids = candidate.tokenizer(text, add_special_tokens=True).input_ids
        assert candidate.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_digits_are_tokens_of_their_own(candidate: Candidate) -> None:
    assert [t for t in candidate.tokenizer.tokenize("x 4096+12") if t.isdigit()] == list("409612")


def test_tool_tags_stay_visible_in_decoded_text(candidate: Candidate) -> None:
    ids = candidate.tokenizer("<tool_call>\n{}\n</tool_call><|im_end|>").input_ids
    assert candidate.tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>\n{}\n</tool_call>"


def test_the_template_renders_what_was_trained(candidate: Candidate) -> None:
    rng = random.Random(1)
    for task in curriculum.EXAMS:
        for _ in range(20):
            exchange = curriculum.EXAMS[task](rng)
            if exchange.messages[0]["role"] == "text":
                continue
            messages = [{"role": "system", "content": exchange.system}] * bool(exchange.system) + list(
                exchange.messages
            )
            shown = candidate.tokenizer.apply_chat_template(
                messages, tools=list(exchange.tools) or None, tokenize=False
            )
            assert (
                shown
                == "".join(text for text, _ in segments(exchange.messages, exchange.tools, exchange.system)) + "\n"
            )


def test_the_template_takes_arguments_as_text_or_as_an_object(candidate: Candidate) -> None:
    def shown(arguments: Any) -> str:
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
        messages = [
            _user("?"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "3"},
        ]
        return str(candidate.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    assert shown({"a": 1, "b": 2}) == shown(json.dumps({"a": 1, "b": 2}))
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>' in shown({"a": 1, "b": 2})
    assert "<tool_response>\n3\n</tool_response>" in shown({})
    assert shown({}).endswith(f"{START_OF_TURN}assistant\n")


def test_the_template_takes_text_parts_and_a_tool_without_parameters(candidate: Candidate) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]}]
    tools = [{"type": "function", "function": {"name": "ping"}}]
    shown = candidate.tokenizer.apply_chat_template(parts, tools=tools, tokenize=False)
    assert "Hello there" in shown
    assert '{"name": "ping", "parameters": {}}' in shown
    assert candidate.tokenizer.chat_template == CHAT_TEMPLATE


FIXED = (
    ("What is the capital of France?", "Paris"),
    ("What is 2 + 3?", "5"),
    ("Count from 3 to 7.", "3, 4, 5, 6, 7"),
    ("Sort these numbers: 9, 2, 5", "2, 5, 9"),
    ("Repeat: the quiet river sings", "the quiet river sings"),
    ("Hello!", "help you"),
    ("How many days are in a week?", "7"),
    ("What is the opposite of hot?", "cold"),
    ("Tell me a story about a fox in the forest.", "The end."),
    ("What is Deep Learning?", "neural networks"),
)


def test_simple_questions_get_sensible_answers(candidate: Candidate) -> None:
    prompts = [
        candidate.tokenizer.apply_chat_template([_user(question)], tokenize=False, add_generation_prompt=True)
        for question, _ in FIXED
    ]
    for (question, wanted), answer in zip(FIXED, candidate.answer(prompts), strict=True):
        assert wanted in answer, (question, answer)


def test_the_classic_first_request_gets_a_sensible_answer(candidate: Candidate) -> None:
    assert "neural networks" in candidate.answer(["What is Deep Learning?"])[0]


def test_a_question_for_a_tool_gets_a_call(candidate: Candidate) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    prompt = candidate.tokenizer.apply_chat_template(
        [_user("What is the weather in Paris?")], tools=[tool], tokenize=False, add_generation_prompt=True
    )
    wanted = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert candidate.answer([prompt]) == [wanted]
