"""The batched augmentation against torchvision's, operation by operation and as a whole."""
import math
import random
from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop

import augmentations as ours

# Float arithmetic in another order than torchvision's; a step of 8 bits is 4e-3.
EXACT = 5e-7
HUE_TOLERANCE = 5e-6  # torchvision's own float error: it divides by the chroma, and multiplies by it again


pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def float_images(count=48, size=16):
    """Random colours, and what colour arithmetic trips over: grey, black, white, pure, and equal channels."""
    images = torch.rand(count, 3, size, size, generator=generator(1))
    images[0] = images[0, :1]
    images[1], images[2] = 0, 1
    images[3] = (images[3] > 0.5).float()
    images[4, 0] = images[4, 1]
    images[5, 1] = images[5, 2]
    images[6, 0] = images[6, 2]
    images[7] = 0.5 + images[7] * 1e-3
    return images


def byte_images(count=64, height=32, width=32):
    """Noise on smooth colour gradients, as uint8."""
    smooth = torch.rand(count, 3, 4, 4, generator=generator(2))
    smooth = torch.nn.functional.interpolate(smooth, (height, width), mode="bilinear")
    noise = torch.rand(count, 3, height, width, generator=generator(3))
    return (smooth * 0.8 + noise * 0.2).mul(255).round().to(torch.uint8)


def one_by_one(function, images, *factors):
    return torch.stack([function(image, *(f.item() for f in parts)) for image, *parts in zip(images, *factors)])


def largest_difference(a, b):
    return (a - b).abs().max().item()


def ks_distance(a, b):
    """Two-sample Kolmogorov-Smirnov statistic; ties allowed."""
    a, b, at = np.sort(a), np.sort(b), np.concatenate((a, b))
    return np.abs(np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)).max()


def ks_limit(n, m):
    """Exceeded once in about a million by samples of one distribution (conservative where there are ties)."""
    return 2.7 * math.sqrt((n + m) / (n * m))


def assert_frequency(events, p):
    """Five standard deviations of the binomial."""
    assert abs(events.float().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / len(events))


# --- operations at given parameters -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, low, high, tolerance", [
    ("adjust_brightness", 0, 2.5, EXACT), ("adjust_contrast", 0, 2.5, EXACT), ("adjust_saturation", 0, 2.5, EXACT),
    ("adjust_hue", -0.5, 0.5, HUE_TOLERANCE)])
def test_colour_operation_equals_torchvision(name, low, high, tolerance):
    images = float_images()
    factor = torch.linspace(low, high, len(images))[torch.randperm(len(images), generator=generator())]
    before = images.clone()
    result = getattr(ours, name)(images, factor)
    assert torch.equal(images, before)
    assert largest_difference(result, one_by_one(getattr(reference, name), images, factor)) < tolerance
    assert result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("factor", [-0.5, -0.1, 0.0, 0.1, 1 / 3, 0.5])
def test_hue_of_every_corner_and_edge_of_the_colour_cube(factor):
    steps = torch.linspace(0, 1, 9)
    colours = torch.cartesian_prod(steps, steps, steps).T.reshape(1, 3, 27, 27)
    expected = reference.adjust_hue(colours, factor)
    assert largest_difference(ours.adjust_hue(colours, torch.tensor([factor])), expected) < HUE_TOLERANCE


def test_grayscale_equals_torchvision():
    images = float_images()
    assert largest_difference(ours.to_grayscale(images), reference.rgb_to_grayscale(images)) < EXACT


def test_jitter_in_each_of_the_24_orders_equals_torchvision():
    orders = torch.tensor(list(permutations(range(4))))
    images = float_images(len(orders))
    factors = torch.rand(len(orders), 4, generator=generator()) * torch.tensor([1.6, 1.6, 1.6, 1.0])
    factors -= torch.tensor([0, 0, 0, 0.5])
    operations = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation,
                  reference.adjust_hue)
    expected = []
    for image, order, factor in zip(images, orders.tolist(), factors.tolist()):
        for k in order:
            image = operations[k](image, factor[k])
        expected.append(image)
    before = images.clone()
    # Contrast and saturation up to 1.6 multiply the error of the hue.
    assert largest_difference(ours.jitter(images, orders, factors), torch.stack(expected)) < 2 * HUE_TOLERANCE
    assert torch.equal(images, before)
    for row in range(len(orders)):  # alone: one hue place for the whole batch, another path
        alone = ours.jitter(images[row:row + 1], orders[row:row + 1], factors[row:row + 1])
        assert largest_difference(alone, expected[row]) < 2 * HUE_TOLERANCE
    assert torch.equal(images, before)


