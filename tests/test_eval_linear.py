"""eval_linear.py: solvers against plain ones, choices by count, and the script as its users run it."""
import argparse
import json
import math

import data
import distributed
import eval_linear
import interrupt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import utils
from eval_linear import Candidate, HeadGrid, fit_logistic, measure
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torchvision import transforms
from vision_transformer import VisionTransformer

WIDTH = 192  # of vit_tiny's tokens


def clusters(count, dim, classes, seed, spread=3.0):
    """Features [count, dim] around class centres that do not depend on the seed, and labels."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    features = centres[labels] + spread * torch.randn(count, dim, generator=generator)
    return 0.3 * (features * torch.logspace(0, -1, dim) + 2), labels


def as_rank(rank, world, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    monkeypatch.setattr(distributed, "rank", lambda: rank)


# ----------------------------------------------------------------------------------------- heads and solvers

def test_a_grid_equals_every_head_alone():
    """One pass over a grid gives each head what plain PyTorch gives it alone, schedule included."""
    candidates = [Candidate(n, pool, lr) for n, pool in ((1, False), (2, True)) for lr in (0.01, 0.1, 1.0)]
    columns = [slice(8, 16) if c.n_last_blocks == 1 else slice(0, 24) for c in candidates]
    epochs, size, classes = 5, 32, 7
    features, labels = clusters(160, 24, classes, seed=0)
    batches = list(zip(features.split(size), labels.split(size), [size] * 5))
    grid = HeadGrid(columns, classes, seed=3)
    optimizer, scheduler = eval_linear.make_sgd(grid, candidates, size, epochs)
    for _ in range(epochs):
        sums = eval_linear.sgd_epoch(grid, optimizer, batches)
        scheduler.step()
    for index, (column, candidate) in enumerate(zip(columns, candidates)):
        head, = HeadGrid([column], classes, seed=3).heads
        plain = torch.optim.SGD(head.parameters(), lr=1, momentum=0.9)
        for epoch in range(epochs):
            cosine, total = 0.5 * (1 + math.cos(math.pi * epoch / epochs)), 0
            plain.param_groups[0]["lr"] = candidate.lr * size / 256 * cosine
            for x, y, _ in batches:
                plain.zero_grad()
                loss = F.cross_entropy(head(x[:, column]), y)
                loss.backward()
                plain.step()
                total += size * loss.item()
        torch.testing.assert_close(grid.heads[index].weight, head.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grid.heads[index].bias, head.bias, rtol=1e-4, atol=1e-5)
        assert sums[index].item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("classes", [3, 12])
def test_scores_are_those_of_their_formulas(classes, monkeypatch):
    features, _ = clusters(101, 6, classes, seed=1)
    labels = torch.cat([torch.zeros(60), torch.arange(41) % (classes - 1)]).long()  # none of the last class
    monkeypatch.setattr(eval_linear, "LOGITS", 100)                                 # several chunks
    grid = HeadGrid([slice(0, 6), slice(0, 6), slice(2, 5)], classes)
    for seed, head in enumerate(grid.heads):
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(seed))
    scores = measure(grid, features, labels)
    for index, (head, columns) in enumerate(zip(grid.heads, grid.columns)):
        logits = head(features[:, columns]).double()
        right = (logits.argmax(1) == labels).double()
        top5 = [label in row.argsort(descending=True)[:5] for row, label in zip(logits, labels)]
        by_class = [right[labels == label].mean() for label in range(classes - 1)]
        expected = {"loss": F.cross_entropy(logits, labels).item(), "acc1": 100 * right.mean().item(),
                    "acc5": 100 * sum(top5) / 101, "class_acc1": 100 * sum(by_class).item() / len(by_class)}
        found = {name: value[index].item() for name, value in scores.items()}
        assert found == pytest.approx(expected, rel=1e-5)


def standardised(x):
    return ((x - x.mean(0)) / x.var(0, correction=0).mean().sqrt()).double()


def objective(weight, logits, labels, l2):
    return (F.cross_entropy(logits.double(), labels) + l2 / 2 * weight.double().square().sum()).item()


def scikit_learns(x, y, l2):
    """scikit-learn's minimum: weights for standardised features, and logits."""
    model = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000).fit(standardised(x), y)
    return torch.from_numpy(model.coef_), torch.from_numpy(model.decision_function(standardised(x)))


