"""Time and memory of the objective, forward and backward, against lightly's losses and n x n matrices.

    pip install -r benchmarks/requirements.txt
    python benchmarks/objective.py                      # a quarter of an hour
    python benchmarks/objective.py --images 128 512 --runs 3 --losses AUC-CL NT-Xent
    python benchmarks/objective.py --device cuda --runs 20

For every number n of images two views [n, D] in float32, with gradient into both. Runs alternate, medians
count. Extra memory is what a call adds to the peak of a fresh process, or of the GPU. Without lightly its
losses are left out. The table is for pictures.py.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: E402
from auccl_loss import AUCCLLoss, auc_objective, symmetric_moments, unit_rows  # noqa: E402
from benchmarks import measure  # noqa: E402
from benchmarks.losses import build_loss  # noqa: E402


def by_matrices(z0, z1):
    """AUC-CL from n x n matrices of cosines, at the default weights."""
    moments = symmetric_moments(unit_rows(z0), unit_rows(z1), gram=False)
    return auc_objective(moments, a=1.0, b=0.0, alpha=1.0, negative_weight=16.0)


LOSSES = {
    "AUC-CL": AUCCLLoss,
    "AUC-CL quartic": lambda: AUCCLLoss.preset("quartic"),
    "AUC-CL, n x n": lambda: by_matrices,
    "NT-Xent": lambda: build_loss("NTXentLoss").loss,
    "DCL": lambda: build_loss("DCLLoss").loss,
    "Barlow Twins": lambda: build_loss("BarlowTwinsLoss").loss,
    "VICReg": lambda: build_loss("VICRegLoss").loss,
}
QUADRATIC = ("AUC-CL, n x n", "NT-Xent", "DCL")  # these build n x n matrices


def make_step(name, n, dim, device):
    """A call without arguments: one forward and backward pass of the loss on n images."""
    criterion, generator = LOSSES[name](), torch.Generator().manual_seed(0)
    if isinstance(criterion, torch.nn.Module):
        criterion.to(device)

    def step(views):
        torch.autograd.grad(criterion(*views), views)
    step(torch.randn(2, 16, dim, device=device).requires_grad_().unbind())  # loads what torch loads late
    views = torch.randn(2, n, dim, generator=generator).to(device).requires_grad_().unbind()
    return lambda: step(views)


def main(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--images", type=utils.number(int, 2, 10**7), nargs="+", default=[2**k for k in range(7, 15)],
        help="numbers n of images")
    add("--losses", choices=LOSSES, nargs="+", default=list(LOSSES), help="losses to measure")
    add("--quadratic_limit", type=utils.positive_int, default=8192,
        help="largest n of losses that build n x n matrices")
    add("--dim", type=utils.positive_int, default=128, help="width D of an embedding")
    add("--runs", type=utils.positive_int, default=7, help="timed runs of each loss, after two that warm up")
    add("--device", default="cpu", help="cpu or cuda")
    add("--output", type=Path, default=measure.RESULTS / "objective.csv", help="table")
    args = parser.parse_args(argv)
    print(f"{measure.machine()}; {args.device}, D = {args.dim}, float32, medians of {args.runs}", flush=True)
    for name in [*args.losses]:
        try:
            LOSSES[name]()
        except utils.UserError as error:
            args.losses.remove(name)
            print(f"{name} is left out: {error}")
    rows = []
    for n in args.images:
        names = [name for name in args.losses if n <= args.quadratic_limit or name not in QUADRATIC]
        steps = {name: make_step(name, n, args.dim, args.device) for name in names}
        for name, seconds in measure.median_wall(measure.alternate(steps, args.runs, warmup=2)).items():
            memory = measure.extra_memory(make_step, name, n, args.dim, args.device, device=args.device)
            rows.append({"loss": name, "images": n, "seconds": seconds, "megabytes": memory})
            print(f"n = {n:5}  {name:14} {1e3 * seconds:9.2f} ms {memory:7.0f} MB", flush=True)
        measure.write_table(args.output, rows)


if __name__ == "__main__":
    utils.run_script(main)