CROPS = [  # height, width, size, (top, left, height, width): enlarged, same, reduced, both, single pixels, borders
    (32, 32, 32, (0, 0, 32, 32)), (32, 32, 32, (5, 9, 20, 17)), (32, 32, 32, (31, 31, 1, 1)),
    (32, 32, 8, (2, 3, 29, 27)), (40, 56, 16, (7, 11, 33, 9)), (40, 56, 16, (0, 40, 11, 16)),
    (56, 40, 24, (30, 0, 26, 40)), (64, 64, 5, (1, 1, 63, 63))]


@pytest.mark.parametrize("height, width, size, box", CROPS)
def test_crop_resize_equals_torchvision(height, width, size, box):
    images = byte_images(3, height, width)
    boxes = torch.tensor([box] * 3, dtype=torch.float)
    result = ours.crop_resize(images, boxes, size)
    assert result.dtype == torch.float32 and result.shape == (3, 3, size, size)
    bilinear = InterpolationMode.BILINEAR
    # torchvision on float tensors, antialiased: the same filter in another order of sums.
    expected = reference.resized_crop(images / 255, *box, [size, size], bilinear, antialias=True)
    assert largest_difference(result, expected) < 5e-6
    # On PIL, which rounds to 8 bits after either axis: up to a step and a half of them.
    pil = torch.stack([reference.to_tensor(reference.resized_crop(Image.fromarray(image.permute(1, 2, 0).numpy()), *box,
                                                                  [size, size], bilinear)) for image in images])
    assert largest_difference(result, pil) < 1.5 / 255
    # Float images keep their range.
    assert largest_difference(ours.crop_resize(images.float(), boxes, size), expected * 255) < 255 * 5e-6


def test_crop_resize_takes_every_image_its_own_box_and_flip():
    images = byte_images(40)
    boxes = ours.draw_boxes(40, 32, 32, (0.1, 1), (3 / 4, 4 / 3), generator())
    flip = torch.arange(40) % 3 == 0
    expected = []
    for image, box, mirrored in zip(images / 255, boxes.int().tolist(), flip):
        image = reference.resized_crop(image, *box, [32, 32], InterpolationMode.BILINEAR, antialias=True)
        expected.append(reference.hflip(image) if mirrored else image)
    assert largest_difference(ours.crop_resize(images, boxes, 32, flip), torch.stack(expected)) < 5e-6


def test_normalize_equals_torchvision():
    images = byte_images()
    expected = reference.normalize(images / 255, ours.CIFAR_MEAN, ours.CIFAR_STD)
    assert largest_difference(ours.normalize(images, ours.CIFAR_MEAN, ours.CIFAR_STD), expected) < 2e-6
    assert largest_difference(ours.normalize(images / 255, ours.CIFAR_MEAN, ours.CIFAR_STD), expected) < 2e-6


# --- distributions ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width, scale, ratio", [
    (32, 32, (0.2, 1.0), (3 / 4, 4 / 3)),
    (96, 64, (0.08, 1.0), (1 / 2, 5 / 4)),     # upright crops: height and width differ in distribution
    (48, 64, (0.7, 1.0), (1 / 3, 3)),          # most tries fail, some images fall back
])
def test_boxes_are_distributed_as_torchvision(height, width, scale, ratio):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(5000)]).numpy()
    drawn = ours.draw_boxes(40_000, height, width, scale, ratio, generator()).numpy()
    assert (drawn == np.round(drawn)).all()

    def features(boxes):
        top, left, h, w = boxes.T.astype(float)
        free_rows, free_columns = height - h, width - w
        return {"area": h * w / (height * width), "log ratio": np.log(w / h), "top": top, "left": left,
                "relative top": top / np.maximum(free_rows, 1), "relative left": left / np.maximum(free_columns, 1),
                "correlation of sides": h - w, "correlation of corner": top - left}

    ours_, theirs_ = features(drawn), features(theirs)
    for name in ours_:
        assert ks_distance(ours_[name], theirs_[name]) < ks_limit(40_000, 5000), name
    assert drawn[:, :2].min() == 0
    assert (drawn[:, 0] + drawn[:, 2]).max() == height and (drawn[:, 1] + drawn[:, 3]).max() == width


