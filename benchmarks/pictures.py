"""Draws the tables of study.py, bias.py and objective.py: a picture for each that is there.

    python benchmarks/pictures.py cifar/results/studies       # reads the CSVs in the folder, writes PNGs beside them
    python benchmarks/pictures.py DIR --format svg
"""
import csv
import itertools
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: E402
from benchmarks.measure import fitted_exponent  # noqa: E402
from benchmarks.objective import FIT_FROM  # noqa: E402

TRAJECTORIES = ("base", "weights_lr 1e-2", "all held", "closed form")   # runs of the ablation
LOWEST = 1e-3   # of the logarithmic axis of biases, which an estimate of 0 has no place on

# colour, marker, dashes: any one of them tells two lines apart, so that the pictures read in black and white
STYLES = (("black", "o", "-"), ("tab:red", "s", "--"), ("tab:blue", "^", "-."), ("tab:green", "D", ":"), ("tab:purple", "v", (0, (5, 1))),
          ("tab:brown", "x", (0, (3, 1, 1, 1))), ("tab:gray", "P", (0, (1, 1))))
TEXT = ("run", "loss", "options", "projector", "learn", "score", "preset", "network", "setting")  # columns that are no numbers, whatever they look like


def read(path: Path) -> list[dict]:
    """The rows of a CSV, numbers as floats and empty cells as None."""
    def value(name, text):
        try:
            return text if name in TEXT else float(text) if text else None
        except ValueError:  # "sum"
            return text
    with open(path, newline="") as file:
        return [{name: value(name, text) for name, text in row.items()} for row in csv.DictReader(file, strict=True)]


def styled(groups: dict):
    """(name, rows, colour, marker, dashes) of every group; styles come again after the last."""
    return ((name, rows, *style) for (name, rows), style in zip(groups.items(), itertools.cycle(STYLES)))


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
    return re.sub(r" b\d+ s\d+$", "", row["run"])


# ----------------------------------------------------------------------------------------------------------------- pictures

def draw_batch_size(plt, rows):
    """Final accuracies against the batch size: lines through the means over seeds, a dash for every seed."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, (field, title) in zip(axes, (("test_acc@1", "k-NN"), ("linear", "linear probe"))):
        for name, runs, colour, marker, dash in styled(grouped(last_rows(rows), method)):
            sizes = grouped(sorted(runs, key=lambda row: row["batch_size"]), lambda row: row["batch_size"])
            means = [mean(row[field] for row in seeds) for seeds in sizes.values()]
            axis.plot(list(sizes), means, color=colour, marker=marker, linestyle=dash, markersize=5, label=name)
            axis.plot([row["batch_size"] for row in runs], [row[field] for row in runs], "_", color=colour, markersize=6)
        log_axis(axis, "batch size (images)", {row["batch_size"] for row in rows})
        axis.set_ylabel(f"{title} accuracy, top-1 (%)")
    if last_rows(rows):
        axes[0].legend(fontsize=8)
    return figure


def draw_convergence(plt, rows):
    """k-NN accuracy by epoch and by second of training and evaluation."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for name, records, colour, marker, dash in styled(grouped(rows, lambda row: row["run"])):
        accuracy = [row["test_acc@1"] for row in records]
        for axis, times in zip(axes, ([row["epoch"] + 1 for row in records], [row["seconds"] for row in records])):
            axis.plot(times, accuracy, color=colour, marker=marker, linestyle=dash, markersize=4, label=name)
    axes[0].set_ylabel("k-NN accuracy, top-1 (%)")
    axes[0].set_xlabel("epoch")
    axes[0].xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    axes[1].set_xlabel("time of training and evaluation (s)")
    axes[0].legend(fontsize=8)
    return figure


def draw_all_images(plt, rows):
    """Final accuracies of every setting, the best at the top."""
    final = sorted(last_rows(rows), key=lambda row: row["test_acc@1"] + row["linear"])
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.28 * len(final)), layout="constrained")
    draw_dots(axis, [row["run"] for row in final], final)
    return figure


def draw_dots(axis, names, rows):
    """k-NN and linear accuracy of `rows`, a line each, upwards."""
    for field, label, marker, fill in (("test_acc@1", "k-NN", "o", "full"), ("linear", "linear", "s", "none")):
        axis.plot([row[field] for row in rows], range(len(rows)), marker, color="black", fillstyle=fill, label=label)
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.set_xlabel("accuracy, top-1 (%)")
    axis.legend(fontsize=8)


