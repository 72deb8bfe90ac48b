"""Trains a list of configurations, one after the other, through cifar/main.py's own loop: AUC-CL beside the losses of lightly.

    pip install lightly                                                         # the peers; AUC-CL alone does without
    python benchmarks/study.py tuning                                           # CIFAR-10, downloaded if missing
    python benchmarks/study.py batch_size --dataset folder --data_path DIR      # further flags are cifar/main.py's, for all runs
    python benchmarks/study.py my_runs.json --images 0 --dataset shapes --epochs 3
    python benchmarks/pictures.py cifar/results/studies                         # then: pictures of all tables

Studies: STUDIES below, or a JSON list of objects with "name", "flags" (of cifar/main.py) and, for a loss other than AUC-CL, "loss"
(a class of lightly.loss, or ClosedForm) and "options" (its arguments). The same command again goes on where it stopped, inside a
run too. Written below --output_dir: STUDY.csv, a row an epoch and run, with the linear accuracy in a run's last; STUDY/NAME/, the
run's log. A finished run's checkpoint is removed unless --keep_checkpoints is given.
"""
import csv
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import nn  # noqa: E402

import utils  # noqa: E402
from auccl_loss import SCORES, AUCCLLoss, symmetric_moments, unit_rows  # noqa: E402
from cifar import main as cifar  # noqa: E402
from cifar.data import load_data  # noqa: E402
from eval_linear import fit_logistic  # noqa: E402

RESULTS = Path(__file__).resolve().parents[1] / "cifar" / "results" / "studies"
L2 = 1e-3       # of the linear probe, the same for all runs
SUBSET = 7      # random stream: which images
BATCH_SIZES = (256, 64, 512, 16, 1024, 128, 32)
COLUMNS = ("run", "loss", "options", "batch_size", "epochs", "lr", "projector", "seed")  # then, of AUC-CL alone, empty for a default:
OF_THE_WEIGHTS = ("weights_lr", "negative_weight", "margin_negative_weight", "learn", "score")


class Config(NamedTuple):
    """A run: a unique name, the flags of cifar/main.py that are its own, the loss and its arguments."""

    name: str
    flags: dict
    loss: str = "AUCCLLoss"
    options: dict = {}


class Study(NamedTuple):
    configs: list[Config]
    images: int = 10_000    # training images, the same number of every class; 0: all
    flags: tuple = ()       # of cifar/main.py, for every run that has no value of its own


# ------------------------------------------------------------------------------------------------------------------ losses

class Peer(nn.Module):
    """A loss of lightly in AUCCLLoss's place: float32 under autocast as well, and the mean scores for the record."""

    def __init__(self, name: str, options: dict):
        super().__init__()
        try:
            from lightly import loss
        except ImportError as error:
            raise utils.UserError(f"{name} is a loss of the library lightly, which is not installed: pip install lightly") from error
        try:
            self.loss = getattr(loss, name)(**options)
        except (AttributeError, TypeError, ValueError) as error:
            raise utils.UserError(f"loss {name} with {options}: {error}") from error

    def forward(self, z0, z1):
        with torch.autocast(z0.device.type, enabled=False):
            z0, z1 = z0.float(), z1.float()
            with torch.no_grad():
                moments = symmetric_moments(unit_rows(z0), unit_rows(z1))
            self.means = torch.stack([moments.positive_mean, moments.negative_mean])
            return self.loss(z0, z1)

    def param_groups(self, lr, adaptive=False):
        return []


class ClosedForm(AUCCLLoss):
    """AUC-CL with a, b and alpha not learned but set to each batch's saddle point; the gradient is then no longer unbiased."""

    def _objective(self, moments):
        s, t = SCORES[self.score]
        with torch.no_grad():
            self.a.copy_(s * moments.positive_mean + t)
            self.b.copy_(s * moments.negative_mean + t)
            self.alpha.copy_(self.margin - self.a + self.margin_negative_weight * self.b)
        return super()._objective(moments)


def make_criterion(config: Config):
    """The loss of a configuration; None for the one that cifar/main.py builds from its flags."""
    if config.loss == "AUCCLLoss":
        return None
    if config.loss == "ClosedForm":
        return ClosedForm(learn=(), **config.options)
    return Peer(config.loss, config.options)


# ----------------------------------------------------------------------------------------------------------------- studies

# Of each method what won its trials (`tuning`), at batch 256: (loss, options, flags).
METHODS = {
    "AUC-CL": ("AUCCLLoss", {}, {"projector": "2048 1024", "lr": 4e-3, "weights_lr": 1e-3}),
    "NT-Xent": ("NTXentLoss", {"temperature": 0.2}, {"projector": "2048 1024", "lr": 2e-3}),
    "DCL": ("DCLLoss", {"temperature": 0.2}, {"projector": "2048 1024", "lr": 2e-3}),
    "Barlow Twins": ("BarlowTwinsLoss", {"lambda_param": 0.005}, {"projector": "2048 1024", "lr": 2e-3}),
    "VICReg": ("VICRegLoss", {}, {"projector": "2048 1024", "lr": 2e-3}),
}


