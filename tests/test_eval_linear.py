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
from conftest import assert_same, refusal
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


def head_of(columns, classes, seed=0):
    return HeadGrid([columns], classes, seed).heads[0]


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
        head = head_of(column, classes, seed=3)
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
        together, alone = ([*one.parameters()] for one in (grid.heads[index], head))
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        assert sums[index].item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("classes", [3, 12])
def test_scores_are_those_of_their_formulas(classes, monkeypatch):
    features, _ = clusters(101, 6, classes, seed=1)
    labels = torch.cat([torch.zeros(60), torch.arange(41) % (classes - 1)]).long()  # none of the last class
    monkeypatch.setattr(eval_linear, "MAX_LOGITS", 100)                                 # several chunks
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


def objective(weight, logits, labels, l2):
    return F.cross_entropy(logits, labels) + l2 / 2 * weight.square().sum()


@pytest.mark.parametrize("scale, l2", [(0.01, 1.0), (30.0, 1e-2), (1.0, 1e-4)])
def test_logistic_regression_is_scikit_learns(scale, l2):
    x, y = clusters(120, 10, 3, 1)
    head, deviation = head_of(slice(0, 10), 3), x.var(0, correction=0).mean().sqrt()
    fit_logistic(head, x * scale, y, l2)
    logits = head.double()(x.double() * scale).detach()
    x = ((x - x.mean(0)) / deviation).double()
    model = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000).fit(x, y)
    weight, expected = map(torch.from_numpy, (model.coef_, model.decision_function(x)))
    least = objective(weight, expected, y, l2).item()
    assert objective(head.weight * deviation * scale, logits, y, l2).item() == pytest.approx(least, rel=1e-4)
    centred, expected = (values - values.mean(1, keepdim=True) for values in (logits, expected))
    assert (centred - expected).abs().max() < 0.02 * expected.abs().max()


# ------------------------------------------------------------------------------------------ choices of images

LABELS = torch.tensor(np.random.default_rng(0).permutation([0] * 200 + [1] * 50 + [2] * 3))


@pytest.mark.parametrize("shots, fraction, counts", [
    (None, None, [200, 50, 3]), (3, None, [3, 3, 3]), (None, 0.1, [20, 5, 1]), (None, 0.01, [2, 1, 1])])
def test_subsets_are_balanced_and_seeded(shots, fraction, counts):
    rows, again, other = (data.choose_subset(LABELS, shots, fraction, seed) for seed in (0, 0, 1))
    assert LABELS[rows].bincount().tolist() == counts and len(rows.unique()) == len(rows)
    assert torch.equal(rows, again) and (len(rows) == len(LABELS) or not torch.equal(rows, other))
    fit, held = eval_linear.hold_out(LABELS, seed=0)  # a tenth of every class
    assert LABELS[held].bincount().tolist() == [20, 5, 1]
    assert torch.cat([fit, held]).sort().values.tolist() == list(range(253))


@pytest.mark.parametrize("count, size, world, steps", [
    (100, 32, 1, 4), (100, 32, 2, 4), (3, 256, 2, 1), (5, 4, 4, 1)])
