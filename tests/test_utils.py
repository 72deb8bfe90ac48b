"""Errors, flags, schedules, seeds, checkpoints, the lock and the log, at their edges."""
import csv
import errno
import json
import math
import os
import re
import resource
import signal
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import utils
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from utils import UserError

RECIPES = {"paper": {"learn": ("a", "b"), "weights_lr": 0.1, "lr": 1e-3},
           "released-x": {"learn": (), "weights_lr": 0.0, "lr": 1e-2}}


def run_script(function, capfd, code=2, **environment):
    """What a script whose main is `function` writes to stderr, in a forked process that ends with `code`."""
    if (pid := os.fork()) == 0:
        os.environ.update(environment)
        ended = 0
        try:
            utils.run_script(function)
        except SystemExit as error:
            ended = error.code
        except BaseException as error:
            print("traceback", type(error).__name__, file=sys.stderr, flush=True)
            ended = 99
        os._exit(ended)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    return capfd.readouterr().err


def raises(error):
    def main():
        raise error
    return main


# ----------------------------------------------------------------------------------------------------- errors

def test_errors_of_users_are_one_line(capfd, tmp_path):
    assert run_script(raises(UserError("no\n images;  add some")), capfd) == "error: no images; add some\n"
    in_worker = UserError("Caught UserError in DataLoader worker 0.\nTraceback\nutils.UserError: text\n")
    assert run_script(raises(in_worker), capfd) == "error: text\n"
    message = run_script(lambda: open(tmp_path / "x"), capfd)
    assert message == f"error: No such file or directory: {tmp_path}/x\n"
    full = OSError(errno.ENOSPC, "No space left on device")
    assert run_script(raises(full), capfd) == "error: No space left on device\n"
    (tmp_path / "x").write_text("")
    message = run_script(lambda: utils.lock_folder(tmp_path / "x" / "run"), capfd)
    assert message == f"error: Not a directory: {tmp_path}/x/run\n"
    assert run_script(raises(KeyboardInterrupt()), capfd, 130) == ""
    assert run_script(raises(RuntimeError("gloo: timed out")), capfd, 99) == "traceback RuntimeError\n"