@pytest.mark.parametrize("scale, l2", [(0.01, 1.0), (30.0, 1e-2), (1.0, 1e-4)])
def test_logistic_regression_is_scikit_learns(scale, l2):
    x, y = clusters(120, 10, 3, 1)
    head, = HeadGrid([slice(0, 10)], 3).heads
    fit_logistic(head, x * scale, y, l2)
    logits = head(x * scale).double().detach()
    expected_weight, expected = scikit_learns(x, y, l2)
    deviation = scale * x.var(0, correction=0).mean().sqrt()
    least = objective(expected_weight, expected, y, l2)
    assert objective(head.weight * deviation, logits, y, l2) == pytest.approx(least, rel=1e-4)
    centred, expected = (values - values.mean(1, keepdim=True) for values in (logits, expected))
    assert (centred - expected).abs().max() < 0.02 * expected.abs().max()


# ------------------------------------------------------------------------------------------ choices of images

LABELS = torch.tensor(np.random.default_rng(0).permutation([0] * 200 + [1] * 50 + [2] * 3))


@pytest.mark.parametrize("shots, fraction, counts", [
    (None, None, [200, 50, 3]), (3, None, [3, 3, 3]), (None, 0.1, [20, 5, 1]), (None, 0.01, [2, 1, 1])])
def test_subsets_are_balanced_and_seeded(shots, fraction, counts):
    rows = eval_linear.choose_subset(LABELS, shots, fraction, seed=0)
    assert LABELS[rows].bincount().tolist() == counts and len(rows.unique()) == len(rows)
    assert torch.equal(rows, eval_linear.choose_subset(LABELS, shots, fraction, seed=0))
    if len(rows) < len(LABELS):
        assert not torch.equal(rows, eval_linear.choose_subset(LABELS, shots, fraction, seed=1))


def test_a_tenth_of_every_class_is_held_out():
    fit, held = eval_linear.hold_out(LABELS, seed=0)
    assert LABELS[held].bincount().tolist() == [20, 5, 1]
    assert torch.cat([fit, held]).sort().values.tolist() == list(range(253))


@pytest.mark.parametrize("count, size, world, steps", [
    (100, 32, 1, 4), (100, 32, 2, 4), (3, 256, 2, 1), (5, 4, 4, 1)])
def test_batches_hold_every_image_once_over_ranks(count, size, world, steps, monkeypatch):
    """And leave no rank without an image."""
    seen = []
    for rank in range(world):
        as_rank(rank, world, monkeypatch)
        batches = eval_linear.epoch_batches(count, size, seed=5, epoch=3)
        shares = [distributed.share(batch).tolist() for batch in batches]
        assert len(shares) == steps and all(shares)
        seen += sum(shares, [])
    assert sorted(seen) == list(range(count))
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    assert not torch.equal(torch.cat(batches), torch.cat(eval_linear.epoch_batches(count, size, 5, epoch=4)))


def test_labels_and_classes_must_agree():
    train, test = Rows(*clusters(10, 4, 5, 0)), Rows(*clusters(12, 4, 6, 0))
    with pytest.raises(utils.UserError, match="labels from 0 to 5 contradict the 5 classes"):
        eval_linear.count_labels(None, train, test)
    train.classes = None
    assert eval_linear.count_labels(None, train, test) == 6 and eval_linear.count_labels(9, train, test) == 9
    test.targets[0] = -1  # how some publish a secret label
    with pytest.raises(utils.UserError, match="labels from -1"):
        eval_linear.count_labels(None, train, test)


# ------------------------------------------------------------------------ the script, on features for images

