"""Files of weights of every origin, what they tell of their backbone, and the features of a data set."""
import argparse
import os
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from augmentations import IMAGENET_MEAN, IMAGENET_STD
from conftest import Malicious, refusal, run_ranks
from pretrained import Description, export_backbone, extract_features, load_backbone, write_record
from safetensors.torch import save_file
from utils import load_checkpoint
from vision_transformer import build_backbone

CPU = torch.device("cpu")


def features(backbone, size):
    with torch.no_grad():
        return backbone(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return build_backbone("vit_tiny", 8, 48).eval()


def dino_checkpoint(vit, path, **extra):
    """The layout of DINO's published training checkpoints."""
    weights = {f"backbone.{key}": value for key, value in vit.state_dict().items()}
    weights["head.mlp.0.weight"] = torch.zeros(2, 2)
    torch.save({"student": {f"module.{key}": value for key, value in weights.items()}, "teacher": weights,
                "epoch": 100, "optimizer": {"state": {}, "param_groups": []},
                "dino_loss": {"center": torch.zeros(1, 3)},
                "args": argparse.Namespace(arch="deit_tiny", patch_size=8, lr=0.1)} | extra, path)
    return path


def test_dino_format(vit, tmp_path, capsys):
    whole, alone = dino_checkpoint(vit, tmp_path / "dino.pth"), tmp_path / "backbone.pth"
    torch.save(vit.state_dict(), alone)                                # DINO's releases of the backbone alone
    for path, options, key in ((whole, {}, "teacher"), (whole, {"checkpoint_key": "student"}, "student"),
                               (alone, {"arch": "deit_tiny", "patch_size": 8}, None)):
        backbone, description = load_backbone(path, **options)
        assert description == ("vit_tiny", 8, 48, IMAGENET_MEAN, IMAGENET_STD, key)
        assert torch.equal(features(backbone, 48), features(vit, 48))
        assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    assert capsys.readouterr().out == ""                               # the projection head is no classifier
    assert "not loaded" in refusal(load_checkpoint, whole)             # the Namespace is allowed here alone


@pytest.mark.parametrize("arch, classifier, size, suffix", [
    ("resnet18", "fc", 224, ".safetensors"), ("timm/resnet10t", "fc", 176, ".pth"),
    ("timm/mobilenetv3_small_050", "classifier", 224, ".safetensors")])
def test_weights_of_torchvision_and_timm(arch, classifier, size, suffix, tmp_path, capsys):
    torch.manual_seed(0)
    name = arch.removeprefix("timm/")
    net = (timm.create_model(name) if "/" in arch else torchvision.models.get_model(name)).eval()
    (save_file if suffix == ".safetensors" else torch.save)(net.state_dict(), tmp_path / f"weights{suffix}")
    backbone, description = load_backbone(tmp_path / f"weights{suffix}", arch=arch)
    note = capsys.readouterr().out
    assert note.startswith("note: the classifier")
    assert f"{classifier}.weight" in note and f"{classifier}.bias" in note
    setattr(net, classifier, torch.nn.Identity())
    torch.testing.assert_close(features(backbone, 64), features(net, 64))
    assert (description.image_size, description.patch_size) == (size, None)


def test_timm_models_keep_their_normalisation_and_the_size_they_were_trained_on(tmp_path):
    arch, path = "timm/vit_tiny_patch16_224", tmp_path / "weights.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    assert load_backbone(path, arch=arch)[1][2:5] == (224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    backbone, description = load_backbone(path, arch=arch, image_size=96)
    assert description.image_size == 96 and features(backbone, 96).shape == (2, 192)
    assert "takes images of 224 pixels, not 100" in refusal(load_backbone, path, arch=arch, image_size=100)
    backbone, _ = load_backbone(None, arch="timm/vit_tiny_patch16_384", random_weights=True)
    assert backbone.pos_embed.shape[1] == 1 + 24 * 24


def test_an_exported_backbone_tells_how_to_feed_it(tmp_path):
    description = Description("cifar/tiny", None, 48, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    backbone, path = build_backbone("cifar/tiny"), tmp_path / "backbone.safetensors"
    export_backbone(backbone, description, path)
    loaded, read = load_backbone(path)
    assert read == description and torch.equal(features(loaded, 48), features(backbone.eval(), 48))
    assert "--arch resnet18 contradicts" in refusal(load_backbone, path, arch="resnet18")


@pytest.mark.parametrize("where", ["top", "inside the Namespace"])
def test_a_malicious_file_is_refused_and_not_run(where, vit, tmp_path):
    trap = Malicious(tmp_path / "hacked")
    extra = {"epoch": trap} if where == "top" else {"args": argparse.Namespace(arch=trap)}
    message = refusal(load_backbone, dino_checkpoint(vit, tmp_path / "bad.pth", **extra))
    assert "bad.pth holds more than" in message and "weights_only" in message
    assert not (tmp_path / "hacked").exists()


@pytest.fixture(scope="module")
def files(vit, tmp_path_factory):
    """A folder of weights of every kind, good and bad."""
    folder, weights = tmp_path_factory.mktemp("files"), vit.state_dict()
    dino_checkpoint(vit, folder / "dino.pth")
    tiny = {f"backbone.{key}": value for key, value in build_backbone("cifar/tiny").state_dict().items()}
    told = {"arch": "cifar/tiny", "patch_size": None, "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    for name, state in (
            ("plain", weights), ("a tensor", torch.zeros(1)),
            ("none", {"epoch": 3, "optimizer": {"state": {}}}),
            ("lacking", {key.replace("norm.weight", "norm.wait") if key.startswith("norm") else key: value
                         for key, value in weights.items()}),
            ("cifar", {"student": tiny, "backbone": told, "loss": {"a": torch.zeros(())},
                       "args": {"arch": "tiny"}})):
        torch.save(state, folder / f"{name}.pth")
    os.mkfifo(folder / "fifo.pth")
    (folder / "junk.safetensors").write_bytes(b"junk")
    return folder


def test_the_only_network_of_a_checkpoint_needs_no_name(files):
    for key in (None, "student"):
        backbone, description = load_backbone(files / "cifar.pth", key)
        assert description == ("cifar/tiny", None, 32, (0.5,) * 3, (0.5,) * 3, "student")


@pytest.mark.parametrize("name, arguments, words", [
    ("away.pth", {}, "no checkpoint at .*away.pth"), ("a tensor.pth", {}, "is no checkpoint"),
    ("fifo.pth", {}, "fifo.pth is no regular file; name"),
    ("junk.safetensors", {}, "junk.safe.*restore a copy"),
    ("none.pth", {}, "no network's weights, only epoch, optimizer"),
    ("cifar.pth", {"checkpoint_key": "teacher"}, "no network 'teacher'; choose --checkpoint_key student"),
    ("dino.pth", {"checkpoint_key": "model"}, "--checkpoint_key student or --checkpoint_key teacher"),
    ("plain.pth", {"checkpoint_key": "student", "arch": "vit_tiny"}, "leave --checkpoint_key out"),
    ("plain.pth", {}, "with --arch"),
    ("plain.pth", {"arch": "vit_tiny", "patch_size": 16}, "--patch_size 16 contradicts .* is 8;"),
    ("plain.pth", {"arch": "vit_small"}, r"of other shapes: cls_token \[1, 1, 192\], not \[1, 1, 384\]"),
    ("plain.pth", {"arch": "resnet18", "patch_size": 16}, "--patch_size has no meaning for resnet18"),
    ("lacking.pth", {"arch": "vit_tiny"}, "1 missing: norm.weight; 1 unexpected: norm.wait"),
    ("dino.pth", {"arch": "vit_small"}, "--arch vit_small contradicts .* is vit_tiny;"),
    ("dino.pth", {"image_size": 96}, "--image_size 96 contradicts .* is 48;"),
    ("cifar.pth", {"random_weights": True}, "either --pretrained_weights or"),
    (None, {"random_weights": True, "arch": "vit_gigant", "patch_size": 16}, "unknown arch 'vit_gigant'"),
    (None, {}, "either --pretrained_weights or")])
def test_mistakes_about_weights_are_one_line(name, arguments, words, files):
    assert re.search(words, refusal(load_backbone, name and files / name, **arguments))


# ------------------------------------------------------------------------------------------------- features

def numbers(count):
    """A data set: image i is all i, its label i."""
    return [(torch.full((3, 2, 2), float(index)), index) for index in range(count)]


def width_two(batch):
    return batch[:, :2, 0, 0] * torch.tensor([1.0, -1.0])


@pytest.mark.parametrize("world, count", [(1, 7), (2, 7), (3, 2)])
def test_features_are_in_order_on_every_rank(world, count):
    expected = torch.arange(count)
    for rows, labels in run_ranks(extract_features, world, width_two, numbers(count), CPU, 2):
        assert torch.equal(rows, torch.stack([expected, -expected], 1).float())
        assert torch.equal(labels, expected)


def test_features_that_are_missing_or_not_finite():
    assert "no images" in refusal(extract_features, width_two, [], CPU)
    assert "not finite" in refusal(extract_features, lambda batch: batch.flatten(1) / 0, numbers(3), CPU)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts files as Linux lists them")
def test_no_file_of_a_worker_outlives_its_batch():
    opened = []

    def watched(batch):
        opened.append(len(os.listdir("/proc/self/fd")))
        return width_two(batch)
    labels = extract_features(watched, numbers(200), CPU, batch_size=2, num_workers=2)[1]
    assert torch.equal(labels, torch.arange(200)) and max(opened[50:]) <= max(opened[:50]) + 10


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_is_named_with_the_record():
    message = refusal(write_record, {"top1": 1.0}, Path("/dev/full"))
    assert message.startswith("cannot write to /dev/full: No space left on device. What it held")
