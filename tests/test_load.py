"""`trinity.load`: model, run, checkpoint and pipeline directories, and clear words for everything else."""

import hashlib
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import trinity
from test_export import SMALL, random_model
from trinity.base.errors import UserError
from trinity.config import RunConfig, TokenizerConfig, resolve, to_toml
from trinity.export.afmoe import export_afmoe
from trinity.infer.load import load, load_model, weights
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer, train_tokenizer

TEXT = "the cat sat on the mat. 12 + 30 = 42\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT] * 20, TokenizerConfig(vocab_size=290))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(SMALL)


@pytest.fixture(scope="module")
def exported(model: Transformer, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("load") / "model"
    export_afmoe(model, SMALL, tokenizer, out, dtype=torch.bfloat16)
    return out


def write_run(run: Path, steps: dict[int, Transformer]) -> None:
    """A run directory as the training room writes it."""
    demo, _ = resolve("demo")
    config: RunConfig = demo.model_copy(update={"model": SMALL})
    run.mkdir(parents=True)
    (run / "run.toml").write_text(to_toml(config))
    for step, model in steps.items():
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "model.safetensors")
        files = {}
        for name in ("model.safetensors",):
            data = (folder / name).read_bytes()
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def same(model: Transformer, other: Transformer) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_directory(model: Transformer, tokenizer: Tokenizer, exported: Path) -> None:
    loaded, found = load(exported, device="cpu")
    assert found.fingerprint == tokenizer.fingerprint
    assert not loaded.training
    assert loaded.embed.weight.dtype == torch.bfloat16
    bias = loaded.state_dict()["layers.1.moe.router.bias"]
    assert bias.dtype == torch.float32
    assert torch.equal(bias, model.state_dict()["layers.1.moe.router.bias"])
    wide, _ = load(str(exported), device="cpu", dtype="float32")
    assert wide.embed.weight.dtype == torch.float32
    assert torch.equal(wide.embed.weight, model.embed.weight.bfloat16().float())


def test_run_checkpoint_and_pipeline_directories(
    model: Transformer, tokenizer: Tokenizer, exported: Path, tmp_path: Path
) -> None:
    older = random_model(SMALL, 7)
    run = tmp_path / "pipeline" / "pretrain"
    write_run(run, {9: older, 10: model})
    (run / "checkpoints" / "step-00000011").mkdir()  # killed before its manifest
    tokenizer.save(tmp_path / "pipeline" / "tokenizer")
    for path in (run, run.parent, run / "checkpoints" / "step-00000010"):
        loaded, found = load(path, device="cpu")
        assert same(loaded, model)
        assert found.fingerprint == tokenizer.fingerprint
    assert same(load_model(run / "checkpoints" / "step-00000009", device="cpu"), older)
    half = load_model(run, device="cpu", dtype="bfloat16")
    assert half.head.weight.dtype == torch.bfloat16
    assert half.state_dict()["layers.2.moe.router.bias"].dtype == torch.float32
    # The export of a finished run comes before its checkpoints, a later stage before an earlier one.
    (run / "model").symlink_to(exported)
    assert load_model(run, device="cpu").embed.weight.dtype == torch.bfloat16
    write_run(run.parent / "sft", {3: older})
    assert same(load_model(run.parent, device="cpu"), older)


def test_a_damaged_checkpoint_is_refused(model: Transformer, tmp_path: Path) -> None:
    write_run(tmp_path / "run", {1: model})
    weights = tmp_path / "run" / "checkpoints" / "step-00000001" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_model(tmp_path / "run")
    weights.unlink()
    with pytest.raises(UserError, match="is missing"):
        load_model(tmp_path / "run")


