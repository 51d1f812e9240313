"""The public format in both directions, what is refused, and that an export is whole or absent."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trinity.base.errors import UserError
from trinity.config import ModelConfig, TokenizerConfig
from trinity.config.model import LayerType
from trinity.export.afmoe import export_afmoe
from trinity.export.balance_state import STATE
from trinity.export.config import config_from_public, config_to_public
from trinity.export.keys import our_shapes, pieces
from trinity.export.reading import import_afmoe, read_config
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer, train_tokenizer

GOLDEN = Path(__file__).parent / "golden"
SMALL = ModelConfig(
    vocab_size=320,
    num_layers=4,
    num_dense_layers=1,
    dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    ffn_dim=48,
    expert_dim=16,
    num_experts=4,
    experts_per_token=2,
    route_scale=2.0,
    window=8,
    max_positions=64,
)


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Every parameter and buffer random, norms and expert biases too."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            spread = 0.3 if tensor.ndim == 1 else 1.5 / math.sqrt(tensor.shape[-1])
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
            if name.endswith("norm.weight"):
                tensor.add_(1.0)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat. 12 + 30 = 42\n"] * 20, TokenizerConfig(vocab_size=290))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 export that tests copy and damage."""
    out = tmp_path_factory.mktemp("export") / "model"
    export_afmoe(random_model(SMALL), SMALL, None, out, dtype=torch.float32)
    return out


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


