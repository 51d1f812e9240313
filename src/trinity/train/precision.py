"""bfloat16 compute with float32 weights: each parameter gets a bfloat16 working copy that the model runs on.

The optimizer moves the float32 masters. A micro-batch's bfloat16 gradient is added to the master's float32 gradient
the moment it is ready and freed, so accumulation loses nothing; the working copies are refreshed once a step rather
than cast in every forward.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from trinity.ops.accumulate import accumulate_

KEEP = ("router.weight",)
"""Endings of names that stay float32: rounded router logits would tie."""


class _Pair(NamedTuple):
    module: nn.Module
    attribute: str
    name: str
    master: nn.Parameter
    working: nn.Parameter


class MasterWeights:
    """Holds the float32 masters of a model while its modules carry working copies of `dtype`.

    Buffers keep their type. Build the optimizer over the model's parameters before this. With the type float32
    nothing changes.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, keep: tuple[str, ...] = KEEP) -> None:
        self._model = model
        self._pairs: list[_Pair] = []
        for prefix, module in model.named_modules():
            for attribute, master in list(module.named_parameters(recurse=False)):
                name = f"{prefix}.{attribute}" if prefix else attribute
                if master.dtype == torch.float32 and dtype != torch.float32 and not name.endswith(keep):
                    working = nn.Parameter(master.detach().to(dtype), requires_grad=master.requires_grad)
                    pair = _Pair(module, attribute, name, master, working)
                    if master.requires_grad:
                        working.register_post_accumulate_grad_hook(lambda _, pair=pair: _collect(pair))
                    setattr(module, attribute, working)
                    self._pairs.append(pair)

    def masters(self) -> dict[str, Tensor]:
        """The float32 parameters by name; those without a working copy are not among them."""
        return {pair.name: pair.master for pair in self._pairs}

    def trained(self) -> dict[str, Tensor]:
        """What has gradients and an optimizer, by name: every trainable parameter, masters where there are any."""
        masters = self.masters()
        named = {name: masters.get(name, working) for name, working in self._model.named_parameters()}
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, references: parameters and persistent buffers by name, masters in place of their
        working copies."""
        return {**self._model.state_dict(), **self.masters()}

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into the working copies, after they moved."""
        if self._pairs:
            torch._foreach_copy_([pair.working for pair in self._pairs], [pair.master for pair in self._pairs])

    def restore(self) -> None:
        """Give the modules their float32 parameters back."""
        for pair in self._pairs:
            setattr(pair.module, pair.attribute, pair.master)
        self._pairs.clear()


def _collect(pair: _Pair) -> None:
    gradient = pair.working.grad
    assert gradient is not None
    if pair.master.grad is None:
        pair.master.grad = gradient.float()
    else:
        accumulate_(pair.master.grad, gradient)
    pair.working.grad = None
