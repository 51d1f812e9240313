"""Sampling: truncation by its definitions, frequencies by the probabilities, and no influence of the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import UsageError
from trinity.infer.sampling import SamplingParams, TokenStream, kept, kept_by_sorting, most_probable, sample


def draw(logits: torch.Tensor, params: SamplingParams, count: int, seen: torch.Tensor | None = None) -> np.ndarray:
    stream = TokenStream(0)
    uniform = [stream.next() for _ in range(count)]
    tokens, _ = sample(logits.expand(count, -1), [params] * count, uniform, [seen] * count)
    return np.bincount(tokens.numpy(), minlength=len(logits)) / count


def test_frequencies_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([2.0, 0.5, -1.0, 1.0, -30.0])
    for temperature in (0.5, 1.0, 2.0):
        found = draw(logits, SamplingParams(temperature=temperature), 20_000)
        expected = (logits / temperature).softmax(-1).numpy()
        # Four standard deviations of a share of 20 000 draws.
        assert np.all(np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / 20_000) + 1e-4)


def test_greedy_takes_the_most_probable_and_ignores_the_random_number() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for number in (0.0, 0.5, 0.999):
        tokens, logprobs = sample(logits, [SamplingParams(temperature=0.0)] * 3, [number] * 3, [None] * 3)
        assert torch.equal(tokens, logits.argmax(-1))
        assert torch.allclose(logprobs, logits.log_softmax(-1).amax(-1))


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([[5.0, 5.1, -4.0]])
    tokens, _ = sample(logits, [SamplingParams(temperature=1e-30)], [0.9], [None])
    assert tokens.tolist() == [1]


def test_logprobs_follow_the_temperature_where_that_is_asked_for() -> None:
    logits = 3 * torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    temperatures = (0.7, 2.0, 0.0, 0.5)
    params = [
        SamplingParams(temperature=t, tempered_logprobs=i < 3, top_logprobs=2) for i, t in enumerate(temperatures)
    ]
    tokens, logprobs = sample(logits, params, [0.3, 0.6, 0.0, 0.9], [None] * 4)
    tops = most_probable(logits, params)
    for row, divisor in enumerate((0.7, 2.0, 1.0, 1.0)):
        own = (logits[row] / divisor).log_softmax(-1)
        assert logprobs[row].item() == pytest.approx(own[tokens[row]].item(), abs=1e-5)
        assert [value for _, value in tops[row]] == pytest.approx(own.topk(2).values.tolist(), abs=1e-5)


def test_logprobs_are_the_models_own_whatever_the_rules() -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=0.3, top_k=5, top_p=0.8, repetition_penalty=1.5)
    seen = torch.arange(40) < 10
    token, logprob = sample(logits, [params], [0.3], [seen])
    assert logprob.item() == pytest.approx(logits.log_softmax(-1)[0, int(token)].item(), abs=1e-6)


def left(probs: list[float], **rules: float) -> list[int]:
    weights = 3 * torch.tensor([probs], dtype=torch.float64)  # need not be normalised
    out = kept_by_sorting(weights, [SamplingParams(**rules)])  # type: ignore[arg-type]
    return out[0].nonzero()[:, 0].tolist()


def test_truncation_rules() -> None:
    probs = [0.5, 0.25, 0.15, 0.07, 0.03]
    assert left(probs, top_k=2) == [0, 1]
    assert left(probs, top_p=0.5) == [0]
    assert left(probs, top_p=0.51) == [0, 1]
    assert left(probs, top_p=1e-9) == [0]
    assert left(probs, min_p=0.3) == [0, 1, 2]
    assert left(probs, min_p=1.0) == [0]
    assert left(probs[::-1], top_p=0.51) == [3, 4]
    # Of equal ones the first.
    assert left([0.2, 0.4, 0.2, 0.2], top_k=2) == [0, 1]
    # After top_k=2 the first token holds two thirds.
    assert left(probs, top_k=2, top_p=0.6) == [0]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_is_kept_is_the_same_with_and_without_sorting(data: st.DataObject) -> None:
    """Rows in any company, flat and steep, with ties, heads too small for the share that is asked for."""
    rows, vocab = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 60))
    rules = st.builds(
        SamplingParams,
        top_k=st.sampled_from([0, 0, 1, 3, 100]),
        top_p=st.sampled_from([1e-9, 0.3, 0.95, 1.0, 1.0]),
        min_p=st.sampled_from([0.0, 0.0, 0.2, 1.0]),
    )
    params = data.draw(st.lists(rules, min_size=rows, max_size=rows))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    logits = torch.randn(rows, vocab, generator=generator) * data.draw(st.sampled_from([0.0, 0.3, 3.0, 300.0]))
    if data.draw(st.booleans()):
        logits = logits.round()  # ties
    weights = (logits - logits.amax(-1, keepdim=True)).double().exp()
    found = kept(weights, params, head=data.draw(st.sampled_from([1, 4, 1024])))
    expected = kept_by_sorting(weights, params)
    if found is None:
        assert all(not p.top_k and p.top_p == 1 and p.min_p == 0 for p in params)
    else:
        assert torch.equal(found & (weights > 0), expected & (weights > 0))


def test_draws_at_the_size_of_a_real_vocabulary_equal_those_of_the_reference() -> None:
    """A flat row, whose share of 0.9 lies far beyond the head, beside a steep one and rows without a rule."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 50_000, generator=generator) * torch.tensor([[0.1], [4.0], [1.0], [2.0]])
    params = [SamplingParams(top_p=0.9), SamplingParams(top_p=0.9), SamplingParams(), SamplingParams(top_k=40)]
    weights = (logits - logits.amax(-1, keepdim=True)).double().exp()
    weights = weights * kept_by_sorting(weights, params)
    total = weights.cumsum(-1)
    stream = TokenStream(0)
    for _ in range(20):
        uniform = [stream.next() for _ in params]
        tokens, _ = sample(logits, params, uniform, [None] * 4)
        expected = torch.searchsorted(total, torch.tensor(uniform).double()[:, None] * total[:, -1:], right=True)
        assert torch.equal(tokens, expected[:, 0])


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_row_does_not_depend_on_its_neighbours(data: st.DataObject) -> None:
    rows = data.draw(st.integers(2, 5))
    rules = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.7, 1.3]),
        top_k=st.sampled_from([0, 1, 3]),
        top_p=st.sampled_from([0.4, 1.0]),
        min_p=st.sampled_from([0.0, 0.2]),
        repetition_penalty=st.sampled_from([1.0, 1.4]),
    )
    params = data.draw(st.lists(rules, min_size=rows, max_size=rows))
    logits = torch.randn(rows, 23, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    uniform = data.draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=rows, max_size=rows))
    seen = [torch.arange(23) % (row + 2) == 0 for row in range(rows)]
    together, _ = sample(logits, params, uniform, seen)
    alone = [
        sample(logits[i : i + 1], params[i : i + 1], uniform[i : i + 1], seen[i : i + 1])[0].item() for i in range(rows)
    ]
    assert together.tolist() == alone
    for row, p in enumerate(params):
        if p.top_k and p.repetition_penalty == 1.0:
            assert together[row] in logits[row].topk(p.top_k).indices


def test_the_repetition_penalty_lowers_seen_tokens_of_either_sign() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.1]])
    params = [SamplingParams(temperature=0.0, repetition_penalty=1.2)]
    tokens, _ = sample(logits, params, [0.0], [torch.tensor([True, False, False, False])])
    assert tokens.tolist() == [1]
    tokens, _ = sample(logits[:, 2:], params, [0.0], [torch.tensor([True, False])])
    assert tokens.tolist() == [1]


def test_padding_of_the_vocabulary_never_comes() -> None:
    logits = torch.tensor([[0.0, 1.0, 9.0, 9.0]])
    for temperature in (0.0, 1.0):
        for number in (0.0, 0.5, 0.999999):
            tokens, _ = sample(logits, [SamplingParams(temperature=temperature)], [number], [None], vocab_size=2)
            assert tokens.item() < 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("stop", ("",)),
    ],
)
def test_values_outside_their_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
