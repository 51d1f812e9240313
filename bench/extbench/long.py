"""Reading a long prompt and answering, with random weights."""

import argparse
from typing import Any


def measure_long(options: argparse.Namespace) -> dict[str, Any]:
    raise NotImplementedError
