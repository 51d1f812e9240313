"""Clients of a server under load: well-behaved ones that check every byte, and ones that do everything wrong.

Plain sockets, so that a client can be as wrong as it likes. No torch.
"""

import asyncio
import contextlib
import dataclasses
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable

WORDS = "the sea was calm and old boats lay under a pale sky while men mended nets and spoke of winter storms".split()  # noqa: SIM905
PATIENCE = 300.0
"""Seconds after which a client that waits gives up; an error for a well-formed request."""


@dataclasses.dataclass
class Answer:
    """A streamed answer that came whole."""

    first: float
    """Seconds until the first token."""
    whole: float
    gaps: list[float]
    """Seconds between two pieces of text."""
    tokens: int
    text: str


@dataclasses.dataclass
class Tally:
    """What the clients saw."""

    answers: list[Answer] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    """Well-formed requests that failed, and wrong ones that were answered with something else than a refusal."""
    wrong: Counter[str] = dataclasses.field(default_factory=Counter)
    """Wrong requests by kind and what became of them."""
    compared: int = 0
    """Greedy answers that were compared with the one given without any load."""
    different: int = 0


class Client:
    """Talks to one server."""

    def __init__(self, port: int, model: str, tally: Tally) -> None:
        self.port, self.model, self.tally = port, model, tally

    def body(self, prompt: str, max_tokens: int, **fields: object) -> bytes:
        """A chat request as it should be."""
        message = {"role": "user", "content": prompt}
        asked = {"model": self.model, "messages": [message], "max_tokens": max_tokens, "stream": True}
        return json.dumps({**asked, "stream_options": {"include_usage": True}, "ignore_eos": True, **fields}).encode()

    def head(self, length: int, path: str = "/v1/chat/completions", method: str = "POST", more: str = "") -> bytes:
        """Request line and headers."""
        lines = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
        return f"{lines}Connection: close\r\nContent-Length: {length}\r\n\r\n".encode()

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, prompt: str, max_tokens: int, **fields: object) -> Answer:
        """Stream one answer. Raises ValueError when anything about it is not as it must be."""
        begun = time.monotonic()
        reader, writer = await self.open()
        try:
            body = self.body(prompt, max_tokens, **fields)
            writer.write(self.head(len(body)) + body)
            await writer.drain()
            status = int((await reader.readline()).split()[1])
            while (await reader.readline()).strip():
                pass
            if status != 200:
                raise ValueError(f"status {status}: {(await reader.read(500)).decode(errors='replace')}")
            text, finish, usage, ended = [], None, None, False
            first, last, gaps = 0.0, begun, []
            while line := await reader.readline():
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    ended = True
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(f"an error within the stream: {event['error']['message']}")
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    finish = choice["finish_reason"] or finish
                    if content := choice["delta"].get("content"):
                        now = time.monotonic()
                        if text:
                            gaps.append(now - last)
                        else:
                            first = now - begun
                        last = now
                        text.append(content)
            if not ended or finish != "length" or usage is None or usage["completion_tokens"] != max_tokens:
                raise ValueError(f"the stream ended with {finish}, {usage}, {'whole' if ended else 'cut off'}")
            whole = time.monotonic() - begun
            return Answer(first or whole, whole, gaps, max_tokens, "".join(text))
        finally:
            await close(writer)

    async def send(self, data: bytes) -> str:
        """Send bytes; the status of what comes back, or "closed"."""
        reader, writer = await self.open()
        try:
            try:
                writer.write(data)
                await writer.drain()
            except ConnectionError:  # the server has heard enough; what it said may still be there
                pass
            try:
                line = await reader.readline()
                await reader.read()
            except ConnectionError:
                return "closed"
            return line.split()[1].decode() if line.startswith(b"HTTP/1.1 ") else "closed"
        finally:
            await close(writer)


async def close(writer: asyncio.StreamWriter) -> None:
    """Let go of a connection, whatever state it is in."""
    writer.close()
    with contextlib.suppress(ConnectionError, TimeoutError):
        await asyncio.wait_for(writer.wait_closed(), 5)


async def well_behaved(client: Client, seed: int, until: float, expected: str, fixed: str) -> None:
    """One answer after the other until the time is up: random ones, and a fixed greedy one now and then."""
    draws, tally = random.Random(seed), client.tally
    while time.monotonic() < until:
        compare = draws.random() < 0.25
        try:
            async with asyncio.timeout(PATIENCE):
                if compare:
                    answer = await client.ask(fixed, 24, temperature=0)
                    tally.compared += 1
                    tally.different += answer.text != expected
                else:
                    prompt = " ".join(draws.choices(WORDS, k=draws.choice((3, 30, 150))))
                    rules = draws.choice(({}, {"top_p": 0.9}, {"top_k": 20, "min_p": 0.05}, {"seed": seed}))
                    answer = await client.ask(prompt, draws.randint(8, 48), temperature=0.8, **rules)
            tally.answers.append(answer)
        except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
            tally.errors.append(f"{type(error).__name__}: {error}"[:300])
            await asyncio.sleep(0.1)  # a server that is gone is not asked a million times