def test_a_checkpoint_of_other_settings_is_refused(model: Transformer, tmp_path: Path) -> None:
    write_run(tmp_path / "run", {1: model})
    settings = tmp_path / "run" / "run.toml"
    text = settings.read_text()
    settings.write_text(text.replace("ffn_dim = 48", "ffn_dim = 40"))
    with pytest.raises(UserError, match=r"layers.0.ffn.gate_up.weight has shape \(96, 32\)"):
        load_model(tmp_path / "run")
    settings.write_text(text.replace("num_layers = 4", "num_layers = 5"))
    with pytest.raises(UserError, match=r"disagree about layers.4"):
        load_model(tmp_path / "run")


def test_what_is_no_model_is_told(exported: Path, tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "nothing", "there is no model at"),
        (exported / "config.json", "is a file; give the directory"),
        (tmp_path, "neither a model directory"),
    ):
        with pytest.raises(UserError, match=words):
            load(path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.toml").write_text("")
    with pytest.raises(UserError, match="nothing was saved yet"):
        load(tmp_path / "run")
    with pytest.raises(UserError, match="float64"):
        load(exported, dtype="float64")


def test_a_model_without_a_tokenizer_says_where_it_looked(model: Transformer, tmp_path: Path) -> None:
    export_afmoe(model, SMALL, None, tmp_path / "model", dtype=torch.float32)
    with pytest.raises(UserError, match=r"has no tokenizer: there is no .*model/tokenizer.json"):
        load(tmp_path / "model")
    assert same(load_model(tmp_path / "model", device="cpu"), model)


def test_a_tokenizer_of_another_model_is_refused(model: Transformer, tmp_path: Path) -> None:
    export_afmoe(model, SMALL, None, tmp_path / "model")
    texts = [" ".join(chr(97 + a) + chr(97 + b) * 3 for a in range(26) for b in range(26))] * 3
    train_tokenizer(texts, TokenizerConfig(vocab_size=400)).save(tmp_path / "model")
    with pytest.raises(UserError, match="do not belong together"):
        load(tmp_path / "model")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, trinity; print(sorted({'torch', 'numpy', 'pydantic', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_functions(exported: Path) -> None:
    assert trinity.RunConfig is RunConfig
    assert {"load", "generate", "RunConfig"} <= set(dir(trinity))
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        trinity.nothing_of_this_name  # noqa: B018
    model, tokenizer = trinity.load(exported, device="cpu", dtype="float32")
    answer = trinity.generate(model, tokenizer, "the cat", max_new_tokens=8, temperature=0.0)
    both = trinity.generate(model, tokenizer, ["the cat", "12 + 30"], max_new_tokens=8, temperature=0.0)
    assert both[0] == answer
    pieces: list[str] = []
    trinity.generate(model, tokenizer, "the cat", max_new_tokens=8, temperature=0.0, on_text=pieces.append)
    assert "".join(pieces) == answer
    assert isinstance(trinity.generate(model, tokenizer, "", max_new_tokens=2, seed=1), str)
    assert trinity.generate(model, tokenizer, []) == []
    with pytest.raises(UserError, match="temprature"):
        trinity.generate(model, tokenizer, "x", temprature=1.0)
    with pytest.raises(UserError, match="single prompt"):
        trinity.generate(model, tokenizer, ["x"], on_text=print)  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", ["float32", "fp8-block"])
def test_a_released_model_streams_into_weights_that_are_there(dtype: str, tmp_path: Path) -> None:
    """As into the shards of many ranks: at no time more than two of our tensors are alive beside the model."""
    source = random_model(SMALL)
    export_afmoe(source, SMALL, None, tmp_path / "model", dtype=dtype, max_shard_bytes=30_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    config, tensors = weights(tmp_path / "model", dtype="float32")
    sizes: list[int] = []
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for name, tensor in tensors:
            sizes.append(tensor.nbytes)
            alive.append(weakref.ref(tensor))
            most = max(most, sum(t.nbytes for ref in alive if (t := ref()) is not None))
            yield name, tensor
            del tensor

    model = Transformer(config)
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in watched():
            own[name].copy_(tensor)
    assert most <= 2 * max(sizes) < sum(sizes) / 2
    expected = load_model(tmp_path / "model", device="cpu", dtype="float32").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
