"""Images per second and memory of a training step of main.py: ViT-S/16, two global and eight local views.

    python benchmarks/pretraining_step.py                       # on the CPU, two minutes
    python benchmarks/pretraining_step.py --arch vit_tiny --runs 5
    python benchmarks/pretraining_step.py --device cuda --batch_size 64 --runs 20

Ours is main.py's own step, bf16 where the hardware has it, without the wait for data. It is held against the
same step in float32 and against its floor, its matrix products and attention alone. Steps alternate, medians
count. Operations are counted by torch, a multiply-add as two, and held against the rate of a large matrix
product in our step's precision. Memory is what a step adds to a fresh process, or to the GPU.
"""
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main as pretraining  # noqa: E402
import utils  # noqa: E402
from benchmarks.measure import (RecordProducts, alternate, compare_step, extra_memory,  # noqa: E402
                                machine, make_images, median_wall, synchronize, time_shares)


def make_run(folder, arch, batch_size, device, *flags):
    args = pretraining.parse_args([
        "--arch", arch, "--batch_size_per_gpu", str(batch_size), "--device", device,
        "--data_path", folder, "--num_workers", "0", *flags])
    return pretraining.Run(args, utils.select_device(device))


def take_step(run) -> float:
    """One training step, of an epoch of one step; its seconds without the wait for data."""
    run.step, run.sums, started = 0, Counter(), time.perf_counter()
    pretraining.train_one_epoch(run, log=None, save=None, interruption=SimpleNamespace(signal=None))
    synchronize()  # the step itself waits for its loss alone, before the optimiser
    return time.perf_counter() - started - run.sums["waited"]


def make_call(*setting):
    run = make_run(*setting)
    return lambda: take_step(run)


def main(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--arch", default="vit_small", help="network of main.py")
    add("--batch_size", type=utils.number(int, 2, 10**5), default=8, help="images per step")
    add("--runs", type=utils.positive_int, default=3, help="timed steps of each, after two that warm up")
    add("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), args.batch_size)
        setting = folder, args.arch, args.batch_size, args.device
        runs = {"ours": make_run(*setting), "float32": make_run(*setting, "--amp", "none")}
        dtype = runs["ours"].amp_dtype or torch.float32
        print(f"{machine()}; {args.device}, {args.arch}, batch {args.batch_size}; {args.runs} runs")
        take_step(runs["ours"])
        with FlopCounterMode(display=False) as counter, RecordProducts() as products:
            take_step(runs["ours"])
        turns = []
        for _ in range(1 + args.runs):
            turns.append({name: take_step(run) for name, run in runs.items()})
            turns[-1] |= median_wall(alternate({"floor": products}, 1, warmup=0))
        seconds = {name: median(turn[name] for turn in turns[1:]) for name in turns[0]}
        operations = counter.get_total_flops()
        print(compare_step(seconds, args.batch_size, operations, dtype, args.device), flush=True)
        if args.device == "cpu":
            print(time_shares(lambda: take_step(runs["ours"])), flush=True)
        del runs, products
        for flags in (), ("--grad_checkpointing",):
            megabytes = extra_memory(make_call, *setting, *flags, device=args.device)
            print(f"memory of a step{' with '.join(('', *flags))}: {megabytes:.0f} MB", flush=True)


if __name__ == "__main__":
    utils.run_script(main)
