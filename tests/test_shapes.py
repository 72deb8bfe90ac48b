"""The drawn data set: reproducible, balanced, and told apart by nothing simpler than shape."""
import functools
import hashlib

import pytest
import torch
import torch.nn.functional as F
from cifar.shapes import CLASSES, draw_shapes

CHANCE = 100 / len(CLASSES)
shapes = functools.cache(draw_shapes)


def vote(distance, k):
    """Accuracy in percent of the k nearest training images' plain vote. distance: [test, training images]."""
    index = distance.topk(k, largest=False).indices
    return 100 * (shapes("train")[1][index].mode(1).values == shapes("test")[1]).float().mean().item()


def mean_colour(images, labels):
    return images.float().mean((2, 3)) / 255


def drawn(images):
    """[N, 3, S, S] -> bool [N, S, S]: far from the mid-grey ground."""
    return (images.float().mean(1) / 255 - 0.5).abs() > 0.2


def area(images, labels):
    return drawn(images).float().mean((1, 2)).unsqueeze(1)


def position(images, labels):
    """[N, 4]: centroid and centre of the bounding box. (The size of the box is shape: a bar is longer.)"""
    place = torch.arange(images.shape[-1], dtype=torch.float32)
    centres = []
    for line in (drawn(images).sum(1).float(), drawn(images).sum(2).float()):
        first = line.gt(0).int().argmax(1)
        last = len(place) - 1 - line.flip(1).gt(0).int().argmax(1)
        centres += [(line * place).sum(1) / line.sum(1), (first + last) / 2]
    return torch.stack(centres, 1)


def slight_tint_of_the_class(images, labels):
    return mean_colour(images, labels) + 0.02 * labels.unsqueeze(1)


@pytest.mark.parametrize("split, per_class", [("train", 500), ("test", 100)])
def test_images_are_balanced_and_vary_within_a_class(split, per_class):
    images, labels = shapes(split)
    assert images.dtype == torch.uint8 and images.shape == (10 * per_class, 3, 32, 32)
    assert labels.tolist() == per_class * list(range(10)) and len(set(CLASSES)) == 10
    for label in range(10):
        assert (images[labels == label].float() / 255).std(0).min() > 0.05


def test_no_image_is_there_twice():
    images = torch.cat([shapes("train")[0], shapes("test")[0]])
    assert len({image.tobytes() for image in images.numpy()}) == len(images)


def test_same_bits_on_every_machine():
    for split, bits in (("test", "6f7c183789a31f67"), ("train", "2c32728de89beb80")):
        assert hashlib.sha256(shapes(split)[0].numpy().tobytes()).hexdigest()[:16] == bits


def test_raw_pixels_do_badly():
    pixels = (shapes(split)[0].flatten(1).float() for split in ("test", "train"))
    queries, bank = (F.normalize(rows - rows.mean(1, keepdim=True)) for rows in pixels)
    assert vote(-queries @ bank.T, k=20) < 45


@pytest.mark.parametrize("statistic, low, high", [
    (mean_colour, 0, 2), (area, 0, 2), (position, 0, 2),
    (slight_tint_of_the_class, 3, 10)])  # the bound is worth something only if a leak breaks it
def test_statistics_do_not_tell_the_class(statistic, low, high):
    bank, queries = statistic(*shapes("train")), statistic(*shapes("test"))
    accuracy = vote(torch.cdist(queries / bank.std(0), bank / bank.std(0)), k=50)
    assert low * CHANCE <= accuracy < high * CHANCE
