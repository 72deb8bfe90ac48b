"""SimCLR's augmentation and multi-crop against torchvision, PIL and timm, and what a seed decides."""
import math
import random
import re
from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from PIL import Image, ImageFilter, ImageOps
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import default_collate
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import resized_crop

import augmentations as ours

STEP = 1 / 255        # of 8 bits
HUE_TOLERANCE = 5e-6  # torchvision's own float error: it divides by the chroma, and multiplies by it again
BILINEAR, BICUBIC = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC
ADJUST = [getattr(reference, "adjust_" + name) for name in ("brightness", "contrast", "saturation", "hue")]
RAND_AUGMENT = "rand-n2-m10-mstd0.5"
SMALL = dict(global_size=32, local_size=16)

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def colours(count=24, size=16):
    """Random floats, and what colour arithmetic trips over: grey, black, white, pure, and equal channels."""
    images = torch.rand(count, 3, size, size, generator=generator(1))
    images[0] = images[0, :1]
    images[1], images[2] = 0, 1
    images[3] = (images[3] > 0.5).float()
    images[4, 0] = images[4, 1]
    images[5, 1] = images[5, 2]
    images[6, 0] = images[6, 2]
    images[7] = 0.5 + images[7] * 1e-3
    return images


def photograph(width=120, height=90, seed=0):
    """Smooth colours, sharp edges and noise, as a PIL image."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((width, height), Image.BICUBIC)
    pixels = np.asarray(smooth) * 0.85 + rng.integers(0, 38, (height, width, 3))
    pixels[height // 3:height // 2, width // 4:width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def pil_of(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


tensor_of = reference.pil_to_tensor


def photographs(count=64, height=32, width=32):
    """uint8 [count, 3, height, width]."""
    return torch.stack([tensor_of(photograph(width, height, seed)) for seed in range(count)])


def batch_of(crop, seeds):
    return default_collate([crop(photograph(seed=seed % 7), seed) for seed in seeds])


def difference(a, b):
    return (a - b).abs().max().item()


def assert_same_distribution(a, b):
    """Two-sample Kolmogorov-Smirnov test; fails once in about a million (and seeds are fixed)."""
    na, nb, at = len(a), len(b), np.concatenate((a, b))
    a, b = (np.searchsorted(np.sort(x), at, "right") / len(x) for x in (a, b))
    assert np.abs(a - b).max() < 2.7 * math.sqrt(len(at) / (na * nb))


def assert_uniform(values, low, high):
    assert low - 1e-6 <= values.min() and values.max() <= high + 1e-6
    assert_same_distribution(values.flatten(), np.linspace(low, high, 100_001))


def assert_same_boxes(a, b):
    def statistics(boxes):
        top, left, height, width = boxes.T
        return top, left, height, width, height * width, width / height, top - left
    for x, y in zip(statistics(a), statistics(b)):
        assert_same_distribution(x, y)


def assert_frequency(events, p):
    """Five standard deviations of the binomial; exact for p of 0 and 1."""
    assert abs(events.double().mean().item() - p) <= 5 * math.sqrt(p * (1 - p) / events.numel())


# ----------------------------------------------------------------------------- operations at given parameters

def jittered(image, order, factors):
    for k in order.tolist():
        image = ADJUST[k](image, factors[k].item())
    return image


def composed(image, row, flip, jitter, grey, blur=None, solarize=None):
    """torchvision's operations and our blur in DINO's order, at the parameters drawn for this row."""
    image = reference.hflip(image) if flip[row] else image
    image = jittered(image, *(field[row] for field in jitter[1])) if jitter[0][row] else image
    image = reference.rgb_to_grayscale(image, 3) if grey[0][row] else image
    if blur and blur[0][row]:
        image = ours.gaussian_blur(image[None], blur[1][0][row:row + 1])[0]
    return reference.solarize(image, 0.5) if solarize and solarize[0][row] else image


@pytest.mark.parametrize("factor", [-0.5, -0.1, 0.0, 0.1, 1 / 3, 0.5])
def test_hue_of_every_corner_and_edge_of_the_colour_cube(factor):
    steps = torch.linspace(0, 1, 9)
    cube = torch.cartesian_prod(steps, steps, steps).T.reshape(1, 3, 27, 27)
    expected = reference.adjust_hue(cube, factor)
    assert difference(ours.adjust_hue(cube, torch.tensor([factor])), expected) < HUE_TOLERANCE


def test_jitter_in_each_of_the_24_orders_equals_torchvision():
    orders = torch.tensor([*permutations(range(4))])
    images = colours()
    factors = torch.rand(24, 4, generator=generator()) * torch.tensor([1.6, 1.6, 1.6, 1])
    factors[:, 3] -= 0.5
    expected = [jittered(*row) for row in zip(images, orders, factors)]
    # Contrast and saturation up to 1.6 multiply the error of the hue.
    assert difference(ours.jitter(images.clone(), orders, factors), torch.stack(expected)) < 2 * HUE_TOLERANCE
    for row in range(24):
        alone = ours.jitter(images[row:row + 1].clone(), orders[row:row + 1], factors[row:row + 1])
        assert difference(alone, expected[row]) < 2 * HUE_TOLERANCE


def test_normalize_equals_torchvision():
    uint8 = photographs()
    expected, before = reference.normalize(uint8 / 255, ours.CIFAR_MEAN, ours.CIFAR_STD), uint8.clone()
    for given in (uint8, uint8 / 255):
        assert difference(ours.normalize(given, ours.CIFAR_MEAN, ours.CIFAR_STD), expected) < 2e-6
    assert torch.equal(uint8, before)


@pytest.mark.parametrize("height, width, size, box", [  # enlarged, reduced, both, single pixels, borders
    (32, 32, 32, (5, 9, 20, 17)), (32, 32, 8, (2, 3, 29, 27)), (40, 56, 16, (7, 11, 33, 9)),
    (32, 32, 32, (31, 31, 1, 1)), (56, 40, 24, (30, 0, 26, 40))])
def test_crop_resize_equals_torchvision(height, width, size, box):
    images, flip = photographs(3, height, width), torch.tensor([False, True, False])
    boxes = torch.tensor([box] * 3, dtype=torch.float)
    result = ours.crop_resize(images, boxes, size, flip)
    assert result.dtype == torch.float32 and result.shape == (3, 3, size, size)
    # torchvision on float tensors, antialiased: the same filter in another order of sums.
    expected = reference.resized_crop(images / 255, *box, [size, size], BILINEAR, antialias=True)
    # PIL rounds to 8 bits after either axis: up to a step and a half of them.
    pil = torch.stack([reference.to_tensor(reference.resized_crop(pil_of(x), *box, [size, size], BILINEAR))
                       for x in images])
    for other, tolerance in ((expected, 5e-6), (pil, 1.5 * STEP)):
        other[1] = other[1].flip(2)
        assert difference(result, other) < tolerance
    assert difference(ours.crop_resize(images.float(), boxes, size, flip), expected * 255) < 255 * 5e-6


@pytest.mark.parametrize("size", [16, 61, 96])
def test_blur_equals_pil(size):
    sigma = torch.tensor([0.0, 0.1, 0.3, 0.7, 1.1, 1.4, 2.0, 4.0])
    crops = photographs(len(sigma), size, size)
    blurred = ours.gaussian_blur(crops / 255, sigma)
    pil = torch.stack([tensor_of(pil_of(crop).filter(ImageFilter.GaussianBlur(s.item())))
                       for crop, s in zip(crops, sigma)]) / 255
    # PIL rounds after each of its six passes, by half a step at most.
    assert difference(blurred, pil) < 3 * STEP and (blurred - pil).mean().abs() < 0.1 * STEP
    assert difference(blurred[0], crops[0] / 255) < 1e-6


def test_blur_has_the_variance_of_the_gaussian():
    sigma, distance = torch.tensor([0.3, 1.0, 2.0]), torch.arange(41) - 20
    impulse = torch.zeros(3, 1, 41, 41)
    impulse[..., 20, 20] = 1
    profile = ours.gaussian_blur(impulse, sigma)[:, 0].sum(1)       # [3, 41]
    assert torch.allclose((profile * distance**2).sum(1), sigma**2, rtol=1e-4)


def test_solarize_equals_pil():
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 4, 256)
    expected = tensor_of(ImageOps.solarize(pil_of(levels), 128))
    assert torch.equal(ours.solarize(levels / 255).mul(255).round().to(torch.uint8), expected)


def test_rand_augment_equals_timms_and_has_a_seed_per_crop(monkeypatch):
    seeds, changed = [], ours._rand_augmented
    monkeypatch.setattr(ours, "_rand_augmented", lambda *args: seeds.append(args[2]) or changed(*args))
    plain, augmented = (ours.MultiCrop(**SMALL, rand_augment=name) for name in (None, RAND_AUGMENT))
    timm, changes = rand_augment_transform(RAND_AUGMENT, {}), 0
    for number in range(20):
        before, after = plain(photograph(), number), augmented(photograph(), number)
        assert torch.equal(before.local_crops, after.local_crops)
        for old, new, seed in zip(before.global_crops, after.global_crops, seeds[-2:], strict=True):
            random.seed(seed), np.random.seed(seed)
            assert torch.equal(new, tensor_of(timm(pil_of(old))))
            changes += not torch.equal(old, new)
    assert len(set(seeds)) == 40 and changes > 16


# ---------------------------------------------------------------------------------------------- distributions

@pytest.mark.parametrize("height, width, scale, ratio", [
    (96, 64, (0.08, 1.0), (1 / 2, 5 / 4)),     # upright crops: height and width differ in distribution
    (48, 64, (0.7, 1.0), (1 / 3, 3))])         # most tries fail, some images get the central crop
def test_boxes_are_distributed_as_torchvisions(height, width, scale, ratio):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(3000)])
    boxes = ours.draw_boxes(40_000, height, width, scale, ratio, generator())
    assert torch.equal(boxes, boxes.round()) and boxes[:, :2].min() == 0
    assert (boxes[:, :2] + boxes[:, 2:]).amax(0).tolist() == [height, width]
    assert_same_boxes(boxes, theirs)


def test_crops_of_multi_crop_have_torchvisions_distribution(monkeypatch):
    drawn, draw_boxes = [], ours.draw_boxes
    monkeypatch.setattr(ours, "draw_boxes", lambda *args: drawn.append(draw_boxes(*args)) or drawn[-1])
    crop, image = ours.MultiCrop(4, local_size=4, local_number=2), photograph(60, 47)
    for seed in range(600):
        crops = crop(image, seed)
        views = *crops.global_crops, *crops.local_crops
        for view, box in zip(views, drawn[-1].int().tolist(), strict=True):
            assert torch.equal(view, resized_crop(tensor_of(image), *box, [4, 4], BICUBIC))
    boxes = torch.stack(drawn)                                      # [seeds, 4 crops, 4]
    pixels = torch.empty(3, 47, 60)
    torch.manual_seed(0)
    for own, scale in ((slice(0, 2), (0.4, 1.0)), (slice(2, 4), (0.05, 0.4))):
        theirs = [RandomResizedCrop.get_params(pixels, scale, (3 / 4, 4 / 3)) for _ in range(1500)]
        assert_same_boxes(boxes[:, own].flatten(0, 1), torch.tensor(theirs))
    area = boxes[..., 2:].prod(2).T                                 # [4 crops, seeds]
    correlation = torch.cat((area, area.roll(1, 1))).corrcoef()     # of crops, and of successive seeds
    assert correlation.fill_diagonal_(0).abs().max() < 5 / math.sqrt(600)


@pytest.mark.parametrize("height, width", [(32, 32), (20, 90), (65, 30), (1, 1)])
def test_central_crop_where_no_try_fits(height, width):
    scale, ratio = (4.0, 5.0), (3 / 4, 4 / 3)
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), scale, ratio)
    assert ours.draw_boxes(5, height, width, scale, ratio, generator()).tolist() == [list(expected)] * 5


def test_erasing_is_distributed_as_timms():
    random.seed(0), torch.manual_seed(0)
    timm, blank = RandomErasing(1.0, mode="pixel", device="cpu"), torch.full((1500, 3, 32, 32), 99.0)
    erased = torch.stack([timm(view.clone()) for view in blank])[:, 0] != 99      # [views, rows, columns]
    rows, columns = erased.any(2).int(), erased.any(1).int()
    theirs = torch.stack((rows.argmax(1), columns.argmax(1), rows.sum(1), columns.sum(1)), 1)
    boxes, seeds = ours.draw_erased(20_000, 32, generator())
    assert_same_boxes(boxes, theirs)
    assert boxes[:, 2:].max() == 31
    views = ours.erase(blank, boxes[:1500], seeds[:1500])
    assert_same_distribution(views[views != 99][::10], torch.randn(100_000))


def test_jitter_draws_every_order_and_uniform_factors():
    order, factors = ours.draw_jitter((0.4, 0.4, 1.5, 0.1), 24_000, 32, generator())
    orders, counts = order.unique(dim=0, return_counts=True)
    assert sorted(map(tuple, orders.tolist())) == list(permutations(range(4)))
    assert ((counts - 1000) ** 2 / 1000).sum() < 70  # chi-square, 23 degrees of freedom: once in a million
    for factor, (low, high) in zip(factors.T, ((0.6, 1.4), (0.6, 1.4), (0, 2.5), (-0.1, 0.1))):
        assert_uniform(factor, low, high)
    assert factors.T.corrcoef().fill_diagonal_(0).abs().max() < 5 / math.sqrt(24_000)


def test_probabilities_of_dinos_views():
    operations = ours.MultiCropAugmentation(erasing=0.2, blur_sigma=(0.3, 1.5)).operations
    drawn = ours.draw_operations(operations, [0, 1, 2, 2], 5000, 32, generator())
    table = [[0.5] * 4, [0.8] * 4, [0.2] * 4, [1, 0.1, 0.5, 0.5], [0, 0.2, 0, 0], [1] * 4, [0.2, 0, 0, 0]]
    for (chosen, _), probabilities in zip(drawn, table, strict=True):
        for events, p in zip(chosen.view(5000, 4).T, probabilities):
            assert_frequency(events, p)
    assert_uniform(drawn[3][1][0], 0.3, 1.5)
    for factor, (low, high) in zip(drawn[1][1][1].T, ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))):
        assert_uniform(factor, low, high)
    chosen = torch.stack([events.view(5000, 4)[:, view] for events, _ in drawn for view in range(4)]).float()
    chosen = chosen[chosen.std(1) > 0]                              # those that are neither always nor never
    assert len(chosen) == 17 and chosen.corrcoef().fill_diagonal_(0).abs().max() < 5 / math.sqrt(5000)


def test_simclr_draws_its_two_views_independently():
    augment, g, columns = ours.SimCLRAugmentation(), generator(), []
    images = torch.empty(5000, 3, 8, 8, dtype=torch.uint8)
    for _ in range(2):
        boxes, flip, ((jittered, (order, factors)), (grey, _), (normalised, _)) = augment.draw_view(images, g)
        for events, p in ((flip, 0.5), (jittered, 0.8), (grey, 0.2), (normalised, 1.0)):
            assert_frequency(events, p)
        columns += [*factors.T, order[:, 0], boxes[:, 2:].prod(1), flip, jittered, grey]
    columns = torch.stack([column.float() for column in columns])
    assert columns.corrcoef().fill_diagonal_(0).abs().max() < 5 / math.sqrt(5000)


def test_simclrs_arguments_decide_what_is_drawn():
    images = torch.empty(1, 3, 200, 200, dtype=torch.uint8).expand(4000, -1, -1, -1)
    augment = ours.SimCLRAugmentation(scale=(0.5, 0.6), ratio=(1, 2), strengths=(2.0, 0.1, 0, 0), jitter_p=0,
                                      grayscale_p=1, flip_p=1)
    boxes, flip, ((jittered, (_, factors)), (grey, _), _) = augment.draw_view(images, generator())
    assert flip.all() and grey.all() and not jittered.any()
    area, aspect = boxes[:, 2:].prod(1) / 200**2, boxes[:, 3] / boxes[:, 2]
    for values, low, high in ((factors, (0, 0.9, 1, 0), (3, 1.1, 1, 0)), (area, 0.5, 0.6), (aspect, 1, 2)):
        assert torch.allclose(values.amin(0), torch.tensor(low).float(), atol=0.03)
        assert torch.allclose(values.amax(0), torch.tensor(high).float(), atol=0.03)


# ------------------------------------------------------------------------------------------------ whole views

@pytest.mark.parametrize("count, height, width, size", [(100, 32, 32, 32), (7, 48, 40, 20), (1, 32, 32, 32)])
def test_simclrs_views_equal_torchvision_composed_at_the_drawn_parameters(count, height, width, size):
    augment = ours.SimCLRAugmentation(size)
    images, g = photographs(count, height, width), generator(4)
    before = images.clone()
    views = augment(images, generator(4), views=3)
    assert len(views) == 3 and torch.equal(images, before)
    for view in views:
        boxes, flip, (jitter, grey, _) = augment.draw_view(images, g)
        expected = []
        for row, (image, box) in enumerate(zip(images, boxes.int().tolist())):
            image = reference.resized_crop(image / 255, *box, [size, size], BILINEAR, antialias=True)
            expected.append(composed(image, row, flip, jitter, grey))
        expected = reference.normalize(torch.stack(expected), ours.CIFAR_MEAN, ours.CIFAR_STD)
        assert view.dtype == torch.float32 and view.shape == expected.shape
        assert difference(view, expected) < 5e-5                    # 1e-5 before the division by std


def test_views_of_multi_crop_equal_dinos_transforms_at_the_drawn_parameters():
    augment = ours.MultiCropAugmentation()
    crops = batch_of(ours.MultiCrop(global_size=64, local_size=32, local_number=3), range(24))
    before, views, g = [field.clone() for field in crops], augment(crops, generator(5)), generator(5)
    assert all(torch.equal(a, b) for a, b in zip(crops, before)) and len(views) == 5
    expected, seen = [], set()
    for images, kinds in ((crops.global_crops, [0, 1]), (crops.local_crops, [2, 2, 2])):
        drawn = ours.draw_operations(augment.operations, kinds, 24, images.shape[-1], g)
        flip, jitter, grey, blur, solarize, _, _ = drawn
        for row, image in enumerate(images.flatten(0, 1)):
            image = composed(image / 255, row, flip[0], jitter, grey, blur, solarize)
            expected.append(reference.normalize(image, ours.IMAGENET_MEAN, ours.IMAGENET_STD))
            seen.add((flip[0][row].item(), blur[0][row].item(), solarize[0][row].item()))
    assert len(seen) >= 5                       # of flip, blur and solarisation
    views = [image for group in (views[:2], views[2:]) for image in torch.stack(group, 1).flatten(0, 1)]
    for image, plain in zip(views, expected, strict=True):
        assert difference(image, plain) < 5e-5


def test_erasing_keeps_the_rest():
    crops = batch_of(ours.MultiCrop(**SMALL, local_number=1), range(40))
    augment = ours.MultiCropAugmentation(0.5)
    erased, plain = augment(crops, generator()), ours.MultiCropAugmentation(0.0)(crops, generator())
    assert torch.equal(plain[1], erased[1]) and torch.equal(plain[2], erased[2])
    *_, (chosen, (boxes, _)) = ours.draw_operations(augment.operations, [0, 1], 40, 32, generator())
    inside = torch.zeros(40, 3, 32, 32, dtype=torch.bool)
    for row, (top, left, height, width) in enumerate(boxes[::2].tolist()):
        inside[row, :, top:top + height, left:left + width] = chosen[2 * row]
    assert 5 < chosen.sum() < 35 and torch.equal(plain[0] != erased[0], inside)


@pytest.mark.parametrize("sizes", [dict(SMALL, local_number=0), dict(global_size=48, local_size=17)])
def test_sizes_and_numbers(sizes):
    crop = ours.MultiCrop(**sizes)
    crops = default_collate([crop(photograph(20, 31, seed), seed) for seed in range(3)])
    assert isinstance(crops, ours.Crops) and isinstance(crops.to("cpu"), ours.Crops)
    views = ours.MultiCropAugmentation(erasing=1.0)(crops, generator())
    sides = [crop.global_size] * 2 + [crop.local_size] * crop.local_number
    assert [list(view.shape) for view in views] == [[3, 3, side, side] for side in sides]
    assert all(view.isfinite().all() for view in views)


# ---------------------------------------------------------------------------------------- what a seed decides

@pytest.fixture
def global_states():
    """Asserts that the global generators are not touched."""
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    yield
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert (np.random.get_state()[1] == states[1]).all()


def test_a_seed_alone_decides(global_states):
    simclr, multi = ours.SimCLRAugmentation(), ours.MultiCropAugmentation(erasing=0.5)
    crop = ours.MultiCrop(**SMALL, local_number=2, rand_augment=RAND_AUGMENT)
    seeds = range(2**62, 2**62 + 10)
    crops, again = batch_of(crop, seeds), batch_of(crop, seeds)
    for field, same, of_other_seed in zip(crops, again, crop(photograph(seed=seeds[0] % 7), 1)):
        assert torch.equal(field, same) and not torch.equal(field[0], of_other_seed)
    for augment, given in ((simclr, photographs(100)), (multi, crops)):
        expected = augment(given, generator(6))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(torch.equal(a, b) for a, b in zip(augment(given, generator(6)), expected))
        torch.set_num_threads(3)                                    # products may then round otherwise
        assert all(difference(a, b) < 1e-5 for a, b in zip(augment(given, generator(6)), expected))
        torch.set_num_threads(1)
        pairs = [*zip(augment(given, generator(7)), expected), expected[:2], expected[-2:]]
        assert min((a - b).abs().amax((1, 2, 3)).min() for a, b in pairs) > 0.05


def test_views_do_not_depend_on_the_number_of_ranks():
    crops = batch_of(ours.MultiCrop(**SMALL, local_number=2), range(12))
    augment, g = ours.MultiCropAugmentation(0.5), generator(8)
    whole, state = augment(crops, g), g.get_state()
    for rank in range(3):
        own, g = slice(rank * 4, (rank + 1) * 4), generator(8)
        views = augment(ours.Crops(*(field[own] for field in crops)), g, rank, world=3)
        for view, expected in zip(views, whole, strict=True):
            assert difference(view, expected[own]) < 1e-5        # products of other sizes may round otherwise
        assert torch.equal(g.get_state(), state)                    # the next batch is drawn alike


# ----------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize("images", [
    torch.zeros(2, 3, 32, 32), *(torch.zeros(shape, dtype=torch.uint8) for shape in
                                 [(3, 32, 32), (2, 32, 32, 3), (0, 3, 32, 32), (2, 3, 0, 32)])])
def test_other_images_are_an_error(images):
    with pytest.raises(ValueError, match=re.escape(f"{images.dtype} {list(images.shape)}")):
        ours.SimCLRAugmentation()(images, generator())


def test_other_crops_are_an_error():
    crops, augment = batch_of(ours.MultiCrop(**SMALL), range(2)), ours.MultiCropAugmentation()
    for wrong, message in ((crops._replace(global_crops=crops.global_crops.float()), "global_crops must be"),
                           (crops._replace(local_crops=crops.local_crops[0]), "local_crops must be")):
        with pytest.raises(ValueError, match=message):
            augment(wrong, generator())
    with pytest.raises(ValueError, match="mode CMYK"):
        ours.MultiCrop()(Image.new("CMYK", (50, 50)), 0)
    with pytest.raises(ValueError, match="no RandAugment 'nonsense'"):
        ours.MultiCrop(rand_augment="nonsense")
