"""Training of low-rank adapters: the model runs on merged weights, only the factors have an optimizer.

As `precision.MasterWeights` keeps working copies of float32 masters, this keeps working copies of base + adapters,
merged once a step; so every kernel, CUDA graph and the inference engine see plain weights, equal to what is exported.
A micro-batch's gradient of a merged weight becomes the gradient of its factors the moment it is ready, and is freed:
the gradients of all weights never exist together. The price is a product for each adapted matrix as in full training,
and a second copy of the adapted weights.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from trinity.model.lora import Adapters
from trinity.train.precision import KEEP


class _Held(NamedTuple):
    module: nn.Module
    attribute: str
    name: str
    base: Tensor
    working: nn.Parameter
    adapted: bool


class AdaptedWeights:
    """Stands in for `MasterWeights`: the model's parameters are frozen, and adapted ones merged with their factors.

    A base that `dtype` holds without loss is kept in it, any other in float32.
    """

    def __init__(self, model: nn.Module, adapters: Adapters, dtype: torch.dtype, keep: tuple[str, ...] = KEEP) -> None:
        self._model, self._adapters, self._held = model, adapters, list[_Held]()
        touched = adapters.by_parameter
        for prefix, module in model.named_modules():
            for attribute, parameter in list(module.named_parameters(recurse=False)):
                name = f"{prefix}.{attribute}" if prefix else attribute
                kind = parameter.dtype if name.endswith(keep) else dtype
                base = _smallest(parameter.detach(), dtype)
                adapted = name in touched
                working = nn.Parameter(
                    adapters.merge(name, base).to(kind) if adapted else base.to(kind), requires_grad=adapted
                )
                held = _Held(module, attribute, name, base, working, adapted)
                if adapted:
                    working.register_post_accumulate_grad_hook(lambda _, held=held: self._collect(held))
                setattr(module, attribute, working)
                self._held.append(held)
        missing = touched.keys() - {held.name for held in self._held}
        assert not missing, f"the model has no {sorted(missing)[:3]}"

    def trained(self) -> dict[str, Tensor]:
        """What has gradients and an optimizer, by name: the factors."""
        return dict(self._adapters.named_parameters())

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, references: the base by the names of the model, the factors, the buffers."""
        buffers = {name: t for name, t in self._model.state_dict().items() if name not in self._names}
        return {**{held.name: held.base for held in self._held}, **buffers, **self.trained()}

    @property
    def _names(self) -> set[str]:
        return {held.name for held in self._held}

    @torch.no_grad()
    def refresh(self) -> None:
        """Merge anew, after the factors moved."""
        for held in self._held:
            if held.adapted:
                held.working.copy_(self._adapters.merge(held.name, held.base))

    def restore(self) -> None:
        """Give the modules merged float32 parameters."""
        for held in self._held:
            merged = self._adapters.merge(held.name, held.base) if held.adapted else held.base.float()
            setattr(held.module, held.attribute, nn.Parameter(merged))
        self._held.clear()

    def _collect(self, held: _Held) -> None:
        gradient = held.working.grad
        assert gradient is not None
        self._adapters.collect(held.name, gradient)
        held.working.grad = None


def _smallest(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    small = tensor.to(dtype)
    return small.clone() if torch.equal(small.to(tensor.dtype), tensor) else tensor.clone()
