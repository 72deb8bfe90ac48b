"""Multi-crop against torchvision, PIL and timm: boxes, pixels, every operation, the whole chain, and what a seed decides."""
import math
import random

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from PIL import Image, ImageFilter, ImageOps
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import resized_crop as resized_crop_v2

import augmentations as ours

STEP = 1 / 255  # of 8 bits
RAND_AUGMENT = "rand-n2-m10-mstd0.5"
SMALL = dict(global_size=32, local_size=16)


pytestmark = pytest.mark.usefixtures("one_thread")


def photograph(width=120, height=90, seed=0):
    """Smooth colours, sharp edges and noise, as a PIL image."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((width, height), Image.BICUBIC)
    pixels = np.asarray(smooth) * 0.85 + rng.integers(0, 38, (height, width, 3))
    pixels[height // 3:height // 2, width // 4:width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def tensor_of(image):
    return reference.pil_to_tensor(image)


def pil_of(crop):
    return Image.fromarray(crop.permute(1, 2, 0).numpy())


def batch_of(crop, seeds):
    return default_collate([crop(photograph(seed=seed % 7), seed) for seed in seeds])


def ks_distance(a, b):
    """Two-sample Kolmogorov-Smirnov statistic; ties allowed."""
    a, b, at = np.sort(a), np.sort(b), np.concatenate((a, b))
    return np.abs(np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)).max()


def assert_same_distribution(a, b):
    """Fails once in about a million for samples of one distribution (seeds are fixed besides)."""
    assert len(a) > 1000 and len(b) > 1000
    assert ks_distance(np.asarray(a), np.asarray(b)) < 2.7 * math.sqrt((len(a) + len(b)) / (len(a) * len(b)))


def assert_uniform(values, low, high):
    assert low <= values.min() and values.max() <= high
    assert_same_distribution(values.flatten(), low + (high - low) * (np.arange(100_000) + 0.5) / 100_000)


def assert_frequency(events, p):
    """Five standard deviations of the binomial; exact for p of 0 and 1."""
    assert abs(events.double().mean().item() - p) <= 5 * math.sqrt(p * (1 - p) / events.numel())


# --- crops ------------------------------------------------------------------------------------------------------------

BOXES = [  # width, height, size, (top, left, height, width): reduced, enlarged, same size, single pixels, borders
    (120, 90, 32, (0, 0, 90, 120)), (120, 90, 64, (11, 17, 40, 31)), (120, 90, 40, (50, 80, 40, 40)),
    (120, 90, 16, (89, 119, 1, 1)), (20, 15, 48, (2, 1, 13, 17)), (301, 7, 24, (0, 100, 7, 9))]


@pytest.mark.parametrize("width, height, size, box", BOXES)
def test_resized_crop_equals_torchvision(width, height, size, box):
    image = photograph(width, height)
    result = ours.resized_crop(tensor_of(image), box, size)
    bicubic = InterpolationMode.BICUBIC
    assert torch.equal(result, resized_crop_v2(tensor_of(image), *box, [size, size], bicubic, antialias=True))
    # PIL computes with finer integers: a step of 8 bits now and then, and more where the filter overshoots.
    pil = tensor_of(reference.resized_crop(image, *box, [size, size], bicubic))
    difference = (result.int() - pil.int()).abs()
    assert (difference > 0).float().mean() < 0.05 and (difference > 1).float().mean() < 2e-3


def test_crops_are_those_of_the_drawn_boxes(monkeypatch):
    drawn, draw = [], ours.draw_boxes
    monkeypatch.setattr(ours, "draw_boxes", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    image = photograph()
    crops = ours.MultiCrop(global_size=40, local_size=24, local_number=3)(image, 5)
    assert crops.global_crops.shape == (2, 3, 40, 40) and crops.local_crops.shape == (3, 3, 24, 24)
    assert crops.randoms.shape == (5, ours.RANDOMS)
    for crop, box in zip((*crops.global_crops, *crops.local_crops), drawn[0].int().tolist()):
        expected = resized_crop_v2(tensor_of(image), *box, crop.shape[1:], InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(crop, expected)


@pytest.mark.parametrize("width, height", [(120, 90), (30, 47), (200, 60)])
def test_boxes_are_distributed_as_torchvisions(width, height):
    crop, count = ours.MultiCrop(local_number=2), 1500
    boxes = torch.stack([ours.draw_boxes(4, height, width, crop.scale, ours.CROP_RATIO, torch.Generator().manual_seed(seed))
                         for seed in range(count)])                 # [seeds, views, 4]
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    for first, scale in ((0, (0.4, 1.0)), (2, (0.05, 0.4))):
        expected = torch.tensor([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(2 * count)])
        mine = boxes[:, first:first + 2].flatten(0, 1)
        for get in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2], lambda b: b[:, 3],
                    lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2]):
            assert_same_distribution(get(mine), get(expected))


@pytest.mark.parametrize("width, height", [(300, 10), (10, 300), (1, 1), (64, 1)])
def test_extreme_images_get_torchvisions_central_crop(width, height):
    crop = ours.MultiCrop(**SMALL, global_scale=(1.0, 1.0), local_number=0)
    image = photograph(width, height)
    box = RandomResizedCrop.get_params(image, [1.0, 1.0], [3 / 4, 4 / 3])  # nothing of the whole area fits
    expected = resized_crop_v2(tensor_of(image), *box, [32, 32], InterpolationMode.BICUBIC, antialias=True)
    for view in crop(image, 3).global_crops:
        assert torch.equal(view, expected)


# --- operations at given parameters -----------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [16, 61, 96])
def test_blur_equals_pil(size):
    sigma = torch.tensor([0.0, 0.1, 0.3, 0.7, 1.1, 1.4, 2.0, 4.0])
    crops = torch.stack([tensor_of(photograph(size, size, seed)) for seed in range(len(sigma))])
    blurred = ours.gaussian_blur(crops / 255, sigma)
    pil = torch.stack([tensor_of(pil_of(crop).filter(ImageFilter.GaussianBlur(s))) for crop, s in zip(crops, sigma.tolist())])
    # PIL rounds after each of its six passes, by half a step at most.
    assert (blurred - pil / 255).abs().max() < 3 * STEP
    assert (blurred - pil / 255).mean().abs() < 0.1 * STEP
    assert (blurred[0] - crops[0] / 255).abs().max() < 1e-6


def test_blur_has_the_variance_of_the_gaussian_and_nearly_its_shape():
    sigma, size = torch.tensor([0.3, 1.0, 2.0]), 41
    distance = torch.arange(size) - size // 2
    impulse = torch.zeros(3, 1, size, size)
    impulse[..., size // 2, size // 2] = 1
    profile = ours.gaussian_blur(impulse, sigma)[:, 0].sum(1)       # [3, size]
    assert torch.allclose((profile * distance**2).sum(1), sigma**2, rtol=1e-4)
    gauss = torch.exp(-distance**2 / (2 * sigma.view(3, 1)**2))
    gauss /= gauss.sum(1, keepdim=True)
    assert ((profile - gauss).abs().amax(1) < 0.1 * gauss.amax(1)).all()


def test_solarize_equals_pil():
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 4, 256)
    pil = tensor_of(ImageOps.solarize(pil_of(levels), 128))
    assert torch.equal(ours.solarize(levels / 255).mul(255).round().to(torch.uint8), pil)


def composed(image, p, row, blur, solarize):
    """DINO's transforms, one after the other, on a PIL or float image at the parameters of a row."""
    image = reference.hflip(image) if p.flip[row] else image
    adjust = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)
    for k in p.order[row].tolist() if p.jittered[row] else ():
        image = adjust[k](image, p.factors[row, k].item())
    image = reference.rgb_to_grayscale(image, 3) if p.grayscale[row] else image
    image = blur(image, p.sigma[row]) if p.blurred[row] else image
    image = solarize(image) if p.solarized[row] else image
    image = image if isinstance(image, torch.Tensor) else reference.to_tensor(image)
    return reference.normalize(image, ours.IMAGENET_MEAN, ours.IMAGENET_STD)


