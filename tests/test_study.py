"""The studies in benchmarks/: the driver, the bias estimate and the pictures."""
import itertools
import json
import os
import signal
import sys
import threading

import auccl_loss
import pytest
import torch
from torch import nn
from auccl_loss import AUCCLLoss
from benchmarks import bias, losses, measure, pictures, study
from benchmarks.measure import read_table, write_table
from benchmarks.runs import METHODS, STUDIES, Config, Study
from cifar import main as cifar
from cifar.data import ImageData
from conftest import ROOT, refusal
from references import surrogate, symmetric_pairs
from utils import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = ["--arch", "tiny", "--projector", "16", "8", "--batch_size", "40", "--device", "cpu", "--amp", "none"]
PUBLISHED = ROOT / "results" / "studies"


# ----------------------------------------------------------------------------------------------------- study

@pytest.fixture
def images(monkeypatch):
    """Ten classes that differ in brightness, in the place of every data set."""
    labels, generator = torch.arange(150) % 10, torch.Generator().manual_seed(0)
    noise = torch.randint(0, 60, (150, 3, 32, 32), generator=generator)
    pixels = (20 * labels[:, None, None, None] + noise).byte()
    data = ImageData(pixels[:120], pixels[:120], labels[:120], pixels[120:], labels[120:])
    for module in (study, bias):
        monkeypatch.setattr(module, "load_data", lambda *args: data)
    return data


@pytest.fixture
def driver(images, tmp_path, monkeypatch):
    """Runs a study of two runs; its table without the times."""
    configs = [Config("learned", {"weights_lr": 0.01}),
               Config("closed", {}, "ClosedForm", {"negative_weight": 8})]
    monkeypatch.setitem(STUDIES, "two", Study(configs, images=100, epochs=2))

    def run(*flags, folder="out"):
        study.main(["two", *FLAGS, "--output_dir", str(tmp_path / folder), *flags])
        return [{name: value for name, value in row.items() if name not in ("images_per_s", "seconds")}
                for row in read_table(tmp_path / folder / "two.csv")]
    run.folder = tmp_path / "out"
    return run


def test_a_study_gives_a_row_per_epoch_and_linear_accuracy_in_the_last(driver):
    threads = threading.enumerate()
    rows = driver("--keep_checkpoints")
    assert not [left for left in threading.enumerate() if "Writer" in repr(left) and left not in threads]
    assert [row["epoch"] for row in rows] == 2 * ["-1", "0", "1"]
    assert [row["loss"] for row in rows] == 3 * ["AUCCLLoss"] + 3 * ["ClosedForm"]
    assert [bool(row["linear"]) for row in rows] == 2 * [False, False, True] and float(rows[2]["linear"]) > 30
    assert rows[0]["weights_lr"] == "0.01" and rows[3]["weights_lr"] == "" and "8" in rows[3]["options"]
    assert float(rows[5]["a"]) == pytest.approx(float(rows[5]["positive"]), abs=0.1)  # of the last batch
    assert (driver.folder / "two" / "closed" / "checkpoint.pth").exists()
    side_by_side = driver("--processes", "2", folder="side by side")
    assert {str(row) for row in side_by_side} == {str(row) for row in rows}


@pytest.mark.parametrize("processes, message", [("1", "training diverged"), ("2", "its process died")])
def test_a_run_that_fails_or_dies_stops_no_other(driver, monkeypatch, capsys, processes, message):
    train = cifar.train

    def fails(args, *rest):
        if args.output_dir.name != "learned":
            return train(args, *rest)
        if processes == "2":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("training diverged")
    monkeypatch.setattr(cifar, "train", fails)
    assert "1 of 2 runs failed: learned" in refusal(driver, "--processes", processes)
    assert f"learned: {message}" in capsys.readouterr().err
    assert {row["run"] for row in read_table(driver.folder / "two.csv")} == {"closed"}


