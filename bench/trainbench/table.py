"""The table that bench/train.py prints."""

from collections.abc import Mapping
from typing import Any

HEAD = (
    f"{'job':18}{'rows':>5}{'full step tok/s':>18}{'spread':>17}{'fwd+bwd tok/s':>15}{'MFU':>7}{'optimizer':>11}"
    f"{'peak GiB':>10}  {'loss'}"
)


def format_results(jobs: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each timed job, then its share by part, then what failed."""
    lines = [HEAD]
    for job, found in jobs.items():
        if "fwd_bwd" not in found and "step" not in found:
            continue
        step, alone = found.get("step"), found.get("fwd_bwd")
        lines.append(
            f"{job:18}{found.get('rows', '-'):>5}"
            f"{_number(step and step['tokens_per_second']):>18}"
            f"{_spread(step):>17}"
            f"{_number(alone and alone['tokens_per_second']):>15}"
            f"{_percent((step or alone or {}).get('mfu')):>7}"
            f"{_percent(found.get('optimizer_share')):>11}"
            f"{found.get('peak_gib', float('nan')):>10.1f}  "
            f"{found.get('loss', float('nan')):.4f}"
        )
    for job, found in jobs.items():
        if "parts" in found:
            shares = "  ".join(f"{part} {share:.1%}" for part, share in found["parts"].items())
            lines.append(f"{job}: {shares}  (device busy {found['busy']:.1%} of the step)")
            lines += [f"    {k['share']:6.1%} {k['calls']:6} x {k['name']}" for k in found.get("kernels", [])]
    for job, found in jobs.items():
        if job == "check" and "variants" in found:
            lines.append(f"check: {'passed' if found.get('passed') else 'FAILED'}, yardstick {found['yardstick']}")
            lines += [f"    {name}: {errors}" for name, errors in found["variants"].items()]
        if job == "limits":
            lines.append(f"limits: { {k: v for k, v in found.items() if k != 'job_seconds'} }")
        if "error" in found:
            lines.append(f"{job}: {found['error']}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _spread(timing: Mapping[str, Any] | None) -> str:
    return "-" if timing is None else f"{timing['slowest']:,.0f}..{timing['fastest']:,.0f}"
