"""eval_knn.py's command line end to end: published flags, ranks, dumps, defaults and mistakes."""
import json

import data
import distributed
import eval_knn
import pytest
import torch
import torchvision
from conftest import run_ranks, write_noise
from pretrained import load_backbone
from utils import UserError
from vision_transformer import build_backbone


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What main.py and cifar/main.py save, as far as an evaluation reads it."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    described = {"arch": "cifar/small", "patch_size": None, "image_size": 32, "mean": [0.4, 0.5, 0.6],
                 "std": [0.2, 0.25, 0.3]}
    networks = {name: {f"backbone.{key}": value for key, value in net.state_dict().items()}
                for name, net in ((name, build_backbone("cifar/small")) for name in ("student", "teacher"))}
    torch.save({**networks, "backbone": described, "epoch": 1, "args": {"arch": "small"}}, path)
    return path


def flags(checkpoint, images, *more):
    return ["--pretrained_weights", str(checkpoint), "--data_path", str(images), "--num_workers", "0",
            "--batch_size_per_gpu", "4", "--device", "cpu", *map(str, more)]


def run(argv, output):
    """The records that a run of the script appends."""
    eval_knn.main([*argv, "--output_dir", str(output)])
    return [json.loads(line) for line in (output / "knn.txt").read_text().splitlines()]


def refused(argv):
    """The line that the script ends with."""
    with pytest.raises(UserError) as error:
        eval_knn.main([str(word) for word in argv])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_published_line_against_plain_features(checkpoint, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    eval_knn.main(["--pretrained_weights", str(checkpoint), "--checkpoint_key", "teacher",
                   "--data_path", str(images)])
    assert "k = 100, 200: the training set has 21 images; the result is of k = 21" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())                                # it writes nothing unasked
    more = ("--nb_knn", 3, 10, 200, "--temperature", 0.5, "--checkpoint_key", "student",
            "--dump_features", tmp_path / "dumps")
    records = run(flags(checkpoint, images, *more), tmp_path / "new" / "folder")

    backbone, description = load_backbone(checkpoint, "student")
    transform = data.eval_transform(*description[2:5])
    rows, labels = {}, {}
    for split in ("train", "val"):                                   # torchvision's loops, image by image
        folder = torchvision.datasets.ImageFolder(images / split)
        with torch.no_grad():
            rows[split] = torch.cat([backbone(transform(image)[None]) for image, _ in folder])
        labels[split] = torch.tensor(folder.targets)
        dumped = "train" if split == "train" else "test"
        found = torch.load(tmp_path / "dumps" / f"{dumped}feat.pth", weights_only=True)
        torch.testing.assert_close(found, rows[split], rtol=1e-5, atol=1e-6)
        found = torch.load(tmp_path / "dumps" / f"{dumped}labels.pth", weights_only=True)
        assert torch.equal(found, labels[split])
    assert [(r["k"], r["temperature"]) for r in records] == [(k, 0.5) for k in (3, 10, 21)]
    for record in records:
        accuracy = eval_knn.knn_accuracy(rows["train"], labels["train"], rows["val"], labels["val"],
                                         (record["k"],), record["temperature"])
        assert (record["top1"], record["top5"]) == pytest.approx(accuracy[record["k"]])
        described = [record[name] for name in ("arch", "image_size", "checkpoint_key")]
        assert described == ["cifar/small", 32, "student"]
        assert (record["train_images"], record["test_images"]) == (21, 11)
    again = run(flags(checkpoint, images, "--nb_knn", 3), tmp_path / "new" / "folder")
    assert len(again) == 4 and again[:3] == records


