"""Limits, the key, a failing engine, and the ending of the server; nobody's trouble is another's."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from serve_helpers import Running, make_tokenizer, parse_events, raw_head, serving, slow_model
from trinity.base.errors import UsageError, UserError
from trinity.config import ServeConfig
from trinity.export.afmoe import export_afmoe
from trinity.infer.engine import Engine
from trinity.serve.app import Service
from trinity.serve.http import EventStream
from trinity.serve.key import read_key
from trinity.serve.metrics import Metrics
from trinity.serve.run import MAX_HEAD_BYTES, fitting_tokens, listen
from trinity.serve.worker import Gauges
from trinity.tokenizer import Tokenizer

LONG: dict[str, Any] = {"ignore_eos": True, "max_tokens": 4000}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def small(tokenizer: Tokenizer) -> Iterator[Running]:
    """Room for two answers and one that waits."""
    with serving(slow_model(), tokenizer, max_batch=2, max_queued=1) as running:
        yield running


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def read_to_end(connection: socket.socket) -> bytes:
    received = b""
    while part := connection.recv(65536):
        received += part
        if b"0\r\n\r\n" in part:
            break
    return received


def test_more_than_fits_is_told_to_come_again(small: Running) -> None:
    first, second = small.open_stream(**LONG), small.open_stream(**LONG)
    third = socket.create_connection(("127.0.0.1", small.port))
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}).encode()
    third.sendall(raw_head(len(body)) + body)
    wait_for(lambda: small.metric("trinity_answers_waiting") == 1)
    status, headers, error = small.chat(max_tokens=1)
    assert status == 429
    assert 1 <= int(headers["retry-after"]) <= 60
    assert error["error"]["type"] == "rate_limit_error"
    assert small.chat(max_tokens=1, n=4)[0] == 400  # never fits
    second.close()
    assert b"200 OK" in third.recv(65536)  # the one that waited got its place
    first.close()
    third.close()
    wait_for(lambda: small.service.desk.open == 0)
    assert small.chat(max_tokens=1)[0] == 200


def test_a_request_takes_no_longer_than_it_may(tokenizer: Tokenizer) -> None:
    with serving(slow_model(), tokenizer, request_seconds=0.6, max_batch=2) as server:
        status, _, error = server.chat(**LONG)
        assert (status, error["error"]["code"]) == (504, "timeout")
        fields = {**LONG, "stream": True, "messages": [{"role": "user", "content": "x"}]}
        events = parse_events(server.call("POST", "/v1/chat/completions", fields)[2])
        assert events[-1]["error"]["code"] == "timeout"
        assert events[0]["choices"][0]["delta"]["role"] == "assistant"
        wait_for(lambda: server.metric("trinity_cache_bytes") == 0)
        assert server.service.desk.open == 0


def test_a_body_that_never_comes(tokenizer: Tokenizer) -> None:
    with serving(slow_model(), tokenizer, body_seconds=0.3) as server:
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        connection.sendall(raw_head(100) + b"{")
        assert b" 408 " in connection.recv(65536)
        connection.close()


def test_a_body_that_is_too_large_is_answered_and_not_cut_off(tokenizer: Tokenizer) -> None:
    """What the client still sends is thrown away, so that it finds an answer and not a connection that was reset."""
    with (
        serving(slow_model(), tokenizer, max_body_bytes=100_000) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIStatusError) as told,
    ):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 600_000}])
    assert told.value.status_code == 413
    assert "100000 bytes" in told.value.message


def test_bodies_of_all_requests_together_are_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trinity.serve.app.BODIES", 2)
    with serving(slow_model(), tokenizer, max_body_bytes=40_000) as server:
        held = []
        for _ in range(2):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
            connection.sendall(raw_head(39_000) + b" " * 38_000)
            held.append(connection)
        wait_for(lambda: server.service.bodies.held == 76_000)
        status, headers, body = server.chat(messages=[{"role": "user", "content": "x" * 20_000}])
        assert (status, headers["retry-after"]) == (503, "1")
        assert "large requests" in body["error"]["message"]
        assert server.chat(max_tokens=1)[0] == 200  # a small one fits beside them
        for connection in held:
            connection.close()
        wait_for(lambda: server.service.bodies.held == 0)
        assert server.chat(max_tokens=1)[0] == 200
        assert server.service.bodies.held == 0


def test_a_client_that_leaves_within_its_body_is_no_error(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(slow_model(), tokenizer) as server:
        before = server.metric("trinity_disconnects_total")
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        connection.sendall(raw_head(1000) + b'{"messages"')
        wait_for(lambda: server.service.bodies.held > 0)
        connection.close()
        wait_for(lambda: server.metric("trinity_disconnects_total") == before + 1)
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(b"\x00\x01 nonsense\r\n\r\n")
            assert b" 400 " in connection.recv(65536)
        assert server.chat(max_tokens=1)[0] == 200
    assert caplog.text == ""


def test_a_head_without_end_is_refused(tokenizer: Tokenizer) -> None:
    with serving(slow_model(), tokenizer) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * (MAX_HEAD_BYTES + 1))
            assert b" 400 " in connection.recv(65536)
        assert server.call("GET", "/health")[0] == 200


def test_the_cache_may_be_in_fp8_and_what_needs_a_gpu_says_so(tokenizer: Tokenizer) -> None:
    sizes = {}
    for kind in ("auto", "fp8"):
        with serving(slow_model(), tokenizer, cache=kind) as server:
            assert server.chat(max_tokens=20, ignore_eos=True)[2]["usage"]["completion_tokens"] == 20
            stream = server.open_stream(**LONG)
            wait_for(lambda: server.metric("trinity_cache_bytes") > 0)
            sizes[kind] = server.service.worker._engine.cache.pools["global"].keys[0].element_size()  # type: ignore[union-attr]
            stream.close()
    assert sizes == {"auto": 4, "fp8": 1}
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a GPU"):
            Service(slow_model(), tokenizer, ServeConfig(name="tiny", fp8_weights=True))


def test_a_client_that_does_not_read_holds_up_nobody(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trinity.serve.http.SEND_GRACE", 0.1)
    with serving(slow_model(), tokenizer, max_batch=2, request_seconds=3.0) as server:
        deaf = server.open_stream(**{**LONG, "logprobs": True, "top_logprobs": 20})  # and never reads again
        assert server.chat(max_tokens=3)[0] == 200
        wait_for(lambda: server.service.desk.open == 0)
        deaf.close()


def test_a_client_that_takes_nothing_for_a_while_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trinity.serve.http.STALL_SECONDS", 0.05)
    metrics, closed, ended = Metrics("tiny", Gauges), list[bool](), list[bool]()

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            ended.append(True)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 3:
            await asyncio.Event().wait()  # nobody reads

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def run() -> None:
        deadline = asyncio.get_running_loop().time() + 600
        stream = EventStream(events(), lambda: closed.append(True), deadline, metrics)
        await asyncio.wait_for(stream({"type": "http"}, receive, send), 30)

    asyncio.run(run())
    assert closed == ended == [True]
    assert len(sent) == 4
    assert b"trinity_disconnects_total 1.0" in metrics.text()


def test_the_key(tokenizer: Tokenizer) -> None:
    with serving(slow_model(), tokenizer, api_key="open-sesame") as server:
        for given in (None, "Bearer", "Bearer wrong", "Basic open-sesame", "Bearer open-sesame2", "Bearer \xe9\xff"):
            headers = {} if given is None else {"Authorization": given}
            for path in ("/v1/models", "/metrics", "/nothing"):
                status, answer, body = server.call("GET", path, headers=headers)
                assert status == 401
                assert answer["www-authenticate"] == "Bearer"
                assert json.loads(body)["error"]["code"] == "invalid_api_key"
                assert b"sesame" not in body
        assert server.call("GET", "/health")[0] == server.call("GET", "/")[0] == 200
        assert server.call("GET", "/v1/models", headers={"Authorization": "bearer open-sesame"})[0] == 200


def test_where_the_key_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRINITY_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("TRINITY_API_KEY", "from-outside")
    assert read_key(None) == "from-outside"
    (tmp_path / "key").write_text("from-file\n")
    assert read_key(tmp_path / "key") == "from-file"
    for bad in ("", "two words", "é"):
        (tmp_path / "key").write_text(bad)
        with pytest.raises(UsageError, match="one line"):
            read_key(tmp_path / "key")
    with pytest.raises(UserError, match="missing"):
        read_key(tmp_path / "missing")


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("boom"), 500), (MemoryError(), 503)])
def test_a_failing_step_takes_only_those_under_way(
    small: Running, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    answers: list[tuple[int, Any]] = []

    def ask(max_tokens: int) -> None:
        found = small.chat(max_tokens=max_tokens, ignore_eos=True)
        answers.append((found[0], found[2]))

    running = [threading.Thread(target=ask, args=(4000,)) for _ in range(2)]
    for thread in running:
        thread.start()
    wait_for(lambda: small.metric("trinity_answers_running") == 2)
    waiting = threading.Thread(target=ask, args=(5,))
    waiting.start()
    wait_for(lambda: small.metric("trinity_answers_waiting") == 1)
    step, failed = Engine.step, []

    def fail_once(engine: Engine) -> Any:
        if not failed:
            failed.append(True)
            raise error
        return step(engine)

    monkeypatch.setattr(Engine, "step", fail_once)
    for thread in (*running, waiting):
        thread.join(60)
    assert sorted(found for found, _ in answers) == sorted([200, status, status])
    told = json.dumps([body for found, body in answers if found != 200])
    assert "boom" not in told  # what is inside stays inside
    assert small.metric("trinity_engine_failures_total") == 1
    assert small.chat(max_tokens=3)[0] == 200


def test_a_failure_that_no_new_engine_mends_is_told_to_all(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an error of the device that stays: those under way and those that wait must not hang."""

    def fail(*_: object) -> None:
        raise RuntimeError("the device is lost")

    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(small.chat(max_tokens=4000, ignore_eos=True)[0]))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: small.metric("trinity_answers_running") == 2 and small.metric("trinity_answers_waiting") == 1)
    assert small.service.worker is not None
    monkeypatch.setattr(small.service.worker, "_make_engine", fail)
    monkeypatch.setattr(Engine, "step", fail)
    for thread in threads:
        thread.join(30)
    assert answers == [500, 500, 500]
    assert small.call("GET", "/health")[0] == 503


