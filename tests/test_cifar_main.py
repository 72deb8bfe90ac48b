"""cifar/main.py as its users run it: whole runs, kills and resumes, and the mistakes they can make."""
import csv
import functools
import shutil
import signal
from types import SimpleNamespace

import data
import interrupt
import main as multi_crop
import matplotlib.pyplot as plt  # here lest every forked run imports it
import numpy as np
import pytest
import torch
import torch.utils.tensorboard  # noqa: F401, likewise
import utils
from cifar import curves, main
from cifar.data import load_data
from conftest import assert_same, refusal, run_ranks
from PIL import Image
from references import auc_loss, symmetric_pairs

TIMES = {"images_per_s", "seconds"}  # the only fields of a record that two equal runs may differ in
UNINTERRUPTED = SimpleNamespace(signal=None)


def flags(images, output, *more):
    """Three epochs of 4 steps: 21 training images, batches of 5. Checkpoints after steps 2 and 4."""
    return ["--dataset", "folder", "--data_path", str(images), "--arch", "tiny", "--projector", "16", "8",
            "--batch_size", "5", "--epochs", "3", "--save_every", "2", "--device", "cpu",
            "--output_dir", str(output), *more]


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder / "run", interrupt.run(flags(images, folder / "run"), folder, code=0).stdout


@pytest.fixture
def no_curves(monkeypatch):
    monkeypatch.setattr(main, "draw_curves", lambda *_: None)  # a second of each run


def refused(arguments):
    return refusal(main.main, arguments)


def make_run(images, output, *more):
    return main.Run(main.parse_args(flags(images, output, *more)))


def outcome(output):
    """Tensors of a run's checkpoint, and its position and records without times."""
    state = torch.load(output / "checkpoint.pth", weights_only=True)
    tensors = [state["student"], state["loss"], state["optimizer"]["state"], state["sums"]]
    with open(output / "run_statistics.csv") as file:
        rows = [*utils.read_records(output / "log.txt"), *csv.DictReader(file)]
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    return tensors, (state["epoch"], state["step"], rows)


def assert_same_bits(output, other):
    (tensors, rest), (other_tensors, other_rest) = outcome(output), outcome(other)
    assert_same(tensors, other_tensors)
    assert rest == other_rest


# ------------------------------------------------------------------------------------------------- whole runs

