"""Draws the tables of study.py, bias.py and objective.py: a picture for each that is there.

    python benchmarks/pictures.py results/studies             # reads the CSVs in the folder, writes PNGs beside them
    python benchmarks/pictures.py DIR --format svg
"""
import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: E402
from benchmarks.measure import fitted_exponent  # noqa: E402
from benchmarks.objective import FIT_FROM  # noqa: E402

# colour, marker, dashes: any one of them tells two lines apart, so that the pictures read in black and white
STYLES = [("black", "o", "-"), ("tab:red", "s", "--"), ("tab:blue", "^", "-."), ("tab:green", "D", ":"), ("tab:purple", "v", (0, (5, 1))),
          ("tab:brown", "x", (0, (3, 1, 1, 1))), ("tab:gray", "P", (0, (1, 1)))]


def read(path: Path) -> list[dict]:
    """The rows of a CSV, numbers as floats and empty cells as None."""
    def value(text):
        try:
            return float(text) if text else None
        except ValueError:
            return text
    with open(path, newline="") as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def grouped(rows, key) -> dict:
    """key(row) -> rows, in the order of their first."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def last_rows(rows) -> list[dict]:
    """The last epoch of every run that has been finished."""
    return [row for row in rows if row["linear"] is not None]


def method(row) -> str:
    """AUC-CL from the run 'AUC-CL b64 s0'."""
    return row["run"].split(" b")[0]


# ----------------------------------------------------------------------------------------------------------------- pictures

def draw_batch_size(plt, rows):
    """Final accuracies against the batch size: a line through the means over seeds, a marker for every seed."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, (field, title) in zip(axes, (("test_acc@1", "k-NN"), ("linear", "linear probe"))):
        for (name, runs), (colour, marker, dash) in zip(grouped(last_rows(rows), method).items(), STYLES):
            sizes = grouped(sorted(runs, key=lambda row: row["batch_size"]), lambda row: row["batch_size"])
            axis.plot(list(sizes), [mean(row[field] for row in seeds) for seeds in sizes.values()], color=colour, linestyle=dash, label=name)
            for size, seeds in sizes.items():
                axis.plot([size] * len(seeds), [row[field] for row in seeds], marker, color=colour, markersize=4)
        log_axis(axis, "batch size (images)", {row["batch_size"] for row in rows})
        axis.set_ylabel(f"{title} accuracy, top-1 (%)")
    axes[0].legend(fontsize=8)
    return figure