def test_errors_of_several_ranks(capfd, tmp_path):
    ranks = {"WORLD_SIZE": "2", "RANK": "1", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    lost = RuntimeError("[gloo/pair.cc:5] Connection closed by peer [1]")
    message = run_script(raises(lost), capfd, 1, **ranks)
    assert message.startswith("error: rank 1: lost contact with another rank") and message.count("\n") == 1
    assert "Connection closed by peer [1]" in message
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == message.strip()
    message = run_script(raises(RuntimeError("a defect")), capfd, 99, **ranks)
    assert message == "traceback RuntimeError\n"
    assert run_script(raises(UserError("text")), capfd, 2, **ranks | {"RANK": "0"}) == "error: text\n"


def test_standard_output_may_be_closed(capfd):
    def main():
        reader, writer = os.pipe()
        os.dup2(writer, sys.stdout.fileno())
        os.close(reader)
        sys.stdout = open(sys.stdout.fileno(), "w", closefd=False)  # buffered
        print("text")
    assert run_script(main, capfd) == "error: standard output was closed\n"


# ------------------------------------------------------------------------------------------------------ flags

@pytest.mark.parametrize("kind, text, message", [
    (utils.positive_float, "0", "must be a number from 1e-30 to 1000000000, got '0'"),
    (utils.non_negative_float, "nan", "must be a number from 0 to 1000000000, got 'nan'"),
    (utils.positive_int, "1.5", "must be a whole number from 1 to 2147483647, got '1.5'"),
    (utils.non_negative_int, str(2**63), "must be a whole number from 0 to 9.22337203685e+18, got '92"),
    (utils.probability, "1.1", "must be a number from 0 to 1, got '1.1'"),
    (utils.number_or_sum, "all", "must be a number from 1e-30"), (utils.path, "", "is empty; name a file or"),
    (utils.boolean, "maybe", "must be true or false, got 'maybe'")])
def test_values_that_flags_refuse(kind, text, message):
    parser = utils.ArgumentParser("")
    parser.add_argument("--lr", type=kind)
    with pytest.raises(UserError, match="^argument --lr: ") as error:
        parser.parse_args(["--lr", text])
    assert message in str(error.value) and str(error.value).endswith("; see --help")


def test_values_that_flags_take():
    assert utils.number_or_sum("sum") == "sum" and utils.number_or_sum("2") == 2
    assert [utils.boolean(text) for text in ("True", "0")] == [True, False]
    assert utils.non_negative_int(str(2**63 - 1)) == 2**63 - 1
    assert utils.plain(Namespace(x=Path("a"), y=[1])) == {"x": "a", "y": [1]}
    args = Namespace(scale=[0.5, 0.2], amp=None, off=False)
    with pytest.raises(UserError, match="--scale needs 0 < MIN <= MAX <= 1, got 0.5 0.2"):
        utils.check_range(args, "scale", 1)
    utils.refuse(args, ("amp", "off"), "here")
    with pytest.raises(UserError, match="^--scale cannot be used here; leave it out$"):
        utils.refuse(args, ("amp", "scale"), "here")


def objective(*argv):
    parser = utils.ArgumentParser("")
    utils.add_objective_flags(parser, RECIPES)
    parser.add_argument("--lr", type=utils.positive_float, help=utils.by_preset("rate", RECIPES, "lr"))
    args = parser.parse_args(argv)
    utils.complete_objective_flags(args, RECIPES)
    return args, parser


def test_presets_fill_in_the_flags_that_are_not_given():
    args, parser = objective("--negative_weight", "sum")
    assert (args.learn, args.weights_lr, args.lr) == (["a", "b"], 0.1, 1e-3)
    assert utils.objective_arguments(args) == {"negative_weight": "sum", "learn": ("a", "b")}
    assert "rate (default: 0.001; 0.01 for released-x)" in parser.format_help()
    assert objective("--preset", "released-x", "--lr", "2")[0].lr == 2
    assert objective("--learn", "none")[0].learn == []
    for argv, message in ((["--preset", "released-x", "--negative_weight", "1"], "--negative_weight cannot"),
                          (["--learn", "none", "--weights_lr", "1"], "--weights_lr cannot be used with")):
        with pytest.raises(UserError, match=message):
            objective(*argv)


# ----------------------------------------------------------------------------------- device, seeds, schedules

def test_amp_is_bf16_only_where_asked_or_native(monkeypatch):
    cpu = torch.device("cpu")
    assert utils.select_amp("none", cpu) is None and utils.select_amp("bf16", cpu) is torch.bfloat16
    assert utils.select_amp("fp16", cpu) is torch.float16
    assert utils.select_amp("auto", torch.device("mps")) is None
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
        assert utils.select_amp("auto", cpu) is (torch.bfloat16 if native else None)
    for dtype in (torch.bfloat16, None):
        with utils.autocast(cpu, dtype):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is (dtype or torch.float32)


def test_devices_that_are_not_there(monkeypatch):
    for name in ("cuda", "cuda:7", "gpu", "meta", ""):
        with pytest.raises(UserError, match=f"device '{name}' is not available here; use --device .*cpu"):
            utils.select_device(name)
    assert utils.select_device("auto").type in ("cpu", "mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert utils.select_device("auto") == torch.device("cuda") and utils.select_device("cuda:1").index == 1
    with pytest.raises(UserError, match="cuda:2"):
        utils.select_device("cuda:2")


def test_cosine_schedule_by_formula():
    values = [utils.cosine_schedule(step, 12, base=2.0, final=0.5, warmup_steps=4) for step in range(12)]
    assert values[:4] == [0.5, 1.0, 1.5, 2.0]
    for step in range(4, 12):
        assert values[step] == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi * (step - 4) / 7)))
    assert values[4] == 2.0 and values[-1] == pytest.approx(0.5)


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (2, 1), (5, 5), (5, 50)])
def test_cosine_schedule_at_the_edges(steps, warmup):
    values = [utils.cosine_schedule(step, steps, 1.0, 0.0, warmup) for step in range(steps + 2)]
    assert all(0 <= value <= 1 for value in values)
    if warmup >= steps:  # a run within its warm-up only rises
        assert values[:steps] == sorted(values[:steps]) and values[0] == 1 / warmup