def test_a_run_leaves_what_it_promises(uninterrupted):
    output, printed = uninterrupted
    untrained, *records = utils.read_records(output / "log.txt")
    assert untrained["epoch"] == -1 and untrained["train_loss"] is None and untrained["a"] == 1
    assert [record["epoch"] for record in records] == [0, 1, 2]
    for record in records:
        assert list(record) == list(untrained)  # one header serves all
        assert 0 <= record["test_auc"] <= 1 and 0 <= record["test_acc@1"] <= 100 == record["test_acc@5"]
        assert utils.format_value(record["train_loss"]) in printed
    assert all(len(line) <= 120 for line in printed.splitlines() if "/" not in line)
    with open(output / "run_statistics.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["epoch", "train_loss", "test_acc@1", "test_acc@5"]
    assert [row["train_loss"] for row in rows] == ["", *(str(record["train_loss"]) for record in records)]
    assert Image.open(output / "curves.png").size[0] > 1000 and list((output / "tensorboard").iterdir())
    state = torch.load(output / "checkpoint.pth", weights_only=True)
    assert state["epoch"] == 3 and {key.split(".")[0] for key in state["student"]} == {"backbone", "head"}
    assert state["args"]["amp"] in ("bf16", "none")  # what auto was: a resume elsewhere must do the same
    assert state["args"]["batch_size"] == 5 and not list(output.glob("*partial*"))


@pytest.mark.parametrize("kills", [
    # A new run writes checkpoint and CSV, an epoch's end checkpoint, CSV and checkpoint: one fsync and one
    # replace each.
    [("fsync", 1), ("step", 1), ("fsync", 1), ("replace", 1), ("step", 1), ("step", 2),
     ("evaluate", 1)],
    [("replace", 1), ("replace", 2), ("fsync", 2), ("replace", 1), ("replace", 2), ("step", 1)],
], ids=["within an epoch", "around its end"])
def test_kill_and_resume_is_bitwise_the_same(images, uninterrupted, tmp_path, kills, no_curves):
    output = tmp_path / "run"
    for kill in kills:
        interrupt.run(flags(images, output), tmp_path, *kill, code=-9)
        assert kill[0] != "evaluate" or utils.load_checkpoint(output / "checkpoint.pth")["step"] == 4
    interrupt.run(flags(images, output), tmp_path, code=0)
    assert_same_bits(output, uninterrupted[0])
    assert (output / "log.txt").read_text().count('"epoch": -1') == 1


@pytest.mark.parametrize("point, code, message, at", [
    (("step", 5, "TERM"), 143, "saved after step 1/4 of epoch 2", (1, 1)),
    (("replace", 4, "INT"), 130, "saved after epoch 1", (1, 0))])
def test_a_signal_saves_and_leaves(images, uninterrupted, tmp_path, no_curves, point, code, message, at):
    output = tmp_path / "run"
    result = interrupt.run(flags(images, output), tmp_path, *point, code=code)
    assert "Traceback" not in result.stderr and message in result.stderr
    state = utils.load_checkpoint(output / "checkpoint.pth")
    assert (state["epoch"], state["step"]) == at
    interrupt.run(flags(images, output), tmp_path, code=0)
    assert_same_bits(output, uninterrupted[0])


def test_a_signal_between_two_looks_never_exits_without_a_save(images, tmp_path):
    saved, looks = [], iter([None] + 9 * [signal.SIGTERM])

    class Late:
        """A signal that arrives after the first look at it in a step."""
        signal = property(lambda self: next(looks))

        def exit(self, message):
            assert saved, message
            raise SystemExit
    run = make_run(images, tmp_path / "run")
    with pytest.raises(SystemExit):
        main.train_one_epoch(run, lambda: saved.append(run.step), Late())
    assert saved == [run.step] == [2]


def test_a_finished_run_is_left_alone(images, uninterrupted, tmp_path, capsys):
    output = shutil.copytree(uninterrupted[0], tmp_path / "run")
    (output / "log.txt").unlink()
    before = {file: file.read_bytes() for file in output.rglob("*.*") if file.name != "run.lock"}
    main.main(flags(images, output))
    assert "is finished, after 3 epochs" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in output.rglob("*.*") if file.name != "run.lock"} == before


def test_several_processes_are_refused(images, tmp_path):
    for message in run_ranks(lambda: refused(flags(images, tmp_path)), 2):
        assert "start it without a launcher" in message


@pytest.mark.parametrize("more, learned", [
    ("--preset paper", ["a", "b", "alpha"]), ("--preset released-cifar", ["b"]),
    ("--preset paper --learn a b", ["a", "b"]), ("--preset released-cifar --learn none", [])])
def test_presets_train_the_weights_that_they_learn(images, tmp_path, more, learned):
    run = make_run(images, tmp_path, *more.split())
    before = {name: weight.item() for name, weight in run.criterion.named_parameters()}
    main.train_one_epoch(run, save=lambda: None, interruption=UNINTERRUPTED)
    assert [name for name, weight in run.criterion.named_parameters() if weight != before[name]] == learned


# -------------------------------------------------------------------------------------------------- its parts

@pytest.mark.parametrize("views, batches", [(2, 2), (4, 1)])
def test_a_step_takes_the_mean_loss_of_its_batches_over_all_views(images, tmp_path, views, batches):
    """Against every pair written out, on views drawn here one after the other."""
    run = make_run(images, tmp_path, "--views", str(views), "--accum_iter", str(batches), "--amp", "none",
                   "--image_size", "16")
    generator = torch.Generator().manual_seed(utils.stream_seed(0, 0, 0))
    order, a, losses = utils.epoch_batches(21, 5, seed=0, epoch=0), torch.ones((), requires_grad=True), []
    for _ in range(batches):
        batch = run.data.train[next(order)]
        drawn = [run.augment(batch, generator, views=1)[0] for _ in range(views)]
        embeddings = run.model.train()(drawn).double().detach()
        nu, kappa = run.criterion.negative_weight, run.criterion.margin_negative_weight
        losses.append(auc_loss(*symmetric_pairs(*embeddings), a, 0, 1, 1, nu, kappa, "cosine") / batches)
    gradient, = torch.autograd.grad(sum(losses), a)
    run.steps, run.criterion.a.grad = 1, torch.tensor(9.0)  # which the step forgets
    main.train_one_epoch(run, save=None, interruption=UNINTERRUPTED)
    assert drawn[0].shape == (5, 3, 16, 16)
    assert run.sums[0].item() == pytest.approx(sum(losses).item(), rel=1e-4)
    assert run.criterion.a.grad.item() == pytest.approx(gradient.item(), rel=1e-3)


