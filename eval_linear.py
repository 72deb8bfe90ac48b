"""Trains linear classifiers on frozen features: DINO's protocol, grids of heads, logistic regression.

    python eval_linear.py --pretrained_weights run/checkpoint.pth --data_path IMAGENET       # DINO's protocol
    torchrun --nproc_per_node=8 eval_linear.py ...
    python eval_linear.py ... --lr 0.001 0.003 0.01 --avgpool_patchtokens false true   # six heads in one pass
    python eval_linear.py ... --cache_features                       # no augmentation, features computed once
    python eval_linear.py ... --solver lbfgs --dataset flowers102    # logistic regression, for transfer
    python eval_linear.py ... --fraction 0.01                        # 1 % of the labels; --shots 5: 5 a class
    python eval_linear.py ... --evaluate                             # no training: the head in --output_dir

One head trains on all training images. Several train on nine tenths of them, and the one that is best on the
rest is chosen; test images have no say. A logistic regression is then fitted again, to all training images.

The same command again resumes. Written to --output_dir: checkpoint.pth.tar, log.txt (a JSON record per
epoch), heads.json (all heads); linear.txt by --evaluate.
"""
import itertools
import json
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import NamedTuple

import utils
from utils import UserError, positive_int

MEAN_PER_CLASS = ("aircraft", "caltech101", "flowers102", "pets")  # where papers report the mean over classes
FREE_ON_RESUME = ("output_dir", "data_path", "device", "dist_url", "download", "local_rank", "num_workers",
                  "pretrained_weights")  # a checksum tells backbones apart
CHECKPOINT = "checkpoint.pth.tar"  # DINO's name
HELD_OUT = 0.1  # share of each class's training images that heads are chosen on
L2_GRID = tuple(10 ** (-k / 2) for k in range(-2, 13))  # of the logistic regression: 10 ... 1e-6
MAX_LOGITS = 2 ** 22    # held at once by `measure`: 16 MB
LBFGS_CHUNK = 2 ** 16   # rows whose logits `fit_logistic` holds at once
HOLD_OUT, ORDER, CROP, INIT = range(1, 5)  # random streams, see utils.stream_seed; 0 is data.choose_subset's


def parse_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    utils.add_evaluation_flags(parser)
    add("--output_dir", type=utils.path, default=Path("linear"),
        help="folder of the results and the checkpoint, below the current folder")
    add("--n_last_blocks", type=positive_int, nargs="+",
        help="of a ViT: number of last blocks whose class tokens are used (default: 4)")
    add("--avgpool_patchtokens", type=utils.boolean, nargs="+", metavar="true|false",
        help="of a ViT: the last block's mean patch token as well (default: false)")
    add("--lr", type=utils.positive_float, nargs="+",
        help="learning rate per 256 images; several train at once (default: 0.001)")
    add("--epochs", type=positive_int, help="epochs of SGD (default: 100)")
    add("--solver", choices=("sgd", "lbfgs"), default="sgd",
        help="lbfgs: L2-regularised logistic regression, without augmentation")
    add("--cache_features", action="store_true", help="SGD without augmentation, on features computed once")
    add("--shots", type=positive_int, help="training images of each class (default: all)")
    add("--fraction", type=utils.number(float, 1e-9, 1),
        help="share of each class's training images, such as 0.01 (default: all)")
    add("--num_labels", type=positive_int, help="number of classes (default: the data set's)")
    add("--val_freq", type=positive_int, default=1, help="epochs between evaluations")
    add("--evaluate", action="store_true", help="only measure the head of an earlier run in --output_dir")
    args = parser.parse_args(argv)
    if args.evaluate:
        utils.refuse(args, ("lr", "epochs", "cache_features", "shots", "fraction", "n_last_blocks",
                            "avgpool_patchtokens"), "with --evaluate")
    if args.solver == "lbfgs":
        utils.refuse(args, ("lr", "epochs", "cache_features"), "with --solver lbfgs, which converges")
        args.epochs = 1
    if args.shots and args.fraction:
        raise UserError("--shots and --fraction both choose the training images; give one of them")
    args.lr, args.epochs = args.lr or [0.001], args.epochs or 100
    return args


if __name__ == "__main__":
    utils.check_flags(parse_args)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchvision import transforms  # noqa: E402

import data  # noqa: E402
import distributed  # noqa: E402
import pretrained  # noqa: E402
from vision_transformer import VisionTransformer  # noqa: E402


# ----------------------------------------------------------------------------------------- features and heads

