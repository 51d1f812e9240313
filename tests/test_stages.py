"""Every stage end to end on a tiny model, resumed to the same end, and refusing what does not fit together."""

import os
import signal
from dataclasses import replace

import pytest
import torch

import trinity
from stage_fixtures import tiny_config, write_inputs, write_text
from trinity.base.errors import UsageError, UserError
from trinity.base.rundir import RunDir
from trinity.stages import extend, pretrain, rl, sft
from trinity.tokenizer import Tokenizer
from trinity.train.checkpoint import load_checkpoint

STAGES = {"pretrain": pretrain, "extend": extend, "sft": sft, "rl": rl}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    write_inputs(path)
    return path


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    """A pretrained run."""
    run = tmp_path_factory.mktemp("base") / "pretrain"
    result = pretrain.run(tiny_config(folder), run)
    assert result.train.finished
    assert result.model_dir == run / "model"
    return run


def final_state(run):
    path = sorted((run / "checkpoints").iterdir())[-1]
    snapshot = load_checkpoint(path)
    return snapshot.step, snapshot.model, snapshot.state["source"]


class StopAfter:
    """Interrupts a run as Ctrl-C would, once a step is recorded."""

    def __init__(self, step):
        self.step = step

    def on_step(self, record):
        if record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_event(self, record): ...

    def on_metric(self, record): ...


def test_pretraining_learns_and_leaves_a_model_that_loads(base):
    run = RunDir(base)
    steps = run.read_metrics("step")
    assert [s["phase"] for s in steps] == ["general"] * 4 + ["quality"] * 2
    assert steps[-1]["ce"] < steps[0]["ce"]
    *earlier, held_out = run.read_metrics("eval")
    assert [r["step"] for r in earlier] == [0, 4]  # before the first step and at the end of the first phase
    assert held_out["loss"] < earlier[1]["loss"] < earlier[0]["loss"]
    assert set(held_out["domains"]) == {"prose", "math"}
    assert 0 < held_out["bits_per_byte"] < 10
    assert len(run.read_samples()) == 2
    model, tokenizer = trinity.load(base)
    text = trinity.generate(model, tokenizer, "The ", max_new_tokens=4, temperature=0.0)
    assert isinstance(text, str)


def test_the_start_names_paths_and_optimizers(base):
    (start,) = RunDir(base).read_events("start")
    assert set(start["paths"]) == {
        "local attention",
        "global attention",
        "experts",
        "matrix products",
        "norms, RoPE, gate, routing",
        "micro-batch",
    }
    optimizers = {row[0]: row[3] for row in start["optimizer"]}
    assert optimizers["layers.*.attn.qkvg.weight"] == "Muon"
    assert optimizers["embed.weight"] == "AdamW"


def test_several_processes_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="several processes"):
        pretrain.run(tiny_config(folder), tmp_path / "run")


def test_extension_finds_needles_before_and_after_and_mixes_in_retrieval(folder, base, tmp_path):
    result = extend.run(tiny_config(folder), tmp_path / "run", start_from=base)
    assert result.train.finished
    records = RunDir(tmp_path / "run").read_metrics("niah")
    assert [r["step"] for r in records] == [0, 4]
    assert records[0]["grid"][0]["length"] == 384
    _, _, source = final_state(tmp_path / "run")
    assert (source["rows"], source["generated"]) == (16, 8)


def test_extension_stops_early_once_the_score_is_reached(folder, base, tmp_path, monkeypatch):
    from trinity.evals import niah

    monkeypatch.setattr(niah, "is_correct", lambda completion, answer: True)
    config = tiny_config(folder, extend={"niah_every": 2, "stop_at": 0.9})
    result = extend.run(config, tmp_path / "run", start_from=base)
    assert result.train.step == 2
    assert "reached 1.000" in result.train.reason
    assert result.model_dir is not None