def test_stream_seeds_are_reproducible_and_distinct():
    seeds = [utils.stream_seed(*keys) for keys in [(0,), (1,), (0, 1), (1, 0), (0, 0), (0, 0, 1), (0, 1, 0)]]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert utils.stream_seed(0, 1) == seeds[2]
    batches = [batch.tolist() for batch in utils.epoch_batches(11, 3, seed=0, epoch=1)]
    assert len({index for batch in batches for index in batch}) == 9 and max(map(max, batches)) < 11
    assert [batch.tolist() for batch in utils.epoch_batches(11, 3, 0, 1, start=1)] == batches[1:]
    assert [batch.tolist() for batch in utils.epoch_batches(11, 3, 0, 2)] != batches


# ------------------------------------------------------------------------------------------------ checkpoints

def test_a_full_disk_keeps_the_old_file(tmp_path, capfd):
    path = tmp_path / "checkpoint.pth"

    def fill(state):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        utils.save_checkpoint(state, path)
    large = {"x": torch.zeros(50_000)}
    assert "cannot write" in run_script(lambda: fill(large), capfd) and not path.exists()
    utils.save_checkpoint({"x": 1}, path)
    message = run_script(lambda: fill(large), capfd)
    assert message == (f"error: cannot write {path}: File too large. Its former content, if any, is "
                       "intact. Free space, then run the same command again\n")
    assert utils.load_checkpoint(path) == {"x": 1} and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RuntimeError, match="a defect"):
        utils.replace_file(path, lambda file: raises(RuntimeError("a defect"))(), "wb")
    assert utils.load_checkpoint(path) == {"x": 1}


def test_checkpoints_that_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pth"

    def refused(message, *advice):
        with pytest.raises(UserError, match=message) as error:
            utils.load_checkpoint(path, *advice)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    refused("no checkpoint at")
    utils.save_checkpoint({"x": torch.ones(999), "args": {"lr": 0.1}}, path)
    assert utils.load_checkpoint(path)["args"] == {"lr": 0.1}
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"garbage", b"<html>", bytes(100)):
        path.write_bytes(content)
        refused("damaged.*restore a copy", "trust it")

    class Malicious:
        def __reduce__(self):
            return (tmp_path.joinpath("hacked").touch, ())
    for legacy in (False, True):
        torch.save({"x": Malicious()}, path, _use_new_zipfile_serialization=not legacy)
        refused("holds more than tensors and plain data, which is not loaded; trust it", "trust it")
    assert not (tmp_path / "hacked").exists()
    torch.save([1, 2], path)
    refused("it holds a list, not a dict")
    with pytest.raises(IsADirectoryError):
        utils.load_checkpoint(tmp_path)


