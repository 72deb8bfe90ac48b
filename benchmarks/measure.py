"""What the benchmarks share: tables and locks, alternated timing, growth, peak memory of a fresh process, a line that names the machine."""
import contextlib
import csv
import fcntl
import math
import multiprocessing
import platform
import statistics
import time
from pathlib import Path

import torch

import utils


def alternate(functions: dict, runs: int, warmup: int = 1) -> dict:
    """Wall and CPU seconds of each function (name -> callable without arguments), A B A B ..., so that a change in the machine's
    speed meets all of them alike: name -> (list of wall seconds, list of CPU seconds), warm-up left out."""
    wall, cpu = ({name: [] for name in functions} for _ in range(2))
    for run in range(warmup + runs):
        for name, function in functions.items():
            start = time.perf_counter(), time.process_time()
            function()
            if run >= warmup:
                wall[name].append(time.perf_counter() - start[0])
                cpu[name].append(time.process_time() - start[1])
    return {name: (wall[name], cpu[name]) for name in functions}


def median_wall(times: dict) -> dict:
    """name -> median wall seconds of what `alternate` returns."""
    return {name: statistics.median(wall) for name, (wall, _) in times.items()}


def fitted_exponent(x, y) -> float:
    """p of the y = c x^p that fits best, by least squares of the logarithms."""
    x, y = [math.log(value) for value in x], [math.log(value) for value in y]
    return statistics.linear_regression(x, y).slope


def write_table(path, columns, rows: list[dict]) -> None:
    """Replaces the CSV at `path`; see utils.replace_file."""
    def write(file):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    utils.replace_file(path, write)


@contextlib.contextmanager
def locked(path: Path, wait: bool):
    """Holds the lock that `path` stands for, until the block or the process ends; yields whether it could be had."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        yield held


def extra_memory(prepare, *args) -> float:
    """MB by which a call in a fresh process raises the peak of its resident memory over what it held before (Linux only).
    `prepare(*args)`, a module's function, returns the call."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown, (torch.get_num_threads(), prepare, *args))


def _grown(threads, prepare, *args):
    torch.set_num_threads(threads)
    call = prepare(*args)
    before = _resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew; getrusage's would be that of the imports, or of the parent process
    call()
    return _resident("VmHWM") - before


def _resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def matrix_rate(dtype: torch.dtype, size: int = 2048, runs: int = 15) -> float:
    """GFLOP/s of a product of two square matrices, the best of `runs`: what the machine's matrix unit gives through torch."""
    x, y = (torch.randn(size, size).to(dtype) for _ in range(2))
    wall, _ = alternate({"product": lambda: x @ y}, runs, warmup=3)["product"]
    return 2 * size**3 / min(wall) / 1e9


def machine() -> str:
    """One line: processor, threads, versions."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
