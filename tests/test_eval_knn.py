"""eval_knn.py's command line end to end: files of weights of every origin, several ranks, dumps, few shots, and mistakes."""
import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tarfile

import eval_knn
import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
import utils
from cifar.model import ContrastiveNet
from conftest import ROOT
from eval_knn import knn_classify, knn_sweep, load_backbone
from PIL import Image
from safetensors.torch import save_file
from vision_transformer import build_backbone

COUNTS = {"train": (6, 7, 8), "val": (4, 3, 4)}                              # 21 and 11 images: two ranks divide neither


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Class folders of noise around a grey of each class's own, of several sizes and modes."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, counts in COUNTS.items():
        for label, (name, count) in enumerate(zip(("cat", "dog", "owl"), counts)):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 200, (32 + 8 * (index % 3), 40, 3)) + 20 * label
                image = Image.fromarray(pixels.astype(np.uint8))
                (image.convert("L") if index == 0 else image).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What cifar/main.py saves, as far as an evaluation reads it."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    backbone = {"arch": "cifar/small", "patch_size": None, "image_size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    torch.save({"student": ContrastiveNet("small", (16, 8)).state_dict(), "backbone": backbone, "epoch": 1,
                "args": {"arch": "small"}, "loss": {"a": torch.zeros(())}}, path)
    return path


def flags(checkpoint, images, *more):
    return ["--pretrained_weights", str(checkpoint), "--checkpoint_key", "student", "--data_path", str(images),
            "--num_workers", "0", "--batch_size_per_gpu", "4", "--device", "cpu", *map(str, more)]


def run(argv, output):
    """The records that a run of the script appends."""
    eval_knn.main([*argv, "--output_dir", str(output)])
    return [json.loads(line) for line in (output / "knn.txt").read_text().splitlines()]


def refused(argv):
    """The line that the script ends with."""
    with pytest.raises(utils.UserError) as error:
        eval_knn.main([str(word) for word in argv])
    assert "\n" not in str(error.value)
    return str(error.value)


# --------------------------------------------------------------------------------------------------------------- whole runs

def test_a_run_against_plain_features_and_votes(checkpoint, images, tmp_path):
    """Three ks, one above the bank, and two temperatures; features from torchvision's own loops, one image at a time."""
    argv = flags(checkpoint, images, "--nb_knn", 3, 10, 200, "--temperature", 0.05, 0.5, "--per_class")
    records = run(argv, tmp_path / "new" / "folder")
    backbone, description = load_backbone(checkpoint, "student")
    transform = utils.eval_transform(*description[2:5])
    rows, labels = {}, {}
    with torch.no_grad():
        for split in COUNTS:
            folder = torchvision.datasets.ImageFolder(images / split)
            rows[split] = torch.cat([backbone(transform(image)[None]) for image, _ in folder])
            labels[split] = torch.tensor(folder.targets)
    assert [(r["k"], r["temperature"]) for r in records] == [(k, t) for k in (3, 10, 200) for t in (0.05, 0.5)]
    for record in records:
        classes = knn_classify(rows["train"], labels["train"], rows["val"], (record["k"],), record["temperature"])[record["k"]]
        right = classes[:, 0] == labels["val"]
        assert record["top1"] == pytest.approx(100 * right.double().mean().item()) and record["top5"] == 100
        assert record["top1_per_class"] == pytest.approx({name: 100 * right[labels["val"] == label].double().mean().item()
                                                          for label, name in enumerate(("cat", "dog", "owl"))})
        assert (record["arch"], record["image_size"], record["train_images"], record["test_images"]) == ("cifar/small", 32, 21, 11)
        assert record["checkpoint_key"] == "student"
    assert len(run(flags(checkpoint, images, "--nb_knn", 3, "--vote", "linear"), tmp_path / "new" / "folder")) == 7     # appended


