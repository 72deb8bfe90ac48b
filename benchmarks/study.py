"""Trains a list of configurations, one after the other, through cifar/main.py's own loop: AUC-CL beside the losses of lightly.

    pip install lightly                                                         # the peers; AUC-CL alone does without
    python benchmarks/study.py tuning                                           # CIFAR-10, downloaded if missing
    python benchmarks/study.py batch_size --dataset folder --data_path DIR      # further flags are cifar/main.py's, for all runs
    python benchmarks/study.py batch_size --only "s0$"                           # the runs whose names match a regular expression
    python benchmarks/study.py my_runs.json --images 0 --dataset shapes --epochs 3
    python benchmarks/pictures.py cifar/results/studies                         # then: pictures of all tables

Studies: STUDIES below, or a JSON list of objects with "name", "flags" (of cifar/main.py) and, for a loss other than AUC-CL, "loss"
(a class of lightly.loss, or ClosedForm) and "options" (arguments of lightly's class). The same command again goes on where it
stopped, inside a run too (a peer's loss must have no state of its own for that: no memory bank); the same command beside it, in
another process, takes the next run that nobody works on. Written below --output_dir: STUDY.csv, a row an epoch and run, with the
linear accuracy in a run's last; STUDY/NAME/, the run's log. A finished run's checkpoint is removed unless the run was ever given
--keep_checkpoints.
"""
import copy
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import nn  # noqa: E402

import utils  # noqa: E402
from auccl_loss import SCORES, AUCCLLoss, unit_rows  # noqa: E402
from benchmarks import measure  # noqa: E402
from cifar import main as cifar  # noqa: E402
from cifar.data import load_data  # noqa: E402
from eval_linear import fit_logistic  # noqa: E402

KEEP = "keep_checkpoint"    # in the folder of a run whose checkpoint stays
RESULTS = Path(__file__).resolve().parents[1] / "cifar" / "results" / "studies"
L2 = 1e-3       # of the linear probe, the same for all runs
SUBSET = 7      # random stream: which images
BATCH_SIZES = (256, 64, 512, 16, 1024, 128, 32)
SHARED = ("dataset", "data_path", "image_size")     # flags that all runs of a study have in common
COLUMNS = ("run", "loss", "options", "preset", "batch_size", "epochs", "lr", "projector", "seed")
OF_AUCCL = ("weights_lr", "negative_weight", "margin_negative_weight", "learn", "score")  # columns; empty for a default
OTHER_TABLES = ("bias", "objective")                # names that pictures.py reads something else under


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

def peer_loss(name: str, options: dict) -> nn.Module:
    """lightly's loss of that name. UserError if it, or lightly, is not there, or refuses the options."""
    try:
        from lightly import loss
    except ImportError as error:
        raise utils.UserError(f"{name} is a loss of the library lightly, which is not installed: pip install lightly") from error
    try:
        return getattr(loss, name)(**options)
    except (AttributeError, TypeError, ValueError) as error:
        raise utils.UserError(f"loss {name} with {options}: {error}") from error


class Peer(nn.Module):
    """A loss of lightly in AUCCLLoss's place: in float32 under autocast too, and with the mean scores for the record."""

    def __init__(self, name: str, options: dict):
        super().__init__()
        self.name, self.loss = name, peer_loss(name, options)

    def forward(self, z0, z1):
        with torch.autocast(z0.device.type, enabled=False):
            z0, z1 = z0.float(), z1.float()
            self.means = mean_cosines(z0.detach(), z1.detach())
            try:
                return self.loss(z0, z1)
            except Exception as error:  # whatever a foreign class raises
                raise utils.UserError(f"lightly's {self.name} does not take two views of shape {list(z0.shape)}: {error}") from error

    def param_groups(self, lr, adaptive=False):
        return []