def test_only_the_same_run_is_resumed(tmp_path):
    path, args = tmp_path / "checkpoint.pth", Namespace(lr=0.1, size=[1, 2], data_path=Path("a"), workers=3)
    assert utils.read_resume(args, path, ()) is None
    (tmp_path / "log.txt").write_text("{}\n")
    with pytest.raises(UserError, match="log.txt belongs to another run, or checkpoint.pth is gone"):
        utils.read_resume(args, path, ())
    utils.save_checkpoint({"args": utils.plain(args), "data": [5, "x"]}, path)
    args.workers = 4
    state = utils.read_resume(args, path, ("workers",))
    args.size = [1, 3]
    with pytest.raises(UserError, match="--size 1 2 there, 1 3 here; --workers 3 there, 4 here. Resume"):
        utils.read_resume(args, path, ())
    utils.check_same_data(state, [5, "x"], path)
    for other in (state, {}):
        with pytest.raises(UserError, match=r"other images \(number there: (5|unknown), here: 6\)"):
            utils.check_same_data(other, [6, "x"], path)
    layer = torch.nn.Linear(2, 1)
    utils.load_parts({"a": torch.nn.Linear(2, 1).state_dict()}, {"a": layer}, path)
    for bad in ({}, {"a": 3}, {"a": torch.nn.Linear(3, 1).state_dict()}):
        with pytest.raises(UserError, match="does not fit this run's a: [^\n]*; move it away$"):
            utils.load_parts(bad, {"a": layer}, path)
    utils.save_checkpoint({"x": 1}, path)
    with pytest.raises(UserError, match="lacks its flags"):
        utils.read_resume(args, path, ())


def test_one_process_writes_to_a_folder(tmp_path, capfd):
    folder = tmp_path / "a" / "run"
    file = utils.lock_folder(folder)
    again = utils.lock_folder(folder)
    message = run_script(lambda: utils.lock_folder(folder), capfd)
    assert f"another run writes to {folder} (process {os.getpid()} on {os.uname().nodename}); wait" in message
    again.close()
    file.close()
    if (pid := os.fork()) == 0:
        utils.lock_folder(folder)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    utils.lock_folder(folder).close()
    assert (folder / "run.lock").read_text().startswith(f"process {os.getpid()} on ")


# -------------------------------------------------------------------------------------------------------- log

VALUES = {"train_loss": 0.98765, "train_lr": 1.2345e-5, "positive": 0.61234, "negative": -0.12345,
          "a": -1.2e-5, "b": 0.0, "alpha": 1.0, "images_per_s": 12345.6}
STEP = {"epoch": 0, "step": 50, "train_wd": 0.04, **VALUES, "data_wait": 0.0123456, "memory_gb": 11.987,
        "hours_left": 123.456}
ACCURACY = {"train_loss": None, "test_acc@1": 39.123456, "test_acc@5": 90.0, "test_auc": 0.987654}


def test_the_screen_is_an_aligned_table(tmp_path, capsys):
    epoch = {name: STEP[name] for name in STEP if name != "step"} | {"knn_acc@1": 7.1, "knn_acc@5": 9.0}
    untrained = {"epoch": -1, **ACCURACY, **VALUES, "train_lr": None, "images_per_s": None, "seconds": 1234.5}
    trained = untrained | VALUES | {"epoch": 0, "train_loss": -0.98765}
    for records, headers, epochs in (([STEP, STEP, epoch, STEP | {"epoch": 1}], [0, 3], [1, 1, 1, 2]),
                                     ([untrained, trained], [0], [0, 1])):
        log = utils.RunLog(tmp_path / str(len(records)), (0, 0), steps=100)
        for record in records:
            log.write(record)
        lines = capsys.readouterr().out.splitlines()
        assert [index for index, line in enumerate(lines) if "epoch" in line] == headers
        for index, line in enumerate(lines):
            header = lines[max(start for start in headers if start <= index)]
            assert len(line) == len(header) <= 120
            ends = [match.end() for match in re.finditer(r"\S+", header)]  # every column's right edge
            assert all(match.end() in ends for match in re.finditer(r"\S+", line))
        assert [int(line.split()[0]) for line in lines if "epoch" not in line] == epochs
        assert "12346" in lines[-1].split() and "-1e-05" in lines[-1].split()


