"""Draws training curves from the logs of one or several runs of main.py or cifar/main.py.

    python curves.py results/RUN/log.txt results/OTHER/log.txt --output curves.png
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils  # noqa: E402

DASHES = ("-", "--", ":", "-.")  # runs differ in their dashes, so that the picture reads in black and white
PANELS = {  # title -> field of a record -> colour
    "k-NN accuracy (%)": {"test_acc@1": "black", "knn_acc@1": "black"},
    "training loss": {"train_loss": "black"},
    "mean score, a and b": {"positive": "tab:blue", "a": "tab:cyan", "negative": "tab:red", "b": "tab:orange"},
    "alpha": {"alpha": "tab:green"},
    "AUC of test pairs": {"test_auc": "black"},
}
MARKERS = {"a": "^", "b": "v"}


def draw_curves(runs: dict, path: Path, title: str = "") -> None:
    """Draws `runs` (name -> records, of which those of whole epochs count) into the picture `path`, PNG, PDF or SVG by
    its ending. The accuracy of the untrained network, if recorded (epoch -1), is a horizontal line."""
    import matplotlib  # slow to import, and not needed before a run's end
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    runs = {name: [record for record in records if "step" not in record] for name, records in runs.items()}
    present = {field for records in runs.values() for record in records for field in record}
    panels = {title: fields for title, fields in PANELS.items() if present & fields.keys()}
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, (panel, fields) in zip(axes[0], panels.items()):
        for (name, records), dash in zip(runs.items(), DASHES * len(runs)):
            for field, colour in fields.items():
                label = ", ".join([field] * (len(fields) > 1) + [name] * (len(runs) > 1))
                draw_field(axis, records, field, dash, colour, label)
        axis.set_xlabel("epoch")
        axis.set_title(panel, fontsize=10)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7)
    figure.suptitle(title or (next(iter(runs)) if len(runs) == 1 else ""), fontsize=10)
    utils.replace_file(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150), "wb")
    plt.close(figure)


def draw_field(axis, records: list[dict], field: str, dash: str, colour: str, label: str) -> None:
    """One field of a run's records over the epochs, counted from 1."""
    trained = [record for record in records if record["epoch"] >= 0 and field in record]
    epochs = [record["epoch"] + 1 for record in trained]
    axis.plot(epochs, [record[field] for record in trained], dash, color=colour, marker=MARKERS.get(field, "."),
              markersize=4, markevery=max(1, len(epochs) // 10), linewidth=1.2, label=label if trained else None)
    if untrained := [record[field] for record in records if record["epoch"] < 0 and field in record and "acc" in field]:
        axis.axhline(untrained[-1], color="tab:gray", linestyle=dash, linewidth=0.8, label="untrained network")


def main(argv=None):
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("logs", type=utils.path, nargs="+", help="log.txt of each run; a curve is named after its folder")
    parser.add_argument("--output", type=utils.path, default=Path("curves.png"), help="picture")
    args = parser.parse_args(argv)
    if args.output.suffix not in (".png", ".pdf", ".svg"):
        raise utils.UserError(f"--output must end with .png, .pdf or .svg, got {args.output}")
    names = [log.resolve().parent.name for log in args.logs]
    runs = {name if names.count(name) == 1 else str(log): utils.read_records(log) for name, log in zip(names, args.logs)}
    for name, records in runs.items():
        if not any("train_loss" in record and "step" not in record for record in records):
            raise utils.UserError(f"the log of {name} holds no epoch of main.py or cifar/main.py; name its log.txt")
    draw_curves(runs, args.output)


if __name__ == "__main__":
    utils.run_script(main)
