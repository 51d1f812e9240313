"""The engine: cached decoding equals the full forward pass, whatever the lengths, chunks and batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from trinity.base.errors import UserError
from trinity.config import ModelConfig
from trinity.infer.attention import Chunk, Step
from trinity.infer.cache import Cache
from trinity.infer.engine import Engine
from trinity.infer.forward import forward
from trinity.infer.load import load_model
from trinity.infer.request import Request
from trinity.infer.sampling import SamplingParams
from trinity.model.transformer import Transformer

GOLDEN = Path(__file__).parent / "golden"
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)
SHORT = SamplingParams(temperature=0.0, max_new_tokens=5)


@pytest.fixture(scope="module")
def models() -> dict[str, Transformer]:
    return {name: load_model(GOLDEN / name) for name in "AB"}


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item()))


def tokens(count: int, vocab: int, seed: int = 0) -> list[int]:
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", ["A", "B"])
def test_greedy_tokens_and_step_logits_equal_the_golden_data(models: dict[str, Transformer], name: str) -> None:
    golden = load_file(GOLDEN / name / "golden.safetensors")
    model, prompt, expected = models[name], golden["gen.prompt"][0].tolist(), golden["gen.tokens"][0].tolist()
    params = SamplingParams(temperature=0.0, max_new_tokens=32)
    (completion,) = Engine(model, block=4, prefill_chunk=5).generate([prompt], params)
    assert completion.tokens == expected
    assert completion.finish == "length"
    cache = Cache(model.config, 1, device=torch.device("cpu"), dtype=torch.float32, block=4)
    fed = prompt
    with torch.no_grad():
        for step_logits, token in zip(golden["gen.step_logits"], expected, strict=True):
            step = Step(cache, [Chunk(0, fed)], model.config.window, torch.device("cpu"))
            logits = model.head(forward(model, step)[0][-1])
            step.commit()
            assert close(logits, step_logits)
            fed = [token]


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_schedule_of_chunks_equals_the_full_forward(models: dict[str, Transformer], data: st.DataObject) -> None:
    """Ragged batches of prompts shorter than, equal to and far longer than the window, cut anywhere, in any company."""
    model = models[data.draw(st.sampled_from("AB"))]
    config = model.config
    count = data.draw(st.integers(1, 4))
    window = config.window
    length = st.sampled_from([window - 1, window, window + 1, 2 * window]) | st.integers(1, 5 * window)
    lengths = data.draw(st.lists(length, min_size=count, max_size=count))
    block = data.draw(st.sampled_from([1, 3, 8, 64]))
    rows = [tokens(length, config.vocab_size, seed) for seed, length in enumerate(lengths)]
    cache = Cache(config, count, device=torch.device("cpu"), dtype=torch.float32, block=block)
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    with torch.no_grad():
        while any(cache.lengths[slot] < len(row) for slot, row in enumerate(rows)):
            open_slots = [slot for slot, row in enumerate(rows) if cache.lengths[slot] < len(row)]
            slots = data.draw(st.lists(st.sampled_from(open_slots), min_size=1, unique=True))
            single = data.draw(st.booleans())
            chunks = []
            for slot in slots:
                start = cache.lengths[slot]
                size = 1 if single else data.draw(st.integers(1, len(rows[slot]) - start))
                chunks.append(Chunk(slot, rows[slot][start : start + size]))
            step = Step(cache, chunks, config.window, torch.device("cpu"))
            x_ND, _ = forward(model, step)
            step.commit()
            for chunk, part in zip(chunks, x_ND.split([len(chunk.tokens) for chunk in chunks]), strict=True):
                found[chunk.slot].append(model.head(part))
            rounded = sum(config.kv_cache_bytes(-(-n // block) * block, bytes_per_value=4) for n in cache.lengths)
            local = config.layers.count("local") * 2 * config.num_kv_heads * config.head_dim * 4
            assert rounded <= cache.used_bytes <= rounded + count * block * local
        for row, parts in zip(rows, found, strict=True):
            assert close(torch.cat(parts), model(torch.tensor([row]))[0])


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_batches_with_continuous_admission_equal_generation_alone(
    models: dict[str, Transformer], data: st.DataObject
) -> None:
    model = models[data.draw(st.sampled_from("AB"))]
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    prompts = [tokens(length, model.config.vocab_size, seed) for seed, length in enumerate(lengths)]
    params = [
        SamplingParams(
            max_new_tokens=data.draw(st.integers(1, 12)), temperature=data.draw(st.sampled_from([0.0, 1.0])), seed=seed
        )
        for seed in range(len(prompts))
    ]
    engine = Engine(
        model,
        max_batch=data.draw(st.integers(1, 3)),
        max_tokens=data.draw(st.sampled_from([None, 80])),
        prefill_chunk=data.draw(st.sampled_from([3, 16, 100])),
        block=data.draw(st.sampled_from([2, 16])),
    )
    together = engine.generate(prompts, params)
    assert engine.cache.used_bytes == 0
    assert engine.num_running == engine.num_waiting == 0
    for prompt, own, completion in zip(prompts, params, together, strict=True):
        (alone,) = Engine(model).generate([prompt], [own])
        assert completion.tokens == alone.tokens
        assert len(completion.tokens) == own.max_new_tokens
        with torch.no_grad():
            whole = torch.tensor([prompt + completion.tokens])
            logprobs = model(whole)[0].log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logprobs.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert torch.tensor(completion.logprobs) == pytest.approx(expected.numpy(), abs=2e-5)


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_a_request_that_goes_on_reads_only_what_is_new(models: dict[str, Transformer], data: st.DataObject) -> None:
    """Turns of any length, ended by length, stop token or cancelling (also while the prompt is read), beside others."""
    model = models[data.draw(st.sampled_from("AB"))]
    vocab, window = model.config.vocab_size, model.config.window
    engine = Engine(model, max_batch=2, prefill_chunk=data.draw(st.sampled_from([3, 100])), block=4)
    rows: list[int] = []
    before = None
    for turn in range(data.draw(st.integers(2, 3))):
        rows = rows + tokens(data.draw(st.sampled_from([1, 2, window, 2 * window + 1])), vocab, turn)
        other = engine.submit(tokens(5, vocab, 50 + turn), SHORT) if data.draw(st.booleans()) else None
        held = [] if before is None else before.cached
        request = engine.submit(rows, SHORT, keep=True, follow=before)
        assert request.fed == len(held)
        steps = data.draw(st.sampled_from([0, 1, 3, 100]))
        while not request.done and steps:
            engine.step()
            steps -= 1
        engine.cancel(request)
        (alone,) = Engine(model).generate([rows], SHORT)
        found = request.completion.tokens
        assert found == alone.tokens[: len(found)]
        if other is not None:
            engine.cancel(other)
        rows = rows + found
        before = request
    assert before is not None
    assert engine.cache.used_bytes > 0 or not before.cached
    # Another beginning: nothing can be used, and nothing stays.
    changed = [(rows[0] + 1) % vocab, *rows[1:]]
    request = engine.submit(changed, SHORT, follow=before)
    assert request.fed == 0
    while not request.done:
        engine.step()
    assert request.completion.tokens == Engine(model).generate([changed], SHORT)[0].tokens
    assert engine.cache.used_bytes == engine.num_running == engine.num_waiting == 0
    assert all(len(Engine.generate(engine, [changed[:3]] * 3, SHORT)) == 3 for _ in range(2))  # both slots are free


@pytest.mark.parametrize("length", [3, 12, 40])  # of what is shared; the window is in between
def test_requests_that_branch_read_only_what_is_their_own(models: dict[str, Transformer], length: int) -> None:
    model = models["A"]
    vocab = model.config.vocab_size
    start = tokens(length, vocab, 1)
    prompts = [[*start, *tokens(n, vocab, 10 + n)] for n in (1, 4, 9, 4)]
    prompts.append([(start[0] + 1) % vocab, *start[1:], 3])  # begins otherwise: read whole
    expected = [completion.tokens for completion in Engine(model).generate(prompts, SHORT)]
    for slots in (2, 3, 8):  # one at a time, two, all
        engine = Engine(model, max_batch=slots, prefill_chunk=7, block=4)
        read = engine.read(start)
        held = engine.cache.used_bytes
        assert read.fed == length
        for _ in range(2):
            done = engine.generate(prompts, SHORT, branch=read)
            assert [completion.tokens for completion in done] == expected
            assert engine.cache.used_bytes == held
        engine.release(read)
        assert engine.cache.used_bytes == 0


def test_a_branch_of_what_was_released_meanwhile_is_read_whole(models: dict[str, Transformer]) -> None:
    engine = Engine(models["A"], max_batch=2)
    read = engine.read([5, 6, 7])
    request = engine.submit([5, 6, 7, 8], SHORT, branch=read)
    engine.release(read)
    while not request.done:
        engine.step()
    assert request.completion.tokens == Engine(models["A"]).generate([[5, 6, 7, 8]], SHORT)[0].tokens
    assert engine.cache.used_bytes == 0


def test_a_reading_that_fails_holds_nothing(models: dict[str, Transformer], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(models["A"], max_batch=2, prefill_chunk=2)
    monkeypatch.setattr(engine, "_prefill", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.read([5, 6, 7])
    assert engine.num_running == engine.num_waiting == engine._schedule._reserved == 0
    assert sorted(engine._schedule._free_slots) == [0, 1]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_nothing_leaks_whatever_is_cancelled_when(models: dict[str, Transformer], data: st.DataObject) -> None:
    """Slots, blocks and reserved tokens all come back, each once, after any order of events."""
    model = models["A"]
    engine = Engine(model, max_batch=2, max_tokens=60, prefill_chunk=7, block=3)
    alive: list[Request] = []
    kept: list[Request] = []
    for turn in range(data.draw(st.integers(1, 14))):
        action = data.draw(
            st.sampled_from(["submit", "submit", "step", "step", "cancel", "follow", "branch", "release"])
        )
        if action == "submit":
            keep = data.draw(st.booleans()) and len(kept) == 0
            row = tokens(data.draw(st.integers(1, 20)), model.config.vocab_size, turn)
            alive.append(engine.submit(row, SHORT, keep=keep))
            kept += alive[-1:] if keep else []
        elif action == "step" and (engine.num_running or not kept or not kept[0].done):
            engine.step()
        elif action == "cancel" and alive:
            engine.cancel(alive.pop(data.draw(st.integers(0, len(alive) - 1))))
        elif action == "follow" and kept and kept[0].done:
            before = kept.pop()
            alive.append(engine.submit([*before.prompt, *before.completion.tokens, 1], SHORT, follow=before))
        elif action == "branch" and kept and kept[0].done:
            before = kept[0]
            alive.append(engine.submit([*before.prompt, *before.completion.tokens, 1], SHORT, branch=before))
        elif action == "release" and kept and kept[0].done:
            engine.release(kept.pop())
    for request in alive:
        engine.cancel(request)
    for request in kept:
        engine.cancel(request)
        engine.release(request)
    assert engine.num_running == engine.num_waiting == engine.cache.used_bytes == 0
    assert engine._schedule._reserved == 0
    assert sorted(engine._schedule._free_slots) == [0, 1]
    for pool in engine.cache.pools.values():
        assert sorted(pool._free) == list(range(pool._num_blocks))
    assert engine.cache.lengths == [0, 0]


def test_kept_requests_that_hold_all_room_are_told(models: dict[str, Transformer]) -> None:
    engine = Engine(models["A"], max_batch=1)
    kept = engine.submit([1, 2], SHORT, keep=True)
    while not kept.done:
        engine.step()
    with pytest.raises(UserError, match="release one"):
        engine.generate([[3]], SHORT)
    engine.release(kept)
    assert len(engine.generate([[3]], SHORT)[0].tokens) == 5


def test_chosen_experts_are_those_of_the_full_forward(models: dict[str, Transformer]) -> None:
    golden = load_file(GOLDEN / "B" / "golden.safetensors")
    model, row = models["B"], golden["input_ids"][0].tolist()
    engine = Engine(model, return_experts=True, prefill_chunk=7)
    (completion,) = engine.generate([row], GREEDY)
    assert completion.experts is not None
    assert completion.experts.shape == (len(row) + 11, model.config.num_moe_layers, 4)
    assert completion.experts.dtype == np.int16
    for layer in range(model.config.num_moe_layers):
        expected = golden[f"router.{layer + 1}.experts"][: len(row)]
        assert np.array_equal(completion.experts[: len(row), layer], expected.numpy())


def test_stop_tokens_and_lengths(models: dict[str, Transformer]) -> None:
    model = models["A"]
    prompt = tokens(9, model.config.vocab_size)
    (free,) = Engine(model).generate([prompt], GREEDY)
    stop = free.tokens[4]
    params = SamplingParams(temperature=0.0, max_new_tokens=12, stop_ids=(stop,))
    (stopped,) = Engine(model).generate([prompt], params)
    assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert stopped.finish == "stop"
    long = tokens(model.config.max_positions - 3, model.config.vocab_size)
    (cut,) = Engine(model).generate([long], GREEDY)
    assert len(cut.tokens) == 3
    assert cut.finish == "length"


def test_what_cannot_be_generated_is_refused_and_leaves_the_engine_empty(models: dict[str, Transformer]) -> None:
    model = models["A"]
    engine = Engine(model, max_tokens=40)
    good = tokens(5, model.config.vocab_size)
    for bad, words in (
        ([], "empty"),
        ([model.config.vocab_size], "outside the vocabulary"),
        ([0] * model.config.max_positions, "no room"),
        ([0] * 35, "max_tokens"),
    ):
        with pytest.raises(UserError, match=words):
            engine.generate([good, bad], GREEDY)
        assert engine.num_running == engine.num_waiting == 0
    with pytest.raises(UserError, match="tokenizer"):
        engine.submit(good, SamplingParams(stop=("x",)))


def test_cancelling_frees_the_slot_and_keeps_the_answer(models: dict[str, Transformer]) -> None:
    engine = Engine(models["A"], max_batch=1)
    first, second = (engine.submit(tokens(4, 512, seed), GREEDY) for seed in (1, 2))
    while len(first.completion.tokens) < 3:
        engine.step()
    engine.cancel(first)
    assert first.completion.finish == "cancelled"
    assert len(first.completion.tokens) == 3
    while not second.done:
        engine.step()
    assert len(second.completion.tokens) == 12
    assert engine.cache.used_bytes == 0


def test_a_long_prompt_does_not_silence_the_others(models: dict[str, Transformer]) -> None:
    engine = Engine(models["A"], prefill_chunk=8)
    first = engine.submit(tokens(4, 512), SamplingParams(temperature=0.0, max_new_tokens=40))
    engine.step()
    second = engine.submit(tokens(160, 512), GREEDY)
    while not second.completion.tokens:
        engine.step()
    assert len(first.completion.tokens) >= 160 // 8 - 1


def test_an_interrupted_call_leaves_the_engine_empty(models: dict[str, Transformer]) -> None:
    engine = Engine(models["A"], max_batch=2)

    def interrupt(number: int, event: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([tokens(5, 512)] * 3, GREEDY, interrupt)
    assert engine.num_running == engine.num_waiting == engine.cache.used_bytes == 0
    assert len(engine.generate([tokens(5, 512)], GREEDY)[0].tokens) == 12


def test_the_engine_uses_the_models_own_weights_and_restores_its_mode(models: dict[str, Transformer]) -> None:
    model = Transformer(models["B"].config)
    model.load_state_dict(models["B"].state_dict())
    model.train()
    engine = Engine(model)
    prompt = tokens(6, 320)
    (before,) = engine.generate([prompt], GREEDY)
    assert model.training
    assert all(not isinstance(p.grad, torch.Tensor) for p in model.parameters())
    with torch.no_grad():
        model.head.weight.mul_(-1)
    (after,) = engine.generate([prompt], GREEDY)
    assert before.tokens != after.tokens


@pytest.mark.parametrize("window", [4, 100])
@pytest.mark.parametrize("k", [1, 3])
def test_other_shapes(window: int, k: int) -> None:
    """Explicit layer kinds, no embedding scale, top-1, a window longer than the sequence, no shared expert."""
    config = ModelConfig(
        vocab_size=96,
        num_layers=4,
        num_dense_layers=0,
        dim=24,
        num_heads=2,
        num_kv_heads=2,
        head_dim=10,
        ffn_dim=16,
        expert_dim=8,
        num_experts=6,
        experts_per_token=k,
        num_shared_experts=0,
        window=window,
        layer_types=("global", "local", "local", "global"),
        max_positions=64,
        embed_scale=False,
    )
    model = Transformer(config)
    model.init_weights(0)
    prompt = tokens(20, 96)
    (completion,) = Engine(model, prefill_chunk=6, block=4).generate([prompt], GREEDY)
    row = list(prompt)
    with torch.no_grad():
        for token in completion.tokens:
            logits = model(torch.tensor([row]))[0, -1]
            assert logits[token] >= logits.max() - 1e-5
            row.append(token)
