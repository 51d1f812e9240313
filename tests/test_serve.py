"""The server's protocol: the official client, whole and streamed, and every way in which a request can be wrong."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_helpers import (
    TAUGHT,
    WEATHER,
    Running,
    joined,
    make_tokenizer,
    parse_events,
    raw_head,
    serving,
    taught_model,
)
from trinity.infer.engine import Engine
from trinity.infer.sampling import SamplingParams
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer

Messages = list[Any]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    return taught_model(tokenizer)


@pytest.fixture(scope="module")
def server(model: Transformer, tokenizer: Tokenizer) -> Iterator[Running]:
    with serving(model, tokenizer, max_batch=8, max_body_bytes=200_000, max_prompt_tokens=1500) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(text: str) -> Messages:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("question", ["Say it.", "Café?"])
def test_the_official_client_chats(client: openai.OpenAI, question: str) -> None:
    answer = client.chat.completions.create(model="tiny", messages=ask(question), temperature=0)
    assert answer.choices[0].message.content == TAUGHT[question]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    stream = client.chat.completions.create(
        model="tiny", messages=ask(question), temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TAUGHT[question]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage == answer.usage
    assert len({c.id for c in chunks}) == 1


def test_reasoning_is_a_field_of_its_own(client: openai.OpenAI) -> None:
    answer: Any = client.chat.completions.create(model="tiny", messages=ask("Think."), temperature=0)
    assert answer.choices[0].message.reasoning_content == "One and one."
    assert answer.choices[0].message.content == "Two."
    stream: Any = client.chat.completions.create(model="tiny", messages=ask("Think."), temperature=0, stream=True)
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "One and one."
    assert "".join(d.content or "" for d in deltas) == "Two."


def test_tool_calls_whole_and_streamed(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "messages": ask("Weather?"), "tools": [WEATHER], "temperature": 0}
    answer = client.chat.completions.create(**fields).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content == "I look."
    calls: Any = answer.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Paris"}, {"city": "Rome"}]
    assert {call.function.name for call in calls} == {"weather"}
    assert len({call.id for call in calls}) == 2
    chunks = list(client.chat.completions.create(**fields, stream=True))
    streamed: list[Any] = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.index for call in streamed] == [0, 1]
    assert [json.loads(call.function.arguments)["city"] for call in streamed] == ["Paris", "Rome"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    # The conversation goes on with the answers of the tools, in the client's own objects.
    more = [
        *fields["messages"],
        answer.message,
        *({"role": "tool", "tool_call_id": c.id, "content": "sun"} for c in calls),
    ]
    assert (
        client.chat.completions.create(**{**fields, "messages": more}, max_tokens=3).choices[0].finish_reason
        == "length"
    )


def test_calls_can_be_forbidden_limited_and_forced(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "messages": ask("Weather?"), "tools": [WEATHER], "temperature": 0}
    single: Any = client.chat.completions.create(**fields, parallel_tool_calls=False).choices[0]
    assert [json.loads(call.function.arguments) for call in single.message.tool_calls] == [{"city": "Paris"}]
    assert single.finish_reason == "tool_calls"
    none = client.chat.completions.create(**fields, tool_choice="none", max_tokens=4).choices[0]
    assert none.message.tool_calls is None
    forced: Any = client.chat.completions.create(
        **fields, tool_choice={"type": "function", "function": {"name": "weather"}}, max_tokens=60
    ).choices[0]
    if forced.message.tool_calls is None:  # the model was never taught this: what it wrote must not be lost
        assert forced.message.content.startswith('<tool_call>\n{"name": "weather", "arguments": ')
    else:
        assert forced.message.tool_calls[0].function.name == "weather"


def test_logprobs_are_the_models(
    client: openai.OpenAI, model: Transformer, tokenizer: Tokenizer, server: Running
) -> None:
    prompt, _ = tokenizer.encode_chat(ask("Say it."), add_generation_prompt=True)
    params = SamplingParams(temperature=0, stop_ids=tuple(tokenizer.stop_ids), top_logprobs=3)
    (expected,) = Engine(model, tokenizer).generate([prompt], params)
    fields: Any = {"model": "tiny", "messages": ask("Say it."), "temperature": 0, "logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(**fields)
    assert answer.choices[0].logprobs is not None
    rows = answer.choices[0].logprobs.content
    assert rows is not None
    assert bytes(b for row in rows for b in row.bytes or []).decode() == TAUGHT["Say it."]
    assert [row.logprob for row in rows] == pytest.approx(expected.logprobs[:-1], abs=1e-5)
    for row, top in zip(rows, expected.top_logprobs, strict=False):
        assert row.token == row.top_logprobs[0].token  # greedy
        assert [one.logprob for one in row.top_logprobs] == pytest.approx([value for _, value in top], abs=1e-5)
    chunks = client.chat.completions.create(**fields, stream=True)
    streamed = [row for c in chunks if c.choices[0].logprobs for row in c.choices[0].logprobs.content or []]
    assert [row.token for row in streamed] == [row.token for row in rows]


def test_completions_continue_text(client: openai.OpenAI, server: Running, tokenizer: Tokenizer) -> None:
    text = tokenizer.render_chat(ask("Café?"), add_generation_prompt=True)
    ids = tokenizer.encode(text, special=True)
    answer = client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=100, logprobs=2)
    assert answer.choices[0].text == TAUGHT["Café?"]
    logprobs: Any = answer.choices[0].logprobs
    assert (
        len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
    )
    assert len(logprobs.top_logprobs[0]) == 2
    many = client.completions.create(model="tiny", prompt=["the cat", "sat"], n=2, max_tokens=4, seed=1, echo=True)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in many.choices] == ["the", "the", "sat", "sat"]
    assert many.usage is not None
    assert many.usage.completion_tokens <= 16
    assert client.completions.create(model="tiny", prompt="", max_tokens=2).choices[0].finish_reason in (
        "length",
        "stop",
    )
    default = client.completions.create(model="tiny", prompt="the", extra_body={"ignore_eos": True})
    assert default.usage is not None
    assert default.usage.completion_tokens == 16
    chunks = list(client.completions.create(model="tiny", prompt=["the", "cat"], max_tokens=5, stream=True, echo=True))
    texts = ["".join(c.choices[0].text for c in chunks if c.choices[0].index == i) for i in range(2)]
    assert [text[:3] for text in texts] == ["the", "cat"]


def test_seeds_choices_and_sampling(client: openai.OpenAI) -> None:
    def texts(seed: int, n: int = 1, **more: Any) -> list[str | None]:
        answer = client.chat.completions.create(
            model="tiny", messages=ask("the cat sat"), seed=seed, n=n, max_tokens=12, extra_body=more
        )
        return [choice.message.content for choice in answer.choices]

    assert texts(5) == texts(5)
    assert texts(5, n=2) == [*texts(5), *texts(6)]  # a choice is what it would be alone
    assert texts(-3) == texts(-3)
    greedy = client.chat.completions.create(model="tiny", messages=ask("Say it."), temperature=0).choices[0].message
    for more in ({"top_k": 1}, {"min_p": 1.0}):
        answer = client.chat.completions.create(model="tiny", messages=ask("Say it."), extra_body=more)
        assert answer.choices[0].message.content == greedy.content
    answer = client.chat.completions.create(model="tiny", messages=ask("Say it."), top_p=1e-6)
    assert answer.choices[0].message.content == greedy.content
    changed = client.chat.completions.create(
        model="tiny", messages=ask("Say it."), temperature=0, extra_body={"repetition_penalty": 50.0, "top_k": -1}
    )
    assert changed.choices[0].message.content != greedy.content


def test_stop_strings_and_lengths(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "messages": ask("Say it."), "temperature": 0}
    for stop in ("calm", ["never", "calm"]):
        stopped = client.chat.completions.create(**fields, stop=stop).choices[0]
        assert (stopped.message.content, stopped.finish_reason) == ("The *sea* is **", "stop")
        chunks = list(client.chat.completions.create(**fields, stop=stop, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "The *sea* is **"
    cut = client.chat.completions.create(**fields, max_completion_tokens=2)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage is not None
    assert cut.usage.completion_tokens == 2


def test_content_parts_and_other_roles(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    def prompt_tokens(messages: Messages) -> int:
        usage = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1).usage
        assert usage is not None
        return usage.prompt_tokens

    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    system = {"role": "system", "content": "sat"}
    assert prompt_tokens([system, *ask("the cat")]) == prompt_tokens(
        [{"role": "developer", "content": "sat"}, {"role": "user", "content": parts, "name": "Ann"}]
    )


def test_models_health_metrics_and_page(client: openai.OpenAI, server: Running) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.models.retrieve("a/b")
    assert server.call("GET", "/health")[::2] == (200, b'{"status":"ok"}')
    before = server.metric("trinity_generation_tokens_total")
    server.chat(max_tokens=5, ignore_eos=True)
    assert server.metric("trinity_generation_tokens_total") == before + 5
    assert server.metric("trinity_answers_running") == server.metric("trinity_cache_bytes") == 0
    assert server.metric("process_resident_memory_bytes") > 1e7
    status, headers, page = server.call("GET", "/")
    assert status == 200
    assert b"<!doctype html>" in page
    assert "default-src 'none'" in headers["content-security-policy"]
    assert b"http://" not in page.replace(b"http://www.w3.org/2000/svg", b"")  # nothing comes from elsewhere
    assert b"https://" not in page


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2}
WRONG: list[tuple[Any, int, str | None, str]] = [
    (b"", 400, None, "not valid JSON"),
    (b"{", 400, None, "not valid JSON"),
    (b"[1]", 400, None, "it must be an object"),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, None, "not UTF-8: byte 43 is 0xff"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, None, "not valid JSON"),
    (b"[" * 100_000, 400, None, "not valid JSON"),
    (b'{"temperature": NaN, "messages": []}', 400, None, "not valid JSON"),
    ({**CHAT, "max_tokens": 1e999}, 400, None, "not valid JSON"),
    ({}, 400, "messages", "field required"),
    ({**CHAT, "messages": []}, 400, "messages", "at least 1"),
    ({**CHAT, "messages": "hi"}, 400, "messages", "valid list"),
    ({**CHAT, "messages": [{"role": "usr", "content": "x"}]}, 400, None, "did you mean 'user'"),
    ({**CHAT, "messages": [{"role": "user"}]}, 400, None, "has no content"),
    ({**CHAT, "messages": [{"role": "tool", "content": "x"}]}, 400, None, "tool_calls"),
    ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0]", "no text part"),
    ({**CHAT, "messages": [{"role": "assistant", "content": "", "tool_calls": [7]}]}, 400, None, "function name"),
    ({**CHAT, "temprature": 1}, 400, "temprature", "did you mean 'temperature'"),
    ({**CHAT, "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    ({**CHAT, "temperature": "1"}, 400, "temperature", "valid number"),
    ({**CHAT, "top_p": 0}, 400, "top_p", "greater than 0"),
    ({**CHAT, "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ({**CHAT, "n": 10_000}, 400, "n", "264"),
    ({**CHAT, "stop": ["x"] * 17}, 400, "stop", "at most 16"),
    ({**CHAT, "stop": ""}, 400, "stop", "1 to 1024"),
    ({**CHAT, "logit_bias": {"1": 5}}, 400, "logit_bias", "not supported"),
    ({**CHAT, "response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
    ({**CHAT, "frequency_penalty": 0.5}, 400, "frequency_penalty", "not supported"),
    ({**CHAT, "top_logprobs": 3}, 400, "top_logprobs", "needs logprobs"),
    ({**CHAT, "top_logprobs": 21, "logprobs": True}, 400, "top_logprobs", "less than or equal to 20"),
    ({**CHAT, "stream_options": {"include_usage": True}}, 400, "stream_options", "needs stream"),
    ({**CHAT, "model": "other"}, 404, "model", "'tiny' is"),
    ({**CHAT, "tools": [{"type": "x"}]}, 400, "tools[0]", "must read"),
    ({**CHAT, "tool_choice": "required"}, 400, "tool_choice", "no tools"),
    ({**CHAT, "tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "wether"}}},
     400, "tool_choice", "did you mean 'weather'"),
    ({**CHAT, "max_tokens": 5000}, 400, "messages", "2048 positions"),
    ({"messages": [{"role": "user", "content": "ab " * 3000}]}, 400, "messages", "this server takes 1500"),
    ({"messages": [{"role": "user", "content": "x" * 300_000}]}, 413, None, "200000 bytes"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_request_is_told_what_is_wrong(server: Running, number: int) -> None:
    body, status, param, words = WRONG[number]
    for more in ({}, {"stream": True}):
        sent = body if isinstance(body, bytes) else {**body, **more}
        found, headers, data = server.call("POST", "/v1/chat/completions", sent)
        assert headers["content-type"] == "application/json"
        error = json.loads(data)["error"]
        assert (found, error["param"]) == (status, param), error
        assert words in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
        if "stream_options" in str(body):
            break
    assert server.service.desk.open == 0


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": [[]]}, "prompt", "empty list of tokens"),
        ({"prompt": [1, -2]}, "prompt", "token -2"),
        ({"prompt": [512]}, "prompt", "token 512"),
        ({"prompt": 7}, "prompt", "valid string"),
        ({"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
        ({"prompt": "x", "best_of": 3}, "best_of", "not supported"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "echo", "not supported"),
        ({"prompt": "x", "messages": []}, "messages", "unknown"),
    ],
)
def test_a_wrong_completion_request(server: Running, fields: dict[str, Any], param: str, words: str) -> None:
    status, _, data = server.call("POST", "/v1/completions", fields)
    error = json.loads(data)["error"]
    assert (status, error["param"]) == (400, param)
    assert words in error["message"]


def test_wrong_paths_methods_types_and_hosts(server: Running) -> None:
    for method, path, headers, status, words in (
        ("GET", "/v2", {}, 404, "/v2"),
        ("GET", "/v1/chat/completions", {}, 405, "Not Allowed"),
        ("POST", "/v1/chat/completions", {"Content-Type": "text/plain"}, 415, "application/json"),
        ("GET", "/v1/models", {"Host": "evil.example"}, 403, "evil.example"),
        ("GET", "/v1/models", {"Host": "localhost:99"}, 200, "tiny"),
        ("GET", "/v1/models", {"Host": "[::1]:99"}, 200, "tiny"),
    ):
        found, _, body = server.call(method, path, None if method == "GET" else CHAT, headers)
        assert found == status
        assert words in body.decode()


def test_a_body_that_lies_about_its_size(server: Running) -> None:
    def send(text: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(text)
            received = b""
            while part := connection.recv(65536):
                received += part
                if b"}}" in received:
                    break
            return received

    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert b" 413 " in send(head + b"Content-Length: 999999999\r\n\r\n{")
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    assert b" 413 " in send(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 4)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head + b"Content-Length: 100\r\n\r\n{")  # and leaves
    assert server.chat(max_tokens=1)[0] == 200


@settings(max_examples=150)
@given(st.binary(max_size=200))
def test_no_bytes_are_the_servers_fault(server: Running, body: bytes) -> None:
    status, _, data = server.call("POST", "/v1/chat/completions", body)
    assert status == 400
    assert json.loads(data)["error"]["type"] == "invalid_request_error"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150)
@given(data=st.data())
def test_no_value_of_a_known_field_is_the_servers_fault(server: Running, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["messages", "stop", "n", "seed", "tools", "tool_choice", "logprobs", "top_k"]))
    value = data.draw(JSON | st.lists(st.dictionaries(st.sampled_from(["role", "content", "tool_calls"]), JSON)))
    tools = {"tools": [WEATHER]} if name != "tools" else {}
    status, _, body = server.chat(**{**CHAT, **tools, "max_tokens": 1, name: value})
    assert status in (200, 400), body


def test_a_client_that_leaves_stops_its_answer(server: Running) -> None:
    before = server.metric("trinity_disconnects_total")
    fields = {"ignore_eos": True, "max_tokens": 1500}
    with server.open_stream(**fields):
        assert server.metric("trinity_answers_running") == 1
    whole = socket.create_connection(("127.0.0.1", server.port))
    body = json.dumps({**CHAT, **fields}).encode()
    whole.sendall(raw_head(len(body)) + body)
    wait_for(lambda: server.metric("trinity_answers_running") == 1)
    whole.close()
    wait_for(lambda: server.metric("trinity_disconnects_total") == before + 2)
    wait_for(lambda: server.metric("trinity_cache_bytes") == 0)
    assert server.service.desk.open == 0


def test_every_sampled_stream_is_whole(server: Running) -> None:
    """Whatever the random answer, its stream and its whole agree, and the stream's JSON is sound."""
    for seed in range(8):
        fields = {"seed": seed, "temperature": 3.0, "max_tokens": 40, "messages": ask("the cat"), "tools": [WEATHER]}
        whole = server.chat(**fields)[2]["choices"][0]
        data = server.call("POST", "/v1/chat/completions", {**fields, "stream": True})[2]
        assert data.endswith(b"data: [DONE]\n\n")
        events = parse_events(data)
        assert joined(events, "content") == (whole["message"]["content"] or "")
        assert joined(events, "reasoning_content") == whole["message"].get("reasoning_content", "")
        assert events[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
