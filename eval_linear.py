"""Linear classification of frozen features: DINO's protocol, many heads in one pass, few-shot and transfer probes.

    python eval_linear.py --pretrained_weights run/checkpoint.pth --data_path IMAGENET --output_dir run/linear     # DINO's protocol
    torchrun --nproc_per_node=8 eval_linear.py ...                                                 # the same on eight GPUs
    python eval_linear.py ... --lr 0.0003 0.001 0.003 0.01 --avgpool_patchtokens false true        # eight heads for the time of one
    python eval_linear.py ... --cache_features                         # SGD without augmentation: each feature is computed once
    python eval_linear.py ... --dataset flowers102 --solver lbfgs      # logistic regression, as in papers on transfer
    python eval_linear.py ... --fraction 0.01                          # one percent of the labels; --shots 5: five of each class
    python eval_linear.py ... --evaluate --pretrained_linear run/linear/checkpoint.pth.tar

A single head trains on all training images. Several train on the same nine tenths of them, the one that does best on the rest is
chosen (no test image has a say in it), and heads.json lists all; the logistic regression is then fitted once more, to all images.

The same command again resumes. Written below --output_dir: checkpoint.pth.tar, log.txt (a JSON record an epoch), heads.json;
linear.txt by --evaluate.
"""
import functools
import itertools
import json
import math
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import utils
from eval_knn import (Description, add_evaluation_flags, complete_evaluation_flags, describe_run, draw_shots, extract_features,
                      load_from_flags, refuse_flags, write_record)
from vision_transformer import VisionTransformer

MEAN_PER_CLASS = ("aircraft", "caltech101", "flowers102", "pets")      # where papers report the mean over classes
FREE_ON_RESUME = ("output_dir", "data_path", "device", "dist_url", "download", "local_rank", "num_workers",
                  "pretrained_weights")                                 # the fingerprint tells backbones apart
CHECKPOINT, HEADS = "checkpoint.pth.tar", "heads.json"                  # the first is DINO's name
HELD_OUT = 0.1                          # of each class's training images, where candidates must be chosen among
L2_GRID = tuple(10 ** (-k / 2) for k in range(-2, 13))      # weight decay of the logistic regression, strongest first: 10 ... 1e-6
LOGITS = 2 ** 22                        # logits held at once when heads are measured; 16 MB
LBFGS_ROWS = 2 ** 16                    # rows whose logits the logistic regression holds at once
SUBSET, HOLD_OUT, ORDER, CROP, INIT = range(5)              # random streams: choices of images, their order, crops, first weights


# ----------------------------------------------------------------------------------------------------- features and heads

class Candidate(NamedTuple):
    """What tells one head of the grid from another; None for what does not apply to its backbone or solver."""

    n_last_blocks: int | None = None
    avgpool_patchtokens: bool | None = None
    lr: float | None = None             # SGD's, per 256 images
    l2: float | None = None             # the logistic regression's


class FrozenFeatures(nn.Module):
    """The features that all candidates need, side by side: [B, 3, H, W] -> [B, F].

    VisionTransformer: the class tokens of the last blocks, the last block's at the end, then the mean of its patch tokens if any
    candidate wants it. Other backbones: their pooled output.
    """

    def __init__(self, backbone: nn.Module, candidates: list[Candidate]):
        super().__init__()
        self.backbone = backbone
        self.blocks = max(c.n_last_blocks or 1 for c in candidates)
        self.avgpool = any(c.avgpool_patchtokens for c in candidates)

    def forward(self, images: Tensor) -> Tensor:
        if not isinstance(self.backbone, VisionTransformer):
            return self.backbone(images)
        blocks = self.backbone.get_intermediate_layers(images, self.blocks)                     # [B, 1 + patches, D] each
        features = [tokens[:, 0] for tokens in blocks]
        if self.avgpool:
            features.append(blocks[-1][:, 1:].mean(1))
        return torch.cat(features, 1)

    def columns(self, candidate: Candidate) -> slice:
        """Those of `forward`'s columns that a candidate's head sees: always neighbours."""
        first = self.blocks - (candidate.n_last_blocks or 1)
        last = self.blocks + bool(candidate.avgpool_patchtokens)
        return slice(first * self.backbone.embed_dim, last * self.backbone.embed_dim)


