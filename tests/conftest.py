"""One thread per test process, so that results repeat and parallel test runs do not fight over cores."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

if not Path("/dev/nvidiactl").exists():  # Triton decides when it is imported whether it interprets its kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("trinity", deadline=None, derandomize=True)
settings.load_profile("trinity")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
