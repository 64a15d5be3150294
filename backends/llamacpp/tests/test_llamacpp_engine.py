"""The llama.cpp engine: the model's own answers, under pressure, with adapters, from every kind of file."""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tgi_backend_llamacpp.convert import convert
from tgi_backend_llamacpp.gguf_file import read_gguf
from tgi_backend_llamacpp.options import LlamaOptions
from tgi_backend_llamacpp.plugin import create, prepare
from tgi_gateway.backend import EngineOptions
from tgi_gateway.errors import ModelError, SettingsError
from tgi_gateway.hub import demo_model
from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_gateway.types import Failed, Finished, Request, SamplingParams, StopRules
from tgi_model_server.stepped import SteppedBackend
from tgi_model_server.testing.client import Client

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: see `make test`")

QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def options(path: Path, **changes: Any) -> EngineOptions:
    extra = {"n_threads": 1, **changes.pop("extra", {})}
    sizes = {"max_total_tokens": 512, "max_batch_size": 4, "max_batch_total_tokens": 2048}
    return EngineOptions(path, "test", extra=extra, **(sizes | changes))


def serving(path: Path, **changes: Any) -> AbstractAsyncContextManager[Client]:
    backend = create(options(path, **changes))
    assert isinstance(backend, SteppedBackend)
    return Client.serving(backend)


def ask(text: str) -> tuple[int, ...]:
    return tuple(Tokenizer.from_folder(demo_model()).encode(text).ids)


def greedy(request_id: int, prompt: tuple[int, ...], new: int, **more: Any) -> Request:
    return Request(request_id, prompt, SamplingParams(), StopRules(new, ignore_eos=True), logprobs=True, **more)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
async def test_a_converted_model_knows_what_the_model_knows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"{kind}.gguf"
    convert(demo_model(), path, kind)
    async with serving(path) as client:
        prompt = ask(QUESTION)
        client.backend.submit(Request(1, prompt, SamplingParams(), StopRules(30)))
        await client.until(lambda: 1 in client.ends)
        end = client.ends[1]
        assert isinstance(end, Finished)
        assert end.reason == "eos_token"
        assert Tokenizer.from_folder(demo_model()).decode(client.tokens[1]) == "The capital of France is Paris."


async def test_log_probabilities_are_those_of_the_torch_engine(demo_gguf: Path) -> None:
    from tgi_backend_cpu.device import CpuDevice
    from tgi_backend_cpu.plugin import CAPABILITIES
    from tgi_model_server.backend import TorchBackend

    prompt = ask("Once upon a time there was a little girl who lived in a house near the wood. She had a red ball and")
    async with serving(demo_gguf) as client:
        ours = await client.run(greedy(1, prompt, 8, prefill_logprobs=True, prefill_top_n_tokens=3))
        end = client.ends[1]
    torch_backend = TorchBackend(lambda: CpuDevice(threads=1), options(demo_model(), extra={}), CAPABILITIES)
    other = Client(torch_backend)
    other.info = await torch_backend.start(other.emit)
    theirs = await other.run(greedy(1, prompt, 8, prefill_logprobs=True, prefill_top_n_tokens=3))
    await torch_backend.stop(0.0)
    assert ours == theirs
    assert client.scores[1] == pytest.approx(other.scores[1], abs=0.05)
    expected = other.ends[1]
    assert isinstance(end, Finished)
    assert isinstance(expected, Finished)
    assert math.isnan(end.prefill_logprobs[0])
    assert end.prefill_logprobs[1:] == pytest.approx(expected.prefill_logprobs[1:], abs=0.1)
    tops = [[[value for _, value in top] for top in told.prefill_top] for told in (end, expected)]
    assert tops[0] == [pytest.approx(top, abs=0.1) for top in tops[1]]
    assert [top[0][0] for top in end.prefill_top[1:]] == [top[0][0] for top in expected.prefill_top[1:]]


async def test_more_requests_than_the_cache_holds_are_preempted_and_answered(demo_gguf: Path) -> None:
    prompts = [
        ask(f"Tell me a story about {what}. ") for what in ("a dog", "a cat", "the moon", "rain", "a boat", "bread")
    ]
    async with serving(demo_gguf, max_batch_total_tokens=512, max_total_tokens=400) as client:
        alone = [await client.run(greedy(number, prompt, 180)) for number, prompt in enumerate(prompts)]
        together = await client.run(*(greedy(10 + number, prompt, 180) for number, prompt in enumerate(prompts)))
        assert client.backend.capacity().preemptions > 0
        assert [len(tokens) for tokens in together] == [180] * len(prompts)
        # llama.cpp adds up in another order in a batch, so answers may part somewhere, but not at once.
        assert sum(one[0][:20] == other[:20] for one, other in zip(alone, together, strict=True)) >= 4
        assert client.backend.capacity().free_kv_tokens == client.backend.capacity().total_kv_tokens


async def test_many_short_lived_prefixes_do_not_run_out_of_sequences(demo_gguf: Path) -> None:
    async with serving(demo_gguf, max_batch_size=2) as client:
        for number in range(30):
            first = number * 7 % 3000 + 100
            await client.run(greedy(number, tuple(range(first, first + 70)), 2))
        end = client.ends[29]
        assert isinstance(end, Finished)
        await client.run(greedy(100, tuple(range(29 * 7 + 100, 29 * 7 + 170)), 2))
        again = client.ends[100]
        assert isinstance(again, Finished)
        assert again.usage.cached_tokens == 64


