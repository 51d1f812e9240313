"""Conversations: the same text and ids as `transformers`, loss on the assistant alone, no way out of a turn."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trinity.base.errors import UserError
from trinity.config import TokenizerConfig
from trinity.tokenizer import Tokenizer, train_tokenizer
from trinity.tokenizer.template import CONTROL_TOKENS, MARKUP_TOKENS, default_template

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add <b>two</b> numbers, \u00e9<|im_end|>",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "</tool_call>"}}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 2?"},
    {"role": "assistant", "content": None, "reasoning_content": "Use the tool.", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "1"},
    {"role": "assistant", "content": "It is 3."},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the assistant said hello to the user\n" * 9], TokenizerConfig(vocab_size=300)).save(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def reference(directory: Path):
    return AutoTokenizer.from_pretrained(directory)


def learned(tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
    ids, mask = tokenizer.encode_chat(messages, tools)
    assert len(ids) == len(mask)
    return tokenizer.decode(i for i, learn in zip(ids, mask, strict=True) if learn)


def test_text_of_a_conversation(tokenizer: Tokenizer):
    assert tokenizer.render_chat(CONVERSATION) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nUse the tool.\n</think>\n\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "< /tool_call>"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nIt is 3.<|im_end|>\n"
    )


def test_loss_is_on_what_the_assistant_wrote(tokenizer: Tokenizer):
    assert learned(tokenizer, CONVERSATION, [TOOL]) == (
        "<think>\nUse the tool.\n</think>\n\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "< /tool_call>"}}\n</tool_call><|im_end|>'
        "It is 3.<|im_end|>"
    )
    assert learned(tokenizer, CONVERSATION[:2]) == ""


texts = st.one_of(
    st.text(),
    st.lists(st.sampled_from([*CONTROL_TOKENS, *MARKUP_TOKENS, "\n", " ", "assistant", "x", "<", "|"])).map("".join),
)


@given(texts, texts, texts, texts, st.booleans())
def test_no_text_leaves_its_turn(
    tokenizer: Tokenizer, reference, system: str, user: str, answer: str, tool: str, tools: bool
):
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer, "reasoning_content": user, "tool_calls": [CALL]},
        {"role": "tool", "content": tool},
    ]
    ids, mask = tokenizer.encode_chat(messages, [TOOL] if tools else None, add_generation_prompt=True)
    start, end, eos = map(tokenizer.special_id, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
    assert (ids.count(start), ids.count(end), ids.count(eos)) == (5, 4, 0)
    learn = "".join("x" if m else "." for m in mask).strip(".")
    assert set(learn) == {"x"}, "one run: the assistant's turn"
    assert ids[mask.index(True) + len(learn) - 1] == end
    options = {"tools": [TOOL] if tools else None, "add_generation_prompt": True}
    assert reference.apply_chat_template(messages, tokenize=False, **options) == tokenizer.render_chat(
        messages, **options
    )
    assert reference.apply_chat_template(messages, **options)["input_ids"] == ids


@given(texts)
def test_prompt_is_a_prefix_of_the_conversation(tokenizer: Tokenizer, answer: str):
    question = [{"role": "user", "content": "hello"}]
    prompt, mask = tokenizer.encode_chat(question, add_generation_prompt=True)
    whole, _ = tokenizer.encode_chat([*question, {"role": "assistant", "content": answer}])
    assert whole[: len(prompt)] == prompt
    assert not any(mask)


def test_arguments_as_text_or_object(tokenizer: Tokenizer):
    calls = [{"name": "add", "arguments": '{"a": 1}'}, {"function": {"name": "add", "arguments": {"a": 1}}}]
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": "Hm.", "tool_calls": calls}]
    call = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert learned(tokenizer, messages) == f"Hm.{call}{call}<|im_end|>"


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        ("hi", "must be a list"),
        (["hi"], "message 0 is a str"),
        ([{"role": "usr", "content": "hi"}], "message 0 has the role 'usr'.*did you mean 'user'"),
        ([USER, {"role": "system", "content": "x"}], "message 1 is a system message"),
        ([USER, {"role": "tool", "content": "x"}], "message 1 is a tool's answer"),
        ([{"role": "user"}], "message 0 .user. has no content"),
        ([{"role": "user", "content": ["x"]}], "has a list as content"),
        ([{**USER, "tool_calls": [CALL]}], "only an assistant message may"),
        ([{**USER, "reasoning_content": "x"}], "only an assistant message may"),
        ([USER, {"role": "assistant", "content": "x", "reasoning_content": 1}], "has a int as reasoning_content"),
        ([USER, {"role": "assistant", "tool_calls": "x"}], "has a str as tool_calls"),
        ([USER, {"role": "assistant", "tool_calls": [{}]}], "without a function name"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "calls f .*not JSON"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}], "not a JSON object"),
    ],
)
def test_malformed_conversations_are_refused(tokenizer: Tokenizer, messages: Any, words: str):
    with pytest.raises(UserError, match=words):
        tokenizer.render_chat(messages)


def test_template_refuses_unknown_roles_by_itself(reference):
    with pytest.raises(Exception, match="role must be"):
        reference.apply_chat_template([{"role": "judge", "content": "x"}], tokenize=False)


def foreign(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer._json, template)


def test_other_templates(tokenizer: Tokenizer):
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    other = foreign(tokenizer, plain)
    assert learned(other, [USER, {"role": "assistant", "content": "x"}]) == "x<|im_end|>"
    with pytest.raises(UserError, match="control token"):
        other.encode_chat([{"role": "user", "content": "a<|im_end|>"}])
    with pytest.raises(UserError, match="does not open the assistant's turn"):
        foreign(tokenizer, "{{ messages[0].content }}").encode_chat([{"role": "assistant", "content": "x"}])
    with pytest.raises(UserError, match="does not compile"):
        foreign(tokenizer, "{% if %}").render_chat([USER])
    with pytest.raises(UserError, match="refused"):
        foreign(tokenizer, "{{ messages.__class__.__mro__ }}").render_chat([USER])


def test_every_special_token_is_disarmed_by_the_template():
    for token in (*CONTROL_TOKENS, *MARKUP_TOKENS):
        assert f'replace("{token}", "< {token[1:]}")' in default_template()
