"""One optimizer for a model: Muon on hidden matrices, torch's fused AdamW on the rest."""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trinity.base.dist import local
from trinity.base.rng import derive
from trinity.config import ModelConfig, OptimConfig
from trinity.ops.rounding import stochastic_round_
from trinity.optim.groups import describe, group_parameters
from trinity.optim.muon import Exchange, Muon


class Trained(Protocol):
    """A model, or its adapters."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class MuonAdamW:
    """Steps every trainable parameter; a step can be skipped on the device, without a host sync.

    Of sharded parameters (DTensors) each rank moves its part and keeps the state of its part: AdamW works number by
    number, and `exchange` brings Muon's matrices together.
    """

    def __init__(
        self, model: Trained, config: ModelConfig, settings: OptimConfig, exchange: Exchange | None = None
    ) -> None:
        self.settings = settings
        self.groups = group_parameters(model.named_parameters(), config, settings)
        self.lr_scale = 1.0
        self.stochastic = settings.rounding == "stochastic"
        self.muon = Muon(
            self.groups.muon,
            beta=settings.muon_momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
            coefficients=settings.newton_schulz,
            exchange=exchange,
            stochastic=self.stochastic,
        )
        self._adamw_names = [*self.groups.adamw_decay, *self.groups.adamw_vectors]
        # torch's kernels take no mixture of meshes: they get plain tensors that share the parts' memory. Of bfloat16
        # weights that are rounded by chance they get float32 copies, made anew in every step.
        self._shared = {
            name: (parameter, _part(parameter, widened=self._widens(parameter)))
            for name, parameter in (*self.groups.adamw_decay.items(), *self.groups.adamw_vectors.items())
        }
        self.adamw = torch.optim.AdamW(
            [
                {"params": self._parts(self.groups.adamw_decay), "weight_decay": settings.weight_decay},
                {"params": self._parts(self.groups.adamw_vectors), "weight_decay": 0.0},
            ],
            lr=settings.adamw_lr,
            betas=settings.adamw_betas,
            eps=settings.adamw_eps,
            fused=True,
        )
        self._initialise_adamw()

    def _parts(self, names: Iterable[str]) -> list[nn.Parameter]:
        return [self._shared[name][1] for name in names]

    def _widens(self, parameter: Tensor) -> bool:
        return self.stochastic and parameter.dtype == torch.bfloat16

    def _share(self) -> None:
        """Parts anew, as FSDP may move a parameter's memory once, and the gradients of this step."""
        for parameter, part in self._shared.values():
            if part is not parameter:
                part.data = local(parameter.detach()).to(part.dtype)
                part.grad = None if parameter.grad is None else local(parameter.grad).to(part.dtype)

    def _round(self, number: int) -> None:
        """Bring what has moved in float32 back to the weights, and free it."""
        for name, (parameter, part) in self._shared.items():
            if self._widens(parameter):
                stochastic_round_(local(parameter.detach()), part.data, derive(number, "rounding", name) % 2**31)
                part.data = part.data.new_empty(0)
                part.grad = None

    def _initialise_adamw(self) -> None:
        """Moments at zero from the start, so that a checkpoint always has the same tensors."""
        for group in self.adamw.param_groups:
            for parameter in group["params"]:
                self.adamw.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.contiguous_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.contiguous_format),
                }

    def set_lr(self, scale: float) -> None:
        """Factor on both learning rates from the next step on."""
        self.lr_scale = scale
        for group in self.adamw.param_groups:
            group["lr"] = self.settings.adamw_lr * scale

    @torch.no_grad()
    def step(self, skip: Tensor | None = None, number: int = 0) -> None:
        """Update the parameters from their gradients.

        `number`: of the step, from which the noise of stochastic rounding follows.

        `skip`: scalar on the parameters' device; non-zero leaves every parameter and all state unchanged, whatever the
        gradients hold.
        """
        self.muon.step(self.settings.muon_lr * self.lr_scale, skip, number)
        # The attribute that torch's gradient scaler sets: the fused kernel then changes nothing where it is 1.
        self._share()
        self.adamw.found_inf = None if skip is None else (skip != 0).to(torch.float32)  # pyright: ignore[reportAttributeAccessIssue]
        self.adamw.step()
        self._round(number)

    def zero_grad(self) -> None:
        for matrix in self.groups.muon:
            matrix.parameter.grad = None
        for parameter, part in self._shared.values():
            parameter.grad = part.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Named tensors; references, not copies."""
        state = {f"muon.momentum.{name}": tensor for name, tensor in self.muon.momentum.items()}
        for name, entry in self._adamw_entries():
            state |= {f"adamw.{key}.{name}": entry[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy into the present state. Raises ValueError naming tensors that are missing, unknown or mis-shaped."""
        own = self.state_dict()
        if own.keys() != state.keys():
            missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise ValueError(f"optimizer state does not fit the model: missing {missing[:3]}, unknown {unknown[:3]}")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"optimizer state {name} has shape {list(state[name].shape)}, the model needs {list(tensor.shape)}"
                )
            tensor.copy_(state[name])

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Rows (parameters, shape, count, optimizer, learning rate) for printing."""
        return describe(self.groups, self.settings)

    def _adamw_entries(self) -> list[tuple[str, dict[str, Tensor]]]:
        return [(name, self.adamw.state[self._shared[name][1]]) for name in self._adamw_names]


def _part(parameter: nn.Parameter, *, widened: bool) -> nn.Parameter:
    if widened:
        return nn.Parameter(local(parameter.detach()).float())
    return nn.Parameter(local(parameter.detach())) if isinstance(parameter, DTensor) else parameter


def build_optimizer(
    model: Trained, config: ModelConfig, settings: OptimConfig, exchange: Exchange | None = None
) -> MuonAdamW:
    """The optimizer of a whole or sharded model whose parameters have the names of `trinity.model`, or of its
    adapters."""
    return MuonAdamW(model, config, settings, exchange)
