"""One thread per test process, so that results repeat and parallel test runs do not fight over cores."""

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # before anything imports Triton: its kernels then run in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("trinity", deadline=None, derandomize=True)
settings.load_profile("trinity")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