def test_constant_schedule_warms_up_too(images, tmp_path):
    run = make_run(images, tmp_path, "--schedule", "constant", "--warmup_epochs", "0.5")  # 2 of 4 steps
    rates = []
    for step in range(run.steps):
        main.set_learning_rates(run, step)
        rates.append([group["lr"] for group in run.optimizer.param_groups])
    network, weights = run.args.lr, run.args.weights_lr
    assert rates == [[network / 2, weights / 2]] + 3 * [[network, weights]]


def test_compiled_and_plain_runs_share_their_checkpoints(images, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, compiled = (make_run(images, tmp_path, *more) for more in ([], ["--compile"]))
    for run in (plain, compiled):
        main.train_one_epoch(run, save=lambda: None, interruption=UNINTERRUPTED)
    assert compiled.network is not compiled.model and plain.sums.allclose(compiled.sums, rtol=1e-4)
    plain.load_state_dict(compiled.state_dict(), None)


def test_the_auc_is_over_all_classes(images, tmp_path, monkeypatch):
    """Class folders come sorted: the first test images are all of one class."""
    monkeypatch.setattr(main, "PAIR_IMAGES", 4)
    run, seen = make_run(images, tmp_path), []
    augment = run.augment.forward
    run.augment.forward = lambda batch, generator: seen.append(batch) or augment(batch, generator)
    main.evaluate(run)
    chosen = [label for image, label in zip(run.data.test, run.data.test_labels.tolist())
              if any(torch.equal(image, other) for other in seen[0])]
    assert len(seen[0]) == 4 and len(set(chosen)) > 1


def test_stl10_trains_on_its_unlabelled_images_too(monkeypatch, tmp_path):
    class Standin:
        """Images whose grey tells their split."""
        classes = ["cat", "dog"]

        def __init__(self, root, split, download=False):
            self.greys = {"train": (0, 1), "test": (50, 51), "train+unlabeled": (0, 1, 100, 101)}[split]
            self.labels = [grey % 50 if grey < 100 else -1 for grey in self.greys]

        def __getitem__(self, index):
            return Image.new("RGB", (96, 96), 3 * (self.greys[index],)), self.labels[index]

    monkeypatch.setattr(data.tv, "STL10", Standin)
    args = multi_crop.parse_args(["--dataset", "stl10", "--data_path", str(tmp_path)])
    assert len(multi_crop.MultiCropImages(args)) == 4
    loaded = load_data("stl10", tmp_path)
    greys = [part[:, 0, 0, 0].tolist() for part in (loaded.train, loaded.bank, loaded.test)]
    assert greys == [[0, 1, 100, 101], [0, 1], [50, 51]] and loaded.test.shape == (2, 3, 96, 96)
    assert loaded.bank_labels.tolist() == loaded.test_labels.tolist() == [0, 1]


def test_images_are_decoded_whole_and_in_order(images):
    loaded = load_data("folder", images, 32)
    assert loaded.train.shape == (21, 3, 32, 32) and loaded.train is loaded.bank and len(loaded.test) == 11
    assert loaded.bank_labels.tolist() == 6 * [0] + 7 * [1] + 8 * [2]
    dark, middle, light = (part.float().mean((1, 2, 3)) for part in loaded.bank.split([6, 7, 8]))
    assert dark.max() < middle.min() and middle.max() < light.min()
    same = np.array(Image.open(images / "train" / "dog" / "3.png"))[:, 4:36]  # 32 high, 40 wide: the middle
    assert torch.equal(loaded.bank[9], torch.from_numpy(same).permute(2, 0, 1))


def test_curves_of_several_runs(uninterrupted, tmp_path, monkeypatch):
    of_main = '{"epoch": 0, "step": 1, "train_loss": 8}\n{"epoch": 0, "train_loss": 9, "knn_acc@1": 7}'
    (other := tmp_path / "log.txt").write_text(of_main)
    log = uninterrupted[0] / "log.txt"
    monkeypatch.setattr(plt, "close", lambda figure: None)
    curves.main([str(log), str(other), "--output", str(tmp_path / "curves.pdf")])
    assert (tmp_path / "curves.pdf").read_bytes()[:4] == b"%PDF"
    drawn = {axis.get_title(): [line.get_xydata().tolist() for line in axis.lines] for axis in plt.gcf().axes}
    assert drawn.keys() == curves.PANELS.keys() and [[1, 9]] in drawn["training loss"]
    (_, untrained), *accuracy = [[r["epoch"] + 1, r["test_acc@1"]] for r in utils.read_records(log)]
    for line in (accuracy, [[1, 7]], [[0, untrained], [1, untrained]]):  # the last crosses the whole axis
        assert line in drawn["k-NN accuracy (%)"]
    for wrong in ([str(tmp_path / "curves.pdf")], [str(log), "--output", "curves.doc"]):
        assert refusal(curves.main, wrong)


# --------------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("more, message", [
    ("--batch_size 11 --accum_iter 2", "a step takes 22 images, more than the"),
    ("--batch_size 1", "--batch_size"),
    ("--epoch 3", "--epoch"), ("--preset released-cifar --views 4", "leave --views out"),
    ("--preset released-cifar --learn alpha", "held"), ("--preset simclr", "unknown preset 'simclr'"),
    ("--preset released-imagenet", "not for this script"), ("--crop_scale 0.5 0.2", "MIN <= MAX"),
    ("--device abacus", "--device"), ("--arch resnet51", "resnet50"), ("--dataset shapes", "--data_path"),
    ("--data_path /nowhere", "/nowhere/train"), ("--output_dir /proc/nowhere", "/proc/nowhere")])
