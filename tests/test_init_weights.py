"""--init_weights: runs that start from the weights of a file or of timm."""
import copy

import cifar.main
import main
import pretrained
import pytest
import timm
import torch
import utils
import vision_transformer
from augmentations import IMAGENET_MEAN, IMAGENET_STD
from conftest import refusal
from pretrained import Description, export_backbone, init_backbones, load_backbone
from vision_transformer import build_backbone


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    monkeypatch.setitem(vision_transformer.VIT_ARCHS, "vit_tiny", (32, 2))  # width, heads
    monkeypatch.setattr(cifar.main, "draw_curves", lambda *_: None)
    monkeypatch.setattr(main, "draw_curves", lambda *_: None)


def features(backbone, size):
    with torch.no_grad():
        return backbone.eval()(torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0)))


def described(arch="vit_tiny", patch_size=8, size=32):
    return Description(arch, patch_size, size, IMAGENET_MEAN, IMAGENET_STD)


def pretraining(images, output, *more):
    """Flags of main.py for one epoch of 3 steps."""
    return ["--arch", "vit_tiny", "--patch_size", "8", "--global_crops_size", "32", "--local_crops_size",
            "16", "--local_crops_number", "1", "--out_dim", "32", "--num_workers", "0", "--device", "cpu",
            "--amp", "none", "--batch_size_per_gpu", "7", "--epochs", "1", "--knn_every", "1",
            "--knn_data_path", str(images), "--data_path", str(images / "train"), "--output_dir", str(output),
            *map(str, more)]


def small_images(images, output, *more):
    """Flags of cifar/main.py for one epoch of 4 steps."""
    return ["--dataset", "folder", "--data_path", str(images), "--arch", "tiny", "--projector", "16", "8",
            "--batch_size", "5", "--epochs", "1", "--schedule", "constant", "--lr", "0.05", "--device", "cpu",
            "--amp", "none", "--output_dir", str(output), *map(str, more)]


@pytest.mark.parametrize("arch", ["vit_tiny", "timm/vit_tiny_patch16_224"])
def test_position_embeddings_are_those_of_the_source_at_the_new_size(arch, tmp_path, capsys):
    """timm interpolates them in the source's forward pass."""
    patch = 8 if arch == "vit_tiny" else 16
    small, large = 4 * patch, 6 * patch
    source, network = (build_backbone(arch, patch, size) for size in (large, small))
    torch.nn.init.normal_(source.pos_embed)  # so large that they cannot be neglected
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    init_backbones([network], tmp_path / "weights.pth", described(arch, None, small))
    assert network.pos_embed.shape[1] == 1 + 16
    torch.testing.assert_close(features(network, small), features(source, small))
    assert "position embeddings resampled from 36 to 16 patches" in capsys.readouterr().out


def test_timm_by_name_only_with_download(tmp_path, monkeypatch, capsys):
    """Weights come from a file in place of the hub."""
    source, create = timm.create_model("resnet10t"), timm.create_model
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    monkeypatch.setattr(pretrained.timm, "create_model", lambda name, **more: create(
        name, pretrained_cfg_overlay={"file": str(tmp_path / "timm.pth")}, **more))
    network = build_backbone("timm/resnet10t")
    description = described("timm/resnet10t", None, 64)._replace(mean=(0.1, 0.2, 0.3))
    message = refusal(init_backbones, [network], "timm/resnet10t", description)
    assert message.startswith("--init_weights timm/resnet10t comes over the network; add --download")
    init_backbones([network], "timm/resnet10t", description, download=True)
    source.reset_classifier(0)
    assert torch.equal(features(network, 64), features(source, 64))
    assert "its images had mean (0.485, 0.456, 0.406)" in capsys.readouterr().out
    assert "cannot fetch timm/resnet10" in refusal(init_backbones, [network], "timm/resnet10", description,
                                                   download=True)


def test_weights_that_do_not_fit(tmp_path):
    told, untold = tmp_path / "told.safetensors", tmp_path / "untold.pth"
    export_backbone(build_backbone("vit_tiny", 8, 32), described(), told)
    torch.save(build_backbone("vit_tiny", 8, 32).state_dict(), untold)
    message = refusal(init_backbones, [build_backbone("resnet18")], told, described("resnet18"))
    assert "holds vit_tiny, this run trains resnet18; give the same" in message
    network = build_backbone("vit_tiny", 16, 32)
    for path in (told, untold):
        message = refusal(init_backbones, [network], path, described(patch_size=16))
        assert "proj.weight [32, 3, 8, 8], not " in message
        assert message.endswith("Check --arch and --patch_size")


@pytest.mark.parametrize("script, flags, score, networks, more", [
    (main, pretraining, "knn_acc", 2, []), (cifar.main, small_images, "test_acc", 1, ["--epochs", "2"])])
def test_a_run_starts_at_the_accuracy_of_its_source_and_does_not_load_it_again(
        images, tmp_path, monkeypatch, capsys, script, flags, score, networks, more):
    source, output, started = tmp_path / "source.pth", tmp_path / "second", []

    def initialise(backbones, *args):
        init_backbones(backbones, *args)
        started.extend(features(copy.deepcopy(backbone), 32) for backbone in backbones)
    monkeypatch.setattr(script, "init_backbones", initialise)
    script.main(flags(images, tmp_path / "first"))
    (tmp_path / "first" / "checkpoint.pth").rename(source)
    arguments = flags(images, output, "--seed", "1", "--init_weights", source)
    capsys.readouterr()
    script.main(arguments)
    assert f"the backbone starts from {source}, the head anew\n" in capsys.readouterr().out
    torch.testing.assert_close(started, [features(load_backbone(source)[0], 32)] * networks)
    *_, reached = utils.read_records(tmp_path / "first" / "log.txt")
    start, *_ = utils.read_records(output / "log.txt")
    assert start["epoch"] == -1 and [start[f"{score}@{k}"] for k in (1, 5)] == [
        reached[f"{score}@{k}"] for k in (1, 5)]

    source.unlink()
    assert "--init_weights" in refusal(script.main, flags(images, output, "--seed", "1"))
    script.main([*arguments, *more])  # finished, or resumed: without the file
    assert "the backbone starts" not in capsys.readouterr().out and len(started) == networks
