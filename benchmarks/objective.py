"""Time and memory of the objective, forward and backward, against NT-Xent and against the plain n x n form of AUC-CL.

    pip install lightly                    # the peer's implementation, NTXentLoss
    python benchmarks/objective.py         # minutes
    python benchmarks/objective.py --images 128 512 --linear 1024 2048 4096 --runs 3

For every number n of images, two views [n, D] in float32 with gradient into both. Runs alternate, medians count. The exponent of
the growth with n is fitted over --linear, on ours alone. Extra memory is what a call adds to a fresh process's peak.
"""
import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from auccl_loss import AUCCLLoss, symmetric_moments, unit_rows  # noqa: E402
from benchmarks.measure import alternate, extra_memory, machine, median_wall  # noqa: E402


def plain(criterion):
    """The same objective through the 2n x 2n matrix of cosines."""
    return lambda z0, z1: criterion._objective(symmetric_moments(unit_rows(z0), unit_rows(z1), gram=False))


def make_loss(name):
    if name == "NT-Xent (lightly)":
        from lightly.loss import NTXentLoss
        return NTXentLoss(temperature=0.5)
    return AUCCLLoss() if name == "AUC-CL" else plain(AUCCLLoss())


def make_step(name, n, dim):
    """A call without arguments: one forward and backward pass of the loss on n images."""
    criterion, generator = make_loss(name), torch.Generator().manual_seed(0)
    views = [torch.randn(n, dim, generator=generator).requires_grad_() for _ in range(2)]

    def step():
        for view in views:
            view.grad = None
        criterion(*views).backward()
    return step


def make_warm_step(name, n, dim):
    make_step(name, 16, dim)()  # loads what torch loads on first use
    return make_step(name, n, dim)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[128, 512, 2048, 4096], help="n, against the peers")
    parser.add_argument("--linear", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="n of the fitted growth")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    names = ("AUC-CL", "AUC-CL, n x n", "NT-Xent (lightly)")
    print(f"{machine()}; D = {args.dim}, float32, medians of {args.runs}")
    print("| n | " + " | ".join(f"{name}: ms, MB" for name in names) + " | n x n / ours | NT-Xent / ours |\n|" + "---|" * 6)
    for n in args.images:
        times = median_wall(alternate({name: make_step(name, n, args.dim) for name in names}, args.runs, warmup=2))
        memory = {name: extra_memory(make_warm_step, name, n, args.dim) for name in names}
        ours, nxn, nt_xent = (times[name] for name in names)
        cells = " | ".join(f"{1e3 * times[name]:.2f}, {memory[name]:.0f}" for name in names)
        print(f"| {n} | {cells} | {nxn / ours:.1f} | {nt_xent / ours:.1f} |", flush=True)
    steps = {n: make_step("AUC-CL", n, args.dim) for n in args.linear}
    times = median_wall(alternate(steps, 3 * args.runs, warmup=3))
    x, y = [math.log(n) for n in times], [math.log(seconds) for seconds in times.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((p - mean_x) * (q - mean_y) for p, q in zip(x, y)) / sum((p - mean_x)**2 for p in x)
    print("growth: " + ", ".join(f"n = {n}: {1e3 * seconds:.2f} ms" for n, seconds in times.items()) + f"; exponent {slope:.2f}")


if __name__ == "__main__":
    main()
