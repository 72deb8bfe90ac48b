"""Makes the repository's modules importable without installation, and keeps the suite off the network and the GPU."""
import os
import sys
from pathlib import Path

import pytest
import torch

os.environ["CUDA_VISIBLE_DEVICES"] = ""
if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: threads of their own would only get into each other's way
    os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start
    torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@pytest.fixture
def one_thread():
    """For images so small that threads only get into each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