class HeadGrid(nn.Module):
    """Linear heads that are trained and measured together: features [B, F] -> logits [B, H, C].

    columns: the slice of the features that each of the H heads sees. Heads in a row that see the same are one matrix product,
    so eight learning rates cost about as much as one. Heads of one width start equal, with DINO's initial weights.
    """

    def __init__(self, columns: list[slice], num_classes: int, seed: int = 0):
        super().__init__()
        self.columns = columns
        self.heads = nn.ModuleList(nn.Linear(c.stop - c.start, num_classes) for c in columns)
        for head in self.heads:
            generator = torch.Generator().manual_seed(utils.stream_seed(seed, INIT))
            nn.init.normal_(head.weight, std=0.01, generator=generator)
            nn.init.zeros_(head.bias)

    def forward(self, features: Tensor) -> Tensor:
        logits = []
        for columns, group in itertools.groupby(zip(self.columns, self.heads), key=lambda pair: pair[0]):
            heads = [head for _, head in group]
            weight, bias = torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])
            logits.append(F.linear(features[:, columns], weight, bias).unflatten(1, (len(heads), -1)))     # [B, G C] -> [B, G, C]
        return torch.cat(logits, 1)

    def losses(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each image under each head [B, H], and the logits [B, H, C]."""
        logits = self(features)
        each = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(len(self.heads)), reduction="none")
        return each.view(len(labels), -1), logits


class Scores(NamedTuple):
    """Of each head, [H] on the CPU; accuracies in percent."""

    loss: Tensor
    acc1: Tensor
    acc5: Tensor                        # top-C with fewer than five classes
    class_acc1: Tensor                  # the mean over classes of the accuracy on the class's images


@torch.inference_mode()
def measure(grid: HeadGrid, features: Tensor, labels: Tensor, device: torch.device) -> Scores:
    """Scores of all heads on features [N, F], N >= 1. Each rank takes its share of the rows; all return the same."""
    heads, classes = len(grid.heads), grid.heads[0].out_features
    totals = torch.zeros(classes + 2, heads, device=device)     # images a head gets right, by class; in its first five; loss
    for rows in utils.share(torch.arange(len(labels))).split(max(1, LOGITS // (heads * classes))):
        truth = labels[rows].to(device)
        losses, logits = grid.losses(features[rows].to(device), truth)
        hits = logits.topk(min(5, classes)).indices == truth[:, None, None]                                 # [B, H, 5]
        totals[:classes].index_add_(0, truth, hits[..., 0].float())
        totals[classes] += hits.any(2).sum(0)
        totals[classes + 1] += losses.sum(0)
    totals = utils.sum_over_ranks(totals).cpu().double()
    right, top5, loss = totals[:classes], totals[classes], totals[classes + 1]
    count = labels.bincount(minlength=classes).cpu()
    by_class = right[count > 0] / count[count > 0, None]
    return Scores(loss / len(labels), 100 * right.sum(0) / len(labels), 100 * top5 / len(labels), 100 * by_class.mean(0))


# ------------------------------------------------------------------------------------------------------------ two solvers

def make_sgd(grid: HeadGrid, candidates: list[Candidate], batch_size: int, epochs: int):
    """DINO's optimiser and schedule, each head at its own rate: SGD with momentum, a cosine that falls after every epoch.
    batch_size: images a step over all ranks; the rates are per 256."""
    groups = [{"params": head.parameters(), "lr": c.lr * batch_size / 256} for head, c in zip(grid.heads, candidates, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)


def sgd_step(grid: HeadGrid, optimizer, features: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """One step of every head on this rank's rows of a batch of `batch_size`; the sums of their losses over the rows, [H]."""
    optimizer.zero_grad()
    losses = grid.losses(features, labels)[0].sum(0)
    (losses.sum() / batch_size).backward()
    for parameter in grid.parameters():
        utils.sum_over_ranks(parameter.grad)
    optimizer.step()
    return losses.detach()


def fit_logistic(head: nn.Linear, features: Tensor, labels: Tensor, l2: float) -> None:
    """Fits `head` in place, from its present weights: the minimum of mean cross-entropy + l2 / 2 |W|^2, by L-BFGS.

    features: [N, F], labels: [N]; on several ranks each works on its share of the rows. The features are centred, which does
    not move the minimum, and divided by one number so that their mean variance is 1, which gives `l2` one meaning for all
    backbones; the fitted head takes them as they are.
    """
    weight, bias = head.weight, head.bias
    mean, scale = features.mean(0), features.var(0, correction=0).mean().sqrt().clamp_min(1e-12)
    count, features, labels = len(labels), (utils.share(features) - mean) / scale, utils.share(labels)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, history_size=10, tolerance_grad=1e-6, tolerance_change=1e-8,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = torch.zeros((), device=weight.device)
        for rows, truth in zip(features.split(LBFGS_ROWS), labels.split(LBFGS_ROWS)):
            loss = F.cross_entropy(head(rows), truth, reduction="sum") / count
            loss.backward()
            total += loss.detach()
        for part in (total, weight.grad, bias.grad):
            utils.sum_over_ranks(part)
        weight.grad.add_(weight.detach(), alpha=l2)
        return total + l2 / 2 * weight.detach().square().sum()

    with torch.no_grad():
        bias += weight @ mean
        weight *= scale
    optimizer.step(closure)
    with torch.no_grad():
        weight /= scale
        bias -= weight @ mean


# ---------------------------------------------------------------------------------------------------- images and batches

def choose_subset(labels: Tensor, shots: int | None, fraction: float | None, seed: int) -> Tensor:
    """Row numbers of the training images to use: `shots` of every class, or `fraction` of every class and at least one, or all."""
    generator = torch.Generator().manual_seed(utils.stream_seed(seed, SUBSET))
    if shots:
        return draw_shots(labels, shots, generator)
    if fraction:
        return utils.split_by_class(labels, lambda n: (fraction * n).round().clamp_min(1), generator)[0]
    return torch.arange(len(labels))


def hold_out(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers to train on and to choose on: of every class HELD_OUT, at least one, and never all. UserError if that is none."""
    generator = torch.Generator().manual_seed(utils.stream_seed(seed, HOLD_OUT))
    held, fit = utils.split_by_class(labels, lambda n: torch.minimum(n - 1, (HELD_OUT * n).round().clamp_min(1)), generator)
    if len(held) == 0:
        raise utils.UserError("one image per class leaves none to choose between several heads on; give one --lr, --n_last_blocks "
                              "and --avgpool_patchtokens with --solver sgd, or more images")
    return fit, held


class EpochBatches:
    """The batches of an epoch (attribute `epoch`): all `count` rows in an order that seed and epoch fix, cut into parts that
    differ by at most one row. A part has at most `batch_size` rows over all ranks, or more where fewer would leave a rank without.

    Iterates over this rank's (epoch, row) of each batch, as a DataLoader's batch_sampler.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        if count < utils.world_size():
            raise utils.UserError(f"{count} training images cannot be spread over {utils.world_size()} processes; start fewer")
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, 0
        self.steps = max(1, min(-(-count // batch_size), count // utils.world_size()))

    def __len__(self):
        return self.steps

    def rows(self) -> tuple[Tensor, ...]:
        """Of all ranks, a tensor a batch."""
        generator = torch.Generator().manual_seed(utils.stream_seed(self.seed, ORDER, self.epoch))
        return torch.randperm(self.count, generator=generator).tensor_split(self.steps)

    def __iter__(self):
        for batch in self.rows():
            yield [(self.epoch, row) for row in utils.share(batch).tolist()]


class AugmentedImages(Dataset):
    """Image tensors and labels of PIL images, under (epoch, row): a view depends on seed, epoch and row alone, not on the rank
    or worker that makes it."""

    def __init__(self, dataset, rows: Tensor, transform, seed: int):
        self.dataset, self.rows, self.transform, self.seed = dataset, rows.tolist(), transform, seed

    def __getitem__(self, key):
        epoch, row = key
        image, label = self.dataset[self.rows[row]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(utils.stream_seed(self.seed, CROP, epoch, row))
            return self.transform(image), label


def train_transform(description: Description) -> transforms.Compose:
    """DINO's augmentation for linear classification: PIL image -> float [3, S, S]."""
    return transforms.Compose([
        transforms.RandomResizedCrop(description.image_size), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(description.mean, description.std)])


# ------------------------------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add_evaluation_flags(parser)
    parser.set_defaults(output_dir=Path("."))  # DINO's
    add("--n_last_blocks", type=utils.positive_int, nargs="+", help="of a ViT: class tokens of that many last blocks (default: 4)")
    add("--avgpool_patchtokens", type=utils.boolean, nargs="+", metavar="true|false",
        help="of a ViT: add the mean patch token of the last block (default: false)")
    add("--lr", type=utils.positive_float, nargs="+", help="per 256 images; several are trained at once (default: 0.001)")
    add("--epochs", type=utils.positive_int, help="of SGD (default: 100)")
    add("--solver", choices=("sgd", "lbfgs"), default="sgd", help="lbfgs: L2-regularised logistic regression, without augmentation")
    add("--cache_features", action="store_true", help="SGD without augmentation, on features that are computed once")
    add("--shots", type=utils.positive_int, help="training images of each class (default: all)")
    add("--fraction", type=float, help="share of each class's training images, such as 0.01 (default: all)")
    add("--num_labels", type=utils.positive_int, help="number of classes (default: the data set's)")
    add("--val_freq", type=utils.positive_int, default=1, help="epochs between evaluations")
    add("--evaluate", action="store_true", help="only measure the head of --pretrained_linear")
    add("--pretrained_linear", type=Path, help="checkpoint of a head, ours or DINO's")
    return complete_args(parser, parser.parse_args(argv))


def complete_args(parser, args):
    """Fills in what depends on other flags. UserError for flags that contradict each other."""
    complete_evaluation_flags(parser, args)
    if args.evaluate != (args.pretrained_linear is not None):
        raise utils.UserError("--evaluate and --pretrained_linear FILE go together: a saved head is only measured")
    if args.evaluate:
        refuse_flags(parser, args, ["solver", "lr", "epochs", "cache_features", "shots", "fraction", "val_freq"], "--evaluate")
    if args.solver == "lbfgs":
        refuse_flags(parser, args, ["lr", "epochs", "cache_features", "val_freq"], "--solver lbfgs, which runs to convergence")
        args.epochs = 1  # one record
    args.lr, args.epochs = args.lr or [0.001], args.epochs or 100
    if args.shots and args.fraction is not None:
        raise utils.UserError("--shots and --fraction both choose the training images; give one of them")
    if args.fraction is not None and not 0 < args.fraction <= 1:
        raise utils.UserError(f"--fraction must be above 0 and at most 1, got {args.fraction}")
    return args


def count_labels(num_labels: int | None, *splits) -> int:
    """The number of classes: of names, or without names --num_labels, or what the labels of all splits need. UserError if that
    contradicts the flag or the labels, or for images that cannot be read by number."""
    if any(isinstance(split, utils.ImageStream) for split in splits):
        raise utils.UserError("this source is a stream of images, but a linear probe reads them in random order; use one that is "
                              "read by number, such as hfds/NAME, or class folders")
    labels, names = {label for split in splits for label in split.targets}, splits[0].classes
    found = len(names) if names else num_labels or max(labels) + 1
    if num_labels not in (None, found):
        raise utils.UserError(f"--num_labels {num_labels}, but the data set has {found} classes; leave the flag out")
    if min(labels) < 0 or max(labels) >= found:
        raise utils.UserError(f"the labels run from {min(labels)} to {max(labels)}, but there are {found} classes; check the data "
                              "set and --num_labels")
    return found


def make_candidates(args, backbone: nn.Module) -> list[Candidate]:
    """Every combination of what the flags list, those with the same features in a row."""
    given = {name: getattr(args, name) for name in ("n_last_blocks", "avgpool_patchtokens")}
    if isinstance(backbone, VisionTransformer):
        blocks, avgpool = unique(given["n_last_blocks"] or [4]), unique(given["avgpool_patchtokens"] or [False])
        if max(blocks) > len(backbone.blocks):
            raise utils.UserError(f"--n_last_blocks {max(blocks)}: the backbone has {len(backbone.blocks)} blocks")
    else:
        if named := [f"--{name}" for name, value in given.items() if value is not None]:
            raise utils.UserError(f"{' and '.join(named)} only applies to vit_*, this backbone's pooled output is used; leave out")
        blocks, avgpool = [None], [None]
    if args.solver == "lbfgs":
        return [Candidate(n, pool, l2=l2) for n, pool, l2 in itertools.product(blocks, avgpool, L2_GRID)]
    return [Candidate(n, pool, lr=lr) for n, pool, lr in itertools.product(blocks, avgpool, unique(args.lr))]


def describe(candidate: Candidate) -> dict:
    """For a record: what applies to its solver."""
    return {name: value for name, value in candidate._asdict().items() if value is not None}


def unique(values: list) -> list:
    return list(dict.fromkeys(values))


# ------------------------------------------------------------------------------------------------------------------ probe

class Probe:
    """What a probe consists of, built from the flags: frozen features, images, heads, and how far their training has come."""

    def __init__(self, args, device: torch.device):
        self.args, self.device = args, device
        backbone, self.description = load_from_flags(args)
        self.candidates = make_candidates(args, backbone)
        self.train, self.test = utils.build_splits(args.dataset, args.data_path, download=args.download)
        self.num_labels = count_labels(args.num_labels, self.train, self.test)

        labels = torch.tensor(self.train.targets)
        self.rows = choose_subset(labels, args.shots, args.fraction, args.seed)     # of the training images
        self.fit, self.held = torch.arange(len(self.rows)), torch.arange(0)         # of `rows`: to train on, to choose on
        if len(self.candidates) > 1:
            self.fit, self.held = hold_out(labels[self.rows], args.seed)

        self.fingerprint = [checksum(backbone), len(self.rows), len(self.test)]
        torch.backends.cudnn.deterministic = True  # the same command gives the same bits
        self.features = FrozenFeatures(backbone, self.candidates).to(device)
        self.grid = HeadGrid([self.features.columns(c) for c in self.candidates], self.num_labels, args.seed).to(device)
        self.batches = EpochBatches(len(self.fit), args.batch_size_per_gpu * utils.world_size(), args.seed)
        self.optimizer = self.scheduler = None
        if args.solver == "sgd":
            self.optimizer, self.scheduler = make_sgd(self.grid, self.candidates, self.batches.batch_size, args.epochs)
        self.epoch, self.chosen, self.best_acc, self.seconds = 0, 0, 0.0, 0.0       # `chosen` is the number of a candidate

    def flags(self) -> dict:
        """What a resumed run must share with the one that saved."""
        return {**utils.plain(self.args), "num_labels": self.num_labels, "world_size": utils.world_size()}

    def state_dict(self) -> dict:
        head = self.grid.heads[self.chosen].state_dict()
        return {"epoch": self.epoch, "state_dict": {f"linear.{name}": value for name, value in head.items()},
                "candidate": self.candidates[self.chosen]._asdict(), "chosen": self.chosen, "heads": self.grid.state_dict(),
                "optimizer": self.optimizer and self.optimizer.state_dict(),
                "scheduler": self.scheduler and self.scheduler.state_dict(),
                "best_acc": self.best_acc, "seconds": self.seconds, "fingerprint": self.fingerprint, "args": self.flags()}

    def load_state_dict(self, state: dict, path: Path) -> None:
        """Goes on from the checkpoint `state`, read from `path`. UserError if it is of another run."""
        if not isinstance(state.get("args"), dict):
            raise utils.UserError(f"{path} is no checkpoint of this script: it lacks its flags; move it away")
        utils.check_same_run(state["args"], self.flags(), path, FREE_ON_RESUME)
        if state.get("fingerprint") != self.fingerprint:
            raise utils.UserError(f"{path} was trained on another backbone or on other images; choose another --output_dir")
        try:
            self.grid.load_state_dict(state["heads"])
            if self.optimizer:
                self.optimizer.load_state_dict(state["optimizer"])
                self.scheduler.load_state_dict(state["scheduler"])
            for name in ("epoch", "chosen", "best_acc", "seconds"):
                setattr(self, name, state[name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise utils.UserError(f"{path} does not fit this script's heads: {error!r}; move it away") from error

    def prepare(self) -> None:
        """Computes, once, the features of all images that are used as they are, without augmentation."""
        cached = self.args.cache_features or self.args.solver == "lbfgs"
        extract = functools.partial(fixed_features, self.args, self.features, self.description, device=self.device)
        self.test_set, self.held_set, self.cache = extract(self.test), None, None
        if cached:
            self.cache = features, labels = extract(self.train, rows=self.rows)
            self.held_set = features[self.held], labels[self.held]
        else:
            if len(self.held):
                self.held_set = extract(self.train, rows=self.rows[self.held])
            images = AugmentedImages(self.train, self.rows[self.fit], train_transform(self.description), self.args.seed)
            workers = self.args.num_workers
            self.loader = DataLoader(images, batch_sampler=self.batches, num_workers=workers, persistent_workers=workers > 0,
                                     pin_memory=self.device.type == "cuda")


def checksum(backbone: nn.Module) -> int:
    """Of its weights, on the CPU."""
    return zlib.crc32(b"".join(value.float().numpy().tobytes() for value in backbone.state_dict().values()))


def fixed_features(args, features: FrozenFeatures, description: Description, dataset, device, rows=None) -> tuple[Tensor, Tensor]:
    """Features [N, F] and labels [N], on every rank, of the images at `rows` (default: all) without augmentation."""
    transform = utils.eval_transform(description.image_size, description.mean, description.std)
    images = utils.LabelledImages(dataset, dataset.classes, transform, None if rows is None else rows.tolist())
    amp = utils.select_amp(args.amp, device)
    rows, labels = extract_features(features, images, device, args.batch_size_per_gpu, args.num_workers, amp)
    return rows, labels.clone()  # autograd keeps labels, and would not keep those of the inference mode


def train_batches(probe: Probe):
    """This rank's features [b, F] and labels [b] in each batch of the epoch."""
    if probe.cache:
        features, labels = probe.cache
        for batch in probe.batches.rows():
            rows = probe.fit[utils.share(batch)]
            yield features[rows].to(probe.device), labels[rows].to(probe.device)
    else:
        amp = utils.select_amp(probe.args.amp, probe.device)
        for images, labels in probe.loader:
            with torch.no_grad(), torch.autocast(probe.device.type, amp, enabled=amp is not None):
                features = probe.features(images.to(probe.device, non_blocking=True))
            yield features.float(), labels.to(probe.device)


def train_epoch(probe: Probe) -> Tensor:
    """One pass of SGD over the training images; each head's mean loss [H]."""
    probe.batches.epoch = probe.epoch
    sums = torch.zeros(len(probe.candidates), device=probe.device)
    steps = zip(probe.batches.rows(), train_batches(probe))
    epochs, length = probe.args.epochs, len(probe.batches)
    title = f"epoch {probe.epoch + 1}/{epochs}"
    for (batch, (features, labels)), _ in utils.progress(steps, probe.epoch * length, epochs * length, title):
        sums += sgd_step(probe.grid, probe.optimizer, features, labels, len(batch))
    probe.scheduler.step()
    return utils.sum_over_ranks(sums).cpu() / len(probe.fit)


def fit_heads(probe: Probe) -> Tensor:
    """The logistic regression of every candidate, each begun at the solution for the l2 above it; each head's mean loss [H]."""
    features, labels = (tensor[probe.fit] for tensor in probe.cache)
    grid = probe.grid
    for index, _ in utils.progress(range(len(grid.heads)), 0, len(grid.heads), "logistic regression"):
        head, columns = grid.heads[index], grid.columns[index]
        if index and columns == grid.columns[index - 1]:
            head.load_state_dict(grid.heads[index - 1].state_dict())
        fit_logistic(head, features[:, columns], labels, probe.candidates[index].l2)
    return measure(probe.grid, features, labels, probe.device).loss


def evaluate(probe: Probe) -> tuple[Scores | None, Scores]:
    """Chooses a head; scores of all on the held-out images, if there are any, and on the test images."""
    held = None
    if len(probe.held):
        held = measure(probe.grid, *probe.held_set, probe.device)
        probe.chosen = choose_head(held, metric(probe.args.dataset))
    if probe.args.solver == "lbfgs":
        features, labels = probe.cache
        head, columns = probe.grid.heads[probe.chosen], probe.grid.columns[probe.chosen]
        fit_logistic(head, features[:, columns], labels, probe.candidates[probe.chosen].l2)
    return held, measure(probe.grid, *probe.test_set, probe.device)


def choose_head(held: Scores, metric: str) -> int:
    """The head of the highest accuracy on the held-out images; among equals, of the lowest loss."""
    accuracy, loss = getattr(held, metric).tolist(), held.loss.tolist()
    return max(range(len(loss)), key=lambda head: (math.isfinite(loss[head]), accuracy[head], -loss[head]))


def metric(dataset: str) -> str:
    """The field of Scores by which papers compare on this data set."""
    return "class_acc1" if dataset in MEAN_PER_CLASS else "acc1"


def score_record(scores: Scores, head: int, prefix: str, dataset: str) -> dict:
    """Plain numbers of one head for a record; None for the loss of a head that diverged."""
    names = ("loss", "acc1", "acc5", "class_acc1") if dataset in MEAN_PER_CLASS else ("loss", "acc1", "acc5")
    values = {f"{prefix}_{name}": getattr(scores, name)[head].item() for name in names}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def write_heads(probe: Probe, held: Scores | None, test: Scores, path: Path) -> None:
    """All candidates with their scores, as a JSON list."""
    records = []
    for head, candidate in enumerate(probe.candidates):
        record = describe(candidate) | {"chosen": head == probe.chosen}
        if held:
            record |= score_record(held, head, "held_out", probe.args.dataset)
        records.append(record | score_record(test, head, "test", probe.args.dataset))
    utils.replace_file(path, lambda file: json.dump(records, file, indent=1))


# ----------------------------------------------------------------------------------------------------------- command line

def run(probe: Probe) -> None:
    """Trains, evaluates, records and saves until --epochs are done, from where an earlier run stopped."""
    args, folder = probe.args, probe.args.output_dir
    path = folder / CHECKPOINT
    if utils.sum_over_ranks(torch.tensor(int(utils.rank() == 0 and path.exists()))):  # rank 0 decides for all, then may write it
        probe.load_state_dict(utils.load_checkpoint(path), path)
    elif utils.read_records(folder / "log.txt"):
        raise utils.UserError(f"{folder / 'log.txt'} belongs to another run, or to one whose {CHECKPOINT} is gone; move it away or "
                              "choose another --output_dir")
    elif utils.rank() == 0:
        utils.save_checkpoint(probe.state_dict(), path)  # from now on a log has its checkpoint
    log = utils.RunLog(folder, (probe.epoch, 0)) if utils.rank() == 0 else None
    if probe.epoch < args.epochs:
        started = time.monotonic()
        probe.prepare()
        probe.seconds += time.monotonic() - started
        if log:
            images = f"{len(probe.fit)} images to train on, {len(probe.held)} to choose on, {len(probe.test)} to test on"
            print(f"{args.dataset}, {probe.num_labels} classes: {images}; heads: {len(probe.candidates)}; {probe.device}; "
                  f"epoch {probe.epoch}; {folder}", flush=True)
    while probe.epoch < args.epochs:
        record = run_epoch(probe, folder)
        probe.epoch += 1
        if log:
            log.write(record)
            utils.save_checkpoint(probe.state_dict(), path)
    if log:
        if not log.records:
            raise utils.UserError(f"the run in {folder} is finished, but its log.txt is gone; choose another --output_dir")
        print(f"done: {utils.format_record(log.records[-1])}", flush=True)


def run_epoch(probe: Probe, folder: Path) -> dict:
    """Trains for an epoch (for the logistic regression, to its end) and evaluates if that is due: the epoch's record."""
    args, started = probe.args, time.monotonic()
    rates = probe.scheduler.get_last_lr() if probe.scheduler else None
    losses = fit_heads(probe) if args.solver == "lbfgs" else train_epoch(probe)
    if not losses.isfinite().any():
        raise utils.UserError(f"training diverged in epoch {probe.epoch + 1}: no loss is finite; start anew with a lower --lr")
    scores = {}
    if probe.epoch % args.val_freq == 0 or probe.epoch + 1 == args.epochs:
        held, test = evaluate(probe)
        scores = score_record(test, probe.chosen, "test", args.dataset)
        probe.best_acc = max(probe.best_acc, getattr(test, metric(args.dataset))[probe.chosen].item())
        if utils.rank() == 0:
            write_heads(probe, held, test, folder / HEADS)
    probe.seconds += time.monotonic() - started
    rate = {"train_lr": rates[probe.chosen]} if rates else {}
    return {"epoch": probe.epoch, **describe(probe.candidates[probe.chosen]), "train_loss": losses[probe.chosen].item(), **rate,
            "seconds": probe.seconds, **scores}


def evaluate_saved(args, device: torch.device) -> dict:
    """A record of the scores on the test images of the head in --pretrained_linear."""
    weights, saved, trained_on = load_head(args.pretrained_linear)
    backbone, description = load_from_flags(args)
    if trained_on not in (None, checksum(backbone)):
        raise utils.UserError(f"the head in {args.pretrained_linear} was trained on another backbone; give that one's "
                              "--pretrained_weights, or the --seed of its random ones")
    candidate = check_candidate(args, saved, backbone)
    features = FrozenFeatures(backbone, [candidate]).to(device)
    dataset = utils.build_dataset(args.dataset, args.data_path, "test", download=args.download)
    grid = HeadGrid([features.columns(candidate)], count_labels(args.num_labels, dataset))
    head = grid.heads[0]
    if weights["weight"].shape != head.weight.shape:
        raise utils.UserError(f"the head in {args.pretrained_linear} has {list(weights['weight'].shape)} weights, but these "
                              f"features and classes need {list(head.weight.shape)}; check --n_last_blocks")
    if saved is None and candidate.avgpool_patchtokens:  # DINO puts each mean behind its entry of the class token
        weights["weight"] = weights["weight"].unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)
    head.load_state_dict(weights)
    scores = measure(grid.to(device), *fixed_features(args, features, description, dataset, device), device)
    return {**describe_run(args, description), "head": str(args.pretrained_linear), **describe(candidate),
            **score_record(scores, 0, "test", args.dataset)}


def load_head(path: Path) -> tuple[dict, Candidate | None, int | None]:
    """A saved head's weight [C, F] and bias [C], and if saved with it what features it sees and the checksum of their backbone.
    UserError if it is none."""
    state = utils.load_checkpoint(path)
    try:
        weights = {name.removeprefix("module.").removeprefix("linear."): value for name, value in state["state_dict"].items()}
        weights = {"weight": weights["weight"], "bias": weights["bias"]}
        if "candidate" not in state:
            return weights, None, None
        return weights, Candidate(**state["candidate"]), state["fingerprint"][0]
    except (KeyError, AttributeError, TypeError, IndexError) as error:
        raise utils.UserError(f"{path} is no checkpoint of a linear head: {error!r}") from error


def check_candidate(args, saved: Candidate | None, backbone) -> Candidate:
    """What features the saved head sees: as saved, or as the flags say."""
    told, *more = make_candidates(args, backbone)
    if saved is None:
        if more:
            raise utils.UserError("--evaluate measures one head; give one --n_last_blocks and one --avgpool_patchtokens")
        if told.avgpool_patchtokens and told.n_last_blocks > 1:
            raise utils.UserError("DINO's heads see the mean patch token beside one class token; give --n_last_blocks 1")
        return told._replace(lr=None)
    for name in ("n_last_blocks", "avgpool_patchtokens"):
        if getattr(args, name) not in (None, [getattr(saved, name)]):
            raise utils.UserError(f"--{name} contradicts {args.pretrained_linear}, whose head was trained with "
                                  f"{getattr(saved, name)}; leave it out")
    return saved


def main(argv=None):
    args = parse_args(argv)
    device = utils.init_distributed(args.device, args.dist_url)
    if args.evaluate:
        write_record(evaluate_saved(args, device), args.output_dir / "linear.txt")
    else:
        run(Probe(args, device))


if __name__ == "__main__":
    utils.run_script(main)
