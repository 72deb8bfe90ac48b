"""Draws the tables of study.py, bias.py and objective.py: a picture for each that is there.

    python benchmarks/pictures.py cifar/results/studies     # reads the CSVs there, writes PNGs beside them
    python benchmarks/pictures.py DIR --format svg
"""
import itertools
import math
import re
import sys
from pathlib import Path
from statistics import linear_regression, mean

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: E402
from benchmarks.measure import read_table  # noqa: E402

TRAJECTORIES = ("base", "weights_lr 1e-2", "all held", "closed form")   # runs of the ablation
LOWEST = 1e-3       # of the logarithmic axis of biases, on which an estimate of 0 has no place
FIT_FROM = 2048     # images from which on the exponent of the objective's time is fitted
ACCURACIES = {"test_acc@1": "k-NN", "linear": "linear probe"}

# colour, marker, dashes: any one of them tells two lines apart, so that the pictures read in black and white
STYLES = (("black", "o", "-"), ("tab:red", "s", "--"), ("tab:blue", "^", "-."), ("tab:green", "D", ":"),
          ("tab:purple", "v", (0, (5, 1))), ("tab:brown", "X", (0, (3, 1, 1, 1))),
          ("tab:gray", "P", (0, (1, 1))), ("tab:orange", "*", (0, (7, 2))))


def read(path: Path) -> list[dict]:
    """The rows of a CSV, numbers as floats and empty cells as None."""
    def value(text):
        try:
            return float(text) if text else None
        except ValueError:
            return text
    return [{name: value(text) for name, text in row.items()} for row in read_table(path)]


def grouped(rows, key) -> dict:
    """key(row), or row[key] -> rows, in the order in which they come first."""
    groups = {}
    for row in rows:
        groups.setdefault(key(row) if callable(key) else row[key], []).append(row)
    return groups


def styled(groups: dict):
    """(style, name, rows) of every group; styles come again after the last."""
    return ((style, *group) for style, group in zip(itertools.cycle(STYLES), groups.items()))


def last_rows(rows) -> list[dict]:
    """The last epoch of every run."""
    return [row for row in rows if row["linear"] is not None]


def panels(count: int, width: float, height: float = 4.2, lines: int = 1):
    """A figure and its axes [lines][count]."""
    figure = Figure((count * width, lines * height), layout="constrained")
    return figure, figure.subplots(lines, count, squeeze=False, sharey="col")


def draw_line(axis, style, label, x, y, low=None, high=None):
    """A line, with a band from `low` to `high` where they are given."""
    colour, marker, dashes = style
    axis.plot(x, y, color=colour, marker=marker, linestyle=dashes, markersize=4, label=label)
    if low:
        axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def draw_over_seeds(axis, style, label, rows, x, y):
    """The mean of row[y] over rows of equal row[x] (or x(row)), and a band from the lowest to the highest."""
    values = {at: [row[y] for row in seeds] for at, seeds in sorted(grouped(rows, x).items())}
    bounds = ([summary(seeds) for seeds in values.values()] for summary in (mean, min, max))
    draw_line(axis, style, label, list(values), *bounds)


def draw_dots(axis, rows):
    """Accuracies of runs, one per line, downwards."""
    for (field, label), marker, fill in zip(ACCURACIES.items(), "os", ("full", "none")):
        x = [row[field] for row in rows]
        axis.plot(x, range(len(rows)), marker, color="black", fillstyle=fill, label=label)
    axis.set_yticks(range(len(rows)), [row["run"] for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="accuracy, top-1 (%)")
    axis.legend(fontsize=8)


def set_log_axis(axis, ticks):
    ticks = sorted({int(tick) for tick in ticks})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, ticks, fontsize=8)


# -------------------------------------------------------------------------------------------------- pictures

