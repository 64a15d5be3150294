"""The load generator against a tiny server of raw bytes, whose every answer is known."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import report
import serve
from hypothesis import given
from hypothesis import strategies as st
from streams import BadAnswer, Exchange, Pool, Target
from tokenizers import Tokenizer, models, pre_tokenizers
from workload import Ask, Lengths, PromptMaker, asks, poisson

BENCH = Path(serve.__file__)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
Answer = Callable[[dict[str, Any]], Sequence[bytes]]
"""Request body -> the response's bytes, as they are to be written one after the other."""


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def tgi_events(tokens: int) -> list[bytes]:
    made: list[dict[str, Any]] = [
        {"index": n, "token": {"id": n, "text": "data:" if n % 2 else ""}, "generated_text": None, "details": None}
        for n in range(1, tokens + 1)
    ]
    made[-1] |= {"generated_text": "x", "details": {"generated_tokens": tokens, "input_length": 7}}
    return [event(value) for value in made]


def chat_events(tokens: int) -> list[bytes]:
    def choice(delta: dict[str, str], reason: str | None = None) -> bytes:
        return event({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], "usage": None})

    usage = event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}})
    start = choice({"role": "assistant", "content": ""})
    return [start, *[choice({"content": "w "}) for _ in range(tokens)], choice({}, "length"), usage, event(b"[DONE]")]


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def chunked(pieces: Sequence[bytes]) -> list[bytes]:
    return [HEAD + b"transfer-encoding: chunked\r\n\r\n", *map(chunk, pieces), b"0\r\n\r\n"]


def tgi(body: dict[str, Any]) -> list[bytes]:
    return chunked(tgi_events(body["parameters"]["max_new_tokens"]))


def chat(body: dict[str, Any]) -> list[bytes]:
    return chunked(chat_events(body["max_tokens"]))


class Server:
    """Answers every POST with the bytes that `answer` makes, pausing in between so that they arrive apart."""

    def __init__(self, answer: Answer, pause_s: float = 0.0) -> None:
        self.answer = answer
        self.pause_s = pause_s
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.connections = 0
        self.open = self.most_open = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.heads.append(head.decode())
                length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                self.bodies.append(body)
                self.open += 1
                self.most_open = max(self.most_open, self.open)
                answer = self.answer(body)
                for piece in answer:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(self.pause_s)
                self.open -= 1
                if not answer or b"connection: close" in answer[0]:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


@asynccontextmanager
async def running(answer: Answer, pause_s: float = 0.0) -> AsyncIterator[Server]:
    made = Server(answer, pause_s)
    listener = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = listener.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        listener.close()


async def post(answer: Answer, body: dict[str, Any] | None = None, pause_s: float = 0.0) -> Exchange:
    async with running(answer, pause_s) as server:
        pool = Pool(Target.of(server.url, "/x"), 5)
        try:
            return await pool.post(pool.target.request(json.dumps(body or {}).encode()))
        finally:
            pool.close()


def measured(api: Any, exchange: Exchange, asked: int = 4) -> report.Measured:
    made = report.Measured("a", "b", api)
    made.answered(exchange, Ask("p", 3, asked))
    return made


def ran(server: Server, *arguments: str) -> Any:
    """The document of a run in this process's loop."""
    options = serve.parser().parse_args(["--quiet", "--url", server.url, *arguments])
    return serve.run(options, serve.loads(options))


# Reading streams.


@pytest.mark.parametrize("api", ["tgi", "openai-chat"])
@given(data=st.data())
def test_a_stream_is_read_however_its_bytes_are_cut(api: Any, data: st.DataObject) -> None:
    """Fed to the connection itself: TCP may cut anywhere."""
    events = tgi_events(4) if api == "tgi" else chat_events(4)
    if data.draw(st.booleans()):
        events = [each.replace(b"\n", b"\r\n") for each in events]
    events.insert(data.draw(st.integers(0, len(events))), b":\n\n")
    text = b"".join(events)
    cuts = sorted(data.draw(st.lists(st.integers(1, len(text) - 1), max_size=6, unique=True)))
    pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    framing = data.draw(st.sampled_from(["chunked", "sized", "closed"]))
    if framing == "chunked":
        raw = b"".join(chunked(pieces))
    else:
        raw = HEAD + (f"content-length: {len(text)}\r\n".encode() if framing == "sized" else b"") + b"\r\n" + text
    cuts = sorted(data.draw(st.lists(st.integers(1, len(raw) - 1), max_size=8, unique=True)))

    async def read() -> Exchange:
        from streams import _Connection

        connection = _Connection()
        connection._future = asyncio.get_running_loop().create_future()
        for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True):
            connection.data_received(raw[start:stop])
        if framing == "closed":
            connection.connection_lost(None)
        return await connection._future

    made = measured(api, asyncio.run(read()))
    assert (made.answers, made.output_tokens, made.short) == (1, 4, 0)
    assert len(made.times["inter_token"]) == 3
    assert made.input_tokens == (7 if api == "tgi" else 5)


