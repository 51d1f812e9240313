"""On a GPU: recorded, launched and compiled micro-batches against the reference path, on one small model."""

from pathlib import Path

import pytest
import torch

from test_train_gpu import gpu_job
from trainbench.check import differences, gradients, within, within_fp8
from trainbench.shapes import made_up_rows
from trinity.config import RunConfig, resolve
from trinity.data.rows import to_device
from trinity.model import layout
from trinity.model.transformer import Transformer
from trinity.ops.experts import reference_experts, sort_by_expert
from trinity.train import TrainJob, language_model_loss
from trinity.train.compilation import compile_blocks
from trinity.train.guard import SpikeGuard
from trinity.train.launch import Graphed
from trinity.train.precision import MasterWeights
from trinity.train.step import StepRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # torch's compiler warns about itself
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SMALL = (
    "model={vocab_size=512, num_layers=4, num_dense_layers=1, dim=64, num_heads=4, num_kv_heads=2, head_dim=16,"
    " ffn_dim=96, expert_dim=32, num_experts=8, experts_per_token=2, window=48, max_positions=256}",
)


def config(**runtime: object) -> RunConfig:
    settings = {"dtype": "bfloat16", "compile": False, "cuda_graphs": False, **runtime}
    base = resolve("nano", overrides=SMALL)[0]
    return base.model_copy(update={"runtime": base.runtime.model_copy(update=settings)})


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_gradients_are_those_of_the_reference(graphs: bool, compiled: bool) -> None:
    device, rows = torch.device("cuda", 0), made_up_rows(2, 256, 512, seed=0)
    exact = gradients(config(kernels="reference", dtype="float32"), rows, device)
    yardstick = differences(gradients(config(kernels="reference"), rows, device), exact)
    errors = differences(gradients(config(cuda_graphs=graphs, compile=compiled), rows, device), exact)
    assert within(errors, yardstick), (errors, yardstick)


def test_selective_recomputation_has_the_same_gradients_and_keeps_less() -> None:
    device, rows = torch.device("cuda", 0), made_up_rows(4, 256, 512, seed=0)
    found, peaks = [], []
    for recompute in ("none", "selective"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append(gradients(config(recompute=recompute), rows, device))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    errors = differences(found[1], found[0])
    assert errors["worst"] < 1e-3, errors
    assert peaks[1] < peaks[0]
    recorded = gradients(config(recompute="selective", cuda_graphs=True), rows, device)
    assert differences(recorded, found[0])["worst"] < 1e-3


def test_fp8_gradients_are_near() -> None:
    device, rows = torch.device("cuda", 0), made_up_rows(2, 256, 512, seed=0)
    exact = gradients(config(kernels="reference", dtype="float32"), rows, device)
    for graphs in (False, True):
        errors = differences(gradients(config(fp8=True, cuda_graphs=graphs), rows, device), exact)
        assert within_fp8(errors), errors


def runner(*overrides: str) -> tuple[StepRunner, TrainJob]:
    job = gpu_job(Path(), [], "pretrain.batch=[{from_tokens=0, rows=8}]", *overrides)
    device = torch.device("cuda", 0)
    assert isinstance(job.model, Transformer)
    compile_blocks(job.model, job.config.runtime, device)
    masters = MasterWeights(job.model, torch.bfloat16)
    guard = SpikeGuard(job.config.guard, device)
    made = StepRunner(job.model, job.optimizer, language_model_loss, job.config, guard, masters, device)
    return made, job


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_recorded_steps_train_like_launched_ones(compiled: str) -> None:
    losses = {}
    for graphs in ("false", "true"):
        made, job = runner(f"runtime.cuda_graphs={graphs}", f"runtime.compile={compiled}")
        assert isinstance(made.launcher, Graphed) == (graphs == "true")
        losses[graphs] = [made.run(job.plan[step], job.source.next_batch(step)).read()["loss"] for step in range(6)]
        made.masters.restore()
    assert losses["true"][-1] < losses["true"][0]
    torch.testing.assert_close(torch.tensor(losses["true"]), torch.tensor(losses["false"]), atol=2e-2, rtol=1e-2)


def test_a_recorded_step_does_not_wait_for_the_device() -> None:
    made, job = runner("runtime.cuda_graphs=true", "runtime.compile=false")
    for step in range(3):
        made.run(job.plan[step], job.source.next_batch(step)).read()
    rows = job.source.next_batch(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = made.run(job.plan[3], rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert packed.read()["skip"] == 0


def test_a_smaller_last_micro_batch_is_no_trouble() -> None:
    made, job = runner("runtime.cuda_graphs=true", "runtime.compile=false", "pretrain.micro_rows=3")
    for step in range(5):
        assert made.run(job.plan[step], job.source.next_batch(step)).read()["skip"] == 0


def test_an_expert_without_tokens_gets_a_gradient_of_zero() -> None:
    from trinity.ops.kernels.experts import Experts

    N, E, D, F = 96, 5, 64, 32
    draws = torch.Generator().manual_seed(0)
    indices = torch.rand(N, E - 2, generator=draws).topk(2).indices.cuda() + 1  # not the first, not the last
    shapes = ((N, D), (N, 2), (E, 2 * F, D), (E, D, F))
    leaves = [(torch.randn(s, generator=draws) / 4).cuda().bfloat16().requires_grad_() for s in shapes]
    x, weights, gate_up, down = leaves
    mine = Experts.apply(x, weights, gate_up, down, *sort_by_expert(indices, E))
    theirs = reference_experts(x, indices, weights, gate_up, down)
    torch.testing.assert_close(mine, theirs, atol=3e-2, rtol=3e-2)
    up = torch.randn(N, D, generator=draws).cuda().bfloat16()
    for a, b in zip(torch.autograd.grad(mine, leaves, up), torch.autograd.grad(theirs, leaves, up), strict=True):
        torch.testing.assert_close(a, b, atol=5e-2 * max(1.0, b.abs().max().item()), rtol=5e-2)
    (d_gate_up,) = torch.autograd.grad(Experts.apply(*leaves, *sort_by_expert(indices, E)), gate_up, up)
    assert not d_gate_up[0].any()
    assert not d_gate_up[-1].any()


def test_masks_of_long_rows_are_those_of_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways to make a GPU's masks, on the same rows: outputs of the whole model."""
    device, rows = torch.device("cuda", 0), made_up_rows(2, 256, 512, seed=1)
    with device:
        model = Transformer(config().model)
    model.init_weights(0)
    model.to(torch.bfloat16)
    batch, found = to_device(rows, device), []
    for limit in (layout.LONG_ROWS, 128):
        monkeypatch.setattr(layout, "LONG_ROWS", limit)
        with torch.no_grad():
            found.append(model.features(batch.tokens_BT, batch.segments_BT, batch.positions_BT).x_BTD.float())
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=2e-2)
