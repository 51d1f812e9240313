"""Answers read back into reasoning, calls and content, however the stream was cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_helpers import CALL, WEATHER
from trinity.serve.tools import AnswerParser, Call, Content, Part, Reasoning
from trinity.tokenizer.template import default_template, render

Joined = list[tuple[str, str]]


def read(pieces: list[str], *, tools: bool = True, thinking: bool = False, prefix: str = "") -> Joined:
    """Parts with neighbours of one kind joined."""
    parser = AnswerParser(tools=[WEATHER] if tools else [], thinking=thinking, prefix=prefix)
    parts: list[Part] = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    joined: Joined = []
    for part in parts:
        if isinstance(part, Call):
            joined.append(("call", f"{part.name} {part.arguments}"))
            continue
        kind = "reasoning" if isinstance(part, Reasoning) else "content"
        assert part.text
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + part.text)
        else:
            joined.append((kind, part.text))
    return joined


PARIS = ("call", 'weather {"city": "Paris"}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("Hello", [("content", "Hello")]),
        ("  Hello \n", [("content", "  Hello \n")]),
        ("<think>\nHm.\n</think>\n\nYes.", [("reasoning", "Hm."), ("content", "Yes.")]),
        ("\n<think>a</think>b", [("reasoning", "a"), ("content", "b")]),
        ("<think>never closed", [("reasoning", "never closed")]),
        ("<think></think>b", [("content", "b")]),
        ("a <think>b</think>", [("content", "a <think>b</think>")]),
        (CALL, [PARIS]),
        (f"I look.\n{CALL}", [("content", "I look."), PARIS]),
        (f"<think>x</think>\n\n{CALL}\n{CALL}\n", [("reasoning", "x"), PARIS, PARIS]),
        (f"{CALL} and more", [PARIS, ("content", "\nand more")]),
        (f"{CALL}\n<tool_", [PARIS, ("content", "\n<tool_")]),
        ("<tool_call>{broken</tool_call>", [("content", "<tool_call>{broken</tool_call>")]),
        ("<tool_call>" + "[" * 100_000, [("content", "<tool_call>" + "[" * 100_000)]),
        ('<tool_call>{"name": "f"}</tool_call>', [("call", "f {}")]),
        ('<tool_call>{"name": "f"}', [("call", "f {}")]),
        ("x < y <tool", [("content", "x < y <tool")]),
        ("<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>", [PARIS]),
    ],
)  # fmt: skip
def test_answers_are_read_whatever_the_cuts(text: str, expected: Joined) -> None:
    assert read([text]) == expected
    if len(text) < 1000:
        assert read(list(text)) == expected


@given(
    st.lists(st.sampled_from(["<think>", "</think>", CALL, "<tool_call>", "</tool_call>", " ", "\n", "a", "<t", "{"])),
    st.data(),
)
def test_the_cuts_never_matter_and_nothing_is_lost(words: list[str], data: st.DataObject) -> None:
    text = "".join(words)
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    for tools in (True, False):
        whole = read([text], tools=tools)
        assert read(pieces, tools=tools) == whole
        kept = "".join(part for _, part in whole)
        assert kept.count("a") >= text.count("a") - text.count(CALL) * CALL.count("a")


@pytest.mark.parametrize("arguments", ["[1]", '{"x": NaN}', "null", '"text"'])
def test_arguments_that_are_no_object_stay_text(arguments: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    assert read([text]) == [("content", text)]


def test_without_tools_a_call_is_text() -> None:
    assert read([CALL], tools=False) == [("content", CALL)]


def test_a_prompt_that_began_the_answer() -> None:
    assert read(["Hm.\n</think>\n\nYes"], thinking=True) == [("reasoning", "Hm."), ("content", "Yes")]
    prefix = '<tool_call>\n{"name": "weather", "arguments": '
    assert read(['{"city": ', '"Paris"}}\n'], prefix=prefix) == [PARIS]
    assert read(["nonsense"], prefix=prefix) == [("content", prefix + "nonsense")]


def test_xml_parameters_take_their_schemas_type() -> None:
    tool = {
        "function": {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}, "s": {"type": "string"}}}}
    }
    parser = AnswerParser(tools=[tool])
    (call,) = parser.push(
        "<tool_call><function=f><parameter=n>3</parameter><parameter=s>3</parameter><parameter=o>x</parameter></function></tool_call>"
    )
    assert isinstance(call, Call)
    assert json.loads(call.arguments) == {"n": 3, "s": "3", "o": "x"}


def test_what_the_template_writes_is_read_back() -> None:
    message = {
        "role": "assistant",
        "reasoning_content": "Let me see.",
        "content": "I look.",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Zürich"}}}] * 2,
    }
    text = render(default_template(), [{"role": "user", "content": "?"}, message], [WEATHER])
    answer = text.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")
    call = ("call", 'weather {"city": "Zürich"}')
    assert read([answer]) == [("reasoning", "Let me see."), ("content", "I look."), call, call]


def test_content_comes_at_once_but_for_what_may_be_markup() -> None:
    parser = AnswerParser(tools=[WEATHER])
    assert parser.push("Hello") == [Content("Hello")]
    assert parser.push(" wor") == [Content(" wor")]
    assert parser.push("ld <") == [Content("ld")]
    assert parser.push("b>") == [Content(" <b>")]
