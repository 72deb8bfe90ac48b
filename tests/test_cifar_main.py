"""cifar/main.py as its users run it: a whole run, kills and resumes, and every mistake they can make."""
import csv
import json
import shutil
import signal
import subprocess
import sys

import interrupt
import numpy as np
import pytest
import torch
import utils
from cifar import data, main
from cifar.model import ARCHS, ContrastiveNet
from conftest import ROOT, write_noise
from PIL import Image

TIMES = {"images_per_s", "seconds"}  # the only fields of a record that two equal runs may differ in


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """2 x 24 training and 2 x 6 test images."""
    return write_noise(tmp_path_factory.mktemp("images"), {"train": 24, "test": 6})


def flags(images, output, *more):
    return ["--dataset", "folder", "--data_path", str(images), "--arch", "small", "--projector", "32", "16", "--batch_size", "12",
            "--epochs", "3", "--save_every", "2", "--device", "cpu", "--output_dir", str(output), *more]


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    output = folder / "run"
    result = interrupt.run(flags(images, output), folder)
    assert result.returncode == 0, result.stderr
    return output, result.stdout


def outcome(output):
    """Weights, optimiser state and records of a run, without its times."""
    state = torch.load(output / "checkpoint.pth", weights_only=True)
    records = [{k: v for k, v in record.items() if k not in TIMES} for record in utils.read_records(output / "log.txt")]
    with open(output / "run_statistics.csv") as file:
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    return {key: state[key] for key in ("student", "loss", "optimizer", "epoch", "step", "sums")}, records, rows


def equal(x, y):
    """Bitwise equality of nested containers of tensors and plain values."""
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(x[key], y[key]) for key in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(equal, x, y))
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


# ---------------------------------------------------------------------------------------------------------- a whole run