class Candidate(NamedTuple):
    """What tells a head of the grid from the others; None for what its backbone or solver lacks."""
    n_last_blocks: int | None = None
    avgpool_patchtokens: bool | None = None
    lr: float | None = None
    l2: float | None = None

    def record(self) -> dict:
        return {name: value for name, value in self._asdict().items() if value is not None}


def make_candidates(args, backbone: nn.Module) -> list[Candidate]:
    """Every combination of what the flags list, those with the same features in a row."""
    blocks, avgpool = args.n_last_blocks or [4], args.avgpool_patchtokens or [False]
    if not isinstance(backbone, VisionTransformer):
        utils.refuse(args, ("n_last_blocks", "avgpool_patchtokens"), "with a backbone that is no vit_*")
        blocks, avgpool = [None], [None]
    elif max(blocks) > len(backbone.blocks):
        raise UserError(f"--n_last_blocks {max(blocks)}: the backbone has {len(backbone.blocks)} blocks")
    lrs, l2s = (args.lr, [None]) if args.solver == "sgd" else ([None], L2_GRID)
    return [Candidate(*values) for values in dict.fromkeys(itertools.product(blocks, avgpool, lrs, l2s))]


class FrozenFeatures(nn.Module):
    """What all candidates need: images [B, 3, H, W] -> features [B, F]. Of a VisionTransformer: class tokens
    of the last blocks in order, then the last block's mean patch token; of others their output."""

    def __init__(self, backbone: nn.Module, candidates: list[Candidate]):
        super().__init__()
        self.backbone = backbone
        self.blocks = max(c.n_last_blocks or 1 for c in candidates)
        self.avgpool = any(c.avgpool_patchtokens for c in candidates)

    def forward(self, images: Tensor) -> Tensor:
        if not isinstance(self.backbone, VisionTransformer):
            return self.backbone(images)
        patches, prefixes = zip(*self.backbone.get_intermediate_layers(                # [B, P, D], [B, 1, D]
            images, self.blocks, return_prefix_tokens=True, norm=True))
        means = [patches[-1].mean(1)] if self.avgpool else []
        return torch.cat([prefix[:, 0] for prefix in prefixes] + means, 1)

    def columns(self, candidate: Candidate) -> slice:
        """The columns of the features that a candidate's head sees."""
        first = self.blocks - (candidate.n_last_blocks or 1)
        last = self.blocks + bool(candidate.avgpool_patchtokens)
        return slice(first * self.backbone.embed_dim, last * self.backbone.embed_dim)