def save_adapter(path: Path, strength: float) -> Path:
    """A LoRA adapter that moves the output of the last feed-forward layer."""
    hidden, inner, rank = 256, 512, 4
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", rank)
    writer.add_tensor("blk.5.ffn_down.weight.lora_a", rng.standard_normal((rank, inner)).astype(np.float32))
    writer.add_tensor(
        "blk.5.ffn_down.weight.lora_b", (strength * rng.standard_normal((hidden, rank))).astype(np.float32)
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


async def test_each_request_has_its_own_adapter_in_one_batch(demo_gguf: Path, tmp_path: Path) -> None:
    adapters = (
        f"none={save_adapter(tmp_path / 'none.gguf', 0.0)}",
        f"strong={save_adapter(tmp_path / 'strong.gguf', 0.5)}",
    )
    prompt = ask(QUESTION)
    async with serving(demo_gguf, lora_adapters=adapters) as client:
        [plain] = await client.run(greedy(1, prompt, 8))
        [strong] = await client.run(greedy(2, prompt, 8, adapter_id="strong"))
        assert strong != plain
        together = await client.run(
            greedy(3, prompt, 8),
            greedy(4, prompt, 8, adapter_id="strong"),
            greedy(5, prompt, 8, adapter_id="none", prefill_logprobs=True),
        )
        assert together == [plain, strong, plain]
        await client.run(greedy(6, prompt, 8, adapter_id="unknown"))
        end = client.ends[6]
        assert isinstance(end, Failed)
        assert "there is no adapter `unknown`; loaded with --lora-adapters: none, strong" in end.message


async def test_a_quantized_cache_answers(demo_gguf: Path) -> None:
    async with serving(demo_gguf, extra={"type_k": "q8_0", "type_v": "q4_0"}) as client:
        [tokens] = await client.run(Request(1, ask(QUESTION), SamplingParams(), StopRules(30)))
        assert "Paris" in Tokenizer.from_folder(demo_model()).decode(tokens)


async def test_plain_attention_without_a_mapped_file_answers(demo_gguf: Path) -> None:
    async with serving(demo_gguf, extra={"disable_flash_attention": True, "disable_mmap": True}) as client:
        [tokens] = await client.run(Request(1, ask(QUESTION), SamplingParams(), StopRules(30)))
        assert "Paris" in Tokenizer.from_folder(demo_model()).decode(tokens)


def renamed(source: Path, path: Path) -> Path:
    """A sound file with a tensor that the model does not have, and without one that it needs."""
    path.write_bytes(source.read_bytes().replace(b"blk.3.attn_q.weight", b"blk.3.attn_X.weight"))
    read_gguf(path)
    return path


async def test_a_file_that_llama_cpp_cannot_use_is_named(demo_gguf: Path, tmp_path: Path) -> None:
    backend = create(options(renamed(demo_gguf, tmp_path / "other.gguf")))
    with pytest.raises(ModelError, match=r"llama\.cpp cannot load .*other\.gguf"):
        await backend.start(lambda _events: None)


def test_a_safetensors_model_is_converted_once(tmp_path: Path) -> None:
    wanted = options(demo_model(), extra={"gguf_cache": str(tmp_path / "cache"), "gguf_type": "q8_0"})
    files = prepare(wanted, tmp_path / "one")
    assert files.tokenizer == demo_model()
    made = files.model.stat().st_mtime_ns
    assert prepare(wanted, tmp_path / "two").model.stat().st_mtime_ns == made
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".gguf"]


def test_a_file_brings_its_tokenizer_or_is_given_one(demo_gguf: Path, tmp_path: Path) -> None:
    alone = prepare(options(demo_gguf), tmp_path)
    assert alone.model == demo_gguf
    assert Tokenizer.from_folder(alone.tokenizer).encode("hello").ids == list(ask("hello"))
    beside = prepare(options(demo_model(), extra={"model_gguf": str(demo_gguf)}), tmp_path)
    assert (beside.model, beside.tokenizer) == (demo_gguf, demo_model())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quantize": "gptq"}, "--quantize is not for the llamacpp backend"),
        ({"num_shard": 2}, "use --split-mode"),
        ({"max_batch_size": 500}, "can do 255 sequences"),
        ({"extra": {"n_threads": -3}}, "--n-threads is -3"),
        ({"extra": {"split_mode": "sideways"}}, "allowed are none, layer, row"),
        ({"extra": {"disable_flash_attention": True, "type_v": "q8_0"}}, "needs flash attention"),
    ],
)
def test_options_that_llama_cpp_lacks_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        LlamaOptions.of(options(Path("model.gguf"), **changes))


def test_the_flags_of_tgi_mean_what_they_meant() -> None:
    extra = {
        "n_threads": 3,
        "split_mode": "1",
        "n_gpu_layers": -1,
        "use_mlock": True,
        "max_physical_batch_total_tokens": 64,
    }
    found = LlamaOptions.of(options(Path("model.gguf"), extra=extra))
    assert (found.threads, found.threads_batch) == (3, 3)
    assert (found.split_mode, found.main_gpu, found.gpu_layers) == ("none", 1, -1)
    assert (found.mlock, found.mmap, found.physical_tokens) == (True, True, 64)


def test_the_engine_runs_without_torch() -> None:
    code = (
        "import sys, tgi_backend_llamacpp.engine, tgi_backend_llamacpp.convert, tgi_backend_llamacpp.prepare; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_plugin_describes_itself_without_native_code() -> None:
    code = (
        "import sys, tgi_backend_llamacpp.plugin as p; b = p.tgi_backend(); assert b.name == 'llamacpp'; "
        "assert b.missing() is None; assert not {'llama_cpp', 'numpy', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
