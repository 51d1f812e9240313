"""Rollouts: what is asked, how rewards become rows, and the state between the updates of one rollout."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity.config import RLConfig
from trinity.data.rows import IGNORE
from trinity.rl.rollout import Rollouts
from trinity.rl.rows import ReplayRows
from trinity.rl.sample import Sample, Sampled, Task

STOP = 9
LAYERS, CHOSEN = 2, 3


class Sampler:
    """Answers with tokens that follow from the seed; remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def sync(self):
        self.calls.append("sync")

    def __call__(self, prompts, seeds):
        self.calls.append((prompts, seeds))
        return [self._answer(seed) for seed in seeds]

    def _answer(self, seed):
        tokens = [20 + seed % 5] * (1 + seed % 3) + [STOP]
        return Sampled(str(seed % 5), tokens, [-0.5 - 0.25 * i for i in range(len(tokens))], seed % 7 > 0)


def task(number, attempt):
    return Task([1, 2, 100 + number], lambda text, finished: float(text in "01") if finished else 0.0)


def no_scorer(rows, replay):
    raise AssertionError("one update needs no scorer")


def rollouts(scorer=no_scorer, start=None, **settings):
    values = {
        "seq_len": 16,
        "micro_rows": 2,
        "prompts_per_step": 4,
        "group": 4,
        "eval_every": 1,
        "gap_every": 0,
        **settings,
    }
    sampler = Sampler()
    return Rollouts(RLConfig.model_validate(values), task, sampler, scorer, 0, start), sampler


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
    sync, (prompts, seeds), *more = sampler.calls
    assert sync == "sync"
    assert not more
    assert prompts == [[1, 2, 100 + n] for n in range(4) for _ in range(4)]
    assert len(set(seeds)) == 16
    answers = [sampler._answer(seed) for seed in seeds]
    rewards = np.array([float(a.text in "01") if a.finished else 0.0 for a in answers]).reshape(4, 4)
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
    source._task = lambda number, attempt: Task([1, 2, 100 + number], lambda text, finished: 0.0)
    found = [sample for rows in source.next_batch(0) for sample in segments(rows)]
    assert len(found) == 16
    assert all(advantages == {0.0} for _, _, advantages, _, _ in found)


def test_updates_share_a_rollout_and_its_old_log_probabilities():
    scored = []

    def scorer(rows, replay):
        scored.append(rows)
        return np.where(rows.targets_BT != IGNORE, -rows.targets_BT / 100, 0.0).astype(np.float32)

    source, sampler = rollouts(scorer, updates=2)
    first, second = source.next_batch(0), source.next_batch(1)
    assert len(sampler.calls) == 2
    numbers = [{prompt[2] - 100 for rows in part for prompt, *_ in segments(rows)} for part in (first, second)]
    assert numbers[0] <= {0, 1, 2, 3}
    assert numbers[1] <= {4, 5, 6, 7}
    for rows in (*first, *second):
        for _, tokens, _, _, old in segments(rows):
            assert old == pytest.approx([-t / 100 for t in tokens])
    source.next_batch(2)
    assert len(sampler.calls) == 4


def test_the_start_scores_a_rollout_once_with_experts_of_its_own():
    scored = []

    def scorer(rows, replay):
        return np.zeros(rows.targets_BT.shape, np.float32)

    def start(rows, replay):
        assert not replay
        scored.append((rows.targets_BT != IGNORE).sum())
        return np.where(rows.targets_BT != IGNORE, -rows.targets_BT / 100, 0.0).astype(np.float32)

    source, sampler = rollouts(scorer, start, updates=2)
    batches = [*source.next_batch(0), *source.next_batch(1)]
    _, (_, seeds) = sampler.calls
    assert sum(scored) == sum(len(sampler._answer(seed).tokens) for seed in seeds)
    for rows in batches:
        there = rows.targets_BT != IGNORE
        np.testing.assert_allclose(rows.start_logprobs_BT[there], -rows.targets_BT[there] / 100, rtol=1e-6)
    plain, _ = rollouts()
    assert all(np.isnan(rows.start_logprobs_BT).all() for rows in plain.next_batch(0))