class HeadGrid(nn.Module):
    """H linear heads, trained and measured together: features [B, F] -> logits [B, H, C].
    columns: the slice of the features that each head sees. Heads of one width start equal."""

    def __init__(self, columns: list[slice], num_classes: int, seed: int = 0):
        super().__init__()
        self.columns = columns
        self.heads = nn.ModuleList(nn.Linear(c.stop - c.start, num_classes) for c in columns)
        for head in self.heads:
            generator = torch.Generator().manual_seed(utils.stream_seed(seed, INIT))
            nn.init.normal_(head.weight, std=0.01, generator=generator)
            nn.init.zeros_(head.bias)

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(features[:, c]) for head, c in zip(self.heads, self.columns)], 1)

    def losses(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each image under each head [B, H], and the logits [B, H, C]."""
        logits = self(features)
        labels = labels.repeat_interleave(logits.shape[1])
        losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
        return losses.view(logits.shape[:2]), logits


@torch.no_grad()
def measure(grid: HeadGrid, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of each head [H], on features [N, F]: its loss and, in percent, acc1, acc5 (top-C if C < 5) and
    class_acc1, the mean over classes of acc1. Each rank takes its share of the rows; all return the same."""
    heads, classes = len(grid.heads), grid.heads[0].out_features
    counts = labels.bincount(minlength=classes)
    weights = len(labels) / (counts[labels] * (counts > 0).sum())       # of images in the mean over classes
    totals = torch.zeros(4, heads, device=features.device)
    for rows in distributed.share(torch.arange(len(labels))).split(max(1, MAX_LOGITS // (heads * classes))):
        losses, logits = grid.losses(features[rows], labels[rows])
        hits = logits.topk(min(5, classes)).indices == labels[rows, None, None]         # [B, H, 5]
        hit1, hit5 = hits[..., 0].float(), hits.any(2).float()
        totals += torch.stack([losses, 100 * hit1, 100 * hit5, 100 * weights[rows, None] * hit1]).sum(1)
    means = distributed.sum_over_ranks(totals).cpu().double() / len(labels)
    return dict(zip(("loss", "acc1", "acc5", "class_acc1"), means))


# ------------------------------------------------------------------------------------------------ two solvers

def make_sgd(grid: HeadGrid, candidates: list[Candidate], batch_size: int, epochs: int):
    """DINO's optimiser and schedule, each head at its own rate: SGD with momentum, a cosine by epochs.
    batch_size: images per step over all ranks; the rates are per 256."""
    groups = [{"params": head.parameters(), "lr": candidate.lr * batch_size / 256}
              for head, candidate in zip(grid.heads, candidates, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)


def sgd_epoch(grid: HeadGrid, optimizer, batches) -> Tensor:
    """A step of all heads for each of `batches`: this rank's features [b, F], labels [b], and the number of
    images over all ranks. Returns each head's loss, summed over all images [H]."""
    sums = torch.zeros(len(grid.heads), device=grid.heads[0].weight.device)
    for features, labels, batch_size in batches:
        optimizer.zero_grad()
        losses = grid.losses(features, labels)[0].sum(0)
        (losses.sum() / batch_size).backward()
        for parameter in grid.parameters():
            distributed.sum_over_ranks(parameter.grad)
        optimizer.step()
        sums += losses.detach()
    return distributed.sum_over_ranks(sums).cpu()


def fit_logistic(head: nn.Linear, features: Tensor, labels: Tensor, l2: float) -> None:
    """Fits `head` in place, from its present weights: least mean cross-entropy + l2 / 2 |W|^2, by L-BFGS.

    features: [N, F], labels: [N]; each rank works on its share of the rows. Features are centred and scaled
    to a mean variance of 1, so that `l2` means the same for all backbones; the fitted head takes them as
    they are.
    """
    weight, bias = head.weight, head.bias
    mean, scale = features.mean(0), features.var(0, correction=0).mean().sqrt().clamp_min(1e-12)
    count, labels = len(labels), distributed.share(labels)
    features = (distributed.share(features) - mean) / scale
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, history_size=10, tolerance_grad=1e-6,
                                  tolerance_change=1e-8, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = torch.zeros((), device=weight.device)
        for rows, truth in zip(features.split(LBFGS_CHUNK), labels.split(LBFGS_CHUNK)):
            loss = F.cross_entropy(head(rows), truth, reduction="sum") / count
            loss.backward()
            total += loss.detach()
        for part in (total, weight.grad, bias.grad):
            distributed.sum_over_ranks(part)
        weight.grad.add_(weight.detach(), alpha=l2)
        return total + l2 / 2 * weight.detach().square().sum()

    with torch.no_grad():
        bias += weight @ mean
        weight *= scale
    optimizer.step(closure)
    with torch.no_grad():
        weight /= scale
        bias -= weight @ mean


def fit_heads(grid: HeadGrid, candidates: list[Candidate], features: Tensor, labels: Tensor) -> Tensor:
    """The logistic regression of every candidate, from the solution of the one before; mean losses [H]."""
    title, quiet = "logistic regression", distributed.rank() > 0
    for index in utils.progress(range(len(candidates)), 0, len(candidates), title, quiet):
        head, columns = grid.heads[index], grid.columns[index]
        if index and columns == grid.columns[index - 1]:
            head.load_state_dict(grid.heads[index - 1].state_dict())
        fit_logistic(head, features[:, columns], labels, candidates[index].l2)
    return measure(grid, features, labels)["loss"]


# ----------------------------------------------------------------------------------------- images and batches

def hold_out(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and to choose on: HELD_OUT of every class, at least one image, never all."""
    generator = torch.Generator().manual_seed(utils.stream_seed(seed, HOLD_OUT))
    held, fit = data.split_by_class(
        labels, lambda n: torch.minimum(n - 1, (HELD_OUT * n).round().clamp_min(1)), generator)
    if len(held) == 0:
        raise UserError("one image per class leaves none to choose between several heads on; add images, or "
                        "train one head with --solver sgd")
    return fit, held


def equal_batches(count: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """All `count` indices in the epoch's random order, in batches whose sizes differ by at most one: of at
    most `batch_size` images over all ranks, and at least one for each rank."""
    generator = torch.Generator().manual_seed(utils.stream_seed(seed, ORDER, epoch))
    steps = max(1, min(-(-count // batch_size), count // distributed.world_size()))
    return torch.randperm(count, generator=generator).tensor_split(steps)


def augmentation(description: pretrained.Description):
    """DINO's, of training images: PIL image -> [3, S, S]."""
    return transforms.Compose([
        transforms.RandomResizedCrop(description.image_size), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(description.mean, description.std)])


def sgd_batches(args, network, description, images, fit_set, epoch, device):
    """The batches of `sgd_epoch` for one epoch of the images: of cached features, if fit_set has them, or of
    augmented images."""
    batch_size = args.batch_size_per_gpu * distributed.world_size()
    rows = equal_batches(len(images), batch_size, args.seed, epoch)
    own = [distributed.share(row) for row in rows]
    if fit_set:
        batches = (tuple(part[row] for part in fit_set) for row in own)
    else:
        views = data.SeededViews(images, augmentation(description))
        loader = data.seeded_loader(views, own, (args.seed, CROP, epoch), device, args.num_workers)
        batches = pretrained.feature_batches(network, loader, device, utils.select_amp(args.amp, device))
    title, done, total = f"epoch {epoch + 1}/{args.epochs}", epoch * len(rows), args.epochs * len(rows)
    batches = utils.progress(batches, done, total, title, quiet=distributed.rank() > 0)
    return ((features, labels.to(device), len(row)) for (features, labels), row in zip(batches, rows))


def fixed_features(args, network: FrozenFeatures, description, images: data.LabelledImages, rows, device):
    """Features [N, F] and labels [N], on every rank, of the images at `rows`, without augmentation."""
    transform = data.eval_transform(description.image_size, description.mean, description.std)
    return pretrained.extract_features(
        network, images.subset(rows, transform), device, args.batch_size_per_gpu, args.num_workers,
        utils.select_amp(args.amp, device))


# ----------------------------------------------------------------------------------------------------- script

def score_record(scores: dict[str, Tensor], head: int, prefix: str) -> dict:
    """Plain numbers of one head. None for a loss that is not finite."""
    return {f"{prefix}_{name}": value[head].item() if value[head].isfinite() else None
            for name, value in scores.items()}


def choose_head(held: dict[str, Tensor], dataset: str) -> int:
    """The head of the highest accuracy on the held-out images; among equals, of the lowest loss."""
    accuracy = held["class_acc1" if dataset in MEAN_PER_CLASS else "acc1"].tolist()
    scores = zip(held["loss"].isfinite().tolist(), accuracy, (-held["loss"]).tolist())
    return max(enumerate(scores), key=lambda item: item[1])[0]


def evaluate(args, grid: HeadGrid, candidates: list[Candidate], fit_set, held_set, test_set):
    """Chooses a head and writes all to heads.json. Returns its index and its record on the test images. The
    sets are features and labels, or None."""
    held = measure(grid, *held_set) if held_set else None
    chosen = choose_head(held, args.dataset) if held else 0
    if args.solver == "lbfgs":
        features, labels = map(torch.cat, zip(fit_set, held_set))
        fit_logistic(grid.heads[chosen], features[:, grid.columns[chosen]], labels, candidates[chosen].l2)
    test = measure(grid, *test_set)
    records = [candidate.record() | {"chosen": head == chosen}
               | (score_record(held, head, "held_out") if held else {}) | score_record(test, head, "test")
               for head, candidate in enumerate(candidates)]
    if distributed.rank() == 0:
        utils.replace_file(args.output_dir / "heads.json", lambda file: json.dump(records, file, indent=1))
    return chosen, score_record(test, chosen, "test")


def train_heads(args, backbone: nn.Module, description: pretrained.Description, device: torch.device) -> None:
    """Trains from where an earlier run stopped; after each epoch chooses a head, records and saves."""
    started, first, world = time.monotonic(), distributed.rank() == 0, distributed.world_size()
    candidates, path = make_candidates(args, backbone), args.output_dir / CHECKPOINT
    train, test = data.build_splits(args.dataset, args.data_path, download=args.download)
    num_labels, labels = data.count_labels(args.num_labels, train, test), torch.tensor(train.targets)
    fit, held = data.choose_subset(labels, args.shots, args.fraction, args.seed), ()
    if len(candidates) > 1:
        fit, held = (fit[rows] for rows in hold_out(labels[fit], args.seed))
    if len(fit) < world:
        raise UserError(f"{len(fit)} training images cannot be spread over {world} processes; start fewer")
    network = FrozenFeatures(backbone, candidates)
    grid = HeadGrid([network.columns(c) for c in candidates], num_labels, args.seed).to(device)
    parts, batch_size = {"heads": grid}, args.batch_size_per_gpu * world
    if args.solver == "sgd":
        optimizer, scheduler = make_sgd(grid, candidates, batch_size, args.epochs)
        parts |= {"optimizer": optimizer, "scheduler": scheduler}

    epoch, chosen, best_acc = 0, 0, 0.0
    flags = {**utils.plain(args), "num_labels": num_labels, "world_size": world}
    fingerprint = [pretrained.checksum(backbone), len(fit), train.checksum(), test.checksum()]
    if state := utils.read_resume(args, path, FREE_ON_RESUME, flags):
        if state["fingerprint"] != fingerprint:
            raise UserError(f"{path} had another backbone or other images; choose another --output_dir")
        utils.load_parts(state, parts, path)
        epoch, chosen, best_acc = state["epoch"], state["chosen"], state["best_acc"]
    distributed.check_same_over_ranks(epoch, *fingerprint)
    if first:
        print(f"{len(fit)} images to train on, {len(held)} to choose on, {len(test)} to test on; "
              f"classes: {num_labels}; heads: {len(candidates)}; {device}; {args.output_dir}\n"
              f"epochs done: {epoch} of {args.epochs}", flush=True)
    if epoch == args.epochs:
        return
    log = utils.RunLog(args.output_dir, (epoch, 0)) if first else None

    def save():
        head = grid.heads[chosen].state_dict()
        state = {"epoch": epoch, "state_dict": {f"linear.{name}": value for name, value in head.items()},
                 "optimizer": None, "scheduler": None, "best_acc": best_acc, "chosen": chosen,
                 "candidate": candidates[chosen]._asdict(), "fingerprint": fingerprint, "args": flags}
        if first:
            utils.save_checkpoint(state | {name: part.state_dict() for name, part in parts.items()}, path)

    def features_at(images, rows):
        return fixed_features(args, network, description, images, rows, device)

    fit_set = features_at(train, fit) if args.cache_features or args.solver == "lbfgs" else None
    held_set = features_at(train, held) if len(held) else None
    test_set, images = features_at(test, range(len(test))), train.subset(fit)
    if state is None:
        save()  # read_resume refuses a log without a checkpoint
    while epoch < args.epochs:
        rates, scores = None, {}
        if args.solver == "lbfgs":
            losses = fit_heads(grid, candidates, *fit_set)
        else:
            rates = scheduler.get_last_lr()
            batches = sgd_batches(args, network, description, images, fit_set, epoch, device)
            losses = sgd_epoch(grid, optimizer, batches) / len(images)
            scheduler.step()
        if not losses.isfinite().any():
            raise UserError(f"training diverged in epoch {epoch + 1}; start anew with a lower --lr")
        if epoch % args.val_freq == 0 or epoch + 1 == args.epochs:
            chosen, scores = evaluate(args, grid, candidates, fit_set, held_set, test_set)
            best_acc = max(best_acc, scores["test_acc1"])
        seconds, started = time.monotonic() - started, time.monotonic()
        train_scores = score_record({"loss": losses}, chosen, "train")
        if rates:
            train_scores["train_lr"] = rates[chosen]
        record = {"epoch": epoch, **candidates[chosen].record(), **train_scores, "seconds": seconds, **scores}
        epoch += 1
        if first:
            log.write(record)
        save()


def evaluate_head(args, backbone: nn.Module, description: pretrained.Description, device) -> None:
    """Measures the head of an earlier run on the test images and appends a record to linear.txt."""
    path = args.output_dir / CHECKPOINT
    state = utils.load_checkpoint(path)
    if state.get("fingerprint", [None])[0] != pretrained.checksum(backbone):
        raise UserError(f"the head in {path} was trained on another backbone; give that one's "
                        "--pretrained_weights, or the --seed of its random ones")
    candidate = Candidate(**state["candidate"])
    network = FrozenFeatures(backbone, [candidate])
    test = data.build_dataset(args.dataset, args.data_path, "test", download=args.download)
    grid = HeadGrid([network.columns(candidate)], data.count_labels(args.num_labels, test)).to(device)
    weights = {name.removeprefix("linear."): value for name, value in state["state_dict"].items()}
    utils.load_parts({"head": weights}, {"head": grid.heads[0]}, path)
    scores = measure(grid, *fixed_features(args, network, description, test, range(len(test)), device))
    record = pretrained.describe_run(args, description) | candidate.record() | score_record(scores, 0, "test")
    pretrained.write_record(record, args.output_dir / "linear.txt")


def main(argv=None):
    args = parse_args(argv)
    device = distributed.init_distributed(args.device, args.dist_url)
    utils.settle_amp(args, device)
    utils.set_backends(device, deterministic=True, tf32=False)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    writes = distributed.rank() == 0 and not args.evaluate
    with closing(utils.lock_folder(args.output_dir)) if writes else nullcontext():
        backbone, description = pretrained.load_from_flags(args)
        (evaluate_head if args.evaluate else train_heads)(args, backbone.to(device), description, device)
    distributed.leave()


if __name__ == "__main__":
    utils.run_script(main)