def test_an_engine_that_is_gone_is_told(small: Running) -> None:
    assert small.service.worker is not None
    small.service.worker.stop()
    assert small.chat(max_tokens=1)[0] == 503
    assert small.call("GET", "/health")[0] == 503
    assert small.service.desk.open == 0


def test_bad_requests_do_not_change_the_answers_beside_them(tokenizer: Tokenizer) -> None:
    with serving(slow_model(), tokenizer, max_batch=4, max_queued=64) as server:
        fields = {
            "max_tokens": 40,
            "temperature": 0,
            "ignore_eos": True,
            "messages": [{"role": "user", "content": "the cat"}],
        }
        alone = server.chat(**fields)[2]["choices"]
        found: list[Any] = []
        good = [threading.Thread(target=lambda: found.append(server.chat(**fields)[2]["choices"])) for _ in range(8)]
        for thread in good:
            thread.start()
        for _ in range(10):
            server.call("POST", "/v1/chat/completions", b"{\xff")
            server.chat(max_tokens=9000)
            server.open_stream(**LONG).close()
        for thread in good:
            thread.join(60)
        assert found == [alone] * 8


def test_the_cache_fits_the_memory() -> None:
    config = slow_model().config
    whole = config.kv_cache_bytes(config.max_positions, batch=4, bytes_per_value=4)
    assert fitting_tokens(config, whole, 4, 4) == 4 * config.max_positions
    half = fitting_tokens(config, whole // 2, 4, 4)
    token = config.kv_cache_bytes(config.max_positions + 1, bytes_per_value=4) - config.kv_cache_bytes(
        config.max_positions, bytes_per_value=4
    )
    rings = config.kv_cache_bytes(config.window, batch=4, bytes_per_value=4)
    assert half * token + rings <= whole // 2 < (half + 1) * token + rings
    with pytest.raises(UserError, match="--max-batch"):
        fitting_tokens(config, 1000, 4, 4)


def test_an_address_that_cannot_be_had() -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UserError, match="another --port"):
            listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="no address of this machine"):
        listen("no.such.host.invalid", 0)
    assert ServeConfig(name="x").on_loopback
    assert not ServeConfig(name="x", host="0.0.0.0").on_loopback


