"""From tokens to the JSON of OpenAI's answers, whole or as a stream of chunks."""

import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trinity.serve.tools import AnswerParser, Call, Content, Part, Reasoning
from trinity.serve.worker import Piece
from trinity.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class Choice:
    """One of the n answers to a request. `take` returns the delta of a stream, and remembers the whole."""

    def __init__(self, index: int, tokenizer: Tokenizer, stop_ids: Sequence[int], *, wants_logprobs: bool) -> None:
        self.index = index
        self.tokens = 0
        self.finish_reason: str | None = None
        self._tokenizer = tokenizer
        self._stop_ids = set(stop_ids)
        self._wants_logprobs = wants_logprobs
        self._fresh: list[Piece] = []
        """Tokens whose log-probabilities were not sent yet."""
        self._all: list[Piece] = []

    def _count(self, piece: Piece) -> None:
        self.tokens += 1
        # The token that ends the turn is no part of the answer.
        if self._wants_logprobs and not (piece.finish == "stop" and piece.token in self._stop_ids):
            self._fresh.append(piece)
            self._all.append(piece)

    def _take_fresh(self) -> list[Piece]:
        fresh, self._fresh = self._fresh, []
        return fresh


class ChatChoice(Choice):
    """A chat answer, its reasoning and its tool calls told apart."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
        parser: AnswerParser,
        *,
        wants_logprobs: bool,
    ) -> None:
        super().__init__(index, tokenizer, stop_ids, wants_logprobs=wants_logprobs)
        self._parser = parser
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def opening(self) -> dict[str, Any]:
        """What a stream begins with: who speaks."""
        return {"index": self.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def take(self, piece: Piece) -> list[dict[str, Any]]:
        """The stream's choices that a token gives rise to: usually one, none while text is held back."""
        self._count(piece)
        parts = self._parser.push(piece.text)
        if piece.finish is not None:
            parts += self._parser.finish()
            self.finish_reason = "tool_calls" if self._parser.calls else piece.finish
        chosen = [{"index": self.index, "delta": delta, "finish_reason": None} for delta in self._deltas(parts)]
        if piece.finish is not None:
            chosen.append({"index": self.index, "delta": {}, "finish_reason": self.finish_reason})
        if chosen and self._wants_logprobs:
            for one in chosen:
                one["logprobs"] = None
            chosen[0]["logprobs"] = self._logprobs(self._take_fresh())
        return chosen

    def whole(self) -> dict[str, Any]:
        """The finished answer."""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(self._content) if self._content or not self._calls else None,
            "refusal": None,
        }
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in self._calls]
        logprobs = self._logprobs(self._all) if self._wants_logprobs else None
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def _deltas(self, parts: Iterable[Part]) -> Iterable[dict[str, Any]]:
        for part in parts:
            if isinstance(part, Content):
                self._content.append(part.text)
                yield {"content": part.text}
            elif isinstance(part, Reasoning):
                self._reasoning.append(part.text)
                yield {"reasoning_content": part.text}
            else:
                self._calls.append(_call(part, len(self._calls)))
                yield {"tool_calls": [self._calls[-1]]}

    def _logprobs(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        rows = []
        for piece in pieces:
            top = [_scored(self._tokenizer, token, logprob) for token, logprob in piece.top]
            rows.append(_scored(self._tokenizer, piece.token, piece.logprob) | {"top_logprobs": top})
        return {"content": rows, "refusal": None}


class TextChoice(Choice):
    """A plain continuation; `echo` is the prompt, where it shall be repeated."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, stop_ids: Sequence[int], echo: str, *, wants_logprobs: bool
    ) -> None:
        super().__init__(index, tokenizer, stop_ids, wants_logprobs=wants_logprobs)
        self._echo = echo
        self._text: list[str] = []
        self._offset = len(echo)

    def take(self, piece: Piece) -> list[dict[str, Any]]:
        """The stream's choices that a token gives rise to."""
        self._count(piece)
        self.finish_reason = piece.finish
        text = piece.text if self._text else self._echo + piece.text
        if not text and piece.finish is None:
            return []
        self._text.append(text)
        logprobs = self._logprobs(self._take_fresh()) if self._wants_logprobs else None
        return [{"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish}]

    def whole(self) -> dict[str, Any]:
        """The finished answer."""
        self._offset = len(self._echo)
        logprobs = self._logprobs(self._all) if self._wants_logprobs else None
        return {
            "index": self.index,
            "text": "".join(self._text),
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
        }

    def _logprobs(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        names, scores, tops, offsets = [], [], [], []
        for piece in pieces:
            name = self._tokenizer.decode([piece.token])
            names.append(name)
            scores.append(_finite(piece.logprob))
            tops.append({self._tokenizer.decode([token]): _finite(logprob) for token, logprob in piece.top})
            offsets.append(self._offset)
            self._offset += len(name)
        return {"tokens": names, "token_logprobs": scores, "top_logprobs": tops, "text_offset": offsets}


class Envelope:
    """What surrounds the choices: id, time, model."""

    def __init__(self, kind: str, model: str, prompt_tokens: int, *, chat: bool, include_usage: bool) -> None:
        self.id = f"{kind}-{secrets.token_hex(12)}"
        self.prompt_tokens = prompt_tokens
        self._whole = "chat.completion" if chat else "text_completion"
        self._chunk = "chat.completion.chunk" if chat else "text_completion"
        self._created = int(time.time())
        self._model = model
        self._include_usage = include_usage

    def whole(self, choices: Sequence[Mapping[str, Any]], new_tokens: int) -> dict[str, Any]:
        """The answer in one piece."""
        return self._around(self._whole) | {"choices": list(choices), "usage": self._usage(new_tokens)}

    def chunk(self, choice: Mapping[str, Any]) -> bytes:
        """One event of a stream."""
        body = self._around(self._chunk) | {"choices": [choice]}
        return event(body | {"usage": None} if self._include_usage else body)

    def last(self, new_tokens: int) -> bytes:
        """The usage, where it is wanted, and the end of a stream."""
        end = b"data: [DONE]\n\n"
        if not self._include_usage:
            return end
        return event(self._around(self._chunk) | {"choices": [], "usage": self._usage(new_tokens)}) + end

    def _around(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self, new_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": self.prompt_tokens + new_tokens,
        }


def event(body: Mapping[str, Any]) -> bytes:
    """A JSON object as a server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'), allow_nan=False)}\n\n".encode()


def _call(call: Call, index: int) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": index, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _scored(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.decode_bytes([token])
    return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