def draw_batch_size(rows):
    """Final accuracies against the batch size, by method: the run "AUC-CL b64 s0" is one of "AUC-CL"."""
    figure, [axes] = panels(2, 5.5)
    methods = grouped(last_rows(rows), lambda row: re.sub(r" b\d+ s\d+$", "", row["run"]))
    for axis, (field, title) in zip(axes, ACCURACIES.items()):
        for style, name, runs in styled(methods):
            draw_over_seeds(axis, style, name, runs, "batch_size", field)
        axis.set(xlabel="batch size (images)", ylabel=f"{title} accuracy, top-1 (%)")
        set_log_axis(axis, [row["batch_size"] for row in rows])
    axes[0].legend(fontsize=8)
    return figure


def draw_summary(rows, accuracies):
    """The README's picture: bias (on a network that has all three losses) and k-NN accuracy by batch size."""
    figure, [axes] = panels(2, 4.5, 3.3)
    losses = {"AUC-CL quartic": "AUC-CL quartic", "NT-Xent": "NT-Xent, T = 0.1", "DCL": "DCL, T = 0.1"}
    networks = grouped(rows, "network").values()
    rows = next((points for points in networks if {*losses.values()} <= {row["loss"] for row in points}), [])
    for style, (run, loss) in zip(STYLES, losses.items()):
        points = sorted((row for row in rows if row["loss"] == loss), key=lambda row: row["batch_size"])
        percent = [[100 * row[field] for row in points] for field in ("bias", "bias_low", "bias_high")]
        draw_line(axes[0], style, loss, [row["batch_size"] for row in points], *percent)
        runs = [row for row in last_rows(accuracies) if re.match(rf"{run} b\d+ s", row["run"])]
        draw_over_seeds(axes[1], style, loss, runs, "batch_size", "test_acc@1")
    titles = "bias of the minibatch gradient (% of the gradient)", "k-NN accuracy (%)"
    for axis, title, ticks in zip(axes, titles, ((4, 16, 64, 256), (16, 32, 64, 128, 256, 512))):
        set_log_axis(axis, ticks)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="batch size (images)")
        axis.legend(fontsize=8)
    return figure


def draw_convergence(rows):
    """k-NN accuracy by epoch and by second of training and evaluation."""
    figure, [axes] = panels(2, 5.5)
    for style, name, records in styled(grouped(rows, "run")):
        accuracy = [row["test_acc@1"] for row in records]
        draw_line(axes[0], style, name, [row["epoch"] + 1 for row in records], accuracy)
        draw_line(axes[1], style, name, [row["seconds"] or 0 for row in records], accuracy)
    axes[0].set(xlabel="epoch", ylabel="k-NN accuracy, top-1 (%)")
    axes[1].set(xlabel="time of training and evaluation (s)")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(fontsize=8)
    return figure


def draw_seeds(rows):
    """k-NN accuracy by epoch, and final k-NN and linear accuracy: means over seeds and their range."""
    figure, [axes] = panels(2, 5.5)
    trained = [row for row in rows if row["epoch"] >= 0]
    methods = grouped(trained, lambda row: re.sub(r" s\d+$", "", row["run"]))
    for at, (style, name, records) in enumerate(styled(methods)):
        draw_over_seeds(axes[0], style, name, records, lambda row: row["epoch"] + 1, "test_acc@1")
        for field, fill, y in zip(ACCURACIES, ("full", "none"), (at - 0.12, at + 0.12)):
            values = [row[field] for row in last_rows(records)]
            axes[1].plot([min(values), max(values)], [y, y], color=style[0], alpha=0.3)
            axes[1].plot(mean(values), y, style[1], color=style[0], fillstyle=fill)
    axes[0].set(xlabel="epoch", ylabel="k-NN accuracy, top-1 (%)")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(fontsize=8)
    axes[1].set(xlabel="final accuracy, top-1 (%): full k-NN, hollow linear probe")
    axes[1].set(ylim=(len(methods) - 0.5, -0.5))    # downwards
    axes[1].set_yticks(range(len(methods)), methods, fontsize=8)
    return figure


