"""Schedules, seeds, files and logs at their edges."""
import csv
import math

import pytest
import torch
import utils
from cifar.curves import draw_curves
from PIL import Image


def test_cosine_schedule_by_formula():
    values = [utils.cosine_schedule(step, 12, base=2.0, final=0.5, warmup_steps=4) for step in range(12)]
    assert values[:4] == [0.5, 1.0, 1.5, 2.0]                                    # linear, reaching the base
    for step in range(4, 12):
        assert values[step] == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi * (step - 4) / 7)))
    assert values[4] == 2.0 and values[-1] == pytest.approx(0.5)


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (2, 1), (5, 5), (5, 50)])
def test_cosine_schedule_at_the_edges(steps, warmup):
    values = [utils.cosine_schedule(step, steps, 1.0, 0.0, warmup) for step in range(steps + 2)]
    assert all(0 <= value <= 1 for value in values)
    if warmup >= steps:                                                          # a run within its warm-up only rises
        assert values[:steps] == sorted(values[:steps]) and values[0] == 1 / warmup


def test_stream_seeds_are_reproducible_and_distinct():
    seeds = [utils.stream_seed(*keys) for keys in [(0,), (1,), (0, 1), (1, 0), (0, 0), (0, 0, 1), (0, 1, 0)]]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert utils.stream_seed(0, 1) == seeds[2]


def test_amp_is_bf16_only_where_asked_or_native(monkeypatch):
    cpu = torch.device("cpu")
    assert utils.select_amp("none", cpu) is None and utils.select_amp("bf16", cpu) is torch.bfloat16
    assert utils.select_amp("auto", torch.device("mps")) is None
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
        assert utils.select_amp("auto", cpu) is (torch.bfloat16 if native else None)


def test_devices_that_are_not_there():
    with pytest.raises(utils.UserError, match="--device"):
        utils.select_device("cuda")
    assert utils.select_device("auto").type in ("cpu", "mps")


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    utils.replace_file(path, lambda file: file.write("old"))

    def fail(file):
        file.write("new")
        raise OSError(28, "No space left on device")
    with pytest.raises(utils.UserError, match="No space left on device; what was saved before is intact"):
        utils.replace_file(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_checkpoints_round_trip_and_refuse_code(tmp_path):
    path = tmp_path / "checkpoint.pth"
    utils.save_checkpoint({"weights": torch.ones(2), "epoch": 3, "args": {"lr": 0.1}}, path)
    assert utils.load_checkpoint(path)["epoch"] == 3

    class Malicious:
        def __reduce__(self):
            return (tmp_path.joinpath("hacked").touch, ())
    torch.save({"weights": Malicious()}, path)
    with pytest.raises(utils.UserError, match="cannot read checkpoint"):
        utils.load_checkpoint(path)
    assert not (tmp_path / "hacked").exists()
    torch.save([1, 2], path)
    with pytest.raises(utils.UserError, match="a list, not a dict"):
        utils.load_checkpoint(path)
    with pytest.raises(utils.UserError, match="no checkpoint at"):
        utils.load_checkpoint(tmp_path / "none.pth")


def test_advice_about_code_is_not_given_for_damaged_files(tmp_path):
    path = tmp_path / "checkpoint.pth"
    for content in (b"", b"junk", b"<html>"):
        path.write_bytes(content)
        with pytest.raises(utils.UserError, match="restore a copy"):
            utils.load_checkpoint(path, "trust it")
    torch.save({"path": tmp_path}, path)
    with pytest.raises(utils.UserError, match="trust it"):
        utils.load_checkpoint(path, "trust it")


def test_a_random_choice_out_of_every_class():
    labels = torch.tensor([2, 0, 0, 2, 2, 0, 2])                                 # class 1 has no images
    chosen, others = utils.split_by_class(labels, lambda n: (0.5 * n).round(), torch.Generator().manual_seed(0))
    assert labels[chosen].tolist() == [0, 0, 2, 2] and sorted(chosen.tolist() + others.tolist()) == list(range(7))
    choices = {tuple(sorted(utils.split_by_class(labels, lambda n: 1, torch.Generator().manual_seed(seed))[0].tolist()))
               for seed in range(200)}
    assert len(choices) == 3 * 4                                                 # every pair is possible


def test_the_log_drops_what_a_killed_run_had_not_saved(tmp_path):
    log = utils.RunLog(tmp_path, (0, 0), csv_name="table.csv")
    for epoch in range(3):
        log.write({"epoch": epoch, "loss": epoch / 3})
    log = utils.RunLog(tmp_path, (2, 0), csv_name="table.csv")                    # the checkpoint knows epochs 0 and 1
    log.write({"epoch": 2, "loss": 7.0})
    assert utils.read_records(tmp_path / "log.txt") == [{"epoch": 0, "loss": 0.0}, {"epoch": 1, "loss": 1 / 3},
                                                        {"epoch": 2, "loss": 7.0}]
    with open(tmp_path / "table.csv") as file:
        assert [row["loss"] for row in csv.DictReader(file)] == ["0.0", repr(1 / 3), "7.0"]


def test_the_log_resumes_within_an_epoch_and_after_a_torn_line(tmp_path):
    log = utils.RunLog(tmp_path, (0, 0), steps=4)
    records = [{"epoch": 0, "step": 2}, {"epoch": 0, "step": 4}, {"epoch": 0}, {"epoch": 1, "step": 2}, {"epoch": 1, "step": 4}]
    for record in records:
        log.write(record)
    with open(tmp_path / "log.txt", "a") as file:
        file.write('{"epoch": 1, "lo')                                             # killed while it wrote
    assert utils.read_records(tmp_path / "log.txt") == records
    assert utils.RunLog(tmp_path, (1, 3), steps=4).records == records[:4]          # saved after step 3 of epoch 1
    assert utils.RunLog(tmp_path, (1, 0), steps=4).records == records[:3]
    assert utils.RunLog(tmp_path, (0, 4), steps=4).records == records[:2]          # the epoch's end had not been saved


def test_progress_prints_plain_lines_in_a_file(capsys, monkeypatch):
    clock = iter(range(0, 10000, 50))                                            # 50 seconds a look
    monkeypatch.setattr(utils.time, "monotonic", lambda: next(clock))
    for step, note in utils.progress(range(2, 6), 2, 6, "epoch 1/2"):
        note(f"loss {step}")
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.startswith("epoch 1/2  step ") and line.endswith("min left") for line in lines)
    assert "step 4/6  loss 3" in lines[0]


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(utils.sys.stderr, "isatty", lambda: True, raising=False)
    for step, note in utils.progress(range(2, 6), 2, 6, "epoch 1/2"):
        note(f"loss {step}")
    assert "epoch 1/2" in capsys.readouterr().err


def test_curves_of_several_runs(tmp_path):
    names = ("test_acc@1", "train_loss", "positive", "negative", "a", "b", "alpha", "test_auc")
    runs = {name: [{"epoch": epoch} | dict.fromkeys(names, epoch / 5) for epoch in range(length)]
            for name, length in (("one", 1), ("two", 5))}
    draw_curves(runs, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (2400, 570)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
