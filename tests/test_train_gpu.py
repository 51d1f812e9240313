"""The loop on a GPU: bfloat16 compute, one step late reading, no host sync inside a step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train_helpers import STEPS, MadeUpSource, PoisonedLoss, small_config, small_job, weights
from trinity.model.transformer import Transformer
from trinity.optim.optimizer import build_optimizer
from trinity.optim.schedule import StepPlan
from trinity.train import TrainJob, train
from trinity.train.guard import SpikeGuard
from trinity.train.precision import MasterWeights
from trinity.train.step import StepRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # torch's compiler warns about itself
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def gpu_job(path: Path, poisoned: list[int], *overrides: str) -> TrainJob:
    cuda = ('runtime.device="cuda"', 'runtime.dtype="bfloat16"', "model.head_dim=16")  # FlexAttention's smallest
    config = small_config(*cuda, *overrides)
    source = MadeUpSource(config, StepPlan.pretrain(config.pretrain))
    with torch.device("cuda"):
        model = Transformer(config.model)
    model.init_weights(0)
    optimizer = build_optimizer(model, config.model, config.optim)
    job = small_job(path, config, source=source, loss=PoisonedLoss(source, poisoned, "nan"))
    return replace(job, model=model, optimizer=optimizer)


def test_a_run_with_bad_batches(tmp_path: Path) -> None:
    job = gpu_job(tmp_path, [3, 6, 7, 8])
    result = train(job)
    assert result.finished
    [rollback] = job.run_dir.read_events("rollback")
    assert (rollback["step"], rollback["to_step"], rollback["jump_steps"]) == (9, 5, [7, 8, 9])
    records = job.run_dir.read_metrics("step")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if r["skipped"]] == [4, 7, 8, 9]
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert all(r["mfu"] > 0 for r in records if not r.get("jumped"))


def test_the_skip_on_the_device_changes_nothing() -> None:
    job = gpu_job(Path(), [1])
    device = torch.device("cuda", torch.cuda.current_device())
    masters = MasterWeights(job.model, torch.bfloat16)
    guard = SpikeGuard(job.config.guard, device)
    runner = StepRunner(job.model, job.optimizer, job.loss, job.config, guard, masters, device)
    assert runner.run(job.plan[0], job.source.next_batch(0)).read()["skip"] == 0
    before = weights(job), guard.state_dict()
    assert runner.run(job.plan[1], job.source.next_batch(1)).read()["skip"] == 1
    assert guard.state_dict() == before[1]
    for name, tensor in weights(job).items():
        assert torch.equal(tensor, before[0][name]), name
    assert runner.run(job.plan[2], job.source.next_batch(2)).read()["skip"] == 0


@pytest.mark.parametrize("kind", ["smebu", "sign", "quantile"])
def test_a_step_does_not_wait_for_the_device(kind: str) -> None:
    job = gpu_job(Path(), [], f"balance.kind={kind}")
    device = torch.device("cuda", torch.cuda.current_device())
    masters = MasterWeights(job.model, torch.bfloat16)
    guard = SpikeGuard(job.config.guard, device)
    runner = StepRunner(job.model, job.optimizer, job.loss, job.config, guard, masters, device)
    for step in range(3):
        runner.run(job.plan[step], job.source.next_batch(step)).read()
    rows = job.source.next_batch(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = runner.run(job.plan[3], rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert packed.read()["skip"] == 0