def draw_views(rows):
    """Final accuracies against the number of views, by what is equal; three settings of runs.py's views."""
    figure, [axes] = panels(2, 5.5)
    final = last_rows(rows)
    fewest = min(row["epochs"] for row in final)
    most = max(row["epochs"] * row["views"] for row in final)
    largest = max(row["batch_size"] for row in final)
    per_step = 2 * largest
    settings = {  # name -> whether it holds for (views, batch size, epochs)
        "equal views seen": lambda v, size, epochs: v * size == per_step and v * epochs == most,
        "equal epochs and views a step": lambda v, size, epochs: v * size == per_step and epochs == fewest,
        "equal epochs and images a step": lambda v, size, epochs: size == largest and epochs == fewest}
    lines = {f"{name}, {setting}": [row for row in records
                                     if holds(row["views"], row["batch_size"], row["epochs"])]
             for name, records in grouped(final, lambda row: re.sub(r" V\d+ .*$", "", row["run"])).items()
             for setting, holds in settings.items()}
    for axis, (field, title) in zip(axes, ACCURACIES.items()):
        for style, name, records in styled(lines):
            if len({row["views"] for row in records}) > 1:
                draw_over_seeds(axis, style, name, records, "views", field)
        axis.set(xlabel="views of an image", ylabel=f"{title} accuracy, top-1 (%)")
        set_log_axis(axis, [row["views"] for row in final])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def draw_all_images(rows):
    """Final accuracies of every setting, the best at the top."""
    final = sorted(last_rows(rows), key=lambda row: -row["test_acc@1"] - row["linear"])
    figure, [[axis]] = panels(1, 8, 1.2 + 0.28 * len(final))
    draw_dots(axis, final)
    return figure


def draw_ablation(rows):
    """Final accuracies: which weights are learned; nu, with kappa = 1 and kappa = nu; the projector."""
    final = {row["run"]: row for row in last_rows(rows)}
    figure, [axes] = panels(3, 4.7)
    draw_dots(axes[0], [row for name, row in final.items() if not re.match("nu|projector", name)])
    for style, kappa in zip(STYLES, ("1", "nu")):
        points = {"16": final["base"]} if kappa == "1" else {}
        points |= {name.split(",")[0][3:]: row for name, row in final.items()
                   if re.fullmatch(f"nu .*, kappa {kappa}", name)}
        nus = sorted(points, key=lambda nu: math.inf if nu == "sum" else float(nu))
        draw_line(axes[1], style, f"kappa = {kappa}", nus, [points[nu]["test_acc@1"] for nu in nus])
    width = {int(row["projector"].split()[0]): row for name, row in final.items()
             if re.match("projector|base", name)}
    for style, (field, label) in zip(STYLES, ACCURACIES.items()):
        draw_line(axes[2], style, label, sorted(width), [width[hidden][field] for hidden in sorted(width)])
    axes[1].set(xlabel="nu, weight of the negatives' spread", ylabel="k-NN accuracy, top-1 (%)")
    axes[2].set(xlabel="hidden width of the projector (output: half of it)", ylabel="accuracy, top-1 (%)")
    set_log_axis(axes[2], width)
    axes[1].legend(fontsize=8), axes[2].legend(fontsize=8)
    return figure


def draw_trajectories(rows):
    """a, b, alpha with the mean scores that they follow, and the AUC of test pairs, of TRAJECTORIES."""
    runs = {name: records for name, records in grouped(rows, "run").items() if name in TRAJECTORIES}
    figure, [[*axes, last]] = panels(len(runs) + 1, 3.2, 3.9)
    for axis, (style, name, records) in zip(axes, styled(runs)):
        epochs = [row["epoch"] + 1 for row in records]
        for of_field, field in zip(STYLES, ("a", "positive", "b", "negative", "alpha")):
            draw_line(axis, of_field, field, epochs, [row[field] for row in records])
        draw_line(last, style, name, epochs, [row["test_auc"] for row in records])
        axis.set(title=name, ylim=(-0.05, 1.05), xlabel="epoch")
    axes[0].set(ylabel="a, b, alpha; mean positive\nand negative score")
    last.set(title="AUC of test pairs", xlabel="epoch")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    last.legend(fontsize=7)
    return figure