async def leaves(client: Client, draws: random.Random) -> str:
    """Goes away in the middle of a stream, without a word."""
    reader, writer = await client.open()
    body = client.body("the sea", 200)
    writer.write(client.head(len(body)) + body)
    await writer.drain()
    await reader.read(draws.randint(1, 2000))
    writer.transport.abort()
    return "left"


async def reads_slowly(client: Client, draws: random.Random) -> str:
    """Takes a few bytes a moment, then loses interest."""
    reader, writer = await client.open()
    body = client.body("the sea", 300)
    writer.write(client.head(len(body)) + body)
    await writer.drain()
    for _ in range(draws.randint(3, 12)):
        await reader.read(64)
        await asyncio.sleep(0.25)
    await close(writer)
    return "left"


async def sends_half(client: Client, draws: random.Random) -> str:
    """Promises a body and sends a part of it."""
    _, writer = await client.open()
    writer.write(client.head(10_000) + b'{"messages": [')
    await writer.drain()
    await asyncio.sleep(draws.uniform(0.1, 2))
    writer.transport.abort()
    return "left"


def sends(make: Callable[[Client, random.Random], bytes]) -> Callable[[Client, random.Random], Awaitable[str]]:
    """A wrong request from its bytes."""

    async def send(client: Client, draws: random.Random) -> str:
        return await client.send(make(client, draws))

    return send


def _with(client: Client, body: bytes) -> bytes:
    return client.head(len(body)) + body


WRONG: dict[str, tuple[Callable[[Client, random.Random], Awaitable[str]], set[str]]] = {
    "malformed JSON": (sends(lambda c, d: _with(c, c.body("x", 4)[: d.randint(1, 60)])), {"400"}),
    "invalid UTF-8": (sends(lambda c, _: _with(c, c.body("@", 4).replace(b"@", b"\xff\xfe"))), {"400"}),
    "random bytes": (sends(lambda c, d: _with(c, d.randbytes(d.randint(1, 4000)))), {"400"}),
    "not HTTP": (sends(lambda _, d: d.randbytes(200) + b"\r\n\r\n"), {"400", "closed"}),
    "oversize prompt": (sends(lambda c, _: _with(c, c.body("storm " * 20_000, 4))), {"400"}),
    "oversize answer": (sends(lambda c, _: _with(c, c.body("x", 10_000_000))), {"400"}),
    "oversize body": (sends(lambda c, _: _with(c, c.body("x" * (2 << 20), 4))), {"413", "closed"}),
    "huge headers": (sends(lambda c, _: c.head(0, more=f"X-Long: {'x' * 300_000}\r\n")), {"400", "431", "closed"}),
    "unknown field": (sends(lambda c, _: _with(c, c.body("x", 4, max_tokenz=3))), {"400"}),
    "unknown model": (sends(lambda c, _: _with(c, c.body("x", 4, model="gpt"))), {"404"}),
    "unknown path": (sends(lambda c, _: c.head(0, path="/v1/nothing")), {"404"}),
    "wrong method": (sends(lambda c, _: c.head(0, method="DELETE")), {"405"}),
    "leaves mid-stream": (leaves, {"left"}),
    "reads slowly": (reads_slowly, {"left"}),
    "half a body": (sends_half, {"left"}),
}
"""Every kind of wrong client, and what may become of it."""


async def badly_behaved(client: Client, kind: str, seed: int, until: float, pause: float) -> None:
    """One wrong request after the other."""
    draws, tally = random.Random(seed), client.tally
    act, allowed = WRONG[kind]
    while time.monotonic() < until:
        try:
            async with asyncio.timeout(PATIENCE):
                seen = await act(client, draws)
        except (OSError, TimeoutError) as error:
            seen = type(error).__name__
        tally.wrong[f"{kind}: {seen}"] += 1
        # Every answer that is being generated may be ended by a full queue; a wrong request is never taken for right.
        if seen not in {*allowed, "429"}:
            tally.errors.append(f"{kind}: {seen} instead of {', '.join(sorted(allowed))}")
        await asyncio.sleep(draws.uniform(0, 2 * pause))
