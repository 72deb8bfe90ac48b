"""Pretraining: the script as its users run it, on one and two ranks, and its parts against formulas."""
import copy
import functools
import gc
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import interrupt
import main
import matplotlib.pyplot  # noqa: F401  (for the forks, which then need not import it)
import numpy as np
import pytest
import torch
import torch.utils.tensorboard  # noqa: F401
import utils
import vision_transformer
from conftest import ROOT, assert_same, refusal, run_ranks
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

CLOCKS = ("images_per_s", "data_wait", "memory_gb", "hours_left")  # what no two runs share
SMALL = ["--global_crops_size", "16", "--local_crops_size", "8", "--out_dim", "32", "--num_workers", "0",
         "--amp", "none", "--device", "cpu", "--print_freq", "2", "--batch_size_per_gpu", "6",
         "--epochs", "2"]
NO_SIGNAL = SimpleNamespace(signal=None)


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    """Two narrow blocks and a narrow head: main.py is what is tested here."""
    def shallow(*args):
        backbone = vision_transformer.build_backbone(*args)
        if isinstance(backbone, vision_transformer.VisionTransformer):
            backbone.blocks = backbone.blocks[:2]
        return backbone
    head = functools.partial(vision_transformer.ProjectionHead, hidden_dim=32, bottleneck_dim=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vision_transformer.VIT_ARCHS, "vit_tiny", (32, 2))
        patch.setattr(main, "build_backbone", shallow)
        patch.setattr(main, "ProjectionHead", head)
        yield


def flags(images, output, *more):
    vit = [] if "--arch" in more else ["--arch", "vit_tiny", "--patch_size", "8"]
    local = [] if ("--teacher", "none") in zip(more, more[1:]) else ["--local_crops_number", "2"]
    return [*SMALL, *vit, *local, "--data_path", str(images / "train"), "--output_dir", str(output), *more]


def refused(arguments):
    return refusal(main.main, arguments)


def run(arguments, folder, *point, code=0):
    """The script in a fork, which ends with `code`."""
    return interrupt.run(arguments, folder, *point, script=main, code=code)


def run_two(arguments, folder, *point, codes=(0, 0), **options):
    """The script on two ranks, which end with these codes."""
    return interrupt.run_ranks(arguments, folder, main, 2, *point, codes=codes, **options)


def load(output):
    return utils.load_checkpoint(output / "checkpoint.pth")


def assert_same_run(output, other):
    """The same files, checkpoint and records, clocks aside."""
    runs = []
    for folder in (output, other):
        state, records = load(folder), utils.read_records(folder / "log.txt")
        parts = [state[name] for name in ("student", "teacher", "loss", "optimizer", "epoch", "step",
                                          "batch_size")]
        records = [{name: record[name] for name in record if name not in CLOCKS} for record in records]
        runs.append((parts, records, {path.name for path in folder.iterdir()}))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


# ----------------------------------------------------------------------------------------------- one process