def test_batches_hold_every_image_once_and_leave_no_rank_without(count, size, world, steps, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    batches = eval_linear.equal_batches(count, size, seed=5, epoch=3)
    sizes = [len(batch) for batch in batches]
    assert len(sizes) == steps and min(sizes) >= world and max(sizes) - min(sizes) <= 1
    assert torch.cat(batches).sort().values.tolist() == list(range(count))
    assert not torch.equal(torch.cat(batches), torch.cat(eval_linear.equal_batches(count, size, 5, epoch=4)))


def test_labels_and_classes_must_agree():
    train, test = Rows(*clusters(10, 4, 5, 0)), Rows(*clusters(12, 4, 6, 0))
    message = refusal(data.count_labels, None, train, test)
    assert "labels from 0 to 5 contradict the 5 classes" in message
    train.classes = None
    assert data.count_labels(None, train, test) == 6 and data.count_labels(9, train, test) == 9
    test.targets[0] = -1  # how some publish a secret label
    assert "labels from -1" in refusal(data.count_labels, None, train, test)


# ------------------------------------------------------------------------ the script, on features for images

class Rows:
    """Stands in for a data set: its items are features."""

    def __init__(self, features, labels):
        self.features, self.labels = features, labels
        self.targets, self.classes = labels.tolist(), [str(label) for label in labels.unique().tolist()]

    def __len__(self):
        return len(self.labels)

    def subset(self, rows):
        return Rows(self.features[rows], self.labels[rows])

    def checksum(self):
        return hash(tuple(self.targets))


@pytest.fixture
def sets(monkeypatch, one_thread):
    """The script sees these features in place of images: 5 classes, 300 to train on, 101 to test on."""
    train, test = Rows(*clusters(300, 2 * WIDTH, 5, 1, 6.0)), Rows(*clusters(101, 2 * WIDTH, 5, 2, 6.0))
    monkeypatch.setattr(eval_linear, "fixed_features", lambda args, network, _, images, rows, device: (
        images.features[rows][:, (2 - network.blocks) * WIDTH:], images.labels[rows]))
    monkeypatch.setattr(data, "build_splits", lambda *args, **kwargs: (train, test))
    monkeypatch.setattr(data, "build_dataset", lambda *args, **kwargs: test)
    return train, test


GRID = ("--lr", "0.003", "0.03", "0.3", "--n_last_blocks", "1", "2")
LBFGS = ("--solver", "lbfgs")


def flags(output, *more, images=None):
    """Those of a ViT on the features of `sets`, or of a ResNet on images."""
    base = "--random_weights --image_size 32 --device cpu --num_workers 0 --output_dir".split() + [output]
    base += (["--arch", "resnet18", "--data_path", images, "--batch_size_per_gpu", "8"] if images else
             ["--arch", "vit_tiny", "--data_path", "no", "--batch_size_per_gpu", "64"])
    if not {"lbfgs", "--evaluate"} & set(more):
        base += ["--epochs", "2"] if images else ["--cache_features", "--epochs", "4"]
    if not images and "--evaluate" not in more:
        base += ["--n_last_blocks", "1"]
    return [str(word) for word in (*base, *more)]


def run(output, *more, images=None):
    """What the script leaves: `outcome`, or the record of --evaluate."""
    eval_linear.main(flags(output, *more, images=images))
    if "--evaluate" in more:
        return json.loads((output / "linear.txt").read_text().splitlines()[-1])
    return outcome(output)


def outcome(output):
    """Checkpoint without flags, records without times, heads."""
    state = torch.load(output / "checkpoint.pth.tar", weights_only=True)
    records = [{**record, "seconds": 0} for record in utils.read_records(output / "log.txt")]
    return {**state, "args": 0}, records, json.loads((output / "heads.json").read_text())


def refused(output, *more, images=None):
    return refusal(eval_linear.main, flags(output, *more, images=images))


def run_on_two_ranks(folder, *more, images=None):
    """The same global batches."""
    more = *more, "--batch_size_per_gpu", 4 if images else 32
    command = flags(folder / "two", *more, images=images)
    interrupt.run_ranks(command, folder, eval_linear, codes=(0, 0))
    return outcome(folder / "two")


def test_a_run_leaves_what_it_promises(sets, tmp_path, capsys):
    state, records, heads = run(tmp_path / "new" / "run", *GRID)
    assert "270 images to train on, 30 to choose on, 101 to test on" in capsys.readouterr().out
    assert [record["epoch"] for record in records] == [0, 1, 2, 3] and state["epoch"] == 4
    assert records[-1].keys() >= {"train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5"}
    assert state.keys() >= {"epoch", "state_dict", "optimizer", "scheduler", "best_acc"}
    assert state["best_acc"] == max(record["test_acc1"] for record in records)
    grid = [(head["n_last_blocks"], head["lr"]) for head in heads]
    assert grid == [(n, lr) for n in (1, 2) for lr in (0.003, 0.03, 0.3)]
    chosen, = (head for head in heads if head["chosen"])
    assert chosen["held_out_acc1"] == max(head["held_out_acc1"] for head in heads)
    assert records[-1]["test_acc1"] == chosen["test_acc1"]
    rate = chosen["lr"] * 64 / 256 * 0.5 * (1 + math.cos(math.pi * 3 / 4))
    assert records[-1]["train_lr"] == pytest.approx(rate)
    assert state["candidate"]["lr"] == chosen["lr"] == records[-1]["lr"]
    assert state["state_dict"]["linear.weight"].shape == (5, WIDTH * chosen["n_last_blocks"])
    run(tmp_path / "one", "--lr", "0.1")
    assert "300 images to train on, 0 to choose on" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [GRID, LBFGS])
def test_the_choice_never_sees_test_labels(sets, tmp_path, arguments):
    _, test = sets
    state, _, heads = run(tmp_path / "true", *arguments)
    test.labels = test.labels[torch.randperm(101, generator=torch.Generator().manual_seed(0))]
    other, _, other_heads = run(tmp_path / "permuted", *arguments)
    assert_same(state["heads"], other["heads"])
    assert state["chosen"] == other["chosen"]
    assert [head["held_out_loss"] for head in heads] == [head["held_out_loss"] for head in other_heads]
    assert [head["test_acc1"] for head in heads] != [head["test_acc1"] for head in other_heads]


