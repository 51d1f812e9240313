"""One thread per test process, so that results repeat and parallel test runs do not fight over cores."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
