"""The drawn data set: reproducible, balanced, and told apart by nothing simpler than shape."""
import hashlib

import pytest
import torch
import torch.nn.functional as F

from cifar.shapes import CLASSES, draw_shapes

CHANCE = 100 / len(CLASSES)


@pytest.fixture(scope="module")
def train():
    return draw_shapes("train")


@pytest.fixture(scope="module")
def held_out():
    return draw_shapes("test")


def cosine_knn(bank, bank_labels, queries, labels, settings):
    """Accuracies in percent of the weighted vote for each (k, temperature), written out to depend on no code of ours."""
    similarity, index = (F.normalize(queries) @ F.normalize(bank).T).topk(max(k for k, _ in settings))
    accuracies = []
    for k, temperature in settings:
        weights = (similarity[:, :k] / temperature).exp()
        votes = torch.zeros(len(queries), len(CLASSES)).scatter_add_(1, bank_labels[index[:, :k]], weights)
        accuracies.append(100 * (votes.argmax(1) == labels).float().mean().item())
    return accuracies


def euclidean_knn(bank, bank_labels, queries, labels, k=50):
    """Accuracy in percent of a plain vote, statistics scaled to one deviation each."""
    mean, std = bank.mean(0), bank.std(0)
    index = torch.cdist((queries - mean) / std, (bank - mean) / std).topk(k, largest=False).indices
    return 100 * (bank_labels[index].mode(1).values == labels).float().mean().item()


def pixels(images):
    return images.flatten(1).float() / 255


def ink(images):
    """[N, 3, H, W] -> [N, H, W]: distance from the mid-grey ground, linear in a drawing's coverage."""
    return (images.float().mean(1) / 255 - 0.5).abs()


def mean_colour(images):
    return pixels(images).unflatten(1, (3, -1)).mean(2)


def area(images):
    return (ink(images) > 0.2).float().mean((1, 2)).unsqueeze(1)


def position(images):
    """[N, 4]: centroid of the ink and centre of its bounding box. (The size of the box is shape: a bar is longer.)"""
    drawn = ink(images) > 0.2
    place = torch.arange(images.shape[-1], dtype=torch.float32)
    centres = []
    for line in (drawn.sum(1).float(), drawn.sum(2).float()):
        first = line.gt(0).int().argmax(1)
        last = len(place) - 1 - line.flip(1).gt(0).int().argmax(1)
        centres += [(line * place).sum(1) / line.sum(1), (first + last) / 2]
    return torch.stack(centres, 1)


@pytest.mark.parametrize("split, per_class", [("train", 500), ("held_out", 100)])
def test_types_shapes_and_balance(split, per_class, request):
    images, labels = request.getfixturevalue(split)
    assert images.dtype == torch.uint8 and images.shape == (per_class * 10, 3, 32, 32)
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [per_class] * 10
    assert len(set(CLASSES)) == 10


def test_other_sizes():
    images, labels = draw_shapes("test", per_class=3, size=45)
    assert images.shape == (30, 3, 45, 45) and labels.shape == (30,)


def test_same_arguments_same_bits(held_out):
    images, labels = draw_shapes("test")
    assert torch.equal(images, held_out[0]) and torch.equal(labels, held_out[1])
    assert not torch.equal(draw_shapes("test", seed=1)[0], held_out[0])


def test_same_bits_on_every_machine():
    images, _ = draw_shapes("test", per_class=5)
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16] == "bb6d564861d70ea6"


def test_no_image_twice(train, held_out):
    both = torch.cat((train[0], held_out[0]))
    assert len({image.tobytes() for image in both.numpy()}) == len(both)


def test_images_of_a_class_vary(train):
    images, labels = train
    for label in range(len(CLASSES)):
        assert pixels(images[labels == label]).std(0).min() > 0.05, CLASSES[label]


def test_raw_pixels_do_badly(train, held_out):
    bank, queries = (pixels(images) - pixels(images).mean(1, keepdim=True) for images, _ in (train, held_out))
    settings = [(k, temperature) for k in (20, 200) for temperature in (0.07, 0.5)]
    assert max(cosine_knn(bank, train[1], queries, held_out[1], settings)) < 45


@pytest.mark.parametrize("statistic", [mean_colour, area, position])
def test_statistics_do_not_tell_the_class(train, held_out, statistic):
    assert euclidean_knn(statistic(train[0]), train[1], statistic(held_out[0]), held_out[1]) < 2 * CHANCE


def test_a_leak_would_be_seen(train, held_out):
    # the bound above is worth something only if a leak breaks it: tint every image slightly by its class
    bank, queries = (mean_colour(images) + 0.02 * labels.unsqueeze(1) for images, labels in (train, held_out))
    assert euclidean_knn(bank, train[1], queries, held_out[1]) > 3 * CHANCE


@pytest.mark.parametrize("arguments", [dict(split="val"), dict(split="train", per_class=0), dict(split="train", size=8)])
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError):
        draw_shapes(**arguments)