def draw_bias(rows):
    """Bias, tangent and deviation of minibatch gradients by batch size; a row of axes per network."""
    titles = {"bias": "bias: |E g - G| / |G|", "tangent": "tangent of the angle between E g and G",
              "deviation": "standard deviation of g / |G|"}
    networks, styles = grouped(rows, "network"), dict(zip(grouped(rows, "loss"), itertools.cycle(STYLES)))
    figure, grid = panels(3, 4.7, lines=len(networks))
    for axes, (network, figures) in zip(grid, networks.items()):
        for axis, (field, title) in zip(axes, titles.items()):
            for name, points in grouped(figures, "loss").items():
                points = sorted(points, key=lambda row: row["batch_size"])
                values = ([max(row[field + end], LOWEST) for row in points] for end in ("", "_low", "_high"))
                draw_line(axis, styles[name], name, [row["batch_size"] for row in points], *values)
            axis.set(title=f"network trained by {network}", ylabel=title, yscale="log",
                     xlabel="batch size (images)")
            set_log_axis(axis, [row["batch_size"] for row in rows])
    lines = {line.get_label(): line for axis in grid[:, 0] for line in axis.lines}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, fontsize=8,
                  title="g: minibatch gradient, G: the population's; shaded: 95 % interval; "
                        f"what is below {LOWEST:g} is drawn there")
    return figure


def draw_objective(rows):
    """Time and extra memory of forward and backward pass against the number of images."""
    figure, [axes] = panels(2, 5.5)
    for style, name, points in styled(grouped(rows, "loss")):
        images = [row["images"] for row in points]
        label = f"{name}: n^{exponent:.2f}" if (exponent := growth(points)) else name
        draw_line(axes[0], style, label, images, [1e3 * row["seconds"] for row in points])
        draw_line(axes[1], style, name, images, [max(row["megabytes"], 0.5) for row in points])
    for axis, title in zip(axes, ("time (ms)", "extra memory (MB)")):
        axis.set(xlabel="images n", ylabel=title, yscale="log")
        set_log_axis(axis, [row["images"] for row in rows])
    axes[0].legend(fontsize=8, title=f"growth of the time from n = {FIT_FROM}")
    return figure


def growth(points) -> float | None:
    """p of the seconds = c images^p that fits best from FIT_FROM on, by least squares of logarithms."""
    large = [row for row in points if row["images"] >= FIT_FROM]
    images, seconds = ([math.log(row[field]) for row in large] for field in ("images", "seconds"))
    return linear_regression(images, seconds).slope if len(large) > 1 else None


PICTURES = {"batch_size": draw_batch_size, "convergence": draw_convergence, "all_images": draw_all_images,
            "ablation": draw_ablation, "trajectories": draw_trajectories, "bias": draw_bias,
            "objective": draw_objective, "hard": draw_seeds, "long": draw_seeds, "views": draw_views,
            "hard_batch": draw_batch_size}
TABLES = {"trajectories": "ablation"}  # picture -> its table, where it is called otherwise


def main(argv=None):
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of the tables")
    parser.add_argument("--format", choices=("png", "pdf", "svg"), default="png", help="file format")
    args = parser.parse_args(argv)
    tables = {name: read(args.folder / f"{TABLES.get(name, name)}.csv") for name in PICTURES}
    if not any(tables.values()):
        raise utils.UserError(f"no table in {args.folder}, such as batch_size.csv; run study.py first")
    figures = {name: PICTURES[name](rows) for name, rows in tables.items() if rows}
    if {"bias", "hard_batch"} <= figures.keys():
        figures["summary"] = draw_summary(tables["bias"], tables["hard_batch"])
    for name, figure in figures.items():
        for axis in figure.axes:
            axis.grid(alpha=0.3)
        path = args.folder / f"{name}.{args.format}"
        figure.savefig(path, dpi=150)
        print(path)


if __name__ == "__main__":
    utils.run_script(main)
