"""The forward pass straight from the files of a public model directory, one layer in memory at a time.

It shares nothing with the model, the key mapping or the quantisation: it reads the public names and the raw config.json
and follows the published formulas in the plainest way. The parity gate compares the model with it, so that a fault that
writer and reader have in common is seen too.
"""

import math
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.functional import silu

from trinity.base.files import read_json
from trinity.export.files import TensorFiles

Rounding = Callable[[str, torch.Tensor], torch.Tensor]
FP8_MAX = 448.0


class OracleOutput(NamedTuple):
    logits_BTV: torch.Tensor
    indices_LNk: torch.Tensor
    """The experts that the files choose for each token in each MoE layer, int64."""
    regret_LN: torch.Tensor
    """How far the worst expert that was used lies, in biased score, below the worst that the files choose."""


class Tensors(Protocol):
    """Where the oracle reads: tensors by public name, as they are stored."""

    @property
    def names(self) -> Container[str]: ...

    def holds(self, name: str) -> bool: ...

    def raw(self, name: str) -> torch.Tensor: ...


def oracle_forward(
    directory: Path,
    tokens_BT: torch.Tensor,
    replay_LNk: torch.Tensor | None = None,
    *,
    rounding: Rounding | None = None,
    quantize_inputs: bool = False,
) -> OracleOutput:
    """Logits and routing in float32 of the model in `directory`; every row is one document from position 0.

    With `replay_LNk` those experts are used instead of the files' choice, weighed by the files' scores: two
    computations that differ by rounding may break a tie differently, and then their logits could not be compared.
    `rounding` changes each tensor, by public name, before it is used. `quantize_inputs` rounds what is multiplied by
    an FP8 matrix to FP8 in groups of a block's width, as engines with dynamic activations do.
    """
    raw = read_json(directory / "config.json")
    with TensorFiles(directory, raw.get("quantization_config")) as files:
        return oracle_pass(files, raw, tokens_BT, replay_LNk, rounding=rounding, quantize_inputs=quantize_inputs)


@torch.no_grad()
def oracle_pass(
    files: Tensors,
    raw: Mapping[str, Any],
    tokens_BT: torch.Tensor,
    replay_LNk: torch.Tensor | None = None,
    *,
    rounding: Rounding | None = None,
    quantize_inputs: bool = False,
) -> OracleOutput:
    """As `oracle_forward`, for tensors from anywhere and `raw`, the content of config.json."""
    eps = raw["rms_norm_eps"]
    indices, regrets = [], []
    get = _Weights(files, raw, rounding, quantize_inputs)
    x_BTD = get("model.embed_tokens.weight")[tokens_BT]
    if raw["mup_enabled"]:
        x_BTD = x_BTD * math.sqrt(raw["hidden_size"])
    for i, kind in enumerate(raw["layer_types"]):
        layer = get.below(f"model.layers.{i}.")
        attention = _attention(
            layer.below("self_attn."),
            _rms(x_BTD, layer("input_layernorm.weight"), eps),
            raw,
            local=kind == "sliding_attention",
        )
        x_BTD = x_BTD + _rms(attention, layer("post_attention_layernorm.weight"), eps)
        h_BTD = _rms(x_BTD, layer("pre_mlp_layernorm.weight"), eps)
        if i < raw["num_dense_layers"]:
            mixed = _swiglu(layer.below("mlp."), h_BTD)
        else:
            replay_Nk = None if replay_LNk is None else replay_LNk[len(indices)]
            mixed, index_Nk, regret_N = _moe(layer.below("mlp."), h_BTD, raw, replay_Nk)
            indices.append(index_Nk)
            regrets.append(regret_N)
        x_BTD = x_BTD + _rms(mixed, layer("post_mlp_layernorm.weight"), eps)
    logits_BTV = get.product(_rms(x_BTD, get("model.norm.weight"), eps), "lm_head.weight")
    num_tokens = tokens_BT.numel()
    return OracleOutput(
        logits_BTV,
        torch.stack(indices) if indices else torch.zeros(0, num_tokens, raw["num_experts_per_tok"], dtype=torch.int64),
        torch.stack(regrets) if regrets else torch.zeros(0, num_tokens),
    )


