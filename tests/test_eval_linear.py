"""eval_linear.py: its solvers against plain ones, its choices by count, and the script as its users run it."""
import json
import math
import os

import eval_linear
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import utils
from conftest import write_noise
from eval_linear import Candidate, EpochBatches, HeadGrid, measure
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torchvision import transforms

CPU = torch.device("cpu")
WIDTH = 192  # of vit_tiny's tokens


def clusters(count, dim, classes, seed, spread=3.0):
    """Features [count, dim] around class centres that do not depend on the seed, more variance in the first columns, and labels."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    features = centres[labels] + spread * torch.randn(count, dim, generator=generator)
    return 0.3 * (features * torch.logspace(0, -1, dim) + 2), labels


def as_one_of(world, monkeypatch, rank):
    monkeypatch.setattr(utils, "world_size", lambda: world)
    monkeypatch.setattr(utils, "rank", lambda: rank)


# ---------------------------------------------------------------------------------------------------- heads and solvers

def test_a_grid_equals_every_head_alone():
    """One pass over a grid of features and rates gives each head what plain PyTorch gives it alone, schedule included."""
    candidates = [Candidate(n, pool, lr=lr) for n, pool in ((1, False), (2, True)) for lr in (0.01, 0.1, 1.0)]
    columns = [slice(8, 16) if c.n_last_blocks == 1 else slice(0, 24) for c in candidates]
    epochs, batch, classes = 5, 32, 7
    features, labels = clusters(160, 24, classes, seed=0)
    grid = HeadGrid(columns, classes, seed=3)
    alone = [HeadGrid([c], classes, seed=3).heads[0] for c in columns]
    optimizer, scheduler = eval_linear.make_sgd(grid, candidates, batch, epochs)
    for epoch in range(epochs):
        for x, y in zip(features.split(batch), labels.split(batch)):
            eval_linear.sgd_step(grid, optimizer, x, y, batch)
        scheduler.step()
    for head, column, candidate, together in zip(alone, columns, candidates, grid.heads):
        plain = torch.optim.SGD(head.parameters(), lr=1, momentum=0.9)
        for epoch in range(epochs):
            plain.param_groups[0]["lr"] = candidate.lr * batch / 256 * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
            for x, y in zip(features.split(batch), labels.split(batch)):
                plain.zero_grad()
                F.cross_entropy(head(x[:, column]), y).backward()
                plain.step()
        torch.testing.assert_close(together.weight, head.weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together.bias, head.bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [3, 12])
def test_scores_by_their_formulas(classes, monkeypatch):
    features, _ = clusters(101, 6, classes, seed=1)
    labels = torch.cat([torch.zeros(60), torch.arange(41) % (classes - 1)]).long()      # unequal classes, the last without an image
    monkeypatch.setattr(eval_linear, "LOGITS", 100)                                     # several chunks
    grid = HeadGrid([slice(0, 6), slice(0, 6), slice(2, 5)], classes)
    for seed, head in enumerate(grid.heads):
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(seed))
    scores = measure(grid, features, labels, CPU)
    for index, (head, columns) in enumerate(zip(grid.heads, grid.columns)):
        logits = head(features[:, columns]).double()
        right = logits.argmax(1) == labels
        top5 = [label in row.argsort(descending=True)[:5] for row, label in zip(logits, labels)]
        by_class = [right[labels == label].double().mean() for label in range(classes - 1)]
        expected = (F.cross_entropy(logits, labels).item(), 100 * right.double().mean(), 100 * sum(top5) / 101,
                    100 * sum(by_class) / len(by_class))
        assert [score[index].item() for score in scores] == pytest.approx([float(value) for value in expected], rel=1e-6)


@pytest.mark.parametrize("l2, tolerance", [(1.0, 0.01), (1e-3, 0.01), (1e-5, 0.05)])          # ever flatter around the minimum
@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_logistic_regression_is_scikit_learns(l2, tolerance, scale):
    (x, y), (x_test, y_test) = clusters(600, 40, 6, 1), clusters(1000, 40, 6, 2)
    head = HeadGrid([slice(0, 40)], 6).heads[0]
    eval_linear.fit_logistic(head, x * scale, y, l2)
    mean, deviation = x.mean(0), x.var(0, correction=0).mean().sqrt()
    standard, standard_test = (((rows - mean) / deviation).double() for rows in (x, x_test))
    reference = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=10000).fit(standard, y)
    expected = torch.from_numpy(reference.coef_) / (deviation * scale)
    assert (head.weight - expected).norm() < tolerance * expected.norm()
    accuracy = (head(x_test * scale).argmax(1) == y_test).double().mean().item()
    assert accuracy == pytest.approx(reference.score(standard_test, y_test), abs=0.005)


# ------------------------------------------------------------------------------------------------- choices of images

LABELS = torch.tensor([0] * 200 + [1] * 50 + [2] * 3)[torch.randperm(253, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("shots, fraction, counts", [(None, None, [200, 50, 3]), (3, None, [3, 3, 3]), (None, 0.1, [20, 5, 1]),
                                                     (None, 0.01, [2, 1, 1]), (None, 1.0, [200, 50, 3])])
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
    with pytest.raises(utils.UserError, match="one image per class"):
        eval_linear.hold_out(torch.arange(5), seed=0)
    with pytest.raises(utils.UserError, match="3"):
        eval_linear.choose_subset(LABELS, 4, None, seed=0)


@pytest.mark.parametrize("count, per_rank, world, steps", [(100, 32, 1, 4), (100, 16, 2, 4), (3, 128, 2, 1), (5, 1, 4, 1)])
def test_batches_hold_every_image_once(count, per_rank, world, steps, monkeypatch):
    parts = []
    for rank in range(world):
        as_one_of(world, monkeypatch, rank)
        batches = EpochBatches(count, per_rank * world, seed=5)
        batches.epoch = 3
        parts.append(list(batches))
        assert len(batches) == len(parts[-1]) == steps
    assert [len(batch) for batch in batches.rows()] == [sum(map(len, step)) for step in zip(*parts)]
    assert all(batch for part in parts for batch in part)                               # no rank is ever without an image
    seen = [key for part in parts for batch in part for key in batch]
    assert sorted(seen) == [(3, row) for row in range(count)]
    batches.epoch = 4
    assert list(batches) != parts[-1]


def test_more_processes_than_images(monkeypatch):
    as_one_of(4, monkeypatch, 0)
    with pytest.raises(utils.UserError, match="3 training images cannot be spread over 4 processes"):
        EpochBatches(3, 8, 0)


# -------------------------------------------------------------------------------- the script, on features for images

class Rows:
    """Stands in for a data set: its items are features."""

    def __init__(self, features, labels):
        self.features, self.labels = features, labels
        self.targets, self.classes = labels.tolist(), [str(label) for label in labels.unique().tolist()]

    def __len__(self):
        return len(self.labels)


@pytest.fixture
def world_of_features(monkeypatch):
    """The script sees these features in place of images: 5 classes, 300 to train on, 101 to test on. Returns the two sets."""
    train, test = Rows(*clusters(300, 2 * WIDTH, 5, 1, 6.0)), Rows(*clusters(101, 2 * WIDTH, 5, 2, 6.0))

    def fixed_features(args, features, description, dataset, device, rows=None):
        rows = torch.arange(len(dataset)) if rows is None else rows
        last = features.blocks * WIDTH
        return dataset.features[rows][:, 2 * WIDTH - last:], dataset.labels[rows]
    monkeypatch.setattr(eval_linear, "fixed_features", fixed_features)
    monkeypatch.setattr(utils, "build_splits", lambda *args, **kwargs: (train, test))
    monkeypatch.setattr(utils, "build_dataset", lambda *args, **kwargs: test)
    return train, test


def common(output):
    return ["--random_weights", "--arch", "vit_tiny", "--image_size", "32", "--data_path", "unused", "--batch_size_per_gpu", "64",
            "--device", "cpu", "--amp", "none", "--num_workers", "0", "--output_dir", str(output)]


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
    """All that a run leaves, without its times."""
    state = torch.load(output / eval_linear.CHECKPOINT, weights_only=True)
    records = [{**record, "seconds": 0} for record in utils.read_records(output / "log.txt")]
    return {**state, "seconds": 0, "args": 0}, records, json.loads((output / eval_linear.HEADS).read_text())


def equal(x, y):
    """Bitwise equality of nested containers of tensors and plain values."""
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(x[key], y[key]) for key in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(equal, x, y))
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_a_run_leaves_what_it_promises(world_of_features, tmp_path, capsys):
    output = tmp_path / "new" / "run"
    assert script(flags(output, *GRID)) is None
    state, records, heads = outcome(output)
    assert [record["epoch"] for record in records] == [0, 1, 2, 3] and state["epoch"] == 4
    for record in records:
        assert record.keys() >= {"train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5"}
        assert record["test_acc5"] == 100 and "test_class_acc1" not in record
    assert state.keys() >= {"epoch", "state_dict", "optimizer", "scheduler", "best_acc"}
    assert state["best_acc"] == max(record["test_acc1"] for record in records)
    assert [(head["n_last_blocks"], head["lr"]) for head in heads] == [(n, lr) for n in (1, 2) for lr in (0.003, 0.03, 0.3)]
    chosen, = (head for head in heads if head["chosen"])
    assert chosen["held_out_acc1"] == max(head["held_out_acc1"] for head in heads)
    assert records[-1]["test_acc1"] == chosen["test_acc1"]
    assert records[-1]["train_lr"] == pytest.approx(chosen["lr"] * 64 / 256 * 0.5 * (1 + math.cos(math.pi * 3 / 4)))
    assert state["candidate"]["lr"] == chosen["lr"] == records[-1]["lr"]
    assert state["candidate"]["n_last_blocks"] == chosen["n_last_blocks"] == records[-1]["n_last_blocks"]
    assert state["state_dict"]["linear.weight"].shape == (5, WIDTH * chosen["n_last_blocks"])
    assert "seconds" in capsys.readouterr().out


def test_one_head_trains_on_all_and_several_on_the_same_nine_tenths(world_of_features, tmp_path, capsys):
    script(flags(tmp_path / "one"))
    assert "300 images to train on, 0 to choose on, 101 to test on" in capsys.readouterr().out
    script(flags(tmp_path / "grid", *GRID))
    assert "270 images to train on, 30 to choose on" in capsys.readouterr().out


@pytest.mark.parametrize("solver", ["sgd", "lbfgs"])
def test_the_choice_never_sees_test_labels(world_of_features, tmp_path, solver):
    _, test = world_of_features
    arguments = GRID if solver == "sgd" else ("--solver", "lbfgs")

    def run(output):
        assert script(flags(output, *arguments)) is None
        return outcome(output)
    state, _, heads = run(tmp_path / "as they are")
    test.labels = test.labels[torch.randperm(101, generator=torch.Generator().manual_seed(0))]
    other_state, _, other_heads = run(tmp_path / "permuted")
    assert equal(state["heads"], other_state["heads"]) and state["chosen"] == other_state["chosen"]
    names = ("chosen", "held_out_acc1", "held_out_loss")
    assert [[head[name] for name in names] for head in heads] == [[head[name] for name in names] for head in other_heads]
    assert [head["test_acc1"] for head in heads] != [head["test_acc1"] for head in other_heads]


@pytest.mark.parametrize("solver, points", [("sgd", 0.5), ("lbfgs", 0.5)])
def test_probes_of_cached_features_reach_scikit_learn(world_of_features, tmp_path, solver, points):
    """On 2000 test images, scikit-learn's C being chosen on the same held-out images. SGD is without regularisation: enough images
    to train on make up for it."""
    for rows, count, seed in zip(world_of_features, (8000, 2000), (1, 2)):
        rows.__init__(*clusters(count, 2 * WIDTH, 5, seed, 4.0))
    solve = ("--epochs", "30", "--lr", "0.003", "0.01", "0.03", "0.1") if solver == "sgd" else ("--solver", "lbfgs")
    assert script(flags(tmp_path, *solve)) is None
    train, test = world_of_features
    x, x_test = train.features[:, WIDTH:], test.features[:, WIDTH:]
    x, x_test = ((rows - x.mean(0)) / x.std() for rows in (x, x_test))
    fit, held = eval_linear.hold_out(train.labels, seed=0)
    models = [LogisticRegression(C=10.0 ** power, max_iter=1000) for power in range(-5, 2)]
    best = max(models, key=lambda model: model.fit(x[fit], train.labels[fit]).score(x[held], train.labels[held]))
    reference = (best if solver == "sgd" else best.fit(x, train.labels)).score(x_test, test.labels)     # lbfgs is fitted once more
    assert utils.read_records(tmp_path / "log.txt")[-1]["test_acc1"] >= 100 * reference - points


class Killed(BaseException):
    pass


@pytest.mark.parametrize("owner, function, calls", [(torch.optim.SGD, "step", (1, 7, 12)), (os, "replace", (1, 2, 5))])
def test_kill_and_resume_is_bitwise_the_same(world_of_features, tmp_path, monkeypatch, owner, function, calls):
    assert script(flags(tmp_path / "whole", *GRID)) is None
    original = getattr(owner, function)
    for limit in calls:
        count = 0

        def stop_at_limit(*args, **kwargs):
            nonlocal count
            count += 1
            if count > limit:
                raise Killed
            return original(*args, **kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, stop_at_limit)
            with pytest.raises(Killed):
                script(flags(tmp_path / "killed", *GRID))
    assert script(flags(tmp_path / "killed", *GRID)) is None
    assert equal(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))
    before = (tmp_path / "killed" / eval_linear.CHECKPOINT).read_bytes()
    assert script(flags(tmp_path / "killed", *GRID)) is None                            # a finished run stays as it is
    assert (tmp_path / "killed" / eval_linear.CHECKPOINT).read_bytes() == before


def rank_of_script(rank, world, arguments, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    utils.run_script(lambda: eval_linear.main([*arguments, "--dist_url", f"file://{folder}/rendezvous"]))


@pytest.mark.parametrize("solver", ["sgd", "lbfgs"])
def test_two_ranks_equal_one(world_of_features, tmp_path, solver):
    """The same global batches, 270 rows in 5 of them, and 101 test images in shares that differ."""
    solve = GRID if solver == "sgd" else ("--solver", "lbfgs")
    assert script(flags(tmp_path / "one", *solve)) is None
    command = flags(tmp_path / "two", *solve, "--batch_size_per_gpu", "32")
    mp.start_processes(rank_of_script, (2, command, tmp_path), nprocs=2, start_method="fork")
    (one, records, heads), (two, other_records, other_heads) = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    for name, value in one["heads"].items():
        tolerance = 1e-5 if solver == "sgd" else 0.02                                   # L-BFGS stops near the minimum
        assert (two["heads"][name] - value).norm() < tolerance * value.norm()
    assert one["chosen"] == two["chosen"]
    for record, other in zip(records + [heads[one["chosen"]]], other_records + [other_heads[one["chosen"]]], strict=True):
        assert record == pytest.approx(other, rel=1e-4 if solver == "sgd" else 1e-3)
        assert all(record[name] == other[name] for name in record if "_acc" in name)                    # counts, exactly


def test_evaluate_gives_the_accuracy_of_the_run(world_of_features, tmp_path, capsys):
    assert script(flags(tmp_path, *GRID)) is None
    state, records, _ = outcome(tmp_path)
    command, results = common(tmp_path / "elsewhere"), tmp_path / "elsewhere" / "linear.txt"
    assert script([*command, "--evaluate", "--pretrained_linear", tmp_path / eval_linear.CHECKPOINT]) is None
    record = json.loads(results.read_text())
    names = ("test_acc1", "test_acc5", "lr", "n_last_blocks")
    assert [record[name] for name in names] == [records[-1][name] for name in names]
    assert record["test_loss"] == pytest.approx(records[-1]["test_loss"], rel=1e-6)
    assert (record["weights"], record["arch"], record["head"]) == ("random", "vit_tiny", str(tmp_path / eval_linear.CHECKPOINT))
    dino = {f"module.{name}": value for name, value in state["state_dict"].items()}     # DINO's file knows nothing of the features
    torch.save({"state_dict": dino}, tmp_path / "dino.pth")
    blocks = state["candidate"]["n_last_blocks"]
    evaluation = ["--evaluate", "--pretrained_linear", tmp_path / "dino.pth", "--n_last_blocks"]
    assert script([*command, *evaluation, blocks]) is None
    assert json.loads(results.read_text().splitlines()[1])["test_loss"] == record["test_loss"]
    assert "weights, but these features" in script([*command, *evaluation, 3 - blocks])
    evaluation[2] = tmp_path / eval_linear.CHECKPOINT
    assert "contradicts" in script([*command, *evaluation, 3])
    assert "trained on another backbone" in script([*command, *evaluation[:2], tmp_path / eval_linear.CHECKPOINT, "--seed", "1"])


def test_dinos_heads_see_class_and_mean_token_in_turn(world_of_features, tmp_path, monkeypatch):
    """Features made as DINO makes them, and its head on them, against our order of the columns."""
    _, test = world_of_features
    cls, mean = test.features.split(WIDTH, 1)
    head = torch.nn.Linear(2 * WIDTH, 5)
    logits = head(torch.cat((cls.unsqueeze(-1), mean.unsqueeze(-1)), -1).reshape(len(cls), -1))
    torch.save({"state_dict": {f"module.linear.{name}": value for name, value in head.state_dict().items()}}, tmp_path / "dino.pth")

    monkeypatch.setattr(eval_linear, "fixed_features", lambda *args: (test.features, test.labels))
    command = [*common(tmp_path), "--evaluate", "--pretrained_linear", tmp_path / "dino.pth", "--avgpool_patchtokens", "true"]
    assert script([*command, "--n_last_blocks", 1]) is None
    record = json.loads((tmp_path / "linear.txt").read_text())
    assert record["test_loss"] == pytest.approx(F.cross_entropy(logits, test.labels).item(), rel=1e-5)
    assert "give --n_last_blocks 1" in script([*command, "--n_last_blocks", 4])


def test_labels_beyond_the_classes():
    train, test = Rows(*clusters(10, 4, 5, 0)), Rows(*clusters(12, 4, 6, 0))
    with pytest.raises(utils.UserError, match="run from 0 to 5, but there are 5 classes"):
        eval_linear.count_labels(None, train, test)
    train.classes = None
    assert eval_linear.count_labels(None, train, test) == 6 and eval_linear.count_labels(9, train, test) == 9
    test.targets[0] = -1                                                     # how some publish a secret label
    with pytest.raises(utils.UserError, match="run from -1"):
        eval_linear.count_labels(None, train, test)


def test_the_time_left_is_that_of_the_whole_training(world_of_features, tmp_path, monkeypatch):
    calls, original = [], utils.progress
    monkeypatch.setattr(utils, "progress", lambda steps, *rest: calls.append(rest) or original(steps, *rest))
    assert script(flags(tmp_path)) is None
    assert calls == [(5 * epoch, 20, f"epoch {epoch + 1}/4") for epoch in range(4)]


def test_the_weights_may_move(world_of_features, tmp_path):
    torch.save(eval_linear.VisionTransformer(WIDTH, 3, image_size=32).state_dict(), tmp_path / "here.pth")
    command = ["--pretrained_weights", tmp_path / "here.pth", *flags(tmp_path / "run", "--epochs", "1")[1:]]
    assert script(command) is None
    command[1] = (tmp_path / "here.pth").rename(tmp_path / "there.pth")
    assert script(command) is None


def test_the_mean_over_classes_decides_where_papers_use_it(world_of_features, tmp_path):
    assert script(flags(tmp_path, *GRID, "--dataset", "flowers102")) is None
    _, records, heads = outcome(tmp_path)
    chosen, = (head for head in heads if head["chosen"])
    assert chosen["held_out_class_acc1"] == max(head["held_out_class_acc1"] for head in heads)
    assert records[-1]["test_class_acc1"] == chosen["test_class_acc1"] != chosen["test_acc1"]


def test_a_diverged_head_is_not_chosen_and_alone_is_an_error(world_of_features, tmp_path):
    world_of_features[0].features *= 1e16
    assert script(flags(tmp_path / "grid", "--lr", "1e9", "1e-6")) is None
    assert [head["chosen"] for head in outcome(tmp_path / "grid")[2]] == [False, True]
    assert "diverged" in script(flags(tmp_path / "alone", "--lr", "1e9"))


# ------------------------------------------------------------------------------------------- the script, on images

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """2 x 16 training and 2 x 5 test images."""
    return write_noise(tmp_path_factory.mktemp("images"), {"train": 16, "test": 5})


def on_images(images, output, *more):
    return ["--random_weights", "--arch", "resnet18", "--image_size", "32", "--data_path", images, "--batch_size_per_gpu", "8",
            "--device", "cpu", "--amp", "none", "--num_workers", "0", "--output_dir", output,
            *(() if {"lbfgs", "--evaluate"} & set(more) else ("--epochs", "2")), *more]


def test_augmented_images_depend_on_seed_epoch_and_image_alone(images, tmp_path):
    """Not on the worker that makes it."""
    assert script(on_images(images, tmp_path / "none", "--lr", "0.01", "0.1")) is None
    assert script(on_images(images, tmp_path / "two", "--lr", "0.01", "0.1", "--num_workers", "2")) is None
    assert equal(outcome(tmp_path / "none"), outcome(tmp_path / "two"))
    assert script(on_images(images, tmp_path / "seed", "--lr", "0.01", "0.1", "--seed", "1")) is None
    assert not equal(outcome(tmp_path / "none")[1], outcome(tmp_path / "seed")[1])


def test_two_ranks_see_the_same_augmented_images(images, tmp_path):
    assert script(on_images(images, tmp_path / "one")) is None
    command = list(map(str, on_images(images, tmp_path / "two", "--batch_size_per_gpu", "4")))
    mp.start_processes(rank_of_script, (2, command, tmp_path), nprocs=2, start_method="fork")
    for record, other in zip(outcome(tmp_path / "one")[1], outcome(tmp_path / "two")[1], strict=True):
        assert record == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("more", [("--cache_features", "--epochs", "10", "--lr", "1"), ("--solver", "lbfgs")])
def test_probes_of_real_features(images, tmp_path, more):
    assert script(on_images(images, tmp_path, *more)) is None
    state, records, _ = outcome(tmp_path)
    assert records[-1]["test_acc1"] >= 80                                                # dark against light
    assert state["candidate"]["n_last_blocks"] is None and "n_last_blocks" not in records[-1]
    command = on_images(images, tmp_path, "--evaluate", "--pretrained_linear", tmp_path / eval_linear.CHECKPOINT)
    assert script(command) is None
    assert json.loads((tmp_path / "linear.txt").read_text())["test_acc1"] == records[-1]["test_acc1"]
    assert "--n_last_blocks only applies to vit_*" in script([*command, "--n_last_blocks", "1"])


def test_augmentation_is_dinos():
    """Its four transforms, with torchvision's own defaults, at the size asked for."""
    description = eval_linear.Description("resnet18", None, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    dinos = transforms.Compose([transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                                transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))])
    for seed in range(5):
        torch.manual_seed(seed)
        view = eval_linear.train_transform(description)(image)
        torch.manual_seed(seed)
        assert torch.equal(view, dinos(image))


