"""Bits per byte by position against sums written out, over the same long documents at every position."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from stage_fixtures import noise, tiny_config, write_inputs, write_text
from trinity.base.errors import UserError
from trinity.data.shards import Shards
from trinity.evals import heldout, positions
from trinity.evals.suite import positions_length, run_suite
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer


def test_ranges_double() -> None:
    assert positions.ranges(512) == [(0, 64), (64, 128), (128, 256), (256, 512)]
    assert positions.ranges(300) == [(0, 64), (64, 128), (128, 256), (256, 300)]
    assert positions.ranges(10) == [(0, 10)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Tokenizer, Shards]:
    folder = tmp_path_factory.mktemp("positions")
    write_inputs(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    write_text(folder / "long", [noise(i, 25 if i % 3 else 2) for i in range(9)], tokenizer)
    model = Transformer(tiny_config(folder, model={"max_positions": 256}).model)
    model.init_weights(2)
    return model.eval(), tokenizer, Shards.open(folder / "long")


def test_figures_are_the_sums_written_out(made: tuple[Transformer, Tokenizer, Shards]) -> None:
    model, tokenizer, shards = made
    bytes_V = heldout.token_bytes(tokenizer, model.config.vocab_size)
    found = positions.evaluate(model, shards, bytes_V, 256, documents=50, micro_rows=4)
    (domain,) = found["domains"].values()
    long = [doc for doc in range(shards.num_documents) if shards.lengths[doc] > 256]
    assert domain["documents"] == len(long) == 6
    nats_DT, size_DT = np.zeros((6, 256)), np.zeros((6, 256))
    with torch.no_grad():
        for row, doc in enumerate(long):
            tokens = torch.from_numpy(shards.tokens(doc, 0, 257).astype(np.int64))
            logprobs = model(tokens[None, :-1])[0].double().log_softmax(-1)
            nats_DT[row] = -logprobs.gather(1, tokens[1:, None])[:, 0].numpy()
            size_DT[row] = bytes_V[tokens[1:].numpy()]
    for part in domain["positions"]:
        at = slice(part["from"], part["to"])
        assert part["tokens"] == 6 * (part["to"] - part["from"])
        assert part["loss"] == pytest.approx(nats_DT[:, at].mean(), rel=1e-5)
        bits = nats_DT[:, at].sum() / math.log(2) / size_DT[:, at].sum()
        assert part["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        error = nats_DT[:, at].mean(1).std(ddof=1) / math.sqrt(6)
        assert part["standard_error"] == pytest.approx(error, rel=1e-4)
    assert domain["bits_per_byte"] == pytest.approx(nats_DT.sum() / math.log(2) / size_DT.sum(), rel=1e-5)


def test_the_suite_chooses_the_length(made: tuple[Transformer, Tokenizer, Shards]) -> None:
    model, tokenizer, shards = made
    assert positions_length(model, shards) == 256
    assert positions_length(model, shards, most=100) == 64
    settings = tiny_config(Path()).eval
    found = run_suite(model, tokenizer, settings, names=["positions"], shards=shards)["positions"]
    assert found["seq_len"] == 256


def test_no_long_document_is_a_sentence(made: tuple[Transformer, Tokenizer, Shards]) -> None:
    model, tokenizer, shards = made
    bytes_V = heldout.token_bytes(tokenizer, model.config.vocab_size)
    with pytest.raises(UserError, match="no held-out document has more than 5000 tokens"):
        positions.evaluate(model, shards, bytes_V, 5000, documents=4)
