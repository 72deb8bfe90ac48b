"""Image augmentation in batches, on the device that holds the images.

The SimCLR augmentation of small images (CIFAR): uint8 `[B, 3, H, W]` in, two normalised float views out.

    augment = SimCLRAugmentation(size=32, scale=(0.2, 1.0))
    view0, view1 = augment(images, torch.Generator().manual_seed(0))

DINO's multi-crop of photographs: a loader's worker crops and resizes, and the rest is done in batches.

    crop, augment = MultiCrop(), MultiCropAugmentation()
    crops = crop(pil_image, seed)               # in the dataset's __getitem__; default_collate makes the batch
    views = augment(crops_of_a_batch)           # 2 x [B, 3, 224, 224] and 8 x [B, 3, 96, 96]

Drawing and applying are apart. Random parameters, one per image, come from a generator (SimCLR) or from one seed per
image (multi-crop); the functions that apply them are pure and know no randomness. So a view is reproducible from its
generator or seed alone, and every function can be compared with torchvision's or PIL's at the same parameters. Float
images are in [0, 1] until `normalize`.
"""
import math
import random
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

# Per-channel statistics of the 50,000 CIFAR-10 training images. The deviation is over all pixels; the 0.2023, 0.1994,
# 0.2010 of many recipes is the mean of the deviations of single images.
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, to the digits that torchvision uses
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of `factors` and entries of `order`
CROP_RATIO = (3 / 4, 4 / 3)            # width / height
CROP_TRIES = 10                        # of a crop, and of a box to erase

# Images of 32 x 32 (or as many pixels) per thread that go through all operations together on a CPU, where an operation
# should find its input in the core's cache. A compromise: their colours in float take 0.8 MB, and fewer images would not
# repay the calls.
IMAGES_PER_THREAD = 64


class ViewParameters(NamedTuple):
    """What makes one view of each of B images; all tensors are on the generator's device."""
    boxes: torch.Tensor      # [B, 4] crop in pixels: top, left, height, width (float, whole numbers)
    flip: torch.Tensor       # [B] bool
    jittered: torch.Tensor   # [B] bool
    order: torch.Tensor      # [B, 4] the jitter operations from first to last
    factors: torch.Tensor    # [B, 4] factor of each operation; hue in turns, -0.5 to 0.5
    grayscale: torch.Tensor  # [B] bool


