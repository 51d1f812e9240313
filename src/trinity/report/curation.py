"""The page of a curation: counts by stage, reasons for drops, use, domain shift, samples side by side. No script."""

from importlib import resources
from pathlib import Path
from typing import Any

from trinity import __version__
from trinity.base.console import duration, quantity
from trinity.base.files import atomic_write, read_json

CURATED = "curated.json"
MOST_REASONS = 40
NAMES = {
    "read": "Read",
    "normalise": "Normalise",
    "filter": "Language and quality filters",
    "exact duplicates": "Exact duplicates",
    "near duplicates": "Near duplicates",
    "rephrase": "Rephrase",
    "validate": "Validate",
    "label": "Label and write",
    "write": "Write",
}


def write_curation(out: Path) -> Path:
    """Write `report.html` of a curation from its `curated.json`; returns its path. Raises UserError without one."""
    html = render_curation(read_json(out / CURATED), out.resolve().name)
    path = out / "report.html"
    with atomic_write(path, "w") as file:
        file.write(html)
    return path


def render_curation(found: dict[str, Any], name: str) -> str:
    """The page as text; everything that data or a model wrote is escaped."""
    from jinja2 import Environment
    from markupsafe import Markup

    folder = resources.files("trinity.report")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "curation.html").read_text(encoding="utf-8"))
    return template.render(
        name=name,
        version=__version__,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        cards=_cards(found),
        notice=found["stopped"],
        stages=_stages(found["stages"]),
        reasons=_reasons(found["stages"]),
        troubles=_bars(found["troubles"]),
        shift=_shift(found["domains"]),
        divergence=found["word_divergence"],
        quality=found["quality"],
        samples=found["samples"],
        tokens_by=found["tokens_by"],
    )


def _cards(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    use, stages = found["use"], found["stages"]
    first = next(iter(stages.values()))
    cards = [
        ("Documents read", f"{first['in']:,}", f"{quantity(first['tokens_in'])} tokens"),
        ("Documents written", f"{found['documents']:,}", f"{quantity(found['tokens'])} tokens"),
    ]
    if "rephrase" in stages:
        asked = stages["rephrase"]
        kept = stages["validate"]["out"] if "validate" in stages else asked["out"]
        cards.append(("Rewrites kept", f"{kept / max(1, asked['in']):.1%}", f"{kept:,} of {asked['in']:,} requests"))
        seconds = max(found["seconds_of_last_call"], 1e-9)
        cards.append(
            ("Tokens generated", quantity(use["completion_tokens"]), f"{quantity(use['prompt_tokens'])} of prompts")
        )
        cards.append(
            ("Last call", duration(seconds), f"{asked['seconds'] / max(1, asked['out']):.2f} s an answer on average")
        )
        cards.append(("Cost", f"{use['money']:.2f}", f"{use['attempts']:,} calls"))
    return cards


def _stages(stages: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "name": NAMES.get(stage, stage),
            "unit": "requests" if stage == "rephrase" else "answers" if stage == "validate" else "documents",
            "in": f"{value['in']:,}",
            "out": f"{value['out']:,}",
            "dropped": f"{sum(value['drops'].values()):,}",
            "share": 100 * value["out"] / value["in"] if value["in"] else 0.0,
            "tokens_in": quantity(value["tokens_in"]),
            "tokens_out": quantity(value["tokens_out"]),
            "seconds": duration(value["seconds"]),
            "speed": f"{value['in'] / value['seconds']:,.0f}" if value["seconds"] > 0.01 else "",
        }
        for stage, value in stages.items()
    ]


def _reasons(stages: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [
        {
            "stage": NAMES.get(stage, stage),
            "reason": reason,
            "count": count,
            "share": 100 * count / value["in"],
            "example": next(iter(value["examples"].get(reason, [])), ""),
        }
        for stage, value in stages.items()
        for reason, count in value["drops"].items()
    ]
    return rows[:MOST_REASONS]


def _bars(counts: dict[str, int]) -> list[tuple[str, int, float]]:
    most = max(counts.values(), default=1)
    return [(name, count, 100 * count / most) for name, count in counts.items()]


def _shift(domains: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    totals = {side: max(1, sum(entry["tokens"] for entry in found.values())) for side, found in domains.items()}
    rows = []
    for domain in sorted({*domains["before"], *domains["after"]}):
        row: dict[str, Any] = {"domain": domain}
        for side in ("before", "after"):
            entry = domains[side].get(domain)
            row[side] = 100 * entry["tokens"] / totals[side] if entry else 0.0
            row[f"{side}_documents"] = entry["documents"] if entry else 0
        row["quality"] = (domains["after"].get(domain) or {}).get("quality")
        rows.append(row)
    return rows