def tuning() -> list[Config]:
    """Trials of each method at batch 256, six of AUC-CL and seven of each peer: four learning rates at its usual setting, then one
    change at a time of what its papers vary (temperature, weights of the terms) and of the projector."""
    wide, narrow, deep = "2048 1024", "512 128", "2048 2048 2048"
    softmax = [({"temperature": 0.1}, wide), ({"temperature": 0.5}, wide), ({"temperature": 0.2}, narrow)]
    trials = {  # loss -> usual options, changes
        "AUCCLLoss": ({}, [({}, narrow), ({}, deep)]),
        "NTXentLoss": ({"temperature": 0.2}, softmax),
        "DCLLoss": ({"temperature": 0.2}, softmax),
        "BarlowTwinsLoss": ({"lambda_param": 0.005},
                            [({"lambda_param": 0.02}, wide), ({"lambda_param": 0.005}, narrow), ({"lambda_param": 0.005}, deep)]),
        "VICRegLoss": ({}, [({"nu_param": 4.0}, wide), ({}, narrow), ({}, deep)]),
    }
    configs = []
    for loss, (usual, changes) in trials.items():
        settings = [(usual, wide, lr) for lr in (1e-3, 2e-3, 4e-3, 8e-3)] + [(options, projector, 2e-3) for options, projector in changes]
        for options, projector, lr in settings:
            name = "_".join([loss, *(f"{k}{v:g}" for k, v in options.items()), projector.replace(" ", "-"), f"lr{lr:g}"])
            configs.append(Config(name, {"projector": projector, "lr": lr}, loss, options))
    return configs


def ablation() -> list[Config]:
    """AUC-CL at batch 256, one thing changed at a time: which weights are learned and how fast, nu, kappa, projector, score."""
    changes = {
        "default": {}, "hold a": {"learn": "b alpha"}, "hold b": {"learn": "a alpha"}, "hold alpha": {"learn": "a b"},
        "hold all": {"learn": "none"}, "weights_lr 1e-2": {"weights_lr": 1e-2}, "weights_lr 1e-4": {"weights_lr": 1e-4},
        "unit score": {"score": "unit"}, "unit score, nu 64": {"score": "unit", "negative_weight": 64},
        **{f"nu {nu}, kappa 1": {"negative_weight": nu} for nu in (1, 2, 4, 8, 32, 64, "sum")},
        **{f"nu {nu}, kappa nu": {"negative_weight": nu, "margin_negative_weight": nu} for nu in (2, 4, 8, 16, 32, "sum")},
        **{f"projector {width}-{width // 2}": {"projector": f"{width} {width // 2}"} for width in (64, 128, 256, 512, 1024, 4096)},
    }
    usual = METHODS["AUC-CL"][2]
    configs = [Config(name, usual | flags) for name, flags in changes.items()]
    for config in configs:
        if config.flags.get("learn") == "none":
            del config.flags["weights_lr"]
    held = {name: value for name, value in usual.items() if name != "weights_lr"} | {"learn": "none"}
    return configs + [Config("closed form", held, "ClosedForm")]


def batch_size(seeds=(0, 1)) -> list[Config]:
    """Every method at seven batch sizes for equal epochs; all learning rates go with the square root of the batch size."""
    return [Config(f"{name} b{size} s{seed}", {name: value * (size / 256) ** 0.5 if name.endswith("lr") else value
                                               for name, value in flags.items()} | {"batch_size": size, "seed": seed}, loss, options)
            for seed in seeds for size in BATCH_SIZES for name, (loss, options, flags) in METHODS.items()]


def convergence() -> list[Config]:
    """Every method and the released preset, at batch 256 on all images."""
    return [Config(name, flags, loss, options) for name, (loss, options, flags) in METHODS.items()] + [
        Config("released-cifar", {"preset": "released-cifar", "warmup_epochs": 0})]


SHORT = ("--arch", "tiny", "--warmup_epochs", "0.5")
STUDIES = {"tuning": Study(tuning(), 10_000, (*SHORT, "--epochs", "5")),
           "ablation": Study(ablation(), 10_000, (*SHORT, "--epochs", "5")),
           "batch_size": Study(batch_size(), 10_000, (*SHORT, "--epochs", "6")),
           "convergence": Study(convergence(), 0, (*SHORT, "--epochs", "8"))}