def mean_cosines(z0, z1):
    """Of positive and of negative pairs, [2]."""
    n, z0, z1 = len(z0), unit_rows(z0), unit_rows(z1)
    positive = (z0 * z1).sum()
    pairs = (z0 + z1).sum(0).square().sum()             # of all ordered pairs of views, each with itself included
    return torch.stack([positive / n, (pairs - 2 * n - 2 * positive) / (2 * n * (2 * n - 2))])


class ClosedForm(AUCCLLoss):
    """AUC-CL with a, b and alpha not learned but set to each batch's saddle point; the gradient is then no longer unbiased."""

    def _objective(self, moments):
        s, t = SCORES[self.score]
        kappa = moments.negatives if self.margin_negative_weight == "sum" else self.margin_negative_weight
        with torch.no_grad():
            self.a.copy_(s * moments.positive_mean + t)
            self.b.copy_(s * moments.negative_mean + t)
            self.alpha.copy_(self.margin - self.a + kappa * self.b)
        return super()._objective(moments)


def make_criterion(config: Config, args) -> nn.Module:
    """The loss of a configuration. UserError if it does not exist, or refuses its arguments or a pair of views."""
    given = {name: value for name in cifar.PAPER_ONLY if (value := getattr(args, name)) is not None}
    if config.loss in ("AUCCLLoss", "ClosedForm"):
        if config.options:
            raise utils.UserError(f"run {config.name}: {config.loss} takes flags, not options; move {', '.join(config.options)} to flags")
        if config.loss == "AUCCLLoss":
            return cifar.build_criterion(args)
        try:
            return ClosedForm(learn=(), **given)
        except ValueError as error:
            raise utils.UserError(f"run {config.name}: {error}") from error
    if given := [name for name in (*cifar.PAPER_ONLY, "weights_lr", "learn") if name in given or name in config.flags]:
        raise utils.UserError(f"run {config.name}: {', '.join(given)} mean nothing to {config.loss}; give them to runs of AUC-CL alone")
    peer = Peer(config.loss, config.options)
    trial = torch.randn(2, 8, args.projector[-1], generator=torch.Generator().manual_seed(0))
    loss = copy.deepcopy(peer)(*trial)
    if loss.shape != ():
        raise utils.UserError(f"lightly's {config.loss} is no loss of two views: its value has shape {list(loss.shape)}")
    return peer


# ----------------------------------------------------------------------------------------------------------------- studies

# Of each method the best of its trials (`tuning`), at batch 256, by the sum of k-NN and linear accuracy: (loss, options, flags).
METHODS = {
    "AUC-CL": ("AUCCLLoss", {}, {"projector": "512 256", "lr": 8e-3, "weights_lr": 1e-3}),
    "NT-Xent": ("NTXentLoss", {"temperature": 0.1}, {"projector": "512 256", "lr": 8e-3}),
    "DCL": ("DCLLoss", {"temperature": 0.1}, {"projector": "2048 1024", "lr": 8e-3}),
    "Barlow Twins": ("BarlowTwinsLoss", {"lambda_param": 0.005}, {"projector": "2048 1024", "lr": 4e-3}),
    "VICReg": ("VICRegLoss", {}, {"projector": "2048 1024", "lr": 2e-3}),
}


def tuning() -> list[Config]:
    """Trials of each method at batch 256: four learning rates at its usual setting, one change at a time of what its papers vary
    (temperature, weights of the terms) and of the projector, and for some their winners together. AUC-CL's own weights
    had theirs in results/README.md and in `ablation`."""
    wide, half, narrow, deep = "2048 1024", "512 256", "512 128", "2048 2048 2048"
    softmax = [({"temperature": 0.1}, wide), ({"temperature": 0.5}, wide), ({"temperature": 0.2}, narrow)]
    together = [({"temperature": 0.1}, wide, 8e-3), ({"temperature": 0.1}, half, 8e-3)]
    trials = {  # loss -> usual options, changes at lr 2e-3, more
        "AUCCLLoss": ({}, [({}, narrow), ({}, deep)], [({}, half, 8e-3)]),
        "NTXentLoss": ({"temperature": 0.2}, softmax, together),
        "DCLLoss": ({"temperature": 0.2}, softmax, together),
        "BarlowTwinsLoss": ({"lambda_param": 0.005},
                            [({"lambda_param": 0.02}, wide), ({"lambda_param": 0.005}, narrow), ({"lambda_param": 0.005}, deep)], []),
        "VICRegLoss": ({}, [({"nu_param": 4.0}, wide), ({}, narrow), ({}, deep)], []),
    }
    configs = []
    for loss, (usual, changes, more) in trials.items():
        rates = [(usual, wide, lr) for lr in (1e-3, 2e-3, 4e-3, 8e-3)]
        for options, projector, lr in (*rates, *((*change, 2e-3) for change in changes), *more):
            name = "_".join([loss, *(f"{k}{v:g}" for k, v in options.items()), projector.replace(" ", "-"), f"lr{lr:g}"])
            configs.append(Config(name, {"projector": projector, "lr": lr}, loss, options))
    return configs