def draw_convergence(plt, rows):
    """k-NN accuracy by epoch and by second of training and evaluation."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for (name, records), (colour, marker, dash) in zip(grouped(rows, lambda row: row["run"]).items(), STYLES):
        accuracy = [row["test_acc@1"] for row in records]
        axes[0].plot([row["epoch"] + 1 for row in records], accuracy, color=colour, marker=marker, linestyle=dash, markersize=4, label=name)
        axes[1].plot([row["seconds"] for row in records], accuracy, color=colour, marker=marker, linestyle=dash, markersize=4)
    axes[0].set_ylabel("k-NN accuracy, top-1 (%)")
    axes[0].set_xlabel("epoch")
    axes[1].set_xlabel("time of training and evaluation (s, one core)")
    axes[0].legend(fontsize=8)
    return figure


def draw_ablation(plt, rows):
    """Final k-NN accuracy: which weights are learned; nu with kappa = 1 and kappa = nu; the projector's width."""
    final = {row["run"]: row for row in last_rows(rows)}
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained", width_ratios=(1.2, 1, 1))
    variants = [name for name in final if not name.startswith(("nu ", "projector "))]
    for field, marker, label in (("test_acc@1", "o", "k-NN"), ("linear", "s", "linear")):
        axes[0].plot([final[name][field] for name in variants], range(len(variants)), marker, color="black",
                     fillstyle="none" if field == "linear" else "full", label=label)
    axes[0].set_yticks(range(len(variants)), variants, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("accuracy, top-1 (%)")
    axes[0].legend(fontsize=8)
    for kappa, (colour, marker, dash) in zip(("1", "nu"), STYLES):
        points = {name.split(",")[0][3:]: row for name, row in final.items() if name.endswith(f", kappa {kappa}") and name.startswith("nu")}
        points |= {"16": final["default"]} if kappa == "1" and "default" in final else {}
        order = sorted(points, key=lambda nu: float("inf") if nu == "sum" else float(nu))
        axes[1].plot(order, [points[nu]["test_acc@1"] for nu in order], color=colour, marker=marker, linestyle=dash, label=f"kappa = {kappa}")
    axes[1].set_xlabel("weight nu of the negatives' spread")
    axes[1].legend(fontsize=8)
    widths = {int(row["projector"].split()[0]): row for name, row in final.items() if name.startswith("projector ") or name == "default"}
    for (field, label), (colour, marker, dash) in zip((("test_acc@1", "k-NN"), ("linear", "linear")), STYLES):
        axes[2].plot(sorted(widths), [widths[w][field] for w in sorted(widths)], color=colour, marker=marker, linestyle=dash, label=label)
    log_axis(axes[2], "hidden width of the projector (output: half of it)", set(widths))
    axes[2].legend(fontsize=8)
    axes[1].set_ylabel("k-NN accuracy, top-1 (%)")
    axes[2].set_ylabel("accuracy, top-1 (%)")
    return figure


def draw_trajectories(plt, rows):
    """a, b and alpha with the mean scores that they follow, and the AUC of test pairs, for the ways of setting them."""
    runs = grouped(rows, lambda row: row["run"])
    shown = [name for name in ("default", "weights_lr 1e-2", "hold all", "closed form") if name in runs]
    figure, axes = plt.subplots(1, len(shown) + 1, figsize=(3.2 * (len(shown) + 1), 3.6), layout="constrained")
    for axis, name in zip(axes, shown):
        epochs = [row["epoch"] + 1 for row in runs[name]]
        for field, (colour, marker, dash) in zip(("a", "positive", "b", "negative", "alpha"), STYLES):
            axis.plot(epochs, [row[field] for row in runs[name]], color=colour, marker=marker, linestyle=dash, markersize=4, label=field)
        axis.set_title(name, fontsize=10)
        axis.set_ylim(-0.05, 1.05)
        axis.set_xlabel("epoch")
    axes[0].set_ylabel("a, b, alpha; mean score")
    axes[0].legend(fontsize=7, title="positive, negative:\nmean scores", title_fontsize=7)
    for name, (colour, marker, dash) in zip(shown, STYLES):
        axes[-1].plot(epochs, [row["test_auc"] for row in runs[name]], color=colour, marker=marker, linestyle=dash, markersize=4, label=name)
    axes[-1].set_title("AUC of test pairs", fontsize=10)
    axes[-1].set_xlabel("epoch")
    axes[-1].legend(fontsize=7)
    return figure


def draw_bias(plt, rows):
    """Bias, its part that no step size mends, and standard deviation of minibatch gradients against the batch size."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for (name, points), (colour, marker, dash) in zip(grouped(rows, lambda row: row["loss"]).items(), STYLES):
        sizes = [row["batch_size"] for row in points]
        for axis, field in zip(axes, ("bias", "direction")):
            low, value, high = ([max(row[f"{field}{end}"], 1e-4) for row in points] for end in ("_low", "", "_high"))
            axis.plot(sizes, value, color=colour, marker=marker, linestyle=dash, markersize=5, label=name)
            axis.fill_between(sizes, low, high, color=colour, alpha=0.12, linewidth=0)
        axes[2].plot(sizes, [row["deviation"] for row in points], color=colour, marker=marker, linestyle=dash, markersize=5)
    titles = ("|mean minibatch gradient - population gradient|", "of that, perpendicular to the population gradient",
              "standard deviation of one minibatch gradient")
    for axis, title in zip(axes, titles):
        log_axis(axis, "batch size (images)", {row["batch_size"] for row in rows})
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("relative to the population gradient's norm")
    axes[0].legend(fontsize=8, title="shaded: 95 % interval; 0 is drawn at 1e-4", title_fontsize=8)
    return figure


def draw_objective(plt, rows):
    """Time and extra memory of forward and backward pass against the number of images."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (name, points), (colour, marker, dash) in zip(grouped(rows, lambda row: row["loss"]).items(), STYLES):
        images = [row["images"] for row in points]
        tail = [(row["images"], row["seconds"]) for row in points if row["images"] >= FIT_FROM]
        label = f"{name}: n^{fitted_exponent(*zip(*tail)):.2f}" if len(tail) > 1 else name
        for axis, values in zip(axes, ([1e3 * row["seconds"] for row in points], [max(row["megabytes"], 0.5) for row in points])):
            axis.plot(images, values, color=colour, marker=marker, linestyle=dash, markersize=4, label=label)
    for axis, label in zip(axes, ("time (ms)", "extra memory (MB)")):
        log_axis(axis, "images n", {row["images"] for row in rows})
        axis.set_yscale("log")
        axis.set_ylabel(label)
    axes[0].legend(fontsize=8, title=f"growth of the time from n = {FIT_FROM}", title_fontsize=8)
    return figure


def log_axis(axis, label, ticks):
    ticks = sorted(int(tick) for tick in ticks)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, ticks, fontsize=8)
    axis.set_xlabel(label)


# picture -> the table it is drawn from, and by what
PICTURES = {"batch_size": ("batch_size", draw_batch_size), "convergence": ("convergence", draw_convergence),
            "ablation": ("ablation", draw_ablation), "trajectories": ("ablation", draw_trajectories), "bias": ("bias", draw_bias),
            "objective": ("objective", draw_objective)}


def main(argv=None):
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("folder", type=Path, help="with the tables")
    parser.add_argument("--format", choices=("png", "pdf", "svg"), default="png")
    args = parser.parse_args(argv)
    found = {name: draw for name, (table, draw) in PICTURES.items() if (args.folder / f"{table}.csv").exists()}
    if not found:
        raise utils.UserError(f"{args.folder} holds none of {', '.join(dict.fromkeys(f'{table}.csv' for table, _ in PICTURES.values()))}")
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    for name, draw in found.items():
        rows = read(args.folder / f"{PICTURES[name][0]}.csv")
        figure = draw(plt, rows)
        for axis in figure.axes:
            axis.grid(alpha=0.3)
        path = args.folder / f"{name}.{args.format}"
        utils.replace_file(path, lambda file: figure.savefig(file, format=args.format, dpi=150), "wb")
        plt.close(figure)
        print(path)


if __name__ == "__main__":
    utils.run_script(main)
