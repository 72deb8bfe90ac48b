"""Errors, flags, schedules, seeds, checkpoints, the lock and the log, at their edges."""
import csv
import errno
import json
import os
import re
import resource
import signal
import sys
import threading
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import interrupt
import pytest
import torch
import utils
from conftest import Malicious, refusal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from utils import UserError

RECIPES = {"paper": {"widths": (8, 4), "weights_lr": 0.1, "lr": 1e-3},
           "released-x": {"widths": (2,), "weights_lr": 0.0, "lr": 1e-2}}
FULL = OSError(errno.ENOSPC, "No space left on device")
LOST = RuntimeError("[gloo/pair.cc:5] Connection closed by peer [1]")


@pytest.fixture
def end(tmp_path_factory):
    """Runs a function as a script, in a fork: its exit code and what it writes to stderr."""
    def run(function):
        script = SimpleNamespace(main=lambda arguments: function())
        ended = interrupt.run([], tmp_path_factory.mktemp("fork"), script=script)
        return ended.returncode, ended.stderr
    return run


def raises(error):
    def main(*args, **kwargs):
        raise error
    return main


# ----------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize("error, code, line", [
    (UserError("no\n images;  add some"), 2, "error: no images; add some\n"),
    (UserError("Caught UserError in DataLoader worker 0.\nTraceback\nutils.UserError: text\n"), 2,
     "error: text\n"),
    (OSError(errno.ENOENT, "No such file", "x/y"), 2, "error: No such file: x/y\n"),
    (FULL, 2, "error: No space left on device\n"), (KeyboardInterrupt(), 130, "")])
def test_errors_of_users_are_one_line(end, error, code, line):
    assert end(raises(error)) == (code, line)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory\nmore"), MemoryError()])
def test_too_little_memory_is_one_line_with_advice(end, error):
    code, message = end(raises(error))
    assert code == 1 and message.endswith("out of memory; lower the batch, image or network size\n")
    code, message = end(lambda: torch.empty(2**60))
    assert code == 1 and "you tried to allocate" in message
    assert message.startswith("error: rank 0: ") and message.count("\n") == 1


def test_errors_of_several_ranks(end, tmp_path, monkeypatch):
    code, message = end(raises(LOST))
    assert code == 1 and message.startswith("Traceback")  # a single process: a defect
    for name, value in ("WORLD_SIZE", "2"), ("RANK", "1"), ("TORCHELASTIC_ERROR_FILE", tmp_path / "x.json"):
        monkeypatch.setenv(name, str(value))
    code, message = end(raises(LOST))
    assert code == 1 and message.startswith("error: rank 1: lost contact with another rank")
    assert message.count("\n") == 1 and str(LOST) in message
    assert json.loads((tmp_path / "x.json").read_text())["message"]["message"] == message.strip()
    assert end(raises(RuntimeError("a defect")))[1].startswith("Traceback")
    monkeypatch.setenv("RANK", "0")
    assert end(raises(UserError("text"))) == (2, "error: text\n")


def test_standard_output_may_be_closed(end):
    def main():
        reader, writer = os.pipe()
        os.dup2(writer, sys.stdout.fileno())
        os.close(reader)
        sys.stdout = open(sys.stdout.fileno(), "w", closefd=False)  # buffered
        print("text")
    assert end(main) == (2, "error: standard output was closed\n")


# ------------------------------------------------------------------------------------------------------ flags

@pytest.mark.parametrize("kind, text, message", [
    (utils.positive_float, "0", "must be a number from 1e-30 to 1000000000, got '0'"),
    (utils.non_negative_float, "nan", "must be a number from 0 to 1000000000, got 'nan'"),
    (utils.pixels, "1.5", "must be a whole number from 1 to 4096, got '1.5'"),
    (utils.number_or_sum, "all", "must be a number from 1e-30"), (utils.path, "", "is empty; name a file or"),
    (utils.boolean, "maybe", "must be true or false, got 'maybe'")])
