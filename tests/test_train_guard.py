"""The guard: what counts as a spike, and that a bad step leaves no trace but its event."""

import math
import operator
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage_fixtures import tiny_config, write_inputs
from train_helpers import STEPS, MadeUpSource, PoisonedLoss, numbers, small_config, small_job, weights
from trinity.base.errors import UserError
from trinity.base.rundir import RunDir
from trinity.config import GuardConfig
from trinity.data.rows import Chunk, Rows
from trinity.data.shards import Shards
from trinity.model.transformer import Transformer
from trinity.optim.schedule import StepPlan
from trinity.stages import pretrain
from trinity.stages.sources import TextSource
from trinity.train import LossOutput, TrainJob, language_model_loss, train
from trinity.train.checkpoint import list_checkpoints, verify_checkpoint
from trinity.train.guard import MIN_HISTORY, GuardPolicy, SpikeGuard
from trinity.train.losses import to_device
from trinity.train.step import step_share

CPU = torch.device("cpu")


def judge(guard: SpikeGuard, loss: float, norm: float = 1.0) -> bool:
    return bool(guard.judge(torch.tensor(loss), torch.tensor(norm)).skip)


def filled_guard(steps: int = 128, window: int = 128) -> SpikeGuard:
    guard = SpikeGuard(GuardConfig(window=window), CPU)
    for step in range(steps):
        assert not judge(guard, 2.0 + 0.1 * math.sin(step), 1.0 + 0.1 * math.cos(step))
    return guard


