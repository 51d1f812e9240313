"""Scoring with a real model: packing changes no loss, bits per byte and standard errors are what they say."""

import math

import numpy as np
import pytest
import torch

from stage_fixtures import tiny_config, write_inputs
from trinity.base.errors import UsageError
from trinity.data.chat import ChatRows, read_conversations
from trinity.data.rows import IGNORE, to_device
from trinity.data.shards import Shards
from trinity.data.validation import ValidationRows
from trinity.evals import arithmetic, heldout, run_suite
from trinity.evals.scoring import target_logprobs
from trinity.model.transformer import Transformer
from trinity.ops.cross_entropy import fused_cross_entropy
from trinity.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoring")
    write_inputs(folder)
    config = tiny_config(folder)
    model = Transformer(config.model)
    model.init_weights(0)
    return folder, config, model.eval(), Tokenizer.load(folder / "tokenizer")


def test_packed_conversations_have_the_loss_of_conversations_alone(setup):
    folder, _, model, tokenizer = setup
    data = ChatRows(read_conversations([folder / "chats.jsonl"]), tokenizer, seq_len=64)
    packed = data.plan(0)
    assert max(map(len, packed)) > 1

    def loss_and_gradient(groups):
        model.zero_grad()
        rows = data.rows(groups)
        logprobs_BT = target_logprobs(model, to_device(rows, "cpu"))
        loss = -logprobs_BT.sum() / (rows.targets_BT != IGNORE).sum()
        loss.backward()
        return loss.item(), model.embed.weight.grad.clone()

    together, gradient = loss_and_gradient(packed)
    alone, gradient_alone = loss_and_gradient([[data.whole(i)] for i in range(len(data))])
    assert together == pytest.approx(alone, rel=1e-6)
    torch.testing.assert_close(gradient, gradient_alone, rtol=1e-4, atol=1e-7)


def test_the_gradient_of_masked_tokens_is_exactly_zero(setup):
    """Of the logits, through the loss that trains: at every position of the prompt, the template and the padding."""
    folder, _, model, tokenizer = setup
    data = ChatRows(read_conversations([folder / "chats.jsonl"]), tokenizer, seq_len=64)
    rows = data.rows(data.plan(0)[:3])
    batch = to_device(rows, "cpu")
    x_BTD = model.features(batch.tokens_BT, batch.segments_BT, batch.positions_BT).x_BTD.detach().requires_grad_()
    found = fused_cross_entropy(x_BTD.flatten(0, 1), model.head.weight, batch.targets_BT.flatten(), z_loss=1e-4)
    found.loss_sum.backward()
    masked_BT = batch.targets_BT == IGNORE
    assert masked_BT.any()
    assert not masked_BT.all()
    assert x_BTD.grad is not None
    assert (x_BTD.grad[masked_BT] == 0).all()
    assert (x_BTD.grad[~masked_BT] != 0).any(dim=-1).all()


def test_held_out_loss_equals_the_plain_computation(setup):
    folder, config, model, tokenizer = setup
    rows = ValidationRows(Shards.open(folder / "shards" / "val"), 64, 3)
    bytes_V = heldout.token_bytes(tokenizer, config.model.vocab_size)
    found = heldout.evaluate(model, rows, bytes_V, micro_rows=2)
    nats, num_bytes, tokens, by_row = 0.0, 0, 0, []
    for domain in rows.domains:
        for batch in rows.batches(domain, 1):
            with torch.no_grad():
                logprobs = model(*to_device(batch, "cpu")[0::2][:1], *to_device(batch, "cpu")[2:]).log_softmax(-1)
            row_nats, row_tokens = 0.0, 0
            for t, target in enumerate(batch.targets_BT[0].tolist()):
                if target == IGNORE:
                    continue
                row_nats -= logprobs[0, t, target].item()
                row_tokens += 1
                if target != tokenizer.eos_id:
                    nats -= logprobs[0, t, target].item()
                    num_bytes += len(tokenizer.decode_bytes([target]))
            by_row.append((row_nats, row_tokens))
            tokens += row_tokens
    loss = sum(n for n, _ in by_row) / tokens
    residuals = np.array([n - loss * t for n, t in by_row])
    error = math.sqrt((residuals**2).sum() * len(by_row) / (len(by_row) - 1)) / tokens
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["tokens"] == tokens
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert found["standard_error"] == pytest.approx(error, rel=1e-3)


def test_arithmetic_is_exact_match_and_keeps_held_out_problems_apart(setup):
    tokenizer = setup[3]
    held_out = arithmetic.questions(tokenizer, 40, 9, form="equation")
    seen = arithmetic.questions(tokenizer, 40, 9, form="equation", held_out=False)
    assert held_out == arithmetic.questions(tokenizer, 40, 9, form="equation")
    assert not {tuple(q.prompt) for q in held_out} & {tuple(q.prompt) for q in seen}
    for text, value in ((" {}\n1 + 1 = 2", 1.0), ("{}.", 1.0), ("{} apples", 0.0), ("1{}", 0.0), ("", 0.0)):
        answers = [text.format(q.answer) for q in held_out]
        assert arithmetic.evaluate(lambda *_, answers=answers: answers, held_out)["value"] == value
    half = [str(q.answer) if i % 2 else "x" for i, q in enumerate(held_out)]
    result = arithmetic.evaluate(lambda *_: half, held_out)
    assert result == {"value": 0.5, "standard_error": pytest.approx(0.5 / math.sqrt(40)), "samples": 40}


def test_the_suite_runs_everything_and_refuses_what_it_cannot(setup):
    folder, config, model, tokenizer = setup
    shards = Shards.open(folder / "shards" / "val")
    told = []
    results = run_suite(
        model, tokenizer, config.eval, shards=shards, seq_len=64, on_result=lambda name, _: told.append(name)
    )
    assert list(results) == told == ["heldout", "positions", "niah", "arithmetic", "arithmetic_chat"]
    by_position = [part for domain in results.pop("positions")["domains"].values() for part in domain["positions"]]
    assert by_position
    assert all("standard_error" in result for result in [*results.values(), *by_position])
    with pytest.raises(UsageError, match="did you mean 'niah'"):
        run_suite(model, tokenizer, config.eval, names=["nia"])
    with pytest.raises(UsageError, match="needs shards"):
        run_suite(model, tokenizer, config.eval)
    longer = config.eval.model_copy(update={"niah_lengths": (4096,)})
    with pytest.raises(UsageError, match="512 positions"):
        run_suite(model, tokenizer, longer, names=["niah"])