@pytest.mark.parametrize(("updates", "ahead"), [(1, False), (2, False), (1, True), (2, True)])
def test_the_state_between_steps_is_exact(updates, ahead):
    def scorer(rows, replay):
        return np.where(rows.targets_BT != IGNORE, -1 / 3, 0.0).astype(np.float32)

    straight, _ = rollouts(scorer, scorer, updates=updates, ahead=ahead)
    straight.next_batch(0)
    state = json.loads(json.dumps(straight.state_dict()))
    assert bool(state["pending"]) == (updates == 2)
    assert bool(state["ahead"]) == ahead
    resumed, _ = rollouts(scorer, scorer, updates=updates, ahead=ahead)
    resumed.load_state_dict(state)
    for step in (1, 2):
        for a, b in zip(straight.next_batch(step), resumed.next_batch(step), strict=True):
            for name in (
                "tokens_BT",
                "targets_BT",
                "advantages_BT",
                "sampler_logprobs_BT",
                "old_logprobs_BT",
                "start_logprobs_BT",
            ):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_ahead_samples_with_the_weights_of_the_step_before():
    source, sampler = rollouts(ahead=True, steps=3)
    batches = [source.next_batch(step) for step in range(3)]
    source.state_dict()
    kinds = [call if call == "sync" else "sample" for call in sampler.calls]
    assert kinds == ["sync", "sample", "sample", "sync", "sample", "sync"]  # no rollout beyond the last step
    plain, _ = rollouts(steps=3)
    for step, batch in enumerate(batches):
        for a, b in zip(batch, plain.next_batch(step), strict=True):
            np.testing.assert_array_equal(a.tokens_BT, b.tokens_BT)


def test_a_rollback_drops_what_was_sampled_ahead():
    source, _ = rollouts(ahead=True)
    first = source.next_batch(0)
    state = json.loads(json.dumps(source.state_dict()))
    second = source.next_batch(1)
    source.next_batch(2)
    source.load_state_dict(state)
    for a, b in zip(second, source.next_batch(1), strict=True):
        np.testing.assert_array_equal(a.tokens_BT, b.tokens_BT)
    assert first is not second


def test_dull_questions_are_asked_anew():
    def dull_at_first(number, attempt):
        return Task([1, attempt, number], lambda text, finished: float(attempt and text in "01"))

    source, sampler = rollouts(retries=2)
    source._task = dull_at_first
    source.next_batch(0)
    asked = [prompts for prompts, _ in (call for call in sampler.calls if call != "sync")]
    assert {p[1] for p in asked[0]} == {0}
    assert {p[1] for p in asked[1]} == {1}
    assert len(asked[0]) == len(asked[1]) == 16
    assert source.summary(0, [])["informative"] > 0
    seeds = [set(seeds) for _, seeds in (call for call in sampler.calls if call != "sync")]
    assert not seeds[0] & seeds[1]


class Echo:
    """Replies once with token 7, then pays for the second turn."""

    def __init__(self):
        self.turns, self.closed = [], False

    def reply(self, text, finished):
        self.turns.append(text)
        return [7, 7] if len(self.turns) == 1 else None

    def reward(self):
        return float(len(self.turns) + int(self.turns[-1]) % 2)

    def close(self):
        self.closed = True


class ExpertSampler(Sampler):
    """Says which call it was in place of experts."""

    def __call__(self, prompts, seeds):
        answers = super().__call__(prompts, seeds)
        call = len([c for c in self.calls if c != "sync"])
        return [
            Sampled(
                a.text,
                a.tokens,
                a.logprobs,
                True,
                np.full((len(p) + len(a.tokens) - 1, LAYERS, CHOSEN), call, np.int16),
            )
            for p, a in zip(prompts, answers, strict=True)
        ]


