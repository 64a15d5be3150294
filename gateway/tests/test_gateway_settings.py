"""Settings: TGI's flags, variables, defaults and texts; one reader, frozen values, no secret shown."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from tgi_gateway.backend import Flag
from tgi_gateway.errors import PluginError, SettingsError
from tgi_gateway.settings import NO_EFFECT, Settings


def no_flags(backend: str) -> Sequence[Flag]:  # noqa: ARG001
    return ()


def parse(*argv: str, environ: Mapping[str, str] | None = None) -> Settings:
    return Settings.parse(argv, environ or {}, flags_of=no_flags)


def help_text() -> str:
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    return out.getvalue()


def test_defaults_are_tgis() -> None:
    settings = parse()
    expected: dict[str, Any] = {
        "max_concurrent_requests": 128,
        "max_best_of": 2,
        "max_stop_sequences": 4,
        "max_top_n_tokens": 5,
        "max_client_batch_size": 4,
        "validation_workers": 2,
        "hostname": "0.0.0.0",
        "port": 3000,
        "payload_limit": 2_000_000,
        "shutdown_timeout": 90,
        "waiting_served_ratio": 0.3,
        "max_waiting_tokens": 20,
        "prometheus_port": 9000,
        "cuda_memory_fraction": 1.0,
        "prefix_caching": True,
        "prefill_chunking": True,
        "backend": "cpu",
        "http_workers": None,
    }
    assert {name: getattr(settings, name) for name in expected} == expected
    assert settings.given == ()


def test_every_value_a_launcher_command_line_has_is_read() -> None:
    line = (
        "--model-id org/name --revision main --validation-workers 3 --sharded true --num-shard 2 --quantize gptq "
        "--speculate 2 --dtype float16 --kv-cache-dtype fp8_e5m2 --trust-remote-code --max-concurrent-requests 64 "
        "--max-best-of 3 --max-stop-sequences 5 --max-top-n-tokens 6 --max-input-tokens 1000 --max-total-tokens 2000 "
        "--waiting-served-ratio 1.2 --max-batch-prefill-tokens 1500 --max-batch-total-tokens 9000 "
        "--max-waiting-tokens 7 --max-batch-size 8 --cuda-graphs 1,2,4 --hostname 127.0.0.1 -p 8080 "
        "--prometheus-port 9001 --shard-uds-path /tmp/x --master-addr localhost --master-port 29501 "
        "--huggingface-hub-cache /data --weights-cache-override /w --disable-custom-kernels --cuda-memory-fraction 0.5 "
        "--rope-scaling dynamic --rope-factor 2.0 --json-output --otlp-endpoint http://o --otlp-service-name s "
        "--cors-allow-origin https://a --cors-allow-origin https://b --api-key k --watermark-gamma 0.4 "
        "--watermark-delta 1.5 --tokenizer-config-path t.json --disable-grammar-support --env "
        "--max-client-batch-size 9 --lora-adapters a,b=/p --usage-stats off --payload-limit 10 "
        "--enable-prefill-logprobs -g 5"
    )
    settings = parse(*line.split())
    assert settings.cuda_graphs == (1, 2, 4)
    assert settings.cors_allow_origin == ("https://a", "https://b")
    assert settings.lora_adapters == ("a", "b=/p")
    assert settings.port == 8080
    assert settings.shutdown_timeout == 5
    assert settings.trust_remote_code is True
    assert settings.env is True
    flags = {word for word in line.split() if word.startswith("-")}
    assert len(settings.given) == len(flags)


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("MODEL_ID", "org/m", "model_id", "org/m"),
        ("PORT", "80", "port", 80),
        ("TRUST_REMOTE_CODE", "true", "trust_remote_code", True),
        ("JSON_OUTPUT", "0", "json_output", False),
        ("PREFIX_CACHING", "0", "prefix_caching", False),
        ("PREFILL_CHUNKING", "false", "prefill_chunking", False),
        ("CUDA_GRAPHS", "0", "cuda_graphs", (0,)),
        ("CORS_ALLOW_ORIGIN", "https://a,https://b", "cors_allow_origin", ("https://a", "https://b")),
        ("HF_TOKEN", "t", "hf_token", "t"),
        ("HF_API_TOKEN", "t", "hf_token", "t"),
        ("MAX_INPUT_LENGTH", "12", "max_input_tokens", 12),
        ("HOSTNAME", "::1", "hostname", "::1"),
        ("HOSTNAME", "3f2a9c", "hostname", "0.0.0.0"),
        ("PORT", "", "port", 3000),
        ("ENV", "production", "env", False),
    ],
)
def test_a_variable_sets_its_flag(variable: str, text: str, name: str, value: object) -> None:
    assert getattr(parse(environ={variable: text}), name) == value


def test_the_command_line_wins_over_the_environment() -> None:
    settings = parse("--port", "1", "--prefix-caching", "true", environ={"PORT": "2", "PREFIX_CACHING": "0"})
    assert (settings.port, settings.prefix_caching) == (1, True)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (
            "--max-input-tokens 5 --max-input-length 6",
            "Both `max_input_tokens` (5) and `max_input_length` (6) are set. Set only `max_input_tokens`; "
            "`max_input_length` is its older name",
        ),
        ("--max-input-tokens 9 --max-total-tokens 9", "`max_input_tokens`(9) must be < `max_total_tokens`(9)"),
        (
            "--max-total-tokens 10 --max-batch-total-tokens 9",
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 10 and 9",
        ),
        (
            "--max-batch-prefill-tokens 10 --max-batch-total-tokens 9",
            "`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: 10 and 9",
        ),
        (
            "--prefill-chunking false --max-batch-prefill-tokens 10 --max-input-tokens 20",
            "`max_batch_prefill_tokens` must be >= `max_input_tokens`. Given: 10 and 20",
        ),
        ("--validation-workers 0", "`validation_workers` must be > 0"),
        ("--max-batch-size 0", "`max_batch_size` must be > 0"),
        ("--sharded true --num-shard 1", "`sharded` is true but `num_shard` <= 1"),
        ("--num-shard 0", "`num_shard` cannot be < 1"),
        ("--quantize exl2 --num-shard 2", "Sharding is currently not supported with `exl2` quantization"),
        ("--lora-adapters a@b@c", "Invalid LoRA adapter format: a@b@c"),
        ("--dtype int8", "`--dtype` is 'int8'; allowed: float16 | bfloat16 | float32"),
        ("--port 70000", "`--port` is '70000'; allowed: a whole number from 0 to 65535"),
        ("--max-best-of -1", "`--max-best-of` is '-1'; allowed: a whole number of at least 1"),
        ("--cuda-memory-fraction nan", "`--cuda-memory-fraction` is 'nan'; allowed: a number above 0, at most 1"),
        ("--prefix-caching maybe", "`--prefix-caching` is 'maybe'; allowed: true or false"),
        ("--max-inputs-tokens 3", "there is no flag `--max-inputs-tokens`; did you mean `--max-input-tokens`?"),
        ("--zzz", "there is no flag `--zzz`; `tgi-gateway --help` lists every flag"),
        ("sreve", "'sreve' is neither a command nor the value of a flag"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(argv: str, text: str) -> None:
    with pytest.raises(SettingsError) as error:
        parse(*argv.split())
    assert str(error.value) == f"Invalid argument: {text}"
    assert error.value.exit_code == 2


def test_a_wrong_variable_is_named_as_a_variable() -> None:
    with pytest.raises(SettingsError, match=r"`PORT` is 'http'; allowed: a whole number from 0 to 65535"):
        parse(environ={"PORT": "http"})
    with pytest.raises(SettingsError, match="`LOG_LEVEL` is 'loud'"):
        parse(environ={"LOG_LEVEL": "loud"})


def test_an_abbreviated_flag_is_an_error() -> None:
    with pytest.raises(SettingsError, match="did you mean `--model-id`"):
        parse("--model", "x")


@pytest.mark.parametrize("argv", ["--ngrok", "--ngrok-authtoken t", "--ngrok-edge e"])
def test_ngrok_is_refused_with_the_way_out(argv: str) -> None:
    with pytest.raises(SettingsError, match="reverse proxy"):
        parse(*argv.split())


def test_secrets_show_nowhere_but_in_the_childs_document() -> None:
    settings = parse("--api-key", "s3cret", environ={"HF_TOKEN": "hf_s3cret"})
    assert "s3cret" not in repr(settings)
    assert "s3cret" not in json.dumps(settings.public(), default=str)
    assert settings.public()["api_key"] == "***"
    assert "s3cret" not in repr(settings.without_secrets().to_json())
    assert Settings.from_json(settings.to_json()).api_key == "s3cret"


def test_a_wrong_secret_is_not_repeated_in_the_error() -> None:
    from tgi_gateway.flags import Option, whole

    with pytest.raises(SettingsError) as error:
        Option("pin", whole(), "", "", secret=True).value("hunter2", "--pin")
    assert "hunter2" not in str(error.value)


def test_settings_cross_a_pipe_unchanged() -> None:
    settings = parse("--cuda-graphs", "1,2", "--lora-adapters", "a,b", "--rope-factor", "2")
    again = Settings.from_json(settings.to_json())
    assert again == settings
    assert again.given == settings.given


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse().port = 1  # type: ignore[misc]


def test_flags_without_effect_warn_only_when_set() -> None:
    assert parse().warnings() == []
    assert parse("--usage-stats", "off").warnings() == []
    warnings = parse("--prometheus-port", "9000", environ={"USAGE_STATS": "on"}).warnings()
    assert len(warnings) == 2
    assert "never sends anything" in " ".join(warnings)


def test_help_groups_flags_and_shows_variables_and_defaults() -> None:
    text = help_text()
    assert "env PORT; default: 3000" in text
    assert f"{NO_EFFECT}:" in text
    assert text.index("--max-best-of N ") < text.index(f"{NO_EFFECT}:") < text.index("--prometheus-port N ")
    assert "--hf-token" not in text


def test_help_works_without_the_chosen_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Settings.parse(["--backend", "no-such", "--help"], {})
    assert "--model-id" in capsys.readouterr().out


def test_a_plugin_adds_flags_of_its_own_and_they_reach_the_engine() -> None:
    asked: list[str] = []

    def flags_of(backend: str) -> Sequence[Flag]:
        asked.append(backend)
        return (Flag("--n-threads", int, 4, "Threads."), Flag("--fast", bool, False, "Fast."))

    settings = Settings.parse(["--backend=toy", "--n-threads", "8"], {"FAST": "1"}, flags_of=flags_of)
    assert asked == ["toy"]
    assert settings.engine_options(Path("/m")).extra == {"n_threads": 8, "fast": True}
    assert Settings.parse([], {"BACKEND": "toy"}, flags_of=flags_of).extra == {"n_threads": 4, "fast": False}
    with pytest.raises(SettingsError, match="`--n-threads` is 'x'; allowed: a whole number"):
        Settings.parse(["--backend", "toy", "--n-threads", "x"], {}, flags_of=flags_of)


@pytest.mark.parametrize("name", ["n-threads", "n_threads", "--n_threads", "-n", "--N-Threads", "--n--threads", "--"])
def test_a_flag_is_named_as_it_is_typed(name: str) -> None:
    with pytest.raises(ValueError, match="such as --n-threads; got"):
        Flag(name, int, 4, "Threads.")


def test_a_plugin_cannot_take_a_flag_that_exists() -> None:
    with pytest.raises(PluginError, match="already exists"):
        Settings.parse([], {}, flags_of=lambda _: (Flag("--port", int, 1, ""),))


def test_engine_options_are_the_settings_the_engine_needs() -> None:
    settings = parse(
        "--model-id", "org/m", "--dtype", "float32", "--max-total-tokens", "100", "--cuda-graphs", "0,2",
        "--rope-factor", "4", "--enable-prefill-logprobs", "--prefix-caching", "false",
    )  # fmt: skip
    options = settings.engine_options(Path("/models/m"))
    assert (options.model_id, options.model_path) == ("org/m", Path("/models/m"))
    assert (options.rope_scaling, options.rope_factor) == ("linear", 4.0)
    assert options.cuda_graphs == (2,)
    assert options.max_input_tokens == 99
    assert options.prefill_logprobs is True
    assert options.prefix_caching is False
    assert options.num_shard == 1
    assert parse("--rope-scaling", "dynamic").engine_options(Path("/m")).rope_factor == 1.0


@pytest.mark.parametrize("variable", ["CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"])
def test_sharded_alone_means_all_devices_that_are_visible(variable: str) -> None:
    assert parse("--sharded", "true", environ={variable: "0,2,GPU-7"}).num_shard == 3
    assert parse("--sharded", "true", "--num-shard", "2", environ={variable: "0,2,3"}).num_shard == 2
    assert parse(environ={variable: "0,2"}).resolved().num_shard == 1
    with pytest.raises(SettingsError, match=r"`sharded` is true, but 1 device is seen.*`--num-shard`"):
        parse("--sharded", "true", environ={variable: "0"})


def test_vertex_ai_tells_port_and_paths_by_variables() -> None:
    environ = {"AIP_HTTP_PORT": "8080", "AIP_PREDICT_ROUTE": "/predict", "AIP_HEALTH_ROUTE": "/alive"}
    settings = Settings.parse(["--port", "3000", "--backend", "echo"], environ)
    assert (settings.port, settings.aip_predict_route) == (8080, "/predict")
    assert settings.open_routes == (*Settings().public_routes, "/alive")
    for wrong in ("", "no port", "99999", "-1"):
        assert Settings.parse(["--port", "3000", "--backend", "echo"], {"AIP_HTTP_PORT": wrong}).port == 3000
    with pytest.raises(SettingsError, match="must begin with a slash"):
        Settings.parse(["--backend", "echo"], {"AIP_PREDICT_ROUTE": "predict"})


def test_several_keys_are_secrets() -> None:
    settings = Settings.parse(["--backend", "echo", "--api-keys", "k-1,k-2", "--api-keys", "k-3"], {})
    assert settings.api_keys == ("k-1", "k-2", "k-3")
    assert settings.public()["api_keys"] == "***"
    assert "k-1" not in repr(settings)
    assert settings.without_secrets().api_keys == ()
    assert Settings.parse(["--backend", "echo"], {"API_KEYS": "a, b"}).api_keys == ("a", "b")
    with pytest.raises(SettingsError, match="whole number") as raised:
        Settings.parse(["--backend", "echo", "--max-concurrent-requests-per-key", "0"], {})
    assert "0" in str(raised.value)


def test_of_a_flag_that_is_given_twice_the_last_counts_for_the_plug_ins_flags_too() -> None:
    asked: list[str] = []
    settings = Settings.parse(
        ["--backend", "one", "--backend", "two"],
        {},
        flags_of=lambda name: asked.append(name) or (),  # type: ignore[func-returns-value]
    )
    assert (settings.backend, asked) == ("two", ["two"])
