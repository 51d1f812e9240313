"""What counts as keeping to the chat template."""

import pytest

from trinity.evals.chat_format import Answer, complaint, summary

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello.", None),
        ("", None),
        ("<think>\nhm\n</think>\n\nHello.", None),
        (f"Let me look.\n{CALL}\n{CALL}", None),
        ("a < think> b", None),
        ("<|im_start|>user\nmore", "inside the turn"),
        ("x<|endoftext|>", "inside the turn"),
        ("<tool_response>\n3\n</tool_response>", "inside the turn"),
        ("<think>\nhm", "not in pairs"),
        ("</think>x<think>", "not in pairs"),
        ("<think>a<think>b</think></think>", "not in pairs"),
        ("Hello. <think>late</think>", "elsewhere"),
        ("<think>a</think><think>b</think>", "elsewhere"),
        ("<tool_call>f()</tool_call>", "not JSON"),
        ('<tool_call>{"arguments": {}}</tool_call>', "no name"),
        ('<tool_call>["f"]</tool_call>', "no name"),
        ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "no object of arguments"),
    ],
)
def test_complaints(text, words):
    found = complaint(text)
    assert (found is None) if words is None else (found is not None and words in found)


def test_summary_counts_complaints():
    answers = [Answer([1], "", True, None)] * 3 + [Answer([1], "", False, "cut off")]
    assert summary(answers) == {"value": 0.75, "standard_error": 0.75**0.5 / 4, "samples": 4, "wrong": {"cut off": 1}}
