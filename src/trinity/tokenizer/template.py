"""Conversations as text: the chat template and what a conversation must look like.

The template is a Jinja file that travels with the tokenizer, so every server renders the same text. It is run in
Jinja's sandbox, with the same environment as in `transformers`: a tokenizer directory may come from anyone.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from importlib import resources
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trinity.base.errors import UserError, nearest

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
"""Never part of a text; decoding for people leaves them out."""
MARKUP_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Single tokens, yet part of what the assistant says: decoding keeps them, so that parsers see them."""

ROLES = ("system", "user", "assistant", "tool")


@cache
def default_template() -> str:
    """Trinity's chat template."""
    return (resources.files("trinity") / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8")


def render(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str] | None = None,
) -> str:
    """The text of a conversation; `special_tokens` are names such as `eos_token` that a template may use.

    Raises UserError for a malformed conversation or a template that does not compile or run.
    """
    check_messages(messages, tools)
    if template != default_template():
        _refuse_control_tokens(messages, tools)
    try:
        return _compile(template).render(
            messages=[dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **(special_tokens or {}),
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refused the conversation: {error}") from None


def check_messages(messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> None:
    """Raises UserError, naming the message, unless the conversation is well formed.

    Keys other than `role`, `content`, `reasoning_content` and `tool_calls` are left unread.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError("a conversation must be a list of at least one message, each with a role and a content")
    for number, message in enumerate(messages):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{where} is a {type(message).__name__}; it must be an object with a role and a content")
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"{where} has the role {role!r}; use one of {', '.join(ROLES)}{nearest(str(role), ROLES)}")
        if role == "system" and number > 0:
            raise UserError(f"{where} is a system message; only the first message may be one")
        if role == "tool" and not _follows_call(messages, number):
            raise UserError(f"{where} is a tool's answer, but no assistant message with tool_calls comes before it")
        _check_content(message, where)
        _check_calls(message, where)
    for number, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            raise UserError(f"tool {number} is a {type(tool).__name__}; it must be a JSON schema object")


def _follows_call(messages: Sequence[Message], number: int) -> bool:
    before = number - 1
    while before >= 0 and messages[before].get("role") == "tool":
        before -= 1
    return before >= 0 and bool(messages[before].get("tool_calls"))


def _check_content(message: Message, where: str) -> None:
    content = message.get("content")
    silent = message["role"] == "assistant" and bool(message.get("tool_calls"))
    if content is None and not silent:
        raise UserError(f"{where} ({message['role']}) has no content; give a string, which may be empty")
    if content is not None and not isinstance(content, str):
        raise UserError(f"{where} ({message['role']}) has a {type(content).__name__} as content; give a string")
    reasoning = message.get("reasoning_content")
    if reasoning is None:
        return
    if message["role"] != "assistant":
        raise UserError(f"{where} ({message['role']}) has reasoning_content; only an assistant message may")
    if not isinstance(reasoning, str):
        raise UserError(f"{where} has a {type(reasoning).__name__} as reasoning_content; give a string")


def _check_calls(message: Message, where: str) -> None:
    calls = message.get("tool_calls")
    if calls is None:
        return
    if message["role"] != "assistant":
        raise UserError(f"{where} ({message['role']}) has tool_calls; only an assistant message may")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise UserError(f"{where} has a {type(calls).__name__} as tool_calls; give a list")
    for call in calls:
        function = call.get("function") or call if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"{where} has a tool call without a function name; give name and arguments")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise UserError(f"{where} calls {function['name']} with arguments that are not JSON: {error}") from None
        if not isinstance(arguments, Mapping):
            raise UserError(f"{where} calls {function['name']} with arguments that are not a JSON object")


def _refuse_control_tokens(messages: Sequence[Message], tools: Sequence[Tool] | None) -> None:
    """Only Trinity's own template is known to disarm control tokens inside texts."""
    text = json.dumps([[dict(message) for message in messages], list(tools or ())], ensure_ascii=False, default=dict)
    for token in CONTROL_TOKENS:
        if token in text:
            raise UserError(
                f"a message holds the control token {token}, which this tokenizer's own chat template would let close "
                "a turn; write it another way"
            )


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template does not compile: {error}") from None


def _to_json(value: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """Jinja's own filter escapes HTML characters."""
    return json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def assistant_mask(ids: Sequence[int], start: int, end: int, header: Sequence[int]) -> list[bool]:
    """True on what the assistant writes: after its header, up to and with the end of the turn.

    `start` and `end` are the ids of the turn tokens, `header` those of "assistant" and the line break. Texts hold no
    turn tokens, so the turns can be read off the ids.
    """
    mask = [False] * len(ids)
    width, length = len(header), len(ids)
    position = 0
    while position < length:
        if ids[position] == start and list(ids[position + 1 : position + 1 + width]) == list(header):
            position += 1 + width
            while position < length:
                mask[position] = True
                position += 1
                if ids[position - 1] == end:
                    break
        else:
            position += 1
    return mask