@pytest.fixture(scope="module")
def exported(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = slow_model(2048)
    out = tmp_path_factory.mktemp("served") / "model"
    export_afmoe(model, model.config, tokenizer, out, dtype=torch.float32)
    return out


@pytest.mark.parametrize(("number", "patient"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_signal_lets_answers_finish(exported: Path, number: signal.Signals, patient: bool) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    seconds = "60" if patient else "0.5"
    process = subprocess.Popen(
        [sys.executable, "-m", "trinity", "serve", str(exported), "--port", "0", "--shutdown-seconds", seconds],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stderr is not None
        told = process.stderr.readline()
        assert "model on cpu at http://127.0.0.1:" in told, told + process.stderr.read()
        server = Running.at(int(told.split("127.0.0.1:")[1].split()[0]))
        stream = server.open_stream(ignore_eos=True, max_tokens=60 if patient else 2000)
        process.send_signal(number)
        data = read_to_end(stream)
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    stream.close()
    if patient:
        assert b'"finish_reason":"length"' in data
        assert b"[DONE]" in data
        assert (process.returncode, errors) == (0, "")
    else:
        assert b'"code":"shutting_down"' in data
        assert process.returncode == 1
        assert errors.startswith("trinity: answers were still under way after 0.5 seconds")
        assert errors.count("\n") == 1


def test_a_server_that_is_ending_takes_nothing_new(small: Running) -> None:
    stream = small.open_stream(**LONG)
    small.service.drain()
    assert small.chat(max_tokens=1)[0] == 503
    assert small.call("GET", "/health")[0] == 503
    stream.close()
