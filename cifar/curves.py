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
    "mean scores, a and b": {
        "positive": "tab:blue", "a": "tab:cyan", "negative": "tab:red", "b": "tab:orange"},
    "alpha": {"alpha": "tab:green"},
    "AUC of test pairs": {"test_auc": "black"},
}
MARKERS = {"a": "^", "b": "v"}


def draw_curves(runs: dict, path: Path, title: str = "") -> None:
    """Draws the epochs of `runs`, name -> records, into the picture `path`: PNG, PDF or SVG. The untrained
    network's accuracy, if recorded (epoch -1), is a horizontal line."""
    import matplotlib  # slow to import, and not needed before a run's end
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    runs = {name: [record for record in records if "step" not in record] for name, records in runs.items()}
    present = {field for records in runs.values() for record in records for field in record}
    panels = {panel: fields for panel, fields in PANELS.items() if present & fields.keys()}
    columns = -(-len(panels) // 2)
    figure = plt.figure(figsize=(4 * columns, 6.4), layout="constrained")
    for place, (panel, fields) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(2, columns, place, title=panel, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        for field in sorted(present & fields.keys()):
            axis.plot([], [], color=fields[field], marker=MARKERS.get(field, "."), label=field)
            for records, dash in zip(runs.values(), DASHES * len(runs)):
                draw_field(axis, records, field, dash, fields[field])
        if len(axis.get_legend_handles_labels()[1]) > 1:
            axis.legend(fontsize="small")
    figure.suptitle(title)
    if len(runs) > 1:
        dashes = (DASHES * len(runs))[:len(runs)]
        lines = [plt.Line2D([], [], linestyle=dash, color="black") for dash in dashes]
        figure.legend(lines, runs, loc="outside lower center", ncols=columns)
    utils.replace_file(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150), "wb")
    plt.close(figure)


def draw_field(axis, records: list[dict], field: str, dash: str, colour: str) -> None:
    """One field of a run's records over the epochs, counted from 1."""
    values = {record["epoch"] + 1: record[field] for record in records if record.get(field) is not None}
    untrained = values.pop(0, None)
    axis.plot(values.keys(), values.values(), dash, color=colour, linewidth=1.2, markersize=4,
              marker=MARKERS.get(field, "."), markevery=max(1, len(values) // 10))
    if untrained is not None and "acc" in field:
        name = "untrained network"
        again = name in axis.get_legend_handles_labels()[1]
        axis.axhline(untrained, linestyle=dash, color="tab:gray", label=None if again else name)


def main(argv=None):
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("logs", type=utils.path, nargs="+", help="log.txt of each run; its folder names it")
    parser.add_argument("--output", type=utils.path, default=Path("curves.png"), help="picture")
    args = parser.parse_args(argv)
    if args.output.suffix not in (".png", ".pdf", ".svg"):
        raise utils.UserError(f"--output must end with .png, .pdf or .svg, got {args.output}")
    names = [log.resolve().parent.name for log in args.logs]
    runs = {}
    for name, log in zip(names, args.logs):
        records = utils.read_records(log)
        if not any(record.get("train_loss") is not None and "step" not in record for record in records):
            raise utils.UserError(f"{log} holds no epoch of main.py or cifar/main.py; name a run's log.txt")
        runs[name if names.count(name) == 1 else str(log)] = records
    draw_curves(runs, args.output, title=names[0] if len(names) == 1 else "")


if __name__ == "__main__":
    utils.run_script(main)