def test_the_score_is_one_sided() -> None:
    guard = filled_guard()
    deviation = 0.1 / math.sqrt(2)
    assert judge(guard, 2.0 + 6.3 * deviation)
    assert not judge(guard, 2.0 + 5.7 * deviation)
    assert not judge(guard, 0.0)
    assert judge(guard, 2.0, norm=2.0)
    assert not judge(guard, 2.0, norm=0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad_from_the_first_step(bad: float) -> None:
    guard = SpikeGuard(GuardConfig(), CPU)
    assert judge(guard, bad)
    assert judge(guard, 1.0, bad)
    assert not judge(guard, 1.0)


@given(st.lists(st.floats(1.0, 2.0), min_size=MIN_HISTORY, max_size=200), st.integers(2, 40))
@settings(max_examples=40, deadline=None)
def test_the_score_agrees_with_the_formula(losses: list[float], window: int) -> None:
    guard = SpikeGuard(GuardConfig(window=window), CPU)
    kept: list[float] = []
    for loss in losses:
        verdict = guard.judge(torch.tensor(loss, dtype=torch.float64), torch.tensor(1.0))
        known = torch.tensor(kept[-window:], dtype=torch.float64)
        if len(known) >= MIN_HISTORY:
            deviation = max(float(known.std()), 1e-3 * float(known.mean()))
            score = (loss - float(known.mean())) / deviation
            assert float(verdict.scores_2[0]) == pytest.approx(score, rel=1e-6, abs=1e-6)
            assert bool(verdict.skip) == (score > 6.0 * math.sqrt(window / len(known)))
        else:
            assert not verdict.skip
        if not verdict.skip:
            kept.append(loss)


def test_a_short_history_has_a_wider_bound() -> None:
    guard = filled_guard(MIN_HISTORY)
    assert not judge(guard, 2.0 + 8 * 0.1 / math.sqrt(2))
    assert judge(guard, 2.0, norm=1000.0)


def test_gradient_norms_may_rise_for_good_in_the_first_steps() -> None:
    """As AdamW's do: the norms of a run whose every further step was skipped before."""
    guard = filled_guard(15)
    for norm in (9.15, 7.5, 9.3, 12.2, 14.5):
        assert not judge(guard, 2.0, norm)
    assert judge(guard, 2.0, 1000.0)
    assert judge(filled_guard(64), 2.0, 9.15)


def test_a_skipped_value_stays_out_of_the_history() -> None:
    guard = filled_guard()
    before = guard.state_dict()
    for _ in range(5):
        assert judge(guard, 50.0)
        assert judge(guard, math.nan)
    assert guard.state_dict() == before


def test_a_new_phase_starts_a_new_history() -> None:
    guard = filled_guard()
    guard.enter_phase("b")
    assert not judge(guard, 50.0)


@given(st.lists(st.floats(1.0, 1.1), max_size=30), st.lists(st.floats(1.0, 1.1), max_size=30))
@settings(max_examples=20, deadline=None)
def test_the_history_survives_saving_bit_for_bit(before: list[float], after: list[float]) -> None:
    one, other = (SpikeGuard(GuardConfig(window=9), CPU) for _ in range(2))
    for loss in before:
        judge(one, loss)
    other.load_state_dict(one.state_dict())
    for loss in after:
        a, b = (g.judge(torch.tensor(loss), torch.tensor(loss)) for g in (one, other))
        assert torch.equal(a.scores_2, b.scores_2)
    assert one.state_dict() == other.state_dict()


def test_a_history_of_another_window_keeps_its_newest_values() -> None:
    guard = SpikeGuard(GuardConfig(window=4), CPU)
    old = filled_guard(20, window=20)
    guard.load_state_dict(old.state_dict())
    assert guard.state_dict()["loss"] == old.state_dict()["loss"][-4:]


def test_the_policy_gives_up() -> None:
    policy = GuardPolicy(GuardConfig(skips_before_rollback=2, max_rollbacks=1))
    assert [policy.bad(step) for step in (11, 12)] == [False, True]
    assert policy.plan_rollback([0, 5, 10], 12) == 10
    assert policy.jumps == {11, 12}
    assert policy.bad(13) is False
    with pytest.raises(UserError, match="does not recover"):
        policy.bad(14)


def test_the_policy_goes_further_back_each_time() -> None:
    policy = GuardPolicy(GuardConfig(skips_before_rollback=1, max_rollbacks=9))
    targets = []
    for step in (12, 13, 14, 15, 16):
        assert policy.bad(step)
        targets.append(policy.plan_rollback([0, 5, 10], step))
    assert targets == [10, 10, 5, 0, 0]
    assert policy.jumps == set(range(1, 17))
    policy.checkpoint_written(15)
    assert policy.jumps == {16}
    assert policy.bad(20)
    assert policy.plan_rollback([0, 5, 10, 15], 20) == 15


# Whole runs


def poisoned_job(path: Path, batches: list[int], kind: str, *overrides: str):
    config = small_config(*overrides)
    source = MadeUpSource(config, StepPlan.pretrain(config.pretrain))
    return small_job(path, config, source=source, loss=PoisonedLoss(source, batches, kind))


@pytest.mark.parametrize("kind", ["nan", "huge"])
@pytest.mark.parametrize("batch", [9, 19])
def test_a_poisoned_batch_is_skipped_and_named(tmp_path: Path, kind: str, batch: int) -> None:
    job = poisoned_job(tmp_path, [batch], kind)
    result = train(job)
    assert result.finished
    [skip] = job.run_dir.read_events("skip")
    assert skip["step"] == batch + 1
    assert {d["id"] for d in skip["documents"]} == {str(batch * 100 + row) for row in range(4)}
    assert skip["reason"] == {"nan": "not finite", "huge": "spike"}[kind]
    assert job.run_dir.read_events("rollback") == []
    records = job.run_dir.read_metrics("step")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if r["skipped"]] == [batch + 1]
    assert records[-1]["spikes"] == 1
    assert all(p.isfinite().all() for p in job.model.parameters())


LONG = 60
LONGER = (
    f'pretrain.phases=[{{name="a", tokens={64 * LONG}, weights={{x=1.0}}}}]',
    "checkpoint.every_steps=20",
    "optim.adamw_lr=0.02",
    "optim.muon_lr=0.04",
)
"""Settings of a run that has learnt all there is at its end: three steps more or less hardly matter."""


def heldout_loss(job: TrainJob) -> float:
    """Loss on batches that no run was trained on."""
    source = MadeUpSource(job.config, job.plan)
    source.handed_out = 1000
    batches = [rows for step in range(8) for rows in source.next_batch(step)]
    with torch.no_grad():
        share = step_share(batches, CPU)
        losses = [language_model_loss(job.model, to_device(b, CPU), share, job.config.loss).loss for b in batches]
    return float(torch.stack(losses).sum())