def test_sft_and_rl_train_a_chat_model(folder, base, tmp_path):
    config = tiny_config(folder)
    assert sft.run(config, tmp_path / "sft", start_from=base).train.finished
    run = RunDir(tmp_path / "sft")
    losses = [r["loss"] for r in run.read_metrics("eval")]
    assert losses[-1] < losses[0]
    assert rl.run(config, tmp_path / "rl", start_from=tmp_path / "sft").train.finished
    run = RunDir(tmp_path / "rl")
    steps = run.read_metrics("step")
    assert len(steps) == 4
    for step in steps:
        assert 0 <= step["reward"] <= 1
        assert step["kl_gap"] < 1e-6  # sampler and trainer agree on a CPU in float32
        assert step["clip_fraction"] == 0  # on policy
        assert 0 < step["policy_entropy"] < 7
    assert steps[0]["gap_replayed"] < 1e-6
    assert steps[0]["gap_free"] < 1e-6
    assert {r["name"] for r in run.read_metrics("score")} == {"arithmetic", "arithmetic_seen"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("pretrain", {}),
        ("extend", {}),
        ("sft", {}),
        ("rl", {}),
        ("rl", {"updates": 2, "kl": 0.1, "temperature": 0.7}),
        ("rl", {"ahead": True, "retries": 1, "seq_len": 96}),
    ],
)
def test_a_stopped_stage_goes_on_to_the_same_end(folder, base, tmp_path, name, settings):
    config = tiny_config(folder, **({name: settings} if settings else {}))
    start = None if name == "pretrain" else base
    stage = STAGES[name]
    stage.run(config, tmp_path / "straight", start_from=start)
    stopped = stage.run(config, tmp_path / "stopped", start_from=start, progress=StopAfter(3))
    assert not stopped.train.finished
    assert stopped.model_dir is None
    resumed = stage.run(config, tmp_path / "stopped", start_from=start)
    assert resumed.train.finished
    step, weights, source = final_state(tmp_path / "straight")
    step_again, weights_again, source_again = final_state(tmp_path / "stopped")
    assert (step, source) == (step_again, source_again)
    for key, tensor in weights.items():
        assert torch.equal(tensor, weights_again[key]), key
    records = [RunDir(tmp_path / run).read_metrics("step") for run in ("straight", "stopped")]
    assert [r["loss"] for r in records[0]] == [r["loss"] for r in records[1]]


def test_the_state_of_smebu_is_saved_restored_exported_and_imported(folder, tmp_path):
    """Bit for bit, through checkpoint and resumption and through the public layout."""
    pretrain.run(tiny_config(folder), tmp_path / "straight")
    pretrain.run(tiny_config(folder), tmp_path / "stopped", progress=StopAfter(3))
    halfway = final_state(tmp_path / "stopped")[1]
    pretrain.run(tiny_config(folder), tmp_path / "stopped")
    straight, resumed = (final_state(tmp_path / name)[1] for name in ("straight", "stopped"))
    state = [name for name in straight if name.endswith(("router.bias", "router.momentum"))]
    assert len(state) == 6
    imported = trinity.load(tmp_path / "stopped/model")[0].state_dict()
    for name in state:
        assert straight[name].dtype == torch.float32
        assert straight[name].abs().max() > 0
        assert torch.equal(straight[name], resumed[name])
        assert not torch.equal(straight[name], halfway[name])
        assert torch.equal(imported[name], resumed[name])
        assert imported[name].dtype == torch.float32


def test_balancing_stays_on_in_every_stage(folder, base, tmp_path):
    sft.run(tiny_config(folder), tmp_path / "sft", start_from=base)
    before, after = (
        trinity.load(path)[0].state_dict()["layers.1.moe.router.bias"] for path in (base, tmp_path / "sft")
    )
    assert not torch.equal(before, after)
    sft.run(tiny_config(folder, balance={"frozen": True}), tmp_path / "frozen", start_from=base)
    frozen = trinity.load(tmp_path / "frozen")[0].state_dict()["layers.1.moe.router.bias"]
    assert torch.equal(before, frozen)


@pytest.mark.parametrize(
    ("name", "sections", "complaint"),
    [
        ("pretrain", {"data": {"shards": ""}}, "data.shards is not set"),
        ("pretrain", {"data": {"shards": "nowhere"}}, "nowhere"),
        ("pretrain", {"data": {"tokenizer": ""}}, "data.tokenizer is not set"),
        ("pretrain", {"model": {"vocab_size": 256}}, "model.vocab_size = 256 is smaller"),
        ("pretrain", {"model": {"max_positions": 32}}, "exceeds model.max_positions = 32"),
        ("extend", {"model": {"dim": 64}}, "has dim = 32, but this run has model.dim = 64"),
        ("extend", {"model": {"global_every": 2}}, "other local and global layers"),
        ("extend", {"eval": {"niah_lengths": [1024]}}, "more than model.max_positions"),
        ("sft", {"sft": {"conversations": []}}, "sft.conversations is empty"),
        ("rl", {"rl": {"seq_len": 8}}, "do not fit into rl.seq_len = 8"),
    ],
)
def test_what_does_not_fit_together_is_refused(folder, base, tmp_path, name, sections, complaint):
    config = tiny_config(folder, **sections)
    with pytest.raises(UserError, match=complaint.replace(".", r"\.")):
        STAGES[name].run(config, tmp_path / "run", start_from=None if name == "pretrain" else base)