def ablation() -> list[Config]:
    """AUC-CL at batch 256, one thing changed at a time: which weights are learned and how fast, nu, kappa, projector, score."""
    changes = {
        "base": {}, "weights_lr 1e-2": {"weights_lr": 1e-2},
        **{f"{name} held, weights_lr 1e-2": {"learn": others, "weights_lr": 1e-2}  # at 1e-3 they hardly move in so short a run
           for name, others in (("a", "b alpha"), ("b", "a alpha"), ("alpha", "a b"))},
        "unit score": {"score": "unit"}, "unit score, nu 64": {"score": "unit", "negative_weight": 64},
        **{f"nu {nu}, kappa 1": {"negative_weight": nu} for nu in (1, 2, 4, 8, 32, 64, "sum")},
        **{f"nu {nu}, kappa nu": {"negative_weight": nu, "margin_negative_weight": nu} for nu in (2, 4, 8, 16, 32, "sum")},
        **{f"projector {width}-{width // 2}": {"projector": f"{width} {width // 2}"} for width in (64, 128, 256, 512, 1024)},
    }
    usual = {"projector": "2048 1024", "lr": 8e-3, "weights_lr": 1e-3}
    return [Config(name, usual | flags) for name, flags in changes.items()] + [
        Config("all held", held(usual)), Config("closed form", held(usual), "ClosedForm")]


def batch_size(seeds=(0, 1)) -> list[Config]:
    """Every method at seven batch sizes for equal epochs; all learning rates go with the square root of the batch size. Under that
    rule a, b and alpha travel further in more steps, which changes the objective a little: so AUC-CL with all three held as well."""
    _, _, usual = METHODS["AUC-CL"]
    methods = METHODS | {"AUC-CL, a b alpha held": ("AUCCLLoss", {}, held(usual))}
    return [Config(f"{name} b{size} s{seed}", {"batch_size": size, "seed": seed} | at_batch_size(flags, size), loss, options)
            for seed in seeds for size in BATCH_SIZES for name, (loss, options, flags) in methods.items()]


def longer() -> list[Config]:
    """Whether it is the number of steps that large batches lack in `batch_size`: AUC-CL and the best of its peers, four times as long."""
    return [Config(f"{name} b{size}", {"batch_size": size} | at_batch_size(flags, size), loss, options)
            for size in (512, 64, 256, 128) for name, (loss, options, flags) in METHODS.items() if name in ("AUC-CL", "NT-Xent")]


def at_batch_size(flags: dict, size: int) -> dict:
    """Flags tuned at batch 256 for another batch size: learning rates times sqrt(size / 256)."""
    return {name: value * (size / 256) ** 0.5 if name.endswith("lr") else value for name, value in flags.items()}


def held(flags: dict) -> dict:
    """AUC-CL's flags with a, b and alpha held."""
    return {name: value for name, value in flags.items() if name != "weights_lr"} | {"learn": "none"}