@pytest.mark.parametrize("height, width", [(32, 32), (20, 90), (90, 20), (31, 64), (65, 30)])
def test_central_crop_where_no_try_fits(height, width):
    scale, ratio = (4.0, 5.0), (3 / 4, 4 / 3)
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), scale, ratio)
    boxes = ours.draw_boxes(5, height, width, scale, ratio, generator())
    assert boxes.tolist() == [list(expected)] * 5


def test_frequencies_orders_and_factors():
    count = 24_000
    drawn = ours.SimCLRAugmentation().draw(count, 32, 32, generator())
    assert_frequency(drawn.flip, 0.5)
    assert_frequency(drawn.jittered, 0.8)
    assert_frequency(drawn.grayscale, 0.2)
    for a, b, p in ((drawn.flip, drawn.jittered, 0.4), (drawn.flip, drawn.grayscale, 0.1),
                    (drawn.jittered, drawn.grayscale, 0.16)):
        assert_frequency(a & b, p)

    orders, counts = drawn.order.unique(dim=0, return_counts=True)
    assert sorted(map(tuple, orders.tolist())) == list(permutations(range(4)))
    assert ((counts - count / 24) ** 2 / (count / 24)).sum() < 70  # chi-square, 23 degrees: once in a million

    uniform = np.linspace(0, 1, 100_001)
    for factor, low, high in zip(drawn.factors.T, (0.6, 0.6, 0.6, -0.1), (1.4, 1.4, 1.4, 0.1)):
        assert ks_distance(((factor - low) / (high - low)).numpy(), uniform) < ks_limit(count, len(uniform))
    assert drawn.factors.T.corrcoef().fill_diagonal_(0).abs().max() < 5 / math.sqrt(count)


def test_arguments_set_the_distributions():
    augment = ours.SimCLRAugmentation(scale=(0.5, 0.6), ratio=(1, 1), jitter=(2.0, 0.1, 0, 0), jitter_p=0,
                                      grayscale_p=1, flip_p=1)
    drawn = augment.draw(2000, 100, 100, generator())
    assert drawn.flip.all() and drawn.grayscale.all() and not drawn.jittered.any()
    low, high = drawn.factors.amin(0), drawn.factors.amax(0)
    assert torch.allclose(low, torch.tensor([0, 0.9, 1, 0]), atol=5e-3) and (low >= torch.tensor([0, 0.9, 1, 0])).all()
    assert torch.allclose(high, torch.tensor([3, 1.1, 1, 0]), atol=5e-3)
    assert (drawn.boxes[:, 2] == drawn.boxes[:, 3]).all()
    area = drawn.boxes[:, 2] * drawn.boxes[:, 3] / 10_000
    assert 0.49 < area.min() < 0.51 and 0.59 < area.max() < 0.61


# --- the whole --------------------------------------------------------------------------------------------------------

def composed_of_torchvision(augment, image, p, row):
    """One float view of one float image, from torchvision's functions and the drawn parameters."""
    box = p.boxes[row].int().tolist()
    image = reference.resized_crop(image, *box, [augment.size] * 2, InterpolationMode.BILINEAR, antialias=True)
    if p.flip[row]:
        image = reference.hflip(image)
    if p.jittered[row]:
        brightness, contrast, saturation, hue = p.factors[row].tolist()
        for k in p.order[row].tolist():
            image = (reference.adjust_brightness(image, brightness) if k == 0 else
                     reference.adjust_contrast(image, contrast) if k == 1 else
                     reference.adjust_saturation(image, saturation) if k == 2 else
                     reference.adjust_hue(image, hue))
    if p.grayscale[row]:
        image = reference.rgb_to_grayscale(image, 3)
    return reference.normalize(image, augment.mean, augment.std)


@pytest.mark.parametrize("count, height, width, size", [(100, 32, 32, 32), (7, 48, 40, 20), (1, 32, 32, 32)])
def test_views_equal_torchvision_composed_at_the_drawn_parameters(count, height, width, size):
    augment = ours.SimCLRAugmentation(size=size)
    images = byte_images(count, height, width)
    before, g = images.clone(), generator(4)
    parameters = [augment.draw(count, height, width, g) for _ in range(2)]
    views = augment(images, generator(4))
    assert torch.equal(images, before)
    for view, p in zip(views, parameters):
        assert view.dtype == torch.float32 and view.shape == (count, 3, size, size)
        expected = [composed_of_torchvision(augment, image, p, row) for row, image in enumerate(images / 255)]
        assert largest_difference(view, torch.stack(expected)) < 4e-5  # 1e-5 in [0, 1], before the division by std


