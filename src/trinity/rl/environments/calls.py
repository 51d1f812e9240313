"""Tool calls in what a model wrote, in the form of the project's chat template."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from trinity.rl.rewards.attempt import Message

_BLOCK = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_THOUGHT = re.compile(r"\A\s*<think>(.*?)</think>", re.DOTALL)
_DISARMED = re.compile(r"< (?=(?:\|(?:endoftext|im_start|im_end)\||/?(?:think|tool_call|tool_response))>)")


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Said:
    """A turn taken apart."""

    thought: str
    content: str
    calls: list[Call]
    problems: list[str] = field(default_factory=list)
    """A sentence for each call that cannot be read, to be told to the model."""

    def message(self) -> Message:
        message: Message = {"role": "assistant", "content": self.content}
        if self.thought:
            message["reasoning_content"] = self.thought
        if self.calls or self.problems:
            message["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in self.calls]
        if self.problems and not self.calls:  # a tool's answer may only follow a call
            message["tool_calls"] = [{"name": "unreadable", "arguments": {}}]
        return message


def read_calls(text: str) -> Said:
    """Thought, words and calls of a turn. Never raises: what cannot be read is a problem of the turn."""
    thought = _THOUGHT.match(text)
    rest = text[thought.end() :] if thought else text
    calls, problems = [], []
    for block in _BLOCK.findall(rest):
        found = _read(block)
        (calls if isinstance(found, Call) else problems).append(found)
    outside = _BLOCK.sub("", rest)
    if "<tool_call>" in outside:
        problems.append("A tool call was begun and not ended: write </tool_call> after it.")
        outside = outside.partition("<tool_call>")[0]
    return Said(thought.group(1).strip() if thought else "", outside.strip(), calls, problems)


def _read(block: str) -> Call | str:
    try:
        value = json.loads(rearm(block.strip()))
    except (ValueError, RecursionError) as error:
        return f"A tool call is not JSON: {error}"
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return 'A tool call must be an object {"name": NAME, "arguments": {...}}.'
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return f"The arguments of {value['name']} must be an object."
    return Call(value["name"], arguments)


def rearm(text: str) -> str:
    """Words of the protocol as they were before the template set a space into them."""
    return _DISARMED.sub("<", text)
