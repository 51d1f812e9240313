"""The markup of an answer, back into fields while it streams: `<think>` as reasoning, `<tool_call>` as calls.

    parser = AnswerParser(tools=True)
    for piece in pieces:
        for part in parser.push(piece): ...   # Content, Reasoning or Call
    for part in parser.finish(): ...

A call is given out once it is whole and well formed. What is not (broken JSON, an answer cut in the middle) is given
out as content, as the model wrote it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str
    """A JSON object as text."""


Part = Content | Reasoning | Call
State = Literal["start", "think", "after think", "content", "call", "after call"]


class AnswerParser:
    """Takes an answer piece by piece; the concatenated parts do not depend on how it was cut.

    tools: whether calls may come. thinking: whether the prompt has already opened `<think>`. prefix: the beginning of
    the answer that the prompt wrote in the model's place. schemas: the tools, for the types of XML parameters.
    """

    def __init__(
        self,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool = False,
        prefix: str = "",
    ) -> None:
        self._tools = tools
        self._state: State = "think" if thinking else "start"
        self._buffer = ""
        self._searched = 0
        """Characters of the buffer that hold no beginning of the tag looked for."""
        self._fresh = thinking
        """Whether white space at the beginning of the reasoning is still to be dropped."""
        self.calls = 0
        if prefix:
            self.push(prefix)

    def push(self, text: str) -> list[Part]:
        """What became certain with `text`."""
        self._buffer += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """The rest, once the answer is complete."""
        rest, self._buffer = self._buffer, ""
        if self._state == "think":
            return [Reasoning(rest.rstrip())] if rest.strip() else []
        if self._state == "call":
            call = _read_call(rest, self._tools)  # a stop string may have taken the closing tag
            if call is not None:
                self.calls += 1
                return [call]
            return [Content(CALL + rest)]
        if self._state in ("after think", "after call"):
            return [Content("\n" + rest.lstrip())] if rest.strip() else []
        return [Content(rest)] if rest else []

    def _advance(self, parts: list[Part]) -> bool:
        """One transition; False when more text is needed."""
        if self._state == "start":
            return self._start()
        if self._state == "think":
            return self._think(parts)
        if self._state in ("after think", "after call"):
            self._buffer = self._buffer.lstrip()
            if not self._buffer:
                return False
            if self._state == "after call":
                if len(self._buffer) < len(CALL) and CALL.startswith(self._buffer):
                    return False
                if not self._buffer.startswith(CALL):
                    self._buffer = "\n" + self._buffer
            self._state = "content"
            return True
        return self._content(parts) if self._state == "content" else self._call(parts)

    def _start(self) -> bool:
        text = self._buffer.lstrip()
        if text.startswith(THINK):
            self._buffer, self._state, self._fresh = text[len(THINK) :], "think", True
            return True
        if THINK.startswith(text):
            return False
        self._state = "content"
        return True

    def _think(self, parts: list[Part]) -> bool:
        if self._fresh:
            self._buffer = self._buffer.lstrip()
            self._fresh = not self._buffer
        place = self._buffer.find(THINK_END)
        if place >= 0:
            _add(parts, Reasoning(self._buffer[:place].rstrip()))
            self._buffer, self._state = self._buffer[place + len(THINK_END) :], "after think"
            return True
        self._give(parts, Reasoning, THINK_END)
        return False

    def _content(self, parts: list[Part]) -> bool:
        if not self._tools:
            _add(parts, Content(self._buffer))
            self._buffer = ""
            return False
        place = self._buffer.find(CALL)
        if place >= 0:
            _add(parts, Content(self._buffer[:place].rstrip()))
            self._buffer, self._state, self._searched = self._buffer[place + len(CALL) :], "call", 0
            return True
        self._give(parts, Content, CALL)
        return False

    def _call(self, parts: list[Part]) -> bool:
        place = self._buffer.find(CALL_END, self._searched)
        if place < 0:
            self._searched = max(0, len(self._buffer) - len(CALL_END))
            return False
        body, self._buffer, self._searched = self._buffer[:place], self._buffer[place + len(CALL_END) :], 0
        call = _read_call(body, self._tools)
        if call is None:
            _add(parts, Content(CALL + body + CALL_END))
            self._state = "content"
        else:
            parts.append(call)
            self.calls += 1
            self._state = "after call"
        return True

    def _give(self, parts: list[Part], kind: type[Content] | type[Reasoning], tag: str) -> None:
        """Everything but white space at the end, which a tag would swallow, and what may begin the tag."""
        text = self._buffer
        begun = next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-n:])), 0)
        certain = text[: len(text) - begun].rstrip()
        _add(parts, kind(certain))
        self._buffer = text[len(certain) :]


def _add(parts: list[Part], part: Content | Reasoning) -> None:
    if part.text:
        parts.append(part)


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>)?\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL)


def _read_call(body: str, tools: Sequence[Mapping[str, Any]]) -> Call | None:
    """A call from between its tags: one JSON object, or the XML form that some published models write."""
    xml = _FUNCTION.fullmatch(body)
    if xml is not None:
        types = _parameter_types(xml[1], tools)
        values = {key: _value(text, types.get(key)) for key, text in _PARAMETER.findall(xml[2])}
        return Call(xml[1], json.dumps(values, ensure_ascii=False))
    try:
        call = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    return Call(call["name"], json.dumps(arguments, ensure_ascii=False))


def _parameter_types(name: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    for tool in tools:
        function = tool.get("function", {})
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return {key: schema.get("type") for key, schema in properties.items() if isinstance(schema, Mapping)}
    return {}


def _value(text: str, kind: Any) -> Any:
    """A parameter's text as its schema's type; without one, as text."""
    text = text.removeprefix("\n").removesuffix("\n")
    if kind in (None, "string"):
        return text
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return text


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
