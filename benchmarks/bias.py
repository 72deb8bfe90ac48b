"""Bias and variance of minibatch gradients on real images, for AUC-CL and for NT-Xent (lightly), by batch size.

    pip install lightly
    python benchmarks/bias.py RUN/checkpoint.pth --dataset folder --data_path DIR     # a run of cifar/main.py, a small network; its data

A population is --images training images in two fixed views each, seen by a fixed network: batch norm takes its running statistics,
so that an embedding depends on its own image alone (with a batch's statistics no loss has unbiased gradients). For every batch size
the mean gradient of all network parameters over minibatches is held against that of the loss on the whole population. Written: a
CSV, a row a network, loss and batch size, to which the same command adds what is not there yet, and other networks add theirs, with

    bias        |E g - G| / |G|, g the gradient on a minibatch, G the one on the population
    tangent     |part of E g across G| / (part of E g along G), the tangent of their angle: bias that no step size can mend
    deviation   sqrt(E |g - E g|^2) / |G|, the standard deviation of one minibatch's gradient

and 95 % intervals. How bias is told from variance: with a fixed network the parameters' gradient is linear in the embeddings', so
the minibatches of a group (the population cut into batches at random, --cuts times) are averaged over embeddings and carried to
the parameters once. The product of the errors of two independent groups has the squared bias as its mean, free of variance; the
mean over all pairs of --groups groups estimates it, and the jackknife over groups gives the interval. Minibatches are drawn without
replacement, so at B = N all three are 0: a bias of order 1/B shows as 1/B - 1/N, a variance as (N - B) / (N - 1) of its own.
"""
import csv
import math
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import utils  # noqa: E402
from auccl_loss import AUCCLLoss, symmetric_moments, unit_rows  # noqa: E402
from benchmarks.measure import locked, write_table  # noqa: E402
from benchmarks.study import RESULTS, ClosedForm, Peer, peer_loss  # noqa: E402
from cifar import main as cifar  # noqa: E402
from cifar.data import load_data  # noqa: E402

T_95 = {4: 3.182, 6: 2.571, 8: 2.365, 12: 2.201, 16: 2.131}    # Student's t, two-sided 95 %, by the number of groups
NORMAL_95 = 1.96                                                # the same for many draws
VIEWS, CUTS, DRAWS = 101, 102, 103                              # random streams
FIXED = ("--arch", "--projector", "--crop_scale", "--preset", "--device", "--amp", "--batch_size")
FIGURES = ("bias", "tangent", "deviation")
KEY = ("network", "loss", "batch_size")
COLUMNS = (*KEY, "setting", *(figure + end for figure in FIGURES for end in ("", "_low", "_high")))


def saddle(z: Tensor) -> dict:
    """a, b and alpha at the saddle of the population's objective, where they stand when descent-ascent has settled."""
    moments = symmetric_moments(unit_rows(z[0]), unit_rows(z[1]))
    a, b = moments.positive_mean.item(), moments.negative_mean.item()
    return {"a": a, "b": b, "alpha": 1 - a + b}


def make_losses(z: Tensor, temperatures) -> dict:
    weights = saddle(z)
    return {"AUC-CL": AUCCLLoss(**weights, learn=()), "AUC-CL, a b alpha from the batch": ClosedForm(**weights, learn=()),
            **{f"NT-Xent, T = {t:g}": Peer("NTXentLoss", {"temperature": t}) for t in temperatures}}


class Population:
    """Embeddings z [2, N, D] of two views of N images by a fixed network, and the way back to its parameters."""

    def __init__(self, network, views: Tensor):
        self.parameters = list(network.parameters())
        self.network, self.views = network.eval(), views                        # views: [2, N, 3, S, S]
        self.outputs = torch.stack([network(view) for view in views])           # [2, N, D], with their graph
        self.z = self.outputs.detach()

    def embedding_gradient(self, loss, rows: Tensor) -> Tensor:
        """Gradient of the loss on a batch of images with respect to their embeddings: [2, B, D]."""
        z = self.z[:, rows].requires_grad_()
        return torch.autograd.grad(loss(*z), z)[0]

    def mean_over_cuts(self, loss, batch_size: int, cuts: int, generator) -> Tensor:
        """The mean over the batches of `cuts` random partitions of the population: [2, N, D]."""
        total = torch.zeros_like(self.z)
        for _ in range(cuts):
            for rows in torch.randperm(self.z.shape[1], generator=generator).split(batch_size):
                total[:, rows] += self.embedding_gradient(loss, rows)
        return total / (cuts * self.z.shape[1] / batch_size)

    def carry(self, gradient: Tensor) -> Tensor:
        """Embeddings' gradient [2, N, D] -> the parameters', as one vector in float64."""
        return _flat(torch.autograd.grad(self.outputs, self.parameters, gradient, retain_graph=True))

    def batch_gradient(self, loss, rows: Tensor) -> Tensor:
        """The parameters' gradient on one batch."""
        z = torch.stack([self.network(view[rows]) for view in self.views])
        return _flat(torch.autograd.grad(loss(*z), self.parameters))


