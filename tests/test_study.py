"""The studies in benchmarks/: the driver, the bias estimate and the pictures."""
import csv
import itertools
import json

import pytest
import torch
from auccl_loss import AUCCLLoss
from benchmarks import bias, pictures, study
from cifar import main as cifar
from references import surrogate, symmetric_pairs
from utils import UserError, read_records

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = ["--dataset", "shapes", "--images", "200", "--epochs", "2", "--arch", "tiny", "--projector", "16", "8", "--batch_size", "40",
         "--device", "cpu", "--amp", "none"]
RUNS = [{"name": "learned", "flags": {"weights_lr": 0.01}}, {"name": "closed", "flags": {"learn": "none"}, "loss": "ClosedForm"}]
TIMES = ("images_per_s", "seconds")


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
    runs = tmp_path / "runs.json"
    runs.write_text(json.dumps(RUNS))

    def run(*flags, output="out"):
        study.main([str(runs), *FLAGS, "--output_dir", str(tmp_path / output), *flags])
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


def test_parts_share_a_study(driver):
    assert {row["run"] for row in driver("--part", "2", "2")} == {"closed"}
    assert {row["run"] for row in driver("--part", "1", "2")} == {"learned", "closed"}


def test_another_configuration_in_the_same_folder_is_refused(driver):
    driver("--part", "1", "2")
    with pytest.raises(UserError, match="another configuration"):
        driver("--part", "1", "2", "--seed", "3")


@pytest.mark.parametrize("text, message", [
    ("[]", "at least one"), ("[1", "cannot read"), ('[{"flags": {}}]', "cannot read"), ('[{"name": "x", "flags": {}, "los": 1}]', "cannot read"),
    ('[{"name": "x", "flags": {}}, {"name": "x", "flags": {}}]', "a name of its own"), ('[{"name": "../x", "flags": {}}]', "a name of its own")])
def test_wrong_lists_of_runs(tmp_path, text, message):
    (tmp_path / "runs.json").write_text(text)
    with pytest.raises(UserError, match=message):
        study.main([str(tmp_path / "runs.json"), *FLAGS])


@pytest.mark.parametrize("argv, message", [
    (["nothing"], "no study 'nothing'"), (["tuning", "--part", "3", "2"], "--part 3 2"), (["tuning", "--wrong", "1"], "--wrong")])
def test_wrong_flags(argv, message, tmp_path):
    with pytest.raises(UserError, match=message):
        study.main([*argv, "--output_dir", str(tmp_path)])


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


def test_all_cuts_average_to_the_population_for_aucl_and_not_in_closed_form(population):
    cuts = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    error = []
    for loss in losses(population):
        full = population.carry(population.embedding_gradient(loss, torch.arange(4)))
        batches = [population.batch_gradient(loss, torch.tensor(rows)) for cut in cuts for rows in cut]
        error.append(((torch.stack(batches).mean(0) - full).norm() / full.norm()).item())
    assert error[0] < 1e-10 and error[1] > 0.01


def test_mean_over_cuts_is_the_mean_over_batches(population):
    loss, _ = losses(population)
    mean = population.mean_over_cuts(loss, 2, 3, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    batches = [rows for _ in range(3) for rows in torch.randperm(4, generator=generator).split(2)]
    expected = torch.stack([population.batch_gradient(loss, rows) for rows in batches]).mean(0)
    torch.testing.assert_close(population.carry(mean), expected, rtol=1e-10, atol=1e-12)


def test_squared_mean_is_free_of_the_variance():
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([0.3, -0.4, 0.0])  # |mean|^2 = 0.25; a plain estimate from 4 draws has 3/4 of variance on top
    estimates, covered = [], 0
    for _ in range(2000):
        rows = mean + torch.randn(4, 3, generator=generator)
        estimates.append(bias.squared_mean(rows)[0])
    assert sum(estimates) / 2000 == pytest.approx(0.25, abs=0.06)


def test_jackknife_is_the_textbooks_for_a_plain_product():
    rows = torch.tensor([[1.0], [2.0], [4.0], [7.0]])
    without = [sum(x * y for x, y in itertools.permutations(rest, 2)) / 6 for rest in ((2, 4, 7), (1, 4, 7), (1, 2, 7), (1, 2, 4))]
    middle = sum(without) / 4
    estimate, error = bias.squared_mean(rows)
    assert estimate == pytest.approx(sum(x * y for x, y in itertools.permutations((1, 2, 4, 7), 2)) / 12)
    assert error == pytest.approx((3 / 4 * sum((x - middle) ** 2 for x in without)) ** 0.5)


def test_bias_writes_its_table(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(bias, "load_data", lambda *args: shapes)
    bias.main(["--dataset", "shapes", "--arch", "tiny", "--projector", "16", "8", "--images", "16", "--batch_sizes", "4", "16", "--groups", "4",
               "--cuts", "1", "--draws", "2", "--temperatures", "--output", str(tmp_path / "bias.csv")])
    rows = pictures.read(tmp_path / "bias.csv")
    assert [row["batch_size"] for row in rows] == [4, 16, 4, 16]
    assert all(row["bias"] < 1e-3 for row in rows if row["batch_size"] == 16)  # a batch that is the population


def test_bias_refuses_batches_that_do_not_divide():
    with pytest.raises(UserError, match="--batch_sizes 3"):
        bias.main(["--images", "16", "--batch_sizes", "3", "4"])


# ----------------------------------------------------------------------------------------------------------------- pictures

def test_pictures_of_every_kind_of_table(tmp_path):
    def table(name, rows):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    def row(run, epoch, last, **more):
        return {"run": run, "epoch": epoch, "test_acc@1": 30 + epoch, "linear": 31 if last else "", "test_auc": 0.9, "a": 1, "b": 0, "alpha": 1,
                "positive": 0.5, "negative": 0.1, "seconds": 9 * epoch, "batch_size": 256, "projector": "2048 1024"} | more
    names = ("default", "hold all", "nu 1, kappa 1", "nu sum, kappa 1", "nu 2, kappa nu", "projector 64-32", "closed form")
    table("ablation", [row(name, epoch, epoch == 1, projector="64 32" if "64" in name else "2048 1024") for name in names for epoch in (0, 1)])
    table("batch_size", [row(f"{name} b{size} s0", 1, True, batch_size=size) for name in ("AUC-CL", "Barlow Twins") for size in (16, 64)])
    table("convergence", [row("AUC-CL", epoch, epoch == 2) for epoch in range(3)])
    table("bias", [dict(zip(bias.COLUMNS, ("AUC-CL", size, 0, 0, 0.1, 0, 0, 0.1, 1))) for size in (4, 8)])
    table("objective", [{"loss": "AUC-CL", "images": n, "seconds": n / 1e5, "megabytes": 1} for n in (2048, 4096)])
    pictures.main([str(tmp_path)])
    assert {path.stem for path in tmp_path.glob("*.png")} == set(pictures.PICTURES)
    assert pictures.method({"run": "Barlow Twins b16 s0"}) == "Barlow Twins"


def test_pictures_of_nothing(tmp_path):
    with pytest.raises(UserError, match="holds none of"):
        pictures.main([str(tmp_path)])