def test_an_interrupted_study_resumes_inside_a_run(driver, monkeypatch):
    expected, evaluate, calls = driver(folder="whole"), cifar.evaluate, []

    def dies(run):
        calls.append(run)
        if len(calls) == 6:  # the second epoch of the second run
            raise KeyboardInterrupt
        return evaluate(run)
    monkeypatch.setattr(cifar, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        driver()
    assert {row["run"] for row in read_table(driver.folder / "two.csv")} == {"learned"}
    assert driver() == expected and len(calls) == 7
    assert not list(driver.folder.glob("two/*/checkpoint.pth"))


@pytest.mark.parametrize("flag, value, message", [
    ("--only", "nothing", "none of learned, closed"), ("--images", "1000", "100 per class"),
    ("--wrong", "1", "run learned: unrecognized arguments: --wrong 1"),
    ("--negative_weight", "4", "run closed: --negative_weight")])
def test_a_study_refuses_flags_without_effect(driver, flag, value, message):
    assert message in refusal(driver, flag, value)


def test_choices_of_images_are_balanced_and_held_out_ones_are_no_training_images(images, driver):
    chosen, again = (study.choose_images(images, 50) for _ in range(2))
    assert chosen.bank_labels.bincount().tolist() == [5] * 10
    assert torch.equal(chosen.train, again.train) and torch.equal(chosen.train, chosen.bank)
    held = study.hold_out(images, 20)
    assert held.test_labels.bincount().tolist() == [2] * 10 and len(held.train) == 100
    train, test = ({image.numpy().tobytes() for image in part} for part in (held.train, held.test))
    assert train | test == {image.numpy().tobytes() for image in images.train} and not train & test
    for part, labels in (held[1:3], held[3:]):  # an image's brightness tells its label
        assert torch.equal(((part.float().mean((1, 2, 3)) - 29.5) / 20).round().long(), labels)
    assert driver("--held_out", "20") == []
    assert {row["run"] for row in read_table(driver.folder / "two_held_out.csv")} == {"learned", "closed"}


@pytest.mark.parametrize("name", STUDIES)
def test_the_published_tables_came_from_these_runs(name, tmp_path):
    entry = STUDIES[name]
    configs = {config.name: config for config in entry.configs}
    assert len(configs) == len(entry.configs)
    rows = [row for file in (name, f"{name}_held_out") for row in read_table(PUBLISHED / f"{file}.csv")]
    for row in {row["run"]: row for row in rows}.values():
        config = configs[row["run"]]
        described = study.describe(config, study.parse_flags(config, entry, [], tmp_path))
        described = {name: "" if value is None else str(value) for name, value in described.items()}
        assert {name: value for name, value in described.items() if name in row}.items() <= row.items()


def test_methods_are_the_best_of_the_published_trials():
    trials = pictures.last_rows(pictures.read(PUBLISHED / "tuning.csv"))
    for loss, options, flags in METHODS.values():
        best = max((row for row in trials if row["loss"] == loss),
                   key=lambda row: row["test_acc@1"] + row["linear"])
        assert (best["projector"], best["lr"]) == (flags["projector"], flags["lr"])
        assert json.loads(best["options"] or "{}") == options


# ---------------------------------------------------------------------------------------------------- losses

def test_lightly_has_the_losses_of_all_studies():
    pytest.importorskip("lightly")
    for config in {(config.loss, str(config.options)): config for entry in STUDIES.values()
                   for config in entry.configs if config.loss != "AUCCLLoss"}.values():
        criterion = losses.build_loss(config.loss, **config.options)
        views = torch.randn(2, 6, config.options.get("dim", 16), generator=torch.Generator().manual_seed(0))
        assert criterion(*views).isfinite() and criterion.means.shape == (2,), config


def test_losses_of_lightly_need_lightly_and_two_views(monkeypatch):
    assert "leave --views out" in refusal(losses.Peer(nn.MSELoss()), *torch.randn(3, 4, 5))
    monkeypatch.setitem(sys.modules, "lightly", None)
    assert "pip install lightly" in refusal(losses.build_loss, "NTXentLoss")


def test_per_anchor_weighs_the_spread_of_each_anchor_by_earlier_batches():
    first, second = torch.randn(2, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    criterion, plain = losses.build_loss("PerAnchor", dim=5, b=0.1).double(), AUCCLLoss(b=0.1).double()
    torch.testing.assert_close(criterion(*first), plain(*first))
    units = [nn.functional.normalize(view) for view in first]
    gram = sum(row[:, None] * row for view in units for row in view)
    anchors = [nn.functional.normalize(row, dim=0) for view in second for row in view]
    weights = torch.stack([1 / (z @ gram @ z) for z in anchors])
    spreads = torch.stack([sum((z @ w - 0.1)**2 for j, w in enumerate(anchors) if j % 4 != i % 4) / 6
                           for i, z in enumerate(anchors)])
    expected = plain(*second) + 16 * ((weights / weights.mean() - 1) * spreads).mean()
    torch.testing.assert_close(criterion(*second), expected)


def test_means_of_a_peer_are_those_of_all_pairs():
    z0, z1 = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    peer = losses.Peer(nn.MSELoss())
    assert peer(z0, z1) == (z0 - z1).square().mean() and peer.param_groups(1.0) == []
    torch.testing.assert_close(peer.means, torch.stack([pairs.mean() for pairs in symmetric_pairs(z0, z1)]))


def test_closed_form_is_the_square_surrogate():
    z0, z1 = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    criterion = losses.build_loss("ClosedForm", negative_weight=1).double()
    expected = surrogate(*symmetric_pairs(z0, z1), 1.0)
    assert criterion(z0, z1).item() == pytest.approx(expected.item(), rel=1e-6)


# ------------------------------------------------------------------------------------------------------ bias

@pytest.fixture
def population():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    return bias.Population(network, torch.randn(2, 4, 3, 2, 2, dtype=torch.float64))


def enumerated(population, loss):
    """Bias, tangent and deviation by all six batches of two of the four images."""
    full = population.carry(population.embedding_gradient(loss, torch.arange(4)))
    pairs = map(torch.tensor, itertools.combinations(range(4), 2))
    batches = torch.stack([population.batch_gradient(loss, rows) for rows in pairs])
    mean, unit = batches.mean(0), full.norm()
    along = mean @ full / unit
    across = (mean - along * full / unit).norm()
    spread = (batches - mean).square().sum(1).mean().sqrt()
    return [x.item() for x in ((mean - full).norm() / unit, across / along, spread / unit)]


@pytest.mark.parametrize("name, unbiased", [
    ("AUC-CL", True), ("AUC-CL hard", True), ("AUC-CL quartic", True),
    ("AUC-CL, a b alpha from the batch", False)])
def test_the_estimate_agrees_with_enumeration(population, name, unbiased):
    loss = bias.LOSSES[name](population).double()
    exact = enumerated(population, loss)
    assert exact[0] < 1e-10 if unbiased else exact[0] > 0.01
    row = bias.measure(population, loss, 2, cuts=24, draws=100, seed=1)
    for figure, expected in zip(("bias", "tangent", "deviation"), exact):
        low, high = row[f"{figure}_low"], row[f"{figure}_high"]
        half = (high - low) / 2  # one in twenty lies outside 95 %
        assert low - half <= expected <= high + half and half < 0.25 * max(expected, 0.3), figure


@pytest.mark.parametrize("length", [0.0, 0.5])
def test_the_interval_of_the_norm_of_a_mean_holds_it_95_times_of_100(length):
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([0.6, -0.8, 0.0]) * length
    draws = [mean + torch.randn(bias.GROUPS, 3, generator=generator) for _ in range(1000)]
    intervals = [bias.norm_of_mean(rows, 1.0)[1:] for rows in draws]
    assert sum(low <= length <= high for low, high in intervals) > 900


def test_the_jackknife_is_the_textbooks():
    def estimate(draws):
        return sum(x * y for x, y in itertools.permutations(draws, 2)) / (len(draws) * (len(draws) - 1))
    draws = (1.0, 2.0, 4.0, 7.0)
    without = [estimate(draws[:left] + draws[left + 1:]) for left in range(4)]
    error = (3 / 4 * sum((x - sum(without) / 4) ** 2 for x in without)) ** 0.5
    assert bias.squared_mean(torch.tensor(draws)[:, None]) == pytest.approx((estimate(draws), error))


def test_bias_writes_the_rows_that_its_table_lacks(images, tmp_path, monkeypatch):
    monkeypatch.setattr(auccl_loss, "BLOCK", auccl_loss.BLOCK)  # which main sets
    args = cifar.parse_args([*FLAGS, "--output_dir", str(tmp_path)])
    torch.save(cifar.Run(args, images).state_dict(), tmp_path / "c.pth")
    measured, exact, measure = [], [], bias.measure
    monkeypatch.setattr(bias, "measure", lambda *args: measured.append(args[2]) or measure(*args))
    monkeypatch.setattr(bias.utils, "set_backends", lambda *args, tf32=True: exact.append(not tf32))

    def rows(*sizes):
        bias.main([str(tmp_path / "c.pth"), "--images", "16", "--cuts", "1", "--draws", "2",
                   "--losses", "AUC-CL", "--device", "cpu", "--output", str(tmp_path / "bias.csv"),
                   "--batch_sizes", *sizes])
        return read_table(tmp_path / "bias.csv")
    assert [row["batch_size"] for row in rows("16")] == ["16"]
    whole, small = rows("4", "16")
    assert measured == [16, 4] and whole["network"] == tmp_path.name
    assert exact[-1]  # a GPU's TF32 would be a bias
    assert float(whole["bias"]) < 1e-3 and float(whole["deviation"]) < 1e-2 < float(small["deviation"])


def test_bias_refuses_other_checkpoints_and_batch_sizes(tmp_path):
    other = str(tmp_path / "other.pth")
    torch.save({"student": {}}, other)
    assert f"{other} is no checkpoint of cifar/main.py" in refusal(bias.main, [other])
    wrong = [other, "--images", "16", "--batch_sizes", "4", "3"]
    assert "--batch_sizes 3 does not divide" in refusal(bias.main, wrong)


# -------------------------------------------------------------------------------------------------- pictures

def row(run, epoch=1, **more):
    return {"run": run, "epoch": epoch, "test_acc@1": 30 + epoch, "linear": 31 if epoch == 1 else None,
            "a": 0.9, "b": 0.1, "alpha": 0.7, "positive": 0.8, "negative": 0.2, "test_auc": 0.95,
            "seconds": 9 * epoch, "batch_size": 256, "projector": "64 32"} | more


def drawn(axis):
    """label -> (x, y) of its line."""
    return {line.get_label(): tuple(map(list, line.get_data(orig=True))) for line in axis.lines}


VIEWS = [row(f"DCL V{views} b{size} e{epochs} s0", views=views, batch_size=size, epochs=epochs, linear=linear)
         for views, size, epochs, linear in (
             (2, 256, 20, 50), (4, 128, 10, 51), (8, 64, 5, 52), (8, 256, 5, 53), (4, 256, 5, 54),
             (2, 256, 5, 55), (4, 128, 5, 56))]
BIAS = [{"network": network, "loss": "DCL", "batch_size": size}
        | {name + end: 0.0 for name in ("bias", "tangent", "deviation") for end in ("", "_low", "_high")}
        for network in "PQ" for size in (8, 4)]


@pytest.mark.parametrize("draw, rows, panel, expected", [
    (pictures.draw_convergence, [row("DCL", epoch) for epoch in (0, 1)], 1, {"DCL": ([0, 9], [30, 31])}),
    (pictures.draw_all_images, [row("worse"), row("better", linear=50), row("begun", epoch=0)], 0,
     {"k-NN": ([31, 31], [0, 1]), "linear probe": ([50, 31], [0, 1])}),
    (pictures.draw_trajectories, [row(run, epoch) for run in ("base", "nu 1, kappa 1") for epoch in (-1, 1)],
     1, {"base": ([0, 2], [0.95, 0.95])}),
    (pictures.draw_seeds, [row(f"DCL s{seed}", epoch) for seed in (0, 2) for epoch in (-1, 0, 1)], 0,
     {"DCL": ([1, 2], [30, 31])}),
    (pictures.draw_views, VIEWS, 1, {"DCL, equal views seen": ([2, 4, 8], [50, 51, 52]),
                                     "DCL, equal epochs and views a step": ([2, 4, 8], [55, 56, 52]),
                                     "DCL, equal epochs and images a step": ([2, 4, 8], [55, 54, 53])}),
    (pictures.draw_ablation, [*map(row, ("base", "nu 1, kappa 1", "nu sum, kappa 1", "nu 2, kappa nu"))], 1,
     {"kappa = 1": (["1", "16", "sum"], [31, 31, 31]), "kappa = nu": (["2"], [31])}),
    (pictures.draw_bias, BIAS, 3, {"DCL": ([4, 8], [pictures.LOWEST] * 2)})])  # the second network's
def test_what_pictures_draw(draw, rows, panel, expected):
    assert drawn(draw(rows).axes[panel]) == expected


def test_batch_size_draws_means_over_seeds_and_their_range():
    rows = [row(f"DCL b{size} s{seed}", batch_size=size, linear=40 + seed)
            for size in (64, 16) for seed in (0, 1)]
    axis = pictures.draw_batch_size(rows).axes[1]
    assert drawn(axis) == {"DCL": ([16, 64], [40.5, 40.5])}
    assert axis.collections[0].get_paths()[0].get_extents().intervaly.tolist() == [40, 41]


def test_objective_draws_times_with_their_growth_and_main_writes_the_pictures_of_tables(tmp_path):
    rows = [{"loss": "AUC-CL", "images": n, "seconds": n**1.5, "megabytes": 1} for n in (1024, 2048, 4096)]
    assert list(drawn(pictures.draw_objective(rows).axes[0])) == ["AUC-CL: n^1.50"]
    write_table(tmp_path / "objective.csv", rows)
    pictures.main([str(tmp_path), "--format", "svg"])
    assert [path.name for path in tmp_path.glob("*.svg")] == ["objective.svg"]
    assert "no table" in refusal(pictures.main, [str(tmp_path / "empty")])


# ------------------------------------------------------------------------------------------------------ floor

def test_the_floor_of_a_step_is_its_products_and_the_profile_names_them():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))

    def step():
        network(torch.ones(2, 3, 4, 4)).sum().backward()
    with measure.RecordProducts() as floor:
        step()
    names = [function.overloadpacket.__name__ for function, *_ in floor.calls]
    assert sorted(names) == ["addmm", "convolution", "convolution_backward", "mm", "mm"]
    floor()
    assert "convolution" in measure.time_shares(step, least=0.0)
