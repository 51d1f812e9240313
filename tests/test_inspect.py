"""Inspection and verification of shard directories."""

import json

import numpy as np
import pytest

from prepare_fakes import ByteTokenizer
from trinity.base.errors import UserError
from trinity.data.inspect import inspect_shards, verify_shards
from trinity.data.prepare import prepare

TOKENIZER = ByteTokenizer()


@pytest.fixture
def shards(tmp_path):
    lines = [json.dumps({"text": "x" * n + str(i), "domain": "ab"[i % 2]}) for i, n in enumerate([1, 2, 30, 300, 301])]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, lines[0]]))
    prepare([tmp_path / "in.jsonl"], TOKENIZER, tmp_path / "out", val_fraction=0.0)
    return tmp_path / "out"


def test_counts_and_text(shards):
    found = inspect_shards(shards, TOKENIZER, samples=2)
    train, val = found.splits
    assert (train.documents, train.tokens, val.documents) == (5, 634 + 5 + 5, 0)
    assert [(g.name, g.documents, g.tokens) for g in train.domains] == [("a", 3, 338), ("b", 2, 306)]
    assert [(g.name, g.tokens) for g in train.sources] == [("in.jsonl", 644)]
    assert sum(documents for _, documents, _ in train.histogram) == 5
    assert (train.histogram[0][:2], train.histogram[-1][:2]) == ((2, 1), (256, 2))
    assert train.dropped == {"duplicate": 1}
    assert [sample.text for sample in train.samples] == ["x0", "x" * 30 + "2"]
    text = found.render()
    assert "duplicate 1" in text
    assert "256 to 511" in text
    assert "document 2 (a; in.jsonl, " in text
    assert found.to_json()["splits"][0]["tokens"] == 644


def test_another_tokenizer_is_refused(shards):
    with pytest.raises(UserError, match="was made with the tokenizer"):
        inspect_shards(shards, ByteTokenizer(vocab_size=300))


def test_verification_reports_every_failure(shards):
    assert verify_shards(shards) == []
    tokens = next((shards / "train").glob("tokens-*.bin"))
    data = np.fromfile(tokens, np.uint8)
    data[3] ^= 1
    data.tofile(tokens)
    (shards / "val" / "manifest.json").write_text("{}")
    first, second = verify_shards(shards)
    assert tokens.name in first
    assert "manifest" in second