IN_FLOAT = (lambda crop: crop / 255, lambda image, sigma: ours.gaussian_blur(image[None], sigma[None])[0],
            lambda image: reference.solarize(image, 0.5))
ON_PIL = (pil_of, lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma.item())),
          lambda image: ImageOps.solarize(image, 128))


@pytest.mark.parametrize("convert, blur, solarize, largest, mean", [
    (*IN_FLOAT, 5e-5, 5e-6),         # 1e-5 in [0, 1], before the division by std
    (*ON_PIL, math.inf, 8 * STEP)])  # two steps of 8 bits: PIL rounds after every operation, and turns hues in 8 bits
def test_views_equal_the_plain_chain(convert, blur, solarize, largest, mean):
    augment = ours.MultiCropAugmentation()
    crops = batch_of(ours.MultiCrop(global_size=64, local_size=32, local_number=3), range(24))
    parameters, views = augment.parameters_of(crops.randoms), augment(crops)
    assert parameters.solarized.any() and not parameters.blurred.all()
    uint8_views = (*crops.global_crops.unbind(1), *crops.local_crops.unbind(1))
    assert len(views) == len(uint8_views)
    for number, (view, crop) in enumerate(zip(views, uint8_views)):
        p = ours.PhotometricParameters(*(field[:, number] for field in parameters))
        expected = torch.stack([composed(convert(image), p, row, blur, solarize) for row, image in enumerate(crop)])
        assert (view - expected).abs().max() < largest and (view - expected).abs().mean() < mean, number


