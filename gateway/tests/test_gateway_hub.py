"""Model folders and downloads, against a small hub of our own."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import fake_hub as hubs
import pytest
from fake_hub import WANTED, WEIGHTS, Hub, download, folder_of, start_download

from tgi_gateway import hub
from tgi_gateway.backend import WeightFormat
from tgi_gateway.cli import main
from tgi_gateway.errors import ModelError
from tgi_gateway.settings import Settings


@pytest.fixture
def fake_hub() -> Iterator[Hub]:
    with hubs.fake_hub() as made:
        yield made


def test_a_download_has_what_a_model_needs_and_no_pickles(fake_hub: Hub, tmp_path: Path) -> None:
    folder = folder_of(download(fake_hub, tmp_path, HF_HUB_ENABLE_HF_TRANSFER="1"))  # as TGI's images set it
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == WANTED
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert folder.is_relative_to(tmp_path)


def test_a_second_download_fetches_nothing_and_works_without_the_hub(fake_hub: Hub, tmp_path: Path) -> None:
    folder = folder_of(download(fake_hub, tmp_path))
    fake_hub.fetched.clear()
    assert folder_of(download(fake_hub, tmp_path)) == folder
    assert fake_hub.fetched == []
    assert folder_of(download("http://127.0.0.1:1", tmp_path)) == folder
    assert folder_of(download("http://127.0.0.1:1", tmp_path, HF_HUB_OFFLINE="1")) == folder


def test_a_broken_transfer_goes_on_where_it_stopped(fake_hub: Hub, tmp_path: Path) -> None:
    big = WEIGHTS * 24  # the hub's library writes in pieces of 10 MB
    fake_hub.files["model.safetensors"] = big
    fake_hub.break_at = [15_000_000, 1_000]
    folder = folder_of(download(fake_hub, tmp_path))
    assert (folder / "model.safetensors").read_bytes() == big
    assert fake_hub.ranges == ["", "bytes=10485760-", "bytes=10485760-"]


def test_a_download_that_was_killed_goes_on_in_the_next_run(fake_hub: Hub, tmp_path: Path) -> None:
    big = WEIGHTS * 24
    fake_hub.files["model.safetensors"] = big
    fake_hub.stall_at = 15_000_000
    with start_download(fake_hub, tmp_path) as process:
        deadline = time.monotonic() + 60
        while sum(path.stat().st_size for path in tmp_path.rglob("*.incomplete")) < 10_485_760:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in told
    fake_hub.stall_at = None
    folder = folder_of(download(fake_hub, tmp_path))
    assert (folder / "model.safetensors").read_bytes() == big
    if not version("huggingface-hub").startswith("1."):  # which fetches the one file again from its beginning
        assert fake_hub.ranges[-1].startswith("bytes=10485760")


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(fake_hub: Hub, tmp_path: Path) -> None:
    fake_hub.busy = 1
    folder_of(download(fake_hub, tmp_path))


def test_a_gated_model_needs_the_token_of_who_accepted(fake_hub: Hub, tmp_path: Path) -> None:
    fake_hub.token = "hf_good"
    for token in ({}, {"HF_TOKEN": "hf_bad"}):
        result = download(fake_hub, tmp_path, file_limit=None, **token)
        assert result.returncode == 1
        assert f"Accept its terms at {fake_hub.url}/org/model and set HF_TOKEN" in result.stderr
        assert "hf_bad" not in result.stderr
        assert "Traceback" not in result.stderr
    folder_of(download(fake_hub, tmp_path, HF_TOKEN="hf_good"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["org/nothing"], "there is no model `org/nothing`"),
        (["org/private"], "set HF_TOKEN if it is private"),
        (["org/model", "--revision", "v9"], "the model `org/model` has no revision `v9`"),
        (["/no/such/folder"], "neither a folder that exists nor a hub id"),
    ],
)
def test_what_cannot_be_found_is_told_with_the_next_step(
    fake_hub: Hub, tmp_path: Path, arguments: list[str], text: str
) -> None:
    result = download(fake_hub, tmp_path, *arguments)
    assert result.returncode == 1
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_an_incomplete_model_is_refused_before_anything_is_fetched(fake_hub: Hub, tmp_path: Path) -> None:
    for name in ("model.safetensors", "consolidated.safetensors", "config.json"):
        del fake_hub.files[name]
    result = download(fake_hub, tmp_path)
    assert result.returncode == 1
    assert "has no config.json, no *.safetensors weights" in result.stderr
    assert fake_hub.fetched == []


def test_offline_without_a_cache_is_told(fake_hub: Hub, tmp_path: Path) -> None:
    result = download(fake_hub, tmp_path, HF_HUB_OFFLINE="1")
    assert result.returncode == 1
    assert "HF_HUB_OFFLINE forbids asking the hub" in result.stderr


def test_a_cache_that_cannot_be_written_is_told(fake_hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = str(tmp_path / "file" / "cache")
    result = download(fake_hub, tmp_path, "org/model", "--huggingface-hub-cache", cache)
    assert result.returncode == 1
    assert f"cannot write the download to {cache}: Not a directory" in result.stderr


# Local folders.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


def resolve(*argv: str, weights: tuple[WeightFormat, ...] = ("safetensors",), tokenizer: bool = True) -> Path:
    return hub.resolve(Settings.parse(argv, {}, flags_of=lambda _: ()), needs=hub.Needs(weights, tokenizer))


def test_a_complete_folder_is_taken_as_it_is(folder: Path) -> None:
    assert resolve("--model-id", str(folder)) == folder
    assert resolve("--model-id", "org/model", "--weights-cache-override", str(folder)) == folder


def test_a_file_is_a_model_for_engines_that_read_such_files(folder: Path) -> None:
    file = folder / "model.gguf"
    file.write_bytes(b"")
    assert resolve("--model-id", str(file), weights=("safetensors", "gguf")) == file.resolve()
    others: list[tuple[Path, tuple[WeightFormat, ...]]] = [
        (file, ("safetensors",)),
        (folder / "model.safetensors", ("safetensors", "gguf")),
    ]
    for path, weights in others:
        with pytest.raises(ModelError, match=r"is a file\. This backend serves model folders"):
            resolve("--model-id", str(path), weights=weights)


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer.json"),
        ("model.safetensors", "has no *.safetensors weights"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused(folder: Path, missing: str, text: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=re.escape(f"{folder} {text}")):
        resolve("--model-id", str(folder))


def test_a_folder_that_lacks_a_shard_names_it(folder: Path) -> None:
    weight_map = {"a": "model.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"first model-2\.safetensors"):
        resolve("--model-id", str(folder))


def test_pickled_weights_are_refused_with_the_way_to_convert_them(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="Convert them once"):
        resolve("--model-id", str(folder))


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_broken_config_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, "latin-1")
    with pytest.raises(ModelError, match=r"config\.json .*Download the model again"):
        resolve("--model-id", str(folder))


def test_only_a_tokenizer_is_needed_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert resolve("--model-id", str(folder), weights=()) == folder
    (folder / "config.json").unlink()
    assert resolve("--model-id", str(folder), weights=()) == folder


@pytest.mark.parametrize(
    ("weights", "tokenizer", "text"),
    [
        (("safetensors",), True, "has no tokenizer.json, no config.json, no *.safetensors weights. Name a folder"),
        (("gguf",), True, "has no tokenizer.json, no *.gguf weights. Name"),
        (("gguf", "safetensors"), False, "has no config.json, no *.gguf or *.safetensors weights. Name"),
        ((), True, "has no tokenizer.json. Name"),
    ],
)
def test_all_that_a_folder_lacks_is_told_at_once(
    tmp_path: Path, weights: tuple[WeightFormat, ...], tokenizer: bool, text: str
) -> None:
    with pytest.raises(ModelError, match=re.escape(f"{tmp_path} {text}")):
        resolve("--model-id", str(tmp_path), weights=weights, tokenizer=tokenizer)


def test_a_tokenizer_that_the_plugin_prepares_is_not_asked_for(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert resolve("--model-id", str(folder), tokenizer=False) == folder
    (folder / "model.safetensors").unlink()
    assert resolve("--model-id", str(folder), weights=(), tokenizer=False) == folder


def test_random_weights_need_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert resolve("--model-id", str(folder), "--load-format", "dummy") == folder
    (folder / "tokenizer.json").unlink()
    assert resolve("--model-id", str(folder), "--load-format", "dummy") == folder
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer.json"):
        resolve("--model-id", str(folder), "--load-format", "dummy")


GGUF = {
    "model-Q4_K_M.gguf": b"four bits",
    "model-Q8_0.gguf": b"eight bits",
    "f16/model-f16-00001-of-00002.gguf": b"first",
    "f16/model-f16-00002-of-00002.gguf": b"second",
    "mmproj-model.gguf": b"eyes",
}


@pytest.mark.parametrize(
    ("choice", "fetched"),
    [
        ("Q8_0", ["model-Q8_0.gguf"]),
        ("q4_k_m", ["model-Q4_K_M.gguf"]),
        ("model-Q8_0.gguf", ["model-Q8_0.gguf"]),
        ("f16", ["f16/model-f16-00001-of-00002.gguf", "f16/model-f16-00002-of-00002.gguf"]),
    ],
)
def test_a_gguf_file_is_chosen_by_type_or_name(fake_hub: Hub, tmp_path: Path, choice: str, fetched: list[str]) -> None:
    fake_hub.files |= GGUF
    path = folder_of(download(fake_hub, tmp_path, f"org/model:{choice}"))
    assert path.read_bytes() == GGUF[fetched[0]]
    assert sorted(fake_hub.fetched) == fetched
    offline = download("http://127.0.0.1:1", tmp_path, f"org/model:{choice}", HF_HUB_OFFLINE="1")
    assert folder_of(offline) == path


def test_a_choice_that_fits_nothing_lists_what_there_is(fake_hub: Hub, tmp_path: Path) -> None:
    fake_hub.files |= GGUF
    result = download(fake_hub, tmp_path, "org/model:Q2_K")
    assert result.returncode == 1
    assert "has no GGUF file for `Q2_K`" in result.stderr
    assert "model-Q8_0" in result.stderr
    assert fake_hub.fetched == []


def test_gguf_files_are_taken_from_folders_too(tmp_path: Path) -> None:
    for name in ("a-Q4_K_M.gguf", "a-Q8_0.gguf"):
        (tmp_path / name).touch()
    both: tuple[WeightFormat, ...] = ("gguf", "safetensors")
    assert resolve("--model-id", f"{tmp_path}:q8_0", weights=both) == tmp_path / "a-Q8_0.gguf"
    assert resolve("--model-id", str(tmp_path / "a-Q8_0.gguf"), weights=both) == tmp_path / "a-Q8_0.gguf"
    assert resolve("--model-id", str(tmp_path), weights=both, tokenizer=False) == tmp_path
    with pytest.raises(ModelError, match=r"has no tokenizer\.json\. Name"):
        resolve("--model-id", str(tmp_path), weights=both)
    with pytest.raises(ModelError, match="served by --backend llamacpp"):
        resolve("--model-id", str(tmp_path / "a-Q8_0.gguf"))


def test_convert_says_who_could_write_a_format(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["convert", "--to", "papyrus", "model", str(tmp_path / "out")]) == 1
    assert "no installed backend writes `papyrus`" in capsys.readouterr().err
