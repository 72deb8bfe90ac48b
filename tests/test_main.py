"""Multi-crop pretraining: its command line as its users meet it, and its parts against direct formulas."""
import copy
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import interrupt
import main
import numpy as np
import pytest
import timm
import torch
import utils
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from torch import nn

TIMES = ("images_per_s", "data_wait", "memory_gb", "hours_left")  # the columns of a record that no two runs share
SMALL = ["--arch", "vit_tiny", "--patch_size", "8", "--global_crops_size", "16", "--local_crops_size", "8", "--local_crops_number", "2",
         "--out_dim", "32", "--num_workers", "0", "--amp", "none", "--device", "cpu", "--print_freq", "2"]


@pytest.fixture(scope="module", autouse=True)
def shallow_vits():
    """Two blocks and narrow heads: the code of main.py is what is tested here."""
    patch = pytest.MonkeyPatch()
    original = main.build_network

    def shallow(args, drop_path_rate):
        network = original(args, drop_path_rate)
        if hasattr(network.backbone, "blocks"):
            network.backbone.blocks = network.backbone.blocks[:2]
        return main.MultiCropNet(network.backbone, main.ProjectionHead(network.backbone.embed_dim, args.out_dim, hidden_dim=32,
                                                                       bottleneck_dim=16, use_bn=args.use_bn_in_head,
                                                                       norm_last_layer=args.norm_last_layer))
    patch.setattr(main, "build_network", shallow)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """12 images in two class folders, labelled splits of the same, and a flat folder."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for number in range(12):
        picture = Image.fromarray(noise.integers(0, 256, (24, 30, 3), dtype=np.uint8))
        for place in (f"train/{'ab'[number % 2]}", "flat", f"labelled/train/{'ab'[number % 2]}", f"labelled/val/{'ab'[number % 2]}"):
            (root / place).mkdir(parents=True, exist_ok=True)
            picture.save(root / place / f"{number}.png")
    return root


def flags(images, output, *more, without=()):
    """The flags of a small run, two epochs long, and `more`; `without` those of SMALL that `more` rules out."""
    given = [*SMALL, "--data_path", str(images / "train"), "--output_dir", str(output), "--epochs", "2", *more]
    for name in without:
        del given[given.index(name):given.index(name) + 2]
    return given


def run_here(arguments):
    """The message of the UserError that the script ends with."""
    with pytest.raises(utils.UserError) as error:
        main.main(arguments)
    return str(error.value)


def load(output, name="checkpoint.pth"):
    return utils.load_checkpoint(output / name)


def assert_same(state, other, path=""):
    """The same types, keys and bits, through and through."""
    assert type(state) is type(other), path
    if isinstance(state, dict):
        assert state.keys() == other.keys(), path
        for key in state:
            assert_same(state[key], other[key], f"{path}.{key}")
    elif isinstance(state, (list, tuple)):
        assert len(state) == len(other), path
        for number, (mine, its) in enumerate(zip(state, other)):
            assert_same(mine, its, f"{path}[{number}]")
    elif isinstance(state, torch.Tensor):
        assert torch.equal(state, other), path
    else:
        assert state == other, path


def assert_same_run(output, other):
    """The same checkpoint and records, but for what clocks told."""
    assert {p.name for p in output.iterdir()} == {p.name for p in other.iterdir()}
    states = [load(folder) for folder in (output, other)]
    for state in states:
        for name in ("output_dir", "save_every"):
            state["args"].pop(name)
        for name in ("sums", "noted_sums"):
            state[name] = state[name][:5]
    assert_same(*states)
    records = [[{k: v for k, v in record.items() if k not in TIMES} for record in utils.read_records(folder / "log.txt")]
               for folder in (output, other)]
    assert records[0] == records[1]


# ---------------------------------------------------------------------------------------------------- runs, one process

RUN = ["--batch_size_per_gpu", "4", "--saveckp_freq", "1"]  # 3 steps an epoch


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    arguments = [*RUN, "--knn_every", "2", "--knn_data_path", str(images / "labelled")]
    result = interrupt.run(flags(images, folder / "run", *arguments), folder, script=main)
    assert result.returncode == 0, result.stderr
    return folder / "run", result, arguments


def test_what_a_run_leaves_behind(uninterrupted):
    output, result, _ = uninterrupted
    records = utils.read_records(output / "log.txt")
    assert [(r["epoch"], r.get("step")) for r in records] == [(0, 2), (0, None), (1, 2), (1, None)]
    for record in records:
        assert utils.format_record(record) in result.stdout                       # the screen's record is the log's
        assert {"train_loss", "train_lr", "train_wd", "positive", "negative", "a", "b", "alpha", *TIMES} <= record.keys()
    assert 0 <= records[-1]["knn_acc@1"] <= 100 and "knn_acc@1" not in records[1]
    assert (output / "checkpoint0000.pth").exists() and (output / "checkpoint0001.pth").exists()
    assert list((output / "tensorboard").iterdir())
    state = load(output)
    assert state["epoch"] == 2 and state["step"] == 0
    assert state["backbone"] == {"arch": "vit_tiny", "patch_size": 8, "image_size": 16, "mean": list(main.IMAGENET_MEAN),
                                 "std": list(main.IMAGENET_STD)}
    assert {key.split(".")[0] for part in ("student", "teacher") for key in state[part]} == {"backbone", "head"}
    with safe_open(output / "backbone.safetensors", "pt") as file:
        for key in file.keys():
            assert torch.equal(file.get_tensor(key), state["teacher"][f"backbone.{key}"])
        assert len(file.keys()) == sum(key.startswith("backbone.") for key in state["teacher"])


@pytest.mark.parametrize("points", [
    [("step", 2), ("fsync", 3), ("replace", 3)],  # in a step, inside a save, after one
    [("step", 5), ("fsync", 2), ("replace", 2)],
    [("fsync", 6), ("fsync", 2), ("step", 1)],    # around an epoch's end
])
def test_a_run_killed_anywhere_ends_with_the_same_bits(images, uninterrupted, tmp_path, points):
    arguments = flags(images, tmp_path / "run", *uninterrupted[2], "--save_every", "1")
    for point, count in points:
        result = interrupt.run(arguments, tmp_path, point, count, script=main)
        assert result.returncode == -signal.SIGKILL, result.stderr
    assert interrupt.run(arguments, tmp_path, script=main).returncode == 0
    assert_same_run(tmp_path / "run", uninterrupted[0])


@pytest.mark.parametrize("workers", ["0", "2"])  # the signal reaches the loader's workers too
def test_sigterm_saves_and_leaves(images, uninterrupted, tmp_path, workers):
    arguments = flags(images, tmp_path / "run", *uninterrupted[2], "--num_workers", workers)
    result = interrupt.run(arguments, tmp_path, "step", 4, "TERM", script=main)
    assert result.returncode == 128 + signal.SIGTERM and "saved after step 2/3 of epoch 1" in result.stderr, result.stderr
    assert interrupt.run(arguments, tmp_path, script=main).returncode == 0
    assert_same(load(tmp_path / "run")["teacher"], load(uninterrupted[0])["teacher"])


# ------------------------------------------------------------------------------------------------------- runs, two ranks

@pytest.mark.parametrize("accumulated", ["1", "3"])
def test_two_ranks_equal_one_at_the_same_global_batch(images, tmp_path, accumulated):
    """Three steps, or one of three batches: the same images in the same views, and the objective over all ranks' images."""
    # SGD: Adam would blow up the rounding of gradients that are 0 by right, such as those of the keys' biases.
    arguments = ["--epochs", "1", "--drop_path_rate", "0", "--optimizer", "sgd", "--lr", "10", "--warmup_epochs", "0",
                 "--freeze_last_layer", "0", "--weights_lr", "0.1", "--accum_iter", accumulated]
    alone = interrupt.run(flags(images, tmp_path / "one", "--batch_size_per_gpu", "4", *arguments), tmp_path, script=main)
    both = interrupt.run_ranks(flags(images, tmp_path / "two", "--batch_size_per_gpu", "2", *arguments), tmp_path, main)
    assert [result.returncode for result in (alone, *both)] == [0, 0, 0], both[0].stderr + both[1].stderr
    assert not both[1].stdout                                                     # rank 0 speaks for all
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    for part in ("student", "teacher", "loss"):
        torch.testing.assert_close(one[part], two[part], rtol=1e-5, atol=1e-5)
    start = main.build_network(main.parse_args(flags(images, tmp_path)), 0.0)     # the comparison sees training at all
    assert all((one["student"][key] - value).abs().max() > 1e-4 for key, value in start.state_dict().items() if "norm1.bias" in key)


