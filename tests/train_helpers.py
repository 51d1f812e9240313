"""A real model, small enough for a step in milliseconds, and a source of made-up documents for the tests of training.

Run as a program it trains in a given directory, for the tests that kill it.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trinity.base import dist
from trinity.base.errors import UserError
from trinity.base.rundir import RunDir
from trinity.config import RunConfig, resolve
from trinity.data.rows import Chunk, Rows, empty_rows, finish_row
from trinity.model.transformer import Transformer
from trinity.optim.optimizer import build_optimizer
from trinity.optim.schedule import StepPlan
from trinity.train import LossOutput, TrainJob, language_model_loss, train

SMALL = (
    "model={vocab_size=61, num_layers=4, num_dense_layers=1, dim=16, num_heads=2, num_kv_heads=1, head_dim=8,"
    " ffn_dim=24, expert_dim=8, num_experts=4, experts_per_token=2, window=8, max_positions=64}",
    "pretrain.seq_len=16",
    "pretrain.micro_rows=2",
    "pretrain.warmup_steps=2",
    'pretrain.phases=[{name="a", tokens=640, weights={x=1.0}}, {name="b", tokens=640, weights={x=1.0}}]',
    "pretrain.batch=[{from_tokens=0, rows=4}]",
    "checkpoint.every_steps=5",
    "runtime.threads=1",
)
STEPS = 20


def small_config(*overrides: str) -> RunConfig:
    """Settings of 20 steps of 4 rows of 16 tokens in two phases, a checkpoint every 5 steps."""
    return resolve("demo", overrides=(*SMALL, *overrides))[0]


class MadeUpSource:
    """Batches drawn from a generator whose state is the number of batches handed out; one document a row."""

    def __init__(self, config: RunConfig, plan: StepPlan) -> None:
        self.config, self.plan, self.handed_out = config, plan, 0

    def next_batch(self, step: int) -> list[Rows]:
        settings = self.config.pretrain
        draws = np.random.default_rng([7, self.handed_out])
        rows = empty_rows(self.plan[step].rows, settings.seq_len)
        for row in range(len(rows)):  # the same on every rank, which then takes its own
            start = draws.integers(0, 40)
            rows.tokens_BT[row] = (start + np.arange(settings.seq_len)) % self.config.model.vocab_size
            rows.targets_BT[row] = (rows.tokens_BT[row] + 1) % self.config.model.vocab_size
            rows.targets_BT[row, : draws.integers(0, 4)] = -100
            finish_row(rows, row, [Chunk(self.handed_out * 100 + row, 0, settings.seq_len)])
        self.handed_out += 1
        mine = rows[dist.rank() :: dist.world_size()]
        return mine.split(settings.micro_rows)

    def state_dict(self) -> dict[str, Any]:
        return {"handed_out": self.handed_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.handed_out = state["handed_out"]

    @staticmethod
    def describe(rows: Rows) -> list[dict[str, Any]]:
        chunks = [chunk for chunks in rows.documents for chunk in chunks]
        return [{"source": "made-up", "id": str(c.doc), "domain": "x", "offset": c.start} for c in chunks]


def small_job(path: Path, config: RunConfig | None = None, **changes: Any) -> TrainJob:
    config = config or small_config()
    plan = StepPlan.pretrain(config.pretrain)
    model = Transformer(config.model)
    model.init_weights(0)
    job = TrainJob(
        config=config,
        stage="pretrain",
        stage_config=config.pretrain,
        model=model,
        optimizer=build_optimizer(model, config.model, config.optim),
        source=MadeUpSource(config, plan),
        loss=language_model_loss,
        plan=plan,
        run_dir=RunDir(path),
        describe=MadeUpSource.describe,
        fingerprints={"tokenizer": "t", "shards": "s"},
    )
    return replace(job, **changes)


Poison = Callable[[set[int], LossOutput], LossOutput]


class PoisonedLoss:
    """The language model loss, changed by `poison` for micro-batches that hold a token of the poisoned batches."""

    def __init__(self, source: MadeUpSource, batches: Sequence[int], kind: str) -> None:
        self.source, self.batches, self.kind = source, set(batches), kind

    def __call__(self, model: Any, batch: Any, share: Any, settings: Any) -> LossOutput:
        output = language_model_loss(model, batch, share, settings)
        if self.source.handed_out - 1 not in self.batches:
            return output
        factor = {"nan": float("nan"), "huge": 1000.0}[self.kind]
        scaled = output.loss * factor
        if self.kind == "huge":  # the gradient alone
            scaled = scaled - (scaled - output.loss).detach()
        return replace(output, loss=scaled)


def numbers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Step records without what depends on the clock."""
    clock = {"seconds", "tokens_per_second", "mfu"}
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


def weights(job: TrainJob) -> dict[str, torch.Tensor]:
    """Copies of parameters, buffers and optimizer state."""
    state = {**job.model.state_dict(), **{f"optimizer {k}": v for k, v in job.optimizer.state_dict().items()}}
    return {name: tensor.clone() for name, tensor in state.items()}


class _Slow(MadeUpSource):
    """Hands out a batch only after a while, so that a signal finds the run in the middle."""

    pause = 0.02

    def next_batch(self, step: int) -> list[Rows]:
        time.sleep(self.pause)
        return super().next_batch(step)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--store", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = small_config(*arguments.overrides)
    job = small_job(arguments.path, config, source=_Slow(config, StepPlan.pretrain(config.pretrain)))
    print("ready", flush=True)
    if arguments.ranks > 1:
        store = torch.distributed.FileStore(str(arguments.store), arguments.ranks)
        torch.distributed.init_process_group("gloo", store=store, rank=arguments.rank, world_size=arguments.ranks)
    try:
        result = train(job)
    except UserError as error:
        sys.exit(str(error))
    finally:
        if arguments.ranks > 1:
            torch.distributed.destroy_process_group()
    print(result.reason, flush=True)
    sys.exit(0 if result.finished else 3)


if __name__ == "__main__":
    main()
