"""Whether a machine, or a group of machines, is fit for a run: looked at before the run instead of found out in it."""

from trinity.doctor.examine import Finding, examine

__all__ = ["Finding", "examine"]
