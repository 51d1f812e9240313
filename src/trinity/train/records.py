"""What the loop writes down of a step: its record in metrics.jsonl, and its documents for events."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trinity.base import dist
from trinity.optim.schedule import PlannedStep
from trinity.train.job import Record, TrainJob
from trinity.train.metrics import LOAD_EVERY, Packed, load_share, routing_fields

MAX_DOCUMENTS = 256
"""Documents that an event names at most, those of the worst micro-batches first."""


@dataclass(frozen=True)
class InFlight:
    """A step whose numbers have not arrived yet."""

    planned: PlannedStep
    rows: Sequence[Any]
    packed: Packed
    started: float
    """When its data were asked for, on the host's clock."""


def step_head(job: TrainJob, planned: PlannedStep) -> Record:
    """The fields that are known before a step; `step` and `tokens` count what is done after it."""
    return {
        "kind": "step",
        "stage": job.stage,
        "phase": planned.phase,
        "step": planned.step + 1,
        "tokens": planned.tokens_before + planned.rows * job.stage_config.seq_len,
        "rows": planned.rows,
        "lr_scale": planned.lr_scale,
    }


def step_record(
    job: TrainJob,
    flight: InFlight,
    values: dict[str, Any],
    seconds: float,
    utilisation: float,
    dead_L: list[int],
    spikes: int,
) -> Record:
    """The record of a step whose numbers `values` were read from the device.

    `utilisation` is MFU per token and second; `spikes` counts the steps skipped so far, this one included.
    """
    planned, counts_LE = flight.planned, values["counts"]
    tokens_per_second = planned.rows * job.stage_config.seq_len / seconds
    apart = {"counts", "mean_sum", "micro_batches", "mean_max", "skip", "means", "router_negated_min"}
    record = {
        **step_head(job, planned),
        **{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items() if k not in apart},
        "router_min": [-x for x in np.asarray(values.get("router_negated_min", [])).tolist()],
        "batch_het": values["mean_max"] - values["mean_sum"] / values["micro_batches"],
        **routing_fields(counts_LE),
        "dead_experts": dead_L,
        "skipped": values["skip"] != 0,
        "spikes": spikes,
        "seconds": seconds,
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * utilisation,
    }
    if counts_LE.size and (planned.step + 1) % LOAD_EVERY == 0:
        record["load"] = load_share(counts_LE)
    if job.step_fields is not None:
        record |= job.step_fields(planned.step, flight.rows)
    return record


def documents(job: TrainJob, rows: Sequence[Any], means: np.ndarray | None) -> Record:
    """A step's documents over all ranks: of micro-batches without a finite loss, else of all, the worst first."""
    if job.describe is None:
        return {}
    order = list(range(len(rows)))
    if means is not None:
        broken = [i for i in order if not np.isfinite(means[i])]
        order = broken or sorted(order, key=lambda i: -means[i])
    mine = [document for i in order for document in job.describe(rows[i])]
    everyone = [document for part in dist.gather_objects(mine) for document in part]
    return {"documents": everyone[:MAX_DOCUMENTS], "num_documents": len(everyone)}
