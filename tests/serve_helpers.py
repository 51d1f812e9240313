"""A server in a thread of the test process, and a small model that was taught what to answer."""

import http.client
import json
import math
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from test_export import SMALL, random_model
from trinity.config import ServeConfig, TokenizerConfig
from trinity.model.transformer import Transformer
from trinity.serve.app import Service
from trinity.serve.run import Server, listen, server_settings
from trinity.tokenizer import Tokenizer, train_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TAUGHT = {
    "Say it.": "The *sea* is **calm**.\n\n```python\nprint(1)\n```\n<img src=x onerror=alert(1)>",
    "Think.": "<think>\nOne and one.\n</think>\n\nTwo.",
    "Weather?": f"I look.\n{CALL}\n{CALL.replace('Paris', 'Rome')}",
    "Café?": "Olé, señor 🌊!",
}
"""What the taught model answers to a message; the third question comes with WEATHER."""


def make_tokenizer() -> Tokenizer:
    texts = [*TAUGHT, *TAUGHT.values(), json.dumps(WEATHER), "system user assistant tool the cat sat on the mat"]
    return train_tokenizer([text + "\n" for text in texts] * 20, TokenizerConfig(vocab_size=512))


def taught_model(tokenizer: Tokenizer) -> Transformer:
    """Trained on TAUGHT until it gives every answer with certainty."""
    torch.manual_seed(0)
    config = SMALL.model_copy(update={"vocab_size": 512, "dim": 64, "max_positions": 2048, "window": 64})
    model = Transformer(config)
    model.init_weights(0)
    rows, targets = [], []
    for question, answer in TAUGHT.items():
        tools = [WEATHER] if question == "Weather?" else None
        prompt = tokenizer.render_chat([{"role": "user", "content": question}], tools, add_generation_prompt=True)
        before = tokenizer.encode(prompt, special=True)
        after = tokenizer.encode(answer + "<|im_end|>", special=True)
        rows.append(torch.tensor(before + after[:-1]))
        targets.append(torch.tensor([-100] * (len(before) - 1) + after))
    rows_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    targets_BT = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    worst = math.inf
    for _ in range(200):
        losses = torch.nn.functional.cross_entropy(model(rows_BT).transpose(1, 2), targets_BT, reduction="none")
        worst = losses.max().item()
        if worst < 0.02:
            break
        (losses.sum() / (targets_BT >= 0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert worst < 0.02
    return model.eval()


def slow_model(max_positions: int = 8192) -> Transformer:
    """Random weights; an answer to it never ends by itself when eos is ignored."""
    return random_model(SMALL.model_copy(update={"vocab_size": 512, "max_positions": max_positions}))


@dataclass
class Running:
    """A server that listens."""

    service: Service
    server: Server
    port: int

    @classmethod
    def at(cls, port: int) -> "Running":
        """A server in another process, of which only the port is known."""
        return cls(None, None, port)  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 60
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own: status, headers in lower case, body."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def chat(self, **fields: Any) -> tuple[int, dict[str, str], Any]:
        """A chat request; the answer's JSON."""
        fields.setdefault("messages", [{"role": "user", "content": "the cat"}])
        status, headers, body = self.call("POST", "/v1/chat/completions", fields)
        return status, headers, json.loads(body)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = self.call("GET", "/metrics")[2].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def open_stream(self, **fields: Any) -> socket.socket:
        """A socket on which a streamed chat answer has begun to arrive."""
        fields = {"messages": [{"role": "user", "content": "the cat"}], "stream": True, "ignore_eos": True, **fields}
        data = json.dumps(fields).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(raw_head(len(data)) + data)
        received = b""
        while received.count(b"data: ") < 2:
            received += connection.recv(65536)
        return connection


@contextmanager
def serving(
    model: Transformer, tokenizer: Tokenizer, *, api_key: str | None = None, **settings: Any
) -> Iterator[Running]:
    """A server on any free port, ended with the block."""
    config = ServeConfig(**{"name": "tiny", "port": 0, "shutdown_seconds": 2.0, **settings})
    service = Service(model, tokenizer, config, api_key=api_key)
    started = threading.Event()
    listener = listen(config.host, config.port)
    port = listener.getsockname()[1]
    server = Server(server_settings(service), service, lambda *_: started.set())
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert started.wait(30)
        yield Running(service, server, port)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


def raw_head(length: int) -> bytes:
    """The head of a chat request, for sockets."""
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def parse_events(data: bytes) -> list[Any]:
    """The JSON of server-sent events; the end mark is left out."""
    lines = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def joined(events: Sequence[Any], key: str) -> str:
    """The concatenation of one field of all deltas."""
    return "".join(choice["delta"].get(key) or "" for event in events for choice in event["choices"])
