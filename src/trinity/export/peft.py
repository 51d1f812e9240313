"""Low-rank adapters as a directory that PEFT loads over the exported base model.

What PEFT (0.21, over transformers 5) gets right decides the form:

- It takes every target module that ends in `gate_proj`, `up_proj` or `down_proj` for a routed expert, also the gate of
  the attention, the shared expert and the dense layers. Those are named as parameters (`target_parameters`), which it
  leaves alone; queries, keys, values and output as modules.
- The routed experts are two stacked parameters: factors of all experts side by side, A [E * rank, in] by expert, B
  [out, rank * E] with the expert as the last axis. Gate and up are one parameter, so their two adapters become one of
  twice the rank, with zero blocks in B.
- Patterns of ranks are matched with modules only. So all have one rank, filled up with zeros, and the scale
  alpha / rank of each matrix is in its B. The true ranks stand in the file's metadata.

With `per_expert` the experts are listed matrix by matrix as modules of their own (`experts.3.up_proj`), the form for
engines that keep them apart; PEFT over transformers 5 does not load that.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from trinity.base.files import write_json
from trinity.export.folder import folder_aside
from trinity.model.lora import AdaptedMatrix, Adapters

PREFIX = "base_model.model"
NAMES = {name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
_TAKEN_FOR_EXPERTS = ("gate_proj", "up_proj", "down_proj")


def export_peft(adapters: Adapters, base_model: str, out_dir: Path, *, per_expert: bool = False) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` to `out_dir`, whole or not at all.

    `base_model`: name or directory of the base that the adapters were trained on. Raises UserError when the disk is
    full.
    """
    files = _PeftFiles(adapters, per_expert=per_expert)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": files.rank,
        "lora_alpha": files.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": files.modules,
        "target_parameters": files.parameters or None,
    }
    ranks = {matrix.name: matrix.rank for matrix in adapters.matrices}
    metadata = {"format": "pt", "alpha": str(adapters.settings.alpha), "ranks": json.dumps(ranks)}
    with folder_aside(out_dir) as folder:
        save_file(files.tensors, folder / "adapter_model.safetensors", metadata=metadata)
        write_json(folder / "adapter_config.json", config)


def public_module(matrix: AdaptedMatrix, expert: int = 0) -> str:
    """The name of the matrix' module in the public layout."""
    _, layer, room, *more, name = matrix.name.split(".")
    place = {"attn": "self_attn", "ffn": "mlp", "moe": "mlp"}[room]
    if more == ["shared"]:
        place += ".shared_experts"
    elif more == ["experts"]:
        place += f".experts.{expert}"
    return f"model.layers.{layer}.{place}.{NAMES[name]}"


class _PeftFiles:
    """The tensors and the names of what they adapt."""

    def __init__(self, adapters: Adapters, *, per_expert: bool) -> None:
        self._adapters = adapters
        self.tensors: dict[str, Tensor] = {}
        self.modules: list[str] = []
        self.parameters: list[str] = []
        stacked = [m for m in adapters.matrices if m.experts is not None and not per_expert]
        self.rank = max([m.rank for m in adapters.matrices] + [2 * m.rank for m in stacked])
        for matrix in adapters.matrices:
            if matrix in stacked:
                continue
            a, b = self._factors(matrix)
            for expert in range(matrix.experts or 1):
                module = public_module(matrix, expert)
                if module.endswith(_TAKEN_FOR_EXPERTS) and not per_expert:
                    self.parameters.append(f"{module}.weight")
                else:
                    self.modules.append(module)
                self._put(module, a[expert], b[expert])
        for start in range(0, len(stacked), 3):
            self._stack(*stacked[start : start + 3])

    def _factors(self, matrix: AdaptedMatrix) -> tuple[Tensor, Tensor]:
        """(A [E, r, in], B [E, out, r]) with the scale in B; E is 1 where there are no experts."""
        a, b = (factor.detach().cpu() for factor in self._adapters.factors(matrix))
        b = b * self._adapters.scale(matrix)
        return (a[None], b[None]) if matrix.experts is None else (a, b)

    def _put(self, wrapper: str, a: Tensor, b: Tensor) -> None:
        """Factors [r, in] and [out, r], or of all experts [E, r, in] and [E, out, r], filled up to the common rank."""
        more = self.rank - b.shape[-1]
        a, b = torch.nn.functional.pad(a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more))
        if a.ndim == 3:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        self.tensors[f"{PREFIX}.{wrapper}.lora_A.weight"] = a.contiguous()
        self.tensors[f"{PREFIX}.{wrapper}.lora_B.weight"] = b.contiguous()

    def _stack(self, gate: AdaptedMatrix, up: AdaptedMatrix, down: AdaptedMatrix) -> None:
        """The experts of a layer as PEFT's two nested wrappers: gate_up inside, down around it."""
        experts = f"model.layers.{gate.name.split('.')[1]}.mlp.experts"
        (gate_a, gate_b), (up_a, up_b) = self._factors(gate), self._factors(up)
        upper = torch.cat([gate_b, torch.zeros_like(gate_b)], dim=2)
        lower = torch.cat([torch.zeros_like(up_b), up_b], dim=2)
        self._put(f"{experts}.base_layer", torch.cat([gate_a, up_a], dim=1), torch.cat([upper, lower], dim=1))
        self._put(experts, *self._factors(down))
        self.parameters += [f"{experts}.gate_up_proj", f"{experts}.down_proj"]