def test_the_chosen_logistic_regression_is_fitted_to_all_images(sets, tmp_path):
    state, _, heads = run(tmp_path, *LBFGS)
    assert len(heads) == len(eval_linear.L2_GRID) and sum(head["chosen"] for head in heads) == 1
    head, x = head_of(slice(0, WIDTH), 5), sets[0].features[:, WIDTH:]
    fit_logistic(head, x, sets[0].labels, state["candidate"]["l2"])
    logits = x @ state["state_dict"]["linear.weight"].T + state["state_dict"]["linear.bias"]
    assert (logits - head(x)).norm() < 0.01 * logits.norm()


def test_kill_and_resume_is_bitwise_the_same(sets, tmp_path, monkeypatch):
    """Killed within an epoch, after heads.json, before and after the checkpoint was replaced."""
    monkeypatch.setitem(interrupt.POINTS, "sgd", (torch.optim.SGD, "step"))
    command = flags(tmp_path / "killed", *GRID)
    for point, count in ("fsync", 2), ("fsync", 2), ("sgd", 7), ("replace", 1), ("replace", 2), ("sgd", 6):
        interrupt.run(command, tmp_path, point, count, script=eval_linear, code=-9)
    assert_same(run(tmp_path / "killed", *GRID), run(tmp_path / "whole", *GRID))
    checkpoint = tmp_path / "killed" / "checkpoint.pth.tar"
    before = checkpoint.read_bytes()
    eval_linear.main(command)
    assert checkpoint.read_bytes() == before  # a finished run stays as it is


@pytest.mark.parametrize("arguments, tolerance", [(GRID, 1e-4), (LBFGS, 0.03)])
def test_two_ranks_equal_one(sets, tmp_path, monkeypatch, arguments, tolerance):
    """270 rows in 5 batches, and 101 test images in shares that differ."""
    monkeypatch.setattr(eval_linear, "L2_GRID", (1.0, 0.1))  # flatter minima amplify rounding
    for rows, count, seed in zip(sets, (300, 101), (1, 2)):
        rows.__init__(*clusters(count, 2 * WIDTH, 5, seed, 2.0))  # easy, so that no count hangs on rounding
    one, records, heads = run(tmp_path / "one", *arguments)
    two, other_records, other_heads = run_on_two_ranks(tmp_path, *arguments)
    assert one["chosen"] == two["chosen"]
    for record, other in zip(heads + records, other_heads + other_records, strict=True):
        assert record == pytest.approx(other, rel=tolerance)


def test_evaluate_gives_the_accuracy_of_the_run(sets, tmp_path):
    _, (*_, last), _ = run(tmp_path, *GRID)
    record = run(tmp_path, "--evaluate")
    for name in ("test_acc1", "test_acc5", "lr", "n_last_blocks"):
        assert record[name] == last[name]
    assert record["test_loss"] == pytest.approx(last["test_loss"], rel=1e-5)
    assert "another backbone" in refused(tmp_path, "--evaluate", "--seed", "1")


def test_the_mean_over_classes_decides_where_papers_use_it():
    held = {"loss": torch.ones(2), "acc1": torch.tensor([2.0, 1.0]), "class_acc1": torch.tensor([1.0, 2.0])}
    assert eval_linear.choose_head(held, "flowers102") == 1 and eval_linear.choose_head(held, "folder") == 0


def test_a_diverged_head_is_not_chosen_and_alone_is_an_error(sets, tmp_path):
    sets[0].features *= 1e16
    assert [head["chosen"] for head in run(tmp_path / "grid", "--lr", "1e9", "1e-6")[2]] == [False, True]
    assert "diverged" in refused(tmp_path / "alone", "--lr", "1e9")


def test_other_runs_are_not_mixed(sets, tmp_path, monkeypatch):
    run(tmp_path)
    assert "--lr 0.001 there, 0.1 here" in refused(tmp_path, "--lr", "0.1")
    sets[1].targets[0] = (sets[1].targets[0] + 1) % 5     # as many images, one of another class
    assert "other images" in refused(tmp_path)
    (tmp_path / "checkpoint.pth.tar").unlink()
    assert "choose another --output_dir" in refused(tmp_path)
    for name, value in ("world_size", 301), ("rank", 0):
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    assert "300 training images cannot be spread over 301 processes" in refused(tmp_path)


# ------------------------------------------------------------------------------------- the script, on images

