"""Images per second and memory of a training step of main.py: ViT-S/16, two global and eight local views, on the CPU.

    python benchmarks/pretraining_step.py                                # three ways to take the step; minutes
    python benchmarks/pretraining_step.py --arch vit_tiny --runs 5

Ours is main.py's own step: batched augmentation, autocast where the hardware has bf16, attention unfused on CPUs. The plain steps are
the same but for torch's fused attention, and float32. Steps alternate, medians count. The operations of a step (student forward and
backward, teacher forward, objective) are counted by torch and held against the rate of a large bf16 matrix product on the same
machine. Memory is what the step adds to that of a fresh process, with and without recomputing activations.
"""
import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main as pretraining  # noqa: E402
from benchmarks.measure import alternate, extra_memory, machine, matrix_rate, median_wall  # noqa: E402


def make_step(folder, arch, batch_size, *flags, fused_attention=False):
    """A call without arguments: one training step of main.py on one batch, the same each time."""
    args = pretraining.parse_args(["--arch", arch, "--data_path", folder, "--batch_size_per_gpu", str(batch_size), "--num_workers", "0",
                                   "--device", "cpu", "--freeze_last_layer", "0", *flags])
    run = pretraining.Run(args, torch.device("cpu"))
    for network in (run.student, run.teacher):
        for block in network.backbone.blocks:
            block.attn.fused_attn = fused_attention
    pretraining.set_schedules(run)
    parts = [next(iter(pretraining.make_loader(run)))]
    return lambda: pretraining.train_step(run, parts, stop=False)


def make_images(folder, count):
    """Photograph-sized images of noise: what is timed does not depend on their content."""
    noise = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(noise.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(Path(folder) / f"{number}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=pretraining.VIT_ARCHS, default="vit_small")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3, help="timed steps of each, after one that warms up")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_images(folder, args.batch_size)
        setting = (folder, args.arch, args.batch_size)
        steps = {"ours": make_step(*setting), "plain bf16": make_step(*setting, fused_attention=True),
                 "plain fp32": make_step(*setting, "--amp", "none", fused_attention=True)}
        print(f"{machine()}; {args.arch}, batch {args.batch_size}, medians of {args.runs} steps")
        times = median_wall(alternate(steps, args.runs))
        with FlopCounterMode(display=False) as counter:
            steps["ours"]()
        rate, operations = matrix_rate(torch.bfloat16), counter.get_total_flops()
        for name, seconds in times.items():
            print(f"{name:12}{args.batch_size / seconds:6.2f} images/s, {operations / seconds / 1e9:5.0f} GFLOP/s, "
                  f"{seconds / times['ours']:.2f} times the time of ours")
        print(f"{operations / 1e9:.0f} GFLOP a step; ours reaches {100 * operations / times['ours'] / 1e9 / rate:.0f}% of the "
              f"{rate:.0f} GFLOP/s of a bf16 matrix product")
        for flags in ((), ("--grad_checkpointing",)):
            print(f"memory of a step {' '.join(flags) or 'as it is'}: {extra_memory(make_step, *setting, *flags):.0f} MB", flush=True)


if __name__ == "__main__":
    main()
