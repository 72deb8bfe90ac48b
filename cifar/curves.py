"""Draws training curves from the logs of one or several runs of main.py.

    python curves.py results/RUN/log.txt results/OTHER/log.txt --output curves.png
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils  # noqa: E402

FIELDS = {"test_acc@1", "train_loss", "positive", "negative", "a", "b", "alpha", "test_auc"}
DASHES = ("-", "--", ":", "-.")  # runs differ in their dashes, so that the picture reads in black and white


def draw_curves(runs: dict, path: Path) -> None:
    """Draws `runs` (name -> records of main.py, one an epoch) into the picture `path`, PNG, PDF or SVG by its ending: k-NN
    accuracy, loss, mean scores with the weights a and b that follow them, and alpha with the AUC of the pairs."""
    import matplotlib  # slow to import, and not needed before a run's end
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    panels = {"k-NN accuracy on the test set (%)": {"test_acc@1": "black"}, "training loss": {"train_loss": "black"},
              "mean score, a and b": {"positive": "tab:blue", "a": "tab:cyan", "negative": "tab:red", "b": "tab:orange"},
              "alpha, AUC of test pairs": {"alpha": "tab:green", "test_auc": "black"}}
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    for axis, (title, series) in zip(axes, panels.items()):
        for (name, records), dash in zip(runs.items(), DASHES * len(runs)):
            epochs = [record["epoch"] + 1 for record in records]
            for field, colour in series.items():
                label = ", ".join(([field] if len(series) > 1 else []) + ([name] if len(runs) > 1 else []))
                marker = {"a": "^", "b": "v", "test_auc": "."}.get(field)
                axis.plot(epochs, [record[field] for record in records], dash, color=colour, marker=marker, markersize=4,
                          markevery=max(1, len(epochs) // 10), linewidth=1.2, label=label)
        axis.set_xlabel("epoch")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if len(series) * len(runs) > 1:
            axis.legend(fontsize=7)
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)), fontsize=10)
    utils.replace_file(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150), "wb")
    plt.close(figure)


def main():
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("logs", type=Path, nargs="+", help="log.txt of each run; a curve is named after its folder")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="the picture")
    args = parser.parse_args()
    if args.output.suffix not in (".png", ".pdf", ".svg"):
        raise utils.UserError(f"--output must end with .png, .pdf or .svg, got {args.output}")
    names = [log.resolve().parent.name for log in args.logs]
    runs = {name if names.count(name) == 1 else str(log): utils.read_records(log) for name, log in zip(names, args.logs)}
    for name, records in runs.items():
        if not records or not all(record.keys() >= FIELDS for record in records):
            raise utils.UserError(f"the log of {name} holds no records of cifar/main.py; name its log.txt")
    draw_curves(runs, args.output)


if __name__ == "__main__":
    utils.run_script(main)
