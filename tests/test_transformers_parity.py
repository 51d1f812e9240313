"""The model against the installed transformers' AfmoeForCausalLM on random configurations, forward and gradients.

Packed rows are compared under an explicit mask dictionary (transformers' own mask lets documents of a row see each other) and,
independently of transformers, with each document in a row of its own.
"""

from typing import Any

import pytest
import torch
from afmoe_keys import model_config, to_ours
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trinity.model.norm import Kernels
from trinity.model.transformer import Transformer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
THOROUGH = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def shapes(draw) -> dict[str, Any]:
    layers = draw(st.integers(1, 4))
    kv_heads = draw(st.sampled_from([1, 2]))
    experts = draw(st.sampled_from([1, 3, 8]))
    return {
        "vocab_size": draw(st.sampled_from([17, 64])),
        "hidden_size": draw(st.sampled_from([16, 24])),
        "num_hidden_layers": layers,
        "num_dense_layers": draw(st.integers(0, layers)),
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 2, 4])),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([4, 8, 10])),
        "intermediate_size": 28,
        "moe_intermediate_size": 12,
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, min(3, experts))),
        "num_shared_experts": draw(st.integers(1, 3)),
        "route_scale": draw(st.sampled_from([1.0, 2.5])),
        "sliding_window": draw(st.sampled_from([1, 2, 5, 16, 33, 64])),
        "layer_types": draw(
            st.lists(st.sampled_from(["sliding_attention", "full_attention"]), min_size=layers, max_size=layers)
        ),
        "mup_enabled": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }


def pair(shape: dict[str, Any], seed: int, kernels: Kernels):
    """transformers' model with every parameter random, and ours with the same weights."""
    torch.manual_seed(seed)
    theirs = transformers.AfmoeForCausalLM(transformers.AfmoeConfig(**shape)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(std=0.3).add_(0.0 if not parameter.requires_grad else 1.0)
    config = model_config(theirs.config.to_dict())
    ours = Transformer(config, kernels)
    ours.load_state_dict(to_ours(config, theirs.state_dict()))
    return theirs, ours


def explicit_masks(segments_BT: Tensor, window: int) -> dict[str, Tensor]:
    """Additive masks [B, 1, T, T] for transformers."""
    index_T = torch.arange(segments_BT.shape[1])
    distance = index_T[:, None] - index_T
    causal = (distance >= 0) & (segments_BT[:, :, None] == segments_BT[:, None, :])
    floor = torch.finfo(torch.float32).min
    full = torch.zeros(causal.shape).masked_fill(~causal, floor)[:, None]
    local = torch.zeros(causal.shape).masked_fill(~(causal & (distance < window)), floor)[:, None]
    return {"full_attention": full, "sliding_attention": local}


def assert_same(theirs, ours: Transformer, logits_theirs: Tensor, logits_ours: Tensor, weight_BTV: Tensor) -> None:
    scale = max(1.0, logits_theirs.abs().max().item())
    assert (logits_theirs - logits_ours).abs().max().item() <= 1e-5 * scale
    (logits_theirs * weight_BTV).sum().backward()
    (logits_ours * weight_BTV).sum().backward()
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in theirs.named_parameters()}
    gradients = {name: gradient for name, gradient in gradients.items() if not name.endswith("expert_bias")}
    for name, expected in to_ours(ours.config, gradients).items():
        actual = ours.get_parameter(name).grad
        actual = torch.zeros_like(expected) if actual is None else actual
        error = (actual - expected).abs().max().item()
        assert error <= 1e-4 * max(1.0, expected.abs().max().item()), f"gradient of {name} is off by {error}"


@THOROUGH
@given(
    shape=shapes(),
    seq_len=st.integers(1, 40),
    seed=st.integers(0, 2**20),
    kernels=st.sampled_from(["fast", "reference"]),
)
def test_one_document_per_row(shape: dict[str, Any], seq_len: int, seed: int, kernels: Kernels) -> None:
    theirs, ours = pair(shape, seed, kernels)
    tokens = torch.randint(0, shape["vocab_size"], (2, seq_len))
    weight = torch.randn(2, seq_len, shape["vocab_size"]) / seq_len
    assert_same(theirs, ours, theirs(tokens, use_cache=False).logits, ours(tokens), weight)


@st.composite
def packed_rows(draw) -> tuple[Tensor, Tensor]:
    """(segments, positions) of two rows of equal length with one to five documents each."""
    seq_len = draw(st.integers(2, 40))
    segments, positions = [], []
    for _ in range(2):
        cuts = sorted(draw(st.sets(st.integers(1, seq_len - 1), max_size=4)))
        lengths = torch.diff(torch.tensor([0, *cuts, seq_len]))
        segments.append(torch.repeat_interleave(torch.arange(len(lengths)), lengths))
        positions.append(torch.cat([torch.arange(int(n)) for n in lengths]))
    return torch.stack(segments).int(), torch.stack(positions).int()


@THOROUGH
@given(shape=shapes(), rows=packed_rows(), seed=st.integers(0, 2**20), kernels=st.sampled_from(["fast", "reference"]))
def test_packed_documents(shape: dict[str, Any], rows: tuple[Tensor, Tensor], seed: int, kernels: Kernels) -> None:
    theirs, ours = pair(shape, seed, kernels)
    segments, positions = rows
    tokens = torch.randint(0, shape["vocab_size"], segments.shape)
    weight = torch.randn(*segments.shape, shape["vocab_size"]) / segments.shape[1]
    masks = explicit_masks(segments, shape["sliding_window"])
    logits_theirs = theirs(tokens, attention_mask=masks, position_ids=positions.long(), use_cache=False).logits
    logits_ours = ours(tokens, segments, positions)
    with torch.no_grad():
        assert torch.equal(logits_ours, ours(tokens, segments)), "positions do not follow from segments"
        for row in range(2):
            for segment in range(int(segments[row].max()) + 1):
                inside = segments[row] == segment
                alone = ours(tokens[row, inside][None])[0]
                assert (alone - logits_ours[row, inside]).abs().max() <= 1e-5 * max(1.0, alone.abs().max().item())
    assert_same(theirs, ours, logits_theirs, logits_ours, weight)