def change_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    layers = draw(st.integers(1, 5))
    groups = draw(st.integers(1, 2))
    experts = draw(st.integers(1, 5))
    kinds: list[LayerType] = ["local", "global"]
    explicit = st.lists(st.sampled_from(kinds), min_size=layers, max_size=layers).map(lambda found: (*found,))
    return ModelConfig(
        vocab_size=draw(st.integers(20, 60)),
        num_layers=layers,
        num_dense_layers=draw(st.integers(0, layers)),
        dim=draw(st.sampled_from([8, 12, 24])),
        num_heads=groups * draw(st.integers(1, 3)),
        num_kv_heads=groups,
        head_dim=draw(st.sampled_from([4, 6, 8])),
        ffn_dim=draw(st.sampled_from([8, 20])),
        expert_dim=draw(st.sampled_from([4, 12])),
        num_experts=experts,
        experts_per_token=draw(st.integers(1, experts)),
        num_shared_experts=draw(st.integers(0, 2)),
        route_scale=draw(st.sampled_from([1.0, 2.448])),
        route_norm=draw(st.booleans()),
        window=draw(st.integers(1, 20)),
        global_every=draw(st.integers(1, 4)),
        layer_types=draw(st.none() | explicit),
        max_positions=draw(st.sampled_from([24, 64])),
        rope_theta=draw(st.sampled_from([1e4, 5e5])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        embed_scale=draw(st.booleans()),
        init_scale=draw(st.sampled_from([0.5, 0.7])),
    )


@given(configs())
def test_settings_survive_the_round_trip(config: ModelConfig) -> None:
    public = json.loads(json.dumps(config_to_public(config, dtype="bfloat16")))
    again = config_from_public(public, Path("config.json"))
    assert again.layers == config.layers
    assert again.model_copy(update={"layer_types": config.layer_types}) == config


@given(configs())
def test_the_pieces_tile_our_tensors_exactly(config: ModelConfig) -> None:
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    wanted = {name: tuple(t.shape) for name, t in state.items() if not name.endswith("momentum")}
    assert our_shapes(config) == wanted
    covered = {name: torch.zeros(shape) for name, shape in wanted.items()}
    for piece in pieces(config):
        piece.of(covered[piece.ours]).add_(1)
        assert piece.of(covered[piece.ours]).shape == piece.shape
    assert all((tensor == 1).all() for tensor in covered.values())


@settings(max_examples=5, deadline=None)
@given(config=configs(), data=st.data())
def test_weights_survive_the_round_trip_in_any_form(
    config: ModelConfig, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("export") / "model"
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    size = data.draw(st.sampled_from([1, 3000, 10**9]))
    model = random_model(config)
    report = export_afmoe(model, config, None, out, dtype=dtype, max_shard_bytes=size)
    assert report.max_error["independent forward pass"] <= 1e-4
    if config.route_norm:
        assert report.max_error["transformers"] <= 1e-4
    _, state = import_afmoe(out)
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        kind = torch.float32 if name.endswith((".router.bias", "momentum")) else dtype
        assert state[name].dtype == kind
        assert torch.equal(state[name], tensor.to(kind))


@pytest.mark.parametrize("name", ["A", "B"])
def test_a_file_written_by_transformers_gives_the_golden_logits_and_is_written_again_unchanged(
    name: str, tmp_path: Path
) -> None:
    golden = load_file(GOLDEN / name / "golden.safetensors")
    config, state = import_afmoe(GOLDEN / name)
    model = Transformer(config)
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(golden["input_ids"])
    assert (logits - golden["logits"]).abs().max() <= 1e-5 * max(1.0, golden["logits"].abs().max().item())
    export_afmoe(model, config, None, tmp_path / "again", dtype=torch.float32)
    ours, theirs = load_file(tmp_path / "again" / "model.safetensors"), load_file(GOLDEN / name / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    known = json.loads((GOLDEN / name / "config.json").read_text())
    differing = {key for key in known if written.get(key) != known[key]}
    assert differing <= {"transformers_version", "initializer_range", "load_balance_coeff"}


def test_fused_experts_are_read(copy: Path) -> None:
    _, expected = import_afmoe(copy)
    tensors = load_file(copy / "model.safetensors")
    for layer in range(1, 4):
        at = f"model.layers.{layer}.mlp.experts"
        gate_up = [torch.cat([tensors.pop(f"{at}.{e}.{p}_proj.weight") for p in ("gate", "up")]) for e in range(4)]
        tensors[f"{at}.gate_up_proj"] = torch.stack(gate_up)
        tensors[f"{at}.down_proj"] = torch.stack([tensors.pop(f"{at}.{e}.down_proj.weight") for e in range(4)])
    save_file(tensors, copy / "model.safetensors")
    _, state = import_afmoe(copy)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_block_fp8_is_multiplied_by_its_scales(copy: Path, suffix: str) -> None:
    _, expected = import_afmoe(copy)
    tensors = load_file(copy / "model.safetensors")
    blocks = {"quant_method": "fp8", "weight_block_size": [16, 8]}
    if suffix == "_scale":
        group = {"weights": {"block_structure": [16, 8]}}
        blocks = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name]
        rows, columns = -(-weight.shape[0] // 16), -(-weight.shape[1] // 8)
        scale = 2.0 ** torch.arange(rows * columns).remainder(5).sub(8).float().view(rows, columns)
        spread = scale.repeat_interleave(16, 0)[: weight.shape[0]].repeat_interleave(8, 1)[:, : weight.shape[1]]
        tensors[name] = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[name + suffix] = scale
    save_file(tensors, copy / "model.safetensors")
    change_config(copy, quantization_config=blocks)
    _, state = import_afmoe(copy)
    for name, tensor in expected.items():
        # e4m3 has 3 bits of mantissa: half a step is 1/16, and below 2^-6 times the scale steps are absolute.
        assert state[name].dtype == torch.float32
        assert torch.allclose(state[name], tensor, rtol=1 / 16, atol=2.0**-10 / 16)


def test_config_json_has_every_field_that_engines_read(exported: Path) -> None:
    public = json.loads((exported / "config.json").read_text())
    expected = {
        "architectures": ["AfmoeForCausalLM"],
        "model_type": "afmoe",
        "score_func": "sigmoid",
        "route_norm": True,
        "n_group": 1,
        "topk_group": 1,
        "num_expert_groups": 1,
        "num_limited_groups": 1,
        "load_balance_coeff": 5e-4,
        "use_grouped_mm": True,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "rope_theta": 1e4,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        "attention_bias": False,
        "tie_word_embeddings": False,
        "mup_enabled": True,
        "hidden_act": "silu",
        "dtype": "float32",
    }
    assert {key: public[key] for key in expected} == expected


def test_the_expert_bias_stays_float32_in_a_bfloat16_export(tmp_path: Path) -> None:
    model = random_model(SMALL)
    export_afmoe(model, SMALL, None, tmp_path / "out", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    bias = tensors["model.layers.1.mlp.expert_bias"]
    assert torch.equal(bias, model.state_dict()["layers.1.moe.router.bias"])
    assert {t.dtype for name, t in tensors.items() if not name.endswith("expert_bias")} == {torch.bfloat16}


def test_tokenizer_generation_config_and_card_come_along(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_afmoe(random_model(SMALL), SMALL, tokenizer, out, origin={"run": "demo", "step": "12"})
    assert Tokenizer.load(out).fingerprint == tokenizer.fingerprint
    assert (out / "chat_template.jinja").exists()
    generation = json.loads((out / "generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == {tokenizer.eos_id, tokenizer.special_id("<|im_end|>")}
    public = json.loads((out / "config.json").read_text())
    assert (public["eos_token_id"], public["pad_token_id"]) == (tokenizer.eos_id, tokenizer.pad_id)
    card = (out / "README.md").read_text()
    assert all(word in card for word in (tokenizer.fingerprint, "run: `demo`", f"{SMALL.num_params():,}"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"score_func": "softmax"}, "score_func"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"attention_bias": True}, "attention_bias"),
        ({"n_group": 2}, "n_group"),
        ({"rope_theta": 5.0}, "must agree"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"num_experts": None}, "num_experts is not set"),
        ({"head_dim": 9}, "odd"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"layer_types": ["mamba"] * 4}, "mamba"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"num_hidden_layers": 5, "layer_types": None}, "model.layers.4.input_layernorm.weight of shape"),
        ({"num_hidden_layers": 3, "layer_types": None}, "no place"),
        ({"moe_intermediate_size": 20}, r"\(16, 32\).*\(20, 32\)"),
    ],
)
def test_files_that_cannot_be_read_are_refused(copy: Path, changes: dict[str, object], words: str) -> None:
    change_config(copy, **changes)
    with pytest.raises(UserError, match=words):
        import_afmoe(copy)


def test_missing_and_unexpected_tensors_are_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, "model.layers.0.mlp.gate_proj.bias": torch.zeros(3)}, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"mlp.gate_proj.bias \(shape \(3,\)\) has no place"):
        import_afmoe(copy)
    tensors.pop("model.layers.2.mlp.expert_bias")
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"model.layers.2.mlp.expert_bias of shape \(4,\) is missing"):
        import_afmoe(copy)