class _Weights:
    """The tensors below a prefix, in float32."""

    def __init__(
        self, files: Tensors, raw: Mapping[str, Any], rounding: Rounding | None, quantize: bool, prefix: str = ""
    ) -> None:
        self.files, self.raw, self.rounding, self.quantize, self.prefix = files, raw, rounding, quantize, prefix

    def below(self, prefix: str) -> "_Weights":
        return _Weights(self.files, self.raw, self.rounding, self.quantize, self.prefix + prefix)

    def __call__(self, name: str) -> torch.Tensor:
        name = self.prefix + name
        value = self._read(name)
        return value if self.rounding is None else self.rounding(name, value)

    def product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """x @ weight^T"""
        weight = self(name)
        if self.quantize and self._scale(self.prefix + name) is not None:
            x = self._quantized(x)
        return x @ weight.T

    def _read(self, name: str) -> torch.Tensor:
        if name not in self.files.names and ".experts." in name:  # all experts of the layer in one tensor
            above, _, rest = name.partition(".experts.")
            number, part, _ = rest.split(".")
            if part == "down_proj":
                return self._stored(f"{above}.experts.down_proj", int(number))
            both = self._stored(f"{above}.experts.gate_up_proj", int(number))
            half = len(both) // 2
            return both[:half] if part == "gate_proj" else both[half:]
        return self._stored(name, None)

    def _scale(self, name: str) -> str | None:
        return next((name + end for end in ("_scale_inv", "_scale") if self.files.holds(name + end)), None)

    def _stored(self, name: str, expert: int | None) -> torch.Tensor:
        stored = self.files.raw(name) if expert is None else self.files.raw(name)[expert]
        scale_name = self._scale(name)
        if scale_name is None:
            return stored.float()
        scale = self.files.raw(scale_name).float()
        scale = scale[expert] if expert is not None and scale.ndim == 3 else scale
        value = stored.float()
        if scale.numel() == 1 or scale.shape == (len(value), 1):
            return value * scale
        rows, columns = self._block()
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                value[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] *= scale[i, j]
        return value

    def _block(self) -> tuple[int, int]:
        settings = self.raw["quantization_config"]
        if "weight_block_size" in settings:
            rows, columns = settings["weight_block_size"]
        else:
            (group,) = settings["config_groups"].values()
            rows, columns = group["weights"].get("block_structure") or (128, 128)
        return rows, columns

    def _quantized(self, x: torch.Tensor) -> torch.Tensor:
        parts = []
        for part in x.split(self._block()[1], dim=-1):
            scale = (part.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=1e-12)
            parts.append((part / scale).to(torch.float8_e4m3fn).float() * scale)
        return torch.cat(parts, dim=-1)


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x_BTHK: torch.Tensor, theta: float) -> torch.Tensor:
    length, width = x_BTHK.shape[1], x_BTHK.shape[-1]
    frequency = theta ** (-torch.arange(0, width, 2).float() / width)
    angle = torch.arange(length).float()[:, None] * frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x_BTHK.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _attention(get: _Weights, h_BTD: torch.Tensor, raw: Mapping[str, Any], *, local: bool) -> torch.Tensor:
    batch, length, _ = h_BTD.shape
    heads, groups, width = raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"]
    q = get.product(h_BTD, "q_proj.weight").view(batch, length, heads, width)
    k = get.product(h_BTD, "k_proj.weight").view(batch, length, groups, width)
    v = get.product(h_BTD, "v_proj.weight").view(batch, length, groups, width)
    gate = torch.sigmoid(get.product(h_BTD, "gate_proj.weight"))
    q = _rms(q, get("q_norm.weight"), raw["rms_norm_eps"])
    k = _rms(k, get("k_norm.weight"), raw["rms_norm_eps"])
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = distance >= 0
    if local:
        theta = (raw.get("rope_parameters") or raw)["rope_theta"]
        q, k = _rotate(q, theta), _rotate(k, theta)
        visible &= distance < raw["sliding_window"]
    k, v = (t.repeat_interleave(heads // groups, dim=2) for t in (k, v))
    scores = torch.einsum("bihk,bjhk->bhij", q, k) / math.sqrt(width)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    mixed = torch.einsum("bhij,bjhk->bihk", weights, v).reshape(batch, length, heads * width)
    return get.product(mixed * gate, "o_proj.weight")


def _swiglu(get: _Weights, h: torch.Tensor) -> torch.Tensor:
    gate, up = get.product(h, "gate_proj.weight"), get.product(h, "up_proj.weight")
    return get.product(silu(gate) * up, "down_proj.weight")


def _moe(
    get: _Weights, h_BTD: torch.Tensor, raw: Mapping[str, Any], replay_Nk: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h_ND = h_BTD.flatten(0, 1)
    scores_NE = torch.sigmoid(get.product(h_ND, "router.gate.weight"))
    biased_NE = scores_NE + get("expert_bias")
    best_Nk, index_Nk = biased_NE.topk(raw["num_experts_per_tok"], dim=-1)
    used_Nk = index_Nk if replay_Nk is None else replay_Nk
    regret_N = best_Nk.amin(-1) - biased_NE.gather(1, used_Nk).amin(-1)
    weight_Nk = scores_NE.gather(1, used_Nk)
    if raw["route_norm"]:
        weight_Nk = weight_Nk / (weight_Nk.sum(-1, keepdim=True) + 1e-20)
    weight_Nk = weight_Nk * raw["route_scale"]
    out_ND = _swiglu(get.below("shared_experts."), h_ND) if raw["num_shared_experts"] else torch.zeros_like(h_ND)
    for e in range(raw["num_experts"]):
        rows, place = (used_Nk == e).nonzero(as_tuple=True)
        if len(rows):
            out_ND[rows] += weight_Nk[rows, place, None] * _swiglu(get.below(f"experts.{e}."), h_ND[rows])
    return out_ND.view_as(h_BTD), index_Nk, regret_N