def convergence() -> list[Config]:
    """Every method as it was tuned, on all images; AUC-CL also as `all_images` prefers it there, and the released preset with its recipe."""
    longer = "AUC-CL, 2048-1024, weights_lr 4e-3"
    return [Config(name, flags, loss, options) for name, (loss, options, flags) in METHODS.items()] + [
        next(config for config in all_images() if config.name == longer),
        Config("released-cifar", {"preset": "released-cifar", "warmup_epochs": 0})]


def all_images() -> list[Config]:
    """AUC-CL, NT-Xent and DCL as they were tuned, with changes of one or two settings that may matter once there are more images and steps."""
    wide = {"projector": "2048 1024"}
    changes = {
        "AUC-CL": {"nu 8": {"negative_weight": 8}, "nu 32": {"negative_weight": 32}, "2048-1024": wide, "4096-2048": {"projector": "4096 2048"},
                   "2048-1024, nu 32": wide | {"negative_weight": 32}, "2048-1024, weights_lr 4e-3": wide | {"weights_lr": 4e-3},
                   "2048-1024, weights_lr 1e-2": wide | {"weights_lr": 1e-2}},
        "NT-Xent": {"2048-1024": wide, "2048-1024, T 0.2": wide | {"temperature": 0.2}, "2048-1024, T 0.5": wide | {"temperature": 0.5}},
        "DCL": {"512-256": {"projector": "512 256"}, "T 0.2": {"temperature": 0.2}},
    }
    configs = []
    for name, variants in changes.items():
        loss, options, flags = METHODS[name]
        configs.append(Config(name, flags, loss, options))
        for variant, change in variants.items():
            configs.append(Config(f"{name}, {variant}", flags | {key: value for key, value in change.items() if key not in options}, loss,
                                  {key: change.get(key, value) for key, value in options.items()}))
    _, _, usual = METHODS["AUC-CL"]
    return [*configs, Config("AUC-CL, a b alpha held", held(usual)), Config("AUC-CL, 2048-1024, a b alpha held", held(usual | wide))]


SHORT = ("--arch", "tiny", "--warmup_epochs", "0.5", "--epochs")
STUDIES = {"tuning": Study(tuning(), 10_000, (*SHORT, "5")), "ablation": Study(ablation(), 10_000, (*SHORT, "5")),
           "batch_size": Study(batch_size(), 10_000, (*SHORT, "5")), "longer": Study(longer(), 10_000, (*SHORT, "20")),
           "convergence": Study(convergence(), 0, (*SHORT, "5")), "all_images": Study(all_images(), 0, (*SHORT, "5"))}