class Rows:
    """Stands in for a data set: its items are features."""

    def __init__(self, features, labels):
        self.features, self.labels = features, labels
        self.targets, self.classes = labels.tolist(), [str(label) for label in labels.unique().tolist()]

    def __len__(self):
        return len(self.labels)

    def subset(self, rows):
        return None


@pytest.fixture
def sets(monkeypatch, one_thread):
    """The script sees these features in place of images: 5 classes, 300 to train on, 101 to test on."""
    train, test = Rows(*clusters(300, 2 * WIDTH, 5, 1, 6.0)), Rows(*clusters(101, 2 * WIDTH, 5, 2, 6.0))
    monkeypatch.setattr(eval_linear, "fixed_features", lambda args, network, _, images, rows, device: (
        images.features[rows][:, (2 - network.blocks) * WIDTH:], images.labels[rows]))
    monkeypatch.setattr(data, "build_splits", lambda *args, **kwargs: (train, test))
    monkeypatch.setattr(data, "build_dataset", lambda *args, **kwargs: test)
    return train, test


def common(output):
    return ["--random_weights", "--arch", "vit_tiny", "--image_size", "32", "--data_path", "no", "--device",
            "cpu", "--batch_size_per_gpu", "64", "--num_workers", "0", "--output_dir", str(output)]


def flags(output, *more):
    training = () if "lbfgs" in more else ("--cache_features", "--epochs", "4")
    return [*common(output), "--n_last_blocks", "1", *training, *more]


def script(arguments):
    """eval_linear.py in this process; its UserError's message or None."""
    try:
        eval_linear.main([str(argument) for argument in arguments])
    except utils.UserError as error:
        assert "\n" not in str(error)
        return str(error)


GRID = ("--lr", "0.003", "0.03", "0.3", "--n_last_blocks", "1", "2")


def outcome(output):
    """All that a run leaves, without its times and folder."""
    state = torch.load(output / "checkpoint.pth.tar", weights_only=True)
    records = [{**record, "seconds": 0} for record in utils.read_records(output / "log.txt")]
    return {**state, "args": 0}, records, json.loads((output / "heads.json").read_text())


def equal(x, y):
    """Bitwise equality of nested containers of tensors and plain values."""
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(x[key], y[key]) for key in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(equal, x, y))
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_a_run_leaves_what_it_promises(sets, tmp_path, capsys):
    output = tmp_path / "new" / "run"
    assert script(flags(output, *GRID)) is None
    assert "270 images to train on, 30 to choose on, 101 to test on" in capsys.readouterr().out
    state, records, heads = outcome(output)
    assert [record["epoch"] for record in records] == [0, 1, 2, 3] and state["epoch"] == 4
    for record in records:
        assert record.keys() >= {"train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5"}
        assert record["test_acc5"] == 100
    assert state.keys() >= {"epoch", "state_dict", "optimizer", "scheduler", "best_acc"}
    assert state["best_acc"] == max(record["test_acc1"] for record in records)
    assert [(head["n_last_blocks"], head["lr"]) for head in heads] == [
        (n, lr) for n in (1, 2) for lr in (0.003, 0.03, 0.3)]
    chosen, = (head for head in heads if head["chosen"])
    assert chosen["held_out_acc1"] == max(head["held_out_acc1"] for head in heads)
    assert records[-1]["test_acc1"] == chosen["test_acc1"]
    rate = chosen["lr"] * 64 / 256 * 0.5 * (1 + math.cos(math.pi * 3 / 4))
    assert records[-1]["train_lr"] == pytest.approx(rate)
    assert state["candidate"]["lr"] == chosen["lr"] == records[-1]["lr"]
    assert state["state_dict"]["linear.weight"].shape == (5, WIDTH * chosen["n_last_blocks"])
    assert script(flags(tmp_path / "one", "--lr", "0.1")) is None
    assert "300 images to train on, 0 to choose on" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [GRID, ("--solver", "lbfgs")])
