"""`tgi-gateway top`: rates and quantiles of two scrapes, and the command against a real server."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest

from tgi_gateway import cli
from tgi_gateway.telemetry.top import Scrape, Window

BEFORE = """# TYPE tgi_request_count counter
tgi_request_count 10.0
tgi_request_failure{err="overloaded"} 1.0
tgi_generated_tokens 100.0
tgi_queue_size 3.0
tgi_request_duration_bucket{le="0.1"} 4.0
tgi_request_duration_bucket{le="0.2"} 4.0
tgi_request_duration_bucket{le="+Inf"} 4.0
"""
AFTER = """tgi_request_count 30.0
tgi_request_failure{err="overloaded"} 5.0
tgi_request_failure{err="a\\"}b"} 2.0
tgi_generated_tokens 40.0
tgi_queue_size 5.0
tgi_request_duration_bucket{le="0.1"} 4.0
tgi_request_duration_bucket{le="0.2"} 8.0
tgi_request_duration_bucket{le="+Inf"} 12.0
"""


@pytest.fixture
def window() -> Window:
    return Window(Scrape.of(BEFORE, 100.0), Scrape.of(AFTER, 102.0))


def test_rates_are_per_second_and_a_server_that_began_anew_has_none(window: Window) -> None:
    assert window.rate("tgi_request_count") == 10.0
    assert window.rate("tgi_generated_tokens") == 0.0
    assert window.rate("tgi_no_such_metric") == 0.0
    assert dict(window.rates("tgi_request_failure", "err")) == {"overloaded": 2.0, 'a\\"}b': 1.0}


def test_quantiles_are_of_the_window_alone(window: Window) -> None:
    assert window.quantile("tgi_request_duration", 0.25) == pytest.approx(0.15)
    assert window.quantile("tgi_request_duration", 0.5) == pytest.approx(0.2)
    assert window.quantile("tgi_request_duration", 0.99) == pytest.approx(0.2), "the last bound that is known"
    assert window.quantile("tgi_request_queue_duration", 0.5) is None


@pytest.fixture
def told() -> Iterator[str]:
    class Metrics(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("authorization") != "Bearer k":
                self.send_error(401)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(AFTER.encode() if self.path == "/metrics" else b"hello")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_the_command_shows_a_table(
    told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", "k")
    assert cli.main(["top", "--url", told, "--every", "0.05", "--once"]) == 0
    shown = capsys.readouterr().out
    for text in (told, "waiting", "5", "first token", "KV cache"):
        assert text in shown


def test_the_command_says_what_is_wrong(
    told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("API_KEY", raising=False)
    assert cli.main(["top", "--url", told]) == 1
    assert "set API_KEY" in capsys.readouterr().err
    assert cli.main(["top", "--url", "http://127.0.0.1:9"]) == 1
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err
    assert cli.main(["top", "--fast"]) == 2
    assert cli.main(["top", "--every", "soon"]) == 2
    assert cli.main(["top", "--help"]) == 0