@pytest.fixture(scope="module")
def clean_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of undisturbed runs that differ in their first weights alone; the first is what poisoned runs compare with."""
    losses = []
    for seed in range(4):
        job = small_job(tmp_path_factory.mktemp("clean"), small_config(*LONGER))
        assert isinstance(job.model, Transformer)
        job.model.init_weights(seed)
        train(job)
        losses.append(heldout_loss(job))
    return losses


@pytest.mark.parametrize("kind", ["nan", "huge"])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_poisoned_run_ends_within_the_noise_of_clean_ones(
    tmp_path: Path, clean_losses: list[float], kind: str, length: int, seed: int
) -> None:
    """One bad batch at a random step is skipped; three in a row are gone back from, and jumped when they come again."""
    first = random.Random(f"{kind} {length} {seed}").randrange(MIN_HISTORY if kind == "huge" else 1, LONG - length)
    job = poisoned_job(tmp_path, list(range(first, first + length)), kind, *LONGER)
    assert train(job).finished
    named = {d["id"] for e in job.run_dir.read_events("skip") for d in e["documents"]}
    assert named == {str(batch * 100 + row) for batch in range(first, first + length) for row in range(4)}
    assert len(job.run_dir.read_events("rollback")) == (length == 3)
    assert [e["step"] for e in job.run_dir.read_events("jump")] == [first + 1 + i for i in range(length) if length == 3]
    noise = max(clean_losses) - min(clean_losses)
    assert noise > 0
    assert abs(heldout_loss(job) - clean_losses[0]) < noise


@pytest.mark.parametrize("kind", ["nan", "huge"])
def test_without_the_guard_the_poison_shows(tmp_path: Path, clean_losses: list[float], kind: str) -> None:
    """What the guard is for: the same poison is not within the noise without it."""
    unguarded = ("guard.enabled=false", "optim.clip_norm=1e9", "checkpoint.enabled=false")
    job = poisoned_job(tmp_path, list(range(20, 23)), kind, *LONGER, *unguarded)
    train(job)
    assert not abs(heldout_loss(job) - clean_losses[0]) < max(clean_losses) - min(clean_losses)


def test_events_name_real_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source, id and place in the shards of every document of the bad batch, from shards on disk, with prefetching."""
    write_inputs(tmp_path)
    config = tiny_config(tmp_path)
    batches: list[list[Chunk]] = []
    next_batch = TextSource.next_batch

    def keep(source: TextSource, step: int) -> list[Rows]:
        rows = next_batch(source, step)
        batches.append([chunk for part in rows for chunks in part.documents for chunk in chunks])
        return rows

    def poisoned(model: Any, batch: Any, share: Any, settings: Any) -> LossOutput:
        output = language_model_loss(model, batch, share, settings)
        return replace(output, loss=output.loss * float("nan")) if len(batches) == 3 else output

    monkeypatch.setattr(TextSource, "next_batch", keep)
    monkeypatch.setattr(pretrain, "language_model_loss", poisoned)
    assert pretrain.run(config, tmp_path / "run").train.finished
    [skip] = RunDir(tmp_path / "run").read_events("skip")
    shards = Shards.open(tmp_path / "shards/train")
    assert skip["step"] == 3
    assert skip["num_documents"] == len(batches[2])
    key = operator.itemgetter("source", "id", "offset")
    assert sorted(map(key, skip["documents"])) == sorted(key(shards.describe(chunk.doc)) for chunk in batches[2])