def test_damaged_files_are_named(copy: Path, tmp_path: Path) -> None:
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    for length in (0, 5, 100, len(data) - 1):
        weights.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"model\.safetensors is not a whole"):
            import_afmoe(copy)
    weights.unlink()
    with pytest.raises(UserError, match="has no weights"):
        import_afmoe(copy)
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(copy)


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_afmoe(random_model(SMALL), SMALL, None, out, max_shard_bytes=20_000)
    index_path = out / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    name = index["weight_map"]["lm_head.weight"]
    first = index["weight_map"]["model.embed_tokens.weight"]
    assert name != first
    for target, words in (
        (first, "but it is not there"),
        ("../x.safetensors", "outside"),
        ("no.safetensors", "missing"),
    ):
        changed = {**index, "weight_map": {**index["weight_map"], "lm_head.weight": target}}
        index_path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=words):
            import_afmoe(out)


@pytest.mark.parametrize("switch", ["qk_norm", "attention_gate"])
def test_ablations_are_refused(switch: str, tmp_path: Path) -> None:
    config = SMALL.model_copy(update={switch: False})
    with pytest.raises(UserError, match=switch):
        export_afmoe(random_model(config), config, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"vocab_size": tokenizer.vocab_size - 1})
    with pytest.raises(UserError, match="belong together"):
        export_afmoe(random_model(config), config, tokenizer, tmp_path / "out")


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_afmoe(random_model(SMALL, 1), SMALL, None, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="--force"):
        export_afmoe(random_model(SMALL, 2), SMALL, None, out)
    assert (out / "model.safetensors").read_bytes() == before
    export_afmoe(random_model(SMALL, 2), SMALL, None, out, force=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_export_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    export_afmoe(random_model(SMALL, 1), SMALL, None, out)
    before = (out / "model.safetensors").read_bytes()

    def fail(*_args: object, **_rest: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trinity.export.writing.save_file", fail)
    with pytest.raises(UserError, match="disk is full"):
        export_afmoe(random_model(SMALL, 2), SMALL, None, out, force=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_momenta_come_back_bit_for_bit_from_a_file_of_their_own(tmp_path: Path) -> None:
    """In a bfloat16 export too; without a momentum there is no file, and without the file momenta are zero."""
    model = random_model(SMALL)
    names = [name for name in model.state_dict() if name.endswith("momentum")]
    export_afmoe(model, SMALL, None, tmp_path / "a", dtype=torch.bfloat16)
    assert {path.name for path in (tmp_path / "a").glob("*.safetensors")} == {"model.safetensors"}
    _, state = import_afmoe(tmp_path / "a")
    for name in names:
        assert model.state_dict()[name].abs().min() > 0
        assert torch.equal(state[name], model.state_dict()[name])
    (tmp_path / "a" / STATE).unlink()
    _, state = import_afmoe(tmp_path / "a")
    assert all(torch.equal(state[name], torch.zeros(SMALL.num_experts)) for name in names)
    model.load_state_dict(state)
    export_afmoe(model, SMALL, None, tmp_path / "b", dtype=torch.bfloat16)
    assert not (tmp_path / "b" / STATE).exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: [], "not a state of format 1"),
        (lambda content: {**content, "format": 2}, "not a state of format 1"),
        (lambda content: {**content, "momentum": {}}, "disagree about layers.1.moe.router.momentum"),
        (lambda content: with_momentum(content, [0.0] * 3), "is not a list of 4 finite numbers"),
        (lambda content: with_momentum(content, [0.0, 0.0, 0.0, math.nan]), "is not a list of 4 finite numbers"),
        (lambda content: with_momentum(content, [0.0, 0.0, 0.0, "0"]), "is not a list of 4 finite numbers"),
    ],
)
def test_damaged_momenta_are_refused(exported: Path, tmp_path: Path, change: Any, reason: str) -> None:
    shutil.copytree(exported, tmp_path / "model")
    path = tmp_path / "model" / STATE
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=f"trinity_state.json.*{reason}"):
        import_afmoe(tmp_path / "model")
    path.write_text('{"format": 1, "mom')
    with pytest.raises(UserError, match=r"trinity_state.json cannot be read as JSON"):
        import_afmoe(tmp_path / "model")


def with_momentum(content: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    return {**content, "momentum": {**content["momentum"], "layers.1.moe.router.momentum": values}}
