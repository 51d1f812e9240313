"""Several questions about one text, which is read once: the answers of reading it each time."""

import pytest
import torch

from stage_fixtures import tiny_config, write_inputs
from trinity.evals import niah
from trinity.evals.generation import greedy
from trinity.infer import prefix
from trinity.infer.engine import Engine
from trinity.infer.sampling import SamplingParams
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefix")
    write_inputs(folder)
    config = tiny_config(folder)
    model = Transformer(config.model)
    model.init_weights(0)
    with torch.no_grad():  # sharper, so that answers differ
        model.head.weight.mul_(4)
    return config, model, Tokenizer.load(folder / "tokenizer")


def alone(model, tokenizer, prompts, count):
    engine = Engine(model, tokenizer, max_batch=4)
    params = SamplingParams(max_new_tokens=count, temperature=0.0, stop_ids=tuple(tokenizer.stop_ids))
    return [completion.text for completion in engine.generate(prompts, params)]


@pytest.mark.parametrize("length", [40, 300, 450])  # the window is 32, a chunk 64, a block 16
def test_answers_after_a_shared_beginning_are_those_of_whole_prompts(setup, length):
    _, model, tokenizer = setup
    draws = torch.Generator().manual_seed(length)
    start = torch.randint(0, 400, (length,), generator=draws).tolist()
    tails = [torch.randint(0, 400, (n,), generator=draws).tolist() for n in (1, 7, 40)]
    expected = alone(model, tokenizer, [start + tail for tail in tails], 9)
    assert len(set(expected)) > 1
    for slots in (4, 3, 3):  # all tails at once, and two at a time
        engine = Engine(model, tokenizer, max_batch=slots, block=16, prefill_chunk=64)
        found = prefix.answer_after(engine, start, tails, 9, tokenizer.stop_ids)
        assert [tokenizer.decode(ids, skip_special=True) for ids in found] == expected
        assert engine.cache.used_bytes == 0
        assert prefix.answer_after(engine, start, tails, 9, tokenizer.stop_ids) == found


def test_an_answer_ends_at_its_stop_token(setup):
    _, model, tokenizer = setup
    engine = Engine(model, tokenizer, max_batch=3)
    start, tails = [5] * 300, [[6], [9, 3]]
    free = prefix.answer_after(engine, start, tails, 8, [])
    assert [len(answer) for answer in free] == [8, 8]
    stop = free[0][4]
    held = prefix.answer_after(engine, start, tails, 8, [stop])
    assert held[0] == free[0][: free[0].index(stop)]


def test_prompts_that_begin_alike_are_found():
    a, b = list(range(1000)), list(range(5000, 6000))
    prompts = [[*a, 1, 2], [*a, 3], [*a], b, [*b, 7], [*b, 7], [1, 2]]
    assert prefix.groups(prompts) == [([0, 1, 2], 999), ([3, 4, 5], 999), ([6], 0)]
    assert prefix.groups([[1] * 100, [1] * 100]) == [([0], 0), ([1], 0)]


def test_needles_that_share_a_text_are_answered_as_if_they_did_not(setup, monkeypatch):
    config, model, tokenizer = setup
    grid = config.eval.model_copy(
        update={"niah_lengths": (400, 500), "niah_depths": 2, "niah_samples": 2, "niah_reuse": True}
    )
    asked = niah.questions(tokenizer, grid)
    prompts = [q.tokens for q in asked]
    read = []
    monkeypatch.setattr(
        "trinity.evals.generation.answer_after", lambda *a, **k: read.append(len(a[1])) or prefix.answer_after(*a, **k)
    )
    assert greedy(model, tokenizer)(prompts, 6) == alone(model, tokenizer, prompts, 6)
    assert len(read) == 4  # texts, of eight questions