def test_the_choice_never_sees_test_labels(sets, tmp_path, arguments):
    _, test = sets
    assert script(flags(tmp_path / "true", *arguments)) is None
    test.labels = test.labels[torch.randperm(101, generator=torch.Generator().manual_seed(0))]
    assert script(flags(tmp_path / "permuted", *arguments)) is None
    state, _, heads = outcome(tmp_path / "true")
    other, _, other_heads = outcome(tmp_path / "permuted")
    assert equal(state["heads"], other["heads"]) and state["chosen"] == other["chosen"]
    assert [head["held_out_loss"] for head in heads] == [head["held_out_loss"] for head in other_heads]
    assert [head["test_acc1"] for head in heads] != [head["test_acc1"] for head in other_heads]


def test_the_chosen_logistic_regression_is_fitted_to_all_images(sets, tmp_path):
    assert script(flags(tmp_path, "--solver", "lbfgs")) is None
    state, _, heads = outcome(tmp_path)
    assert len(heads) == len(eval_linear.L2_GRID) and sum(head["chosen"] for head in heads) == 1
    train, l2 = sets[0], state["candidate"]["l2"]
    x = train.features[:, WIDTH:]
    weight, logits = scikit_learns(x, train.labels, l2)
    fitted = state["state_dict"]["linear.weight"]
    value = objective(fitted * x.var(0, correction=0).mean().sqrt(),
                      x @ fitted.T + state["state_dict"]["linear.bias"], train.labels, l2)
    assert value == pytest.approx(objective(weight, logits, train.labels, l2), rel=1e-3)


def test_kill_and_resume_is_bitwise_the_same(sets, tmp_path, monkeypatch):
    """Killed within an epoch, after heads.json, before and after the checkpoint was replaced."""
    monkeypatch.setitem(interrupt.POINTS, "sgd", (torch.optim.SGD, "step"))
    assert script(flags(tmp_path / "whole", *GRID)) is None
    command = flags(tmp_path / "killed", *GRID)
    for point, count in ("fsync", 2), ("fsync", 2), ("sgd", 7), ("replace", 1), ("replace", 2), ("sgd", 6):
        ended = interrupt.run(command, tmp_path, point, count, script=eval_linear)
        assert ended.returncode == -9, ended.stderr
    assert script(command) is None
    assert equal(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))
    checkpoint = tmp_path / "killed" / "checkpoint.pth.tar"
    before = checkpoint.read_bytes()
    assert script(command) is None
    assert checkpoint.read_bytes() == before  # a finished run stays as it is


def on_two_ranks(arguments, folder):
    for ended in interrupt.run_ranks([str(argument) for argument in arguments], folder, eval_linear):
        assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("arguments, tolerance", [(GRID, 1e-4), (("--solver", "lbfgs"), 0.03)])
def test_two_ranks_equal_one(sets, tmp_path, monkeypatch, arguments, tolerance):
    """The same global batches, 270 rows in 5 of them, and 101 test images in shares that differ."""
    monkeypatch.setattr(eval_linear, "L2_GRID", (1.0, 0.1))  # flatter minima amplify rounding
    for rows, count, seed in zip(sets, (300, 101), (1, 2)):
        rows.__init__(*clusters(count, 2 * WIDTH, 5, seed, 2.0))  # easy, so that no count hangs on rounding
    assert script(flags(tmp_path / "one", *arguments)) is None
    on_two_ranks(flags(tmp_path / "two", *arguments, "--batch_size_per_gpu", "32"), tmp_path)
    one, records, heads = outcome(tmp_path / "one")
    two, other_records, other_heads = outcome(tmp_path / "two")
    assert one["chosen"] == two["chosen"]
    for index in range(len(heads)):
        logits = [sets[1].features[:, -weight.shape[1]:] @ weight.T + bias for weight, bias in (
            [run["heads"][f"heads.{index}.{name}"] for name in ("weight", "bias")] for run in (one, two))]
        assert (logits[0] - logits[1]).norm() < tolerance * logits[0].norm()
    for record, other in zip(heads + records, other_heads + other_records, strict=True):
        assert record == pytest.approx(other, rel=tolerance)