def test_a_run_leaves_what_it_promises(uninterrupted):
    output, printed = uninterrupted
    records = utils.read_records(output / "log.txt")
    assert [record["epoch"] for record in records] == [0, 1, 2]
    for record in records:
        assert record.keys() >= {"train_loss", "test_acc@1", "test_acc@5", "positive", "negative", "test_auc", "a", "b", "alpha"}
        assert 0 <= record["test_auc"] <= 1 and 0 <= record["test_acc@1"] <= 100 and record["test_acc@5"] == 100
        assert utils.format_record(record) in printed  # the same record on the screen
    with open(output / "run_statistics.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["epoch", "train_loss", "test_acc@1", "test_acc@5"]
    assert [float(row["train_loss"]) for row in rows] == [record["train_loss"] for record in records]
    assert Image.open(output / "curves.png").size[0] > 1000
    assert list((output / "tensorboard").iterdir())
    state = torch.load(output / "checkpoint.pth", weights_only=True)
    assert state["epoch"] == 3 and {key.split(".")[0] for key in state["student"]} == {"backbone", "head"}
    assert state["args"]["batch_size"] == 12
    assert not list(output.glob("*partial*"))
    weights = torch.tensor([[record[name] for name in ("a", "b", "alpha")] for record in records])
    assert (weights[0] != weights[-1]).all()  # all three are learned


@pytest.mark.parametrize("kills", [
    # 4 steps an epoch, checkpoints after steps 2 and 4. A start writes log and CSV, and if new a checkpoint; an epoch's end writes
    # log, CSV and checkpoint.
    [("step", 1), ("fsync", 3), ("replace", 3), ("step", 1), ("step", 2)],         # early; inside and after a save; later
    [("fsync", 5), ("replace", 3), ("replace", 4), ("fsync", 5), ("replace", 5)],  # around the records of an epoch's end
], ids=["inside an epoch", "at its end"])
def test_kill_and_resume_is_bitwise_the_same(images, uninterrupted, tmp_path, kills):
    output = tmp_path / "run"
    for point, count in kills:
        result = interrupt.run(flags(images, output), tmp_path, point, count)
        assert result.returncode == -signal.SIGKILL, (point, count, result.stdout, result.stderr)
    result = interrupt.run(flags(images, output), tmp_path)
    assert result.returncode == 0, result.stderr
    assert equal(outcome(output), outcome(uninterrupted[0]))


@pytest.mark.parametrize("name, code", [("TERM", 143), ("INT", 130)])
def test_a_polite_signal_saves_and_leaves(images, uninterrupted, tmp_path, name, code):
    output = tmp_path / "run"
    result = interrupt.run(flags(images, output), tmp_path, "step", 5, name)
    assert result.returncode == code and "Traceback" not in result.stderr
    assert "saved after step 1/4 of epoch 2" in result.stderr
    assert torch.load(output / "checkpoint.pth", weights_only=True)["step"] == 1
    assert interrupt.run(flags(images, output), tmp_path).returncode == 0
    assert equal(outcome(output), outcome(uninterrupted[0]))


def test_a_full_disk_keeps_what_was_saved(images, tmp_path):
    output = tmp_path / "run"
    arguments = flags(images, output, "--schedule", "constant")
    assert interrupt.run([*arguments, "--epochs", "1"], tmp_path).returncode == 0
    result = interrupt.run(arguments, tmp_path, "disk", 200_000)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert "cannot write" in result.stderr and "checkpoint.pth: File too large" in result.stderr
    assert utils.load_checkpoint(output / "checkpoint.pth")["epoch"] == 1
    assert not list(output.glob("*partial*"))
    assert interrupt.run(arguments, tmp_path).returncode == 0  # room again: it goes on


def run_here(arguments):
    """main.py in this process; its UserError's message or None."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        main.main(arguments)
    except utils.UserError as error:
        return str(error)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_finished_run_says_so_and_changes_nothing(images, uninterrupted, capsys):
    before = outcome(uninterrupted[0])
    run_here(flags(images, uninterrupted[0]))
    assert "done: epoch 2" in capsys.readouterr().out
    assert equal(outcome(uninterrupted[0]), before)


def test_accumulated_batches_make_one_step(images, tmp_path):
    """Two batches of 12 make the mean of their gradients, seen on a."""
    args = main.parse_args(flags(images, tmp_path, "--accum_iter", "2"))
    run = main.Run(args)
    assert run.steps == 2
    stepped, losses, grads = [], [], []
    take_step, forward = run.optimizer.step, run.criterion.forward

    def record(*z):
        losses.append(forward(*z))
        grads.append(torch.autograd.grad(losses[-1], run.criterion.a, retain_graph=True)[0])
        return losses[-1]
    run.optimizer.step = lambda: (stepped.append(run.criterion.a.grad.clone()), take_step())
    run.criterion.forward = record
    main.train_epoch(run, save=lambda: None, interruption=type("Quiet", (), {"signal": None}))
    assert len(losses) == 4 and len(stepped) == 2
    for index, gradient in enumerate(stepped):
        torch.testing.assert_close(gradient, (grads[2 * index] + grads[2 * index + 1]) / 2)
    assert run.sums[0].item() / run.steps == pytest.approx(sum(x.item() for x in losses) / 4, rel=1e-5)


def test_constant_schedule_warms_up_too(images, tmp_path):
    run = main.Run(main.parse_args(flags(images, tmp_path, "--schedule", "constant", "--warmup_epochs", "0.5")))  # 2 of 4 steps
    rates = []
    for step in range(run.steps):
        main.set_learning_rates(run, step)
        rates.append([group["lr"] for group in run.optimizer.param_groups])
    network, weights = run.args.lr, run.args.weights_lr
    assert rates == [[network / 2] + 3 * [weights / 2]] + 3 * [[network] + 3 * [weights]]


def test_compiled_and_plain_runs_share_their_checkpoints(images, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or torch.nn.Sequential(module))
    run = main.Run(main.parse_args(flags(images, tmp_path, "--compile")))
    assert compiled == [run.model] and run.network is not run.model
    main.train_epoch(run, save=lambda: None, interruption=type("Quiet", (), {"signal": None}))
    assert run.state_dict()["student"].keys() == ContrastiveNet("small", (32, 16)).state_dict().keys()


def test_the_auc_is_over_all_classes(images, tmp_path, monkeypatch):
    """Class folders come sorted: the first test images are all of one class."""
    monkeypatch.setattr(main, "PAIR_IMAGES", 6)
    run = main.Run(main.parse_args(flags(images, tmp_path)))
    seen = []
    augment = run.augment.forward
    monkeypatch.setattr(run.augment, "forward", lambda batch, generator: seen.append(batch) or augment(batch, generator))
    main.evaluate(run)
    chosen = [index for index, image in enumerate(run.data.test) if any(torch.equal(image, other) for other in seen[0])]
    assert len(seen[0]) == 6 and set(run.data.test_labels[chosen].tolist()) == {0, 1}


@pytest.mark.parametrize("preset", main.RECIPES)
@pytest.mark.parametrize("learn", [["a", "b"], ["none"], None])
def test_presets_train(images, tmp_path, preset, learn):
    more = ["--preset", preset, "--epochs", "1"] + (["--learn", *learn] if learn else [])
    assert run_here(flags(images, tmp_path, *more)) is None
    record, = utils.read_records(tmp_path / "log.txt")
    learned = learn or list(main.RECIPES[preset]["learn"])
    start = {"paper": dict(a=1, b=0, alpha=1), "released-cifar": dict(a=10, b=0, alpha=1)}[preset]
    for name, value in start.items():
        assert (record[name] != value) == (name in learned)


# ------------------------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("more, message", [
    (["--batch_size", "49"], "larger than the data set"),
    (["--batch_size", "24", "--accum_iter", "3"], "larger than the data set"),
    (["--learn", "none", "a"], "contradicts"),
    (["--crop_scale", "0.5", "0.2"], "MIN <= MAX"),
    (["--temperature", "0"], "--temperature"),
    (["--lr", "0"], "--lr"),
    (["--seed", "-1"], "--seed"),
    (["--seed", str(2**63)], "--seed"),
    (["--batch_size", "1"], "at least 2"),
    (["--image_size", "100000"], "--image_size"),
    (["--learn", "none", "--weights_lr", "0.1"], "--weights_lr"),
    (["--device", "cpu:x"], "--device cpu"),
    (["--preset", "released-cifar", "--negative_weight", "4"], "--preset paper"),
    (["--preset", "released-cifar", "--learn", "alpha"], "held"),
    (["--negative_weight", "-4"], "positive"),
    (["--device", "abacus"], "--device cpu"),
    (["--data_path", "/nowhere"], "/nowhere/train"),
    (["--dataset", "shapes"], "leave --data_path"),
    (["--output_dir", "/proc/nowhere"], "--output_dir"),
])
def test_mistakes_are_one_line(images, tmp_path, more, message):
    error = run_here(flags(images, tmp_path / "run", *more))
    assert error and message in error and "\n" not in error


@pytest.mark.parametrize("arguments", [["--arch", "resnet51"], ["--dataset", "cifar11"], ["--epochs", "0"], ["--no_such_flag"],
                                       ["--epoch", "3"], ["--negative_weight", "many"], ["--warmup_epochs", "1e300"],
                                       ["--dataset", "folder"],
                                       ["--data_path", "/nowhere", "--dataset", "folder"]])
def test_mistakes_end_with_code_2_and_no_traceback(arguments, tmp_path):
    result = interrupt.run(arguments, tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("folder, script", [("cifar", "main.py"), (".", "cifar/main.py")])
def test_the_script_runs_from_either_folder(folder, script):
    result = subprocess.run([sys.executable, script, "--learn", "none", "a"], cwd=ROOT / folder, capture_output=True, text=True)
    assert result.returncode == 2 and "contradicts" in result.stderr and "Traceback" not in result.stderr


def test_help_names_every_preset_default(capsys):
    with pytest.raises(SystemExit):
        main.parse_args(["--help"])
    assert "2048 1024 for paper, 512 128 for released-cifar" in " ".join(capsys.readouterr().out.split())


def test_folders_that_cannot_be_used(images, tmp_path):
    empty = tmp_path / "empty"
    (empty / "train" / "cat").mkdir(parents=True)
    (empty / "test" / "cat").mkdir(parents=True)
    assert "no images to use" in run_here(flags(empty, tmp_path / "run"))
    other = tmp_path / "other"
    for split, name in (("train", "cat"), ("test", "dog")):
        (other / split / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(other / split / name / "0.png")
    message = run_here(flags(other, tmp_path / "run"))
    assert "different classes" in message and "cat" in message and "dog" in message
    (other / "train" / "cat" / "1.png").write_bytes(b"no image")
    (other / "test" / "dog").rename(other / "test" / "cat")
    assert str(other / "train" / "cat" / "1.png") in run_here(flags(other, tmp_path / "run"))


def test_a_test_set_of_one_image(images, tmp_path):
    for split, count in (("train", 12), ("test", 1)):
        (tmp_path / split / "cat").mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (32, 32), (index, 0, 0)).save(tmp_path / split / "cat" / f"{index}.png")
    assert "the test set has 1 image" in run_here(flags(tmp_path, tmp_path / "run"))


@pytest.mark.parametrize("name, splits", [("cifar10", ["train", "test"]), ("cifar100", ["train", "test"]),
                                          ("stl10", ["train", "test", "unlabeled"])])
def test_torchvision_data_sets(name, splits, monkeypatch, tmp_path):
    """The splits each data set is made of, by a stand-in for torchvision's class."""
    class Standin:
        classes = ["cat", "dog"]

        def __init__(self, root, split, download):
            assert root == tmp_path and download
            self.grey = splits.index({True: "train", False: "test"}.get(split, split)) * 50
            self.count = 3 + self.grey // 50

        def __len__(self):
            return self.count

        def __getitem__(self, index):
            return Image.new("RGB", (96, 96) if name == "stl10" else (32, 32), 3 * (self.grey + index,)), index % 2

    monkeypatch.setattr(utils.datasets, name.upper(),
                        (lambda root, split, download: Standin(root, split, download)) if name == "stl10" else
                        (lambda root, train, download: Standin(root, train, download)))
    loaded = data.load_data(name, tmp_path)
    side = 96 if name == "stl10" else 32
    assert loaded.bank.shape == (3, 3, side, side) and loaded.bank[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert loaded.test[:, 0, 0, 0].tolist() == [50, 51, 52, 53] and loaded.test_labels.tolist() == [0, 1, 0, 1]
    unlabelled = [100, 101, 102, 103, 104] if name == "stl10" else []
    assert loaded.train[:, 0, 0, 0].tolist() == unlabelled + [0, 1, 2]


def test_a_missing_network_names_the_way_out(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    message = run_here(["--dataset", "cifar10", "--data_path", str(tmp_path), "--output_dir", str(tmp_path / "run")])
    assert "cannot download cifar10" in message and "--dataset folder --data_path" in message and "\n" not in message


def test_checkpoints_that_cannot_be_resumed(images, uninterrupted, tmp_path):
    arguments = flags(images, uninterrupted[0])
    message = run_here([*arguments, "--lr", "0.01"])
    assert "--lr 0.002 there, 0.01 here" in message and "--output_dir" in message
    assert "--epochs 3 there, 5 here" in run_here([*arguments, "--epochs", "5"])  # the cosine ends elsewhere
    saved = (uninterrupted[0] / "checkpoint.pth").read_bytes()
    output = tmp_path / "run"
    output.mkdir()
    for content, words in ((saved[:len(saved) // 2], "cannot read checkpoint"), (b"", "cannot read checkpoint")):
        (output / "checkpoint.pth").write_bytes(content)
        assert words in run_here(flags(images, output))
        assert (output / "checkpoint.pth").read_bytes() == content
    torch.save({"model": torch.zeros(1)}, output / "checkpoint.pth")
    assert "no checkpoint of this script" in run_here(flags(images, output))
    torch.save({"args": utils.plain(main.parse_args(flags(images, output)))}, output / "checkpoint.pth")
    assert "does not fit" in run_here(flags(images, output))
    torch.save({"payload": subprocess.Popen}, output / "checkpoint.pth")  # needs unpickling of code
    assert "cannot read checkpoint" in run_here(flags(images, output))


def test_other_images_under_the_same_flags(images, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "train" / "dark" / "3.png").unlink()
    assert "other images: 48 there, 47 here" in run_here(flags(tmp_path / "images", tmp_path / "run"))


def test_a_log_is_never_lost_with_its_checkpoint(images, uninterrupted, tmp_path):
    output = shutil.copytree(uninterrupted[0], tmp_path / "run")
    (output / "checkpoint.pth").unlink()
    assert "whose checkpoint is gone" in run_here(flags(images, output))
    assert len(utils.read_records(output / "log.txt")) == 3
    (output / "log.txt").write_text('{"epoch": 0}\n{"epo\n')
    assert "cannot read the log" in run_here(flags(images, output))
    (output / "log.txt").write_text("[1]\n")
    assert "no log of epochs" in run_here(flags(images, output))
    shutil.copy(uninterrupted[0] / "checkpoint.pth", output)
    (output / "log.txt").unlink()
    assert "its log.txt is gone" in run_here(flags(images, output))


@pytest.mark.parametrize("last_step", [False, True])
def test_a_diverged_run_saves_nothing_of_it(images, tmp_path, last_step):
    """A weight that is not finite must not reach a checkpoint, nor the k-NN at the epoch's end."""
    run_of = main.Run

    class Diverging(run_of):
        def __init__(self, *args):
            super().__init__(*args)
            take_step = self.optimizer.step

            def step():
                take_step()
                if self.step == (3 if last_step else 1):
                    next(self.model.parameters()).data[0] = float("nan")
            self.optimizer.step = step
    main.Run = Diverging
    try:
        assert "training diverged" in run_here(flags(images, tmp_path))
    finally:
        main.Run = run_of
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert state["step"] == (2 if last_step else 0) and all(w.isfinite().all() for w in state["student"].values())


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(images, tmp_path):
    arguments = flags(images, tmp_path, "--schedule", "constant")
    assert run_here([*arguments, "--epochs", "1"]) is None
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    state["loss"]["alpha"].fill_(float("inf"))
    torch.save(state, tmp_path / "checkpoint.pth")
    saved = (tmp_path / "checkpoint.pth").read_bytes()
    assert "training diverged" in run_here(arguments)
    assert (tmp_path / "checkpoint.pth").read_bytes() == saved


# ----------------------------------------------------------------------------------------------------------- its parts

def test_epoch_batches_visit_every_image_once_and_resume():
    batches = list(utils.epoch_batches(50, 8, seed=3, epoch=2))
    order = torch.cat(batches)
    assert len(batches) == 6 and len(order.unique()) == 48
    assert equal(list(utils.epoch_batches(50, 8, seed=3, epoch=2, start=4)), batches[4:])
    assert not torch.equal(order, torch.cat(list(utils.epoch_batches(50, 8, seed=3, epoch=3))))
    assert not torch.equal(order, torch.cat(list(utils.epoch_batches(50, 8, seed=4, epoch=2))))


def test_images_are_decoded_whole_and_in_order(images):
    loaded = data.load_data("folder", images, 32)
    assert loaded.train.shape == (48, 3, 32, 32) and loaded.train.dtype == torch.uint8 and loaded.train is loaded.bank
    assert loaded.bank_labels.bincount().tolist() == [24, 24] and loaded.test_labels.bincount().tolist() == [6, 6]
    dark, light = loaded.bank.float().mean((1, 2, 3)).split(24)
    assert dark.max() < light.min()
    same = utils.build_dataset("folder", images, "train")[24][0]  # 32 high, 40 wide: the middle 32 columns
    assert torch.equal(loaded.bank[24], torch.from_numpy(np.array(same)[:, 4:36]).permute(2, 0, 1))


@pytest.mark.parametrize("arch", ARCHS)
def test_archs_keep_the_resolution_of_small_images(arch):
    with torch.device("meta"):
        net = ContrastiveNet(arch, (64, 16))
        features = net.backbone(torch.empty(2, 3, 32, 32))
        assert net(torch.empty(2, 3, 32, 32)).shape == (2, 16)
    assert features.shape == (2, {"resnet50": 2048, "small": 256, "tiny": 64}.get(arch, 512))
    parameters = {"small": 1.2e6, "tiny": 0.08e6}  # the two for CPUs, with a stem of stride 2
    assert net.backbone.conv1.kernel_size == (3, 3) and net.backbone.conv1.stride == ((2, 2) if arch in parameters else (1, 1))
    if arch in parameters:
        assert sum(p.numel() for p in net.backbone.parameters()) == pytest.approx(parameters[arch], rel=0.04)


def test_the_released_projector_is_2048_512_128():
    with torch.device("meta"):
        head = ContrastiveNet("resnet50", main.RECIPES["released-cifar"]["projector"]).head
    shapes = [tuple(layer.weight.shape) for layer in head if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(512, 2048), (128, 512)]
    assert [type(layer).__name__ for layer in head] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]


def test_log_lines_are_json(uninterrupted):
    for line in (uninterrupted[0] / "log.txt").read_text().splitlines():
        assert isinstance(json.loads(line), dict)