def test_values_that_flags_refuse(kind, text, message):
    parser = utils.ArgumentParser("")
    parser.add_argument("--lr", type=kind)
    line = refusal(parser.parse_args, ["--lr", text])
    assert line.startswith(f"argument --lr: {message}") and line.endswith("; see --help")


def test_flags_that_contradict_each_other():
    assert utils.number_or_sum("sum") == "sum" and not utils.boolean("off")
    args = Namespace(scale=[0.5, 0.2], amp=None, off=False)
    assert refusal(utils.check_range, args, "scale", 1) == "--scale needs 0 < MIN <= MAX <= 1, got 0.5 0.2"
    utils.refuse(args, ("amp", "off"), "here")
    assert refusal(utils.refuse, args, ("amp", "scale"), "!") == "--scale cannot be used !; leave it out"


def objective(*argv):
    parser = utils.ArgumentParser("")
    utils.add_objective_flags(parser, RECIPES)
    parser.add_argument("--lr", type=utils.positive_float)
    parser.add_argument("--widths", type=int, nargs="+")
    args = parser.parse_args(argv)
    utils.complete_objective_flags(args, RECIPES)
    return args


def test_presets_fill_in_the_flags_that_are_not_given():
    args = objective("--negative_weight", "sum")
    assert (args.learn, args.widths, args.weights_lr, args.lr) == (None, [8, 4], 0.1, 1e-3)
    assert utils.build_criterion(args).negative_weight == "sum" and args.learn == ["a", "b", "alpha"]
    assert objective("--preset", "released-x", "--lr", "2").lr == 2
    assert objective("--preset", "of-my-own").lr == 1e-3
    assert not utils.build_criterion(objective("--learn", "none")).param_groups(1)
    for argv, message in ((["--preset", "released-x", "--score", "unit"], "--score cannot be used with"),
                          (["--preset", "released-y"], "released-y is not for this script"),
                          (["--learn", "none", "a"], "--learn none contradicts"),
                          (["--learn", "none", "--weights_lr", "1"], "--weights_lr cannot be used with")):
        assert message in refusal(objective, *argv)


# ----------------------------------------------------------------------------------- device, seeds, schedules

