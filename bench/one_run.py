"""One pretraining run of an experiment, in a process of its own; `bench/experiment.py` starts these.

    python bench/one_run.py demo [key=value ...] --overlay bench/small.toml --run-dir DIR

It is `trinity pretrain` with one addition and two things left out. The expert biases after every step, which
metrics.jsonl sums up only, are kept as `biases.npy`, float32 [steps, MoE layers, experts]. No samples are generated,
and the held-out loss is not taken before the first step: nothing of an experiment needs them.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trinity.config import BalanceConfig, resolve
from trinity.model.balance import apply_balance
from trinity.stages import pretrain
from trinity.stages.evaluations import heldout_evaluation
from trinity.train import step
from trinity.train.job import Evaluation


class BiasTrace:
    """Stands in for `apply_balance` and keeps a copy of every layer's biases on the device after each call."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, model: nn.Module, counts_LE: Tensor, settings: BalanceConfig, **more: Tensor | None) -> None:
        apply_balance(model, counts_LE, settings, **more)
        biases = [buffer for name, buffer in model.named_buffers() if name.endswith("moe.router.bias")]
        self.steps.append(torch.stack(biases))

    def save(self, path: Path) -> None:
        if self.steps:
            np.save(path, torch.stack(self.steps).cpu().numpy())


def only_at_the_end(*arguments: Any) -> Evaluation:
    """The held-out evaluation without its start."""
    return replace(heldout_evaluation(*arguments), at_start=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--overlay", type=Path, action="append", default=[])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    config, _ = resolve(options.preset, options.overlay, options.settings)
    trace = BiasTrace()
    step.apply_balance = trace
    pretrain.heldout_evaluation = only_at_the_end
    pretrain.beginnings = lambda _shards, _most=0: []  # no prompts
    try:
        pretrain.run(config, options.run_dir)
    finally:  # a run that diverged is of interest too
        trace.save(options.run_dir / "biases.npy")


if __name__ == "__main__":
    main()