def test_erasing_keeps_the_rest():
    crops = batch_of(ours.MultiCrop(**SMALL, local_number=1), range(60))
    plain, erased = ours.MultiCropAugmentation()(crops), ours.MultiCropAugmentation(erasing=0.5)(crops)
    for view, other in zip(plain[1:], erased[1:]):
        assert torch.equal(view, other)
    changed = plain[0] != erased[0]
    chosen = changed.flatten(1).any(1)
    assert torch.equal(chosen, crops.randoms[:, 0, ours.ERASE] < 0.5)
    for view in changed[chosen]:
        where = view.all(0).nonzero()
        (top, left), (bottom, right) = where.amin(0), where.amax(0) + 1
        assert view.sum() == 3 * (bottom - top) * (right - left)


def test_erasing_is_distributed_as_timms():
    size, count = 32, 2000

    def boxes_and_noise(erase):
        boxes, noise = [], []
        for seed in range(count):
            view = torch.full((3, size, size), 99.0)
            erase(view, seed)
            rows, columns = (view[0] != 99).any(1).nonzero(), (view[0] != 99).any(0).nonzero()
            boxes.append((rows.min(), columns.min(), len(rows), len(columns)))
            noise.append(view[view != 99])
        return torch.tensor(boxes), torch.cat(noise)

    random.seed(0), torch.manual_seed(0)
    timm = RandomErasing(probability=1.0, mode="pixel", device="cpu")
    (mine, my_noise), (expected, _) = boxes_and_noise(ours.erase), boxes_and_noise(lambda view, seed: timm(view))
    for get in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2], lambda b: b[:, 3], lambda b: b[:, 2] * b[:, 3],
                lambda b: b[:, 2] / b[:, 3]):
        assert_same_distribution(get(mine), get(expected))
    assert_same_distribution(my_noise[::5], torch.randn(100_000))


def test_rand_augment_equals_timms():
    crop, timm = ours.MultiCrop(rand_augment=RAND_AUGMENT), rand_augment_transform(RAND_AUGMENT, {})
    image = photograph(48, 48)
    for seed in range(25):
        result = crop._rand_augmented(tensor_of(image), seed)
        random.seed(seed), np.random.seed(seed)
        assert torch.equal(result, tensor_of(timm(image))), seed


