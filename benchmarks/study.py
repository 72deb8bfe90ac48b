"""Trains the runs of a study with cifar/main.py's loop, one after the other: AUC-CL beside lightly's losses.

    pip install -r benchmarks/requirements.txt
    python benchmarks/study.py tuning                                       # CIFAR-10, downloaded if missing
    python benchmarks/study.py batch_size --dataset folder --data_path DIR  # further flags: cifar/main.py's
    python benchmarks/study.py batch_size --only "s0$"                      # the runs whose names match
    python benchmarks/pictures.py cifar/results/studies                     # then: pictures of all tables

Studies are in runs.py, losses in losses.py. Written to --output_dir: STUDY.csv, a row per epoch of every
finished run, with linear accuracy in its last; STUDY/RUN/, a run's log. The same command again resumes: runs
in the table are done. A failing run stops no other. Processes with the same command share the runs.
"""
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402

import utils  # noqa: E402
from benchmarks.losses import build_loss  # noqa: E402
from benchmarks.measure import RESULTS, read_table, write_table  # noqa: E402
from benchmarks.runs import STUDIES, Config, Study  # noqa: E402
from cifar import main as cifar  # noqa: E402
from cifar.data import ImageData, load_data  # noqa: E402
from data import split_by_class  # noqa: E402

L2 = 1e-3           # weight decay of the linear probe
SUBSET_STREAM = 7   # random stream of the choice of images
COLUMNS = ("preset", "batch_size", "epochs", "lr", "projector", "seed")
OF_AUCCL = ("weights_lr", "negative_weight", "margin_negative_weight", "learn", "score")  # empty elsewhere


def parse_flags(config: Config, study: Study, common: list[str], folder: Path):
    """cifar/main.py's flags of a run: the study's, then `common`, then its own. UserError names the run."""
    own = [part for name, value in config.flags.items() for part in (f"--{name}", *str(value).split())]
    try:
        args = cifar.parse_args(["--arch", "tiny", "--warmup_epochs", "0.5", "--epochs", str(study.epochs),
                                 *common, *own, "--output_dir", str(folder / config.name)])
        if config.loss != "AUCCLLoss":
            utils.refuse(args, ("negative_weight", "margin_negative_weight", "score"), f"with {config.loss}")
    except utils.UserError as error:
        raise utils.UserError(f"run {config.name}: {error}") from error
    return args


def choose_images(data: ImageData, images: int) -> ImageData:
    """The data with `images` training images, as many of every class, always the same; 0: all."""
    if images == 0:
        return data
    counts = data.bank_labels.bincount()
    each = images // len(counts)
    if not 1 <= each <= counts.min():
        raise utils.UserError(f"--images {images} is {each} per class; the smallest class has {counts.min()}")
    generator = torch.Generator().manual_seed(utils.stream_seed(SUBSET_STREAM))
    rows = split_by_class(data.bank_labels, lambda n: each, generator)[0].sort().values
    return data._replace(train=data.bank[rows], bank=data.bank[rows], bank_labels=data.bank_labels[rows])


def describe(config: Config, args) -> dict:
    """What all rows of a run have in common."""
    options = json.dumps(config.options) if config.options else None
    row = {"run": config.name, "loss": config.loss, "options": options}
    for name in COLUMNS + OF_AUCCL:
        value = getattr(args, name) if config.loss == "AUCCLLoss" or name in COLUMNS else None
        row[name] = (" ".join(map(str, value)) or "none") if isinstance(value, list) else value
    return row


def train(config: Config, args, data: ImageData, criterion) -> list[dict]:
    """Trains or resumes a run; its rows of the table."""
    run, records = cifar.train(args, data, criterion)
    rows = [describe(config, args) | record for record in records]
    rows[-1]["linear"] = linear_accuracy(run)
    return rows


def linear_accuracy(run) -> float:
    """Top-1 test accuracy (%) of logistic regression on frozen features, centred and of mean variance 1."""
    data = run.data
    bank, test = (cifar.features(run, images).cpu() for images in (data.bank, data.test))
    mean, scale = bank.mean(0), bank.var(0, correction=0).mean().sqrt()
    probe = LogisticRegression(C=1 / (L2 * len(bank)), tol=1e-5, max_iter=1000)
    probe.fit(((bank - mean) / scale).numpy(), data.bank_labels.numpy())
    return 100 * probe.score(((test - mean) / scale).numpy(), data.test_labels.numpy())


def main(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("study", choices=STUDIES, help="list of runs")
    add("--only", metavar="REGEX", default="", help="pattern of the names of the runs to train")
    add("--images", type=utils.non_negative_int, help="training images; 0: all (default: the study's)")
    add("--keep_checkpoints", action="store_true", help="checkpoints of finished runs, for bias.py")
    add("--output_dir", type=utils.path, default=RESULTS, help="output folder")
    args, common = parser.parse_known_args(argv)
    study, table = STUDIES[args.study], args.output_dir / f"{args.study}.csv"
    configs = [config for config in study.configs if re.search(args.only, config.name)]
    if not configs:
        names = ", ".join(config.name for config in study.configs)
        raise utils.UserError(f"--only {args.only} matches none of {names}")
    runs = [(config, parse_flags(config, study, common, args.output_dir / args.study),
             None if config.loss == "AUCCLLoss" else build_loss(config.loss, **config.options))
            for config in configs]
    first = runs[0][1]
    data = choose_images(load_data(first.dataset, first.data_path, first.image_size),
                         study.images if args.images is None else args.images)
    failed = []
    for config, flags, criterion in runs:
        if config.name in {row["run"] for row in read_table(table)}:
            continue
        try:
            rows = train(config, flags, data, criterion)
        except utils.UserError as error:
            failed.append(config.name)
            print(f"{config.name}: {error}", file=sys.stderr, flush=True)
            continue
        write_table(table, read_table(table) + rows)    # read again: another process may have written to it
        print(f"{config.name}: linear accuracy {rows[-1]['linear']:.2f}", flush=True)
        if not args.keep_checkpoints:
            (flags.output_dir / "checkpoint.pth").unlink()
    print(f"table: {table}", flush=True)
    if failed:
        raise utils.UserError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; see above")


if __name__ == "__main__":
    utils.run_script(main)
