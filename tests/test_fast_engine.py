"""The engine on its kernels gives what it gives on the reference path; in Triton's interpreter without a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from test_export import random_model
from trinity.base.errors import UsageError, UserError
from trinity.config import ModelConfig
from trinity.infer.attention import Chunk, Step
from trinity.infer.cache import FP8, Cache
from trinity.infer.engine import Engine
from trinity.infer.forward import forward
from trinity.infer.kernels import Kernels
from trinity.infer.prefill import prefill
from trinity.infer.prefix import answer_after
from trinity.infer.request import Completion
from trinity.infer.sampling import SamplingParams
from trinity.model.transformer import Transformer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = ModelConfig(
    vocab_size=96,
    num_layers=4,
    num_dense_layers=1,
    dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=24,
    expert_dim=8,
    num_experts=5,
    experts_per_token=2,
    route_scale=1.5,
    window=6,
    global_every=2,
    max_positions=64,
)
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(TINY).to(DEVICE)


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(TINY.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def compare(found: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
        assert one.finish == other.finish


def test_chunks_of_any_shape_equal_the_reference_forward(model: Transformer) -> None:
    """Ragged chunks, far longer than the window, whole or one token at a time; the cache is equal too."""
    kernels = Kernels(model)
    lengths = (17, 5, 9)
    rows = [tokens(length, seed) for seed, length in enumerate(lengths)]
    caches = [Cache(TINY, 3, device=DEVICE, dtype=torch.float32, block=2) for _ in range(2)]
    plan = [((0, 14),), ((1, 3), (2, 8)), ((0, 1), (1, 1)), ((0, 2), (1, 1), (2, 1))]
    for chunks in plan:
        outputs = []
        for cache, fast in zip(caches, (False, True), strict=True):
            given = [
                Chunk(slot, rows[slot][cache.lengths[slot] : cache.lengths[slot] + count]) for slot, count in chunks
            ]
            step = Step(cache, given, TINY.window, DEVICE, masks=not fast)
            with torch.no_grad():
                if fast:
                    outputs.append(prefill(kernels, step, return_experts=True))
                else:
                    outputs.append(forward(model, step, return_experts=True))
            step.commit()
        assert (outputs[0][0] - outputs[1][0]).abs().max() <= 1e-5
        assert torch.equal(outputs[0][1].sort(-1).values, outputs[1][1].sort(-1).values)
    for kind in ("local", "global"):
        one, other = (cache.pools[kind] for cache in caches)
        for a, b in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
            assert (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "count", [pytest.param(1), pytest.param(3, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow)]
)
def test_greedy_answers_equal_the_reference_path(model: Transformer, count: int) -> None:
    """Prompts shorter and longer than the window, few rows and many, answers of unequal lengths, late admission."""
    prompts = [tokens(1 + 4 * i, i) for i in range(count)]
    params = [SamplingParams(temperature=0.0, max_new_tokens=2 + 2 * (i % 3)) for i in range(count)]
    options = {"max_batch": 5, "prefill_chunk": 7, "block": 2, "return_experts": True}
    expected = Engine(model, path="reference", **options).generate(prompts, params)
    engine = Engine(model, path="fast", **options)
    found = engine.generate(prompts, params)
    compare(found, expected)
    assert engine.cache.used_bytes == engine.num_running == 0
    for one, other in zip(found, expected, strict=True):
        assert one.experts is not None
        assert other.experts is not None
        assert one.experts.shape == other.experts.shape
        assert (one.experts == other.experts).all()
    assert "Triton" in engine.describe()
    assert Engine(model, path="reference").describe() == "reference"


@pytest.mark.slow  # in the interpreter
def test_sampled_penalised_and_stopped_answers_equal_the_reference_path(model: Transformer) -> None:
    prompts = [tokens(5, 1), tokens(9, 2), tokens(3, 3)]
    (free,) = Engine(model, path="reference").generate(prompts[:1], GREEDY)
    params = [
        SamplingParams(temperature=0.0, max_new_tokens=6, stop_ids=(free.tokens[2],)),
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, max_new_tokens=5, seed=4),
        SamplingParams(temperature=1.0, max_new_tokens=4, seed=5, repetition_penalty=1.3),
    ]
    for chosen in (slice(0, 2), slice(0, 3)):
        expected = Engine(model, path="reference").generate(prompts[chosen], params[chosen])
        compare(Engine(model, path="fast").generate(prompts[chosen], params[chosen]), expected)
    assert expected[0].tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1]


@pytest.mark.slow  # in the interpreter
def test_a_step_is_under_way_when_tokens_are_read(model: Transformer) -> None:
    engine = Engine(model, path="fast")
    request = engine.submit(tokens(4), GREEDY)
    engine.step()
    for told in range(2, 6):
        engine.step()
        assert len(request.completion.tokens) == told
        assert engine._ahead is not None
        assert engine._ahead.num_launched == 1
        assert engine.cache.lengths[0] == 4 + told
    engine.cancel(request)
    second = engine.submit(tokens(3), GREEDY)
    while not second.done:
        engine.step()
    (expected,) = Engine(model, path="reference").generate([tokens(3)], GREEDY)
    assert second.completion.tokens == expected.tokens


@pytest.mark.slow  # in the interpreter
def test_a_request_goes_on_behind_a_step_that_ran_ahead(model: Transformer) -> None:
    """The answer ends while another step is under way, whose token lies in the cache and counts for nothing."""
    engine = Engine(model, max_batch=1, path="fast", block=2)
    rows = tokens(11, 0)
    stop = Engine(model, path="reference").generate([rows], SamplingParams(temperature=0.0, max_new_tokens=5))[0]
    params = SamplingParams(temperature=0.0, max_new_tokens=8, stop_ids=(stop.tokens[2],))
    before = engine.submit(rows, params, keep=True)
    while not before.done:
        engine.step()
    assert engine._ahead is not None
    assert engine._ahead.num_launched == 1
    longer = rows + before.completion.tokens + tokens(3, 1)
    request = engine.submit(longer, params, follow=before)
    assert request.fed == len(rows) + len(before.completion.tokens) - 1
    while not request.done:
        engine.step()
    (alone,) = Engine(model, path="reference").generate([longer], params)
    assert request.completion.tokens == alone.tokens


@pytest.mark.slow  # in the interpreter
def test_the_cache_may_move_and_the_weights_may_change_between_steps(model: Transformer) -> None:
    other = Transformer(TINY)
    other.load_state_dict(model.state_dict())
    other = other.to(DEVICE).eval()
    engine, reference = (Engine(other, path=path, block=1, max_batch=2) for path in ("fast", "reference"))
    long = SamplingParams(temperature=0.0, max_new_tokens=30)
    version = engine.cache.version
    compare(engine.generate([tokens(20)], long), reference.generate([tokens(20)], long))
    assert engine.cache.version > version + 1
    with torch.no_grad():
        other.head.weight.mul_(-1)
    compare(engine.generate([tokens(4)], GREEDY), reference.generate([tokens(4)], GREEDY))
    attention = other.blocks[1].attn
    attention.o.weight = torch.nn.Parameter(attention.o.weight * -2)
    compare(engine.generate([tokens(4)], GREEDY), reference.generate([tokens(4)], GREEDY))


@pytest.mark.parametrize("path", ["reference", pytest.param("fast", marks=pytest.mark.slow)])
def test_a_cache_in_fp8_is_half_as_large_and_close(model: Transformer, path: str) -> None:
    prompt = tokens(12)
    (exact,) = Engine(model, path="reference").generate([prompt], GREEDY)
    engine = Engine(model, path=path, cache_dtype=FP8)  # type: ignore[arg-type]
    (found,) = engine.generate([prompt], GREEDY)
    pool = engine.cache.pools["local"]
    assert pool.keys[0].dtype == FP8
    # The first token comes from the prompt's own chunk, whose keys are exact on this path.
    assert found.logprobs[0] == pytest.approx(exact.logprobs[0], abs=1e-5)
    assert found.logprobs[1] == pytest.approx(exact.logprobs[1], abs=0.5)
    assert found.logprobs[1] != exact.logprobs[1]


def test_what_the_kernels_do_not_serve_is_refused(model: Transformer) -> None:
    ablation = Transformer(TINY.model_copy(update={"qk_norm": False}))
    with pytest.raises(UserError, match="QK-norm"):
        Engine(ablation, path="fast")
    with pytest.raises(UsageError, match="auto, reference, fast"):
        Engine(model, path="quick")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="blocks of 128, but dim is 16"):
        Engine(model, path="fast", fp8_weights=True)
    with pytest.raises(UserError, match="need the kernels"):
        Engine(model, path="reference", fp8_weights=True)


@pytest.mark.slow  # in the interpreter
def test_fp8_weights_give_what_dequantised_weights_give() -> None:
    sizes = {"dim": 128, "num_heads": 2, "num_kv_heads": 2, "head_dim": 64, "ffn_dim": 128, "expert_dim": 128}
    config = TINY.model_copy(update={**sizes, "num_layers": 2, "num_experts": 3})
    model = random_model(config).to(DEVICE)
    engine = Engine(model, path="fast", fp8_weights=True)
    assert "FP8" in engine.describe()
    found = engine.generate([tokens(9)], GREEDY)
    assert engine._ahead is not None
    rounded = Transformer(config).to(DEVICE)
    rounded.load_state_dict(model.state_dict())
    with torch.no_grad():
        for block, w in zip(rounded.blocks, engine._ahead.kernels.layers, strict=True):
            block.attn.qkvg.weight.copy_(w.qkvg.wide(torch.float32))
            block.attn.o.weight.copy_(w.o.wide(torch.float32))
            for module, pair in ((block.ffn, w.dense), (block.moe and block.moe.shared, w.shared)):
                if module is not None and pair is not None:
                    module.gate_up.weight.copy_(pair[0].wide(torch.float32))
                    module.down.weight.copy_(pair[1].wide(torch.float32))
            if block.moe is not None and w.experts is not None:
                block.moe.experts.gate_up.copy_(w.experts[0].wide(torch.float32))
                block.moe.experts.down.copy_(w.experts[1].wide(torch.float32))
    compare(found, Engine(rounded.eval(), path="reference").generate([tokens(9)], GREEDY))


@pytest.mark.gpu  # minutes in the interpreter
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_answers_after_one_reading_are_those_of_whole_prompts(model: Transformer) -> None:
    start, tails = tokens(23), [tokens(2, 1), tokens(1, 2), tokens(9, 3)]
    expected = Engine(model, path="reference").generate([start + tail for tail in tails], GREEDY)
    for slots in (4, 3):  # all tails at once, and two at a time
        engine = Engine(model, path="fast", max_batch=slots, block=2, prefill_chunk=7)
        found = answer_after(engine, start, tails, 6, [])
        assert found == [completion.tokens for completion in expected]
        assert engine.cache.used_bytes == 0
