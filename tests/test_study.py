"""The studies in benchmarks/: the driver, the bias estimate and the pictures."""
import csv
import fcntl
import itertools
import json
import math
import os
import signal
import sys
import types

import pytest
import torch
from auccl_loss import AUCCLLoss
from benchmarks import bias, pictures, study
from cifar import main as cifar
from conftest import ROOT
from references import surrogate, symmetric_pairs
from utils import UserError, read_records

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = ["--dataset", "shapes", "--images", "100", "--epochs", "2", "--arch", "tiny", "--projector", "16", "8", "--batch_size", "40",
         "--device", "cpu", "--amp", "none"]
RUNS = [{"name": "learned", "flags": {"weights_lr": 0.01}}, {"name": "closed", "flags": {"learn": "none"}, "loss": "ClosedForm"}]
TIMES = ("images_per_s", "seconds")
TINY = {"arch": "tiny", "projector": [16, 8], "crop_scale": [0.2, 1.0]}     # of a checkpoint


@pytest.fixture(scope="module")
def shapes():
    """The data set, cut down: drawing and evaluating all of it takes longer than the tests."""
    data = study.load_data("shapes", None)
    rows = torch.arange(0, len(data.test), 20)
    return data._replace(test=data.test[rows], test_labels=data.test_labels[rows])


@pytest.fixture
def driver(shapes, tmp_path, monkeypatch):
    """Runs the driver on RUNS as a user would; the rows of its table."""
    monkeypatch.setattr(study, "load_data", lambda *args: shapes)

    def run(*flags, output="out", runs=RUNS):
        path = tmp_path / "runs.json"
        path.write_text(json.dumps(runs))
        study.main([str(path), *FLAGS, "--output_dir", str(tmp_path / output), *flags])
        with open(tmp_path / output / "runs.csv", newline="") as file:
            return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]
    run.folder = tmp_path
    return run


def test_two_configurations_give_a_row_an_epoch(driver):
    rows = driver()
    assert [(row["run"], row["loss"], row["epoch"]) for row in rows] == [
        ("learned", "AUCCLLoss", "0"), ("learned", "AUCCLLoss", "1"), ("closed", "ClosedForm", "0"), ("closed", "ClosedForm", "1")]
    assert [bool(row["linear"]) for row in rows] == [False, True, False, True]
    assert all(0 <= float(row["test_acc@1"]) <= 100 for row in rows) and float(rows[1]["linear"]) > 15  # chance is 10
    assert rows[0]["weights_lr"] == "0.01" and rows[2]["weights_lr"] == ""  # a flag that the loss does not know is no figure of it
    assert float(rows[3]["a"]) < 0.99 and not (driver.folder / "out" / "runs" / "closed" / "checkpoint.pth").exists()


