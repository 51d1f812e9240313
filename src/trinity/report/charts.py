"""The charts of the page as data: which recorded values stand on which chart, and under which words."""

import base64
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from trinity.report.read import Stage
from trinity.report.series import POINTS, envelope, is_number, is_step, rounded

MAX_MARKS = 240
"""Event marks on the time axis of a stage at most."""


class Chart(NamedTuple):
    """A place for a chart on the page; `id` is the key into a stage's data."""

    id: str
    title: str
    note: str
    wide: bool = False


LEARNING = (
    Chart(
        "loss",
        "Loss",
        "Training loss per optimizer step, the range inside each bucket, and held-out evaluations.",
        True,
    ),
    Chart("bits_per_byte", "Bits per byte by domain", "Held-out text; comparable between tokenizers."),
    Chart("lr_scale", "Learning rate", "Factor on the peak learning rates of both optimizers."),
)
EXPERTS = (
    Chart(
        "max_vio",
        "Load imbalance (MaxVio)",
        "Load of the busiest expert over the mean, less one. Mean over layers and worst layer.",
    ),
    Chart("dead_experts", "Dead experts", "Experts that had no token for many steps in a row, summed over layers."),
    Chart("bias", "Expert bias, range", "Smallest and largest selection bias over all layers."),
    Chart("bias_norm", "Expert bias, norm", "Euclidean norm of a layer's biases: mean over layers and largest."),
    Chart("router", "Router logits", "Smallest and largest router logit over all layers."),
    Chart(
        "load_entropy",
        "Load entropy",
        "Entropy of the load over experts, 1 when it is even: mean over layers and lowest.",
    ),
)
STABILITY = (
    Chart("grad_norm", "Gradient norm", "Global norm before clipping."),
    Chart("logit_max", "Largest logit", "Largest LM-head logit of a step."),
    Chart("batch_het", "Batch heterogeneity (BatchHet)", "Largest micro-batch loss less the mean of the step."),
    Chart("aux", "Auxiliary losses", "z-loss and sequence-wise balance loss, as recorded."),
)
SPEED = (
    Chart("tokens_per_second", "Throughput", "Tokens per second, all ranks."),
    Chart("mfu", "Model FLOP utilisation", "Share of the device's peak."),
)
REWARD = (
    Chart("reward", "Reward", "Mean reward of a step's samples; the band is one standard deviation.", True),
    Chart("length", "Sample length", "Tokens per sample that the policy wrote."),
    Chart("policy_entropy", "Entropy", "Mean entropy of the policy over the tokens that it wrote, in nats."),
    Chart(
        "kl_gap",
        "Sampler against trainer",
        "Divergence between the policy that sampled and the one that learns; where it was compared before an update, "
        "with the sampler's experts replayed and without.",
    ),
    Chart(
        "kl_start", "Distance from the start", "Divergence of the policy from the weights that the stage started from."
    ),
    Chart("clip_fraction", "Clipped and truncated", "Share of tokens: ratio clipped, importance weight truncated."),
    Chart("informative", "Answers and groups", "Share of answers that ended by themselves, of groups that teach."),
)
NIAH = Chart("niah", "MK-NIAH over training", "Mean score over all lengths and depths.", True)
LAYER_HEATS = (
    ("max_vio_layers", "MaxVio", "mean"),
    ("load_entropy", "Load entropy", "mean"),
    ("dead_experts", "Dead experts", "max"),
    ("bias_norm", "Bias norm", "mean"),
    ("bias_min", "Smallest bias", "min"),
    ("bias_max", "Largest bias", "max"),
    ("router_min", "Smallest router logit", "min"),
    ("router_max", "Largest router logit", "max"),
)


