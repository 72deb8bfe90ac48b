"""Trains the runs of studies with cifar/main.py's loop: AUC-CL beside lightly's losses.

    pip install -r benchmarks/requirements.txt
    python benchmarks/study.py tuning                                       # CIFAR-10, downloaded if missing
    python benchmarks/study.py batch_size --dataset folder --data_path DIR  # further flags: cifar/main.py's
    python benchmarks/study.py batch_size --only "s0$"                      # the runs whose names match
    OMP_NUM_THREADS=1 python benchmarks/study.py views hard --processes 12  # side by side, on one GPU too
    python benchmarks/study.py hard_tuning --held_out 5000                  # to choose settings
    python benchmarks/pictures.py cifar/results/studies                     # then: pictures of all tables

Studies are in runs.py, losses in losses.py. Written to --output_dir: STUDY.csv, a row per epoch of every
finished run, with linear accuracy in its last; STUDY/RUN/, a run's log. The same command again resumes: runs
in the table are done. A failing run stops no other.
"""
import json
import multiprocessing
import multiprocessing.connection
import re
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401  (here lest every forked run imports it)
from sklearn.linear_model import LogisticRegression  # noqa: E402

import utils  # noqa: E402
from benchmarks.losses import build_loss  # noqa: E402
from benchmarks.measure import RESULTS, read_table, write_table  # noqa: E402
from benchmarks.runs import STUDIES, Config, Study  # noqa: E402
from cifar import main as cifar  # noqa: E402
from cifar.data import ImageData, load_data  # noqa: E402
from data import split_by_class  # noqa: E402

L2 = 1e-3           # weight decay of the linear probe
SUBSET_STREAM, HELD_OUT_STREAM = 7, 8   # random streams of the choice of images
COLUMNS = ("preset", "arch", "views", "batch_size", "epochs", "lr", "projector", "seed")
OF_AUCCL = ("weights_lr", "negative_weight", "margin_negative_weight", "learn", "score")  # empty elsewhere


def parse_flags(config: Config, study: Study, common: list[str], folder: Path):
    """cifar/main.py's flags of a run: the study's, then `common`, then its own. UserError names the run."""
    own = [part for name, value in config.flags.items() for part in (f"--{name}", *str(value).split())]
    try:
        args = cifar.parse_args(["--arch", "tiny", "--warmup_epochs", "0.5", "--epochs", str(study.epochs),
                                 *common, *own, "--output_dir", str(folder / config.name)])
        if config.loss == "AUCCLLoss":
            utils.build_criterion(args)  # for the table: what it learns
        else:
            utils.refuse(args, utils.OBJECTIVE, f"with {config.loss}")
    except utils.UserError as error:
        raise utils.UserError(f"run {config.name}: {error}") from error
    return args


def choose_images(data: ImageData, images: int) -> ImageData:
    """The data with `images` training images, as many of every class, always the same; 0: all."""
    if images == 0:
        return data
    chosen, labels = draw_by_class(data, images, SUBSET_STREAM, "images")[0]
    return data._replace(train=chosen, bank=chosen, bank_labels=labels)


def hold_out(data: ImageData, images: int) -> ImageData:
    """The data with `images` training images, chosen likewise, as test images; 0: the data as it is."""
    if images == 0:
        return data
    test, (train, labels) = draw_by_class(data, images, HELD_OUT_STREAM, "held_out")
    return ImageData(train, train, labels, *test)


def draw_by_class(data: ImageData, images: int, stream: int, flag: str):
    """As many training images of every class, `images` in all, and all others: twice (images, labels)."""
    counts = data.bank_labels.bincount()
    each = images // len(counts)
    if not 1 <= each <= counts.min():
        raise utils.UserError(f"--{flag} {images} is {each} per class; the smallest class has {counts.min()}")
    generator = torch.Generator().manual_seed(utils.stream_seed(stream))
    parts = split_by_class(data.bank_labels, lambda n: each, generator)
    return [(data.bank[rows], data.bank_labels[rows]) for rows in (part.sort().values for part in parts)]


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