def test_amp_is_bf16_only_where_asked_or_native(monkeypatch):
    cpu = torch.device("cpu")
    assert utils.select_amp("auto", torch.device("mps")) is None
    for native, capability in ((True, "AVX512"), (False, "AVX512"), (True, "AVX2")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        auto = torch.bfloat16 if native and capability == "AVX512" else None
        assert [utils.select_amp(name, cpu) for name in ("none", "bf16", "fp16", "auto")] == [
            None, torch.bfloat16, torch.float16, auto]
    for dtype in (torch.bfloat16, None):
        with utils.autocast(cpu, dtype):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is (dtype or torch.float32)


def test_devices_that_are_not_there(monkeypatch):
    for name in ("cuda", "gpu", "meta", ""):
        assert f"device '{name}' is not available here; use --device " in refusal(utils.select_device, name)
    assert utils.select_device("auto").type in ("cpu", "mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert utils.select_device("auto") == torch.device("cuda") and utils.select_device("cuda:1").index == 1
    assert "cuda:2" in refusal(utils.select_device, "cuda:2")


@pytest.mark.parametrize("steps, warmup, expected", [
    (7, 2, [1, 2, 2, 1.780330, 1.25, 0.719670, 0.5, 0.5]), (1, 0, [2, 0.5, 0.5]), (2, 1, [2, 2]),
    (5, 50, [0.04, 0.08, 0.12, 0.16, 0.2])])
def test_cosine_schedule(steps, warmup, expected):
    found = [utils.cosine_schedule(step, steps, 2.0, 0.5, warmup) for step in range(len(expected))]
    assert found == pytest.approx(expected, abs=1e-6)


def test_stream_seeds_are_reproducible_and_distinct():
    seeds = [utils.stream_seed(*keys) for keys in [(0,), (1,), (0, 1), (1, 0), (0, 0), (0, 0, 1), (0, 1, 0)]]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert utils.stream_seed(0, 1) == seeds[2]
    batches = [batch.tolist() for batch in utils.epoch_batches(11, 3, seed=0, epoch=1)]
    assert len({index for batch in batches for index in batch}) == 9 and max(map(max, batches)) < 11
    assert [batch.tolist() for batch in utils.epoch_batches(11, 3, 0, 1, start=1)] == batches[1:]
    assert [batch.tolist() for batch in utils.epoch_batches(11, 3, 0, 2)] != batches


def test_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch):
    assert 0.05 < utils.peak_memory(torch.device("cpu")) < 1000             # GB
    monkeypatch.setitem(sys.modules, "resource", None)                      # as on Windows
    assert utils.peak_memory(torch.device("cpu")) is None


# ------------------------------------------------------------------------------------------------ checkpoints

def test_a_full_disk_keeps_the_old_file(tmp_path, end):
    path = tmp_path / "checkpoint.pth"

    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        utils.save_checkpoint({"x": torch.zeros(50_000)}, path)
    for kept in (False, True):
        assert end(fill) == (2, f"error: cannot write to {path}: File too large. What it held is intact. "
                                "Make room there, or make it writable, then run the same command again\n")
        assert not kept or utils.load_checkpoint(path) == {"x": 1}
        assert list(tmp_path.iterdir()) == [path] * kept
        utils.save_checkpoint({"x": 1}, path)
    for error in RuntimeError("a defect"), KeyboardInterrupt():
        with pytest.raises(type(error)):
            utils.replace_file(path, raises(error), "wb")
        assert utils.load_checkpoint(path) == {"x": 1} and list(tmp_path.iterdir()) == [path]
    utils.replace_file(path, lambda file: file.write(os.fsdecode(b"\xff\n")))  # a name that is not Unicode
    assert path.read_bytes() == b"\xff\n"


def test_checkpoints_that_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pth"
    assert f"no checkpoint at {path}" in refusal(utils.load_checkpoint, path)
    utils.save_checkpoint({"x": torch.ones(999), "args": {"lr": 0.1}}, path)
    assert utils.load_checkpoint(path)["args"] == {"lr": 0.1}
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"garbage", b"<html>", bytes(100)):
        path.write_bytes(content)
        assert re.search(f"{path} is .*damaged.*restore a copy", refusal(utils.load_checkpoint, path, "no!"))
    for legacy in (False, True):
        torch.save({"x": Malicious(tmp_path / "hacked")}, path, _use_new_zipfile_serialization=not legacy)
        message = f"{path} holds more than tensors and plain data, which is not loaded; trust it"
        assert message in refusal(utils.load_checkpoint, path, "trust it")
    assert not (tmp_path / "hacked").exists()
    torch.save([1, 2], path)
    assert "it holds a list, not a dict" in refusal(utils.load_checkpoint, path)
    assert f"Is a directory: {tmp_path}" in refusal(utils.load_checkpoint, tmp_path)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_checkpoint_larger_than_the_memory_is_not_called_damaged(tmp_path, monkeypatch, error):
    monkeypatch.setattr(torch, "load", raises(error))
    with pytest.raises(type(error)):
        utils.load_checkpoint(tmp_path / "checkpoint.pth")


