"""Rollouts: what is asked, how rewards become rows, and the state between the updates of one rollout."""

import json

import numpy as np
import pytest

from trinity.config import RLConfig
from trinity.data.rows import IGNORE
from trinity.rl.rollout import Rollouts, Sampled, Task

STOP = 9


class Sampler:
    """Answers with tokens that follow from the seed; remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, seeds):
        self.calls.append((prompts, seeds))
        return [self._answer(seed) for seed in seeds]

    def _answer(self, seed):
        tokens = [20 + seed % 5] * (1 + seed % 3) + [STOP]
        return Sampled(str(seed % 5), tokens, [-0.5 - 0.25 * i for i in range(len(tokens))], seed % 7 > 0)


def task(number):
    return Task([1, 2, 100 + number], lambda text, finished: float(text in "01") if finished else 0.0)


def no_scorer(rows):
    raise AssertionError("one update needs no scorer")


def rollouts(scorer=no_scorer, **settings):
    values = {"seq_len": 16, "micro_rows": 2, "prompts_per_step": 4, "group": 4, "eval_every": 1, **settings}
    sampler = Sampler()
    return Rollouts(RLConfig.model_validate(values), task, sampler, scorer, seed=0), sampler


def segments(rows):
    """(prompt, answer, advantage, sampler log-probabilities, old log-probabilities) of each sample."""
    found = []
    for b, chunks in enumerate(rows.documents):
        at = 0
        for chunk in chunks:
            here = slice(at, at + chunk.length)
            targets = rows.targets_BT[b, here]
            there = targets != IGNORE
            found.append(
                (
                    rows.tokens_BT[b, here][:3].tolist(),
                    targets[there].tolist(),
                    set(rows.advantages_BT[b, here][there].tolist()),
                    rows.sampler_logprobs_BT[b, here][there].tolist(),
                    rows.old_logprobs_BT[b, here][there],
                )
            )
            assert not rows.advantages_BT[b, here][~there].any()
            at += chunk.length
    return found


def test_rows_hold_every_informative_answer_with_its_group_s_advantage():
    source, sampler = rollouts()
    batches = source.next_batch(0)
    assert all(len(rows) == 2 for rows in batches)
    (prompts, seeds), *more = sampler.calls
    assert not more
    assert prompts == [[1, 2, 100 + n] for n in range(4) for _ in range(4)]
    assert len(set(seeds)) == 16
    answers = [sampler._answer(seed) for seed in seeds]
    rewards = np.array([task(0).reward(a.text, a.finished) for a in answers]).reshape(4, 4)
    found = [sample for rows in batches for sample in segments(rows)]
    expected = []
    for p in range(4):
        std = rewards[p].std()
        for g in range(4):
            if std > 0:
                advantage = np.float32((rewards[p, g] - rewards[p].mean()) / std)
                expected.append((100 + p, answers[4 * p + g].tokens, advantage))
    assert 0 < len(expected) < 16, "the example should have groups of both kinds"
    got = [(prompt[2], tokens, pytest.approx(advantages.pop(), abs=1e-5)) for prompt, tokens, advantages, _, _ in found]
    assert all(sample in expected for sample in got)
    assert all(sample in got for sample in expected)
    assert len(got) == len(expected)
    for _, tokens, _, logprobs, old in found:
        assert logprobs == [-0.5 - 0.25 * i for i in range(len(tokens))]
        assert np.isnan(old).all()
    summary = source.summary(0, batches)
    assert summary["reward"] == pytest.approx(rewards.mean())
    assert summary["reward_std"] == pytest.approx(rewards.std(axis=1).mean())
    assert summary["informative"] == pytest.approx((rewards.std(axis=1) > 0).mean())


def test_a_step_without_information_goes_through_with_zero_advantages():
    source, _ = rollouts()
    source._task = lambda number: Task([1, 2, 100 + number], lambda text, finished: 0.0)
    found = [sample for rows in source.next_batch(0) for sample in segments(rows)]
    assert len(found) == 16
    assert all(advantages == {0.0} for _, _, advantages, _, _ in found)


def test_updates_share_a_rollout_and_its_old_log_probabilities():
    scored = []

    def scorer(rows):
        scored.append(rows)
        return np.where(rows.targets_BT != IGNORE, -rows.targets_BT / 100, 0.0).astype(np.float32)

    source, sampler = rollouts(scorer, updates=2)
    first, second = source.next_batch(0), source.next_batch(1)
    assert len(sampler.calls) == 1
    numbers = [{prompt[2] - 100 for rows in part for prompt, *_ in segments(rows)} for part in (first, second)]
    assert numbers[0] <= {0, 1, 2, 3}
    assert numbers[1] <= {4, 5, 6, 7}
    for rows in (*first, *second):
        for _, tokens, _, _, old in segments(rows):
            assert old == pytest.approx([-t / 100 for t in tokens])
    source.next_batch(2)
    assert len(sampler.calls) == 2


@pytest.mark.parametrize("updates", [1, 2])
def test_the_state_between_steps_is_exact(updates):
    def scorer(rows):
        return np.where(rows.targets_BT != IGNORE, -1 / 3, 0.0).astype(np.float32)

    straight, _ = rollouts(scorer, updates=updates)
    straight.next_batch(0)
    state = json.loads(json.dumps(straight.state_dict()))
    assert bool(state["pending"]) == (updates == 2)
    resumed, _ = rollouts(scorer, updates=updates)
    resumed.load_state_dict(state)
    for step in (1, 2):
        for a, b in zip(straight.next_batch(step), resumed.next_batch(step), strict=True):
            for name in ("tokens_BT", "targets_BT", "advantages_BT", "sampler_logprobs_BT", "old_logprobs_BT"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