def read_study(name: str) -> tuple[str, Study]:
    """The study of that name or JSON file, and what its files are called. UserError if there is none, or it is no list of runs."""
    if name in STUDIES:
        return name, STUDIES[name]
    path = Path(name)
    if path.suffix != ".json":
        raise utils.UserError(f"no study {name!r}: choose from {', '.join(STUDIES)}, or name a .json file")
    try:
        configs = [Config(**entry) for entry in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise utils.UserError(f"cannot read runs from {path}: {error}") from error
    names = {config.name for config in configs if isinstance(config.name, str) and Path(config.name).name == config.name}
    if not configs or len(names) < len(configs):
        raise utils.UserError(f"{path} must list at least one run, each with a name of its own that a folder can have")
    return path.stem, Study(configs)


# ------------------------------------------------------------------------------------------------------------------ driver

def subset(data, images: int):
    """`images` of the training images, the same number of every class and the same ones in every run; all for 0."""
    if images == 0:
        return data
    classes = int(data.bank_labels.max()) + 1
    each = images // classes
    if each < 1 or each > int(data.bank_labels.bincount().min()):
        raise utils.UserError(f"--images {images} are {each} of every class; the smallest class has {int(data.bank_labels.bincount().min())}")
    rows, _ = utils.split_by_class(data.bank_labels, lambda n: each, torch.Generator().manual_seed(utils.stream_seed(SUBSET)))
    rows = rows.sort().values
    return data._replace(train=data.bank[rows], bank=data.bank[rows], bank_labels=data.bank_labels[rows])


def arguments(config: Config, common: list[str], folder: Path):
    """cifar/main.py's parsed flags of a run."""
    flags = [part for name, value in config.flags.items() for part in (f"--{name}", *str(value).split())]
    return cifar.parse_args([*common, *flags, "--output_dir", str(folder)])


def linear_accuracy(run) -> float:
    """Top-1 test accuracy in percent of a logistic regression on the frozen features of the bank."""
    data = run.data
    bank, test = (cifar.features(run, images) for images in (data.bank, data.test))
    head = nn.Linear(bank.shape[1], int(data.bank_labels.max()) + 1).to(bank.device)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    fit_logistic(head, bank, data.bank_labels.to(bank.device), L2)
    with torch.no_grad():
        return 100 * (head(test).argmax(1).cpu() == data.test_labels).double().mean().item()


def train(config: Config, args, data, keep_checkpoints: bool) -> None:
    """Trains a configuration to its end and writes result.json. UserError if its folder holds a run of another."""
    folder = utils.make_output_dir(args.output_dir)
    described, saved = {**config._asdict(), "args": utils.plain(args), "images": len(data.train)}, folder / "config.json"
    for name in ("output_dir", "data_path"):
        del described["args"][name]
    if saved.exists() and json.loads(saved.read_text()) != described:
        raise utils.UserError(f"{folder} holds a run of another configuration; choose another --output_dir or move it away")
    utils.replace_file(saved, lambda file: json.dump(described, file, indent=1))
    if (folder / "result.json").exists():
        return
    run, _ = cifar.train(args, data, make_criterion(config))
    result = {"linear": linear_accuracy(run)}
    utils.replace_file(folder / "result.json", lambda file: json.dump(result, file))
    if not keep_checkpoints:
        (folder / "checkpoint.pth").unlink()
    print(f"{config.name}: linear accuracy {result['linear']:.2f}", flush=True)


def write_table(configs: list[Config], folder: Path, path: Path) -> None:
    """The CSV of all runs so far, from their logs: a row an epoch."""
    rows = []
    for config in configs:
        described = folder / config.name / "config.json"
        if not described.exists():
            continue
        flags = json.loads(described.read_text())["args"]
        own = {"run": config.name, "loss": config.loss, "options": json.dumps(config.options)}
        for name in (*COLUMNS[3:], *(OF_THE_WEIGHTS if config.loss == "AUCCLLoss" else ())):
            own[name] = " ".join(map(str, flags[name])) if isinstance(flags[name], list) else flags[name]
        records = utils.read_records(folder / config.name / "log.txt")
        finished = folder / config.name / "result.json"
        for record in records:
            last = finished.exists() and record is records[-1]
            rows.append(own | record | (json.loads(finished.read_text()) if last else {}))
    columns = list(dict.fromkeys((*COLUMNS, *OF_THE_WEIGHTS, *(name for row in rows for name in row))))

    def write(file):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    utils.replace_file(path, write)


def main(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("study", help=f"{', '.join(STUDIES)}, or a .json file")
    add("--images", type=utils.non_negative_int, help="training images, as many of every class; 0: all (default: the study's)")
    add("--part", type=utils.positive_int, nargs=2, default=(1, 1), metavar=("I", "N"), help="run I of every N configurations, "
        "to share a study between N processes")
    add("--keep_checkpoints", action="store_true", help="of finished runs too")
    add("--output_dir", type=Path, default=RESULTS, help="where to write")
    args, common = parser.parse_known_args(argv)
    if args.part[0] > args.part[1]:
        raise utils.UserError(f"--part {args.part[0]} {args.part[1]}: the first number counts up to the second")
    name, study = read_study(args.study)
    folder = utils.make_output_dir(args.output_dir / name)
    runs = [(config, arguments(config, [*study.flags, *common], folder / config.name)) for config in study.configs]
    images = study.images if args.images is None else args.images
    shared = runs[0][1]
    data = subset(load_data(shared.dataset, shared.data_path, shared.image_size), images)
    for config, flags in runs[args.part[0] - 1::args.part[1]]:
        train(config, flags, data, args.keep_checkpoints)
        write_table(study.configs, folder, args.output_dir / f"{name}.csv")
    print(f"table: {args.output_dir / name}.csv", flush=True)


if __name__ == "__main__":
    utils.run_script(main)