def test_augmentation_depends_on_seed_epoch_and_image_alone(images, tmp_path, one_thread, monkeypatch):
    """Not on the worker or rank that makes a view."""
    streams, seeded_loader = [], data.seeded_loader
    monkeypatch.setattr(data, "seeded_loader", lambda *args: streams.append(args[2]) or seeded_loader(*args))
    one = run(tmp_path / "one", images=images)
    assert streams == [(0, eval_linear.CROP, epoch) for epoch in range(len(one[1]))] and len(streams) > 1
    assert_same(run(tmp_path / "workers", "--num_workers", "2", images=images), one)
    for record, other in zip(one[1], run_on_two_ranks(tmp_path, images=images)[1], strict=True):
        assert record == pytest.approx(other, rel=1e-3)


def test_augmented_features_that_overflow_are_the_backbones_fault(images):
    args = argparse.Namespace(batch_size_per_gpu=4, seed=0, num_workers=0, amp="none", epochs=1)
    description = argparse.Namespace(image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    batches = eval_linear.sgd_batches(args, lambda x: x.flatten(1) / 0, description,
                                      data.build_dataset("folder", images, "train"), None, 0,
                                      torch.device("cpu"))
    assert "the backbone's features are not finite" in refusal(list, batches)


def test_augmentation_is_dinos():
    """Its four transforms, with torchvision's own defaults."""
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    ours = eval_linear.augmentation(argparse.Namespace(image_size=32, mean=mean, std=std))
    dinos = transforms.Compose([transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip(),
                                transforms.ToTensor(), transforms.Normalize(mean, std)])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    for seed in range(5):
        made = [torch.manual_seed(seed) and transform(image) for transform in (ours, dinos)]
        assert torch.equal(*made)


def test_a_probe_of_real_features_tells_bright_from_dark(images, tmp_path, one_thread):
    last = run(tmp_path, *LBFGS, images=images)[1][-1]
    assert last["test_acc1"] >= 80 and "n_last_blocks" not in last
    assert run(tmp_path, "--evaluate", images=images)["test_acc1"] == last["test_acc1"]


def test_it_runs_in_the_folder_of_main_py(images, tmp_path, monkeypatch, one_thread):
    """The authors' command names no weights: those of the current folder. Other files of that folder stay."""
    monkeypatch.chdir(tmp_path)
    backbone = VisionTransformer(WIDTH, 3, image_size=32).state_dict()
    torch.save({"teacher": {f"backbone.{name}": value for name, value in backbone.items()}, "args": {
        "arch": "vit_tiny"}}, "checkpoint.pth")
    others = [tmp_path / name for name in ("log.txt", "run.lock", "heads.json")]
    for file in others:
        file.write_text("main.py's")
    command = ["--data_path", str(images), "--local-rank=0", "--device", "cpu", "--epochs", "1"]
    eval_linear.main(command)
    assert outcome(tmp_path / "linear")[0]["epoch"] == 1
    assert all(file.read_text() == "main.py's" for file in others)
    (tmp_path / "checkpoint.pth").rename(tmp_path / "moved.pth")
    assert "--pretrained_weights is missing" in refusal(eval_linear.main, command)
    eval_linear.main([*command, "--pretrained_weights", "moved.pth"])  # the run knows its weights again


def test_vit_features_are_dinos():
    """Class tokens of the last n blocks, the last at the end, and the mean patch token behind them."""
    backbone, x = VisionTransformer(24, 3, image_size=32).eval(), torch.randn(2, 3, 32, 32)
    candidates = [Candidate(n, pool) for n in (1, 3) for pool in (False, True)]
    features = eval_linear.FrozenFeatures(backbone, candidates)
    ours, tokens = features(x), []
    for block in backbone.blocks[-3:]:
        block.register_forward_hook(lambda module, inputs, output: tokens.append(backbone.norm(output)))
    backbone(x)
    for candidate in candidates:
        expected = [block[:, 0] for block in tokens[-candidate.n_last_blocks:]]
        expected += [tokens[-1][:, 1:].mean(1)] if candidate.avgpool_patchtokens else []
        torch.testing.assert_close(ours[:, features.columns(candidate)], torch.cat(expected, 1))


@pytest.mark.parametrize("arguments, words", [
    ("--n_last_blocks 1", "--n_last_blocks cannot be used with a backbone that is no vit_*"),
    ("--arch vit_tiny --n_last_blocks 13", "has 12 blocks"), ("--num_labels 4", "--num_labels 4"),
    ("--shots 17", "6 training images of class"), ("--shots 1 --lr 0.1 0.2", "one image per class"),
    ("--shots 2 --fraction 0.1", "--shots and --fraction"),
    ("--solver lbfgs --lr 5", "--lr cannot be used with --solver lbfgs"),
    ("--evaluate --shots 2", "--shots cannot be used"), ("--evaluate", "no checkpoint at")])
def test_a_mistake_is_one_clear_line(images, tmp_path, arguments, words):
    assert words in refused(tmp_path, *arguments.split(), images=images)
