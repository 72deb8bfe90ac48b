"""Makes the repository's modules importable without installation, and keeps the suite off the network and the GPU."""
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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


def write_noise(folder: Path, counts: dict[str, int]) -> Path:
    """Fills class folders with dark and light noise of several sizes and modes; `counts`: split -> images a class."""
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 128, (32 + 8 * (index % 3), 40, 3), dtype=np.uint8) + np.uint8(127 * label)
                image = Image.fromarray(pixels)
                (image.convert("L") if index == 0 else image).save(folder / split / name / f"{index}.png")
    return folder