def test_rand_augment_touches_the_global_crops_alone_and_each_by_its_own_seed():
    plain, augmented = (batch_of(ours.MultiCrop(**SMALL, rand_augment=name), range(40)) for name in (None, RAND_AUGMENT))
    assert all(torch.equal(a, b) for a, b in zip(plain[1:], augmented[1:]))
    changed = (plain.global_crops != augmented.global_crops).flatten(2).any(2)
    assert changed.float().mean() > 0.4 and not torch.equal(changed[:, 0], changed[:, 1])
    whole = ours.MultiCrop(**SMALL, global_scale=(1.0, 1.0), rand_augment=RAND_AUGMENT, local_number=0)
    pairs = [whole(photograph(32, 32), seed).global_crops for seed in range(40)]
    assert sum(torch.equal(*pair) for pair in pairs) < 20


# --- what is drawn ----------------------------------------------------------------------------------------------------

def drawn(augment, count=2500, local_number=2):
    crop, image = ours.MultiCrop(4, local_size=4, local_number=local_number), photograph(8, 8)
    crops = default_collate([crop(image, seed) for seed in range(count)])
    return augment.parameters_of(crops.randoms)


def test_probabilities_and_ranges():
    p = drawn(ours.MultiCropAugmentation(erasing=0.2))              # fields [seeds, 4 views]
    table = {"flip": [0.5] * 4, "jittered": [0.8] * 4, "grayscale": [0.2] * 4, "blurred": [1, 0.1, 0.5, 0.5],
             "solarized": [0, 0.2, 0, 0], "erased": [0.2, 0, 0, 0]}
    for field, probabilities in table.items():
        for view, probability in enumerate(probabilities):
            assert_frequency(getattr(p, field)[:, view], probability)
    for k, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        assert_uniform(p.factors[..., k], low - 1e-6, high + 1e-6)
    assert_uniform(p.sigma, 0.1, 2.0)
    for place in range(4):
        for k in range(4):
            assert_frequency(p.order[..., place] == k, 1 / 4)
    narrow = drawn(ours.MultiCropAugmentation(blur_sigma=(0.05, 0.3)), count=600)
    assert_uniform(narrow.sigma, 0.05, 0.3)


def test_choices_are_independent_between_operations_views_and_seeds():
    crop, image, count = ours.MultiCrop(4, local_size=4, local_number=1), photograph(8, 8), 2500
    columns = torch.stack([crop(image, seed).randoms.flatten() for seed in range(count)]).T  # [views * RANDOMS, seeds]
    correlation = torch.corrcoef(columns).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(count)
    successive = torch.stack([torch.corrcoef(torch.stack((row[1:], row[:-1])))[0, 1] for row in columns])
    assert successive.abs().max() < 6 / math.sqrt(count)


# --- what a seed decides ----------------------------------------------------------------------------------------------

class Photographs(torch.utils.data.Dataset):
    def __init__(self, crop, count=12):
        self.crop, self.count = crop, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.crop(photograph(seed=index), 2**62 + index)


