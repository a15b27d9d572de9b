"""Settings of the test suite: offline, one thread for each process, fixed seed.

Test processes run in parallel, and spinning threads slow each other down.
"""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