def stage_charts(stage: Stage) -> dict[str, Any]:
    """JSON-able data of one stage: axes, phase bands, event marks, curves by chart id, heat maps, expert loads."""
    charts: dict[str, Any] = {}

    def put(chart: str, curves: Iterable[dict[str, Any] | None], **options: Any) -> None:
        found = [c for c in curves if c is not None]
        if found:
            charts[chart] = {"curves": found, **options}

    line = _Lines(stage)
    put("loss", [line("loss", "training"), _points(stage.evals, "loss", "held-out")], log=True, marks=True)
    put("bits_per_byte", _domains(stage.evals))
    put("lr_scale", [line("lr_scale", "scale", plain=True)], zero=True)
    put(
        "max_vio",
        [
            line("max_vio", "mean", value_of="max_vio_layers"),
            line.layer("max_vio_layers", "worst layer", "max", np.nanmax),
        ],
        zero=True,
        log=True,
    )
    put("dead_experts", [line.layer("dead_experts", "experts", "max", np.nansum)], zero=True, format="int")
    put("bias", [line.span("bias_min", "bias_max", "range")])
    put(
        "bias_norm",
        [line.layer("bias_norm", "mean", "mean", np.nanmean), line.layer("bias_norm", "largest", "max", np.nanmax)],
        zero=True,
    )
    put("router", [line.span("router_min", "router_max", "range")])
    put(
        "load_entropy",
        [
            line.layer("load_entropy", "mean", "mean", np.nanmean),
            line.layer("load_entropy", "lowest", "min", np.nanmin),
        ],
    )
    put("grad_norm", [line("grad_norm", "norm")], log=True, start_log=True)
    put("logit_max", [line("logit_max", "largest"), line("logit_mean", "mean")])
    put("batch_het", [line("batch_het", "BatchHet")], zero=True)
    put("aux", [line("z_loss", "z-loss"), line("sequence_loss", "sequence loss")], log=True)
    put("tokens_per_second", [line("tokens_per_second", "tokens/s")], zero=True, format="count")
    put("mfu", [line("mfu", "MFU")], zero=True, format="percent")
    put("reward", [_reward(stage)])
    put("length", [line("length", "tokens")], zero=True)
    put("policy_entropy", [line("policy_entropy", "nats")], zero=True)
    gaps = [line("kl_gap", "in the update"), line("gap_replayed", "replayed"), line("gap_free", "without replay")]
    put("kl_gap", gaps)
    put("kl_start", [line("kl_start", "nats")], zero=True)
    cuts = [line("clip_fraction", "clipped"), line("truncated_fraction", "truncated")]
    put("clip_fraction", cuts, zero=True, format="percent")
    put(
        "informative",
        [line("finished", "answers ended"), line("informative", "groups that teach")],
        zero=True,
        format="percent",
    )
    put("niah", [_points(stage.niah, "score", "MK-NIAH", joined=True)], unit=True, format="percent")
    return {
        "name": stage.name,
        "title": stage.title,
        "axis": _axis(stage),
        "bands": _bands(stage),
        "marks": _marks(stage),
        "charts": charts,
        "heats": _heats(stage),
        "load": _load(stage),
    }