def test_evaluate_gives_the_accuracy_of_the_run(sets, tmp_path):
    assert script(flags(tmp_path, *GRID)) is None
    state, records, _ = outcome(tmp_path)
    assert script([*common(tmp_path), "--evaluate"]) is None
    record = json.loads((tmp_path / "linear.txt").read_text())
    names = ("test_acc1", "test_acc5", "lr", "n_last_blocks")
    assert [record[name] for name in names] == [records[-1][name] for name in names]
    assert record["test_loss"] == pytest.approx(records[-1]["test_loss"], rel=1e-5)
    assert (record["weights"], record["arch"]) == ("random", "vit_tiny")
    assert "another backbone" in script([*common(tmp_path), "--evaluate", "--seed", "1"])
    utils.save_checkpoint({**state, "state_dict": {}}, tmp_path / "checkpoint.pth.tar")
    assert "does not fit" in script([*common(tmp_path), "--evaluate"])


def test_the_mean_over_classes_decides_where_papers_use_it():
    held = {"loss": torch.ones(2), "acc1": torch.tensor([2.0, 1.0]), "class_acc1": torch.tensor([1.0, 2.0])}
    assert eval_linear.choose_head(held, "flowers102") == 1 and eval_linear.choose_head(held, "folder") == 0


def test_a_diverged_head_is_not_chosen_and_alone_is_an_error(sets, tmp_path):
    sets[0].features *= 1e16
    assert script(flags(tmp_path / "grid", "--lr", "1e9", "1e-6")) is None
    assert [head["chosen"] for head in outcome(tmp_path / "grid")[2]] == [False, True]
    assert "diverged" in script(flags(tmp_path / "alone", "--lr", "1e9"))


def test_other_runs_are_not_mixed(sets, tmp_path):
    run = tmp_path / "run"
    assert script(flags(run)) is None
    assert "--lr 0.001 there, 0.1 here" in script(flags(run, "--lr", "0.1"))
    del sets[1].targets[0]
    sets[1].labels = sets[1].labels[1:]
    assert "other images" in script(flags(run))
    (run / "checkpoint.pth.tar").write_bytes((run / "checkpoint.pth.tar").read_bytes()[:1000])
    assert "damaged" in script(flags(run))
    (run / "checkpoint.pth.tar").unlink()
    assert "choose another --output_dir" in script(flags(run))


def test_more_processes_than_images(sets, tmp_path, monkeypatch):
    as_rank(0, 301, monkeypatch)
    assert "300 training images cannot be spread over 301 processes" in script(flags(tmp_path))


# ------------------------------------------------------------------------------------- the script, on images

def on_images(images, output, *more):
    epochs = () if {"lbfgs", "--evaluate"} & set(more) else ("--epochs", "2")
    return ["--random_weights", "--arch", "resnet18", "--image_size", "32", "--data_path", images, "--device",
            "cpu", "--batch_size_per_gpu", "8", "--num_workers", "0", "--output_dir", output, *epochs, *more]