def test_the_log_is_only_ever_appended_to(tmp_path, capsys):
    path = tmp_path / "log.txt"
    old = [b'{"epoch": -1, "x": 1.5}', b"no JSON", b'{"x": 1}', b"[1]", b'{"epoch": "2"}',
           b'{"epoch": 0, "step": 2}', b'{"epoch": 0, "x": 0}', b'{"epoch": 0, "step": 4}',
           b'{"epoch": 0, "x": 1}', b'{"epoch": 1, "step": 2}', b'{"epoch": 1, "lo']
    path.write_bytes(b"\n".join(old))
    log = utils.RunLog(tmp_path, (1, 1), steps=4)
    assert "has 5 lines that are no record, first line 2; they are kept" in capsys.readouterr().err
    first = [{"epoch": -1, "x": 1.5}, {"epoch": 0, "step": 2}, {"epoch": 0, "step": 4}, {"epoch": 0, "x": 1}]
    assert log.records == first
    log.write({"epoch": 1, "step": 2, "x": 3.0})
    log.write({"epoch": 1, "x": 4.0})
    new = [b'{"epoch": 1, "step": 2, "x": 3.0}', b'{"epoch": 1, "x": 4.0}']
    assert path.read_bytes().splitlines() == old + new
    assert utils.read_records(path) == log.records == first + [json.loads(line) for line in new]
    for position, count in (((1, 2), 5), ((1, 0), 4), ((0, 4), 3), ((0, 0), 1)):
        assert len(utils.RunLog(tmp_path, position, steps=4).records) == count
    path.unlink()
    log.write({"epoch": 2})
    assert path.read_text() == '{"epoch": 2}\n'


def test_tensorboard_counts_epochs_from_one(tmp_path):
    log = utils.RunLog(tmp_path, (0, 0), steps=4)
    for record in ({"epoch": -1, "x": 5, "y": None}, {"epoch": 0, "step": 3, "x": 6}, {"epoch": 0, "x": 7}):
        log.write(record)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {name: [(event.step, event.value) for event in events.Scalars(name)]
            for name in events.Tags()["scalars"]} == {"epochs/x": [(0, 5), (1, 7)], "steps/x": [(3, 6)]}


def test_the_table_never_loses_a_row(tmp_path):
    path, log = tmp_path / "table.csv", utils.RunLog(tmp_path, (0, 0), table="table.csv")
    for epoch in (-1, 0, 1):
        log.write({"epoch": epoch, "loss": epoch / 3})
    log.write({"epoch": 1, "step": 3, "loss": 9})
    (tmp_path / "log.txt").unlink()
    log = utils.RunLog(tmp_path, (1, 0), table="table.csv")
    log.write({"epoch": 1, "loss": 7.0, "accuracy": 3})
    with open(path) as file:
        assert list(csv.reader(file)) == [["epoch", "loss", "accuracy"], ["-1", str(-1 / 3), ""],
                                          ["0", "0.0", ""], ["1", "7.0", "3"]]
    for content in ("a,b\n1,2\n", "epoch,x\none,2\n"):
        path.write_text(content)
        with pytest.raises(UserError, match="table.csv is no table of epochs; move it away"):
            utils.RunLog(tmp_path, (1, 0), table="table.csv")
        assert path.read_text() == content


def test_a_full_disk_is_one_line_in_the_log_and_in_tensorboard(tmp_path, monkeypatch):
    full = raises(OSError(errno.ENOSPC, "No space left on device"))
    for number, place in enumerate(("log.board.add_scalar", "writer.add_event", "writer.flush")):
        log = utils.RunLog(tmp_path / str(number), (0, 0))
        writer = log.board._get_file_writer().event_writer
        owner, name = place.rsplit(".", 1)
        monkeypatch.setattr({"log.board": log.board, "writer": writer}[owner], name, lambda *args: full())
        with pytest.raises(UserError, match=f"^cannot write to {log.path.parent}: No space left on device"):
            log.write({"epoch": 0, "x": 1.0})


def test_progress_is_quiet_in_a_file_and_a_bar_on_a_terminal(capsys, monkeypatch):
    assert list(utils.progress(range(2, 6), 2, 6, "epoch 1/2", quiet=True)) == [2, 3, 4, 5]
    assert capsys.readouterr().err == ""
    list(utils.progress(range(2, 6), 2, 6, "epoch 1/2"))
    assert "epoch 1/2:  33%" in capsys.readouterr().err
