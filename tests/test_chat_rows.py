"""Conversations to rows: nothing lost, loss on the assistant's tokens only, the same rows again from the same seed."""

import gzip
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import UserError
from trinity.data import chat
from trinity.data.chat import ChatRows, best_fit, is_held_out, read_conversations
from trinity.data.rows import IGNORE


class Words:
    """A tokenizer whose tokens are code points; a turn is its text and a 2, and only the assistant's have loss."""

    def encode_chat(self, messages, tools=None):
        ids, mask = [1], [False]
        for message in messages:
            text = [ord(c) for c in message["content"]] + [2]
            ids += text
            mask += [message["role"] == "assistant"] * len(text)
        return ids, mask


WORDS: chat.Tokenizer = Words()  # pyright: ignore[reportAssignmentType]


def conversation(question, answer):
    return chat.Conversation(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], None, "here"
    )


def write(path, records):
    text = "".join(json.dumps(r) + "\n" for r in records).encode()
    if path.suffix == ".gz":
        text = gzip.compress(text)
    elif path.suffix == ".zst":
        text = zstandard.compress(text)
    path.write_bytes(text)
    return path


RECORDS = [{"messages": conversation(f"q{i}", f"a{i}").messages} for i in range(3)]


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst"])
def test_files_of_every_kind_are_read(tmp_path, name):
    path = write(tmp_path / name, RECORDS)
    found = list(read_conversations([path]))
    assert [c.messages for c in found] == [r["messages"] for r in RECORDS]
    assert found[1].where == f"{path}, line 2"


def test_parquet_is_read_and_its_empty_columns_are_dropped(tmp_path):
    messages = [dict(m, name=None) for m in RECORDS[0]["messages"]]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "c.parquet")
    (found,) = read_conversations([tmp_path / "c.parquet"])
    assert found.messages == RECORDS[0]["messages"]
    assert found.hash == chat.Conversation(RECORDS[0]["messages"], None, "elsewhere").hash


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "no list `messages`"),
        ('{"messages": []}', "no list `messages`"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "message 0 has no role"),
        ('{"messages": [{"role": "user"}]}', "no text `content`"),
        ('{"messages": [{"role": "user", "content": 3}]}', "no text `content`"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant message"),
    ],
)
def test_malformed_conversations_are_refused_with_file_and_line(tmp_path, line, complaint):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=complaint) as caught:
        list(read_conversations([path]))
    assert f"{path}, line 2" in str(caught.value)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no conversations file"):
        list(read_conversations([tmp_path / "none.jsonl"]))
    (tmp_path / "c.csv").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"use \.jsonl"):
        list(read_conversations([tmp_path / "c.csv"]))
    for name in ("c.jsonl.gz", "c.jsonl.zst", "c.parquet"):
        (tmp_path / name).write_bytes(b"not compressed")
        with pytest.raises(UserError, match="cannot be read"):
            list(read_conversations([tmp_path / name]))


def test_the_held_out_split_follows_content_alone():
    conversations = [conversation(f"question {i}", "answer") for i in range(2000)]
    share = np.mean([is_held_out(c, 0.05) for c in conversations])
    assert 0.03 < share < 0.07
    again = chat.Conversation(conversations[0].messages, None, "another file, line 9")
    assert is_held_out(again, 0.05) == is_held_out(conversations[0], 0.05)
    assert not any(is_held_out(c, 0.0) for c in conversations)
    assert all(is_held_out(c, 1.0) for c in conversations)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200))
def test_best_fit_places_every_item_once_and_fills_rows(lengths):
    rows = best_fit(lengths, 40)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used) <= 40
    # No two rows could have been one: at most one row is half empty or more.
    assert sum(u <= 20 for u in used) <= 1


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=60), st.integers(0, 3))
def test_every_conversation_is_in_each_epoch_once_and_whole(sizes, epoch):
    conversations = [conversation("q" * q, chr(1000 + i) * a) for i, (q, a) in enumerate(sizes)]
    data = ChatRows(conversations, WORDS, seq_len=32, seed=5)
    plan = data.plan(epoch)
    assert Counter(chunk.doc for row in plan for chunk in row) == Counter(range(len(sizes)))
    rows = data.rows(plan)
    for b, chunks in enumerate(rows.documents):
        at = 0
        for segment, chunk in enumerate(chunks):
            here = slice(at, at + chunk.length)
            ids, mask = WORDS.encode_chat(conversations[chunk.doc].messages)
            assert rows.tokens_BT[b, here].tolist() == ids[:-1]
            assert rows.targets_BT[b, here].tolist() == [
                t if m else IGNORE for t, m in zip(ids[1:], mask[1:], strict=True)
            ]
            assert rows.positions_BT[b, here].tolist() == list(range(chunk.length))
            assert (rows.segments_BT[b, here] == segment).all()
            at += chunk.length
        assert (rows.segments_BT[b, at:] == -1).all()
        assert (rows.targets_BT[b, at:] == IGNORE).all()


