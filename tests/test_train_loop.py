"""The loop and its step: exact accumulation, counts, records, evaluations, settings of a resumed run."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from train_helpers import STEPS, MadeUpSource, numbers, small_config, small_job, weights
from trinity.base.errors import UserError
from trinity.model.balance import max_vio
from trinity.model.transformer import Transformer
from trinity.train import Evaluation, Outcome, train
from trinity.train.guard import SpikeGuard
from trinity.train.losses import language_model_loss, to_device
from trinity.train.metrics import DEAD_STEPS, ExpertWatch, routing_fields
from trinity.train.precision import MasterWeights
from trinity.train.step import StepRunner, clip_, step_share, total_norm

CPU = torch.device("cpu")
PER_LAYER = (
    *("max_vio_layers", "dead_experts", "load_entropy", "bias_min", "bias_max", "bias_norm"),
    *("router_min", "router_max", "router_entropy"),
)


def one_step(
    micro_rows: int, tmp_path: Path, *overrides: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor], nn.Module]:
    """The numbers, gradients and model of the first step, with its 4 rows in micro-batches of `micro_rows`."""
    sizes = (f"pretrain.micro_rows={micro_rows}", "loss.z_loss=0.01", "loss.sequence_loss=0.05")
    config = small_config(*sizes, *overrides)
    job = small_job(tmp_path, config)
    gradients: dict[str, torch.Tensor] = {}
    step = job.optimizer.step

    def spy(skip: torch.Tensor | None = None, number: int = 0) -> None:
        gradients.update({n: p.grad.clone() for n, p in job.model.named_parameters() if p.grad is not None})
        step(skip, number)

    job.optimizer.step = spy  # type: ignore[method-assign]
    masters = MasterWeights(job.model, torch.float32)
    guard = SpikeGuard(config.guard, CPU)
    runner = StepRunner(job.model, job.optimizer, job.loss, config, guard, masters, CPU)
    return runner.run(job.plan[0], job.source.next_batch(0)).read(), gradients, job.model


def test_accumulation_equals_one_big_batch(tmp_path: Path) -> None:
    whole, gradients, _ = one_step(4, tmp_path)
    for micro_rows in (1, 2, 3):
        parts, accumulated, _ = one_step(micro_rows, tmp_path)
        assert parts["micro_batches"] == math.ceil(4 / micro_rows)
        for name in ("loss", "ce", "z_loss", "sequence_loss", "grad_norm", "logit_mean", "logit_max"):
            assert parts[name] == pytest.approx(whole[name], rel=2e-6), name
        for name in ("counts", "router_max", "router_entropy"):
            np.testing.assert_allclose(parts[name], whole[name], rtol=2e-6)
        assert accumulated.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(accumulated[name], gradient, rtol=1e-4, atol=1e-7)


def test_the_terms_add_up_to_the_loss(tmp_path: Path) -> None:
    values, _, _ = one_step(2, tmp_path)
    assert values["loss"] == pytest.approx(values["ce"] + values["z_loss"] + values["sequence_loss"], rel=1e-6)


def test_the_loss_is_the_formula_of_the_spec(tmp_path: Path) -> None:
    """Against the plain formula over all logits of the whole batch."""
    config = small_config("loss.z_loss=0.01", "loss.sequence_loss=0.05")
    job = small_job(tmp_path, config)
    [rows] = [r for r in small_job(tmp_path, small_config("pretrain.micro_rows=4")).source.next_batch(0)]
    batch = to_device(rows, CPU)
    output = language_model_loss(job.model, batch, step_share([rows], CPU), config.loss)
    logits_NV = job.model(batch.tokens_BT, batch.segments_BT, batch.positions_BT).flatten(0, 1)
    targets_N = batch.targets_BT.flatten()
    keep_N = targets_N != -100
    ce = nn.functional.cross_entropy(logits_NV[keep_N], targets_N[keep_N])
    z_loss = 0.01 * logits_NV[keep_N].logsumexp(1).square().mean()
    assert isinstance(job.model, Transformer)
    routing = job.model.features(batch.tokens_BT, batch.segments_BT, batch.positions_BT).routing
    expected = ce + z_loss + 0.05 * routing.sequence_loss
    torch.testing.assert_close(output.loss, expected)
    parameters = list(job.model.parameters())
    for found, wanted in zip(
        torch.autograd.grad(output.loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_counts_are_summed_and_move_the_biases_once(tmp_path: Path) -> None:
    values, _, model = one_step(1, tmp_path)
    counts_LE = values["counts"]
    assert (counts_LE.sum(1) == 4 * 16 * 2).all()
    for layer, counts_E in enumerate(counts_LE, start=1):
        bias = model.get_buffer(f"layers.{layer}.moe.router.bias")
        settings = small_config().balance
        violation = torch.tensor((counts_E.mean() - counts_E) / counts_E.mean())
        delta = settings.rate * torch.tanh(settings.kappa * violation)
        expected = (1 - settings.momentum) * (delta - delta.mean())
        torch.testing.assert_close(bias.double(), expected, rtol=1e-4, atol=1e-8)


def test_quantile_biases_of_micro_batches_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    found = [dict(one_step(rows, tmp_path, "balance.kind=quantile")[2].named_buffers()) for rows in (4, 2, 1)]
    biases = [name for name in found[0] if name.endswith("router.bias")]
    assert len(biases) == 3
    for name in biases:
        assert found[0][name].abs().max() > 1e-3
        for other in found[1:]:  # the last bits of a score depend on the size of a batch
            torch.testing.assert_close(other[name], found[0][name], atol=2e-4, rtol=0)


def test_one_step_of_quantile_balancing_undoes_a_bad_bias(tmp_path: Path) -> None:
    job = small_job(tmp_path, small_config("balance.kind=quantile"))
    for name, buffer in job.model.named_buffers():
        if name.endswith("router.bias"):
            buffer.copy_(torch.tensor([0.4, 0.1, -0.2, -0.3]))
    train(job)
    records = job.run_dir.read_metrics("step")
    assert records[0]["max_vio"] == pytest.approx(1)  # two of four experts have all tokens
    assert max(r["max_vio"] for r in records[1:]) < 0.6
    assert records[-1]["loss"] < records[0]["loss"] - 0.5


def test_clipping() -> None:
    gradients = [torch.full((3,), 2.0), torch.full((2, 2), -1.0)]
    norm = total_norm(gradients)
    assert float(norm) == pytest.approx(4.0)
    clip_(gradients, norm, 1.0)
    assert float(total_norm(gradients)) == pytest.approx(1.0, rel=1e-5)
    small = [torch.full((4,), 0.1)]
    clip_(small, total_norm(small), 1.0)
    assert torch.equal(small[0], torch.full((4,), 0.1))


def test_every_step_has_the_record_of_the_contract(tmp_path: Path) -> None:
    job = small_job(tmp_path, step_fields=lambda step, rows: {"reward": step / 10})
    result = train(job)
    assert (result.step, result.tokens, result.finished) == (STEPS, 1280, True)
    records = job.run_dir.read_metrics("step")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["tokens"] for r in records] == [64 * n for n in range(1, STEPS + 1)]
    assert [r["phase"] for r in records] == ["a"] * 10 + ["b"] * 10
    scalars = "loss ce z_loss sequence_loss grad_norm lr_scale rows tokens_per_second mfu batch_het max_vio logit_max"
    for record in records:
        assert record["stage"] == "pretrain"
        for name in (scalars + " logit_mean seconds reward").split():
            assert math.isfinite(record[name]), name
        for name in PER_LAYER:
            assert len(record[name]) == 3, name
        assert record["batch_het"] >= 0
        assert all(low <= high for low, high in zip(record["router_min"], record["router_max"], strict=True))
    assert [r["step"] for r in records if "load" in r] == [10, 20]
    assert np.allclose(np.mean(records[9]["load"], axis=1), 1.0, atol=2e-3)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert [e["event"] for e in job.run_dir.read_events()] == ["start", *["checkpoint"] * 5, "finish"]


def test_routing_fields_agree_with_the_device() -> None:
    counts_LE = np.array([[4.0, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4]])
    fields = routing_fields(counts_LE)
    assert fields["max_vio_layers"] == pytest.approx(max_vio(torch.tensor(counts_LE)).tolist())
    assert fields["load_entropy"][:2] == pytest.approx([1.0, 0.0])


def test_an_expert_dies_once_and_may_come_back() -> None:
    watch = ExpertWatch()
    alone, even = np.array([[3.0, 0.0], [1.0, 2.0]]), np.ones((2, 2))
    died = [watch.update(alone) for _ in range(DEAD_STEPS + 3)]
    assert [i for i, d in enumerate(died) if d] == [DEAD_STEPS - 1]
    assert died[DEAD_STEPS - 1] == [(0, [1])]
    assert watch.dead_L() == [1, 0]
    again = ExpertWatch()
    again.load_state_dict(watch.state_dict())
    assert again.dead_L() == [1, 0]
    assert again.update(even) == []
    assert again.dead_L() == [0, 0]


def test_a_dead_expert_is_an_event(tmp_path: Path) -> None:
    config = small_config('balance.kind="none"', "pretrain.batch=[{from_tokens=0, rows=2}]")
    job = small_job(tmp_path, config)
    with torch.no_grad():
        job.model.get_buffer("layers.2.moe.router.bias")[:2] = 10.0
    train(job)
    [event] = job.run_dir.read_events("dead_expert")
    assert (event["layer"], event["experts"], event["step"]) == (2, [2, 3], DEAD_STEPS)
    assert job.run_dir.read_metrics("step")[-1]["dead_experts"] == [0, 2, 0]


# Evaluations


def test_evaluations_come_by_cadence_and_change_nothing(tmp_path: Path) -> None:
    plain = small_job(tmp_path / "plain")
    train(plain)
    seen: list[tuple[str, int, bool, bool]] = []

    def evaluation(name: str) -> Any:
        def run(model: nn.Module, step: int) -> Outcome:
            seen.append((name, step, model.training, torch.is_grad_enabled()))
            torch.rand(3)
            return Outcome([{"kind": name, "loss": 1.0}], [{"prompt": "p", "text": name}])

        return run

    evaluations = [Evaluation(evaluation("eval"), every=8), Evaluation(evaluation("score"), every=0)]
    job = small_job(tmp_path / "evaluated", evaluations=evaluations)
    train(job)
    assert seen == [(n, s, False, False) for n, s in (("eval", 8), ("eval", 16), ("eval", 20), ("score", 20))]
    assert [(r["kind"], r["stage"], r["step"]) for r in job.run_dir.read_metrics() if r["kind"] != "step"] == [
        ("eval", "pretrain", 8),
        ("eval", "pretrain", 16),
        ("eval", "pretrain", 20),
        ("score", "pretrain", 20),
    ]
    assert len(job.run_dir.read_samples()) == 4
    assert job.model.training
    assert numbers(plain.run_dir.read_metrics("step")) == numbers(job.run_dir.read_metrics("step"))


def test_an_evaluation_at_the_start_sees_the_weights_that_training_runs_on(tmp_path: Path) -> None:
    seen: list[tuple[int, torch.dtype]] = []

    def run(model: nn.Module, step: int) -> Outcome:
        seen.append((step, model.get_parameter("head.weight").dtype))
        return Outcome()

    config = small_config('runtime.dtype="bfloat16"', "checkpoint.every_steps=1000")
    train(small_job(tmp_path, config, evaluations=[Evaluation(run, every=0, at_start=True)]))
    assert seen == [(0, torch.bfloat16), (STEPS, torch.bfloat16)]
    train(small_job(tmp_path, config, evaluations=[Evaluation(run, every=0, at_start=True)]))
    assert len(seen) == 2, "a run that goes on starts no second time"


def test_an_evaluation_may_end_the_stage(tmp_path: Path) -> None:
    stop = Evaluation(lambda model, step: Outcome(stop="good enough" if step == 12 else None), every=4)
    job = small_job(tmp_path, evaluations=[stop])
    result = train(job)
    assert (result.step, result.finished, result.reason) == (12, True, "good enough")
    again = train(small_job(tmp_path, evaluations=[stop]))
    assert (again.step, again.finished, again.reason) == (12, True, "good enough")
    assert len(job.run_dir.read_metrics("step")) == 12


# Resuming


class Stops(MadeUpSource):
    """Breaks off before a given batch, as an error in the middle of a run does."""

    def __init__(self, *args: Any, at: int) -> None:
        super().__init__(*args)
        self.at = at

    def next_batch(self, step: int) -> Any:
        if self.handed_out == self.at:
            raise RuntimeError("broke off")
        return super().next_batch(step)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    job = small_job(tmp_path_factory.mktemp("whole"))
    train(job)
    return job


@pytest.mark.parametrize("at", [0, 3, 5, 14, 19])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path, uninterrupted: Any, at: int) -> None:
    job = small_job(tmp_path)
    job = replace(job, source=Stops(job.config, job.plan, at=at))
    with pytest.raises(RuntimeError, match="broke off"):
        train(job)
    torch.rand(5)  # whatever the random state is now, the checkpoint's counts
    resumed = small_job(tmp_path)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.fill_(9.0)
    assert train(resumed).finished
    for name, tensor in weights(uninterrupted).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    assert numbers(resumed.run_dir.read_metrics()) == numbers(uninterrupted.run_dir.read_metrics())
    assert len(resumed.run_dir.read_events("resume")) == 1


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    train(small_job(tmp_path))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    result = train(small_job(tmp_path))
    assert (result.step, result.finished, result.last) == (STEPS, True, None)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path: Path, uninterrupted: Any) -> None:
    job = small_job(tmp_path)
    job = replace(job, source=Stops(job.config, job.plan, at=13))
    with pytest.raises(RuntimeError):
        train(job)
    (tmp_path / "checkpoints/step-00000010/optimizer.safetensors").write_bytes(b"")
    resumed = small_job(tmp_path)
    assert train(resumed).finished
    [event] = resumed.run_dir.read_events("damaged_checkpoint")
    assert event["checkpoint"] == 10
    assert "optimizer.safetensors" in event["reason"]
    assert numbers(resumed.run_dir.read_metrics()) == numbers(uninterrupted.run_dir.read_metrics())


def test_no_whole_checkpoint_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    train(small_job(tmp_path))
    for path in (tmp_path / "checkpoints").iterdir():
        (path / "state.json").write_text("")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        train(small_job(tmp_path))


def test_other_settings_are_refused_by_key(tmp_path: Path) -> None:
    train(small_job(tmp_path))
    other = small_config("optim.muon_lr=0.5", "runtime.seed=3", "sft.epochs=9", "checkpoint.keep_last=7")
    with pytest.raises(UserError, match=r"optim\.muon_lr was 0\.02, now 0\.5; runtime\.seed was 0, now 3; use the old"):
        train(small_job(tmp_path, other))


def test_harmless_settings_may_change(tmp_path: Path) -> None:
    train(small_job(tmp_path))
    changed = small_config("checkpoint.every_steps=3", "guard.window=16", "sft.epochs=9", "pretrain.eval_every=1")
    assert train(small_job(tmp_path, changed)).finished
    [resume] = small_job(tmp_path).run_dir.read_events("resume")
    assert resume["changed"] == ["checkpoint.every_steps", "guard.window", "pretrain.eval_every"]
    assert "every_steps = 3" in (tmp_path / "run.toml").read_text()


def test_another_stage_or_other_data_are_refused(tmp_path: Path) -> None:
    train(small_job(tmp_path))
    with pytest.raises(UserError, match="is a run of stage 'pretrain', not 'extend'"):
        train(small_job(tmp_path, stage="extend"))
    with pytest.raises(UserError, match="another tokenizer"):
        train(small_job(tmp_path, fingerprints={"tokenizer": "other", "shards": "s"}))


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    from trinity.train.checkpoint import load_checkpoint
    from trinity.train.resume import check_state

    job = small_job(tmp_path)
    train(job)
    saved = load_checkpoint(tmp_path / "checkpoints/step-00000020").model
    own = job.model.state_dict()
    check_state(own, saved, "x")
    cases = {
        "missing": {k: v for k, v in saved.items() if k != "norm.weight"},
        "unknown": {**saved, "more": torch.zeros(1)},
        r"norm.weight is torch.float32 \[3\]": {**saved, "norm.weight": torch.zeros(3)},
        "norm.weight is torch.bfloat16": {**saved, "norm.weight": saved["norm.weight"].bfloat16()},
    }
    for message, tensors in cases.items():
        with pytest.raises(UserError, match=message):
            check_state(own, tensors, "x")


def test_the_records_are_json_even_when_a_loss_is_not_a_number(tmp_path: Path) -> None:
    def broken(model: nn.Module, batch: Any, share: Any, settings: Any) -> Any:
        output = language_model_loss(model, batch, share, settings)
        return replace(output, loss=output.loss * math.nan)

    job = small_job(tmp_path, small_config("guard.skips_before_rollback=99"), loss=broken)
    train(job)

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    for name in ("metrics.jsonl", "events.jsonl"):
        for line in (tmp_path / name).read_text().splitlines():
            json.loads(line, parse_constant=refuse)


# bfloat16 compute


def test_bfloat16_keeps_float32_weights_and_resumes_exactly(tmp_path: Path) -> None:
    config = small_config('runtime.dtype="bfloat16"')
    whole = small_job(tmp_path / "whole", config)
    train(whole)
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}
    broken = small_job(tmp_path / "broken", config)
    broken = replace(broken, source=Stops(config, broken.plan, at=7))
    with pytest.raises(RuntimeError):
        train(broken)
    resumed = small_job(tmp_path / "broken", config)
    train(resumed)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    single = small_job(tmp_path / "single", small_config())
    train(single)
    losses = [[r["loss"] for r in job.run_dir.read_metrics("step")] for job in (whole, single)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]


def test_master_gradients_are_the_float32_sum_of_bfloat16_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    model.register_buffer("kept", torch.zeros(2))
    original = model.weight
    masters = MasterWeights(model, torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    assert model.get_buffer("kept").dtype == torch.float32
    inputs = [torch.randn(3, 8).bfloat16() for _ in range(5)]
    expected = torch.zeros(4, 8)
    for x in inputs:
        model(x).square().sum().backward()
        y = model(x)
        [gradient] = torch.autograd.grad(y.square().sum(), [model.weight])
        expected += gradient.float()
        assert model.weight.grad is None
    torch.testing.assert_close(original.grad, expected)
    with torch.no_grad():
        original.add_(1.0)
    masters.refresh()
    assert torch.equal(model.weight, original.bfloat16())
    masters.restore()
    assert model.weight is original