@pytest.mark.parametrize("name", ["extend", "sft", "rl"])
def test_later_stages_need_a_model(folder, tmp_path, name):
    with pytest.raises(UserError, match="needs a model to start from"):
        STAGES[name].run(tiny_config(folder), tmp_path / "run")


def test_shards_of_another_tokenizer_are_refused(folder, tmp_path):
    tokenizer = Tokenizer.load(folder / "tokenizer")
    tokenizer.fingerprint = "other"
    for split in ("train", "val"):
        write_text(tmp_path / "shards" / split, ["some text = 1"], tokenizer)
    config = tiny_config(folder, data={"shards": str(tmp_path / "shards")})
    with pytest.raises(UserError, match="another tokenizer"):
        pretrain.run(config, tmp_path / "run")


def test_rl_trains_the_policy_that_it_samples_at_any_temperature(folder, base, tmp_path):
    config = tiny_config(folder, rl={"temperature": 0.7, "gap_every": 1})
    assert rl.run(config, tmp_path / "rl", start_from=base).train.finished
    for step in RunDir(tmp_path / "rl").read_metrics("step"):
        assert step["gap_replayed_max"] < 1e-5
        assert step["gap_free_max"] < 1e-5
        assert step["kl_gap"] < 1e-6


def test_rl_is_held_near_its_start(folder, base, tmp_path):
    far = {}
    for kl in (1e-6, 3.0):
        config = tiny_config(folder, rl={"kl": kl}, checkpoint={"enabled": False}, eval={"arithmetic_questions": 1})
        assert rl.run(config, tmp_path / str(kl), start_from=base).train.finished
        steps = RunDir(tmp_path / str(kl)).read_metrics("step")
        assert steps[0]["kl_start"] < 1e-9  # the copy is the policy
        far[kl] = steps[-1]["kl_start"]
    assert far[3.0] < 0.7 * far[1e-6]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"kl": 0.1}, "rl.kl needs a copy of the weights it starts from"),
        ({"ahead": True}, "rl.ahead needs a copy of the weights"),
        ({"server": "http://localhost/v1", "replay": False}, "rl.server is synced by one process"),
    ],
)
def test_rl_refuses_what_several_processes_do_not_do(folder, base, tmp_path, monkeypatch, settings, complaint):
    opened = rl.open_stage
    monkeypatch.setattr(rl, "open_stage", lambda *args: replace(opened(*args), sharding=object()))
    with pytest.raises(UsageError, match=complaint.replace(".", r"\.")):
        rl.run(tiny_config(folder, rl=settings), tmp_path / "run", start_from=base)


def test_rl_does_not_go_on_from_another_start(folder, base, tmp_path):
    config = tiny_config(folder, rl={"kl": 0.1})
    rl.run(config, tmp_path / "rl", start_from=base, progress=StopAfter(2))
    other = tmp_path / "other"
    sft.run(config, other, start_from=base)
    with pytest.raises(UserError, match="another start policy"):
        rl.run(config, tmp_path / "rl", start_from=other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_start_and_policy_agree_on_a_gpu_at_the_start(folder, base, tmp_path):
    runtime = {"device": "cuda", "dtype": "bfloat16", "compile": True}
    config = tiny_config(folder, runtime=runtime, rl={"kl": 0.1, "temperature": 0.7})
    assert rl.run(config, tmp_path / "rl", start_from=base).train.finished
    steps = RunDir(tmp_path / "rl").read_metrics("step")
    assert steps[0]["kl_start"] < 0.02
    assert all(step["kl_gap"] < 0.1 for step in steps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_whole_path_runs_on_a_gpu(folder, tmp_path, compiled):
    runtime = {"device": "cuda", "dtype": "bfloat16", "compile": compiled}
    config = tiny_config(folder, runtime=runtime)
    start = None
    for name, stage in STAGES.items():
        result = stage.run(config, tmp_path / name, start_from=start)
        assert result.train.finished
        start = tmp_path / name
    steps = RunDir(tmp_path / "rl").read_metrics("step")
    assert all(step["kl_gap"] < 0.1 for step in steps)