@pytest.mark.parametrize("workers, batch_size", [(0, 5), (1, 4)])
def test_neither_batch_nor_worker_nor_global_generators_matter(workers, batch_size):
    data = Photographs(ours.MultiCrop(**SMALL, local_number=2, rand_augment=RAND_AUGMENT))
    expected = default_collate([data[i] for i in range(len(data))])
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    parts = list(DataLoader(data, batch_size, num_workers=workers, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert (np.random.get_state()[1] == states[1]).all()
    for field, whole in zip(map(torch.cat, zip(*parts)), expected):
        assert torch.equal(field, whole)
    # The same images alone, and in another order, give the same views but for the order of sums.
    augment = ours.MultiCropAugmentation(erasing=0.5)
    views = augment(expected)
    for number, part in enumerate(map(torch.cat, zip(*map(augment, parts)))):
        assert (part - views[number]).abs().max() < 1e-5
    reverse = augment([field.flip(0) for field in expected])
    assert all((a.flip(0) - b).abs().max() < 1e-5 for a, b in zip(reverse, views))
    assert all(torch.equal(a, b) for a, b in zip(augment(expected), views))


def test_other_seeds_and_other_views_differ():
    crop, image = ours.MultiCrop(**SMALL), photograph()
    a, b = crop(image, 1), crop(image, 2)
    assert not torch.equal(a.global_crops, b.global_crops) and not torch.equal(a.local_crops, b.local_crops)
    assert a.seed != b.seed and len(torch.unique(torch.cat((a.randoms, b.randoms)))) > 0.99 * 2 * a.randoms.numel()
    views = ours.MultiCropAugmentation()(default_collate([a, b]))
    for group in (views[:2], views[2:]):
        for i, view in enumerate(group):
            assert all((view - other).abs().mean() > 0.01 for other in group[:i])


@pytest.mark.parametrize("length", [1, 7, 1000])
def test_neither_parts_nor_autocast_matter(monkeypatch, length):
    crops = batch_of(ours.MultiCrop(**SMALL, local_number=2), range(30))
    before = [field.clone() for field in crops]
    views = ours.MultiCropAugmentation(erasing=0.2)(crops)
    monkeypatch.setattr(ours, "IMAGES_PER_THREAD", length)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = ours.MultiCropAugmentation(erasing=0.2)(crops)
    for view, other in zip(views, again):
        assert other.dtype == torch.float32 and (view - other).abs().max() < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(crops, before))


@pytest.mark.parametrize("sizes", [dict(local_number=0), dict(SMALL, local_number=0), dict(SMALL, local_number=1),
                                   dict(global_size=48, local_size=17)])
def test_sizes_and_numbers(sizes):
    crop = ours.MultiCrop(**sizes)
    crops = default_collate([crop(photograph(20, 31, seed), seed) for seed in range(3)])
    views = ours.MultiCropAugmentation(erasing=1.0)(crops)
    sides = [crop.global_size] * 2 + [crop.local_size] * crop.local_number
    assert [list(view.shape) for view in views] == [[3, 3, side, side] for side in sides]
    assert all(view.isfinite().all() for view in views)


# --- errors -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, message", [
    ({"global_scale": (0.0, 1.0)}, "global_scale"), ({"local_scale": (0.4, 0.1)}, "local_scale"),
    ({"global_size": 0}, "at least 1"), ({"local_number": -1}, "local_number"), ({"rand_augment": "nonsense"}, "RandAugment"),
    ({"rand_augment": "rand-q7"}, "RandAugment")])
def test_other_arguments_of_the_crops_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        ours.MultiCrop(**arguments)


@pytest.mark.parametrize("arguments, message", [
    ({"erasing": 1.5}, "erasing"), ({"blur_sigma": (2, 1)}, "blur_sigma"), ({"jitter": (1, 1, 1)}, "jitter")])
def test_other_arguments_of_the_augmentation_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        ours.MultiCropAugmentation(**arguments)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_other_image_modes_are_an_error(mode):
    with pytest.raises(ValueError, match=f"mode {mode}"):
        ours.MultiCrop()(Image.new(mode, (50, 50)), 0)


@pytest.mark.parametrize("field, change, message", [
    ("global_crops", lambda t: t.float(), "uint8"), ("local_crops", lambda t: t[0], r"\[B, number, 3, S, S\]"),
    ("global_crops", lambda t: t[:, :1], "batch"), ("local_crops", lambda t: t[:1], "batch"),
    ("randoms", lambda t: t[:, 1:], "randoms"), ("seed", lambda t: t[0], "seed")])
def test_other_crops_are_an_error(field, change, message):
    crops = batch_of(ours.MultiCrop(**SMALL), range(2))
    with pytest.raises(ValueError, match=message):
        ours.MultiCropAugmentation()(crops._replace(**{field: change(getattr(crops, field))}))


def test_an_empty_batch_is_an_error():
    crops = batch_of(ours.MultiCrop(**SMALL), range(1))
    with pytest.raises(ValueError, match="non-empty"):
        ours.MultiCropAugmentation()(ours.Crops(*(field[:0] for field in crops)))
