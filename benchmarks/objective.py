"""Time and memory of the objective, forward and backward, against lightly's losses and the plain n x n form of AUC-CL.

    pip install lightly                    # the peers' implementations
    python benchmarks/objective.py         # a quarter of an hour
    python benchmarks/objective.py --images 128 512 --runs 3 --losses AUC-CL NT-Xent --output short.csv

For every number n of images, two views [n, D] in float32 with gradient into both. Runs alternate, medians count. Extra memory is
what a call adds to a fresh process's peak. Written to --output, in place of what was there: a CSV that pictures.py draws.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: E402
from auccl_loss import AUCCLLoss, symmetric_moments, unit_rows  # noqa: E402
from benchmarks.measure import alternate, extra_memory, fitted_exponent, machine, median_wall, write_table  # noqa: E402
from benchmarks.study import RESULTS, peer_loss  # noqa: E402

PEERS = {"NT-Xent": "NTXentLoss", "DCL": "DCLLoss", "Barlow Twins": "BarlowTwinsLoss", "VICReg": "VICRegLoss"}
LOSSES = ("AUC-CL", "AUC-CL, n x n", *PEERS)
QUADRATIC = ("AUC-CL, n x n", "NT-Xent", "DCL")  # these build matrices of n x n
FIT_FROM = 2048     # images from which on the exponent of the growth is fitted


def make_loss(name):
    if name in PEERS:
        return peer_loss(PEERS[name], {})
    criterion = AUCCLLoss()
    if name == "AUC-CL":
        return criterion
    return lambda z0, z1: criterion._objective(symmetric_moments(unit_rows(z0), unit_rows(z1), gram=False))


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
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--images", type=utils.positive_int, nargs="+", default=[2**k for k in range(7, 15)], help="n")
    add("--losses", choices=LOSSES, nargs="+", default=LOSSES)
    add("--quadratic_limit", type=utils.positive_int, default=8192, help="largest n for losses that build n x n matrices")
    add("--dim", type=utils.positive_int, default=128, help="D")
    add("--runs", type=utils.positive_int, default=7)
    add("--output", type=Path, default=RESULTS / "objective.csv", help="the table")
    args = parser.parse_args()
    if min(args.images) < 2:
        raise utils.UserError("--images must be at least 2: negative pairs need two images")
    if min(args.images) > args.quadratic_limit and set(args.losses) <= set(QUADRATIC):
        raise utils.UserError(f"--quadratic_limit {args.quadratic_limit} leaves none of --losses at --images {min(args.images)}; raise it")
    utils.make_output_dir(args.output.parent, "--output")
    for name in args.losses:
        make_loss(name)  # says at once if lightly is missing
    print(f"{machine()}; D = {args.dim}, float32, medians of {args.runs}")
    rows = []
    for n in args.images:
        names = [name for name in args.losses if n <= args.quadratic_limit or name not in QUADRATIC]
        times = median_wall(alternate({name: make_step(name, n, args.dim) for name in names}, args.runs, warmup=2))
        for name in names:
            memory = extra_memory(make_warm_step, name, n, args.dim)
            rows.append({"loss": name, "images": n, "seconds": times[name], "megabytes": memory})
            print(f"n = {n:5}  {name:14} {1e3 * times[name]:9.2f} ms {memory:7.0f} MB   {times[name] / times[names[0]]:6.1f} times "
                  f"{names[0]}", flush=True)
        write_table(args.output, ("loss", "images", "seconds", "megabytes"), rows)
    for name in args.losses:
        points = [(row["images"], row["seconds"]) for row in rows if row["loss"] == name and row["images"] >= FIT_FROM]
        if len(points) > 1:
            print(f"{name}: time grows as n^{fitted_exponent(*zip(*points)):.2f} from n = {points[0][0]} to {points[-1][0]}")


if __name__ == "__main__":
    utils.run_script(main)