def test_order_depends_on_seed_and_epoch_alone():
    conversations = [conversation(f"question {i}", f"answer {i}") for i in range(50)]
    data = ChatRows(conversations, WORDS, seq_len=64, seed=1)
    first = data.plan(0)
    assert data.plan(1) != first
    assert data.plan(0) == first
    assert ChatRows(conversations, WORDS, seq_len=64, seed=1).plan(1) == data.plan(1)
    assert ChatRows(conversations, WORDS, seq_len=64, seed=2).plan(0) != first


def test_long_conversations_are_cut_and_counted():
    data = ChatRows(
        [conversation("q", "a" * 100), conversation("q" * 100, "a"), conversation("q", "a")], WORDS, seq_len=16
    )
    assert (len(data), data.truncated, data.dropped) == (2, 2, 1)
    assert data.rows([[data.whole(0)]]).targets_BT[0].tolist() == [IGNORE, IGNORE] + [ord("a")] * 14
    with pytest.raises(UserError, match="no conversations with an answer"):
        ChatRows([conversation("q" * 100, "a")], WORDS, seq_len=16)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=60), st.integers(0, 3))
def test_rsdb_loses_no_token_and_repeats_none(sizes, epoch):
    conversations = [conversation("q" * q, chr(1000 + i) * a) for i, (q, a) in enumerate(sizes)]
    data = ChatRows(conversations, WORDS, seq_len=16, seed=5, packing="rsdb")
    assert (data.truncated, data.dropped) == (0, 0)
    plan = data.plan(epoch)
    rows = data.rows(plan)
    heads: Counter[int] = Counter()
    for b, chunks in enumerate(rows.documents):
        at = 0
        for chunk in chunks:
            assert chunk.start == heads[chunk.doc], "pieces of a conversation come in order"
            heads[chunk.doc] += chunk.length
            ids, mask = WORDS.encode_chat(conversations[chunk.doc].messages)
            here, there = slice(at, at + chunk.length), slice(chunk.start, chunk.start + chunk.length)
            after = slice(there.start + 1, there.stop + 1)
            assert rows.tokens_BT[b, here].tolist() == ids[there]
            assert rows.targets_BT[b, here].tolist() == [
                t if m else IGNORE for t, m in zip(ids[after], mask[after], strict=True)
            ]
            at += chunk.length
        assert at == 16 or b == len(plan) - 1
    assert heads == Counter({i: q + a + 2 for i, (q, a) in enumerate(sizes)})


def test_one_conversation_a_row():
    data = ChatRows([conversation("q", "a" * n) for n in (1, 5, 3)], WORDS, seq_len=16, packing="single")
    assert sorted(tuple(row) for row in data.plan(0)) == [(data.whole(i),) for i in range(3)]


def talk(*weights):
    messages = []
    for number, weight in enumerate(weights):
        messages.append({"role": "user", "content": "u"})
        answer = {"role": "assistant", "content": f"{number}"}
        messages.append(answer if weight is None else {**answer, "weight": weight})
    return chat.Conversation(messages, None, "here")


def learned(data):
    targets = data.rows([[data.whole(0)]]).targets_BT[0]
    return "".join(chr(t) for t in targets if t not in (IGNORE, 2))


@pytest.mark.parametrize(
    ("weights", "turns", "expected"),
    [
        ((None, None, None), "all", "012"),
        ((None, None, None), "last", "2"),
        ((0, None, None), "all", "12"),
        ((1, None, None), "last", "02"),
        ((None, None, 0), "all", "01"),
        ((1, 0, 1.0), "all", "02"),
    ],
)
def test_turns_are_switched_by_setting_and_by_message(weights, turns, expected):
    assert learned(ChatRows([talk(*weights)], WORDS, seq_len=32, turns=turns)) == expected


def test_a_conversation_without_a_turn_to_learn_is_dropped():
    assert ChatRows([talk(0), talk(None)], WORDS, seq_len=32).dropped == 1


@pytest.mark.parametrize(("role", "weight"), [("assistant", 2), ("assistant", "1"), ("assistant", True), ("user", 1)])
def test_other_weights_are_refused(tmp_path, role, weight):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    next(m for m in messages if m["role"] == role)["weight"] = weight
    path = write(tmp_path / "c.jsonl", [{"messages": messages}])
    with pytest.raises(UserError, match="weight"):
        list(read_conversations([path]))