def train_all(jobs: list, processes: int):
    """Yields the arguments of every `train` with its rows, or the UserError that ended it, as the runs end.
    Side by side each run has a forked process, which shares the images and saves when this one ends."""
    def outcome(job):
        try:
            return train(*job)
        except utils.UserError as error:
            return error

    if processes == 1:
        yield from ((job, outcome(job)) for job in jobs)
        return
    context, waiting, running = multiprocessing.get_context("fork"), jobs[::-1], {}
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly exit ends the children
    while waiting or running:
        while waiting and len(running) < processes:
            job = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            context.Process(target=lambda job, sender: sender.send(outcome(job)), args=(job, sender),
                            daemon=True).start()
            sender.close()
            running[receiver] = job
        for receiver in multiprocessing.connection.wait(running):
            job = running.pop(receiver)
            try:
                yield job, receiver.recv()
            except EOFError:
                yield job, utils.UserError("its process died; see above, or lower --processes if memory ran "
                                           "out, then run the same command again")
    signal.signal(signal.SIGTERM, former)


def main(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("studies", choices=STUDIES, nargs="+", help="lists of runs")
    add("--only", metavar="REGEX", default="", help="pattern of the names of the runs to train")
    add("--images", type=utils.non_negative_int, help="training images; 0: all (default: the study's)")
    add("--held_out", type=utils.non_negative_int, default=0, help="training images to test on, in the place "
        "of the test images; the table is then STUDY_held_out.csv")
    add("--processes", type=utils.positive_int, default=1, help="runs side by side, a process each")
    add("--keep_checkpoints", action="store_true", help="checkpoints of finished runs, for bias.py")
    add("--output_dir", type=utils.path, default=RESULTS, help="output folder")
    args, common = parser.parse_known_args(argv)
    if args.processes > 1:
        torch.set_num_threads(1)    # OpenMP's threads do not survive a fork
    runs = []
    for name in args.studies:
        study, folder = STUDIES[name], args.output_dir / (name + "_held_out" * bool(args.held_out))
        images = study.images if args.images is None else args.images
        runs += [(config, parse_flags(config, study, common, folder), images,
                  None if config.loss == "AUCCLLoss" else build_loss(config.loss, **config.options))
                 for config in study.configs if re.search(args.only, config.name)]
    if not runs:
        names = ", ".join(config.name for name in args.studies for config in STUDIES[name].configs)
        raise utils.UserError(f"--only {args.only} matches none of {names}")
    first = runs[0][1]
    data = hold_out(load_data(first.dataset, first.data_path, first.image_size), args.held_out)
    subsets = {images: choose_images(data, images) for images in {run[2] for run in runs}}
    jobs = [(config, flags, subsets[images], criterion) for config, flags, images, criterion in runs
            if config.name not in {row["run"] for row in read_table(table_of(flags))}]
    failed = []
    for (config, flags, *_), rows in train_all(jobs, args.processes):
        if isinstance(rows, utils.UserError):
            failed.append(config.name)
            print(f"{config.name}: {rows}", file=sys.stderr, flush=True)
            continue
        table = table_of(flags)
        write_table(table, read_table(table) + rows)    # read again: another process may have written to it
        print(f"{config.name}: linear accuracy {rows[-1]['linear']:.2f}", flush=True)
        if not args.keep_checkpoints:
            (flags.output_dir / "checkpoint.pth").unlink()
    print(f"tables: {args.output_dir}", flush=True)
    if failed:
        raise utils.UserError(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}; see above")


def table_of(args) -> Path:
    """The table of a run's study, beside the folder of its runs."""
    return args.output_dir.parent.with_suffix(".csv")


if __name__ == "__main__":
    utils.run_script(main)