def test_dumps_round_trip(checkpoint, images, tmp_path):
    records = run(flags(checkpoint, images, "--dump_features", tmp_path / "dumps"), tmp_path / "one")
    assert torch.load(tmp_path / "dumps" / "trainfeat.pth", weights_only=True).shape[0] == 21
    again = run(["--load_features", str(tmp_path / "dumps"), "--device", "cpu"], tmp_path / "two")
    assert [(r["k"], r["top1"], r["top5"]) for r in again] == [(r["k"], r["top1"], r["top5"]) for r in records]
    torch.save(torch.zeros(3, 5), tmp_path / "dumps" / "testfeat.pth")
    assert "do not fit each other" in refused(["--load_features", tmp_path / "dumps"])
    (tmp_path / "dumps" / "testlabels.pth").unlink()
    assert "testlabels.pth" in refused(["--load_features", tmp_path / "dumps"])
    for flag in (["--data_path", images], ["--dataset", "cifar10"], ["--checkpoint_key", "student"], ["--amp", "bf16"]):
        assert f"{flag[0]} cannot be used with --load_features" in refused(["--load_features", tmp_path / "dumps", *flag])
    assert "choose another --dump_features" in refused([*flags("away.pth", images), "--dump_features", "/proc/nowhere"])


def test_random_weights_are_explicit_and_seeded(images, tmp_path):
    common = ["--data_path", str(images), "--num_workers", "0", "--device", "cpu", "--nb_knn", "5"]
    assert "--random_weights" in refused(common)
    assert "--arch" in refused([*common, "--random_weights"])
    assert "contradicts" in refused([*common, "--random_weights", "--pretrained_weights", "x.pth"])
    baseline = [*common, "--random_weights", "--arch", "cifar/small", "--seed"]
    dumps = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        record = run([*baseline, seed, "--dump_features", str(tmp_path / name)], tmp_path / "out")[-1]
        dumps[name] = torch.load(tmp_path / name / "testfeat.pth", weights_only=True)
    assert record["weights"] == "random" and record["checkpoint_key"] is None and record["image_size"] == 32
    assert torch.equal(dumps["a"], dumps["b"]) and not torch.equal(dumps["a"], dumps["c"])


def test_few_shots(checkpoint, images, tmp_path):
    argv = flags(checkpoint, images, "--nb_knn", 1, 50, "--shots", 3, "--episodes", 8, "--dump_features", tmp_path)
    records, again = run(argv, tmp_path / "one"), run(argv, tmp_path / "two")
    assert records == again and run([*argv, "--seed", "1"], tmp_path / "three") != records
    assert [(r["classifier"], r.get("k")) for r in records] == [("knn", 1), ("knn", 50), ("centroid", None)]

    bank, bank_labels, queries, labels = (torch.load(tmp_path / name, weights_only=True) for name in eval_knn.DUMPS)
    unit = torch.nn.functional.normalize
    accuracies = []                                                          # of the nearest centroid, episode by episode
    for episode in range(8):
        generator = torch.Generator().manual_seed(utils.stream_seed(0, episode))
        drawn = eval_knn.draw_shots(bank_labels, 3, generator)
        assert bank_labels[drawn].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and len(set(drawn.tolist())) == 9
        centroids = torch.stack([unit(bank[drawn[bank_labels[drawn] == label]]).mean(0) for label in range(3)])
        accuracies.append(100 * np.mean(((unit(queries) @ unit(centroids).T).argmax(1) == labels).numpy()))
    assert records[2]["top1"] == pytest.approx(np.mean(accuracies))
    assert records[2]["top1_ci95"] == pytest.approx(2.364624 * np.std(accuracies, ddof=1) / math.sqrt(8))   # Student's t, 7 degrees
    assert "class 0" in refused(flags(checkpoint, images, "--shots", 7))
    assert run([*argv, "--episodes", "1"], tmp_path / "four")[0]["top1_ci95"] is None


# ------------------------------------------------------------------------------------------------------------ several ranks

def start_ranks(function, world, *args):
    mp.start_processes(function, (world, *args), nprocs=world, start_method="fork")