def test_dumps_round_trip(checkpoint, images, tmp_path):
    dumps = tmp_path / "dumps"
    records = run(flags(checkpoint, images, "--dump_features", dumps), tmp_path / "one")
    shapes = {path.name: list(torch.load(path, weights_only=True).shape) for path in dumps.iterdir()}
    assert shapes == {"trainfeat.pth": [21, 256], "trainlabels.pth": [21], "testfeat.pth": [11, 256],
                      "testlabels.pth": [11]}
    load = ["--load_features", str(dumps), "--device", "cpu"]
    again = run(load, tmp_path / "two")
    for one, two in zip(records, again, strict=True):
        assert all(one[name] == two[name] for name in ("k", "temperature", "top1", "top5", "train_images"))
    torch.save(torch.zeros(3, 5), dumps / "testfeat.pth")
    assert str(dumps) in refused(load)
    torch.save({}, dumps / "testfeat.pth")
    assert "testfeat.pth is damaged or no tensor" in refused(load)
    (dumps / "testfeat.pth").write_bytes(b"junk")
    assert "testfeat.pth is damaged or" in refused(load)
    (dumps / "testfeat.pth").unlink()
    with pytest.raises(FileNotFoundError, match="testfeat.pth"):       # of which run_script makes a line
        eval_knn.main(load)


def test_random_weights_are_explicit_and_seeded(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--data_path", str(images), "--num_workers", "0", "--device", "cpu", "--nb_knn", "5"]
    message = refused(common)
    assert str(tmp_path / "checkpoint.pth") in message and "--random_weights" in message
    assert "--arch" in refused([*common, "--random_weights"])
    dumps = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        record = run([*common, "--random_weights", "--arch", "cifar/tiny", "--seed", seed, "--dump_features",
                      str(tmp_path / name)], tmp_path / "out")[-1]
        dumps[name] = torch.load(tmp_path / name / "testfeat.pth", weights_only=True)
    assert (record["weights"], record["checkpoint_key"], record["image_size"]) == ("random", None, 32)
    assert torch.equal(dumps["a"], dumps["b"]) and not torch.equal(dumps["a"], dumps["c"])


def test_the_default_is_the_current_folders_checkpoint(checkpoint, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(checkpoint.parent)
    argv = flags(checkpoint, images, "--nb_knn", 3)[2:]
    assert run(argv, tmp_path)[0]["weights"] == "checkpoint.pth"
    assert f"taking {checkpoint}" in capsys.readouterr().out


def test_two_ranks_equal_one(checkpoint, images, tmp_path, monkeypatch):
    def argv(name):
        return flags(checkpoint, images, "--nb_knn", 3, 30, "--dump_features", tmp_path / name)
    alone = run(argv("dump1"), tmp_path / "one")
    monkeypatch.setattr(distributed, "leave", lambda: None)            # run_ranks leaves its group itself
    run_ranks(lambda: eval_knn.main([*argv("dump2"), "--output_dir", str(tmp_path / "two")]), 2)
    assert [json.loads(line) for line in (tmp_path / "two" / "knn.txt").read_text().splitlines()] == alone
    for name in eval_knn.DUMPS:
        one, two = (torch.load(tmp_path / dump / name, weights_only=True) for dump in ("dump1", "dump2"))
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("argv, words", [
    (["--random_weights", "--arch", "cifar/tiny"], ["--data_path is missing"]),
    (["--random_weights", "--pretrained_weights", "x.pth"], ["--pretrained_weights", "--random_weights"]),
    (["--load_features", "X", "--arch", "vit_tiny"], ["--arch cannot be used with --load_features"]),
    (["--load_features", "X", "--data_path", "Y"], ["--data_path cannot be used with --load_features"]),
    (["--temperature", "0"], ["--temperature"]),
    (["--random_weights", "--arch", "cifar/tiny", "--data_path", "/nowhere"], ["no folder", "/nowhere"]),
    (["--random_weights", "--arch", "cifar/tiny", "--dataset", "cifar11"], ["cifar11", "cifar100"]),
    (["--random_weights", "--arch", "cifar/tiny", "--dataset", "cifar10", "--data_path", "/nowhere"],
     ["cifar10", "/nowhere", "--download"]),
])
def test_mistakes_about_flags_and_data_are_one_line(argv, words):
    message = refused([*argv, "--device", "cpu"])
    assert all(word in message for word in words), message


def test_an_image_that_cannot_be_decoded_is_named(checkpoint, tmp_path):
    write_noise(tmp_path, {"train": 2, "val": 1})
    (tmp_path / "val" / "light" / "1.png").write_bytes(b"no image")
    for workers in (0, 1):                                             # no traceback of a worker in the line
        message = refused(flags(checkpoint, tmp_path, "--num_workers", workers))
        assert message.startswith(f"cannot decode image {tmp_path / 'val' / 'light' / '1.png'}")
