"""--init_weights: runs that start from the weights of a file or of timm."""
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

NARROW = (32, 2)  # width and heads of a ViT that is quick


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    monkeypatch.setitem(vision_transformer.VIT_ARCHS, "vit_tiny", NARROW)
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


def test_networks_equal_the_source_and_the_line_says_where_from(tmp_path, capsys):
    source = build_backbone("vit_tiny", 8, 32)
    export_backbone(source, described(), tmp_path / "backbone.safetensors")
    networks = [build_backbone("vit_tiny", 8, 32, rate) for rate in (0.1, 0.0)]
    init_backbones(networks, tmp_path / "backbone.safetensors", described())
    for network in networks:
        assert torch.equal(features(network, 32), features(source, 32))
    line, = capsys.readouterr().out.splitlines()
    assert line == f"the backbone starts from {tmp_path / 'backbone.safetensors'}, the head anew"


@pytest.mark.parametrize("arch, prefix", [("vit_tiny", 1), ("timm/vit_tiny_patch16_224", 1)])
def test_position_embeddings_are_those_of_the_source_at_the_new_size(arch, prefix, tmp_path, capsys):
    """timm interpolates them in the source's forward pass."""
    patch = 8 if arch == "vit_tiny" else 16
    small, large = 4 * patch, 6 * patch
    source, network = (build_backbone(arch, patch, size) for size in (large, small))
    torch.nn.init.normal_(source.pos_embed)  # so large that they cannot be neglected
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    init_backbones([network], tmp_path / "weights.pth", described(arch, None, small))
    assert network.pos_embed.shape[1] == 16 + prefix
    torch.testing.assert_close(features(network, small), features(source, small))
    assert "position embeddings resampled from 36 to 16 patches" in capsys.readouterr().out


@pytest.fixture
def timms(tmp_path, monkeypatch):
    """timm's trained network, whose weights come from a file in place of the hub."""
    source = timm.create_model("resnet10t")
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    create = timm.create_model

    def local(name, **more):
        return create(name, pretrained_cfg_overlay={"file": str(tmp_path / "timm.pth")}, **more)
    monkeypatch.setattr(pretrained.timm, "create_model", local)
    return source


def test_timm_by_name_only_with_download(timms, capsys):
    network = build_backbone("timm/resnet10t")
    description = described("timm/resnet10t", None, 64)._replace(mean=(0.1, 0.2, 0.3))
    before = features(network, 64)
    with pytest.raises(utils.UserError, match="timm/resnet10t comes over the network; add --download"):
        init_backbones([network], "timm/resnet10t", description)
    assert torch.equal(features(network, 64), before)
    init_backbones([network], "timm/resnet10t", description, download=True)
    timms.reset_classifier(0)
    assert torch.equal(features(network, 64), features(timms, 64))
    assert "its images had mean (0.485, 0.456, 0.406)" in capsys.readouterr().out
    with pytest.raises(utils.UserError, match="cannot fetch timm/resnet10"):
        init_backbones([network], "timm/resnet10", description, download=True)


def test_weights_that_do_not_fit(tmp_path):
    told, untold = tmp_path / "told.safetensors", tmp_path / "untold.pth"
    export_backbone(build_backbone("vit_tiny", 8, 32), described(), told)
    torch.save(build_backbone("vit_tiny", 8, 32).state_dict(), untold)
    with pytest.raises(utils.UserError, match="holds vit_tiny, this run trains resnet18; give the same"):
        init_backbones([build_backbone("resnet18")], told, described("resnet18"))
    network = build_backbone("vit_tiny", 16, 32)
    for path in (told, untold):
        with pytest.raises(utils.UserError, match=r"proj.weight \[32, 3, 8, 8\], not .* --patch_size"):
            init_backbones([network], path, described(patch_size=16))
    with pytest.raises(utils.UserError, match="no checkpoint at"):
        init_backbones([network], tmp_path / "nowhere.pth", described())


def test_main_starts_at_the_accuracy_of_its_source_and_does_not_load_it_again(images, tmp_path, capsys):
    first, source, output = tmp_path / "first", tmp_path / "source.pth", tmp_path / "second"
    main.main(pretraining(images, first, "--lr", "0.01", "--warmup_epochs", "0", "--momentum_teacher", "0.5"))
    (first / "checkpoint.pth").rename(source)
    arguments = pretraining(images, output, "--seed", "1", "--init_weights", source)
    args = main.parse_args(arguments)
    run = main.Run(args, torch.device("cpu"))
    head = run.student.head.mlp[0].weight.clone()
    main.train(args, torch.device("cpu"))
    *_, reached = utils.read_records(first / "log.txt")
    start, *_ = utils.read_records(output / "log.txt")
    assert start["epoch"] == -1
    assert [start[name] for name in ("knn_acc@1", "knn_acc@5")] == [
        reached[name] for name in ("knn_acc@1", "knn_acc@5")]
    assert f"the backbone starts from {source}" in capsys.readouterr().out

    expected = features(load_backbone(source)[0], 32)
    init_backbones([network.backbone for network in (run.student, run.teacher)], source, run.description)
    for network in (run.student, run.teacher):
        torch.testing.assert_close(features(network.backbone, 32), expected)
        assert torch.equal(network.head.mlp[0].weight, head)
    source.unlink()
    capsys.readouterr()
    main.main(arguments)  # finished: nothing is read
    assert "is finished" in capsys.readouterr().out
    assert "--init_weights" in refusal(main.main, pretraining(images, output, "--seed", "1"))


def test_cifar_starts_at_the_accuracy_of_its_source_and_does_not_load_it_again(images, tmp_path, capsys):
    cifar.main.main(small_images(images, tmp_path / "first"))
    source, output = tmp_path / "source.pth", tmp_path / "second"
    (tmp_path / "first" / "checkpoint.pth").rename(source)
    arguments = small_images(images, output, "--seed", "1", "--init_weights", source)
    run, records = cifar.main.train(cifar.main.parse_args(arguments))
    *_, reached = utils.read_records(tmp_path / "first" / "log.txt")
    assert records[0]["epoch"] == -1
    assert [records[0][name] for name in ("test_acc@1", "test_acc@5")] == [
        reached[name] for name in ("test_acc@1", "test_acc@5")]
    assert f"the backbone starts from {source}" in capsys.readouterr().out
    trained = features(run.model.backbone, 32)
    fresh = cifar.main.Run(run.args)
    init_backbones([fresh.model.backbone], source, fresh.description)
    torch.testing.assert_close(features(fresh.model.backbone, 32), features(load_backbone(source)[0], 32))
    assert (features(fresh.model.backbone, 32) - trained).abs().max() > 0.01

    source.unlink()
    capsys.readouterr()
    assert "--init_weights" in refusal(cifar.main.main, small_images(images, output, "--seed", "1"))
    cifar.main.main([*arguments, "--epochs", "2"])  # resumes without the file
    assert "the backbone starts" not in capsys.readouterr().out
    assert [r["epoch"] for r in utils.read_records(output / "log.txt")] == [-1, 0, 1]
