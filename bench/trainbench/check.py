"""Loss and gradients of each variant against the reference path, on equal weights and rows."""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainbench.ours import build_runner, variant_config
from trainbench.shapes import VARIANTS, batches
from trinity.config import RunConfig
from trinity.data.rows import Rows
from trinity.train.losses import to_device
from trinity.train.step import step_share

ROUNDS = 4
"""Micro-batches before the compared one: graphs are recorded at the third of a shape."""
FLOOR = 1e-4
"""Relative differences below this are equal: sums in another order."""


def check_variants(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    device = torch.device(options.device)
    base = variant_config("launched", options, layers=options.check_layers)
    rows = next(batches(options, base))[:2]
    exact = gradients(_changed(base, kernels="reference", dtype="float32"), rows, device)
    rounded = gradients(_changed(base, kernels="reference"), rows, device)
    yardstick = differences(rounded, exact)
    keep({"rows": len(rows), "layers": base.model.num_layers, "yardstick": yardstick})
    chosen = [job for job in options.jobs if job in VARIANTS] or list(VARIANTS)
    found: dict[str, dict[str, Any]] = {}
    for variant in chosen:
        try:
            result = gradients(variant_config(variant, options, layers=options.check_layers), rows, device)
        except Exception as error:  # the other variants are still worth knowing; the whole check fails below
            found[variant] = {"error": f"{type(error).__name__}: {error}"[:600], "within": False}
        else:
            errors = differences(result, exact)
            quantised = VARIANTS[variant].get("fp8") == "true"
            found[variant] = errors | {"within": within_fp8(errors) if quantised else within(errors, yardstick)}
        keep({"variants": found})
    keep({"passed": all(errors["within"] for errors in found.values())})


def _changed(config: RunConfig, **runtime: Any) -> RunConfig:
    changes = {"compile": False, "cuda_graphs": False, **runtime}
    return config.model_copy(update={"runtime": config.runtime.model_copy(update=changes)})


def gradients(config: RunConfig, rows: Rows, device: torch.device) -> dict[str, Tensor]:
    """Gradients by name, and the loss, on the CPU in float32."""
    runner = build_runner(config, device)
    batch, share = to_device(rows, device), step_share([rows], device)
    loss = None
    for _ in range(ROUNDS):
        runner.launcher.begin(runner.optimizer.zero_grad)
        loss = runner.launcher.run(batch, share).loss
    assert loss is not None
    found = {"loss": loss.float().cpu()}
    for name, parameter in runner.masters.trained().items():
        gradient = parameter.grad
        assert gradient is not None, f"{name} has no gradient"
        found[name] = gradient.float().cpu()
    runner.masters.restore()
    del runner, batch
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def differences(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Any]:
    """Relative difference of the loss and of each gradient (norm of the difference over norm): median, worst."""
    errors = {
        name: float((found[name] - gradient).norm() / gradient.norm().clamp(min=1e-30))
        for name, gradient in exact.items()
        if name != "loss"
    }
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return {
        "loss": float((found["loss"] - exact["loss"]).abs() / exact["loss"].abs()),
        "median": statistics.median(errors.values()),
        "worst": errors[worst],
        "worst_name": worst,
    }


def within(errors: dict[str, Any], yardstick: dict[str, Any]) -> bool:
    """Not further from float32 than half as far again (the worst parameter: twice) as the reference in bfloat16."""
    return (
        errors["loss"] <= 2 * yardstick["loss"] + FLOOR
        and errors["median"] <= 1.5 * yardstick["median"] + FLOOR
        and errors["worst"] <= 2 * yardstick["worst"] + FLOOR
    )


def within_fp8(errors: dict[str, Any]) -> bool:
    """What three bits of mantissa may do: a product of rounded numbers is a few per cent off, and errors add up."""
    return errors["loss"] <= 1e-2 and errors["median"] <= 0.15 and errors["worst"] <= 0.5