def test_records_of_a_resume_count_their_own_steps(images, tmp_path):
    arguments = flags(images, tmp_path / "run", "--batch_size_per_gpu", "4", "--save_every", "1", "--epochs", "1")
    assert interrupt.run(arguments, tmp_path, "step", 3, script=main).returncode == -signal.SIGKILL     # noted at 2
    main.main([*arguments, "--print_freq", "3"])
    main.main([*arguments, "--print_freq", "1", "--output_dir", str(tmp_path / "every")])
    mine, every = (utils.read_records(tmp_path / name / "log.txt") for name in ("run", "every"))
    assert mine[-2]["step"] == every[2]["step"] == 3 and mine[-2]["train_loss"] == pytest.approx(every[2]["train_loss"], rel=1e-9)


@pytest.fixture(scope="module")
def two_ranks(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    arguments = ["--batch_size_per_gpu", "2", "--save_every", "1"]
    results = interrupt.run_ranks(flags(images, folder / "run", *arguments), folder, main)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    return folder / "run", arguments


@pytest.mark.parametrize("victim, point, count", [(0, "fsync", 4), (1, "step", 4)])
def test_two_ranks_killed_and_resumed_end_with_the_same_bits(images, two_ranks, tmp_path, victim, point, count):
    arguments = flags(images, tmp_path / "run", *two_ranks[1])
    started = time.monotonic()
    results = interrupt.run_ranks(arguments, tmp_path, main, 2, victim, point, count)
    assert results[victim].returncode == -signal.SIGKILL and results[1 - victim].returncode > 0
    assert time.monotonic() - started < 30
    assert [result.returncode for result in interrupt.run_ranks(arguments, tmp_path, main)] == [0, 0]
    assert_same_run(tmp_path / "run", two_ranks[0])


def test_sigterm_at_one_rank_saves_and_ends_all(images, two_ranks, tmp_path):
    arguments = flags(images, tmp_path / "run", *two_ranks[1][:2])
    results = interrupt.run_ranks(arguments, tmp_path, main, 2, 1, "step", 4, "TERM")
    assert [result.returncode for result in results] == [128 + signal.SIGTERM] * 2
    assert "saved after step 2/3 of epoch 1" in results[0].stderr and not results[1].stderr
    assert load(tmp_path / "run")["step"] == 2


def test_another_number_of_ranks_resumes_if_the_batch_stays(images, two_ranks, tmp_path):
    shutil.copytree(two_ranks[0], tmp_path / "run")
    longer = [*flags(images, tmp_path / "run"), "--save_every", "1"]
    assert "batches of 4 images, 2 a process; here they are 2, 2 a process" in run_here([*longer, "--batch_size_per_gpu", "2"])
    assert interrupt.run([*longer, "--batch_size_per_gpu", "4"], tmp_path, script=main).returncode == 0


def failing_update(rank):
    original = main.update_teacher

    def update(*args):
        if utils.rank() == rank:
            raise RuntimeError("a bug of this rank")
        original(*args)
    return update


@pytest.mark.parametrize("fault", ["bad file", "diverged", "exception"])
def test_a_fault_of_a_rank_ends_all_with_one_message(images, tmp_path, monkeypatch, fault):
    data = shutil.copytree(images, tmp_path / "images")
    arguments = flags(data, tmp_path / "run", "--batch_size_per_gpu", "2")
    if fault == "bad file":
        (data / "train" / "a" / "4.png").write_text("no image")
        message, code = f"error: cannot decode image {data}/train/a/4.png: cannot identify", 2
    elif fault == "diverged":
        arguments += ["--lr", "1e9", "--warmup_epochs", "0", "--clip_grad", "0"]
        message, code = "training diverged", 2
    else:
        monkeypatch.setattr(main, "update_teacher", failing_update(rank=1))
        message, code = "error: rank 1: a bug of this rank", 1
    started = time.monotonic()
    results = interrupt.run_ranks(arguments, tmp_path, main)
    assert time.monotonic() - started < 30
    assert [result.returncode for result in results] == [code, code], results[0].stderr + results[1].stderr
    told = [text for result in results if (text := result.stderr.replace("waiting for 2 processes at localhost\n", ""))]
    assert len(told) == 1 and told[0].count("error: ") == 1 and message in told[0]
    assert ("Traceback" in told[0]) == (fault == "exception")
    assert load(tmp_path / "run")["epoch"] == 0                                    # the last good checkpoint


def test_a_rank_that_no_longer_answers_ends_all(images, tmp_path, monkeypatch):
    """As if killed under nccl: no socket tells of it."""
    monkeypatch.setattr(utils._FaultWatch, "LOST", 6)
    monkeypatch.setattr(interrupt, "PATIENCE", 15)
    results = interrupt.run_ranks(flags(images, tmp_path / "run", "--batch_size_per_gpu", "2"), tmp_path, main, 2, 1, "step", 2, "STOP")
    assert results[0].returncode == 1 and "error: rank 1 no longer answers" in results[0].stderr


def test_ranks_with_different_checkpoints_do_not_start(images, two_ranks, tmp_path):
    def arguments(rank):
        return flags(images, tmp_path / f"run{rank}", *two_ranks[1])
    shutil.copytree(two_ranks[0], tmp_path / "run0")                               # a folder that the second host does not share
    results = interrupt.run_ranks(arguments, tmp_path, main)
    assert [result.returncode for result in results] == [2, 2]
    assert "the processes see different checkpoints or images" in results[0].stderr + results[1].stderr


def test_ranks_share_the_running_statistics(images, tmp_path, monkeypatch):
    original = main.update_teacher

    def update(teacher, student, momentum):
        torch.save(dict(student.named_buffers()), tmp_path / f"buffers{utils.rank()}.pth")
        original(teacher, student, momentum)
    monkeypatch.setattr(main, "update_teacher", update)
    arguments = flags(images, tmp_path / "run", "--batch_size_per_gpu", "2", "--arch", "resnet18", "--epochs", "1", "--knn_every", "1",
                      "--knn_data_path", str(images / "labelled"), without=["--patch_size"])
    assert [result.returncode for result in interrupt.run_ranks(arguments, tmp_path, main)] == [0, 0]
    buffers = [torch.load(tmp_path / f"buffers{rank}.pth") for rank in range(2)]
    assert_same(*buffers)
    assert not torch.equal(buffers[0]["backbone.bn1.running_mean"], torch.zeros(64))


# ------------------------------------------------------------------------------------------------------------- launchers

def launch(launcher, script, arguments, **environment):
    """A launcher's command, run to its end."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    return subprocess.run([*launcher, str(script), *arguments], env=clean | {"OMP_NUM_THREADS": "1"} | environment, cwd=ROOT,
                          capture_output=True, text=True, timeout=120)


def test_the_old_launcher(images, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2", f"--master_port={interrupt.free_port()}"]
    arguments = flags(images, tmp_path / "run", "--batch_size_per_gpu", "2", "--epochs", "1")
    result = launch(launcher, ROOT / "main.py", arguments)
    assert result.returncode == 0, result.stderr
    assert "2 x cpu" in result.stdout and load(tmp_path / "run")["epoch"] == 1


def test_torchrun_restarts_and_the_run_resumes_by_itself(images, tmp_path):
    """Rank 1 fails in its 5th step of the first attempt; the second goes on from the checkpoint."""
    script = tmp_path / "failing.py"
    script.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport main, utils\n"
                      "original, calls = main.update_teacher, []\n"
                      "def update(*args):\n"
                      "    calls.append(1)\n"
                      "    if (os.environ['TORCHELASTIC_RESTART_COUNT'], os.environ['RANK'], len(calls)) == ('0', '1', 5):\n"
                      "        raise RuntimeError('once')\n"
                      "    original(*args)\n"
                      "main.update_teacher = update\n"
                      "utils.run_script(main.main)\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1", "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0"]
    result = launch(launcher, script, flags(images, tmp_path / "run", "--batch_size_per_gpu", "2"))
    assert result.returncode == 0, result.stderr
    assert "rank 1: once" in result.stderr and "; epoch 1, step 0;" in result.stdout
    assert load(tmp_path / "run")["epoch"] == 2


def test_slurm_without_a_launcher(images, tmp_path):
    results = interrupt.run_ranks(flags(images, tmp_path / "run", "--batch_size_per_gpu", "2", "--epochs", "1"), tmp_path, main,
                                  variables=("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert "2 x cpu" in results[0].stdout


@pytest.mark.parametrize("given, expected", [
    ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[07-09,12],login", "SLURM_JOB_ID": "41"},
     {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "20041"}),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node-1,node-2", "MASTER_PORT": "5"},
     {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node-1", "MASTER_PORT": "5"}),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {}),                                             # one task: no group
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, {}),               # one task of a larger job
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "RANK": "1", "WORLD_SIZE": "4"}, {"RANK": "1", "WORLD_SIZE": "4"}),  # torchrun in a job
])
def test_what_slurm_says(monkeypatch, given, expected):
    monkeypatch.setattr(os, "environ", dict(given))
    utils._read_slurm()
    assert {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} == expected


# ------------------------------------------------------------------------------------------------------- bad input, flags

@pytest.mark.parametrize("arguments, message", [
    (["--data_path", "/nowhere"], "no folder /nowhere"),
    (["--batch_size_per_gpu", "64"], "more than the data set's 12"),
    (["--batch_size_per_gpu", "1"], "at least 2"),
    (["--teacher", "none", "--momentum_teacher", "0.9"], "--momentum_teacher, --local_crops_number, --local_crops_size cannot be used"),
    (["--teacher_temp", "0.1"], "--teacher_temp cannot be used with --preset paper"),
    (["--preset", "released-imagenet", "--negative_weight", "3"], "--negative_weight cannot be used with --preset released-imagenet"),
    (["--arch", "resnet18"], "--patch_size cannot be used with --arch resnet18"),
    (["--use_fp16", "true"], "--amp cannot be used with --use_fp16"),
    (["--global_crops_size", "20"], "crops of 20 pixels are no multiple of --patch_size 8"),
    (["--global_crops_scale", "0.9", "0.1"], "--global_crops_scale needs 0 < MIN <= MAX"),
    (["--local_crops_number", "0"], "--local_crops_size cannot be used with --local_crops_number 0"),
    (["--rand_augment", "strong"], "timm knows no RandAugment 'strong'"),
    (["--learn", "none", "--weights_lr", "0.1"], "--weights_lr cannot be used with --learn none"),
    (["--knn_every", "1"], "--knn_every and --knn_data_path need each other"),
    (["--device", "cuda"], "device 'cuda' is not available here"),
    (["--negative_weight", "-1"], "negative_weight must be a positive number"),
])
def test_bad_flags_get_one_line(images, tmp_path, arguments, message):
    text = run_here(flags(images, tmp_path / "run", "--batch_size_per_gpu", "4", *arguments))
    assert message in text and "\n" not in text


def test_an_unknown_arch(images, tmp_path):
    arguments = flags(images, tmp_path, "--batch_size_per_gpu", "4", "--arch", "vit_smal", without=["--patch_size"])
    assert "unknown arch 'vit_smal': did you mean vit_small" in run_here(arguments)


def test_a_model_of_timm_takes_crops_of_two_sizes_or_says_so(images, tmp_path):
    arguments = flags(images, tmp_path, "--batch_size_per_gpu", "4", "--arch", "timm/vit_tiny_patch16_224", "--global_crops_size", "32",
                      "--local_crops_size", "16", without=["--patch_size"])
    run = main.Run(main.parse_args(arguments), torch.device("cpu"))
    assert run.student(run.augment(first_parts(run)[0][0])).shape == (4, 4, 32)
    arguments[arguments.index("timm/vit_tiny_patch16_224")] = "timm/mixer_s32_224"
    assert "cannot take crops of" in run_here(arguments)


def test_a_folder_of_splits_is_not_a_training_set(images, tmp_path):
    assert "give the images to train on" in run_here(flags(images, tmp_path, "--data_path", str(images / "labelled")))


def test_contradicting_flags_on_resume(images, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    arguments = flags(images, tmp_path / "run", *uninterrupted[2])
    assert "--seed 0 there, 1 here" in run_here([*arguments, "--seed", "1"])
    assert "trained on other images: 12 there" in run_here([*arguments, "--data_path", str(images / "flat")])
    (tmp_path / "run" / "checkpoint.pth").write_bytes(b"broken")
    assert "cannot read checkpoint" in run_here(arguments)
    (tmp_path / "run" / "checkpoint.pth").unlink()
    assert "whose checkpoint is gone" in run_here(arguments)


def test_a_flat_folder_and_images_that_cannot_be_decoded(images, tmp_path):
    data = shutil.copytree(images / "flat", tmp_path / "flat")
    (data / "3.png").write_text("no image")
    arguments = flags(images, tmp_path / "run", "--data_path", str(data), "--batch_size_per_gpu", "4", "--num_workers", "2")
    assert run_here(arguments) == (f"cannot decode image {data}/3.png: cannot identify image file '{data}/3.png'; replace it by an image "
                                   "of the same name, or add --skip_bad_images")
    main.main([*arguments, "--skip_bad_images"])                                   # it goes on
    assert [r["skipped"] for r in utils.read_records(tmp_path / "run" / "log.txt") if "step" not in r] == [1, 1]


# ------------------------------------------------------------------------------------------------------------- its parts

def make_run(images, output, *more):
    return main.Run(main.parse_args(flags(images, output, "--batch_size_per_gpu", "4", *more)), torch.device("cpu"))


def first_parts(run, count=1):
    batches = iter(main.make_loader(run))
    return [next(batches) for _ in range(count)]


def test_samples_do_not_depend_on_workers_or_ranks(images, tmp_path, monkeypatch):
    run = make_run(images, tmp_path)
    whole = first_parts(run)[0]
    run.args.num_workers = 2
    assert_same(first_parts(run)[0], whole)
    run.args.num_workers, run.args.batch_size_per_gpu = 0, 2
    for rank in range(2):
        monkeypatch.setattr(utils, "rank", lambda: rank)
        own = first_parts(run)[0]
        assert torch.equal(own[0].global_crops, whole[0].global_crops[2 * rank:2 * rank + 2])
    run.epoch = 1
    assert not torch.equal(first_parts(run)[0][0].randoms, own[0].randoms)


def test_workers_are_out_of_the_groups_reach_but_not_of_their_owners(images, tmp_path):
    """Python terminates and joins what is left of them at its exit: one that took no notice would hold it up for ever."""
    run = make_run(images, tmp_path, "--num_workers", "1")
    others = multiprocessing.active_children()
    batches = iter(main.make_loader(run))
    next(batches)
    worker, = set(multiprocessing.active_children()) - set(others)
    assert os.getpgid(worker.pid) != os.getpgid(0)
    worker.terminate()
    worker.join(20)
    assert not worker.is_alive()
    del batches


@pytest.mark.parametrize("more", [[], ["--arch", "resnet18", "--use_bn_in_head", "true"]])
def test_the_teacher_is_the_students_moving_average(images, tmp_path, more):
    """Parameters and buffers by the formula; no gradient reaches the teacher, and its own forward leaves its statistics alone."""
    arguments = flags(images, tmp_path, "--batch_size_per_gpu", "4", "--momentum_teacher", "0.75", *more,
                      without=["--patch_size"] if more else ())
    run = main.Run(main.parse_args(arguments), torch.device("cpu"))
    before = copy.deepcopy(run.teacher.state_dict())
    assert_same(before, run.student.state_dict())
    main.set_schedules(run)
    main.train_step(run, first_parts(run), stop=False)
    moved = 0
    for key, value in run.teacher.state_dict().items():
        student = run.student.state_dict()[key]
        expected = 0.75 * before[key] + 0.25 * student if value.is_floating_point() else student
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
        moved += not torch.equal(value, before[key])
    assert moved > len(before) / 2
    assert all(p.grad is None and not p.requires_grad for p in run.teacher.parameters())


def test_the_objectives_that_flags_choose(images, tmp_path):
    for more, without, expected in [
        ([], (), lambda run, teacher, student: run.criterion.teacher_student(teacher, student)),
        (["--teacher", "none"], ("--local_crops_size", "--local_crops_number"),
         lambda run, teacher, student: run.criterion(student[0], student[1])),
    ]:
        arguments = flags(images, tmp_path, "--batch_size_per_gpu", "4", "--drop_path_rate", "0", *more, without=without)
        run = main.Run(main.parse_args(arguments), torch.device("cpu"))
        views = run.augment(first_parts(run)[0][0])
        student = torch.cat([run.student(view) for view in views])                # one view at a time
        teacher = torch.cat([run.student(view) for view in views[:2]])            # the teacher starts as a copy
        torch.testing.assert_close(main.compute_loss(run, views), expected(run, teacher, student))


def test_accumulated_gradients_are_the_mean_over_batches(images, tmp_path):
    run = make_run(images, tmp_path, "--accum_iter", "2", "--drop_path_rate", "0", "--clip_grad", "0", "--freeze_last_layer", "0")
    parts = first_parts(run, 2)
    expected = []
    for crops, _ in parts:
        run.student.zero_grad()
        main.compute_loss(run, run.augment(crops)).backward()
        expected.append([p.grad.clone() for p in run.student.parameters() if p.requires_grad])
    main.set_schedules(run)
    main.train_step(run, parts, stop=False)
    for mine, *theirs in zip([p.grad for p in run.student.parameters() if p.requires_grad], *expected, strict=True):
        torch.testing.assert_close(mine, sum(theirs) / 2)


def test_clipping_is_per_parameter():
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    grads = [torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.3, 0.4, 0.0])]
    for parameter, grad in zip(parameters, grads):
        parameter.grad = grad.clone()
    main.clip_gradients(parameters, 2.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([1.2, 1.6, 0.0]))
    assert torch.equal(parameters[1].grad, grads[1]) and parameters[2].grad is None
    main.clip_gradients(parameters, 0.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([1.2, 1.6, 0.0]))


def test_the_last_layer_waits_and_gains_and_biases_do_not_decay(images, tmp_path):
    run = make_run(images, tmp_path, "--norm_last_layer", "false", "--lr", "1", "--warmup_epochs", "0")
    before = copy.deepcopy(run.student.state_dict())
    main.set_schedules(run)
    main.train_step(run, first_parts(run), stop=False)
    moved = {name for name, value in run.student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and not any("last_layer" in name for name in moved)
    run.epoch = 1
    main.train_step(run, first_parts(run), stop=False)
    assert all(not torch.equal(p, before[name]) for name, p in run.student.named_parameters() if "last_layer" in name)
    names = {id(p): name for name, p in run.student.named_parameters()}
    decayed, others = run.optimizers["optimizer"].param_groups
    assert decayed["weight_decay"] > 0 and others["weight_decay"] == 0
    assert all(name.endswith(("bias", "original0")) or "norm" in name for name in (names[id(p)] for p in others["params"]))
    assert not any(name.endswith(("bias", "original0")) or "norm" in name for name in (names[id(p)] for p in decayed["params"]))
    ascending = {group["params"][0]: group["maximize"] for group in run.optimizers["weights_optimizer"].param_groups}
    assert [ascending[getattr(run.criterion, name)] for name in ("a", "b", "alpha")] == [False, False, True]


def test_schedules_at_their_edges(images, tmp_path):
    run = make_run(images, tmp_path, "--lr", "0.64", "--min_lr", "1e-3", "--warmup_epochs", "1", "--epochs", "3", "--weights_lr", "0.5")
    peak = 0.64 * 4 / 256
    seen = []
    for run.epoch in range(3):
        for run.step in range(run.steps):
            main.set_schedules(run)
            decayed, others = run.optimizers["optimizer"].param_groups
            weight = run.optimizers["weights_optimizer"].param_groups[0]
            assert others["lr"] == decayed["lr"] and others["weight_decay"] == 0 and weight["lr"] == pytest.approx(50 * decayed["lr"])
            seen.append((decayed["lr"], decayed["weight_decay"], run.momentum))
    rates, decays, momenta = zip(*seen)
    assert rates[:4] == pytest.approx([peak / 3, peak * 2 / 3, peak, peak]) and rates[-1] == pytest.approx(1e-3)
    assert decays[0] == pytest.approx(0.04) and decays[-1] == pytest.approx(0.4) and momenta[0] == 0.996 and momenta[-1] == 1.0
    run = make_run(images, tmp_path, "--warmup_epochs", "10", "--epochs", "1")     # a warm-up longer than the run
    run.step = run.steps - 1
    main.set_schedules(run)
    assert run.optimizers["optimizer"].param_groups[0]["lr"] == pytest.approx(5e-4 * 4 / 256 * 3 / 30)


def test_the_released_objective_and_its_temperature(images, tmp_path):
    run = make_run(images, tmp_path, "--preset", "released-imagenet", "--teacher_temp", "0.1", "--warmup_teacher_temp_epochs", "2")
    assert run.augment.erasing == 0.2 and run.images.crop.rand_augment and "weights_optimizer" not in run.optimizers
    temperatures = []
    for run.epoch in range(4):
        main.set_schedules(run)
        temperatures.append(run.criterion.teacher_temp)
    assert temperatures == pytest.approx([0.04, 0.07, 0.1, 0.1])
    assert main.train_step(run, first_parts(run), stop=False)[0] > 50              # (h - 10)^2 with h near 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_every_optimizer_and_precision_learns(images, tmp_path, optimizer, amp):
    run = make_run(images, tmp_path, "--optimizer", optimizer, "--amp", amp, "--warmup_epochs", "0", "--freeze_last_layer", "0",
                   "--lr", {"adamw": "0.1", "sgd": "3", "lars": "30"}[optimizer])
    parts = first_parts(run)
    main.set_schedules(run)
    run.momentum = 1.0                                                             # a teacher that stands still
    with run.autocast():
        assert run.network(run.augment(parts[0][0])).dtype == {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    assert run.scaler.is_enabled() == (amp == "fp16")
    losses = [main.train_step(run, parts, stop=False)[0].item() for _ in range(8)]
    assert losses[-1] < losses[0] - 0.01
    assert 0 < abs(run.criterion.alpha.item() - 1) < 0.1


def test_activation_checkpointing_changes_no_weight(images, tmp_path):
    states = []
    for more in ([], ["--grad_checkpointing"]):
        run = make_run(images, tmp_path, "--drop_path_rate", "0", *more)
        main.set_schedules(run)
        assert run.student.backbone.grad_checkpointing == bool(more)
        main.train_step(run, first_parts(run), stop=False)
        states.append(run.student.state_dict())
    torch.testing.assert_close(*states)


def test_timm_loads_the_exported_backbone(images, uninterrupted):
    path = uninterrupted[0] / "backbone.safetensors"
    model = timm.create_model("vit_tiny_patch16_224", patch_size=8, img_size=16, depth=2, num_classes=0, checkpoint_path=str(path))
    for key, value in model.state_dict().items():
        assert torch.equal(value, load(uninterrupted[0])["teacher"][f"backbone.{key}"])
