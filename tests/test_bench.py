"""The experiments of bench/ at toy size: figures, intervals, and both scripts from end to end."""

import json
import math
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import one_run
import plot
from measures import T95, bias_figures, compare, interval, measure
from stage_fixtures import write_inputs
from trinity.base.files import write_json
from trinity.config import resolve
from trinity.train import step

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
EXPERIMENTS = ["packing", "balancing", "optimizers", "ablations", "paths"]
TOY = """
[model]
vocab_size = 512
num_layers = 3
num_dense_layers = 1
dim = 32
num_heads = 2
num_kv_heads = 1
head_dim = 16
ffn_dim = 64
expert_dim = 16
num_experts = 4
experts_per_token = 2
window = 32
max_positions = 64
[data]
streams = 2
buffer = 4
[checkpoint]
enabled = false
[pretrain]
seq_len = 64
micro_rows = 1
warmup_steps = 2
eval_every = 1000
eval_rows = 2
batch = [{ from_tokens = 0, rows = 4 }]
phases = [{ name = "all", tokens = 2048, weights = { prose = 1.0, math = 1.0 } }]
[runtime]
device = "cpu"
dtype = "float32"
threads = 1
"""
EXPERIMENT = """
baseline = "concat"
metrics = ["batch_het", "bias_oscillation", "final_loss"]
[variants]
concat = ["data.packing=concat"]
rsdb = ["data.packing=rsdb"]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    (folder / "toy.toml").write_text(TOY)
    (folder / "experiment.toml").write_text(EXPERIMENT)
    return folder


def run_script(name: str, inputs: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / name), *arguments, "--out", str(out), "--overlay", str(inputs / "toy.toml")]
    command += ["--shards", str(inputs / "shards"), "--tokenizer", str(inputs / "tokenizer")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_interval_is_students() -> None:
    mean, half = interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(T95[2] * math.sqrt(7 / 3 / 3))
    assert interval([5.0]) == (5.0, None)
    assert interval([]) == (None, None)


def test_differences_pair_the_runs_of_a_seed() -> None:
    """A seed that only one of two variants finished counts in its mean and in no difference."""
    runs = {"a": {str(s): {"x": 10.0 * s + 1} for s in (1, 2, 3)}, "b": {str(s): {"x": 10.0 * s} for s in (2, 3, 4)}}
    row = compare(runs, {"a": "b", "b": "b"}, ["x"])["a"]["x"]
    assert (row["seeds"], row["pairs"]) == (3, 2)
    assert row["mean"] == pytest.approx(21)
    assert row["difference"] == pytest.approx(1)
    assert row["difference_ci95"] == pytest.approx(0, abs=1e-9)
    assert row["relative"] == pytest.approx((1 / 20 + 1 / 30) / 2)


def test_a_drift_is_no_oscillation(tmp_path: Path) -> None:
    """Biases that flip by 2 a every step have deviation a; a straight line has none once it is taken off."""
    step_S = np.arange(300)
    flips_S, drift_S = 0.5 * (-1.0) ** step_S, 0.01 * step_S
    for name, series_S in (("flips", flips_S), ("drift", drift_S)):
        np.save(tmp_path / f"{name}.npy", np.broadcast_to(series_S[:, None, None], (300, 2, 4)).astype(np.float32))
    flips, drift = bias_figures(tmp_path / "flips.npy"), bias_figures(tmp_path / "drift.npy")
    assert flips["bias_oscillation"] == pytest.approx(0.5, rel=1e-3)
    assert drift["bias_oscillation"] == pytest.approx(0, abs=1e-6)
    assert drift["bias_std"] == pytest.approx(0.01 * 100 / math.sqrt(12), rel=1e-2)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_variant_resolves(name: str) -> None:
    content = tomllib.loads((BENCH / f"{name}.toml").read_text())
    base, _ = resolve("demo", [BENCH / "small.toml"], content.get("settings", []))
    for settings in content["variants"].values():
        config, _ = resolve("demo", [BENCH / "small.toml"], [*content.get("settings", []), *settings])
        assert config.pretrain.tokens == base.pretrain.tokens
        assert config.pretrain.batch[0].rows // config.pretrain.micro_rows >= 16
    baselines = {content["baseline"], *content.get("baselines", {}).values(), *content.get("baselines", {})}
    assert baselines <= set(content["variants"])


def toy_settings(settings: list[str]) -> list[str]:
    """The settings of a variant with its phases on the toy's domains and tokens."""
    shorter = [re.sub(r"tokens=(\d+)000000", lambda found: f"tokens={512 * int(found[1])}", each) for each in settings]
    return [re.sub(r"(docs|multilingual|web)=1", "prose=1", each) for each in shorter]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_variant_runs(name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At toy size, in this process: figures of every metric, and a drawing of them."""
    content = tomllib.loads((BENCH / f"{name}.toml").read_text())
    common = [each for each in content.get("settings", []) if not each.startswith("pretrain.phases")]  # of real text
    runs: dict[str, Any] = {}
    monkeypatch.setattr(step, "apply_balance", step.apply_balance)  # put back what a run puts there
    for variant, settings in content["variants"].items():
        data = (f"data.shards={inputs / 'shards'}", f"data.tokenizer={inputs / 'tokenizer'}")
        words = ("demo", *data, *common, *toy_settings(settings))
        arguments = ["one_run.py", *words, "--overlay", str(inputs / "toy.toml"), "--run-dir", str(tmp_path / variant)]
        monkeypatch.setattr(sys, "argv", arguments)
        one_run.main()
        figures = measure(tmp_path / variant)
        assert figures is not None
        if "phases" not in str(settings):
            assert figures["steps"] == 8
        for metric in content["metrics"]:
            assert math.isfinite(figures[metric]), (variant, metric)
        runs[variant] = {"0": figures}
    write_json(tmp_path / f"{name}.json", {"experiment": name, "runs": runs})
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / f"{name}.json"), str(tmp_path / "plot.svg")])
    plot.main()
    root = ElementTree.parse(tmp_path / "plot.svg").getroot()
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for variant in content["variants"]:
        assert any(text.startswith(f"{variant}, held-out loss") for text in texts)
    lines = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) >= 2 * len(content["variants"])
    style = root.findtext("{http://www.w3.org/2000/svg}style") or ""
    for line in lines:  # every colour is given twice, once for a dark page
        assert style.count(f".{line.attrib['class']}{{") == 2
    assert "prefers-color-scheme: dark" in style


def test_the_table_pairs_losses_and_gives_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = [{"final_loss": 3.0 + seed / 10, "max_vio": 1.0} for seed in range(3)]
    runs = {
        "sign": {str(seed): f for seed, f in enumerate(figures)},
        "smebu": {str(seed): {**f, "final_loss": f["final_loss"] - 0.5} for seed, f in enumerate(figures)},
    }
    comparison = compare(runs, {"sign": "sign", "smebu": "sign"}, ["final_loss", "max_vio"])
    write_json(tmp_path / "x.json", {"experiment": "x", "runs": runs, "comparison": comparison})
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "x.json"), "--table"])
    plot.main()
    assert capsys.readouterr().out.splitlines() == [
        "| variant | seeds | final_loss | less baseline | max_vio |",
        "| --- | --- | --- | --- | --- |",
        "| sign | 3 | 3.1 ± 0.25 | baseline | 1 ± 0 |",
        "| smebu | 3 | 2.6 ± 0.25 | -0.5 ± 0 (sign) | 1 ± 0 |",
    ]


def test_a_curve_has_the_first_the_last_and_every_fifth_step(tmp_path: Path) -> None:
    records = [
        {"kind": "step", "step": step, "tokens": step, "ce": 1 / step, "tokens_per_second": 1.0, "max_vio": 1 / 3}
        for step in range(1, 13)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    figures = measure(tmp_path)
    assert figures is not None
    assert [point[0] for point in figures["curve"]] == [1, 5, 10, 12]
    assert figures["curve"][-1] == [12, 0.083333, 0.33333, 0]


def test_an_experiment_and_its_continuation(inputs: Path, tmp_path: Path) -> None:
    experiment = str(inputs / "experiment.toml")
    shared = ("--parallel", "2", "--warm-first", "--cache", str(tmp_path / "compiled"))
    first = run_script("experiment.py", inputs, tmp_path / "first", experiment, "--seeds", "1", *shared)
    assert first.returncode == 0, first.stdout + first.stderr
    found = json.loads((tmp_path / "first/experiment.json").read_text())
    assert found["unfinished"] == found["failed"] == {}
    for variant in ("concat", "rsdb"):
        figures = found["runs"][variant]["0"]
        assert figures["steps"] == 8
        assert figures["batch_het"] > 0
        assert figures["bias_oscillation"] > 0
        assert figures["final_loss"] > 0
    assert found["comparison"]["rsdb"]["batch_het"]["pairs"] == 1
    assert not list((tmp_path / "first").rglob("*.safetensors"))

    merge = ("--merge", str(tmp_path / "first/experiment.json"), "--minutes", "0")
    second = run_script("experiment.py", inputs, tmp_path / "second", experiment, "--seeds", "2", *merge)
    assert second.returncode == 0, second.stdout + second.stderr
    merged = json.loads((tmp_path / "second/experiment.json").read_text())
    assert merged["runs"] == found["runs"]
    assert merged["unfinished"] == {"concat-1": None, "rsdb-1": None}


def test_time_that_is_up_stops_the_runs(inputs: Path, tmp_path: Path) -> None:
    longer = ("--set", 'pretrain.phases=[{name="all",tokens=20000000,weights={prose=1}}]', "data.max_epochs=100000")
    started = time.monotonic()
    done = run_script(
        "experiment.py", inputs, tmp_path, str(inputs / "experiment.toml"), "--minutes", "0.1", "--seeds", "1", *longer
    )
    assert time.monotonic() - started < 60
    found = json.loads((tmp_path / "experiment.json").read_text())
    assert set(found["unfinished"]) == {"concat-0", "rsdb-0"}, done.stdout + done.stderr
    assert found["runs"] == {}


def test_a_run_that_fails_is_named(inputs: Path, tmp_path: Path) -> None:
    experiment = ("--variants", "rsdb", "--seeds", "1", "--set", "data.max_epochs=0")
    done = run_script("experiment.py", inputs, tmp_path, str(inputs / "experiment.toml"), *experiment)
    assert done.returncode == 1
    assert "max_epochs" in json.loads((tmp_path / "experiment.json").read_text())["failed"]["rsdb-0"]


def test_the_starting_point(inputs: Path, tmp_path: Path) -> None:
    arguments = ("--steps", "3", "--rows", "4", "--micro-rows", "2", "--seq-len", "64")
    done = run_script("start.py", inputs, tmp_path, *arguments, "--set", "runtime.dtype=bfloat16", "runtime.device=cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "start.json").read_text())
    assert found["weights"] == "plain"
    assert [step["step"] for step in found["steps"]] == [1, 2, 3]
    assert found["mfu_median"] > 0
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_cost_of_the_optimizer_step(inputs: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "optimizer.py"), "--out", str(tmp_path / "cost.json"), "--preset", "demo"]
    command += ["--overlay", str(inputs / "toy.toml"), "--seq-len", "64", "--micro-rows", "2", "--tokens", "1024"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, "--repeats", "2"], env=environment, timeout=120, check=True)
    found = json.loads((tmp_path / "cost.json").read_text())
    assert found["compute_seconds"] == pytest.approx(8 * found["micro_batch_seconds"])
    step = found["compute_seconds"] + found["optimizer_seconds"]
    assert found["share"] == pytest.approx(found["optimizer_seconds"] / step)
    assert 0 < found["muon_parameters"] < found["parameters"]


def test_the_stall_of_saving(inputs: Path, tmp_path: Path) -> None:
    more = ("--steps", "24", "--every", "8", "--interval", "50")
    done = run_script("save_stall.py", inputs, tmp_path, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "save_stall.json").read_text())
    assert found["saves"] == 2
    assert [s["step"] for s in found["steps"]] == list(range(1, 25))
    assert len(found["costs"]) == 2
    assert found["cost_seconds_ci95"] >= 0
    assert not (tmp_path / "run/model").exists()
    assert 0 < found["stall_seconds_median"] <= found["stall_seconds_largest"]
    assert found["share_at_50_steps"] < 1
