"""Low-rank adapters: gradients, what moves, resumption, merging, and PEFT's view of the same model."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

import trinity
from stage_fixtures import tiny_config, write_inputs
from test_stages import StopAfter, final_state
from trinity.base.errors import UsageError
from trinity.base.rundir import RunDir
from trinity.config import LoRAConfig
from trinity.export.peft import export_peft, public_module
from trinity.model.lora import Adapters, adapted_matrices, is_factor
from trinity.model.transformer import Transformer
from trinity.stages import pretrain, rl, sft
from trinity.stages.adapters import open_adapters
from trinity.train.adapted import AdaptedWeights

RANKS = {"attention": 3, "gate": 2, "dense": 4, "shared": 2, "experts": 2, "alpha": 6.0, "lr": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    write_inputs(path)
    return path


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("base") / "pretrain"
    pretrain.run(tiny_config(folder), run)
    return run


def adapted(folder, **ranks):
    config = tiny_config(folder).model
    model = Transformer(config)
    model.init_weights(0)
    adapters = Adapters(config, LoRAConfig(**{**RANKS, **ranks}), torch.device("cpu"), seed=1)
    return model, adapters


def randomise(adapters):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, factor in adapters.named_parameters():
            factor.copy_(torch.randn(factor.shape, generator=generator) * 0.1)


def test_every_matrix_is_named_once_and_covers_its_parameter(folder):
    config = tiny_config(folder).model
    matrices = list(adapted_matrices(config, LoRAConfig(**RANKS)))
    names = [m.name for m in matrices]
    assert len(set(names)) == len(names)
    first = ["attn.q", "attn.k", "attn.v", "attn.gate", "attn.o", "ffn.gate", "ffn.up", "ffn.down"]
    assert names[:8] == [f"layers.0.{name}" for name in first]
    shapes = {name: p.shape for name, p in Transformer(config).named_parameters()}
    groups = {}
    for m in matrices:
        groups.setdefault(m.parameter, []).append(m)
    for parameter, parts in groups.items():
        assert sum(m.rows for m in parts) == shapes[parameter][-2]
        assert {m.columns for m in parts} == {shapes[parameter][-1]}
        assert all(b.start == a.start + a.rows for a, b in pairwise(parts))
    only = [m.name for m in adapted_matrices(config, LoRAConfig(gate=2))]
    assert only == [f"layers.{i}.attn.gate" for i in range(4)]


def test_gradients_of_the_factors_are_autograd_s(folder):
    model, adapters = adapted(folder)
    randomise(adapters)
    tokens = torch.randint(0, 400, (2, 12))

    plain = {name: p.detach().clone().requires_grad_() for name, p in adapters.named_parameters()}
    merged = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        for m in adapters.by_parameter.get(name, ()):
            delta = plain[f"{m.name}.lora_b"] @ plain[f"{m.name}.lora_a"] * (6.0 / m.rank)
            pad = (
                torch.zeros(*value.shape[:-2], m.start, m.columns),
                torch.zeros(*value.shape[:-2], value.shape[-2] - m.start - m.rows, m.columns),
            )
            value = value + torch.cat([pad[0], delta, pad[1]], dim=-2)
        merged[name] = value
    buffers = dict(model.named_buffers())
    torch.func.functional_call(model, {**merged, **buffers}, (tokens,)).square().mean().backward()

    weights = AdaptedWeights(model, adapters, torch.float32)
    for _ in range(2):  # two micro-batches add up
        (model(tokens).square().mean() / 2).backward()
    for name, factor in weights.trained().items():
        torch.testing.assert_close(factor.grad, plain[name].grad, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_adapters_move_and_the_merged_export_is_the_adapted_model(folder, base, tmp_path, optimizer):
    config = tiny_config(folder, lora={**RANKS, "optimizer": optimizer}, balance={"frozen": True})
    sft.run(config, tmp_path / "run", start_from=base)
    run = RunDir(tmp_path / "run")
    evals = [r["loss"] for r in run.read_metrics("eval")]
    assert evals[-1] < evals[0]
    (start,) = run.read_events("start")
    assert {row[3] for row in start["optimizer"]} == {"Muon" if optimizer == "muon" else "AdamW"}
    before = trinity.load(base)[0].state_dict()
    _, saved, _ = final_state(tmp_path / "run")
    factors = {name: t for name, t in saved.items() if is_factor(name)}
    assert all(t.abs().max() > 0 for t in factors.values()), "every factor has moved or had a random start"
    for name, tensor in before.items():
        assert torch.equal(saved[name].float(), tensor.float()), name

    adapters = Adapters(config.model, config.lora, torch.device("cpu"), seed=0)
    adapters.load(factors)
    tokens = torch.randint(0, 400, (2, 20))
    model = trinity.load(base, dtype="float32")[0]
    expected = forward_with_adapters(model, adapters, tokens)
    exported = trinity.load(tmp_path / "run", dtype="float32")[0]
    torch.testing.assert_close(exported(tokens), expected, rtol=1e-5, atol=1e-5)
    checkpoint = trinity.load(sorted((tmp_path / "run/checkpoints").iterdir())[-1])[0]
    torch.testing.assert_close(checkpoint(tokens), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def forward_with_adapters(model, adapters, tokens):
    """x W^T + s (x A^T) B^T, in the activations: hooks on the linear layers; experts by the plain loop."""
    handles = []
    for name, matrices in adapters.by_parameter.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight"):
            handles.append(module.register_forward_hook(activation_hook(adapters, matrices)))
    for layer, block in enumerate(model.blocks):
        if block.moe is not None:
            block.moe.dispatcher = expert_loop(adapters, layer)
    try:
        return model(tokens)
    finally:
        for handle in handles:
            handle.remove()


def low_rank(adapters, matrix, x, expert=None):
    a, b = adapters.factors(matrix)
    a, b = (a, b) if expert is None else (a[expert], b[expert])
    return adapters.scale(matrix) * ((x @ a.T) @ b.T)


def activation_hook(adapters, matrices):
    def hook(_module, inputs, output):
        return output + torch.cat([low_rank(adapters, m, inputs[0]) for m in matrices], dim=-1)

    return hook


def expert_loop(adapters, layer):
    gate, up, down = (
        next(m for m in adapters.matrices if m.name == f"layers.{layer}.moe.experts.{n}")
        for n in ("gate", "up", "down")
    )

    def dispatch(x_ND, indices_Nk, weights_Nk, experts, shared):
        y_ND = shared(x_ND) if shared is not None else torch.zeros_like(x_ND)
        for n, x in enumerate(x_ND):
            for e, w in zip(indices_Nk[n].tolist(), weights_Nk[n], strict=True):
                g, u = (experts.gate_up[e] @ x).chunk(2)
                g, u = g + low_rank(adapters, gate, x, e), u + low_rank(adapters, up, x, e)
                hidden = torch.nn.functional.silu(g) * u
                y_ND[n] += w * (experts.down[e] @ hidden + low_rank(adapters, down, hidden, e))
        return y_ND

    return dispatch


@pytest.mark.parametrize(("name", "stage"), [("sft", sft), ("rl", rl)])
def test_a_stopped_run_with_adapters_goes_on_to_the_same_end(folder, base, tmp_path, name, stage):
    config = tiny_config(folder, lora=RANKS)
    stage.run(config, tmp_path / "straight", start_from=base)
    assert not stage.run(config, tmp_path / "stopped", start_from=base, progress=StopAfter(3)).train.finished
    stage.run(config, tmp_path / "stopped", start_from=base)
    (_, weights, _), (_, again, _) = (final_state(tmp_path / run) for run in ("straight", "stopped"))
    for key, tensor in weights.items():
        assert torch.equal(tensor, again[key]), key


def test_bfloat16_keeps_what_the_base_holds(folder, base, tmp_path):
    """A base that bfloat16 holds exactly is kept in it; the adapters stay float32, and the export is exact."""
    config = tiny_config(folder, lora=RANKS, runtime={"dtype": "bfloat16", "device": "cpu", "threads": 1})
    model, tokenizer = trinity.load(base, dtype="float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    adapters = Adapters(config.model, config.lora, torch.device("cpu"), seed=1)
    weights = AdaptedWeights(model, adapters, torch.bfloat16)
    state = weights.state()
    assert state["layers.1.moe.experts.down"].dtype == torch.bfloat16
    assert state["layers.1.attn.q.lora_a"].dtype == torch.float32
    moe = model.blocks[1].moe
    assert moe is not None
    assert moe.router.weight.dtype == torch.float32
    assert model.embed.weight.dtype == torch.bfloat16
    weights.restore()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer is not None


def test_ranks_without_matrices_and_several_processes_are_refused(folder):
    config = tiny_config(folder, lora={"gate": 4}, model={"attention_gate": False})
    with pytest.raises(UsageError, match="does not have"):
        open_adapters(config, torch.device("cpu"), None)
    config = tiny_config(folder, lora=RANKS)
    with pytest.raises(UsageError, match="one process"):
        open_adapters(config, torch.device("cpu"), object())  # pyright: ignore[reportArgumentType]


def test_names_of_the_public_layout(folder):
    config = tiny_config(folder).model
    names = {public_module(m, 3) for m in adapted_matrices(config, LoRAConfig(**RANKS))}
    assert "model.layers.0.mlp.down_proj" in names
    assert "model.layers.2.self_attn.gate_proj" in names
    assert "model.layers.1.mlp.shared_experts.up_proj" in names
    assert "model.layers.1.mlp.experts.3.gate_proj" in names


def test_the_per_expert_layout_lists_every_matrix(folder, tmp_path):
    _, adapters = adapted(folder)
    randomise(adapters)
    export_peft(adapters, "base", tmp_path / "adapter", per_expert=True)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_parameters"] is None
    for expert in range(4):
        for name in ("gate", "up", "down"):
            module = f"model.layers.2.mlp.experts.{expert}.{name}_proj"
            assert module in config["target_modules"]
            a, b = adapters.factors(next(m for m in adapters.matrices if m.name == f"layers.2.moe.experts.{name}"))
            found = [tensors[f"base_model.model.{module}.lora_{kind}.weight"] for kind in "BA"]
            torch.testing.assert_close(found[0] @ found[1], b[expert] @ a[expert] * 3.0)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT's use of transformers
def test_peft_computes_the_adapted_model(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    from transformers import AutoModelForCausalLM

    from trinity.export.afmoe import export_afmoe
    from trinity.tokenizer import Tokenizer

    model, adapters = adapted(folder)
    randomise(adapters)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    export_afmoe(model, model.config, tokenizer, tmp_path / "base", dtype="float32")
    export_peft(adapters, str(tmp_path / "base"), tmp_path / "adapter")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    tokens = torch.randint(0, 400, (2, 20))
    AdaptedWeights(model, adapters, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-5)