def read_study(name: str) -> tuple[str, Study]:
    """The study of that name or JSON file, and what its files are called. UserError if there is none, or it is no list of runs."""
    if name in STUDIES:
        return name, STUDIES[name]
    path = Path(name)
    if path.suffix != ".json" or path.stem in (*STUDIES, *OTHER_TABLES):
        raise utils.UserError(f"no study {name!r}: choose from {', '.join(STUDIES)}, or name a .json file, called otherwise than these, "
                              f"{' and '.join(OTHER_TABLES)}")
    try:
        configs = [Config(**entry) for entry in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise utils.UserError(f"cannot read runs from {path}: {error}") from error
    if not all(isinstance(config.flags, dict) and isinstance(config.options, dict) and isinstance(config.loss, str) for config in configs):
        raise utils.UserError(f"cannot read runs from {path}: flags and options must be objects, loss a name")
    names = {config.name for config in configs if isinstance(config.name, str) and re.fullmatch(r"[\w .,+-]*\w[\w .,+-]*", config.name)}
    if not configs or len(names) < len(configs):
        raise utils.UserError(f"{path} must list at least one run, each with a name of its own of letters, digits, spaces and . , + -")
    return path.stem, Study(configs)


# ------------------------------------------------------------------------------------------------------------------ driver

def subset(data, images: int):
    """`images` of the training images, the same number of every class and the same ones in every run; all for 0."""
    if images == 0:
        return data
    counts = data.bank_labels.bincount()
    each = images // len(counts)
    if not 1 <= each <= int(counts.min()):
        raise utils.UserError(f"--images {images} makes {each} of each of {len(counts)} classes; the smallest has {int(counts.min())}")
    rows, _ = utils.split_by_class(data.bank_labels, lambda n: each, torch.Generator().manual_seed(utils.stream_seed(SUBSET)))
    rows = rows.sort().values
    return data._replace(train=data.bank[rows], bank=data.bank[rows], bank_labels=data.bank_labels[rows])


def arguments(config: Config, common: list[str], folder: Path):
    """cifar/main.py's parsed flags of a run. UserError names the run whose flags are wrong."""
    flags = []
    for name, value in config.flags.items():
        flags += [f"--{name}", *([] if value is True else map(str, value) if isinstance(value, list) else str(value).split())]
    try:
        return cifar.parse_args([*common, *flags, "--output_dir", str(folder)])
    except utils.UserError as error:
        raise utils.UserError(f"run {config.name}: {error}") from error


def linear_accuracy(run) -> float:
    """Top-1 test accuracy in percent of a logistic regression on the frozen features of the bank."""
    data = run.data
    bank, test = (cifar.features(run, images) for images in (data.bank, data.test))
    head = nn.Linear(bank.shape[1], int(data.bank_labels.max()) + 1).to(bank.device)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    fit_logistic(head, bank, data.bank_labels.to(bank.device), L2)
    with torch.no_grad():
        return 100 * (head(test).argmax(1).cpu() == data.test_labels).double().mean().item()


def read_json(path: Path) -> dict:
    """A file that this script has written. UserError if it is damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise utils.UserError(f"cannot read {path}: {error}; move its folder away") from error
    if not isinstance(value, dict):
        raise utils.UserError(f"{path} is not what this script writes; move its folder away")
    return value


def train(config: Config, args, data, keep_checkpoint: bool) -> None:
    """Trains a configuration to its end and writes result.json. UserError if its folder holds a run of another."""
    folder = args.output_dir
    described = {"loss": config.loss, "options": config.options, "data": cifar.fingerprint(data),
                 "args": {name: value for name, value in utils.plain(args).items() if name not in cifar.FREE_ON_RESUME}}
    if (folder / "config.json").exists() and read_json(folder / "config.json") != described:
        raise utils.UserError(f"{folder} holds a run of another configuration; choose another --output_dir or move it away")
    utils.replace_file(folder / "config.json", lambda file: json.dump(described, file, indent=1))
    if keep_checkpoint:
        (folder / KEEP).touch()
    if not (folder / "result.json").exists():
        run, _ = cifar.train(args, data, make_criterion(config, args))
        result = {"linear": linear_accuracy(run)}
        utils.replace_file(folder / "result.json", lambda file: json.dump(result, file))
        print(f"{config.name}: linear accuracy {result['linear']:.2f}", flush=True)
    if not (folder / KEEP).exists():
        (folder / "checkpoint.pth").unlink(missing_ok=True)


def write_table(configs: list[Config], folder: Path, path: Path) -> dict:
    """The CSV of all runs so far, from their logs: a row an epoch. Returns what is wrong with runs that cannot be read, by name."""
    rows, wrong = [], {}
    with measure.locked(path.with_suffix(".lock"), wait=True):  # another process must not put an older table in the place of this one
        for config in configs:
            try:
                rows += run_rows(config, folder / config.name)
            except utils.UserError as error:
                wrong[config.name] = error
        columns = list(dict.fromkeys((*COLUMNS, *OF_AUCCL, *(name for row in rows for name in row), "linear")))
        measure.write_table(path, columns, rows)
    return wrong


def run_rows(config: Config, folder: Path) -> list[dict]:
    """A run's rows of the table; none before it has begun."""
    if not (folder / "config.json").exists():
        return []
    described, records = read_json(folder / "config.json"), utils.read_records(folder / "log.txt")
    try:
        loss, options, flags = (described[name] for name in ("loss", "options", "args"))
        own = {"run": config.name, "loss": loss, "options": json.dumps(options) if options else None}
        of_loss = {"AUCCLLoss": OF_AUCCL, "ClosedForm": cifar.PAPER_ONLY}.get(loss, ())
        for name in (*COLUMNS[3:], *of_loss):
            own[name] = " ".join(map(str, flags[name])) if isinstance(flags[name], list) else flags[name]
    except (KeyError, TypeError) as error:
        raise utils.UserError(f"{folder / 'config.json'} is not what this script writes: {error!r}; move its folder away") from error
    rows = [own | record for record in records]
    if (folder / "result.json").exists():
        if not rows:
            raise utils.UserError(f"the run in {folder} is finished, but its log.txt is gone; move the folder away to run it again")
        rows[-1] |= read_json(folder / "result.json")
    return rows


def main(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("study", help=f"{', '.join(STUDIES)}, or a .json file")
    add("--images", type=utils.non_negative_int, help="training images, as many of every class; 0: all (default: the study's)")
    add("--only", metavar="REGEX", help="run those alone whose name it matches; the table has all")
    add("--keep_checkpoints", action="store_true", help="of finished runs too")
    add("--output_dir", type=Path, default=RESULTS, help="where to write")
    args, common = parser.parse_known_args(argv)
    name, study = read_study(args.study)
    chosen = choose(study, args.only, common)
    output = utils.make_output_dir(args.output_dir)
    folder = utils.make_output_dir(output / name)
    runs = [(config, arguments(config, [*study.flags, *common], folder / config.name)) for config in chosen]
    check(runs)
    shared = runs[0][1]
    data = subset(load_data(shared.dataset, shared.data_path, shared.image_size), study.images if args.images is None else args.images)
    if too_large := [config.name for config, flags in runs if flags.batch_size * flags.accum_iter > len(data.train)]:
        raise utils.UserError(f"the batch of {', '.join(too_large)} is larger than the data set's {len(data.train)} images")
    failed, wrong = {}, {}
    for config, flags in runs:
        with measure.locked(utils.make_output_dir(flags.output_dir) / "run.lock", wait=False) as mine:
            if not mine:
                continue
            try:
                train(config, flags, data, args.keep_checkpoints)
            except utils.UserError as error:  # a run that diverged says nothing of the others
                failed[config.name] = error
                print(f"{config.name}: {error}", file=sys.stderr, flush=True)
        wrong = write_table(study.configs, folder, output / f"{name}.csv")
    print(f"table: {output / name}.csv", flush=True)
    for run in wrong.keys() - failed.keys():
        print(f"{run}: {wrong[run]}", file=sys.stderr, flush=True)
    if failed := failed | wrong:
        raise utils.UserError(f"{len(failed)} of {len(study.configs)} runs failed: {', '.join(failed)}; why stands above")


def choose(study: Study, only: str | None, common: list[str]) -> list[Config]:
    """The runs whose names match. UserError if none does, or if a common flag has no effect on any of them."""
    try:
        chosen = [config for config in study.configs if only is None or re.search(only, config.name)]
    except re.error as error:
        raise utils.UserError(f"--only {only!r} is no regular expression: {error}") from error
    if not chosen:
        raise utils.UserError(f"--only {only!r} matches none of {', '.join(config.name for config in study.configs)}")
    for flag in (part.split("=")[0] for part in common if part.startswith("--")):
        if all(flag[2:] in config.flags for config in chosen):
            raise utils.UserError(f"{flag} would change nothing: every run of this study has its own; see --only, or list your runs in a .json file")
    return chosen


def check(runs) -> None:
    """UserError for what would stop a run hours later: a loss that is not there, or runs that ask for different data."""
    for config, args in runs:
        make_criterion(config, args)
        if other := [f"--{name}" for name in SHARED if getattr(args, name) != getattr(runs[0][1], name)]:
            raise utils.UserError(f"run {config.name} has a {' and '.join(other)} of its own; a study's runs see the same data")


if __name__ == "__main__":
    utils.run_script(main)