def _flat(gradients) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def squared_mean(rows: Tensor) -> tuple[float, float]:
    """|E x|^2 from independent draws x [R, P], without the variance of x in it, and the standard error of that (jackknife)."""
    products = rows @ rows.T
    count = len(rows)

    def pairs(products):
        n = len(products)
        return (products.sum() - products.trace()).item() / (n * (n - 1))
    estimate = pairs(products)
    keep = [torch.tensor([i for i in range(count) if i != left]) for left in range(count)]
    without = torch.tensor([pairs(products[rest][:, rest]) for rest in keep])
    error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt().item()
    return estimate, error


def norm_of_mean(rows: Tensor, unit: float) -> tuple[float, float, float]:
    """|E x| of draws x [R, P] with its 95 % interval, in units of `unit`; a square below zero counts as zero."""
    estimate, error = squared_mean(rows)
    half = T_95[len(rows)] * error
    return tuple(math.sqrt(max(0.0, square)) / unit for square in (estimate, estimate - half, estimate + half))


def deviation(rows: Tensor, unit: float) -> tuple[float, float, float]:
    """sqrt(E |x - E x|^2) of draws x [K, P] with its 95 % interval, in units of `unit`."""
    count = len(rows)
    squares = (rows - rows.mean(0)).square().sum(1) * count / (count - 1)
    mean, half = squares.mean().item(), NORMAL_95 * (squares.std() / count**0.5).item()
    return tuple(math.sqrt(max(0.0, square)) / unit for square in (mean, mean - half, mean + half))


def study(population: Population, loss, batch_size: int, args) -> dict:
    """The figures of a loss and a batch size."""
    count = population.z.shape[1]
    full = population.carry(population.embedding_gradient(loss, torch.arange(count)))
    unit = full.norm().item()
    groups = []
    for group in range(args.groups):
        generator = torch.Generator().manual_seed(utils.stream_seed(args.seed, CUTS, batch_size, group))
        groups.append(population.carry(population.mean_over_cuts(loss, batch_size, args.cuts, generator)))
    means = torch.stack(groups)                                                 # [R, P]
    along = means @ full / unit                                                 # [R]
    across = means - along[:, None] * (full / unit)
    generator = torch.Generator().manual_seed(utils.stream_seed(args.seed, DRAWS, batch_size))
    draws = torch.stack([population.batch_gradient(loss, torch.randperm(count, generator=generator)[:batch_size])
                         for _ in range(args.draws)])
    figures = norm_of_mean(means - full, unit), norm_of_mean(across, along.mean().item()), deviation(draws, unit)
    return dict(zip(COLUMNS[len(KEY) + 1:], (value for figure in figures for value in figure), strict=True))


def parse_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="of cifar/main.py; a small network, --images pairs of views are held with all activations")
    add("--images", type=utils.positive_int, default=4096, help="in the population")
    add("--batch_sizes", type=utils.positive_int, nargs="+", default=[4, 16, 64, 256, 1024], help="divisors of --images")
    add("--temperatures", type=utils.positive_float, nargs="*", default=[0.1, 0.2, 0.5], help="of NT-Xent; none: without it")
    add("--groups", type=int, choices=T_95, default=8, help="of minibatches")
    add("--cuts", type=utils.positive_int, default=4, help="of the population into minibatches, in a group")
    add("--draws", type=utils.positive_int, default=64, help="single minibatches for the variance")
    add("--seed", type=utils.non_negative_int, default=0, help="of views and minibatches")
    add("--network", help="its name in the table (default: that of the checkpoint's folder)")
    add("--output", type=Path, default=RESULTS / "bias.csv", help="the table")
    args, common = parser.parse_known_args(argv)
    if wrong := [size for size in args.batch_sizes if size < 2 or args.images % size]:
        raise utils.UserError(f"--batch_sizes {' '.join(map(str, wrong))}: must be at least 2 and divide --images {args.images}")
    if args.draws < 2:
        raise utils.UserError("--draws must be at least 2: one draw has no variance")
    if given := [flag for flag in FIXED if any(part.split("=")[0] == flag for part in common)]:
        raise utils.UserError(f"{' '.join(given)}: network and crops are the checkpoint's, in float32 on the CPU; leave out")
    return args, common