def draw_ablation(plt, rows):
    """Final k-NN accuracy: which weights are learned; nu with kappa = 1 and kappa = nu; the projector's width."""
    final = {row["run"]: row for row in last_rows(rows)}
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained", width_ratios=(1.2, 1, 1))
    variants = [name for name in final if not name.startswith(("nu ", "projector "))]
    draw_dots(axes[0], variants, [final[name] for name in variants])
    axes[0].invert_yaxis()
    for kappa, (colour, marker, dash) in zip(("1", "nu"), STYLES):
        points = {name.split(",")[0][3:]: row for name, row in final.items()
                  if name.startswith("nu ") and name.endswith(f", kappa {kappa}")}
        points |= {"16": final["base"]} if kappa == "1" and "base" in final else {}
        order = sorted(points, key=lambda nu: float("inf") if nu == "sum" else float(nu))
        axes[1].plot(order, [points[nu]["test_acc@1"] for nu in order], color=colour, marker=marker, linestyle=dash, label=f"kappa = {kappa}")
    axes[1].set_xlabel("nu, weight of the negatives' spread")
    axes[1].legend(fontsize=8)
    widths = {int(row["projector"].split()[0]): row for name, row in final.items() if name.startswith(("projector ", "base"))}
    for (field, label), (colour, marker, dash) in zip((("test_acc@1", "k-NN"), ("linear", "linear")), STYLES):
        accuracy = [widths[width][field] for width in sorted(widths)]
        axes[2].plot(sorted(widths), accuracy, color=colour, marker=marker, linestyle=dash, label=label)
    log_axis(axes[2], "hidden width of the projector (output: half of it)", widths)
    axes[2].legend(fontsize=8)
    axes[1].set_ylabel("k-NN accuracy, top-1 (%)")
    axes[2].set_ylabel("accuracy, top-1 (%)")
    return figure


def draw_trajectories(plt, rows):
    """a, b and alpha with the mean scores that they follow, and the AUC of test pairs, for the ways of setting them."""
    runs = {name: records for name, records in grouped(rows, lambda row: row["run"]).items() if name in TRAJECTORIES}
    figure, axes = plt.subplots(1, len(runs) + 1, figsize=(3.2 * (len(runs) + 1), 3.9), layout="constrained", squeeze=False)
    *each, last = axes[0]
    for axis, (name, records), (_, _, colour, marker, dash) in zip(each, runs.items(), styled(runs)):
        epochs = [row["epoch"] + 1 for row in records]
        for field, (line, point, dashes) in zip(("a", "positive", "b", "negative", "alpha"), STYLES):
            axis.plot(epochs, [row[field] for row in records], color=line, marker=point, linestyle=dashes, markersize=4, label=field)
        axis.set_title(name, fontsize=10)
        axis.set_ylim(-0.05, 1.05)
        axis.set_xlabel("epoch")
        last.plot(epochs, [row["test_auc"] for row in records], color=colour, marker=marker, linestyle=dash, markersize=4, label=name)
    axes[0, 0].set_ylabel("a, b, alpha; mean positive\nand negative score")
    last.set_title("AUC of test pairs", fontsize=10)
    last.set_xlabel("epoch")
    if runs:
        figure.legend(*each[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
        last.legend(fontsize=7)
    return figure


def draw_bias(plt, rows):
    """Bias, its part that no step size mends, and standard deviation of minibatch gradients against the batch size; a row of axes
    for every network."""
    titles = {"bias": "bias: |E g - G| / |G|", "tangent": "tangent of the angle between E g and G",
              "deviation": "standard deviation of g / |G|"}
    networks, styles = grouped(rows, lambda row: row["network"]), {}
    figure, axes = plt.subplots(len(networks), 3, figsize=(14, 0.8 + 3.6 * len(networks)), layout="constrained", squeeze=False, sharey="col")
    for line, (network, figures) in zip(axes, networks.items()):
        for axis, (field, title) in zip(line, titles.items()):
            for name, points in grouped(figures, lambda row: row["loss"]).items():
                colour, marker, dash = styles.setdefault(name, STYLES[len(styles) % len(STYLES)])
                points = sorted(points, key=lambda row: row["batch_size"])
                sizes = [row["batch_size"] for row in points]
                value, low, high = ([max(row[field + end], LOWEST) for row in points] for end in ("", "_low", "_high"))
                axis.plot(sizes, value, color=colour, marker=marker, linestyle=dash, markersize=5, label=name)
                axis.fill_between(sizes, low, high, color=colour, alpha=0.12, linewidth=0)
            log_axis(axis, "batch size (images)", {row["batch_size"] for row in rows})
            axis.set_yscale("log")
            axis.set_ylabel(title)
            axis.set_title(f"network trained by {network}", fontsize=10)
    most = max(axes[:, 0], key=lambda axis: len(axis.lines))
    figure.legend(*most.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, title_fontsize=8,
                  title=f"g: minibatch gradient, G: the population's; shaded: 95 % interval; what is below {LOWEST:g} is drawn there")
    return figure


def draw_objective(plt, rows):
    """Time and extra memory of forward and backward pass against the number of images."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, points, colour, marker, dash in styled(grouped(rows, lambda row: row["loss"])):
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
            "all_images": ("all_images", draw_all_images),
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
        table = args.folder / f"{PICTURES[name][0]}.csv"
        try:
            figure = draw(plt, read(table))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            raise utils.UserError(f"{table} is not the table that {name} is drawn from: {error!r}") from error
        for axis in figure.axes:
            axis.grid(alpha=0.3)
        path = args.folder / f"{name}.{args.format}"
        utils.replace_file(path, lambda file: figure.savefig(file, format=args.format, dpi=150), "wb")
        plt.close(figure)
        print(path)


if __name__ == "__main__":
    utils.run_script(main)