def test_only_the_same_run_is_resumed(tmp_path):
    path, args = tmp_path / "checkpoint.pth", Namespace(lr=0.1, size=[1, 2], data_path=Path("a"), workers=3)
    assert utils.read_resume(args, path, ()) is None
    (tmp_path / "log.txt").write_text("{}\n")
    gone = "log.txt belongs to another run, or checkpoint.pth is gone"
    assert gone in refusal(utils.read_resume, args, path, ())
    utils.save_checkpoint({"args": utils.plain(args), "data": [5, "x"]}, path)
    args.workers = 4
    state = utils.read_resume(args, path, ("workers",))
    args.size = [1, 3]
    message = "--size 1 2 there, 1 3 here; --workers 3 there, 4 here. Resume"
    assert message in refusal(utils.read_resume, args, path, ())
    utils.check_same_data(state, [5, "x"], path)
    for other, there in (state, 5), ({}, "unknown"):
        message = f"other images (number there: {there}, here: 6)"
        assert message in refusal(utils.check_same_data, other, [6, "x"], path)
    layer = torch.nn.Linear(2, 1)
    utils.load_parts({"a": torch.nn.Linear(2, 1).state_dict()}, {"a": layer}, path)
    for bad in ({}, {"a": 3}, {"a": torch.nn.Linear(3, 1).state_dict()}):
        message = refusal(utils.load_parts, bad, {"a": layer}, path)
        assert "does not fit this run's a: " in message and message.endswith("; move it away")
    utils.save_checkpoint({"x": 1}, path)
    assert "lacks its flags" in refusal(utils.read_resume, args, path, ())


def test_one_process_writes_to_a_folder(tmp_path, end):
    folder = tmp_path / "a" / "run"
    files = utils.lock_folder(folder), utils.lock_folder(folder)
    message = f"another run writes to {folder} (process {os.getpid()} on {os.uname().nodename}); wait"
    code, line = end(lambda: utils.lock_folder(folder))
    assert code == 2 and message in line
    for file in files:
        file.close()
    assert end(lambda: [utils.lock_folder(folder), os.kill(os.getpid(), signal.SIGKILL)])[0] == -9
    utils.lock_folder(folder).close()
    assert (folder / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
    blocked = folder / "run.lock" / "run"
    assert refusal(utils.lock_folder, blocked) == f"Not a directory: {blocked}"


# -------------------------------------------------------------------------------------------------------- log

STEP = {"epoch": 0, "step": 50, "train_wd": 0.04, "train_loss": 0.98765, "train_lr": 1.2345e-5,
        "positive": 0.61234, "negative": -0.12345, "a": -1.2e-5, "b": None, "alpha": 1.0,
        "images_per_s": 12345.6, "data_wait": 0.0123456, "memory_gb": 11.987, "hours_left": 123.456}


def write(folder, records, *args, **kwargs):
    log = utils.RunLog(folder, *args, **kwargs)
    for record in records:
        log.write(record)
    return log


def test_the_screen_is_an_aligned_table(tmp_path, capsys):
    epoch = {name: STEP[name] for name in STEP if name != "step"} | {"knn_acc@1": 7.1, "knn_acc@5": 9.0}
    write(tmp_path, [STEP, STEP, epoch, STEP | {"epoch": 1}], (0, 0), steps=100)
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines if "epoch" not in line] == [1, 1, 1, 2]
    assert "epoch" in lines[0] and "epoch" in lines[3]  # a header for new columns alone
    for header, rows in ((lines[0], lines[1:3]), (lines[3], lines[4:])):
        ends = [match.end() for match in re.finditer(r"\S+", header)]  # every column's right edge
        for row in rows:
            assert len(row) == len(header) <= 120
            assert all(match.end() in ends for match in re.finditer(r"\S+", row))
            assert "12346" in row.split() and "-1e-05" in row.split()


