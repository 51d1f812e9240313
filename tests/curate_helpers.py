"""Documents, a writer in OpenAI's protocol that obeys, and one that misbehaves: for the tests of curation."""

import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from trinity.config.curate import CurateConfig
from trinity.curate.blocks import read_block

WORDS = [
    "the",
    "river",
    "harbour",
    "winter",
    "captain",
    "letter",
    "village",
    "teacher",
    "mountain",
    "garden",
    "window",
    "market",
    "yellow",
    "silver",
    "answer",
    "journey",
    "carried",
    "remembered",
    "opened",
    "painted",
    "followed",
    "measured",
    "between",
    "under",
    "without",
    "before",
    "after",
    "every",
    "several",
    "quiet",
    "narrow",
    "sudden",
    "distant",
    "ordinary",
    "and",
    "of",
    "in",
    "to",
    "with",
    "a",
    "from",
    "over",
    "their",
    "his",
    "her",
]


def prose(seed: int, words: int = 120) -> str:
    """Sentences of random words with a few numbers; two seeds share hardly a run of five words."""
    draw = random.Random(seed)
    sentences = []
    while words > 0:
        count = draw.randrange(8, 16)
        sentence = [draw.choice(WORDS) for _ in range(count)]
        if draw.random() < 0.3:
            sentence[draw.randrange(count)] = str(draw.randrange(100, 3000))
        sentences.append(" ".join(sentence).capitalize() + ".")
        words -= count
    return " ".join(sentences)


def write_documents(path: Path, count: int = 24) -> Path:
    """JSON lines: `count` documents, then an exact and a near duplicate, a short, a Russian and a broken one."""
    texts = [prose(seed) for seed in range(count)]
    texts.append(texts[0])
    texts.append(texts[1].replace("The ", "That ", 1) + " Indeed.")
    texts += ["Too short.", "Река течёт медленно через старый город, и люди идут домой вечером. " * 6]
    lines = [json.dumps({"text": t, "id": f"d{i}", "domain": "web" if i % 3 else "books"}) for i, t in enumerate(texts)]
    lines.insert(5, "{broken")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rewrite(body: dict[str, Any]) -> str:
    """What an obedient writer answers: the passage with a word put in now and then, in the language of the prompt."""
    passage = body["messages"][-1]["content"].split("Passage:\n", 1)[1]
    words = []
    for number, word in enumerate(passage.split()):
        words += [word, "perhaps"] if number % 4 == 3 else [word]
    return " ".join(words)


Misbehave = Callable[[int, dict[str, Any]], str | None]
"""(number of the call, body) -> None to obey, or error, stall, rubbish, empty, refuse, hang up."""


@dataclass
class Writer:
    """A server; `faults` counts what it did wrong."""

    url: str
    calls: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    busy: int = 0
    most_busy: int = 0


@contextmanager
def writer(
    misbehave: Misbehave = lambda number, body: None,
    answer: Callable[[dict[str, Any]], str] = rewrite,
    pause: float = 0.0,
    stall: float = 30.0,
) -> Iterator[Writer]:
    """A server in OpenAI's protocol on a free port of loopback."""
    stalled = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with found.lock:
                found.calls += 1
                number = found.calls
                found.bodies.append(body)
                found.busy += 1
                found.most_busy = max(found.most_busy, found.busy)
            try:
                self._answer(number, body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with found.lock:
                    found.busy -= 1

        def _answer(self, number: int, body: dict[str, Any]) -> None:
            time.sleep(pause)
            fault = misbehave(number, body)
            if fault is not None:
                with found.lock:
                    found.faults[fault] += 1
            if fault == "stall":
                stalled.wait(stall)
                self.close_connection = True
                return
            if fault == "hang up":
                self.close_connection = True
                return
            if fault in ("error", "unknown"):
                self._send(500 if fault == "error" else 404, {"error": {"message": "made up"}})
                return
            if fault == "rubbish":
                self._send(200, {"object": "nothing", "choices": "none"})
                return
            text = {"empty": "", "refuse": "I'm sorry, but I cannot help with that."}.get(fault or "")
            text = answer(body) if text is None else text
            usage = {"prompt_tokens": len(str(body["messages"])) // 4, "completion_tokens": len(text) // 4}
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            self._send(200, {"model": body["model"], "choices": [choice], "usage": usage})

        def _send(self, status: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            del request, client_address

    server = Server(("127.0.0.1", 0), Handler)
    found = Writer(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield found
    finally:
        stalled.set()
        server.shutdown()
        server.server_close()
        thread.join()


def recipe_for(inputs: Path, url: str, **changes: Any) -> CurateConfig:
    """A recipe with one rewrite, small blocks and quick retries; `changes` replace keys of sections."""
    sections: dict[str, Any] = {
        "input": {"paths": [str(inputs)], "block_bytes": 4000},
        "filter": {"languages": ["en"], "min_language_probability": 0.0},
        "rephrase": [{"recipe": "encyclopaedia", "max_tokens": 64}],
        "generate": {
            "backend": "endpoint",
            "endpoints": [{"url": url, "model": "made-up", "concurrency": 4, "output_price": 2.0}],
            "backoff": 0.01,
            "timeout": 20.0,
        },
        "run": {"workers": 1, "object_store_mib": 80, "task_mib": 64},
    }
    for key, value in changes.items():
        sections[key] = {**sections.get(key, {}), **value} if isinstance(value, dict) else value
    return CurateConfig.model_validate(sections)


def written(out: Path) -> dict[str, str]:
    """Text by id of everything committed; each id once."""
    texts: dict[str, str] = {}
    for path in sorted((out / "data").glob("*.parquet")):
        rows = read_block(path, ["id", "text"])
        for id, text in zip(rows["id"], rows["text"], strict=True):
            assert id not in texts, f"{id} was written twice"
            texts[id] = text
    return texts


class Serial:
    """The graph without a cluster: the same functions in this process, one after the other."""

    def __init__(self, *_: Any) -> None:
        pass

    def each(self, function: Callable[..., Any], items: Any, *shared: Any) -> Iterator[Any]:
        for item in items:
            yield function(item, *shared)

    def ask(self, blocks, config, endpoints, work, retry, purse, finish, shared) -> Iterator[Any]:
        from trinity.curate.asking import Asker
        from trinity.curate.client import Client

        asker = Asker(Client(config, endpoints, purse), work, config, retry)
        try:
            for block in blocks:
                asker.ask_block(block)
                yield finish(block, *shared)
        finally:
            asker.close()

    def purse(self, config: CurateConfig, tokens: int, money: float):
        from trinity.curate.purse import Purse

        return Purse(config.budget, tokens, money)


@contextmanager
def serial(*_: Any) -> Iterator[Serial]:
    """In the place of `trinity.curate.run.cluster`."""
    yield Serial()


def main() -> None:
    """INPUT URL OUT KIND: one curation, for a process that is killed; KIND is serial or ray."""
    inputs, url, out, kind = sys.argv[1:]
    from trinity.curate import run

    if kind == "serial":
        run.cluster = serial  # pyright: ignore[reportAttributeAccessIssue]
    run.curate(recipe_for(Path(inputs), url), Path(out))
    os._exit(0)


if __name__ == "__main__":
    main()