def test_vit_features_are_dinos(images):
    """Class tokens of the last n blocks, the last at the end, and the mean patch token behind them."""
    backbone = eval_linear.VisionTransformer(24, 3, image_size=32).eval()
    candidates = [Candidate(n, pool) for n in (1, 3) for pool in (False, True)]
    features = eval_linear.FrozenFeatures(backbone, candidates)
    x = torch.randn(2, 3, 32, 32)
    tokens = backbone.get_intermediate_layers(x, 3)
    for candidate in candidates:
        expected = [block[:, 0] for block in tokens[-candidate.n_last_blocks:]]
        expected += [tokens[-1][:, 1:].mean(1)] if candidate.avgpool_patchtokens else []
        torch.testing.assert_close(features(x)[:, features.columns(candidate)], torch.cat(expected, 1))


# ------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("arguments, words", [
    (["--avgpool_patchtokens", "true"], "--avgpool_patchtokens"),
    (["--n_last_blocks", "1"], "--n_last_blocks"),
    (["--num_labels", "3"], "--num_labels 3, but the data set has 2 classes"),
    (["--shots", "17"], "16"),
    (["--shots", "2", "--fraction", "0.1"], "--shots and --fraction"),
    (["--fraction", "1.5"], "--fraction"),
    (["--lr", "0"], "--lr: must be above 0"),
    (["--solver", "lbfgs", "--epochs", "5"], "--epochs cannot be used with --solver lbfgs"),
    (["--evaluate"], "--pretrained_linear"),
    (["--evaluate", "--pretrained_linear", "head.pth", "--shots", "2", "--lr", "1"], "--lr and --shots cannot be used"),
    (["--pretrained_linear", "head.pth"], "--evaluate"),
    (["--evaluate", "--pretrained_linear", "nowhere.pth"], "no checkpoint at nowhere.pth"),
    (["--download"], "--download cannot be used with --dataset folder"),
    (["--shots", "1", "--lr", "0.1", "0.2"], "one image per class"),
    (["--output_dir", "/proc/nowhere"], "cannot write to the output folder"),
])
def test_bad_input_is_one_clear_line(images, tmp_path, arguments, words):
    assert words in script(on_images(images, tmp_path, *arguments))


def test_more_blocks_than_the_vit_has(world_of_features, tmp_path):
    assert "has 12 blocks" in script(flags(tmp_path, "--n_last_blocks", "13"))


def test_weights_are_never_random_by_mistake(images):
    assert "--pretrained_weights" in script(["--data_path", images, "--local-rank=0"])


def test_other_runs_are_not_mixed(world_of_features, tmp_path):
    assert script(flags(tmp_path / "run")) is None
    assert "--lr 0.001 there, 0.1 here" in script(flags(tmp_path / "run", "--lr", "0.1"))
    checkpoint = tmp_path / "run" / eval_linear.CHECKPOINT
    saved = checkpoint.read_bytes()
    checkpoint.write_bytes(saved[:1000])
    assert "cannot read checkpoint" in script(flags(tmp_path / "run"))
    checkpoint.unlink()
    assert "choose another --output_dir" in script(flags(tmp_path / "run"))