def test_a_skipped_step_changes_nothing(tmp_path: Path) -> None:
    """A run that ends with a bad batch has the weights, state and biases of the run that ends before it."""
    tokens = {n: f'pretrain.phases=[{{name="a", tokens={n * 64}, weights={{x=1.0}}}}]' for n in (7, 8)}
    clean = poisoned_job(tmp_path / "clean", [], "nan", tokens[7], "pretrain.decay_fraction=0.0")
    bad = poisoned_job(tmp_path / "bad", [7], "nan", tokens[8], "pretrain.decay_fraction=0.0")
    train(clean)
    train(bad)
    assert len(bad.run_dir.read_events("skip")) == 1
    expected, found = weights(clean), weights(bad)
    assert any("momentum" in name for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_bad_steps_in_a_row_are_rolled_back_and_jumped(tmp_path: Path) -> None:
    job = poisoned_job(tmp_path, [6, 7, 8], "nan")
    assert train(job).finished
    [rollback] = job.run_dir.read_events("rollback")
    assert (rollback["step"], rollback["to_step"], rollback["jump_steps"]) == (9, 5, [7, 8, 9])
    jumps = job.run_dir.read_events("jump")
    assert [jump["step"] for jump in jumps] == [7, 8, 9]
    assert [jump["documents"][0]["id"] for jump in jumps] == ["600", "700", "800"]
    assert len(job.run_dir.read_events("skip")) == 3
    records = job.run_dir.read_metrics("step")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if r.get("jumped")] == [7, 8, 9]


def test_a_checkpoint_of_spoilt_weights_is_not_gone_back_to(tmp_path: Path) -> None:
    """A step with a finite loss whose update leaves NaN behind, just before a checkpoint: the earlier one is taken."""
    job = small_job(tmp_path, small_config("checkpoint.asynchronous=false"))
    update, updates = job.optimizer.step, []

    def spoil(skip: torch.Tensor | None = None, number: int = 0) -> None:
        update(skip, number)
        updates.append(skip)
        if len(updates) == 10:
            job.model.get_parameter("layers.1.attn.o.weight").data[0, 0] = math.nan

    job.optimizer.step = spoil
    assert train(job).finished
    [rollback] = job.run_dir.read_events("rollback")
    assert (rollback["step"], rollback["to_step"]) == (13, 5)
    [passed_over] = job.run_dir.read_events("damaged_checkpoint")
    assert passed_over["checkpoint"] == 10
    assert "layers.1.attn.o.weight holds numbers that are not finite" in passed_over["reason"]
    for info in list_checkpoints(job.run_dir.checkpoints):
        verify_checkpoint(info.path)  # that of step 10 has been written anew


def test_a_run_goes_on_past_a_long_poison(tmp_path: Path) -> None:
    """Six bad batches in a row: the second rollback to the same checkpoint passes over everything since it."""
    job = poisoned_job(tmp_path, list(range(6, 12)), "nan")
    assert train(job).finished
    rollbacks = job.run_dir.read_events("rollback")
    assert [r["to_step"] for r in rollbacks] == [5, 5]
    assert rollbacks[1]["jump_steps"] == list(range(6, 13))
    records = job.run_dir.read_metrics("step")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert all(r["loss"] is not None for r in records if r["step"] > 12)


def test_poison_without_end_stops_the_run(tmp_path: Path) -> None:
    job = poisoned_job(tmp_path, list(range(4, 99)), "nan")
    with pytest.raises(UserError, match=r"does not recover.*events\.jsonl"):
        train(job)
    assert len(job.run_dir.read_events("rollback")) == 3
    assert job.run_dir.read_events()[-1]["event"] == "stop"
    assert all(p.isfinite().all() for p in job.model.parameters())


def test_no_checkpoint_is_written_in_the_middle_of_bad_steps(tmp_path: Path) -> None:
    job = poisoned_job(tmp_path, [8, 9], "nan")
    assert train(job).finished
    assert [e["step"] for e in job.run_dir.read_events("checkpoint")] == [0, 5, 11, 15, 20]


def test_a_run_with_incidents_repeats_itself(tmp_path: Path) -> None:
    runs = [poisoned_job(tmp_path / str(n), [6, 7, 8, 13], "huge") for n in range(2)]
    for job in runs:
        train(job)
    first, second = (numbers(job.run_dir.read_metrics("step")) for job in runs)
    assert first == second


def test_the_guard_can_be_switched_off(tmp_path: Path) -> None:
    job = poisoned_job(tmp_path, [9], "huge", "guard.enabled=false")
    assert train(job).finished
    assert job.run_dir.read_events("skip") == []
