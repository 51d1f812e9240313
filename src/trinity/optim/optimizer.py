"""One optimizer for a model: Muon on hidden matrices, torch's fused AdamW on the rest."""

import torch
from torch import Tensor, nn

from trinity.config import ModelConfig, OptimConfig
from trinity.optim.groups import describe, group_parameters
from trinity.optim.muon import Muon


class MuonAdamW:
    """Steps every trainable parameter; a step can be skipped on the device, without a host sync."""

    def __init__(self, model: nn.Module, config: ModelConfig, settings: OptimConfig) -> None:
        self.settings = settings
        self.groups = group_parameters(model.named_parameters(), config, settings)
        self.lr_scale = 1.0
        self.muon = Muon(
            self.groups.muon,
            beta=settings.muon_momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
            coefficients=settings.newton_schulz,
        )
        self._adamw_names = [*self.groups.adamw_decay, *self.groups.adamw_vectors]
        self.adamw = torch.optim.AdamW(
            [
                {"params": list(self.groups.adamw_decay.values()), "weight_decay": settings.weight_decay},
                {"params": list(self.groups.adamw_vectors.values()), "weight_decay": 0.0},
            ],
            lr=settings.adamw_lr,
            betas=settings.adamw_betas,
            eps=settings.adamw_eps,
            fused=True,
        )
        self._initialise_adamw()

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
    def step(self, skip: Tensor | None = None) -> None:
        """Update the parameters from their gradients.

        `skip`: scalar on the parameters' device; non-zero leaves every parameter and all state unchanged, whatever the
        gradients hold.
        """
        self.muon.step(self.settings.muon_lr * self.lr_scale, skip)
        # The attribute that torch's gradient scaler sets: the fused kernel then changes nothing where it is 1.
        self.adamw.found_inf = None if skip is None else (skip != 0).to(torch.float32)  # pyright: ignore[reportAttributeAccessIssue]
        self.adamw.step()

    def zero_grad(self) -> None:
        for matrix in self.groups.muon:
            matrix.parameter.grad = None
        self.adamw.zero_grad(set_to_none=True)

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
        parameters = [*self.groups.adamw_decay.values(), *self.groups.adamw_vectors.values()]
        return [(n, self.adamw.state[p]) for n, p in zip(self._adamw_names, parameters, strict=True)]


def build_optimizer(model: nn.Module, config: ModelConfig, settings: OptimConfig) -> MuonAdamW:
    """The optimizer of a whole model whose parameters have the names of `trinity.model`."""
    return MuonAdamW(model, config, settings)