@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The folder of a run of 2 epochs of 3 steps that nothing interrupted, what it printed, and its flags."""
    folder = tmp_path_factory.mktemp("finished")
    more = ["--saveckp_freq", "1", "--knn_every", "2", "--knn_data_path", str(images)]
    return folder / "run", run(flags(images, folder / "run", *more), folder).stdout, more


def test_what_a_run_leaves_behind(finished):
    output, printed, _ = finished
    records = utils.read_records(output / "log.txt")
    assert [(r["epoch"], r.get("step", 3)) for r in records] == [(-1, 3), (0, 2), (0, 3), (1, 2), (1, 3)]
    for record in records[1:]:
        assert utils.format_value(record["train_loss"]) in printed
        assert {"train_lr", "train_wd", "positive", "negative", "a", "b", "alpha", *CLOCKS} <= record.keys()
    assert all(len(line) <= 120 for line in printed.splitlines() if "/" not in line)
    assert 0 <= records[-1]["knn_acc@1"] <= 100 and "knn_acc@1" not in records[2]
    assert {path.name for path in output.iterdir()} == {
        "checkpoint.pth", "checkpoint0000.pth", "checkpoint0001.pth", "log.txt", "tensorboard", "curves.png",
        "backbone.safetensors", "run.lock"}
    assert Image.open(output / "curves.png").width > 100
    state = load(output)
    assert (state["epoch"], state["step"]) == (2, 0)
    assert state["backbone"]["arch"] == "vit_tiny" and state["backbone"]["image_size"] == 16
    assert {key.split(".")[0] for key in (*state["student"], *state["teacher"])} == {"backbone", "head"}
    for name, value in load_file(output / "backbone.safetensors").items():
        assert torch.equal(value, state["teacher"][f"backbone.{name}"])


def test_a_finished_run_called_again_changes_nothing(images, finished, tmp_path, capsys):
    output = shutil.copytree(finished[0], tmp_path / "run")
    (output / "log.txt").unlink()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != "run.lock"}
    main.main(flags(images, output, *finished[2]))
    main.train(main.parse_args(flags(images, output, *finished[2])), torch.device("cpu"))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != "run.lock"} == before
    assert "is finished, after 2 epochs" in capsys.readouterr().out


@pytest.mark.parametrize("points", [
    [("step", 2), ("fsync", 3), ("replace", 3)],  # in a step, inside a save, after one
    [("fsync", 6), ("fsync", 2), ("step", 1), ("evaluate", 1)]])  # around an epoch's end
def test_a_run_killed_anywhere_ends_with_the_same_bits(images, finished, tmp_path, points):
    arguments = flags(images, tmp_path / "run", *finished[2], "--save_every", "1")
    for point in points:
        run(arguments, tmp_path, *point, code=-9)
        assert point[0] != "evaluate" or load(tmp_path / "run")["step"] == 3
    run(arguments, tmp_path)
    assert_same_run(tmp_path / "run", finished[0])


def test_sigterm_saves_and_leaves(images, finished, tmp_path):
    arguments = flags(images, tmp_path / "run", *finished[2], "--num_workers", "2")  # signalled as well
    result = run(arguments, tmp_path, "step", 4, "TERM", code=143)
    assert result.stderr.endswith("saved after step 2/3 of epoch 2; the same command resumes\n")
    run(arguments, tmp_path)
    assert_same_run(tmp_path / "run", finished[0])


def test_contradictions_on_resume(images, finished, tmp_path):
    output = shutil.copytree(finished[0], tmp_path / "run")
    arguments = flags(images, output, *finished[2])
    assert "--seed 0 there, 1 here" in refused([*arguments, "--seed", "1"])
    other = [*arguments, "--data_path", str(images / "val")]
    assert "trained on other images (number there: 21, here: 11)" in refused(other)
    assert "batches of 6 images, here they have 3" in refused([*arguments, "--batch_size_per_gpu", "3"])
    with utils.lock_folder(output):
        assert "error: another run writes to" in run(arguments, tmp_path, code=2).stderr
    (output / "checkpoint.pth").unlink()
    assert "checkpoint.pth is gone" in refused(arguments)


# ------------------------------------------------------------------------------------------------- two ranks

@pytest.mark.parametrize("batch, steps, variables", [
    (6, "1", ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
    (4, "2", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))])
def test_two_ranks_equal_one_at_the_same_global_batch(images, tmp_path, batch, steps, variables):
    """Started as torchrun or as Slurm starts them."""
    # SGD: Adam would blow up the rounding of gradients that are 0 by right, such as those of the keys' biases
    more = ["--epochs", "1", "--drop_path_rate", "0", "--optimizer", "sgd", "--lr", "10",
            "--warmup_epochs", "0", "--freeze_last_layer", "0", "--weights_lr", "0.1", "--accum_iter", steps]
    main.main(flags(images, tmp_path / "one", *more, "--batch_size_per_gpu", str(batch)))
    more += ["--batch_size_per_gpu", str(batch // 2)]
    first, second = run_two(flags(images, tmp_path / "two", *more), tmp_path, variables=variables)
    assert "2 x cpu" in first.stdout and not second.stdout
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    for part in ("student", "teacher", "loss"):
        torch.testing.assert_close(one[part], two[part], rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    start = main.build_network(main.parse_args(flags(images, tmp_path)), 0.0).state_dict()
    assert sum((value - one["student"][key]).abs().max() > 1e-3 for key, value in start.items()) > 10


@pytest.fixture(scope="module")
def two_ranks(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    more = ["--batch_size_per_gpu", "3", "--save_every", "1"]
    run_two(flags(images, folder / "run", *more), folder)
    return folder / "run", more


@pytest.mark.parametrize("victim, point, count", [(0, "fsync", 3), (1, "step", 4)])
def test_a_killed_rank_ends_the_other_and_both_resume(images, two_ranks, tmp_path, victim, point, count):
    arguments, started = flags(images, tmp_path / "run", *two_ranks[1]), time.monotonic()
    results = run_two(arguments, tmp_path, victim, point, count, codes=[(-9, 1), (1, -9)][victim])
    assert time.monotonic() - started < 60
    message = results[1 - victim].stderr
    assert message.startswith(f"error: rank {1 - victim}: lost contact with another rank")
    assert message.count("\n") == 1
    run_two(arguments, tmp_path)
    assert_same_run(tmp_path / "run", two_ranks[0])


def test_sigterm_at_a_rank_ends_all_and_another_number_of_ranks_resumes(images, two_ranks, tmp_path):
    arguments = flags(images, tmp_path / "run", *two_ranks[1])
    first, _ = run_two(arguments, tmp_path, 1, "step", 4, "TERM", codes=(143, 143))
    assert first.stderr == "saved after step 2/3 of epoch 2; the same command resumes\n"
    assert load(tmp_path / "run")["step"] == 2
    main.main([*arguments, "--batch_size_per_gpu", "6"])
    assert load(tmp_path / "run")["epoch"] == 2


def test_a_fault_of_a_rank_ends_all(images, tmp_path):
    diverging = flags(images, tmp_path / "run", "--lr", "1e9", "--warmup_epochs", "0", "--clip_grad", "0")
    results = run_two(diverging, tmp_path, codes=(2, 2))
    assert all(result.stderr.startswith("error: training diverged") for result in results)
    assert all(value.isfinite().all() for value in load(tmp_path / "run")["student"].values())
    data = shutil.copytree(images, tmp_path / "images")
    (data / "train" / "cat" / "4.png").write_text("no image")
    results = run_two(flags(data, tmp_path / "bad", "--batch_size_per_gpu", "3"), tmp_path, codes=None)
    assert sorted(result.returncode for result in results) == [1, 2]
    assert all(result.stderr.count("\n") == 1 for result in results)


def test_ranks_with_different_checkpoints_do_not_start(images, two_ranks, tmp_path):
    shutil.copytree(two_ranks[0], tmp_path / "run0")                               # not on the other host
    first, _ = run_two(lambda rank: flags(images, tmp_path / f"run{rank}", *two_ranks[1]), tmp_path,
                       codes=(2, 2))
    assert "processes see different checkpoints or images" in first.stderr


def test_ranks_share_the_running_statistics(images, tmp_path):
    def statistics():
        run = make_run(images, tmp_path, "--batch_size_per_gpu", "3", "--arch", "cifar/tiny")
        step(run)
        return {name: buffer.clone() for name, buffer in run.student.named_buffers()}
    first, second = run_ranks(statistics, 2)
    assert_same(first, second)
    assert first["backbone.bn1.running_mean"].abs().max() > 0


# ------------------------------------------------------------------------------------------------- launchers

def test_the_old_launcher(images, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2", "--nnodes=1",
               f"--master_port={interrupt.free_port()}", str(ROOT / "main.py"),
               *flags(images, tmp_path / "run", "--batch_size_per_gpu", "10", "--epochs", "1")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "2 x cpu" in result.stdout and load(tmp_path / "run")["epoch"] == 1


def test_torchrun_restarts_and_the_run_resumes_by_itself(images, tmp_path):
    """A launcher and two ranks, in forks. Rank 1 kills itself in its 5th step of the first attempt; the
    second attempt resumes from the checkpoint."""
    arguments = flags(images, tmp_path / "run", "--batch_size_per_gpu", "3")

    def rank():
        gc.freeze()  # to collect the launcher's store here would wait for its thread, which was not forked
        torch.set_num_threads(1)
        if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]) == ("0", "1"):
            os.setsid()
            interrupt._arm("step", 5, "KILL")
        utils.run_script(lambda: main.main(arguments))
    config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1,
                          start_method="fork", max_restarts=1)
    launcher = SimpleNamespace(main=lambda _: elastic_launch(config, rank)())
    result = interrupt.run([], tmp_path, script=launcher, code=0)
    assert "from epoch 1, step 1," in result.stdout and "from epoch 2, step 1," in result.stdout
    assert load(tmp_path / "run")["epoch"] == 2


def test_help_does_not_import_torch():
    """Of any script, from any folder."""
    program = ("import os, runpy, sys\nfor script in ('cifar/main.py', 'main.py', 'eval_knn.py',\n"
               "               'eval_linear.py', 'eval_finetune.py', 'embed.py', 'visualize.py'):\n"
               "    sys.argv, sys.path[0] = [script, '--help'], os.path.dirname(script)\n"
               "    try:\n        runpy.run_path(script, run_name='__main__')\n"
               "    except SystemExit as exit:\n        assert not exit.code\n"
               "    assert 'torch' not in sys.modules, script\n")
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count("usage:") == 7, result.stderr
    assert "2048 1024; 512 128 for released-cifar" in " ".join(result.stdout.split())


# ------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("arguments, message", [
    ("--data_path /nowhere", "No such file or directory: /nowhere"),
    ("--data_path IMAGES", "holds test images too; give --data_path"),
    ("--batch_size_per_gpu 64", "more than the 21"),
    ("--batch_size_per_gpu 1", "--batch_size_per_gpu: must be a whole number from 2"),
    ("--preset released-imagenet --teacher none", "leave --teacher none out"),
    ("--views 4", "--views cannot be used with a teacher"),
    ("--preset poster", "would collapse; add --teacher none"),
    ("--margin_negative_weight 16", "would collapse; add --teacher none"),
    ("--teacher none --momentum_teacher 0.9", "--momentum_teacher cannot be used with --teacher none"),
    ("--teacher_temp 0.1", "--teacher_temp cannot be used without --preset released-imagenet"),
    ("--arch resnet18 --patch_size 8", "--patch_size cannot be used with a network that is no vit_*"),
    ("--use_fp16 true", "--amp cannot be used with --use_fp16"),
    ("--arch vit_smal", "unknown arch 'vit_smal'; choose from vit_tiny"),
    ("--global_crops_size 20", "20 is no multiple of the patch size 8"),
    ("--local_crops_size 20", "vit_tiny takes no crops of 20 pixels: "),
    ("--arch timm/mixer_s32_224", "timm/mixer_s32_224 takes no crops of"),
    ("--arch timm/selecsls42 --grad_checkpointing", "timm/selecsls42 has no --grad_checkpointing"),
    ("--arch resnet18 --grad_checkpointing --compile", "cannot compile a ResNet with --grad_checkpointing"),
    ("--global_crops_scale 0.9 0.1", "--global_crops_scale needs 0 < MIN <= MAX <= 1"),
    ("--blur_sigma 0.1 inf", "--blur_sigma needs 0 < MIN <= MAX <= 1000"),
    ("--rand_augment strong", "timm knows no RandAugment 'strong'"),
    ("--knn_every 1", "--knn_every and --knn_data_path need each other"),
    ("--device cuda", "device 'cuda' is not available here")])
def test_mistakes_get_one_line(images, tmp_path, arguments, message):
    arguments = arguments.replace("IMAGES", str(images)).split()
    assert message in refused(flags(images, tmp_path / "run", *arguments))


def test_images_that_cannot_be_decoded(images, tmp_path):
    """What the message advises works: another image under the same name, or --skip_bad_images."""
    data = shutil.copytree(images / "train", tmp_path / "data")
    good = (data / "cat" / "3.png").read_bytes()
    (data / "cat" / "3.png").write_text("no image")
    arguments = flags(images, tmp_path / "run", "--data_path", str(data), "--num_workers", "2")
    assert f"cannot decode image {data}/cat/3.png: cannot identify image" in (message := refused(arguments))
    assert message.endswith("; put an image there, or, if the file exists, add --skip_bad_images")
    skipping = shutil.copytree(tmp_path / "run", tmp_path / "skipping")
    main.main([*arguments, "--output_dir", str(skipping), "--skip_bad_images"])    # resumes
    assert sum(r["skipped"] for r in utils.read_records(skipping / "log.txt") if "step" not in r) in (1, 2)

    (data / "cat" / "3.png").write_bytes(good)
    main.main(arguments)
    assert load(tmp_path / "run")["epoch"] == 2


# ----------------------------------------------------------------------------------------------------- parts

def make_run(images, output, *more):
    return main.Run(main.parse_args(flags(images, output, *more)), torch.device("cpu"))


def step(run):
    """The first step of the epoch; a run of one step per epoch. Returns its loss."""
    run.steps, run.step, run.sums = 1, 0, main.Counter()
    main.train_one_epoch(run, None, None, NO_SIGNAL)
    return run.sums["train_loss"]


def views_of_first_step(run):
    """For each micro-batch, the views that the first step of the epoch sees: V of [B, 3, S, S]."""
    for number, (crops, _) in zip(range(1, run.args.accum_iter + 1), main.make_loader(run)):
        generator = torch.Generator().manual_seed(utils.stream_seed(run.args.seed, run.epoch, 0, number))
        yield run.augment(crops, generator)


def test_views_depend_on_the_epoch_and_not_on_workers(images, tmp_path):
    run = make_run(images, tmp_path)
    whole, = views_of_first_step(run)
    run.args.num_workers = 2
    assert_same(next(views_of_first_step(run)), whole)
    run.epoch = 1
    assert not torch.equal(next(views_of_first_step(run))[0], whole[0])


@pytest.mark.parametrize("more", [
    [], ["--arch", "cifar/tiny", "--use_bn_in_head", "true", "--grad_checkpointing"]])
def test_the_teacher_is_the_students_ema(images, tmp_path, more):
    """Parameters and running statistics by the formula: its own forward pass does not change them."""
    run = make_run(images, tmp_path, "--momentum_teacher", "0.75", *more)
    assert run.student.backbone.grad_checkpointing == bool(more)
    before = copy.deepcopy(run.teacher.state_dict())
    assert_same(before, run.student.state_dict())
    run.args.epochs = 100                                                          # the momentum stays 0.75
    step(run)
    moved = 0
    for key, value in run.teacher.state_dict().items():
        if value.is_floating_point():
            expected = 0.75 * before[key] + 0.25 * run.student.state_dict()[key]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
            moved += not torch.equal(value, before[key])
    assert moved > len(before) / 2
    assert all(p.grad is None and not p.requires_grad for p in run.teacher.parameters())


@pytest.mark.parametrize("teacher, more, views", [
    ("ema", [], 4), ("none", [], 2), ("none", ["--views", "4"], 4)])
def test_loss_and_gradients_are_the_means_over_micro_batches(images, tmp_path, teacher, more, views):
    """Of the objective that --teacher chooses, whose embeddings are computed here one view at a time."""
    run = make_run(images, tmp_path, "--accum_iter", "2", "--teacher", teacher, "--drop_path_rate", "0",
                   "--clip_grad", "0", "--freeze_last_layer", "0", *more)
    losses = []
    for seen in views_of_first_step(run):
        student = torch.cat([run.student(view) for view in seen])                  # [V, B, D]
        targets = student[:2].detach()                                          # the teacher starts as a copy
        losses.append(run.criterion.teacher_student(targets, student) if teacher == "ema"
                      else run.criterion(*student))
    parameters = [p for part in (run.student, run.criterion) for p in part.parameters() if p.requires_grad]
    expected = torch.autograd.grad(sum(losses) / 2, parameters)
    assert len(student) == views
    assert step(run) == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    torch.testing.assert_close([p.grad for p in parameters], list(expected), rtol=1e-3, atol=1e-5)


def test_clipping_is_per_parameter():
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.3, 0.4, 0.0])
    for limit in (2.0, 0.0):                                                       # 0: none
        main.clip_gradients(parameters, limit)
        torch.testing.assert_close(parameters[0].grad, torch.tensor([1.2, 1.6, 0.0]))
        assert torch.equal(parameters[1].grad, torch.tensor([0.3, 0.4, 0.0])) and parameters[2].grad is None


def test_the_last_layer_waits_and_gains_biases_and_weights_of_the_loss_do_not_decay(images, tmp_path):
    run = make_run(images, tmp_path, "--norm_last_layer", "false", "--lr", "1", "--warmup_epochs", "0")
    before = copy.deepcopy(run.student.state_dict())
    step(run)
    moved = {name for name, value in run.student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and not any("last_layer" in name for name in moved)
    run.epoch = 1
    step(run)
    last = {name: p for name, p in run.student.named_parameters() if "last_layer" in name}
    assert len(last) == 2 and all(not torch.equal(p, before[name]) for name, p in last.items())
    names = {p: name for name, p in (*run.student.named_parameters(), *run.criterion.named_parameters())}
    decayed, *others = ([names[p] for p in group["params"]] for group in run.optimizer.param_groups)
    assert [group["weight_decay"] > 0 for group in run.optimizer.param_groups] == [True, False, False]
    plain = [name.endswith(("bias", "original0")) or "norm" in name for name in (*decayed, *others[0])]
    assert plain == [False] * len(decayed) + [True] * len(others[0]) and others[1] == ["a", "b", "alpha"]


def test_schedules_at_their_edges(images, tmp_path):
    run = make_run(images, tmp_path, "--lr", "0.64", "--min_lr", "1e-3", "--warmup_epochs", "1", "--epochs",
                   "3", "--weights_lr", "0.5")
    peak, seen = 0.64 * 6 / 256, []
    for run.epoch in range(3):
        for run.step in range(run.steps):
            momentum = main.set_schedules(run)
            decayed, others, weights = run.optimizer.param_groups
            assert others["lr"] == decayed["lr"] == pytest.approx(weights["lr"] * peak / 0.5)
            assert others["weight_decay"] == weights["weight_decay"] == 0
            seen.append((decayed["lr"], decayed["weight_decay"], momentum))
    rates, decays, momenta = zip(*seen)
    assert (*rates[:4], rates[-1]) == pytest.approx((peak / 3, peak * 2 / 3, peak, peak, 1e-3))
    assert (decays[0], decays[-1]) == pytest.approx((0.04, 0.4)) and (momenta[0], momenta[-1]) == (0.996, 1.0)


def test_the_released_objective_and_its_temperature(images, tmp_path):
    run = make_run(images, tmp_path, "--preset", "released-imagenet", "--teacher_temp", "0.1",
                   "--warmup_teacher_temp_epochs", "3")
    assert run.args.erasing == 0.2 and run.images.crop.rand_augment and len(run.optimizer.param_groups) == 2
    temperatures = []
    for run.epoch in range(4):
        main.set_schedules(run)
        temperatures.append(run.criterion.teacher_temp)
    assert temperatures == pytest.approx([*np.linspace(0.04, 0.1, 3), 0.1])       # DINO's
    assert step(run) > 50                                                          # (h - 10)^2 with h near 0


@pytest.mark.parametrize("arguments", ["hard", "quartic", "poster --teacher none"])
def test_every_preset_starts_with_a_checkpoint(images, tmp_path, arguments):
    run = make_run(images, tmp_path, "--preset", *arguments.split())
    before = run.state_dict()
    step(run)
    run.load_state_dict(before, tmp_path)


@pytest.mark.parametrize("optimizer, lr", [("adamw", "0.1"), ("sgd", "3"), ("lars", "30")])
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_every_optimizer_and_precision_learns(images, tmp_path, optimizer, lr, amp):
    run = make_run(images, tmp_path, "--optimizer", optimizer, "--lr", lr, "--amp", amp, "--warmup_epochs",
                   "0", "--freeze_last_layer", "0", "--momentum_teacher", "1")  # the teacher stands still
    run.criterion.alpha.data.zero_()
    losses = [step(run) for _ in range(20 if amp == "fp16" else 6)]  # fp16 skips some until its scale fits
    assert losses[-1] < losses[0] - 1 and run.criterion.alpha > 0    # alpha ascends to the margin's violation
