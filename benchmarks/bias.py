"""Bias and variance of minibatch gradients on real images, by loss and batch size.

    pip install -r benchmarks/requirements.txt
    python benchmarks/study.py convergence --keep_checkpoints         # trains the networks
    python benchmarks/bias.py cifar/results/studies/convergence/{AUC-CL,NT-Xent}/checkpoint.pth

A population is --images training images in two fixed views each, seen by a trained network in evaluation
mode, so that an embedding depends on its own image alone (with a batch's statistics no loss has unbiased
gradients). With g the gradient of all network parameters on a minibatch and G that on the population, the
table holds

    bias        |E g - G| / |G|
    tangent     |part of E g across G| / (part of E g along G): bias that no step size can mend
    deviation   sqrt(E |g - E g|^2) / |G|, the standard deviation of one minibatch's gradient

and 95 % intervals, a row per network, loss and batch size. The same command adds the rows that are missing.

How bias is told from variance: with a fixed network the parameters' gradient is linear in that of the
embeddings, so the minibatches of a group (the population cut at random, --cuts times) are averaged over
embeddings and carried to the parameters once. The product of the errors of two independent groups has the
squared bias as its mean, free of variance. The mean over all pairs of groups estimates it, and the jackknife
over groups gives the interval. Minibatches are drawn without replacement, so at B = N all three are 0: a
bias of order 1/B shows as 1/B - 1/N.
"""
import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import auccl_loss  # noqa: E402
import utils  # noqa: E402
from auccl_loss import AUCCLLoss, log_mean_exp, symmetric_moments, unit_rows  # noqa: E402
from benchmarks.losses import build_loss  # noqa: E402
from benchmarks.measure import RESULTS, read_table, write_table  # noqa: E402
from cifar import main as cifar  # noqa: E402
from cifar.data import load_data  # noqa: E402

GROUPS, T_95 = 8, 2.365     # groups of minibatches; Student's t, two-sided 95 %, 7 degrees of freedom
NORMAL_95 = 1.96
VIEWS, CUTS, DRAWS = 101, 102, 103  # random streams
LOSSES = {  # name -> the loss for a population, AUC-CL's weights at its saddle
    "AUC-CL": lambda population: AUCCLLoss(**population.saddle(), learn=()),
    "AUC-CL hard": lambda population: population.hard(),
    "AUC-CL quartic": lambda population: AUCCLLoss.preset("quartic", **population.saddle(margin=2), learn=()),
    "AUC-CL, a b alpha from the batch": lambda population: build_loss("ClosedForm"),
    "DCL, T = 0.1": lambda population: build_loss("DCLLoss", temperature=0.1),
    "NT-Xent, T = 0.1": lambda population: build_loss("NTXentLoss", temperature=0.1),
    "NT-Xent, T = 0.2": lambda population: build_loss("NTXentLoss", temperature=0.2),
    "NT-Xent, T = 0.5": lambda population: build_loss("NTXentLoss", temperature=0.5),
}


class Population:
    """Embeddings z [2, N, D] of two views of N images, and the way back to the network's parameters."""

    def __init__(self, network: nn.Module, views: Tensor):
        self.network, self.views = network.eval(), views                # views: [2, N, 3, S, S]
        self.parameters = list(network.parameters())
        self.outputs = torch.stack([network(view) for view in views])   # [2, N, D], with their graph
        self.z = self.outputs.detach()

    def saddle(self, margin=1) -> dict:
        """a, b, alpha where descent-ascent settles with this margin."""
        moments = symmetric_moments(*unit_rows(self.z))
        a, b = moments.positive_mean.item(), moments.negative_mean.item()
        return {"a": a, "b": b, "alpha": margin - a + b}

    @torch.no_grad()
    def hard(self) -> AUCCLLoss:
        """The preset hard with its weights and u where they settle, held."""
        loss, z = AUCCLLoss.preset("hard", learn=()).eval(), unit_rows(self.z)
        loss.u.copy_(log_mean_exp(z, z, loss.temperature, same_view=True))
        loss.a.copy_(symmetric_moments(*z).positive_mean)
        loss.alpha.copy_(loss.margin - loss.a + loss.temperature * loss.u)
        return loss

    def embedding_gradient(self, loss, rows: Tensor) -> Tensor:
        """Gradient of the loss on a batch of images with respect to their embeddings: [2, B, D]."""
        z = self.z[:, rows].requires_grad_()
        return torch.autograd.grad(loss(*z), z)[0]

    def mean_over_cuts(self, loss, batch_size: int, cuts: int, generator) -> Tensor:
        """Mean embedding gradient over the batches of random partitions of the population: [2, N, D]."""
        total = torch.zeros_like(self.z)
        for _ in range(cuts):
            for rows in torch.randperm(self.z.shape[1], generator=generator).split(batch_size):
                total[:, rows] += self.embedding_gradient(loss, rows)
        return total / (cuts * self.z.shape[1] / batch_size)

    def carry(self, gradient: Tensor) -> Tensor:
        """The embeddings' gradient [2, N, D] -> the parameters' [P], float64."""
        return _flat(torch.autograd.grad(self.outputs, self.parameters, gradient, retain_graph=True))

    def batch_gradient(self, loss, rows: Tensor) -> Tensor:
        """The parameters' gradient [P] on one batch."""
        z = torch.stack([self.network(view[rows]) for view in self.views])
        return _flat(torch.autograd.grad(loss(*z), self.parameters))