def test_mistakes_are_one_line(images, tmp_path, more, message):
    assert message in refused(flags(images, tmp_path / "run", *more.split()))


def test_a_test_set_needs_two_images(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / "cat" / "0.png")
    assert "the test set has 1 image" in refused(flags(tmp_path, tmp_path / "run"))


def test_checkpoints_that_cannot_be_resumed(images, uninterrupted, tmp_path):
    output = shutil.copytree(uninterrupted[0], tmp_path / "run")
    arguments = flags(images, output)
    assert "--epochs 3 there, 5 here" in refused([*arguments, "--epochs", "5"])  # the cosine ends elsewhere
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "train" / "cat" / "3.png").unlink()
    assert "other images" in refused(flags(tmp_path / "images", output))
    with utils.lock_folder(output):
        assert "error: another run" in interrupt.run(arguments, tmp_path, code=2).stderr


@pytest.mark.parametrize("calls, saved", [(1, 0), (4, 2)])
def test_a_diverged_run_saves_nothing_of_it(images, tmp_path, monkeypatch, calls, saved):
    """A weight that is not finite must not reach a checkpoint, nor the k-NN at the epoch's end."""
    step, count = torch.optim.AdamW.step, iter(range(1, 99))

    def diverge(optimizer):
        step(optimizer)
        if next(count) == calls:
            optimizer.param_groups[0]["params"][0].data[0] = float("nan")
    monkeypatch.setattr(torch.optim.AdamW, "step", diverge)
    error = refused(flags(images, tmp_path))
    assert "training diverged" in error and f"at step {saved + 2} of epoch 1" in error
    state = utils.load_checkpoint(tmp_path / "checkpoint.pth")
    assert state["step"] == saved and all(weight.isfinite().all() for weight in state["student"].values())
    assert len(utils.read_records(tmp_path / "log.txt")) == 1