def draw_boxes(count, height, width, scale, ratio, generator):
    """Draw `count` crops of a height x width image as torchvision's RandomResizedCrop does.

    Area (as a fraction of the image, uniform in `scale`) and aspect ratio (log-uniform in `ratio`) are drawn up to ten
    times; the first crop that fits is placed uniformly. If none fits: the largest central crop of an allowed ratio.
    The bounds in `scale` are numbers, or tensors [count, 1] where they differ between the crops.

    Returns: float tensor [count, 4] of whole numbers, (top, left, height, width).
    """
    device = generator.device
    area, log_ratio = torch.rand(2, count, CROP_TRIES, generator=generator, device=device)
    place = torch.rand(2, count, generator=generator, device=device)

    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * log_ratio)
    sides = torch.stack((area / aspect, area * aspect)).sqrt().round()  # [2, count, tries]: heights, widths
    limit = torch.tensor((height, width), device=device).view(2, 1)
    fits = ((sides > 0) & (sides <= limit.unsqueeze(2))).all(0)         # [count, tries]
    first = fits.int().argmax(1)                                        # argmax gives the first of equals
    sides = sides[:, torch.arange(count, device=device), first]         # [2, count]
    # The product may round up to its excluded end, hence the minimum.
    corner = torch.minimum((place * (limit - sides + 1)).floor(), limit - sides)

    # width / height below the allowed ratios leaves rows out, above them columns
    h = min(height, round(width / ratio[0]))
    w = min(width, round(height * ratio[1]))
    central = torch.tensor(((height - h) // 2, (width - w) // 2, h, w), device=device)
    return torch.where(fits.any(1, keepdim=True), torch.cat((corner, sides)).T, central)


def crop_resize(images, boxes, size, flip=None):
    """Cut `boxes` out of the images, resize to size x size, and mirror where `flip`.

    Bilinear, antialiased where the crop is larger than `size`: PIL's filter, without its rounding to 8 bits.

    images: [B, 3, H, W], uint8 or float. boxes: [B, 4] top, left, height, width in pixels. flip: [B] bool or None.
    Returns: float [B, 3, size, size]; uint8 images come out in [0, 1], float images in their own range.
    """
    count, channels, height, width = images.shape
    if flip is None:
        flip = torch.zeros_like(boxes[:, 0], dtype=torch.bool)
    # Rows and columns are the same problem, so one call of 2B; the longer side has room for either.
    weights = _resize_weights(boxes[:, :2].T.flatten(), boxes[:, 2:].T.flatten(), max(height, width), size,
                              torch.cat((torch.zeros_like(flip), flip)))
    rows, columns = weights[:count, :, :height], weights[count:, :, :width]
    if images.dtype == torch.uint8:
        images, rows = images.float(), rows / 255
    # One product for all channels, [3H, W] [W, size], then one per channel, [size, H] [H, size].
    crops = torch.bmm(images.flatten(1, 2), columns.mT).view(count, channels, height, size)
    return rows.unsqueeze(1) @ crops


def _resize_weights(start, length, extent, size, flip):
    """[B, size, extent]: how much of each input pixel is in each output pixel, along one axis of the image."""
    device = start.device
    start, length, flip = start.unsqueeze(1), length.unsqueeze(1), flip.unsqueeze(1)
    step = length / size                                            # [B, 1] input pixels per output pixel
    centre = torch.arange(size, device=device) + 0.5                # [size]
    centre = start + step * torch.where(flip, size - centre, centre)
    pixel = torch.arange(extent, device=device) + 0.5               # [extent]
    # The crop comes before the resize: pixels outside weigh nothing, as if infinitely far.
    pixel = torch.where((pixel > start) & (pixel < start + length), pixel, math.inf)
    radius = step.clamp(min=1)                                      # of the triangle filter
    distance = ((pixel / radius).unsqueeze(1) - (centre / radius).unsqueeze(2)).abs_()
    weights = torch.sub(1, distance, out=distance).clamp_(min=0)
    return weights.div_(weights.sum(2, keepdim=True))


def to_grayscale(images):
    """Luma of float images: [B, 3, H, W] -> [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def adjust_brightness(images, factor):
    """Blend float images [B, 3, H, W] with black; factor [B], 1 keeps the image and 0 is black."""
    return _blend(images, *_blend_weights(factor, torch.full_like(factor, BRIGHTNESS)))


def adjust_contrast(images, factor):
    """Blend float images [B, 3, H, W] with their mean grey; factor [B], 1 keeps the image and 0 is plain grey."""
    return _blend(images, *_blend_weights(factor, torch.full_like(factor, CONTRAST)))


def adjust_saturation(images, factor):
    """Blend float images [B, 3, H, W] with their grayscale; factor [B], 1 keeps the image and 0 is grayscale."""
    return _blend(images, *_blend_weights(factor, torch.full_like(factor, SATURATION)))


def _blend_weights(factor, operation):
    """Weights of the image, its grey and its mean grey, [3, ...], in `operation` [...] with `factor` [...]."""
    rest = 1 - factor
    return torch.stack((factor, rest * (operation == SATURATION), rest * (operation == CONTRAST)))


def _blend(images, image_weight, grey_weight, mean_weight, out=None):
    """clamp(weighted sum of the images, their grey and their mean grey); weights are [B].

    One pass for brightness, contrast and saturation alike, so a batch that mixes them need not be split into groups.
    """
    grey = to_grayscale(images)                                     # [B, 1, H, W]
    mean = grey.mean((2, 3), keepdim=True).mul_(mean_weight.view(-1, 1, 1, 1))
    other = grey.mul_(grey_weight.view(-1, 1, 1, 1)).add_(mean)
    return torch.addcmul(other, images, image_weight.view(-1, 1, 1, 1), out=out).clamp_(0, 1)


def adjust_hue(images, factor):
    """Turn the hue of float images [B, 3, H, W] in [0, 1] by `factor` [B] of the full circle, -0.5 to 0.5.

    HSV without the sextants. With low and high the smallest and largest channel and chroma = high - low, the hue is
    (1 + (g + b - r - low) / chroma) / 6 turns from red, towards green if g > b and else towards blue. Value and
    saturation stay, hence so do low and high, and a channel whose own hue is o (red 0, green 1/3, blue 2/3) becomes
    clamp(low - chroma + 6 chroma |frac(hue - o) - 1/2|, low, high).
    """
    red, green, blue = images.split(1, dim=1)                       # [B, 1, H, W] each
    low, high = images.amin(1, keepdim=True), images.amax(1, keepdim=True)
    chroma = high - low
    chroma6 = (chroma * 6).clamp_(min=1e-12)                        # a grey pixel has 0 / 1e-12: any hue will do
    hue = (green + blue).sub_(red).sub_(low).div_(chroma6).add_(1 / 6)
    hue.copysign_(green - blue)                                     # [-1/2, 1/2]
    # hue - o with whole turns added, because frac wants no negative numbers
    turn = factor.view(-1, 1, 1, 1) + torch.tensor((1, 5 / 3, 4 / 3), device=images.device).view(3, 1, 1)
    turned = (hue + turn).frac_().sub_(0.5).abs_()                  # [B, 3, H, W]
    torch.addcmul(low - chroma, turned, chroma6, out=turned)
    return torch.clamp(turned, low, high, out=turned)


def jitter(images, order, factors):
    """Apply the four colour operations to each image in its own order.

    images: float [B, 3, H, W] in [0, 1]. order: [B, 4], a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE per
    image. factors: [B, 4], column k for operation k. Returns a new tensor [B, 3, H, W].
    """
    # Three blends for every image, and its hue before, between or after them.
    hue_slot = (order == HUE).int().argmax(1)
    blends = order[order != HUE].view(-1, 3)
    weights = _blend_weights(factors.gather(1, blends), blends)     # [3 weights, B, 3 blends]
    weights = weights.permute(2, 0, 1).to(images.device)
    hue_factor = factors[:, HUE].to(images.device)
    given = images
    for slot, count in enumerate(torch.bincount(hue_slot, minlength=4).tolist()):
        if count == len(images):
            images = adjust_hue(images, hue_factor)
        elif count > 0:
            rows = (hue_slot == slot).nonzero().squeeze(1).to(images.device)
            turned = adjust_hue(images.index_select(0, rows), hue_factor.index_select(0, rows))
            images = images.index_copy(0, rows, turned)
        if slot < 3:
            # In place, once the images are no longer the caller's.
            images = _blend(images, *weights[slot], out=None if images is given else images)
    return images


def gaussian_blur(images, sigma):
    """Blur square float images [B, C, S, S] with a Gaussian of `sigma` [B] pixels, edge pixels repeated outside.

    PIL's filter, without its rounding to 8 bits: three box filters in turn, each of the variance sigma^2 / 3. A box of
    fractional width gives the pixels at its ends the part that it covers (Gwosdek et al., 2011).
    """
    size, variance = images.shape[-1], sigma.to(images.device).square() / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()          # the widest box of whole pixels is 2 whole + 1
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1).square()))
    half = (whole + part + 0.5).view(-1, 1, 1)                      # half of the box's width
    edges = torch.arange(size + 1, device=images.device) - 0.5      # of the pixels; the outer two have no end
    edges[0], edges[-1] = -math.inf, math.inf
    centre = torch.arange(size, device=images.device).unsqueeze(1)
    box = torch.clamp(edges - centre, -half, half).diff(dim=2) / (2 * half)   # [B, size, size], rows sum to 1
    weights = box @ box @ box
    images = torch.bmm(images.flatten(1, 2), weights.mT).view_as(images)
    return weights.unsqueeze(1) @ images


def solarize(images):
    """Invert what is brighter than half, in float images in [0, 1]: PIL's solarize at its usual threshold of 128."""
    return torch.minimum(images, 1 - images)


def normalize(images, mean, std):
    """(images - mean) / std by channel, for [B, 3, H, W] in uint8 (0 to 255) or float (0 to 1); returns float."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    if images.dtype == torch.uint8:
        return images.float().sub_(mean * 255).div_(std * 255)
    return (images - mean).div_(std)


class SimCLRAugmentation(torch.nn.Module):
    """Two random views of every image of a batch: crop and resize, flip, colour jitter, grayscale, normalise.

    The SimCLR augmentation (Chen et al., 2020, appendix A; without blur, as for CIFAR) with the semantics of
    torchvision's RandomResizedCrop, RandomHorizontalFlip, RandomApply(ColorJitter), RandomGrayscale and Normalize.
    Every random choice is made per image and per view. Works on any device; between the operations values stay in
    float, where PIL rounds to 8 bits.

    size: side of a view in pixels. scale: range of the crop's fraction of the image's area. ratio: range of its aspect
    ratio, width / height. jitter: strength of brightness, contrast, saturation (factor 1 - s to 1 + s) and hue (-s to
    s turns). jitter_p, grayscale_p, flip_p: probabilities. mean, std: per channel, for images in [0, 1].
    """

    def __init__(self, size=32, scale=(0.2, 1.0), ratio=CROP_RATIO, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8,
                 grayscale_p=0.2, flip_p=0.5, mean=CIFAR_MEAN, std=CIFAR_STD):
        super().__init__()
        _check_range("scale", scale)
        _check_range("ratio", ratio)
        _check_jitter(jitter)
        self.size, self.scale, self.ratio, self.jitter = size, scale, ratio, jitter
        self.jitter_p, self.grayscale_p, self.flip_p = jitter_p, grayscale_p, flip_p
        self.mean, self.std = mean, std

    def draw(self, count, height, width, generator):
        """Parameters of one view of each of `count` images of height x width, on the generator's device."""
        device = generator.device
        boxes = draw_boxes(count, height, width, self.scale, self.ratio, generator)
        chance = torch.rand(3, count, generator=generator, device=device)
        order = torch.rand(count, 4, generator=generator, device=device).argsort(1)
        factors = _jitter_factors(torch.rand(count, 4, generator=generator, device=device), self.jitter)
        return ViewParameters(boxes, chance[0] < self.flip_p, chance[1] < self.jitter_p, order, factors,
                              chance[2] < self.grayscale_p)

    def forward(self, images, generator):
        """uint8 images [B, 3, H, W] -> two independent views, float32 [B, 3, size, size] each.

        generator: torch.Generator, the only source of randomness, on the images' device or on the CPU (which spares
        a GPU the waits for the group sizes). Raises ValueError for other images or an empty batch.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, got {images.dtype}")
        if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
            raise ValueError(f"images must be a non-empty [B, 3, H, W] batch, got {list(images.shape)}")
        count, _, height, width = images.shape
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 would be coarser than the 8-bit images
            return tuple(self.apply_view(images, self.draw(count, height, width, generator)) for _ in range(2))

    def apply_view(self, images, parameters):
        """The view of uint8 images [B, 3, H, W] that `parameters` describe: float32 [B, 3, size, size]."""
        device = images.device
        views = torch.empty(len(images), 3, self.size, self.size, device=device)
        for rows in _parts(parameters, self.size, device):
            part = ViewParameters(*(field[rows] for field in parameters))
            rows = rows.to(device)
            view = crop_resize(images.index_select(0, rows), part.boxes.to(device), self.size, part.flip.to(device))
            views.index_copy_(0, rows, normalize(_recolour(view, part), self.mean, self.std))
        return views


def _check_range(name, bounds):
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
        raise ValueError(f"{name} must be 0 < low <= high, got {bounds}")


def _check_jitter(strengths):
    if len(strengths) != 4 or min(strengths) < 0 or strengths[HUE] > 0.5:
        raise ValueError(f"jitter must be four strengths >= 0, hue's at most 0.5, got {strengths}")


def _jitter_factors(uniform, strengths):
    """Factors of the jitter operations, from numbers [..., 4] that are uniform in [0, 1)."""
    low = torch.tensor([max(0, 1 - s) for s in strengths[:HUE]] + [-strengths[HUE]], device=uniform.device)
    high = torch.tensor([1 + s for s in strengths[:HUE]] + [strengths[HUE]], device=uniform.device)
    return low + (high - low) * uniform


def _recolour(images, parameters):
    """Jitter and grayscale of float images [B, 3, H, W], which may be overwritten; all of them are jittered, or none."""
    if parameters.jittered[0]:
        images = jitter(images, parameters.order, parameters.factors)
    return _where(parameters.grayscale, lambda some, _: to_grayscale(some).repeat(1, 3, 1, 1), images)


def _where(chosen, function, images):
    """The images, with the chosen ones replaced by function(these images, their rows); overwrites the given tensor."""
    rows = chosen.nonzero().squeeze(1)
    if len(rows) == len(images):
        return function(images, rows)
    if len(rows):
        there = rows.to(images.device)
        images.index_copy_(0, there, function(images.index_select(0, there), rows))
    return images


def _parts(parameters, size, device):
    """The rows of images that go through the operations together, as tensors on the parameters' device.

    Sorted by the place of hue in the order, those without jitter last: runs that `jitter` need not split.
    """
    place = torch.where(parameters.jittered, (parameters.order == HUE).int().argmax(1), 4)
    rows = place.argsort(stable=True)
    runs = torch.bincount(place, minlength=5).tolist()
    if device.type == "cpu":  # small parts of one run each, for the cache
        parts = _slices(runs, max(1, IMAGES_PER_THREAD * 32 * 32 // size**2) * torch.get_num_threads())
    else:                     # few and large, for the launches
        parts = _slices((sum(runs[:4]), runs[4]), max(1, len(rows)))
    return [rows[part] for part in parts]


def _slices(runs, longest):
    """Consecutive slices over runs of the given lengths, each run in equal slices of at most `longest`."""
    slices, start = [], 0
    for length in runs:
        pieces = math.ceil(length / longest)
        slices += [slice(start + length * i // pieces, start + length * (i + 1) // pieces) for i in range(pieces)]
        start += length
    return slices


# --------------------------------------------------------------------------------------------------------- multi-crop

FLIP, JITTER, GRAYSCALE, BLUR, SIGMA, SOLARIZE, ERASE = range(7)  # columns of `Crops.randoms`, then
ORDER, FACTORS, RANDOMS = slice(7, 11), slice(11, 15), 15         # four columns each, and the number of columns

ERASED_AREA = (0.02, 1 / 3)  # of the view's; timm's default, and so is
ERASED_RATIO = 0.3           # the least ratio of the box's sides


class Crops(NamedTuple):
    """The crops of one photograph, with all that is random in its views; default_collate puts the batch in front."""
    global_crops: torch.Tensor  # [2, 3, G, G] uint8
    local_crops: torch.Tensor   # [L, 3, l, l] uint8
    randoms: torch.Tensor       # [2 + L, RANDOMS] float32, uniform in [0, 1)
    seed: torch.Tensor          # [] int64, of the box and the noise that erase


class MultiCrop:
    """The crops of DINO's multi-crop (Caron et al., 2021): two large ones of most of a photograph, several small ones.

    Runs in a loader's worker, where its result is a function of the photograph and one seed: neither the worker nor the
    batch nor any global generator has a part in it. Boxes are those of torchvision's RandomResizedCrop, and so are the
    pixels, of its version 2 on uint8 tensors (bicubic, antialiased): PIL's filter in coarser integers, 3 times as fast.

    global_size, local_size: sides in pixels. global_scale, local_scale: ranges of the crop's fraction of the area.
    local_number: of small crops, 0 or more. rand_augment: timm's name of a RandAugment, such as
    "rand-n2-m10-mstd0.5", for the global crops; it is applied to the crop, before all that MultiCropAugmentation does.
    Raises ValueError for values out of range.
    """

    def __init__(self, global_size=224, global_scale=(0.4, 1.0), local_size=96, local_scale=(0.05, 0.4), local_number=8,
                 rand_augment=None):
        _check_range("global_scale", global_scale)
        _check_range("local_scale", local_scale)
        if min(global_size, local_size) < 1 or local_number < 0:
            raise ValueError("global_size and local_size must be at least 1 and local_number at least 0, got "
                             f"{global_size}, {local_size} and {local_number}")
        self.global_size, self.local_size, self.local_number = global_size, local_size, local_number
        kinds = torch.tensor([global_scale] * 2 + [local_scale] * local_number)
        self.scale = kinds[:, :1], kinds[:, 1:]
        self.rand_augment = rand_augment and _rand_augment(rand_augment)

    def __call__(self, image, seed):
        """A PIL image in RGB and an integer -> Crops. Of the seed, the last 32 bits count. ValueError for other images."""
        if image.mode != "RGB":
            raise ValueError(f"MultiCrop takes RGB images, got mode {image.mode}; convert it first")
        generator = torch.Generator().manual_seed(seed)
        randoms = torch.rand(2 + self.local_number, RANDOMS, generator=generator)
        seeds = torch.randint(2**32, (3,), generator=generator)
        boxes = draw_boxes(len(randoms), image.height, image.width, self.scale, CROP_RATIO, generator).int().tolist()
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, H, W], channels last in memory
        global_crops = torch.empty(2, 3, self.global_size, self.global_size, dtype=torch.uint8)
        local_crops = torch.empty(self.local_number, 3, self.local_size, self.local_size, dtype=torch.uint8)
        for crop, box in zip((*global_crops, *local_crops), boxes):
            crop.copy_(resized_crop(pixels, box, crop.shape[-1]))
        if self.rand_augment is not None:
            for crop, view_seed in zip(global_crops, seeds[1:].tolist()):
                crop.copy_(self._rand_augmented(crop, view_seed))
        return Crops(global_crops, local_crops, randoms, seeds[0])

    def _rand_augmented(self, crop, seed):
        image = Image.fromarray(crop.permute(1, 2, 0).numpy())
        with _global_seed(seed):
            image = self.rand_augment(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resized_crop(image, box, size):
    """Cut `box` (top, left, height, width) out of a uint8 image [3, H, W] and resize it, bicubic and antialiased.

    Returns: uint8 [3, size, size]. Equal to version 2 of torchvision's resized_crop.
    """
    top, left, height, width = box
    crop = image[None, :, top:top + height, left:left + width]
    return torch.nn.functional.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]


def _rand_augment(config):
    from timm.data.auto_augment import rand_augment_transform  # slow to import, and seldom wanted
    try:
        return rand_augment_transform(config, {})
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"timm knows no RandAugment {config!r}; an example is rand-n2-m10-mstd0.5") from error


@contextmanager
def _global_seed(seed):
    """Seeds the global generators of Python and NumPy, which timm draws from, and puts their states back afterwards."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class PhotometricParameters(NamedTuple):
    """What makes each of N views of its crop; all tensors are on the CPU."""
    flip: torch.Tensor       # [N] bool
    jittered: torch.Tensor   # [N] bool
    order: torch.Tensor      # [N, 4] the jitter operations from first to last
    factors: torch.Tensor    # [N, 4] factor of each operation; hue in turns, -0.5 to 0.5
    grayscale: torch.Tensor  # [N] bool
    blurred: torch.Tensor    # [N] bool
    sigma: torch.Tensor      # [N] of the blur, in pixels
    solarized: torch.Tensor  # [N] bool
    erased: torch.Tensor     # [N] bool


class MultiCropAugmentation(torch.nn.Module):
    """The views of DINO's multi-crop, from the crops that MultiCrop made: all that is not geometry, in batches.

    In this order: flip, colour jitter, grayscale, blur (always in the first global view, with probability 0.1 in the
    second and 0.5 in the local ones), solarisation (0.2 in the second global view), normalisation, erasing (in the first
    global view). Distributions are those of DINO's transforms on PIL images; values stay in float, where PIL rounds to 8
    bits. Knows no randomness: all of it is in the crops.

    erasing: probability of timm's RandomErasing(mode="pixel") in the first global view. blur_sigma: range of the blur's
    deviation in pixels; DINO's is for views of 224, so smaller ones may want less. jitter: strength of brightness,
    contrast, saturation (factor 1 - s to 1 + s) and hue (-s to s turns). jitter_p, grayscale_p, flip_p: probabilities.
    mean, std: per channel, for images in [0, 1]. Raises ValueError for values out of range.
    """

    BLUR_P = (1.0, 0.1, 0.5)      # first global view, second, local views
    SOLARIZE_P = (0.0, 0.2, 0.0)

    def __init__(self, erasing=0.0, blur_sigma=(0.1, 2.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, grayscale_p=0.2,
                 flip_p=0.5, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        _check_range("blur_sigma", blur_sigma)
        _check_jitter(jitter)
        if not 0 <= erasing <= 1:
            raise ValueError(f"erasing must be a probability, got {erasing}")
        self.erasing, self.blur_sigma, self.jitter = erasing, blur_sigma, jitter
        self.jitter_p, self.grayscale_p, self.flip_p = jitter_p, grayscale_p, flip_p
        self.mean, self.std = mean, std

    def forward(self, crops):
        """Crops of B photographs -> the 2 + L views, float32 [B, 3, S, S] each, on the crops' device.

        `randoms` and `seed` are best left on the CPU, which spares a GPU the waits for the group sizes. Raises ValueError
        for crops that are not a batch of MultiCrop's.
        """
        crops = Crops(*crops)
        _check_crops(crops)
        parameters = self.parameters_of(crops.randoms)
        views = []
        with torch.autocast(crops.global_crops.device.type, enabled=False):  # bfloat16 would be coarser than 8 bits
            for images, kind in ((crops.global_crops, slice(2)), (crops.local_crops, slice(2, None))):
                batch = PhotometricParameters(*(field[:, kind].flatten(0, 1) for field in parameters))
                result = self.photometric(images.flatten(0, 1), batch)
                views += result.view(*images.shape).unbind(1)
            erased = parameters.erased[:, 0].nonzero().squeeze(1).tolist()
            for row in erased:
                erase(views[0][row], crops.seed[row].item())
        return views

    def parameters_of(self, randoms):
        """Uniform numbers [B, 2 + L, RANDOMS] -> PhotometricParameters with fields [B, 2 + L, ...]."""
        randoms = randoms.cpu()
        local = randoms.shape[1] - 2

        def happens(column, p):
            return randoms[..., column] < torch.tensor(p)

        def by_view(first, second, others):
            return (first, second) + (others,) * local

        low, high = self.blur_sigma
        return PhotometricParameters(
            flip=happens(FLIP, self.flip_p), jittered=happens(JITTER, self.jitter_p),
            order=randoms[..., ORDER].argsort(-1), factors=_jitter_factors(randoms[..., FACTORS], self.jitter),
            grayscale=happens(GRAYSCALE, self.grayscale_p), blurred=happens(BLUR, by_view(*self.BLUR_P)),
            sigma=low + (high - low) * randoms[..., SIGMA], solarized=happens(SOLARIZE, by_view(*self.SOLARIZE_P)),
            erased=happens(ERASE, by_view(self.erasing, 0.0, 0.0)))

    def photometric(self, images, parameters):
        """The views, but for the erasing, of uint8 crops [N, 3, S, S]: float32, normalised."""
        device = images.device
        views = torch.empty(images.shape, device=device)
        for rows in _parts(parameters, images.shape[-1], device):
            part = PhotometricParameters(*(field[rows] for field in parameters))
            rows = rows.to(device)
            view = _where(part.flip, lambda some, _: some.flip(3), images.index_select(0, rows))
            view = _recolour(view.float().div_(255), part)
            view = _where(part.blurred, lambda some, there: gaussian_blur(some, part.sigma[there]), view)
            view = _where(part.solarized, lambda some, _: solarize(some), view)
            views.index_copy_(0, rows, normalize(view, self.mean, self.std))
        return views


def erase(view, seed):
    """Fill a box of a normalised view [3, S, S] with normal noise, in place: timm's RandomErasing(mode="pixel").

    The box, uniform in area and log-uniform in ratio, is the first of ten that is smaller than the view; if none is,
    nothing happens. The noise is made on the CPU, so that a seed means the same on every device.
    """
    size = view.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    for area, ratio, y, x in torch.rand(CROP_TRIES, 4, generator=generator).tolist():
        area = size**2 * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * area)
        ratio = ERASED_RATIO**(1 - 2 * ratio)
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height < size and width < size:
            top, left = int(y * (size - height + 1)), int(x * (size - width + 1))
            view[:, top:top + height, left:left + width] = torch.randn(3, height, width, generator=generator)
            return


def _check_crops(crops):
    for name, images in (("global_crops", crops.global_crops), ("local_crops", crops.local_crops)):
        if images.dtype != torch.uint8:
            raise ValueError(f"{name} must be uint8, got {images.dtype}")
        if images.ndim != 5 or images.shape[2] != 3 or images.shape[3] != images.shape[4]:
            raise ValueError(f"{name} must be a batch [B, number, 3, S, S], got {list(images.shape)}")
    batch, views = len(crops.global_crops), 2 + crops.local_crops.shape[1]
    if batch == 0 or crops.global_crops.shape[1] != 2 or len(crops.local_crops) != batch:
        raise ValueError("global_crops and local_crops must be a non-empty batch of MultiCrop's, got "
                         f"{list(crops.global_crops.shape)} and {list(crops.local_crops.shape)}")
    if crops.randoms.shape != (batch, views, RANDOMS) or crops.seed.shape != (batch,):
        raise ValueError(f"randoms and seed must be [{batch}, {views}, {RANDOMS}] and [{batch}], got "
                         f"{list(crops.randoms.shape)} and {list(crops.seed.shape)}")