def _flat(gradients) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def squared_mean(rows: Tensor) -> tuple[float, float]:
    """|E x|^2 of draws x [R, P] by products of different draws, free of variance; its standard error."""
    count, products = len(rows), (rows @ rows.T).fill_diagonal_(0)
    total = products.sum()
    without = (total - 2 * products.sum(1)) / ((count - 1) * (count - 2))  # [R]: jackknife
    variance = (count - 1) / count * (without - without.mean()).square().sum()
    return (total / (count * (count - 1))).item(), variance.sqrt().item()


def norm_of_mean(rows: Tensor, unit: float) -> list[float]:
    """|E x| of draws x [GROUPS, P] and its 95 % interval, in units of `unit`; negative squares count as 0."""
    estimate, error = squared_mean(rows)
    return _roots(estimate, T_95 * error, unit)


def deviation(rows: Tensor, unit: float) -> list[float]:
    """sqrt(E |x - E x|^2) of draws x [K, P] and its 95 % interval, in units of `unit`."""
    squares = (rows - rows.mean(0)).square().sum(1) * len(rows) / (len(rows) - 1)
    return _roots(squares.mean().item(), NORMAL_95 * squares.std().item() / len(rows)**0.5, unit)


def _roots(square, half, unit):
    return [math.sqrt(max(0.0, value)) / unit for value in (square, square - half, square + half)]


def measure(population: Population, loss, batch_size: int, cuts: int, draws: int, seed: int) -> dict:
    """Bias, tangent and deviation of a loss at a batch size, each with the ends of its interval."""
    count = population.z.shape[1]
    full = population.carry(population.embedding_gradient(loss, torch.arange(count)))           # G: [P]
    unit, means = full.norm().item(), []
    for group in range(GROUPS):
        generator = torch.Generator().manual_seed(utils.stream_seed(seed, CUTS, batch_size, group))
        means.append(population.carry(population.mean_over_cuts(loss, batch_size, cuts, generator)))
    means = torch.stack(means)                                                                  # [GROUPS, P]
    along = means @ full / unit                                                                 # [GROUPS]
    across = means - along[:, None] * (full / unit)
    generator = torch.Generator().manual_seed(utils.stream_seed(seed, DRAWS, batch_size))
    batches = [torch.randperm(count, generator=generator)[:batch_size] for _ in range(draws)]
    singles = torch.stack([population.batch_gradient(loss, rows) for rows in batches])          # [draws, P]
    figures = {"bias": norm_of_mean(means - full, unit), "tangent": norm_of_mean(across, along.mean().item()),
               "deviation": deviation(singles, unit)}
    return {name + end: value for name, values in figures.items()
            for end, value in zip(("", "_low", "_high"), values)}


def load_population(checkpoint: Path, data_path: Path | None, images: int, seed: int,
                    device: str) -> Population:
    """The network of a cifar/main.py checkpoint, and two views of a random choice of its training images."""
    state = utils.load_checkpoint(checkpoint)
    if not state.get("backbone", {}).get("arch", "").startswith("cifar/"):
        raise utils.UserError(f"{checkpoint} is no checkpoint of cifar/main.py")
    args = argparse.Namespace(**state["args"] | {"device": device, "amp": "none"})
    data = load_data(args.dataset, Path(data_path or args.data_path), args.image_size)
    if images > len(data.train):
        raise utils.UserError(f"--images {images} is more than the {len(data.train)} training images")
    run = cifar.Run(args, data)
    utils.set_backends(run.device, args.deterministic, tf32=False)  # its rounding would be a bias
    utils.load_parts(state, {"student": run.model}, checkpoint)
    choice, generator = (torch.Generator().manual_seed(utils.stream_seed(seed, *stream))
                         for stream in ((VIEWS,), (VIEWS, 1)))
    chosen = data.train[torch.randperm(len(data.train), generator=choice)[:images]].to(run.device)
    return Population(nn.Sequential(run.model.backbone, run.model.head),
                      torch.stack([*run.augment(chosen, generator)]))


def main(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("checkpoints", type=Path, nargs="+", help="checkpoints of cifar/main.py, of small networks (all "
        "activations for --images are kept), each named after its folder")
    add("--data_path", type=Path, help="folder of the data (default: that of the training run)")
    add("--images", type=utils.positive_int, default=4096, help="images in the population")
    add("--batch_sizes", type=utils.number(int, 2, 10**6), nargs="+", default=[4, 16, 64, 256, 1024],
        help="divisors of --images")
    add("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="losses to measure")
    add("--cuts", type=utils.positive_int, default=4, help="cuts of the population, per group of minibatches")
    add("--draws", type=utils.number(int, 2, 10**6), default=64, help="single minibatches for the deviation")
    add("--seed", type=utils.non_negative_int, default=0, help="seed of views and minibatches")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--output", type=Path, default=RESULTS / "bias.csv", help="table")
    args = parser.parse_args(argv)
    if wrong := [size for size in args.batch_sizes if args.images % size]:
        raise utils.UserError(f"--batch_sizes {wrong[0]} does not divide --images {args.images}")
    auccl_loss.BLOCK = 2 * args.images  # (2) takes all pairs of a population, as the other losses do
    for checkpoint in args.checkpoints:
        population = load_population(checkpoint, args.data_path, args.images, args.seed, args.device)
        for name in args.losses:
            loss = LOSSES[name](population).to(population.z.device)
            for size in args.batch_sizes:
                key = {"network": checkpoint.resolve().parent.name, "loss": name, "batch_size": str(size)}
                rows = read_table(args.output)
                if not any(key.items() <= row.items() for row in rows):
                    row = key | measure(population, loss, size, args.cuts, args.draws, args.seed)
                    write_table(args.output, [*rows, row])
                    print(utils.format_record(row), flush=True)
    print(f"table: {args.output}")


if __name__ == "__main__":
    utils.run_script(main)