def test_the_log_is_only_ever_appended_to(tmp_path, capsys):
    path = tmp_path / "log.txt"
    old = [b'{"epoch": -1, "x": 1.5}', b"no JSON", b'{"x": 1}', b"[1]", b'{"epoch": "2"}',
           b'{"epoch": 0, "step": 2}', b'{"epoch": 0, "x": 0}', b'{"epoch": 0, "step": 4}',
           b'{"epoch": 0, "x": 1}', b'{"epoch": 1, "step": 2}', b'{"epoch": 1, "lo']
    path.write_bytes(b"\n".join(old))
    first = [{"epoch": -1, "x": 1.5}, {"epoch": 0, "step": 2}, {"epoch": 0, "step": 4}, {"epoch": 0, "x": 1}]
    for position, count in ((1, 2), 5), ((1, 0), 4), ((0, 4), 3), ((0, 0), 1):
        assert utils.RunLog(tmp_path, position, steps=4).records == [*first, {"epoch": 1, "step": 2}][:count]
    assert "5 line(s) hold no record, the first is line 2; they are kept" in capsys.readouterr().err
    new = [{"epoch": 1, "step": 2, "x": 3.0}, {"epoch": 1, "x": 4.0}]
    log = write(tmp_path, new, (1, 1), steps=4)
    assert path.read_bytes().splitlines() == old + [json.dumps(record).encode() for record in new]
    assert utils.read_records(path) == log.records == first + new


def test_tensorboard_counts_epochs_from_one(tmp_path):
    write(tmp_path, [{"epoch": -1, "x": 5, "y": None}, {"epoch": 0, "step": 3, "x": 6}, {"epoch": 0, "x": 7}],
          (0, 0), steps=4)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {name: [(event.step, event.value) for event in events.Scalars(name)]
            for name in events.Tags()["scalars"]} == {"epochs/x": [(0, 5), (1, 7)], "steps/x": [(3, 6)]}


def test_the_table_has_the_epochs_of_the_log(tmp_path):
    """Those, too, that a killed run logged without a row in the table."""
    path = tmp_path / "table.csv"
    write(tmp_path, [*({"epoch": epoch, "loss": epoch / 3} for epoch in (-1, 0, 1)),
                     {"epoch": 1, "step": 3, "loss": 9}], (0, 0), table="table.csv")
    path.unlink()
    write(tmp_path, [{"epoch": 1, "loss": 7.0, "accuracy": 3}], (1, 0), table="table.csv")
    with open(path) as file:
        assert list(csv.reader(file)) == [["epoch", "loss", "accuracy"], ["-1", str(-1 / 3), ""],
                                          ["0", "0.0", ""], ["1", "7.0", "3"]]


@pytest.mark.parametrize("place", ["board", "writer", "flush"])
def test_a_full_disk_is_one_line_in_the_log_and_in_tensorboard(tmp_path, monkeypatch, place):
    log = utils.RunLog(tmp_path, (0, 0))
    writer = log.board._get_file_writer().event_writer
    owner, name = {"board": (log.board, "add_scalar"), "writer": (writer, "add_event"),
                   "flush": (writer, "flush")}[place]
    monkeypatch.setattr(owner, name, raises(FULL))
    line = refusal(log.write, {"epoch": 0, "x": 1.0})
    assert line.startswith(f"cannot write to {tmp_path}: No space left on device")


def test_a_full_disk_at_the_start_is_one_line_too(tmp_path, end, monkeypatch):
    monkeypatch.setattr(RecordWriter, "write", lambda self, data: raises(FULL)())  # called in a thread
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)         # pytest's is silent
    assert end(lambda: utils.RunLog(tmp_path, (0, 0))) == (
        2, f"error: cannot write to {tmp_path}: {FULL.strerror}. What it held is intact. Make room there, "
           "or make it writable, then run the same command again\n")


def test_two_learning_rates_have_columns_of_their_own(tmp_path, capsys):
    utils.RunLog(tmp_path, (0, 0)).write({"epoch": 0, "lr": 0.001, "train_lr": 0.0005})
    assert capsys.readouterr().out.split() == ["epoch", "lr/256", "lr", "1", "0.001", "0.0005"]


def test_a_bar_on_a_terminal_and_nothing_for_a_minute_in_a_file(capsys, monkeypatch):
    for terminal, quiet in (False, False), (True, False), (True, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        assert list(utils.progress(range(2, 6), 2, 6, "epoch 1/2", quiet)) == [2, 3, 4, 5]
        assert ("epoch 1/2:  33%" in capsys.readouterr().err) == (terminal and not quiet)