def test_augmentation_depends_on_seed_epoch_and_image_alone(images, tmp_path, one_thread):
    """Not on the worker or rank that makes a view."""
    assert script(on_images(images, tmp_path / "one")) is None
    assert script(on_images(images, tmp_path / "workers", "--num_workers", "2")) is None
    assert equal(outcome(tmp_path / "one"), outcome(tmp_path / "workers"))
    on_two_ranks(on_images(images, tmp_path / "two", "--batch_size_per_gpu", "4"), tmp_path)
    for record, other in zip(outcome(tmp_path / "one")[1], outcome(tmp_path / "two")[1], strict=True):
        assert record == pytest.approx(other, rel=1e-3)
    dataset = data.build_dataset("folder", images, "train")
    description = argparse.Namespace(image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    views = [eval_linear.AugmentedImages(dataset, description, *keys)[index][0]
             for *keys, index in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert all(not torch.equal(views[0], view) for view in views[1:])


def test_augmentation_is_dinos():
    """Its four transforms, with torchvision's own defaults."""
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    views = eval_linear.AugmentedImages([], argparse.Namespace(image_size=32, mean=mean, std=std), 0, 0)
    dinos = transforms.Compose([transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip(),
                                transforms.ToTensor(), transforms.Normalize(mean, std)])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    for seed in range(5):
        torch.manual_seed(seed)
        view = views.transform(image)
        torch.manual_seed(seed)
        assert torch.equal(view, dinos(image))


@pytest.mark.parametrize("more", [("--cache_features", "--epochs", "10", "--lr", "1"), ("--solver", "lbfgs")])
def test_probes_of_real_features_tell_bright_from_dark(images, tmp_path, one_thread, more):
    assert script(on_images(images, tmp_path, *more)) is None
    _, records, _ = outcome(tmp_path)
    assert records[-1]["test_acc1"] >= 80 and "n_last_blocks" not in records[-1]
    assert script(on_images(images, tmp_path, "--evaluate")) is None
    assert json.loads((tmp_path / "linear.txt").read_text())["test_acc1"] == records[-1]["test_acc1"]


def test_it_runs_in_the_folder_of_main_py(images, tmp_path, monkeypatch, capsys, one_thread):
    """The authors' command names no weights: those of the current folder. Other files of that folder stay."""
    monkeypatch.chdir(tmp_path)
    backbone = VisionTransformer(WIDTH, 3, image_size=32).state_dict()
    torch.save({"teacher": {f"backbone.{name}": value for name, value in backbone.items()}, "args": {
        "arch": "vit_tiny"}}, "checkpoint.pth")
    others = [tmp_path / name for name in ("log.txt", "run.lock", "heads.json")]
    for file in others:
        file.write_text("main.py's")
    command = ["--data_path", images, "--local-rank=0", "--device", "cpu", "--epochs", "1"]
    assert script(command) is None
    assert "checkpoint.pth" in capsys.readouterr().out
    assert outcome(tmp_path / "linear")[0]["epoch"] == 1
    assert all(file.read_text() == "main.py's" for file in others)
    (tmp_path / "checkpoint.pth").rename(tmp_path / "moved.pth")
    assert "--pretrained_weights is missing" in script(command)
    assert script([*command, "--pretrained_weights", "moved.pth"]) is None  # the run knows its weights again


def test_vit_features_are_dinos():
    """Class tokens of the last n blocks, the last at the end, and the mean patch token behind them."""
    backbone = VisionTransformer(24, 3, image_size=32).eval()
    candidates = [Candidate(n, pool) for n in (1, 3) for pool in (False, True)]
    features = eval_linear.FrozenFeatures(backbone, candidates)
    x = torch.randn(2, 3, 32, 32)
    ours, tokens = features(x), []
    for block in backbone.blocks[-3:]:
        block.register_forward_hook(lambda module, inputs, output: tokens.append(backbone.norm(output)))
    backbone(x)
    for candidate in candidates:
        expected = [block[:, 0] for block in tokens[-candidate.n_last_blocks:]]
        expected += [tokens[-1][:, 1:].mean(1)] if candidate.avgpool_patchtokens else []
        torch.testing.assert_close(ours[:, features.columns(candidate)], torch.cat(expected, 1))


@pytest.mark.parametrize("arguments, words", [
    (["--n_last_blocks", "1"], "--n_last_blocks cannot be used with a backbone that is no vit_*"),
    (["--arch", "vit_tiny", "--n_last_blocks", "13"], "has 12 blocks"),
    (["--num_labels", "4"], "--num_labels 4"),
    (["--shots", "17"], "6 training images of class"),
    (["--shots", "1", "--lr", "0.1", "0.2"], "one image per class"),
    (["--shots", "2", "--fraction", "0.1"], "--shots and --fraction"),
    (["--fraction", "1.5"], "--fraction"),
    (["--solver", "lbfgs", "--lr", "5"], "--lr cannot be used with --solver lbfgs"),
    (["--evaluate", "--shots", "2"], "--shots cannot be used"),
    (["--evaluate"], "no checkpoint at"),
])
def test_a_mistake_is_one_clear_line(images, tmp_path, arguments, words):
    assert words in script(on_images(images, tmp_path, *arguments))
