"""Makes the repository's modules importable without installation, and keeps the suite off the network and the GPU."""
import os
import sys
from pathlib import Path

import pytest
import torch

os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@pytest.fixture
def one_thread():
    """For images so small that threads only get into each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
