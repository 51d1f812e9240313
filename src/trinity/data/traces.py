"""Sessions of coding agents -> conversations for training.

A session is one JSON object a line, in one of three forms:

- `messages` (and perhaps `tools`): a chat with tool calls in OpenAI's form or ours;
- `trajectory`: steps with `action` (a shell command), `observation` and perhaps `thought` or `response`, as SWE-agent
  writes them, with the task in `problem_statement`, `task` or `prompt`;
- `steps`: `thought`, `tool`, `arguments`, `observation`; or an edit as a unified `diff`; the task in `task`.

What comes out has the chat template's form: thoughts as `reasoning_content`, arguments as objects, each observation as
the message of a tool, and at the end what the agent said about its work.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trinity.base.errors import UserError
from trinity.data.diffs import replacements
from trinity.data.json_lines import read_objects
from trinity.tokenizer.template import check_messages

Message = dict[str, Any]
Record = Mapping[str, Any]

_TASKS = ("task", "problem_statement", "prompt")
_PASSED = ("passed", "resolved", "success")
_DONE = "Done."


@dataclass(frozen=True)
class TraceSettings:
    """What is kept of sessions."""

    only_passed: bool = True
    """Leave out sessions that say they failed (`passed`, `resolved`, `success` or a `reward` below 1)."""
    observation_chars: int = 8000
    """Longer observations lose their middle."""
    max_messages: int = 200
    """Longer sessions are left out: a cut one would teach to stop in the middle."""


@dataclass
class Counts:
    kept: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """By reason."""

    def leave_out(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1


def convert(paths: Sequence[Path], settings: TraceSettings, counts: Counts) -> Iterator[dict[str, Any]]:
    """Rows with `messages`, `tools`, `source`, in file order; each conversation once. `counts` is kept up to date.

    Raises UserError, naming file and line, for what is not a session of a known form.
    """
    seen: set[str] = set()
    for path in paths:
        for where, record in read_objects(path):
            if settings.only_passed and _failed(record):
                counts.leave_out("did not pass")
                continue
            messages = _conversation(record, where)
            if not any(message.get("tool_calls") for message in messages):
                counts.leave_out("no tool call")
                continue
            if messages[-1]["role"] != "assistant":
                counts.leave_out("ends with an observation")
                continue
            if len(messages) > settings.max_messages:
                counts.leave_out("too many messages")
                continue
            for message in messages:
                if message["role"] == "tool":
                    message["content"] = _shortened(message["content"], settings.observation_chars)
            tools = record.get("tools") or _tools_of(messages)
            try:
                check_messages(messages, tools)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            key = json.dumps(messages, sort_keys=True)
            if key in seen:
                counts.leave_out("seen before")
                continue
            seen.add(key)
            counts.kept += 1
            yield {"messages": messages, "tools": tools, "source": str(record.get("source") or where)}


def _failed(record: Record) -> bool:
    if any(record.get(name) is False for name in _PASSED):
        return True
    reward = record.get("reward")
    return isinstance(reward, (int, float)) and reward < 1


def _conversation(record: Record, where: str) -> list[Message]:
    if isinstance(record.get("messages"), list):
        return [_message(message, where, i) for i, message in enumerate(record["messages"])]
    if isinstance(record.get("trajectory"), list):
        steps = [_of_action(step, where, i) for i, step in enumerate(record["trajectory"])]
    elif isinstance(record.get("steps"), list):
        steps = [step for i, given in enumerate(record["steps"]) for step in _of_step(given, where, i)]
    else:
        raise UserError(f"{where} has none of the lists `messages`, `trajectory` and `steps`")
    task = next((record[name] for name in _TASKS if isinstance(record.get(name), str)), None)
    if task is None:
        raise UserError(f"{where} has no text of the task: {', '.join(_TASKS)}")
    system = record.get("system")
    messages: list[Message] = [{"role": "system", "content": system}] if isinstance(system, str) else []
    messages.append({"role": "user", "content": task})
    for said, observation in steps:
        messages += [said, {"role": "tool", "content": observation}]
    final = record.get("final")
    messages.append({"role": "assistant", "content": final if isinstance(final, str) and final.strip() else _DONE})
    return messages


def _message(message: Any, where: str, number: int) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{where}: message {number} has no role")
    role = {"function": "tool", "developer": "system"}.get(message["role"], message["role"])
    found: Message = {"role": role, "content": _text(message.get("content"), where, number)}
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(reasoning, str) and role == "assistant":
        found["reasoning_content"] = reasoning
    if message.get("tool_calls"):
        found["tool_calls"] = [_call(call, where, number) for call in message["tool_calls"]]
    return found


def _text(content: Any, where: str, number: int) -> str:
    """A content as one text; OpenAI's form also allows a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "\n".join(part["text"] for part in content)
    raise UserError(f"{where}: message {number} has content that is not text")


def _call(call: Any, where: str, number: int) -> dict[str, Any]:
    function = (call.get("function") or call) if isinstance(call, dict) else None
    arguments = function.get("arguments", {}) if isinstance(function, dict) else None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise UserError(
                f"{where}: message {number} calls a tool with arguments that are not JSON: {error}"
            ) from None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
        raise UserError(f"{where}: message {number} has a tool call without a name and an object of arguments")
    return {"name": function["name"], "arguments": arguments}


def _said(thought: Any, name: str, arguments: Mapping[str, Any]) -> Message:
    message: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": name, "arguments": dict(arguments)}],
    }
    if isinstance(thought, str) and thought.strip():
        message["reasoning_content"] = thought.strip()
    return message


def _of_action(step: Any, where: str, number: int) -> tuple[Message, str]:
    if not isinstance(step, dict) or not isinstance(step.get("action"), str) or "observation" not in step:
        raise UserError(f"{where}: step {number} has no text `action` with an `observation`")
    thought = step.get("thought") or step.get("response")
    return _said(thought, "run", {"command": step["action"].strip()}), str(step["observation"] or "")


def _of_step(step: Any, where: str, number: int) -> list[tuple[Message, str]]:
    if not isinstance(step, dict):
        raise UserError(f"{where}: step {number} is not an object")
    if isinstance(step.get("diff"), str):
        try:
            edits = replacements(step["diff"])
        except ValueError as error:
            raise UserError(f"{where}: step {number} has a diff that cannot be read: {error}") from None
        found = []
        for i, edit in enumerate(edits):
            arguments = {"path": edit.path, "old": edit.old, "new": edit.new}
            observed = str(step.get("observation") or f"Replaced in {edit.path}.")
            found.append((_said(step.get("thought") if i == 0 else None, "edit", arguments), observed))
        return found
    if (
        not isinstance(step.get("tool"), str)
        or not isinstance(step.get("arguments"), dict)
        or "observation" not in step
    ):
        raise UserError(f"{where}: step {number} has neither a `diff` nor `tool`, `arguments` and `observation`")
    return [(_said(step.get("thought"), step["tool"], step["arguments"]), str(step["observation"] or ""))]


def _tools_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The tools that were called, as JSON schemas with the names that their arguments had."""
    names: dict[str, dict[str, Any]] = {}
    for message in messages:
        for call in message.get("tool_calls") or ():
            properties = names.setdefault(call["name"], {})
            for key, value in call["arguments"].items():
                properties.setdefault(key, {"type": _json_type(value)})
    return [
        {
            "type": "function",
            "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
        }
        for name, properties in names.items()
    ]


def _json_type(value: Any) -> str:
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"), (dict, "object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"
