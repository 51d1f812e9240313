"""One self-contained HTML page from a run: no network, no asset beside it, and no text of a run that could run.

The page's Content-Security-Policy allows the one script whose hash it names; the run's texts are escaped as well.
"""

import base64
import hashlib
import json
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from trinity import __version__
from trinity.base.files import atomic_write
from trinity.report import charts, tables
from trinity.report.curation import CURATED, write_curation
from trinity.report.read import Run, read_run

SECTIONS = (
    ("learning", "Learning"),
    ("experts", "Experts"),
    ("stability", "Stability"),
    ("speed", "Speed"),
    ("retrieval", "Retrieval"),
    ("reward", "RL"),
    ("scores", "Scores"),
    ("samples", "Samples"),
    ("events", "Events"),
    ("settings", "Settings"),
)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory, a pipeline directory or a curation; returns its path.

    Works on unfinished, killed and damaged runs: what is missing is named on the page. An earlier report of the same
    directory is replaced. Raises UserError when the directory holds no run.
    """
    run_dir = Path(run_dir)
    if (run_dir / CURATED).exists():
        return write_curation(run_dir)
    html = render(read_run(run_dir))
    path = run_dir / "report.html"
    with atomic_write(path, "w") as file:
        file.write(html)
    return path


def render(run: Run) -> str:
    """The page as text."""
    from jinja2 import Environment
    from markupsafe import Markup

    folder = resources.files("trinity.report")
    script = "".join((folder / name).read_text(encoding="utf-8") for name in ("charts.js", "page.js"))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    data = json.dumps({"stages": [charts.stage_charts(s) for s in run.stages]}, separators=(",", ":"), allow_nan=False)
    for character in "<>&":  # the text of a script element ends at "</", whatever stands around it
        data = data.replace(character, f"\\u{ord(character):04x}")
    return template.render(
        page=_page(run),
        charts={
            "learning": charts.LEARNING,
            "experts": charts.EXPERTS,
            "stability": charts.STABILITY,
            "speed": charts.SPEED,
            "reward": charts.REWARD,
            "niah": charts.NIAH,
        },
        version=__version__,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(data),
    )


def _page(run: Run) -> dict[str, Any]:
    sample_groups, more_samples = tables.samples(run)
    event_rows, more_events = tables.events(run)
    kinds: dict[str, int] = {}
    for row in event_rows:
        kinds[row["event"]] = kinds.get(row["event"], 0) + 1
    notes = [note for stage in run.stages for note in stage.notes]
    notes += [note for stage in run.stages for note in tables.deaths(stage)]
    repeated = sum(stage.repeated for stage in run.stages)
    if repeated:
        notes.append(
            f"{repeated:,} steps were taken again after a rollback or a resumption; the charts show those that count."
        )
    return {
        "name": tables.name(run),
        "model": tables.model_line(run),
        "notes": notes,
        "cards": [tables.card(stage) for stage in run.stages],
        "sections": SECTIONS,
        "retrieval": tables.retrieval(run),
        "reward_stage": next((i for i, stage in enumerate(run.stages) if "reward" in stage.scalars), None),
        "scores": tables.scores(run),
        "samples": sample_groups,
        "more_samples": more_samples,
        "events": event_rows,
        "more_events": more_events,
        "event_kinds": sorted(kinds.items(), key=lambda item: -item[1]),
        "environment": tables.environment(run),
        "settings": tables.settings(run),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }
