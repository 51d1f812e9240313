"""Post-training on a GPU: libraries' losses, adapters in CUDA graphs, replay, rollouts one step ahead."""

import importlib.util

import pytest
import torch

from stage_fixtures import tiny_config, write_inputs
from trinity.base.rundir import RunDir
from trinity.ops.borrowed_cross_entropy import cross_entropy
from trinity.stages import pretrain, rl, sft

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RUNTIME = {"device": "cuda", "dtype": "bfloat16", "compile": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    write_inputs(path)
    return path


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("base") / "pretrain"
    pretrain.run(tiny_config(folder, runtime=RUNTIME), run)
    return run


@pytest.mark.parametrize(
    ("kind", "module", "z_loss"), [("liger", "liger_kernel", 1e-4), ("cce", "cut_cross_entropy", 0)]
)
def test_losses_of_libraries_are_ours(kind, module, z_loss):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    draws = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(600, 128, device="cuda", dtype=torch.bfloat16, generator=draws)
    head = torch.randn(1000, 128, device="cuda", dtype=torch.bfloat16, generator=draws) * 128**-0.5
    targets = torch.randint(1000, (600,), device="cuda", generator=draws)
    targets[::3] = -100
    found = {}
    for name in ("chunked", kind):
        own = x.clone().requires_grad_(), head.clone().requires_grad_()
        loss = cross_entropy(name, *own, targets, z_loss=z_loss, chunk_tokens=256)
        loss.loss_sum.backward()
        found[name] = loss, own[0].grad, own[1].grad
    (ours, d_x, d_head), (theirs, their_x, their_head) = found["chunked"], found[kind]
    torch.testing.assert_close(theirs.loss_sum, ours.loss_sum, rtol=2e-3, atol=0)
    torch.testing.assert_close(theirs.z_sum, ours.z_sum, rtol=2e-3, atol=1e-4)
    assert theirs.num_tokens == ours.num_tokens
    for mine, other in ((d_x, their_x), (d_head, their_head)):
        assert (mine - other).float().norm() < 0.03 * mine.float().norm()
    assert (their_x[targets == -100] == 0).all()


def test_adapters_train_alike_in_a_cuda_graph_and_launched(folder, base, tmp_path):
    losses = []
    for graphs in (True, False):
        lora = {"attention": 4, "gate": 4, "shared": 4, "experts": 2, "dense": 4, "lr": 0.01}
        config = tiny_config(folder, lora=lora, runtime={**RUNTIME, "cuda_graphs": graphs}, sft={"epochs": 2})
        assert sft.run(config, tmp_path / str(graphs), start_from=base).train.finished
        steps = RunDir(tmp_path / str(graphs)).read_metrics("step")
        losses.append([step["loss"] for step in steps])
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("ahead", [False, True])
def test_replay_narrows_the_gap(folder, base, tmp_path, ahead):
    settings = {"ahead": ahead, "gap_every": 1, "steps": 6, "prompts_per_step": 8, "group": 8, "max_new_tokens": 16}
    config = tiny_config(folder, runtime=RUNTIME, rl={**settings, "seq_len": 128})
    assert rl.run(config, tmp_path / "run", start_from=base).train.finished
    steps = RunDir(tmp_path / "run").read_metrics("step")
    replayed, free = (sum(step[name] for step in steps) for name in ("gap_replayed_abs", "gap_free_abs"))
    assert replayed <= free
    assert replayed / len(steps) < 0.1
