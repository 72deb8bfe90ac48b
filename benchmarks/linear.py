"""Time and accuracy of the ways of eval_linear.py: SGD on augmented images, a grid of learning rates against as many runs; SGD on
cached features; logistic regression on them.

    python benchmarks/linear.py                                         # images drawn by code; two minutes on one core
    python benchmarks/linear.py --data_path DIR --arch vit_small --image_size 224 --epochs 2 --runs 1

Every run is a whole one: build, features of the test images, --epochs epochs (L-BFGS: to convergence), evaluation. A grid holds a
tenth of the training images out to choose on, where single runs train on all; of those the best on the test images is shown. Runs
alternate and medians are compared.
"""
import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eval_linear  # noqa: E402
import utils  # noqa: E402
from benchmarks.measure import alternate, machine  # noqa: E402

RATES = ("0.0003", "0.001", "0.003", "0.01", "0.03", "0.1", "0.3", "1")


def draw_images(folder: Path, size: int, counts: dict, classes: int = 4) -> None:
    """Class folders of noise around a colour of the class, as JPEG: split -> images of each class in `counts`."""
    generator = np.random.default_rng(0)
    colours = generator.integers(64, 192, (classes, 3))
    for split, count in counts.items():
        for label, colour in enumerate(colours):
            (folder / split / str(label)).mkdir(parents=True)
            for index in range(count):
                pixels = (colour + generator.normal(0, 40, (size, size, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / str(label) / f"{index}.jpg")


def probe(flags, *more):
    """A whole run, without its files; the chosen head's accuracy."""
    args = eval_linear.parse_args([*flags, *more])
    run = eval_linear.Probe(args, utils.select_device(args.device))
    run.prepare()
    for run.epoch in range(args.epochs):
        (eval_linear.fit_heads if args.solver == "lbfgs" else eval_linear.train_epoch)(run)
    return eval_linear.evaluate(run)[1].acc1[run.chosen].item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, help="class folders train/ and test/ (default: drawn)")
    parser.add_argument("--arch", default="vit_tiny")
    parser.add_argument("--image_size", default="64")
    parser.add_argument("--epochs", default="4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num_workers", default="0")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each, after one that warms up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{machine()}; {vars(args)}")

    with tempfile.TemporaryDirectory() as folder:
        if args.data_path is None:
            draw_images(Path(folder), 96, {"train": 48, "test": 8})
        flags = ["--random_weights", "--data_path", str(args.data_path or folder), "--batch_size_per_gpu", "64",
                 "--output_dir", folder]
        for name in ("arch", "image_size", "device", "num_workers"):
            flags += [f"--{name}", getattr(args, name)]
        sgd, accuracy = [*flags, "--epochs", args.epochs, "--lr"], {}
        ways = {"grid": lambda: accuracy.update(grid=probe(sgd, *RATES)),
                "apart": lambda: accuracy.update(apart=max(probe(sgd, rate) for rate in RATES)),
                "cached": lambda: accuracy.update(cached=probe(sgd, *RATES, "--cache_features")),
                "lbfgs": lambda: accuracy.update(lbfgs=probe(flags, "--solver", "lbfgs"))}
        times = alternate(ways, args.runs)
    seconds = {name: statistics.median(wall) for name, (wall, _) in times.items()}
    cpu = {name: statistics.median(used) for name, (_, used) in times.items()}
    for name in ways:
        print(f"{name:6}  median {seconds[name]:7.2f} s  CPU {cpu[name]:7.2f} s  accuracy {accuracy[name]:6.2f} %")
    for slow, fast in (("apart", "grid"), ("grid", "cached"), ("grid", "lbfgs")):
        print(f"{slow} / {fast}: time {seconds[slow] / seconds[fast]:.2f}, CPU time {cpu[slow] / cpu[fast]:.2f}")


if __name__ == "__main__":
    main()