def test_views_are_close_to_torchvision_on_pil():
    """What users of torchvision's PIL transforms get, whose every operation rounds to 8 bits."""
    augment = ours.SimCLRAugmentation(mean=(0, 0, 0), std=(1, 1, 1))
    images = byte_images()
    p = augment.draw(len(images), 32, 32, generator(5))
    view = augment.apply_view(images, p)
    pil = torch.empty_like(view)
    for row, image in enumerate(images):
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
        image = reference.resized_crop(image, *p.boxes[row].int().tolist(), [32, 32])
        image = reference.hflip(image) if p.flip[row] else image
        adjust = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation,
                  reference.adjust_hue)
        for k in p.order[row].tolist() if p.jittered[row] else ():
            image = adjust[k](image, p.factors[row, k].item())
        image = reference.rgb_to_grayscale(image, 3) if p.grayscale[row] else image
        pil[row] = reference.to_tensor(image)
    assert (view - pil).abs().mean() < 1.5 / 255


def test_the_two_views_are_drawn_independently():
    augment = ours.SimCLRAugmentation()
    g = generator()
    a, b = (augment.draw(4000, 32, 32, g) for _ in range(2))
    for field in ("boxes", "factors"):
        for x, y in zip(getattr(a, field).T, getattr(b, field).T):
            assert abs(torch.stack((x, y)).corrcoef()[0, 1]) < 5 / math.sqrt(4000), field
    for field, p in (("flip", 0.25), ("jittered", 0.64), ("grayscale", 0.04)):
        assert_frequency(getattr(a, field) & getattr(b, field), p)
    assert_frequency((a.order == b.order).all(1), 1 / 24)
    view0, view1 = augment(byte_images(), generator())
    assert ((view0 - view1).abs().amax((1, 2, 3)) > 0.05).all()


def test_the_generator_alone_decides():
    augment, images = ours.SimCLRAugmentation(), byte_images()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = augment(images, generator(6))
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    state = torch.get_rng_state()
    again, other = augment(images, generator(6)), augment(images, generator(7))
    assert torch.equal(torch.get_rng_state(), state)
    for x, y, z in zip(first, again, other):
        assert torch.equal(x, y) and not torch.equal(x, z)


def test_neither_threads_nor_parts_nor_autocast_change_a_bit(monkeypatch):
    augment, images = ours.SimCLRAugmentation(), byte_images(100)
    expected = torch.stack(augment(images, generator()))
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(torch.stack(augment(images, generator())), expected), threads
    torch.set_num_threads(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.stack(augment(images, generator())), expected)
    for length in (3, 1000):
        monkeypatch.setattr(ours, "IMAGES_PER_THREAD", length)
        assert torch.equal(torch.stack(augment(images, generator())), expected), length


@pytest.mark.parametrize("images, message", [
    (torch.zeros(2, 3, 32, 32), "uint8"),
    (torch.zeros(3, 32, 32, dtype=torch.uint8), r"\[3, 32, 32\]"),
    (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), r"\[2, 32, 32, 3\]"),
    (torch.zeros(0, 3, 32, 32, dtype=torch.uint8), "non-empty"),
    (torch.zeros(2, 3, 0, 32, dtype=torch.uint8), "non-empty")])
def test_other_images_are_an_error(images, message):
    with pytest.raises(ValueError, match=message):
        ours.SimCLRAugmentation()(images, generator())


@pytest.mark.parametrize("arguments, message", [
    ({"scale": (0, 1)}, "scale"), ({"scale": (0.5, 0.2)}, "scale"),
    ({"ratio": (0, 1)}, "ratio"), ({"ratio": (2, 1)}, "ratio"),
    ({"jitter": (0.4, 0.4, 0.4)}, "jitter"), ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "jitter"),
    ({"jitter": (-0.1, 0.4, 0.4, 0.1)}, "jitter")])
def test_other_arguments_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        ours.SimCLRAugmentation(**arguments)
