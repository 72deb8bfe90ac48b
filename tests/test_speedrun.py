"""The parts of cifar/speedrun.py, and a short run of the whole."""
import json

import pytest
import torch
import torch.nn.functional as F
from augmentations import CIFAR_MEAN, CIFAR_STD, normalize
from cifar import speedrun
from conftest import assert_same, refusal, write_noise
from torch.testing import assert_close

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    """Smooth, so that neighbouring pixels are alike: uint8 [64, 3, 32, 32]."""
    noise = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(noise, size=32, mode="bilinear") * 255).to(torch.uint8)


def test_the_first_layer_whitens_patches(images):
    layer, channels = speedrun.whitening_layer(images, epsilon=0)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    responses = F.conv2d(normalize(images, CIFAR_MEAN, CIFAR_STD), layer.weight).transpose(0, 1).flatten(1)
    half = responses[:channels // 2]
    assert_close(half @ half.T / half.shape[1], torch.eye(27), rtol=0, atol=1e-2)
    assert torch.equal(responses[27:], -half)


def test_whitened_features_have_the_banks_statistics():
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(6, 6, generator=generator)
    bank, queries = torch.randn(500, 6, generator=generator) @ mix + 3, torch.randn(9, 6, generator=generator)
    white, others = speedrun.whiten(bank, queries)
    assert_close(white.T.cov(correction=0), torch.eye(6), rtol=0, atol=1e-4)
    assert_close(white.mean(0), torch.zeros(6), rtol=0, atol=1e-4)
    inverse, difference = bank.T.cov(correction=0).inverse(), queries[:, None] - bank
    mahalanobis = torch.einsum("qnd,de,qne->qn", difference, inverse, difference).sqrt()
    assert_close(torch.cdist(others, white), mahalanobis, rtol=1e-3, atol=1e-3)
    few, others = speedrun.whiten(bank[:5], queries)    # vary in 4 directions
    assert few.shape == (5, 4) and others.shape == (9, 4)
    assert_close(few.T.cov(correction=0), torch.eye(4), rtol=0, atol=1e-3)


def test_features_do_not_tell_an_image_from_its_mirror_image(images, one_thread):
    torch.manual_seed(0)
    backbone = speedrun.Backbone(images).eval()
    features = speedrun.extract(backbone, images, CPU, None)
    assert features.shape == (64, sum(speedrun.WIDTHS))
    assert_close(speedrun.extract(backbone, images.flip(3), CPU, None), features)
    image = normalize(images[:1], CIFAR_MEAN, CIFAR_STD)
    stages = features[:1].split(speedrun.WIDTHS, dim=1)
    for stage, x, y in zip(stages, backbone(image), backbone(image.flip(3)), strict=True):
        assert_close(stage, x / x.norm() + y / y.norm(), rtol=1e-4, atol=1e-5)


def test_a_run_trains_all_but_the_first_layer_and_repeats(tmp_path, monkeypatch, one_thread):
    folder = write_noise(tmp_path / "images", {"train": 12, "test": 5})
    for name, value in {"BATCH": 8, "WIDTHS": (8, 8, 12), "PROJECTOR": (16, 8), "K": 5}.items():
        monkeypatch.setattr(speedrun, name, value)
    kept, build = [], speedrun.Backbone

    def remember(images):
        network = build(images)
        kept.append((network, {name: value.clone() for name, value in network.state_dict().items()}))
        return network
    monkeypatch.setattr(speedrun, "Backbone", remember)
    for _ in range(2):
        speedrun.main(["--dataset", "folder", "--data_path", str(folder), "--epochs", "2", "--device", "cpu",
                       "--output", str(tmp_path / "results.jsonl")])
    (first, before), (second, _) = kept
    assert_same(first.state_dict(), second.state_dict())
    changed = {name for name, value in first.named_parameters() if not torch.equal(value, before[name])}
    assert changed == set(before) & {name for name, _ in first.named_parameters()} - {"stem.0.weight"}
    short = ["--dataset", "folder", "--data_path", str(folder), "--epochs", "0.1", "--device", "cpu"]
    assert "0.1 epochs of 24 images are no step of 8" in refusal(speedrun.main, short)
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(records) == 2 and records[0]["whitened"] == records[1]["whitened"] >= 50