def load_network(path: Path, common: list[str]):
    """cifar/main.py's flags of the checkpoint's run and its network's weights. UserError if it is no checkpoint of that script."""
    state = utils.load_checkpoint(path)
    try:
        own = ["--arch", state["args"]["arch"]]
        for name in ("projector", "crop_scale"):
            own += [f"--{name}", *map(str, state["args"][name])]
        weights = dict(state["student"])
    except (KeyError, TypeError, ValueError) as error:
        raise utils.UserError(f"{path} is no checkpoint of cifar/main.py: {error!r}") from error
    return cifar.parse_args([*common, *own, "--batch_size", "2", "--amp", "none", "--device", "cpu"]), weights


def describe(args, crop_scale, images: Tensor, weights: dict) -> str:
    """What figures of one network in a table must have in common: flags, images and weights."""
    flags = ", ".join(f"{name} {getattr(args, name)}" for name in ("images", "groups", "cuts", "draws", "seed"))
    flags += f", crops {crop_scale[0]:g} to {crop_scale[1]:g}"
    checksum = 0
    for x in (images, *weights.values()):
        checksum = zlib.crc32(x.contiguous().numpy(), checksum)
    return f"{flags}, checksum {checksum:08x}"


def read_table(path: Path, network: str, setting: str) -> dict:
    """The rows so far, by KEY. UserError if those of `network` have another setting, or it is no table of this script."""
    if not path.exists():
        return {}
    try:
        with open(path, newline="") as file:
            rows = {tuple(row[name] for name in KEY): row for row in csv.DictReader(file, strict=True)}
        others = {row["setting"] for row in rows.values() if row["network"] == network} - {setting}
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise utils.UserError(f"{path} is not a table of this script: {error!r}; choose another --output") from error
    if others:
        raise utils.UserError(f"{path} holds figures of {network} with {others.pop()}, not {setting}; choose another --output or --network")
    return rows


def main(argv=None):
    args, common = parse_args(argv)
    flags, weights = load_network(args.checkpoint, common)
    if args.temperatures:
        peer_loss("NTXentLoss", {})  # says at once if lightly is missing
    data = load_data(flags.dataset, flags.data_path, flags.image_size)
    if args.images > len(data.train):
        raise utils.UserError(f"--images {args.images} is more than the data set's {len(data.train)}")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(utils.stream_seed(args.seed, VIEWS)))
    run = cifar.Run(flags, data)
    try:
        run.model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise utils.UserError(f"the weights of {args.checkpoint} do not fit its arch and projector: {error}") from error
    images = data.train[order[:args.images]]
    views = run.augment(images, torch.Generator().manual_seed(utils.stream_seed(args.seed, VIEWS, 1)))
    population = Population(run.model, torch.stack(views))
    utils.make_output_dir(args.output.parent, "--output")
    network, setting = args.network or args.checkpoint.resolve().parent.name, describe(args, flags.crop_scale, images, weights)
    rows = read_table(args.output, network, setting)
    for name, loss in make_losses(population.z, args.temperatures).items():
        for size in args.batch_sizes:
            key = network, name, str(size)
            if key in rows:
                continue
            row = dict(zip(KEY, key)) | {"setting": setting} | study(population, loss, size, args)
            print(utils.format_record(row), flush=True)
            with locked(args.output.with_suffix(".lock"), wait=True):  # another process may have added to the table meanwhile
                rows = read_table(args.output, network, setting) | {key: row}
                write_table(args.output, COLUMNS, list(rows.values()))
    print(f"table: {args.output}", flush=True)


if __name__ == "__main__":
    utils.run_script(main)
