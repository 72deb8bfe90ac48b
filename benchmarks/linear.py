"""Time and accuracy of eval_linear.py: a grid of eight learning rates on augmented images against eight runs,
SGD on cached features, logistic regression.

    python benchmarks/linear.py                       # images drawn by code; a minute or two on one core
    python benchmarks/linear.py --data_path DIR --arch vit_small --image_size 224 --epochs 2 --runs 1

Each is the whole script. A grid holds a tenth of the training images out to choose on; single runs train on
all, and of these the best on the test images is shown. Runs alternate and medians are compared.
"""
import contextlib
import io
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eval_linear  # noqa: E402
import utils  # noqa: E402
from benchmarks.measure import alternate, machine  # noqa: E402

RATES = ("0.0003", "0.001", "0.003", "0.01", "0.03", "0.1", "0.3", "1")


def draw_images(folder: Path, size: int, counts: dict, classes: int = 4) -> None:
    """Class folders of noise around the colour of a class, as JPEG; counts: split -> images of each class."""
    generator = np.random.default_rng(0)
    colours = generator.integers(64, 192, (classes, 3))
    for split, count in counts.items():
        for label, colour in enumerate(colours):
            (folder / split / str(label)).mkdir(parents=True)
            for index in range(count):
                pixels = (colour + generator.normal(0, 40, (size, size, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / str(label) / f"{index}.jpg")


def probe(flags, *more) -> float:
    """A whole run in a fresh folder; the chosen head's accuracy."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        eval_linear.main([*flags, *more, "--output_dir", folder])
        return utils.read_records(Path(folder, "log.txt"))[-1]["test_acc1"]


def main():
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data_path", help="class folders train/ and test/ (default: drawn)")
    add("--runs", type=int, default=3, help="timed runs of each, after one that warms up")
    for name, default in (("arch", "vit_tiny"), ("image_size", "64"), ("epochs", "4"), ("device", "cpu"),
                          ("num_workers", "0")):
        add(f"--{name}", default=default, help="as of eval_linear.py")
    args = parser.parse_args()
    print(f"{machine()}; {vars(args)}")
    with tempfile.TemporaryDirectory() as folder:
        if args.data_path is None:
            draw_images(Path(folder), 96, {"train": 48, "test": 8})
        flags = ["--random_weights", "--data_path", args.data_path or folder, "--batch_size_per_gpu", "64"]
        for name in ("arch", "image_size", "device", "num_workers"):
            flags += [f"--{name}", getattr(args, name)]
        sgd, accuracy = [*flags, "--epochs", args.epochs, "--val_freq", args.epochs, "--lr"], {}
        ways = {"grid": lambda: accuracy.update(grid=probe(sgd, *RATES)),
                "apart": lambda: accuracy.update(apart=max(probe(sgd, rate) for rate in RATES)),
                "cached": lambda: accuracy.update(cached=probe(sgd, *RATES, "--cache_features")),
                "lbfgs": lambda: accuracy.update(lbfgs=probe(flags, "--solver", "lbfgs"))}
        times = {name: [statistics.median(seconds) for seconds in both]
                 for name, both in alternate(ways, args.runs).items()}
    for name, (wall, cpu) in times.items():
        print(f"{name:6}  median {wall:7.2f} s  CPU {cpu:7.2f} s  accuracy {accuracy[name]:6.2f} %")
    for slow, fast in (("apart", "grid"), ("grid", "cached"), ("grid", "lbfgs")):
        print(f"{slow} / {fast}: time {times[slow][0] / times[fast][0]:.2f}, "
              f"CPU time {times[slow][1] / times[fast][1]:.2f}")


if __name__ == "__main__":
    utils.run_script(main)