class _Lines:
    """Curves of one stage."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __call__(
        self, name: str, label: str, *, plain: bool = False, value_of: str | None = None
    ) -> dict[str, Any] | None:
        """A scalar; without its own record, the mean over layers of `value_of`."""
        values = self._stage.scalars.get(name)
        if values is None:
            return None if value_of is None else self.layer(value_of, label, "mean", np.nanmean)
        curve = envelope(self._stage.step_N, values, smoothed=not plain)
        return None if curve is None else {"label": label, **curve}

    def layer(self, name: str, label: str, how: str, over_layers: Any) -> dict[str, Any] | None:
        """A per-layer value, reduced over time by `how` and over layers by `over_layers`."""
        folded = self._stage.layers.get(name)
        if not folded:
            return None
        values = folded.values(how)
        seen = np.isfinite(values).any(axis=1)
        if not seen.any():
            return None
        return {"label": label, "x": rounded(folded.steps[seen], 9), "y": rounded(over_layers(values[seen], axis=1))}

    def span(self, low: str, high: str, label: str) -> dict[str, Any] | None:
        """A band from the smallest `low` to the largest `high` over layers."""
        bottom, top = self.layer(low, label, "min", np.nanmin), self.layer(high, label, "max", np.nanmax)
        if bottom is None or top is None or bottom["x"] != top["x"]:
            return None
        return {"label": label, "x": bottom["x"], "lo": bottom["y"], "hi": top["y"], "kind": "span"}


def _points(records: list[dict[str, Any]], key: str, label: str, *, joined: bool = False) -> dict[str, Any] | None:
    pairs = [(r["step"], r[key]) for r in records if is_number(r.get(key))]
    if not pairs:
        return None
    picks = np.unique(np.linspace(0, len(pairs) - 1, min(POINTS, len(pairs))).round().astype(int))
    x, y = zip(*(pairs[i] for i in picks), strict=True)
    return {"label": label, "x": list(x), "y": rounded(y), "kind": "joined" if joined else "points"}


def _domains(evals: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    names: dict[str, None] = {}
    for record in evals:
        if isinstance(record.get("domains"), dict):
            names.update(dict.fromkeys(record["domains"]))
    curves = [_points(evals, "bits_per_byte", "all", joined=True)]
    for name in list(names)[:11]:
        rows = [
            {"step": r["step"], "y": r["domains"][name].get("bits_per_byte")}
            for r in evals
            if isinstance(r.get("domains"), dict) and isinstance(r["domains"].get(name), dict)
        ]
        curves.append(_points(rows, "y", name, joined=True))
    return curves


def _reward(stage: Stage) -> dict[str, Any] | None:
    mean, deviation = stage.scalars.get("reward"), stage.scalars.get("reward_std")
    if mean is None:
        return None
    curve = envelope(stage.step_N, mean)
    if curve is None:
        return None
    if deviation is not None and np.isfinite(deviation).any():
        spread = envelope(stage.step_N, np.where(np.isfinite(mean), np.nan_to_num(deviation), np.nan), smoothed=False)
        assert spread is not None
        assert len(spread["y"]) == len(curve["y"])
        curve["lo"] = rounded(np.array(curve["y"]) - np.array(spread["y"]))
        curve["hi"] = rounded(np.array(curve["y"]) + np.array(spread["y"]))
    return {"label": "mean", **curve}


def _axis(stage: Stage) -> dict[str, list[Any]]:
    """Steps and, where recorded, the tokens and hours at these steps: the page interpolates between them."""
    if stage.step_N.size == 0:
        return {"step": []}
    picks = np.unique(np.linspace(0, stage.step_N.size - 1, min(200, stage.step_N.size)).round().astype(int))
    axis = {"step": rounded(stage.step_N[picks], 9)}
    tokens, seconds = stage.scalars.get("tokens"), stage.scalars.get("seconds")
    if tokens is not None and np.isfinite(tokens[picks]).all():
        axis["tokens"] = rounded(tokens[picks], 7)
    if seconds is not None:
        axis["hours"] = rounded(np.cumsum(np.nan_to_num(seconds))[picks] / 3600, 6)
    return axis


def _bands(stage: Stage) -> list[dict[str, Any]]:
    if not stage.phases or stage.step_N.size == 0:
        return []
    starts = [step for step, _ in stage.phases]
    ends = [*starts[1:], int(stage.step_N[-1])]
    return [{"from": a, "to": b, "name": name} for a, b, (_, name) in zip(starts, ends, stage.phases, strict=True)][:24]


def _marks(stage: Stage) -> list[dict[str, Any]]:
    """Events for the time axis; when there are too many, checkpoints go first."""
    kinds = ("skip", "rollback", "jump", "resume", "stop", "dead_expert", "checkpoint")
    found = [e for e in stage.events if e["event"] in kinds and is_step(e.get("step"))]
    if len(found) > MAX_MARKS:
        found = [e for e in found if e["event"] != "checkpoint"][:MAX_MARKS]
    return [{"x": e["step"], "kind": e["event"]} for e in found]


def _heats(stage: Stage) -> list[dict[str, Any]]:
    heats = []
    for name, title, how in LAYER_HEATS:
        folded = stage.layers.get(name)
        if folded and np.isfinite(folded.values(how)).any():
            heats.append({"title": title, "x": rounded(folded.steps, 9), **_bytes(folded.values(how).T)})
    return heats


def _bytes(values_LS: np.ndarray) -> dict[str, Any]:
    """Values as bytes: 0 where there is none, else 1..255 evenly from the smallest to the largest."""
    low, high = float(np.nanmin(values_LS)), float(np.nanmax(values_LS))
    share = (values_LS - low) / (high - low) if high > low else np.where(np.isfinite(values_LS), 0.5, np.nan)
    code = np.nan_to_num(1 + np.round(254 * share), nan=0.0).astype(np.uint8)
    data = base64.b64encode(code.tobytes()).decode()
    return {"rows": len(code), "low": low, "high": high, "data": data}


def _load(stage: Stage) -> dict[str, Any] | None:
    """Expert loads as bytes: 0 for no token at all, else 128 + 127 * log2(load) / 3, cut to 1..255."""
    if not stage.loads:
        return None
    load_SLE = np.stack([load for _, load in stage.loads])
    with np.errstate(divide="ignore", invalid="ignore"):
        code = np.clip(np.round(128 + 127 * np.log2(load_SLE) / math.log2(8)), 1, 255)
    code = np.where(load_SLE > 0, np.nan_to_num(code, nan=128.0), 0).astype(np.uint8)
    dense = (
        stage.settings.get("model", {}).get("num_dense_layers", 0)
        if isinstance(stage.settings.get("model"), dict)
        else 0
    )
    return {
        "steps": [step for step, _ in stage.loads],
        "layers": load_SLE.shape[1],
        "experts": load_SLE.shape[2],
        "first": dense if isinstance(dense, int) else 0,
        "data": base64.b64encode(code.tobytes()).decode(),
    }
