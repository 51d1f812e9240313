"""The sources of the stages give the same global batches on any number of ranks, and again after a restart."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stage_fixtures import tiny_config, write_inputs
from trinity.base import dist
from trinity.config import Phase
from trinity.data.chat import ChatRows, read_conversations
from trinity.data.retrieval import LEAST_TOKENS, Hay
from trinity.data.rows import IGNORE
from trinity.data.shards import Shards
from trinity.optim.schedule import StepPlan
from trinity.stages.sources import ChatSource, HeldOutChats, RetrievalSource, TextSource
from trinity.tokenizer import Tokenizer

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sources")
    write_inputs(path)
    return path


@pytest.fixture
def as_rank(monkeypatch):
    """Pretend to be one rank of several."""

    def pretend(rank, ranks):
        monkeypatch.setattr(dist, "rank", lambda: rank)
        monkeypatch.setattr(dist, "world_size", lambda: ranks)

    return pretend


def stage_for(folder, name) -> Any:
    config = tiny_config(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    place = {"data_rank": dist.rank(), "data_size": dist.world_size()}
    return SimpleNamespace(name=name, config=config, settings=getattr(config, name), tokenizer=tokenizer, **place)


def extend_source(folder, share=0.5):
    stage = stage_for(folder, "extend")
    shards = Shards.open(folder / "shards" / "train")
    phase = Phase(name="extend", tokens=STEPS * 4 * 512, weights={"prose": 1.0})
    plan = StepPlan(stage.settings, [(phase.name, phase.tokens)], [(0, 4)])
    text = TextSource(stage, shards, [phase], plan, 1.0)
    return text, RetrievalSource(stage, text, plan, share, Hay(shards, stage.tokenizer))


def chat_source(folder):
    stage = stage_for(folder, "sft")
    data = ChatRows(read_conversations([folder / "chats.jsonl"]), stage.tokenizer, 64)
    rows = sum(len(data.plan(epoch)) for epoch in range(2))
    plan = StepPlan.constant(stage.settings, "sft", -(-rows // 4), 4)
    return data, plan, ChatSource(stage, data, plan, epochs=2)


def rows_of(batches):
    return [
        tuple(row) for rows in batches for row in np.concatenate([rows.tokens_BT, rows.targets_BT], axis=1).tolist()
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_retrieval_rows_meet_their_share_on_any_number_of_ranks(folder, as_rank, ranks):
    collected = [[] for _ in range(STEPS)]
    generated = 0
    for rank in range(ranks):
        as_rank(rank, ranks)
        text, source = extend_source(folder)
        with text:
            for step in range(STEPS):
                batches = source.next_batch(step)
                assert sum(map(len, batches)) == 4 // ranks
                collected[step] += rows_of(batches)
                generated += sum(chunks[0].doc < 0 for rows in batches for chunks in rows.documents)
    assert generated == STEPS * 4 // 2
    as_rank(0, 1)
    text, source = extend_source(folder)
    with text:
        for step in range(STEPS):
            assert sorted(rows_of(source.next_batch(step))) == sorted(collected[step])


def test_retrieval_documents_are_whole_and_named_in_events(folder):
    text, source = extend_source(folder, share=1.0)
    eos_id = Tokenizer.load(folder / "tokenizer").eos_id
    with text:
        for rows in source.next_batch(0):
            records = source.describe(rows)
            assert {record["source"] for record in records} == {"retrieval"}
            for b, chunks in enumerate(rows.documents):
                ends = np.cumsum([chunk.length for chunk in chunks])
                assert (rows.tokens_BT[b, ends - 1] == eos_id).all()
                assert (rows.targets_BT[b, ends - 1] == IGNORE).all()
                assert ends[-1] == rows.tokens_BT.shape[1]
                assert min(chunk.length for chunk in chunks) >= LEAST_TOKENS


def test_retrieval_goes_on_from_its_state(folder):
    text, source = extend_source(folder)
    with text:
        source.next_batch(0)
        state = json.loads(json.dumps(source.state_dict()))
        expected = rows_of(source.next_batch(1))
    text, source = extend_source(folder)
    with text:
        source.load_state_dict(state)
        assert rows_of(source.next_batch(1)) == expected


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_conversation_is_trained_on_once_an_epoch(folder, as_rank, ranks):
    seen = []
    data, plan, _ = chat_source(folder)
    for rank in range(ranks):
        as_rank(rank, ranks)
        _, _, source = chat_source(folder)
        for step in range(len(plan)):
            batches = source.next_batch(step)
            assert sum(map(len, batches)) == 4 // ranks
            seen += [chunk.doc for rows in batches for chunks in rows.documents for chunk in chunks]
    assert sorted(seen) == sorted([*range(len(data)), *range(len(data))])


def test_held_out_conversations_are_shared_evenly(folder):
    data, _, _ = chat_source(folder)
    held_out = HeldOutChats(data, num_rows=5)
    parts = [list(held_out.batches("conversations", 2, rank, 2)) for rank in range(2)]
    assert [len(rows) for rows in parts[0]] == [len(rows) for rows in parts[1]] == [2, 1]
    docs = [chunk.doc for part in parts for rows in part for chunks in rows.documents for chunk in chunks]
    assert sorted(docs) == sorted(chunk.doc for row in data.plan(0)[:5] for chunk in row)
