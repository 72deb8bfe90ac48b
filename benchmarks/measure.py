"""What the benchmarks share: tables, timing, memory, images, and a line that names the machine."""
import csv
import multiprocessing
import platform
import statistics
import time
from pathlib import Path

import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import utils

RESULTS = Path(__file__).resolve().parents[1] / "cifar" / "results" / "studies"


def read_table(path: Path) -> list[dict]:
    """The rows of a CSV, as text; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: list[dict]) -> None:
    """Replaces the CSV at `path`. Columns are the rows' keys in the order in which they come first."""
    def write(file):
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    utils.replace_file(path, write)


def synchronize() -> None:
    """Waits for the GPU, if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def alternate(functions: dict, runs: int, warmup: int = 1) -> dict:
    """Times functions (name -> callable without arguments) in turns, A B A B ..., so that a change in the
    machine's speed meets all alike: name -> (list of wall seconds, list of CPU seconds), without warm-up.
    A call ends when the GPU has done what it asked for."""
    wall, cpu = ({name: [] for name in functions} for _ in range(2))
    for run in range(warmup + runs):
        for name, function in functions.items():
            start = time.perf_counter(), time.process_time()
            function()
            synchronize()
            if run >= warmup:
                wall[name].append(time.perf_counter() - start[0])
                cpu[name].append(time.process_time() - start[1])
    return {name: (wall[name], cpu[name]) for name in functions}


def median_wall(times: dict) -> dict:
    """name -> median wall seconds of what `alternate` returns."""
    return {name: statistics.median(wall) for name, (wall, _) in times.items()}


def matrix_rate(dtype: torch.dtype, device="cpu", runs: int = 10) -> float:
    """FLOP/s of a product of two square matrices, the best of `runs`: what torch gets out of the hardware."""
    size = 2048 if device == "cpu" else 8192
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(alternate({"product": lambda: x @ y}, runs, warmup=2)["product"][0])


PRODUCTS = "mm", "addmm", "bmm", "baddbmm", "convolution", "scaled_dot_product"


class RecordProducts(TorchDispatchMode):
    """Keeps the matrix products, convolutions and fused attentions of a step, with their tensors. Called, it
    repeats them and nothing else."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__.lstrip("_").startswith(PRODUCTS):
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **kwargs or {})

    @torch.no_grad()
    def __call__(self):
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


def compare_step(seconds: dict, images: int, operations: int, dtype: torch.dtype, device: str) -> str:
    """One line on a step of `images` and `operations` in `dtype`: images/s beside those of another and of its
    products alone, and FLOP/s beside `matrix_rate`. seconds: of these three by name, in this order."""
    (_, ours), (name, other), (_, floor) = seconds.items()
    reached, rate = operations / ours, matrix_rate(dtype, device)
    return (f"ours {images / ours:.4g} images/s, {name} {images / other:.4g}, ratio {other / ours:.2f}; "
            f"floor {images / floor:.4g}, {100 * floor / ours:.0f} % of the step; {reached / 1e9:.0f} "
            f"GFLOP/s, {100 * reached / rate:.0f} % of a matrix product's {rate / 1e9:.0f} in {dtype}")


def time_shares(step, least: float = 2.0) -> str:
    """The operations that take at least `least` % of all operations' time on the CPU, the largest first;
    loading aside."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    times = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profile.key_averages()
             if "DataLoader" not in event.key}
    shares = {name: 100 * time / sum(times.values()) for name, time in times.items()}
    largest = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0f} %" for name, share in largest if share >= least)


def extra_memory(prepare, *args, device="cpu") -> float:
    """MB by which a call raises the peak memory of a fresh process (Linux), or of the GPU. `prepare(*args)`,
    a module's function, returns the call; what it holds itself is not counted."""
    if device != "cpu":
        call = prepare(*args)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_extra_memory, (torch.get_num_threads(), prepare, *args))


def _extra_memory(threads, prepare, *args):
    torch.set_num_threads(threads)
    return added_memory(prepare(*args))


def added_memory(call) -> float:
    """MB by which a call raises this process's memory at its peak (Linux)."""
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # restarts the peak, which has the imports in it
    call()
    return _memory("VmHWM") - before


def _memory(field):
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


def make_images(folder: Path, count: int) -> None:
    """Smooth noise as JPEG files of the size of ImageNet's photographs."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        noise = torch.randint(0, 256, (47, 63, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(noise.numpy()).resize((500, 375), Image.BICUBIC).save(folder / f"{number}.jpg")


def machine() -> str:
    """One line: processor, threads, GPU, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads{gpu}, torch "
            f"{torch.__version__}, Python {platform.python_version()}")
