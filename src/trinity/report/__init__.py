"""One HTML page that tells a run: `write_report(run_dir)`."""

from trinity.report.page import write_report

__all__ = ["write_report"]