def test_an_episode_of_two_turns_has_loss_on_what_the_policy_wrote_and_the_experts_of_each_turn():
    episodes = []

    def episode():
        episodes.append(Echo())
        return episodes[-1]

    values = {"seq_len": 24, "micro_rows": 2, "prompts_per_step": 2, "group": 4, "gap_every": 0, "max_turns": 3}
    sampler = ExpertSampler()
    settings = RLConfig.model_validate({**values, "max_new_tokens": 4})
    source = Rollouts(settings, lambda n, a: Task([1, 2, 3], episode=episode), sampler, no_scorer, seed=0)
    batches = source.next_batch(0)
    assert len(episodes) == 8
    assert all(e.closed and len(e.turns) == 2 for e in episodes)
    seen = 0
    for rows in batches:
        assert isinstance(rows, ReplayRows)
        for b, chunks in enumerate(rows.documents):
            at = 0
            for chunk in chunks:
                here = slice(at, at + chunk.length)
                targets, experts = rows.targets_BT[b, here], rows.experts_BTLk[b, here, 0, 0]
                assert IGNORE in targets[3:].tolist(), "the environment's tokens have no loss"
                environment = np.flatnonzero(np.append(rows.tokens_BT[b, here][1:], 0) == 7)
                assert (targets[environment] == IGNORE).all()
                assert (rows.advantages_BT[b, here][environment] == 0).all()
                first_turn = environment[0]
                assert set(experts[:first_turn].tolist()) == {1}
                assert set(experts[first_turn + 1 :].tolist()) == {2}
                at += chunk.length
                seen += 1
            assert (rows.experts_BTLk[b, at:] == -1).all()
    assert seen in (4, 8)
    assert source.summary(0, batches)["turns"] == 2


def test_cut_answers_can_be_left_out():
    source, sampler = rollouts(mask_cut=True)
    batches = source.next_batch(0)
    finished = [answer.finished for call in sampler.calls if call != "sync" for answer in map(sampler._answer, call[1])]
    assert not all(finished)
    kept = sum(len(chunks) for rows in batches for chunks in rows.documents)
    assert 0 < kept < sum(finished) + 1


@given(
    st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_a_sample_survives_json(tokens, with_old, with_experts):
    ids, written = [t for t, _ in tokens], [w for _, w in tokens]
    experts = np.arange(len(ids) * LAYERS * CHOSEN).reshape(len(ids), LAYERS, CHOSEN).astype(np.int16)
    sample = Sample(
        [1],
        ids,
        written,
        [-0.1 * t for t in ids],
        0.5,
        True,
        "text",
        old_logprobs=[-1 / 3] * len(ids) if with_old else None,
        experts=experts if with_experts else None,
    )
    again = Sample.from_json(json.loads(json.dumps(sample.to_json())))
    if with_experts:
        assert again.experts is not None
        np.testing.assert_array_equal(again.experts, experts)
    assert replace(again, experts=None) == replace(sample, experts=None)


def test_the_gap_is_measured_with_replay_and_without():
    def scorer(rows, replay):
        return rows.sampler_logprobs_BT + (0.1 if replay else 0.3)

    values = {"seq_len": 24, "micro_rows": 2, "prompts_per_step": 2, "group": 4, "gap_every": 2}
    source = Rollouts(RLConfig.model_validate(values), task, ExpertSampler(), scorer, seed=0)
    source.next_batch(0)
    found = source.summary(0, [])
    assert found["gap_replayed_abs"] == pytest.approx(0.1, rel=1e-5)
    assert found["gap_free_max"] == pytest.approx(0.3, rel=1e-5)
    assert found["gap_free"] == pytest.approx(np.exp(0.3) - 1.3, rel=1e-4)
    source.next_batch(1)
    assert "gap_free" not in source.summary(1, [])