def test_a_study_cut_off_goes_on_where_it_was(driver, monkeypatch):
    expected = driver(output="whole")
    evaluate, calls = cifar.evaluate, []

    def dies(run):
        calls.append(run)
        if len(calls) == 4:  # the second run's second epoch
            raise KeyboardInterrupt
        return evaluate(run)
    monkeypatch.setattr(cifar, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        driver()
    assert len(read_records(driver.folder / "out" / "runs" / "closed" / "log.txt")) == 1
    assert driver() == expected and len(calls) == 5  # the finished run was not touched, the other went on


def test_a_process_beside_takes_the_runs_that_nobody_holds(driver):
    held = driver.folder / "out" / "runs" / "learned"
    held.mkdir(parents=True)
    with open(held / "run.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process of the same command does
        assert {row["run"] for row in driver()} == {"closed"}
    assert {row["run"] for row in driver()} == {"learned", "closed"}


def test_a_checkpoint_that_a_kill_left_behind_goes_too(driver):
    expected = driver("--only", "closed")
    left = driver.folder / "out" / "runs" / "closed" / "checkpoint.pth"
    left.write_text("the process died between result.json and the removal")
    assert driver("--only", "closed") == expected and not left.exists()


def test_a_checkpoint_that_was_to_be_kept_stays(driver):
    driver("--keep_checkpoints", "--only", "closed")
    driver("--only", "closed")
    assert (driver.folder / "out" / "runs" / "closed" / "checkpoint.pth").exists()


def test_only_some_runs(driver):
    assert {row["run"] for row in driver("--only", "^clo")} == {"closed"}
    assert not (driver.folder / "out" / "runs" / "learned").exists()


@pytest.mark.parametrize("flags, message", [
    (["--only", "nothing"], "matches none of learned, closed"), (["--only", "("], "no regular expression"),
    (["--only", "learned", "--negative_weight=4"], "--negative_weight would change nothing")])
def test_a_choice_that_leaves_nothing(driver, flags, message):
    with pytest.raises(UserError, match=message):
        driver(*flags, runs=[RUNS[0] | {"flags": RUNS[0]["flags"] | {"negative_weight": 2}}, RUNS[1]])


def test_a_run_that_diverges_does_not_stop_the_others(driver, monkeypatch, capsys):
    train = cifar.train

    def wild(args, *rest):
        if args.output_dir.name == "wild":
            raise UserError("training diverged")
        return train(args, *rest)
    monkeypatch.setattr(cifar, "train", wild)
    with pytest.raises(UserError, match="1 of 2 runs failed: wild"):
        driver(runs=[{"name": "wild", "flags": {}}, RUNS[0]])
    assert "wild: training diverged" in capsys.readouterr().err
    assert (driver.folder / "out" / "runs" / "learned" / "result.json").exists()


def test_a_signal_between_two_runs_ends_the_study(driver, monkeypatch):
    def interrupted(run):
        os.kill(os.getpid(), signal.SIGINT)
        return 0.0
    monkeypatch.setattr(study, "linear_accuracy", interrupted)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, other tests change it
    try:
        with pytest.raises(KeyboardInterrupt):
            driver()
    finally:
        signal.signal(signal.SIGINT, former)
    assert not (driver.folder / "out" / "runs" / "closed" / "config.json").exists()


@pytest.mark.parametrize("name, text", [("config.json", ""), ("config.json", "{}"), ("result.json", "3"), ("log.txt", None)])
def test_a_damaged_run_stops_no_other(driver, capsys, name, text):
    """Of three: one damaged after its end, one finished, one that has not begun."""
    driver()
    path = driver.folder / "out" / "runs" / "learned" / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match="1 of 3 runs failed: learned"):
        driver(runs=[*RUNS, RUNS[1] | {"name": "third"}])
    assert "move" in capsys.readouterr().err
    assert {row["run"] for row in pictures.read(driver.folder / "out" / "runs.csv")} == {"closed", "third"}


def test_another_configuration_in_the_same_folder_is_refused(driver, capsys):
    driver(runs=RUNS[:1])
    with pytest.raises(UserError, match="1 runs failed"):
        driver("--seed", "3", runs=RUNS[:1])
    assert "another configuration" in capsys.readouterr().err
    assert {row["seed"] for row in pictures.read(driver.folder / "out" / "runs.csv")} == {0}
    driver("--save_every", "1", runs=RUNS[:1])  # changes nothing of the outcome


@pytest.mark.parametrize("text, message", [
    ("[]", "at least one"), ("[1", "cannot read"), ('[{"flags": {}}]', "cannot read"), ('[{"name": "x", "flags": null}]', "must be objects"),
    ('[{"name": "x", "flags": {}, "los": 1}]', "cannot read"), ('[{"name": "../x", "flags": {}}]', "a name of its own"),
    ('[{"name": "..", "flags": {}}]', "a name of its own"), ('[{"name": "x", "flags": {}}, {"name": "x", "flags": {}}]', "a name of its own"),
    ('[{"name": "x", "flags": {"lrr": 1}}]', "run x: .*--lrr"), ('[{"name": "x", "flags": {}, "options": {"a": 2}}]', "not options"),
    ('[{"name": "x", "flags": {"negative_weight": 2}, "loss": "NTXentLoss"}]', "mean nothing to NTXentLoss"),
    ('[{"name": "x", "flags": {"weights_lr": 2}, "loss": "NTXentLoss"}]', "weights_lr mean nothing to NTXentLoss"),
    ('[{"name": "x", "flags": {"compile": false}}]', "run x: .*False"),
    ('[{"name": "x", "flags": {}}, {"name": "y", "flags": {"dataset": "cifar10"}}]', "run y has a --dataset of its own"),
    ('[{"name": "x", "flags": {"batch_size": 999999}}]', "larger than the data set's")])
def test_wrong_lists_of_runs(driver, tmp_path, text, message):
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(UserError, match=message):
        study.main([str(tmp_path / "wrong.json"), "--dataset", "shapes", "--images", "0", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("argv, message", [
    (["nothing"], "no study 'nothing'"), (["bias.json"], "called otherwise"), (["tuning.json"], "called otherwise"),
    (["ablation", "--wrong", "1"], "--wrong")])
def test_wrong_flags(argv, message, tmp_path):
    with pytest.raises(UserError, match=message):
        study.main([*argv, "--output_dir", str(tmp_path)])


def test_flags_of_a_json_list_may_be_lists_and_switches(tmp_path):
    config = study.Config("x", {"dataset": "shapes", "projector": [16, 8], "compile": True, "crop_scale": "0.3 1"})
    args = study.arguments(config, [], tmp_path)
    assert (args.projector, args.compile, args.crop_scale) == ([16, 8], True, [0.3, 1.0])


class Distance(torch.nn.Module):
    """Stands in for a loss of lightly: the mean squared distance of two views, of which it counts the calls."""

    def __init__(self, weight=1.0, limit=math.inf):
        super().__init__()
        self.weight, self.limit, self.calls = weight, limit, 0

    def forward(self, z0, z1):
        self.calls += 1
        if self.calls > self.limit:
            raise RuntimeError("no more")
        return self.weight * (z0 - z1).square().mean()


@pytest.fixture
def lightly(monkeypatch):
    package = types.ModuleType("lightly")
    package.loss = types.SimpleNamespace(Distance=Distance, Pairs=lambda: (lambda z0, z1: z0 - z1), Broken=lambda: (lambda z0: z0))
    monkeypatch.setitem(sys.modules, "lightly", package)


def test_a_peer_trains_in_the_same_loop(lightly, driver):
    rows = driver(runs=[{"name": "peer", "flags": {}, "loss": "Distance", "options": {"weight": 2.0}}])
    assert rows[-1]["linear"] and rows[0]["options"] == '{"weight": 2.0}' and rows[0]["weights_lr"] == "" and "a" not in rows[0]


def test_the_look_at_a_peer_leaves_it_as_it_was(lightly):
    config = study.Config("peer", {}, "Distance", {})
    assert study.make_criterion(config, cifar.parse_args(["--dataset", "shapes"])).loss.calls == 0


def test_a_peer_that_fails_in_training_stops_no_other(lightly, driver, capsys):
    with pytest.raises(UserError, match="1 of 2 runs failed: peer"):
        driver(runs=[{"name": "peer", "flags": {}, "loss": "Distance", "options": {"limit": 1}}, RUNS[0]])
    assert "no more" in capsys.readouterr().err
    assert (driver.folder / "out" / "runs" / "learned" / "result.json").exists()


def test_every_study_asks_for_losses_that_lightly_has():
    pytest.importorskip("lightly")
    for entry in study.STUDIES.values():
        for config in entry.configs:
            study.make_criterion(config, study.arguments(config, [], ROOT))


@pytest.mark.parametrize("loss, options, message", [
    ("Nothing", {}, "Nothing"), ("Distance", {"wait": 1}, "wait"), ("Broken", {}, "two views"), ("Pairs", {}, r"shape \[8, 8\]")])
def test_wrong_losses(lightly, driver, loss, options, message):
    with pytest.raises(UserError, match=message):
        driver(runs=[{"name": "peer", "flags": {}, "loss": loss, "options": options}])


def test_without_lightly(driver, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly", None)
    with pytest.raises(UserError, match="pip install lightly"):
        driver(runs=[{"name": "peer", "flags": {}, "loss": "NTXentLoss"}])


def test_mean_cosines():
    z0, z1 = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = [pairs.mean() for pairs in symmetric_pairs(z0, z1)]
    torch.testing.assert_close(study.mean_cosines(z0, z1), torch.stack(expected))


def test_more_images_than_there_are(driver):
    with pytest.raises(UserError, match="--images"):
        driver("--images", "1000000")


def test_subset_is_balanced_and_fixed(shapes):
    first, second = (study.subset(shapes, 50) for _ in range(2))
    assert first.bank_labels.bincount().tolist() == [5] * 10
    assert torch.equal(first.train, second.train) and torch.equal(first.train, first.bank)


@pytest.mark.parametrize("name", study.STUDIES)
def test_flags_of_the_studies_are_of_cifar_main(name, tmp_path):
    configs, _, common = study.STUDIES[name]
    assert len({config.name for config in configs}) == len(configs)
    for config in configs:
        assert study.arguments(config, [*common, "--epochs", "3"], tmp_path).epochs == 3


def test_batch_size_study_scales_every_rate_by_the_square_root():
    by_name = {config.name: config.flags for config in study.batch_size()}
    for method, (_, _, flags) in study.METHODS.items():
        assert by_name[f"{method} b64 s0"]["lr"] == pytest.approx(flags["lr"] / 2)
        assert by_name[f"{method} b1024 s1"]["lr"] == pytest.approx(flags["lr"] * 2)
    assert by_name["AUC-CL b64 s0"]["weights_lr"] == pytest.approx(study.METHODS["AUC-CL"][2]["weights_lr"] / 2)


def test_names_of_temperatures_are_true():
    named = [config for entry in study.STUDIES.values() for config in entry.configs if ", T " in config.name]
    assert named and all(config.options == {"temperature": float(config.name.split(", T ")[1])} for config in named)
    assert all(config.options == study.METHODS[config.name.split(",")[0]][1] for config in study.all_images() if config not in named)


def test_methods_are_the_best_of_the_published_trials():
    trials = pictures.last_rows(pictures.read(ROOT / "results" / "studies" / "tuning.csv"))
    for loss, options, flags in study.METHODS.values():
        best = max((row for row in trials if row["loss"] == loss), key=lambda row: row["test_acc@1"] + row["linear"])
        assert (best["projector"], best["lr"]) == (flags["projector"], flags["lr"])
        assert json.loads(best["options"] or "{}") == options


def test_closed_form_is_the_square_surrogate():
    z0, z1 = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    criterion = study.ClosedForm(negative_weight=1, learn=()).double()
    assert criterion(z0, z1).item() == pytest.approx(surrogate(*symmetric_pairs(z0, z1), 1.0).item(), rel=1e-6)


# --------------------------------------------------------------------------------------------------------------------- bias

@pytest.fixture
def population():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5)).double()
    return bias.Population(network, torch.randn(2, 4, 3, 2, 2, dtype=torch.float64))


def losses(population):
    weights = bias.saddle(population.z)
    return AUCCLLoss(**weights, learn=()).double(), study.ClosedForm(**weights, learn=()).double()


def test_the_two_ways_to_a_batch_gradient_agree(population):
    loss, _ = losses(population)
    rows = torch.tensor([2, 0])
    scattered = torch.zeros_like(population.z)
    scattered[:, rows] = population.embedding_gradient(loss, rows)
    torch.testing.assert_close(population.carry(scattered), population.batch_gradient(loss, rows), rtol=1e-10, atol=1e-12)


def test_all_cuts_average_to_the_population_for_auccl_and_not_in_closed_form(population):
    error = [exact(population, loss)[0] for loss in losses(population)]
    assert error[0] < 1e-10 and error[1] > 0.01


def exact(population, loss, size=2):
    """Bias, tangent and deviation by all batches of `size` of the four images."""
    full = population.carry(population.embedding_gradient(loss, torch.arange(4)))
    batches = torch.stack([population.batch_gradient(loss, torch.tensor(rows)) for rows in itertools.combinations(range(4), size)])
    mean = batches.mean(0)
    along = mean @ full / full.norm()
    spread = (batches - mean).square().sum(1).mean().sqrt()
    return [(x / full.norm()).item() for x in ((mean - full).norm(), (mean - along * full / full.norm()).norm() * full.norm() / along, spread)]


@pytest.mark.parametrize("which", [0, 1])
def test_the_study_finds_what_enumeration_finds(population, which):
    loss = losses(population)[which]
    args = types.SimpleNamespace(groups=16, cuts=12, draws=100, seed=1)
    row = bias.study(population, loss, 2, args)
    for name, expected in zip(bias.FIGURES, exact(population, loss)):
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        assert low - (high - low) / 2 <= expected <= high + (high - low) / 2, name     # one in twenty lies outside 95 %
        assert high - low < 0.5 * max(expected, 0.3), name


def test_mean_over_cuts_is_the_mean_over_batches(population):
    loss, _ = losses(population)
    mean = population.mean_over_cuts(loss, 2, 3, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    batches = [rows for _ in range(3) for rows in torch.randperm(4, generator=generator).split(2)]
    expected = torch.stack([population.batch_gradient(loss, rows) for rows in batches]).mean(0)
    torch.testing.assert_close(population.carry(mean), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [0.0, 0.5])
def test_the_norm_of_a_mean_is_free_of_the_variance(length):
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([0.6, -0.8, 0.0]) * length      # a plain estimate from 8 draws has 3/8 of variance on top of its square
    estimates, covered = [], 0
    for _ in range(1000):
        rows = mean + torch.randn(8, 3, generator=generator)
        estimates.append(bias.squared_mean(rows)[0])
        _, low, high = bias.norm_of_mean(rows, 1.0)
        covered += low <= length <= high
    assert sum(estimates) / 1000 == pytest.approx(length**2, abs=0.03)
    assert covered > 900


def test_jackknife_is_the_textbooks_for_a_plain_product():
    rows = torch.tensor([[1.0], [2.0], [4.0], [7.0]])
    without = [sum(x * y for x, y in itertools.permutations(rest, 2)) / 6 for rest in ((2, 4, 7), (1, 4, 7), (1, 2, 7), (1, 2, 4))]
    middle = sum(without) / 4
    estimate, error = bias.squared_mean(rows)
    assert estimate == pytest.approx(sum(x * y for x, y in itertools.permutations((1, 2, 4, 7), 2)) / 12)
    assert error == pytest.approx((3 / 4 * sum((x - middle) ** 2 for x in without)) ** 0.5)


@pytest.fixture
def checkpoint(tmp_path):
    torch.save({"args": TINY, "student": cifar.ContrastiveNet("tiny", (16, 8)).state_dict()}, tmp_path / "c.pth")
    return tmp_path / "c.pth"


@pytest.fixture
def bias_table(shapes, checkpoint, tmp_path, monkeypatch):
    """bias.py on 16 images, with more flags; the path of its table."""
    monkeypatch.setattr(bias, "load_data", lambda *args: shapes)

    def run(*flags):
        bias.main([str(checkpoint), "--dataset", "shapes", "--images", "16", "--groups", "4", "--cuts", "1", "--draws", "2",
                   "--temperatures", "--output", str(tmp_path / "bias.csv"), *flags])
        return tmp_path / "bias.csv"
    return run


def test_bias_writes_its_table(bias_table):
    rows = pictures.read(bias_table("--batch_sizes", "4", "16"))
    assert [row["batch_size"] for row in rows] == [4, 16, 4, 16]
    assert all(row["bias"] < 1e-3 and row["deviation"] < 1e-2 for row in rows if row["batch_size"] == 16)  # the population itself


def test_bias_adds_only_what_its_table_lacks(bias_table, tmp_path, monkeypatch):
    whole = bias_table("--batch_sizes", "4", "8").read_text()
    (tmp_path / "bias.csv").unlink()
    first = bias_table("--batch_sizes", "8").read_text().splitlines()
    studied = []
    monkeypatch.setattr(bias, "study", lambda *args, original=bias.study: studied.append(args[2]) or original(*args))
    assert sorted(bias_table("--batch_sizes", "4", "8").read_text().splitlines()) == sorted(whole.splitlines())
    assert studied == [4, 4] and bias_table("--batch_sizes", "4", "8").read_text().splitlines()[:3] == first
    bias_table("--batch_sizes", "8", "--network", "another", "--seed", "1")
    assert [row["network"] for row in pictures.read(tmp_path / "bias.csv")] == 4 * [tmp_path.name] + 2 * ["another"]


def test_bias_keeps_what_another_process_adds_meanwhile(bias_table, tmp_path, monkeypatch):
    original, calls = bias.study, []

    def slow(*args):
        calls.append(args)
        if len(calls) == 1:  # while the first row is being computed
            bias_table("--batch_sizes", "8", "--network", "another")
        return original(*args)
    monkeypatch.setattr(bias, "study", slow)
    bias_table("--batch_sizes", "4")
    assert sorted(row["network"] for row in pictures.read(tmp_path / "bias.csv")) == 2 * ["another"] + 2 * [tmp_path.name]


def test_bias_mixes_no_settings(bias_table, tmp_path):
    before = bias_table("--batch_sizes", "16").read_text()
    with pytest.raises(UserError, match="seed 0, .* not .*seed 1"):
        bias_table("--batch_sizes", "8", "--seed", "1")
    assert (tmp_path / "bias.csv").read_text() == before


@pytest.mark.parametrize("content", [b"loss,images\n1,2\n", b"\xff\xfe\x00", b"a\n1,2,3\n"])
def test_bias_keeps_a_file_that_is_no_table(bias_table, tmp_path, content):
    (tmp_path / "bias.csv").write_bytes(content)
    with pytest.raises(UserError, match="not a table of this script"):
        bias_table("--batch_sizes", "16")
    assert (tmp_path / "bias.csv").read_bytes() == content


@pytest.mark.parametrize("state", [{}, {"args": None, "student": {}}, {"args": TINY, "student": {"x": 1}}])
def test_bias_refuses_other_checkpoints(shapes, tmp_path, monkeypatch, state):
    monkeypatch.setattr(bias, "load_data", lambda *args: shapes)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match="wrong.pth"):
        bias.main([str(tmp_path / "wrong.pth"), "--dataset", "shapes", "--temperatures"])


@pytest.mark.parametrize("flags, message", [
    (["--images", "16", "--batch_sizes", "3"], "--batch_sizes 3"), (["--draws", "1"], "--draws"), (["--arch", "small"], "leave out"),
    (["--arch=small"], "leave out"), (["--crop_scale", "0.1", "1"], "leave out")])
def test_bias_refuses_wrong_flags(flags, message):
    with pytest.raises(UserError, match=message):
        bias.main(["none.pth", *flags])


# ----------------------------------------------------------------------------------------------------------------- pictures

@pytest.fixture
def table(tmp_path):
    def write(name, rows):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return write


def row(run, epoch, last, **more):
    return {"run": run, "epoch": epoch, "test_acc@1": 30 + epoch, "linear": 31 if last else "", "test_auc": 0.9, "a": 1, "b": 0,
            "alpha": 1, "positive": 0.5, "negative": 0.1, "seconds": 9 * epoch, "batch_size": 256, "projector": "2048 1024"} | more


def test_pictures_of_every_kind_of_table(table, tmp_path):
    names = ("base", "all held", "nu 1, kappa 1", "nu sum, kappa 1", "nu 2, kappa nu", "projector 64-32", "closed form")
    table("ablation", [row(name, epoch, epoch == 1, projector="64 32" if "64" in name else "2048 1024")
                       for name in names for epoch in (0, 1)])
    table("batch_size", [row(f"{name} b{size} s0", 1, True, batch_size=size) for name in ("AUC-CL", "Barlow Twins") for size in (16, 64)])
    table("convergence", [row("AUC-CL", epoch, epoch == 2) for epoch in range(3)])
    table("all_images", [row(name, epoch, epoch == 1) for name in ("AUC-CL, nu 8", "DCL") for epoch in range(2)])
    table("bias", [dict(zip(bias.COLUMNS, (f"network {network}", f"loss {loss}", size, "seed 0", *3 * (0, 0, 0.1))))
                   for network in range(2) for loss in range(9) for size in (4, 8)])
    table("objective", [{"loss": "AUC-CL", "images": n, "seconds": n / 1e5, "megabytes": 1} for n in (2048, 4096)])
    pictures.main([str(tmp_path)])
    assert {path.stem for path in tmp_path.glob("*.png")} == set(pictures.PICTURES)
    assert pictures.method({"run": "AUC-CL, a b alpha held b16 s0"}) == "AUC-CL, a b alpha held"


@pytest.mark.parametrize("name", ["ablation", "batch_size", "convergence", "all_images"])
def test_pictures_of_a_study_that_has_only_begun(driver, monkeypatch, name):
    """Its first run has diverged in its second epoch."""
    record = cifar.make_record

    def diverges(run, evaluation):
        if run.epoch == 1:
            raise UserError("training diverged")
        return record(run, evaluation)
    monkeypatch.setattr(cifar, "make_record", diverges)
    with pytest.raises(UserError, match="failed: learned"):
        driver(runs=RUNS[:1])
    table = driver.folder / "out" / "runs.csv"
    table.rename(table.with_name(f"{name}.csv"))
    pictures.main([str(table.parent), "--format", "svg"])
    assert (table.parent / f"{name}.svg").exists()


@pytest.mark.parametrize("content", [b"loss,images\n1,2\n", b"\xff\xfe\x00", b"a\n1,2,3\n"])
def test_pictures_of_something_else(tmp_path, content):
    (tmp_path / "objective.csv").write_bytes(content)
    with pytest.raises(UserError, match="not the table"):
        pictures.main([str(tmp_path)])


def test_pictures_of_nothing(tmp_path):
    with pytest.raises(UserError, match="holds none of"):
        pictures.main([str(tmp_path)])