async def test_events_without_a_token_are_not_the_first_token() -> None:
    made = measured("openai-chat", await post(lambda _: chunked(chat_events(4)), pause_s=0.02))
    assert made.times["first_token"][0] >= 0.02  # the role came first, a pause earlier
    assert made.chunks == 4
    assert made.times["latency"][0] > made.times["first_token"][0] + sum(made.times["inter_token"])


async def test_tokens_that_come_in_one_chunk_have_no_gap_between_them() -> None:
    events = tgi_events(6)
    made = measured("tgi", await post(lambda _: chunked([b"".join(events[:3]), b"".join(events[3:])]), pause_s=0.02), 6)
    assert [gap == 0.0 for gap in made.times["inter_token"]] == [True, True, False, True, True]
    assert len(made.times["inter_chunk"]) == 1
    assert made.times["time_per_output_token"][0] == pytest.approx(made.times["inter_chunk"][0] / 5)


@pytest.mark.parametrize(
    ("answer", "kind", "detail"),
    [
        ([b'HTTP/1.1 429 No\r\ncontent-length: 20\r\n\r\n{"error":"too many"}'], "HTTP 429", "too many"),
        (
            [b'HTTP/1.1 422 No\r\ncontent-length: 31\r\n\r\n{"error":{"message":"no model"}}'[:-1] + b"}"],
            "HTTP 422",
            "",
        ),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\ncontent-type: text/html\r\n\r\nhtml"], "HTTP 200", "html"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], "bad HTTP", "SSH"),
        ([b"HTTP/1.1 200 OK\r\n" + b"x" * 70000], "bad HTTP", "endless header"),
        ([HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n"], "bad HTTP", ""),
        ([], "connection lost", ""),
        (
            [HEAD + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n" + chunk(tgi_events(4)[0])],
            "connection lost",
            "",
        ),
        (chunked(tgi_events(4)[:2]), "stream broke off", ""),
        (
            chunked([*tgi_events(4)[:2], event({"error": "engine died", "error_type": "generation"})]),
            "error in stream",
            "engine died",
        ),
        (chunked([]), "stream broke off", ""),
    ],
)
async def test_what_is_no_answer_is_an_error_of_its_kind(answer: list[bytes], kind: str, detail: str) -> None:
    with pytest.raises(BadAnswer) as failed:
        measured("tgi", await post(lambda _: answer))
    assert failed.value.kind == kind
    assert detail in str(failed.value)


async def test_an_answer_shorter_than_asked_is_told() -> None:
    assert measured("tgi", await post(lambda _: chunked(tgi_events(3)))).short == 1


async def test_a_request_that_takes_too_long_is_a_timeout() -> None:
    async with running(tgi, pause_s=0.2) as server:
        pool = Pool(Target.of(server.url, "/x"), 0.05)
        with pytest.raises(TimeoutError):
            await pool.post(pool.target.request(b'{"parameters": {"max_new_tokens": 9}}'))


async def test_connections_are_reused_and_replaced_when_the_server_closed_them() -> None:
    body = b'{"parameters": {"max_new_tokens": 2}}'
    async with running(tgi) as server:
        pool = Pool(Target.of(server.url, "/x"), 5)
        for _ in range(3):
            await pool.post(pool.target.request(body))
        assert server.connections == 1
        server.answer = lambda body: [
            tgi(body)[0].replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"),
            *tgi(body)[1:],
        ]
        for _ in range(3):
            await pool.post(pool.target.request(body))
        assert server.connections == 3
        pool.close()


@pytest.mark.parametrize("url", ["", "127.0.0.1:3000", "ftp://host", "http://"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is no http"):
        Target.of(url, "/x")


def test_a_request_names_host_and_length() -> None:
    target = Target.of("http://[::1]:80/base/", "/generate_stream", (("authorization", "Bearer k"),))
    assert target.request(b"{}").split(b"\r\n") == [
        b"POST /base/generate_stream HTTP/1.1",
        b"host: [::1]:80",
        b"content-type: application/json",
        b"accept: text/event-stream",
        b"content-length: 2",
        b"authorization: Bearer k",
        b"",
        b"{}",
    ]


# Whole runs.


async def test_a_closed_loop_keeps_so_many_requests_under_way() -> None:
    async with running(tgi, pause_s=0.005) as server:
        document = await ran(server, "--requests", "12", "--concurrency", "3", "--output-tokens", "4", "--warmup", "1")
    assert server.most_open == 3
    assert len(server.bodies) == 13
    assert len({body["inputs"] for body in server.bodies}) == 13
    assert server.bodies[0]["parameters"] == {"max_new_tokens": 4, "details": True, "ignore_eos": True}
    (target,) = document["targets"]
    assert (target["answers"], target["output_tokens"], target["chunks"], target["errors"]) == (12, 48, 48, {})
    times = target["times_s"]
    assert times["first_token"]["count"] == 12
    assert times["inter_token"]["count"] == 36
    assert 0 < times["first_token"]["p50"] < times["latency"]["p50"] < target["seconds"]
    assert target["output_tokens_per_s"] == pytest.approx(48 / target["seconds"])
    assert not document["interrupted"]
    assert document["generator"]["cpu_share"] > 0


async def test_an_open_loop_sends_whether_or_not_answers_come() -> None:
    async with running(chat, pause_s=0.02) as server:
        document = await ran(
            server, "--api", "openai-chat", "--rate", "200", "--requests", "20", "--warmup", "0", "--output-tokens", "9"
        )
    assert server.most_open > 8
    (target,) = document["targets"]
    assert target["answers"] == 20
    assert target["sent_late_s"]["count"] == 20
    assert server.bodies[0]["stream_options"] == {"include_usage": True}
    assert server.bodies[0]["min_tokens"] == server.bodies[0]["max_tokens"] == 9
    assert server.bodies[0]["messages"][0]["role"] == "user"


async def test_several_servers_are_measured_in_turns_with_the_same_prompts() -> None:
    async with running(tgi) as first, running(chat) as second:
        order: list[str] = []

        def noted(name: str, answer: Answer) -> Answer:
            def note(body: dict[str, Any]) -> Sequence[bytes]:
                order.append(name)
                return answer(body)

            return note

        first.answer, second.answer = noted("a", tgi), noted("b", chat)
        document = await ran(
            first, "--url", f"other={second.url}", "--api", "tgi", "--api", "openai-chat",
            "--requests", "6", "--rounds", "3", "--warmup", "0", "--concurrency", "2", "--output-tokens", "2",
        )  # fmt: skip
    assert order == list("aabbaabbaabb")
    assert [target["label"] for target in document["targets"]] == ["server 1", "other"]
    assert [body["inputs"] for body in first.bodies] == [body["messages"][0]["content"] for body in second.bodies]
    shown = report.table(document)
    assert "other" in shown
    assert "time to first token" in shown
    json.dumps(document)


async def test_failed_requests_are_counted_by_kind_with_an_example() -> None:
    def every_other(body: dict[str, Any]) -> Sequence[bytes]:
        if len(server.bodies) % 2:
            return tgi(body)
        return [b'HTTP/1.1 503 Busy\r\ncontent-length: 16\r\n\r\n{"error":"full"}']

    async with running(every_other) as server:
        document = await ran(server, "--requests", "9", "--warmup", "1", "--concurrency", "1")
    (target,) = document["targets"]
    assert (target["answers"], target["errors"]) == (4, {"HTTP 503": 5})
    assert "5 x HTTP 503: HTTP 503: full" in report.table(document)


async def test_extra_fields_and_headers_are_sent() -> None:
    async with running(tgi) as server:
        await ran(
            server,
            "--requests",
            "1",
            "--extra",
            '{"seed": 7}',
            "--header",
            "authorization: Bearer k",
            "--no-ignore-eos",
        )
    assert server.bodies[-1]["parameters"]["seed"] == 7
    assert "ignore_eos" not in server.bodies[-1]["parameters"]
    assert "\r\nauthorization: Bearer k\r\n" in server.heads[-1]


async def test_a_server_that_does_not_answer_ends_the_run_with_advice() -> None:
    async with running(lambda _: [b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"]) as server:
        with pytest.raises(serve.Unusable, match=r"HTTP 404.*Is it a server of --api tgi"):
            await ran(server)
    with pytest.raises(serve.Unusable, match="Is it a server"):
        await ran(server)


def test_a_port_without_a_server_is_told_with_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        assert serve.main(["--url", f"http://127.0.0.1:{taken.getsockname()[1]}", "--quiet"]) == 1
    assert "Is it a server of --api tgi?" in capsys.readouterr().err


async def test_ctrl_c_tells_what_was_measured_until_then() -> None:
    def press_at_the_tenth(body: dict[str, Any]) -> Sequence[bytes]:
        if len(server.bodies) == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return tgi(body)

    async with running(press_at_the_tenth, pause_s=0.01) as server:
        document = await ran(server, "--requests", "200", "--concurrency", "2", "--warmup", "0", "--output-tokens", "4")
    (target,) = document["targets"]
    assert document["interrupted"]
    assert 0 < target["answers"] < 12
    assert target["unfinished"] == 2
    assert target["seconds"] > 0
    assert "2 requests were under way when it was interrupted" in report.table(document)


async def test_the_command_prints_a_table_and_writes_what_it_found(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    async with running(tgi) as server:
        command = [sys.executable, str(BENCH), "--url", server.url, "--requests", "3", "--json", str(found)]
        process = await asyncio.create_subprocess_exec(
            *command, "--input-tokens", "uniform:5:9", stdout=subprocess.PIPE
        )
        shown, _ = await process.communicate()
    assert process.returncode == 0
    assert "time to first token" in shown.decode()
    document = json.loads(found.read_text())
    assert document["targets"][0]["answers"] == 3
    assert document["settings"]["input_tokens"] == "uniform:5:9"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--url", "nonsense"],
        ["--url", "http://a", "--rate", "0"],
        ["--url", "http://a", "--rate", "1", "--concurrency", "2"],
        ["--url", "http://a", "--api", "tgi", "--api", "tgi"],
        ["--url", "http://a", "--input-tokens", "many"],
        ["--url", "http://a", "--input-tokens", "uniform:9:1"],
        ["--url", "http://a", "--extra", "[]"],
        ["--url", "http://a", "--requests", "0"],
        ["--url", "http://a", "--words", "/nowhere"],
    ],
)
def test_wrong_arguments_are_told_with_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        serve.main(arguments)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


# What a load consists of.


def test_the_same_seed_makes_the_same_load() -> None:
    def made(seed: int) -> list[Ask]:
        return asks(5, PromptMaker(seed, 8, None, None), Lengths.of("uniform:10:50"), Lengths.of("list:3,5"), seed)

    assert made(1) == made(1)
    assert made(1) != made(2)
    assert {ask.output_tokens for ask in made(1)} <= {3, 5}


def test_prompts_share_their_beginning_and_no_more(tmp_path: Path) -> None:
    library = Tokenizer(models.WordLevel({**{f"w{n}": n for n in range(50)}, "?": 50}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "words").write_text(" ".join(f"w{n}" for n in range(50)))
    maker = PromptMaker(0, 20, tmp_path, tmp_path / "words")
    prompts = [maker.make(60) for _ in range(4)]
    assert all(tokens == 60 for _, tokens in prompts)
    words = [prompt.split() for prompt, _ in prompts]
    assert len({tuple(each[:20]) for each in words}) == 1
    assert len({tuple(each[20:30]) for each in words}) == 4


def test_lengths_are_drawn_from_their_distribution() -> None:
    rng = random.Random(0)
    assert {Lengths.of("7").draw(rng) for _ in range(9)} == {7}
    assert {Lengths.of("uniform:2:4").draw(rng) for _ in range(99)} == {2, 3, 4}
    drawn = [Lengths.of("normal:100:10").draw(rng) for _ in range(999)]
    assert 98 < sum(drawn) / len(drawn) < 102
    assert all(length >= 1 for length in (Lengths.of("normal:1:50").draw(rng) for _ in range(99)))


def test_sending_times_are_as_frequent_as_asked() -> None:
    times = poisson(50, seed=3)
    last = [next(times) for _ in range(5000)][-1]
    assert 90 < last < 110
    assert next(poisson(50, seed=3)) == next(poisson(50, seed=3))


@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_percentiles_lie_in_order_between_the_extremes(values: list[float]) -> None:
    found = report.distribution(values)
    line = [found[name] for name in ("min", "p50", "p90", "p95", "p99", "max")]
    assert line == sorted(line)
    assert report.percentile(sorted(values), 0) == min(values)
    assert report.percentile(sorted(values), 100) == max(values)


def test_a_busy_generator_says_so() -> None:
    own = serve.Own(cpu_s=0.95, wall_s=1.0)
    own.lags.extend([0.05] * 10)
    assert len(own.warnings()) == 2
    assert serve.Own(cpu_s=0.2, wall_s=1.0).warnings() == []


def test_every_second_request_may_have_fields_of_its_own() -> None:
    arguments = ["--url", "a=http://x:1", "--url", "b=http://x:1", "--requests", "4", "--warmup", "0"]
    arguments += ["--second-extra", "{}", "--second-extra", '{"seed": 7}']
    plain, half = serve.loads(serve.parser().parse_args(arguments))
    assert [b'"seed": 7' in request for _, request in plain.requests] == [False] * 4
    assert [b'"seed": 7' in request for _, request in half.requests] == [False, True, False, True]
    with pytest.raises(ValueError, match="2 --second-extra for 1 --url"):
        serve.loads(serve.parser().parse_args(["--url", "http://x:1", *arguments[-4:]]))