def signs(count, seed):
    """Rows of +-1 whose cosines are exact and tie everywhere."""
    return torch.randint(2, (count, 16), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def search_shared(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    bank, queries, labels = signs(101, 1), signs(9, 2), torch.arange(101) * 7 % 11
    bank[50:] = bank[:51].clone()                                                    # ties between ranks
    for rows in (101, 2, 1):                                                 # of two and one: ranks with less than k, or nothing
        settings = dict(ks=(1, 10, 60, 200), temperatures=(0.07, 0.5), num_classes=11, vote="linear")
        found = knn_sweep(bank[:rows][rank::world], labels[:rows], queries, shared=True, **settings)
        whole = knn_sweep(bank[:rows], labels[:rows], queries, **settings)
        assert all(torch.equal(found[setting], whole[setting]) for setting in whole)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_a_shared_bank_gives_the_same_classes(tmp_path, world):
    start_ranks(search_shared, world, str(tmp_path))


def run_rank(rank, world, port, argvs):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    original, utils.init_distributed = utils.init_distributed, lambda *args: device
    device = original("cpu")                                                 # one process group for all runs
    utils.run_script(lambda: [eval_knn.main(argv) for argv in argvs])


def test_two_ranks_equal_one(checkpoint, images, tmp_path):
    argvs = []
    for name, more in (("knn", ["--nb_knn", "3", "30"]), ("few", ["--shots", "2", "--episodes", "3", "--nb_knn", "2"])):
        alone = run(flags(checkpoint, images, *more, "--dump_features", tmp_path / name / "dump1"), tmp_path / name / "one")
        argvs.append((name, alone, flags(checkpoint, images, *more, "--dump_features", tmp_path / name / "dump2",
                                         "--output_dir", tmp_path / name / "two")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_ranks(run_rank, 2, port, [argv for _, _, argv in argvs])
    for name, alone, _ in argvs:
        both = [json.loads(line) for line in (tmp_path / name / "two" / "knn.txt").read_text().splitlines()]
        assert both == alone
        for dump in eval_knn.DUMPS:
            one, two = (torch.load(tmp_path / name / folder / dump, weights_only=True) for folder in ("dump1", "dump2"))
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- files of all origins

def features(backbone, size):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return backbone(torch.randn(2, 3, size, size, generator=generator))


def dino_checkpoint(vit, path, **extra):
    """The layout of DINO's published training checkpoints."""
    weights = {f"backbone.{key}": value for key, value in vit.state_dict().items()} | {"head.mlp.0.weight": torch.zeros(2, 2)}
    torch.save({"student": {f"module.{key}": value for key, value in weights.items()}, "teacher": weights, "epoch": 100,
                "optimizer": {"state": {}, "param_groups": []}, "dino_loss": {"center": torch.zeros(1, 3)},
                "args": argparse.Namespace(arch="deit_tiny", patch_size=8, lr=0.1)} | extra, path)
    return path


def test_dino_format(tmp_path):
    torch.manual_seed(0)
    vit = build_backbone("vit_tiny", 8, 48).eval()
    path = dino_checkpoint(vit, tmp_path / "dino.pth")
    for key in ("teacher", "student"):
        backbone, description = load_backbone(path, key)
        assert description == ("vit_tiny", 8, 48, eval_knn.IMAGENET_MEAN, eval_knn.IMAGENET_STD, key)
        assert torch.equal(features(backbone, 48), features(vit, 48))
        assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    torch.save(vit.state_dict(), tmp_path / "backbone.pth")                  # its backbone-only releases
    backbone, description = load_backbone(tmp_path / "backbone.pth", arch="deit_tiny", patch_size=8)
    assert description[:3] == ("vit_tiny", 8, 48) and description.checkpoint_key is None
    assert torch.equal(features(backbone, 48), features(vit, 48))


@pytest.mark.parametrize("arch, classifier", [("resnet18", "fc"), ("timm/resnet10t", "fc"),
                                              ("timm/mobilenetv3_small_050", "classifier")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_torchvision_and_timm(arch, classifier, suffix, tmp_path, capsys):
    torch.manual_seed(0)
    name = arch.removeprefix("timm/")
    net = (timm.create_model(name) if "/" in arch else torchvision.models.get_model(name)).eval()
    (save_file if suffix == ".safetensors" else torch.save)(net.state_dict(), tmp_path / f"weights{suffix}")
    backbone, description = load_backbone(tmp_path / f"weights{suffix}", arch=arch)
    note = capsys.readouterr().out
    assert note.startswith("note: the classifier") and f"{classifier}.weight" in note and f"{classifier}.bias" in note
    setattr(net, classifier, torch.nn.Identity())
    torch.testing.assert_close(features(backbone, 64), features(net, 64))
    assert description.image_size == (176 if arch == "timm/resnet10t" else 224) and description.patch_size is None


def test_timm_models_keep_their_own_normalisation(tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "weights.pth")
    assert load_backbone(tmp_path / "weights.pth", arch="timm/vit_tiny_patch16_224")[1].mean == (0.5, 0.5, 0.5)
    backbone, description = load_backbone(tmp_path / "weights.pth", arch="timm/vit_tiny_patch16_224", image_size=96)
    assert description.image_size == 96 and features(backbone, 96).shape == (2, 192)
    with pytest.raises(utils.UserError, match="takes images of 224 pixels, not 100"):
        load_backbone(tmp_path / "weights.pth", arch="timm/vit_tiny_patch16_224", image_size=100)


def test_timm_models_are_built_for_the_size_they_were_trained_on():
    backbone, description = load_backbone(None, arch="timm/vit_tiny_patch16_384", random_weights=True)
    assert description.image_size == 384 and backbone.pos_embed.shape[1] == 1 + 24 * 24


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["top", "inside the Namespace"])
def test_a_malicious_file_is_refused_and_not_run(where, tmp_path):
    trap = Malicious(tmp_path / "hacked")
    extra = {"epoch": trap} if where == "top" else {"args": argparse.Namespace(arch=trap)}
    path = dino_checkpoint(build_backbone("vit_tiny", 8, 48), tmp_path / "bad.pth", **extra)
    message = refused(["--pretrained_weights", path, "--data_path", tmp_path])
    assert str(path) in message and "weights_only" in message and not (tmp_path / "hacked").exists()


def test_the_namespace_is_allowed_for_the_backbone_alone(tmp_path):
    path = dino_checkpoint(build_backbone("vit_tiny", 8, 48), tmp_path / "dino.pth")
    load_backbone(path)
    with pytest.raises(utils.UserError):
        utils.load_checkpoint(path)


# ----------------------------------------------------------------------------------------------------------------- mistakes

def test_mistakes_about_weights(checkpoint, images, tmp_path):
    vit = build_backbone("vit_tiny", 8, 48)
    dino = dino_checkpoint(vit, tmp_path / "dino.pth")
    plain = tmp_path / "plain.pth"
    torch.save(vit.state_dict(), plain)
    lacking = {key: value for key, value in vit.state_dict().items() if key != "norm.weight"} | {"norm.wait": torch.zeros(1)}
    torch.save(lacking, tmp_path / "lacking.pth")
    torch.save({"epoch": 3, "optimizer": {"state": {}}}, tmp_path / "none.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")

    for path, arguments, words in [
            (tmp_path / "away.pth", {}, ["no checkpoint at", "away.pth"]),
            (tmp_path / "away.safetensors", {}, ["away.safetensors"]),
            (tmp_path / "junk.pth", {}, ["junk.pth", "restore a copy"]),
            (tmp_path, {}, ["a directory", "restore a copy"]),
            (tmp_path / "junk.safetensors", {}, ["junk.safetensors"]),
            (tmp_path / "none.pth", {}, ["no network's weights", "epoch", "optimizer"]),
            (checkpoint, {}, ["no network 'teacher'", "choose --checkpoint_key student"]),
            (dino, {"checkpoint_key": "model"}, ["--checkpoint_key student or --checkpoint_key teacher"]),
            (plain, {"checkpoint_key": "student", "arch": "vit_tiny"}, ["leave --checkpoint_key out"]),
            (plain, {}, ["--arch"]),
            (plain, {"arch": "vit_tiny", "patch_size": 16}, ["--patch_size 16 contradicts", "8"]),
            (plain, {"arch": "vit_small"}, ["of other shapes", "cls_token [1, 1, 192], not [1, 1, 384]"]),
            (plain, {"arch": "resnet18"}, ["missing: conv1.weight", "unexpected: cls_token"]),
            (plain, {"arch": "resnet19"}, ["unknown arch 'resnet19'"]),
            (plain, {"arch": "cifar/large"}, ["cifar/large", "cifar/small"]),
            (plain, {"arch": "resnet18", "patch_size": 16}, ["--patch_size has no meaning for resnet18"]),
            (tmp_path / "lacking.pth", {"arch": "vit_tiny"}, ["1 missing: norm.weight", "1 unexpected: norm.wait"]),
            (dino, {"arch": "vit_small"}, ["--arch vit_small contradicts", "vit_tiny"]),
            (dino, {"image_size": 96}, ["--image_size 96 contradicts", "48"]),
            (checkpoint, {"checkpoint_key": "student", "arch": "resnet50"}, ["--arch resnet50 contradicts", "cifar/small"]),
            (checkpoint, {"checkpoint_key": "student", "patch_size": 16}, ["--patch_size 16 contradicts"])]:
        with pytest.raises(utils.UserError) as error:
            load_backbone(path, **arguments)
        message = str(error.value)
        assert "\n" not in message and all(word in message for word in words), (arguments, message)


def test_mistakes_about_flags_and_data(checkpoint, images, tmp_path):
    assert "--data_path is missing" in refused(["--random_weights", "--arch", "cifar/small"])
    assert "--download cannot be used with --dataset folder" in refused([*flags(checkpoint, images), "--download"])
    assert "--checkpoint_key" in refused(["--random_weights", "--arch", "cifar/small", "--checkpoint_key", "student"])
    assert "--temperature cannot be used with --vote linear" in refused(["--vote", "linear", "--temperature", "0.1"])
    assert "--episodes needs --shots" in refused(["--episodes", "3", "--data_path", images])
    assert "no folder" in refused(flags(checkpoint, tmp_path))
    assert "cifar10" in refused(["--dataset", "cifar10", *flags(checkpoint, tmp_path)]) and not list(tmp_path.iterdir())
    assert "--download" in refused(["--dataset", "hfds/some/set", *flags(checkpoint, tmp_path)])
    for split, name in (("train", "cat"), ("val", "dog")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    message = refused(flags(checkpoint, tmp_path))
    assert "different classes" in message and "cat" in message and "dog" in message
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "cat")
    (tmp_path / "val" / "cat" / "1.png").write_bytes(b"no image")
    for workers in (0, 1):                                                   # a worker's traceback must not reach the line
        message = refused(flags(checkpoint, tmp_path, "--num_workers", workers))
        assert message.startswith(f"cannot decode image {tmp_path / 'val' / 'cat' / '1.png'}")


def test_a_mistake_on_the_command_line_is_one_line(images):
    result = subprocess.run([sys.executable, "eval_knn.py", "--dataset", "cifar11"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "cifar100" in result.stderr


# ---------------------------------------------------------------------------------------------------------------- data sets

def test_eval_transform():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    for size, side in ((224, 256), (96, 96)):
        ours = utils.eval_transform(size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))(image)
        width = side * 400 // 300
        left, top = round((width - size) / 2), round((side - size) / 2)
        plain = image.resize((width, side), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        reference = (np.asarray(plain, dtype=np.float64) / 255 - 0.5) / 0.25
        np.testing.assert_allclose(ours.numpy(), reference.transpose(2, 0, 1), atol=1e-6)


class Standin:
    """A data set of torchvision with 50 images of each of two classes, and 3 more of its second."""
    classes = ["cat", "dog"]
    y = [0] * 50 + [1] * 53

    def __init__(self, root, download, **split):
        self.split = split

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return Image.new("L", (8, 8), index), self.y[index]


@pytest.mark.parametrize("name, constructor, train", [("caltech101", "Caltech101", [30, 30]), ("eurosat", "EuroSAT", [40, 42])])
def test_sets_without_an_official_split_are_split_by_class(name, constructor, train, tmp_path, monkeypatch):
    monkeypatch.setattr(utils.datasets, constructor, Standin)
    splits = utils.build_splits(name, tmp_path)
    values = [[(image.getpixel((0, 0))[0], label) for image, label in split] for split in splits]
    assert [sum(label == c for _, label in values[0]) for c in (0, 1)] == train
    assert sorted(value for value, _ in values[0] + values[1]) == list(range(103))              # all, none twice
    assert [label for _, label in values[1]] == splits[1].targets
    again = utils.build_dataset(name, tmp_path, "train")
    assert [image.getpixel((0, 0))[0] for image, _ in again] == [value for value, _ in values[0]]


@pytest.mark.parametrize("name, constructor, splits", [
    ("flowers102", "Flowers102", ["train", "val"]), ("dtd", "DTD", ["train", "val"]), ("pets", "OxfordIIITPet", ["trainval"]),
    ("aircraft", "FGVCAircraft", ["trainval"]), ("food101", "Food101", ["train"]), ("svhn", "SVHN", ["train"])])
def test_training_includes_official_validation_sets(name, constructor, splits, tmp_path, monkeypatch):
    asked = []

    def make(root, download, split):
        asked.append(split)
        return Standin(root, download)
    monkeypatch.setattr(utils.datasets, constructor, make)
    train, test = utils.build_splits(name, tmp_path)
    assert asked == [*splits, "test"] and len(train) == 103 * len(splits) == len(train.targets)
    assert train[len(train) - 1][1] == 1 and train[0][0].mode == "RGB"


def test_folders_through_timm(images):
    """timm's own reader, but an image that cannot be decoded is an error and not another image."""
    train, test = utils.build_splits("timm/", images)
    assert (len(train), len(test), test.classes) == (21, 11, ["cat", "dog", "owl"])
    ours = utils.build_dataset("folder", images, "test")
    assert test.targets == ours.targets and all(np.array_equal(*map(np.asarray, pair)) for pair in
                                                zip((image for image, _ in test), (image for image, _ in ours)))


@pytest.mark.parametrize("source", ["folder", "timm/", "torch/image_folder"])
def test_folders_are_never_their_own_test_set(source, images, tmp_path):
    (tmp_path / "train").symlink_to(images / "train")
    with pytest.raises(utils.UserError, match="no folder"):                  # no test set: timm would test on train
        utils.build_splits(source, tmp_path)
    with pytest.raises(utils.UserError, match="no folder"):                  # class folders without splits
        utils.build_splits(source, images / "train")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(images / "train", "train")
    with pytest.raises(utils.UserError, match="no folder"):
        utils.build_splits(source, tmp_path / "images.tar")
    with pytest.raises(utils.UserError, match="--data_path is missing"):
        utils.build_splits(source, None)
    (tmp_path / "test").symlink_to(images / "val")
    train, test = utils.build_splits(source, tmp_path)
    assert (len(train), len(test)) == (21, 11)


@pytest.mark.parametrize("label, split", [(1, "test"), (-1, "validation")])
def test_the_test_set_of_timm_unless_its_labels_are_secret(label, split, monkeypatch, tmp_path):
    def create(name, split, **arguments):
        source = Standin(None, None, split=split)
        source.y = [label if split == "test" else 0]
        source.classes = [("cat", "Felis catus"), ("dog",)]                  # as torchvision has them for ImageNet
        return source
    monkeypatch.setattr(timm.data, "create_dataset", create)
    test = utils.build_dataset("torch/imagenet", tmp_path, "test")
    assert test.source.split == {"split": split} and test.classes == ["cat, Felis catus", "dog"]


def test_a_set_without_a_list_of_labels():
    with pytest.raises(utils.UserError, match="keeps no list of its labels"):
        utils.LabelledImages([(Image.new("L", (8, 8)), 0)], None).targets


def test_features_that_are_not_finite(images):
    dataset = utils.build_dataset("folder", images, "test", utils.eval_transform(32, (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(utils.UserError, match="features are not finite"):
        eval_knn.extract_features(lambda batch: batch.flatten(1) / 0, dataset, torch.device("cpu"))


def test_imagenet_with_a_test_folder_without_classes(images, tmp_path):
    for split in COUNTS:
        (tmp_path / split).symlink_to(images / split)
    (tmp_path / "test").mkdir()
    assert len(utils.build_dataset("folder", tmp_path, "test")) == 11
