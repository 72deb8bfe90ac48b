"""Makes the modules importable, keeps the suite off the GPU, and holds what several test files share."""
import os
import pickle
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_GPU", "")  # for test_device.py alone
if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: more threads get in the way
    os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start
    torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import utils  # noqa: E402


@pytest.fixture
def one_thread():
    """For tensors so small that threads only get into each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A folder with 21 images in train/ and 11 in val/, of three classes. Not to be changed."""
    counts = {"train": (6, 7, 8), "val": (4, 3, 4)}
    return write_noise(tmp_path_factory.mktemp("images"), counts, ("cat", "dog", "owl"))


def write_noise(folder: Path, counts: dict, classes=("dark", "light")) -> Path:
    """Fills class folders with noise, brighter from class to class, of several sizes and modes.
    counts: split -> images of every class, or a tuple of the numbers of each."""
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in range(count if isinstance(count, int) else count[label]):
                pixels = generator.integers(0, 128, (32 + 8 * (index % 3), 40, 3), dtype=np.uint8)
                image = Image.fromarray(pixels + np.uint8(127 * label // (len(classes) - 1)))
                (image.convert("L") if index == 0 else image).save(folder / split / name / f"{index}.png")
    return folder


def refusal(function, *args, **kwargs) -> str:
    """The line that a user reads when this call, which must fail, ends a script."""
    with pytest.raises((utils.UserError, OSError)) as error:
        function(*args, **kwargs)
    return utils.reason(error.value)


class Malicious:
    """Makes a folder when a file that holds it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def assert_same(state, other):
    """The same keys and the same bits, all through."""
    torch.testing.assert_close(state, other, rtol=0, atol=0)


def run_ranks(function, world: int, *args) -> list:
    """`function(*args)` in `world` forked processes of a gloo group, of one thread each: the results by rank,
    which must pickle. The function asks `distributed.rank()`. An exception of a rank is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_run_rank, (world, folder, function, args), world,
                                              start_method="fork")
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(world)]


def _run_rank(rank, world, folder, function, args):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    Path(folder, str(rank)).write_bytes(pickle.dumps(function(*args)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
