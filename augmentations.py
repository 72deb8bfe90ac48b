"""Image augmentation in batches, on the device that holds the images.

SimCLR's augmentation of small images (CIFAR): uint8 [B, 3, H, W] in, normalised float views out.

    augment = SimCLRAugmentation(size=32, scale=(0.2, 1.0))
    view0, view1 = augment(images, torch.Generator().manual_seed(0))

DINO's multi-crop of photographs: the loader's workers crop and resize, the training loop does the rest.

    crop, augment = MultiCrop(), MultiCropAugmentation()
    crops = crop(pil_image, seed)                 # in the dataset's __getitem__; default_collate batches
    views = augment(crops.to(device), generator)  # 2 x [B, 3, 224, 224] and 8 x [B, 3, 96, 96]

To add an operation, write apply(images, *parameters) -> images and, if it has parameters, draw(count, size,
generator) -> parameters; then add Operation(probability, apply, draw) to `self.operations` of either class.

Random numbers are drawn on the CPU, the same for every device, and reach a GPU without host waits. What
applies them is deterministic. Float images are in [0, 1] until `normalize`.
"""
import math
import random
from functools import partial
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop, rgb_to_grayscale

from utils import send

# CIFAR-10's training images; the deviation is over all pixels. The 0.2023, 0.1994, 0.2010 of many recipes is
# the mean of the deviations of single images.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of `factors` and entries of `order`
CROP_RATIO = (3 / 4, 4 / 3)                       # width / height


# --------------------------------------------------------------------------------------------- draw and apply

class Operation(NamedTuple):
    """A random change of float images [n, 3, S, S]."""
    probability: float | tuple       # in every view, or (in the first global view, the second, a local one)
    apply: Callable                  # (images, *parameters) -> images; may overwrite the images it is given
    draw: Callable | None = None     # (count, size, generator) -> parameters: CPU tensors [count, ...]


def draw_operations(operations, kinds, count, size, generator, rank=0, world=1):
    """Draws which of the V views of each of `count` images every operation changes, and how.

    kinds: per view 0 (first global view), 1 (second) or 2 (local). size: side of the views in pixels.
    Draws for all ranks, world * count * V views, and keeps this rank's.
    Returns: for each operation (chosen, parameters), CPU tensors [count * V, ...].
    """
    own, drawn = slice(rank * count * len(kinds), (rank + 1) * count * len(kinds)), []
    for operation in operations:
        probability = torch.tensor(operation.probability).expand(3)[kinds]
        chosen = (torch.rand(world * count, len(kinds), generator=generator) < probability).flatten()
        parameters = operation.draw(len(chosen), size, generator) if operation.draw else ()
        drawn.append((chosen[own], [field[own] for field in parameters]))
    return drawn


def apply_operations(operations, drawn, images):
    """Float images [N, 3, S, S], N = count * V, changed as `draw_operations` drew; may overwrite them."""
    rows = [chosen.nonzero().squeeze(1) for chosen, _ in drawn]  # on the CPU: nothing waits for their number
    on_device = send(torch.cat(rows), images.device).split([len(there) for there in rows])
    for operation, (_, parameters), there, index in zip(operations, drawn, rows, on_device):
        if 0 < len(there) == len(images):
            images = operation.apply(images, *parameters)
        elif len(there):
            changed = operation.apply(images.index_select(0, index), *(field[there] for field in parameters))
            images.index_copy_(0, index, changed)
    return images


# ------------------------------------------------------------------------------------------------------ crops

def draw_boxes(count, height, width, scale, ratio, generator, margin=0, tries=10):
    """Draws `count` crops of a height x width image as torchvision's RandomResizedCrop does.

    Area (fraction of the image, uniform in `scale`) and aspect ratio (log-uniform in `ratio`) are drawn up to
    ten times; the first crop that fits and leaves out `margin` rows and columns is placed uniformly. If none
    fits: the largest central crop of an allowed ratio. Bounds in `scale` are numbers or tensors [count, 1].
    Returns: float tensor [count, 4] of whole numbers, (top, left, height, width).
    """
    area, log_ratio = torch.rand(2, count, tries, generator=generator)
    place = torch.rand(2, count, generator=generator)

    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * log_ratio)
    sides = torch.stack((area / aspect, area * aspect)).sqrt().round()    # [2, count, tries]: heights, widths
    limit = torch.tensor((height, width)).view(2, 1)
    fits = ((sides > 0) & (sides <= limit.unsqueeze(2) - margin)).all(0)  # [count, tries]
    sides = sides[:, torch.arange(count), fits.int().argmax(1)]           # argmax gives the first of equals
    # The product may round up to its excluded end, hence the minimum.
    corner = torch.minimum((place * (limit - sides + 1)).floor(), limit - sides)

    # width / height below the allowed ratios leaves rows out, above them columns
    h = min(height, round(width / ratio[0]))
    w = min(width, round(height * ratio[1]))
    central = torch.tensor(((height - h) // 2, (width - w) // 2, h, w))
    return torch.where(fits.any(1, keepdim=True), torch.cat((corner, sides)).T, central)


def crop_resize(images, boxes, size, flip):
    """Cuts `boxes` out of the images, resizes to size x size, and mirrors where `flip`.

    Bilinear, antialiased where the crop is larger than `size`: PIL's filter, without its rounding to 8 bits.
    images: [B, 3, H, W], uint8 or float. boxes: [B, 4] top, left, height, width in pixels. flip: [B] bool.
    Returns: float [B, 3, size, size]; uint8 images come out in [0, 1], float images in their own range.
    """
    count, channels, height, width = images.shape
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
    """[B, size, extent]: how much of each input pixel is in each output pixel, along one axis."""
    device = start.device
    start, length, flip = start.unsqueeze(1), length.unsqueeze(1), flip.unsqueeze(1)
    step = length / size                                  # [B, 1] input pixels per output pixel
    centre = torch.arange(size, device=device) + 0.5      # [size]
    centre = start + step * torch.where(flip, size - centre, centre)
    pixel = torch.arange(extent, device=device) + 0.5     # [extent]
    # The crop comes before the resize: pixels outside weigh nothing, as if infinitely far.
    pixel = torch.where((pixel > start) & (pixel < start + length), pixel, math.inf)
    radius = step.clamp(min=1)                            # of the triangle filter
    distance = ((pixel / radius).unsqueeze(1) - (centre / radius).unsqueeze(2)).abs_()
    weights = torch.sub(1, distance, out=distance).clamp_(min=0)
    return weights.div_(weights.sum(2, keepdim=True))


# ------------------------------------------------------------------------------------- photometric operations

def grayscale(images):
    """Sets the three channels to the grey value, in place."""
    return images.copy_(rgb_to_grayscale(images))


def adjust_hue(images, factor):
    """Turns the hue of float images [B, 3, H, W] in [0, 1] by `factor` [B], -0.5 to 0.5 turns, in place.

    HSV without the sextants. With low and high the smallest and largest channel and chroma = high - low, the
    hue is (1 + (g + b - r - low) / chroma) / 6 turns from red, towards green if g > b and else towards blue.
    Value and saturation stay, hence so do low and high, and a channel whose own hue is o (red 0, green 1/3,
    blue 2/3) becomes clamp(low - chroma + 6 chroma |frac(hue - o) - 1/2|, low, high).
    """
    red, green, blue = images.split(1, dim=1)             # [B, 1, H, W] each
    low, high = images.amin(1, keepdim=True), images.amax(1, keepdim=True)
    chroma = high - low
    chroma6 = (chroma * 6).clamp_(min=1e-12)              # a grey pixel has 0 / 1e-12: any hue will do
    hue = (green + blue).sub_(red).sub_(low).div_(chroma6).add_(1 / 6)
    hue.copysign_(green - blue)                           # [-1/2, 1/2]
    # hue - o with two whole turns added, because frac wants no negative numbers
    turn = factor.view(-1, 1, 1, 1) + torch.linspace(2, 4 / 3, 3, device=images.device).view(3, 1, 1)
    turned = (hue + turn).frac_().sub_(0.5).abs_()        # [B, 3, H, W]
    torch.addcmul(low - chroma, turned, chroma6, out=turned)
    return torch.clamp(turned, low, high, out=images)


def draw_jitter(strengths, count, size, generator):
    """Order and factors for `jitter`: strength s of brightness, contrast and saturation gives factors in
    [max(0, 1 - s), 1 + s], that of hue in [-s, s]."""
    order = torch.rand(count, 4, generator=generator).argsort(1)
    low = torch.tensor([max(0, 1 - s) for s in strengths[:HUE]] + [-strengths[HUE]])
    high = torch.tensor([1 + s for s in strengths[:HUE]] + [strengths[HUE]])
    return order, low + (high - low) * torch.rand(count, 4, generator=generator)


def jitter(images, order, factors):
    """Applies the four colour operations to each image in its own order, in place.

    images: float [B, 3, H, W] in [0, 1].
    order: [B, 4] on the CPU, per image a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE.
    factors: [B, 4] on the CPU, column k for operation k. 1 (of hue: 0) keeps the image; a brightness of 0 is
    black, a contrast of 0 the mean grey of the image, a saturation of 0 grayscale.
    """
    # Each image goes through three blends, and its hue is turned before, between or after them. A blend is a
    # weighted sum of the image, its grey and its mean grey, so images of different operations go together.
    place = (order == HUE).int().argmax(1)                # [B]: blends that come before the hue, 0 to 3
    rows, counts = place.argsort(stable=True), torch.bincount(place, minlength=4).tolist()
    turns = send(factors[rows, HUE], images.device).split(counts)
    rows = send(rows, images.device).split(counts)
    blends = order[order != HUE].view(-1, 3)
    keep = factors.gather(1, blends)
    weights = torch.stack((keep, (1 - keep) * (blends == SATURATION), (1 - keep) * (blends == CONTRAST)))
    weights = send(weights.mT[..., None, None, None], images.device)    # [kind, slot, B, 1, 1, 1]
    for slot in range(4):
        if len(rows[slot]):
            turned = adjust_hue(images.index_select(0, rows[slot]), turns[slot])
            images.index_copy_(0, rows[slot], turned)
        if slot < 3:
            image_weight, grey_weight, mean_weight = weights[:, slot]
            grey = rgb_to_grayscale(images)               # [B, 1, H, W]
            mean = grey.mean((2, 3), keepdim=True).mul_(mean_weight)
            other = grey.mul_(grey_weight).add_(mean)
            torch.addcmul(other, images, image_weight, out=images).clamp_(0, 1)
    return images


def gaussian_blur(images, sigma):
    """Blurs float images [B, C, S, S] with a Gaussian of `sigma` [B] pixels, edge pixels repeated outside.

    PIL's filter, without its rounding to 8 bits: three box filters in turn, each of the variance sigma^2 / 3.
    A box of fractional width gives the pixels at its ends the part that it covers (Gwosdek et al., 2011).
    """
    size, variance = images.shape[-1], send(sigma, images.device).square() / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()     # the widest box of whole pixels is 2 whole + 1
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1).square()))
    half = (whole + part + 0.5).view(-1, 1, 1)                       # half of the box's width
    edges = torch.arange(size + 1, device=images.device) - 0.5  # of the pixels; the outer two have no end
    edges[:1].fill_(-math.inf), edges[-1:].fill_(math.inf)
    centre = torch.arange(size, device=images.device).unsqueeze(1)
    box = torch.clamp(edges - centre, -half, half).diff(dim=2) / (2 * half)  # [B, S, S], rows sum to 1
    weights = box @ box @ box
    images = torch.bmm(images.flatten(1, 2), weights.mT).view_as(images)
    return weights.unsqueeze(1) @ images


def solarize(images):
    """Inverts what is brighter than half, in float images in [0, 1]: PIL's solarize at a threshold of 128."""
    return torch.minimum(images, 1 - images)


def normalize(images, mean, std):
    """(images - mean) / std by channel: uint8 [B, 3, H, W] -> float, or float images in [0, 1] in place."""
    images = images.float().div_(255) if images.dtype == torch.uint8 else images
    for channel, channel_mean, channel_std in zip(images.unbind(1), mean, std):
        channel.sub_(channel_mean).div_(channel_std)
    return images


def draw_erased(count, size, generator):
    """Boxes and noise seeds for `erase`, as timm's by default: boxes are smaller than the image both ways."""
    boxes = draw_boxes(count, size, size, (0.02, 1 / 3), (0.3, 1 / 0.3), generator, margin=1)
    return boxes.long(), torch.randint(2**32, (count,), generator=generator)


def erase(images, boxes, seeds):
    """Fills a box of each image [3, S, S] with normal noise, in place: timm's RandomErasing(mode="pixel").

    boxes: [B, 4] top, left, height, width; seeds: [B]; both on the CPU, where the noise is made.
    """
    boxes = boxes.tolist()
    noise = [torch.randn(3 * height * width, generator=torch.Generator().manual_seed(seed))
             for (_, _, height, width), seed in zip(boxes, seeds.tolist())]
    noise = send(torch.cat(noise), images.device).split([len(pixels) for pixels in noise])
    for image, (top, left, height, width), pixels in zip(images, boxes, noise):
        image[:, top:top + height, left:left + width] = pixels.view(3, height, width)
    return images


# ----------------------------------------------------------------------------------------------------- SimCLR

class SimCLRAugmentation(torch.nn.Module):
    """Random views of every image of a batch: crop and resize, flip, colour jitter, grayscale, normalise.

    The augmentation of SimCLR (Chen et al., 2020, appendix A; without blur, as for CIFAR), with the semantics
    of torchvision's RandomResizedCrop, RandomHorizontalFlip, RandomApply(ColorJitter), RandomGrayscale,
    Normalize, except that values stay in float between the operations, where PIL rounds to 8 bits.

    size: side of a view in pixels. scale: range of the crop's fraction of the image's area. ratio: range of
    its width / height. strengths: of the jitter, see draw_jitter.
    """

    def __init__(self, size=32, scale=(0.2, 1.0), ratio=CROP_RATIO, strengths=(0.4, 0.4, 0.4, 0.1),
                 jitter_p=0.8, grayscale_p=0.2, flip_p=0.5, mean=CIFAR_MEAN, std=CIFAR_STD):
        super().__init__()
        self.size, self.scale, self.ratio, self.flip_p = size, scale, ratio, flip_p
        self.operations = [
            Operation(jitter_p, jitter, partial(draw_jitter, strengths)),
            Operation(grayscale_p, grayscale),
            Operation(1.0, partial(normalize, mean=mean, std=std)),
        ]

    def forward(self, images, generator, views=2):
        """uint8 images [B, 3, H, W] -> tuple of independent views, float32 [B, 3, size, size] each.

        generator: torch.Generator on the CPU, the only source of randomness. ValueError for other images.
        """
        _check_images("images", images, "B3HW")
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 is coarser than 8 bits
            return tuple(self.make_view(images, *self.draw_view(images, generator)) for _ in range(views))

    def draw_view(self, images, generator):
        """Boxes [B, 4], flip [B] and what the operations do, for one view of images [B, 3, H, W]."""
        boxes = draw_boxes(len(images), *images.shape[2:], self.scale, self.ratio, generator)
        flip = torch.rand(len(images), generator=generator) < self.flip_p
        return boxes, flip, draw_operations(self.operations, [0], len(images), self.size, generator)

    def make_view(self, images, boxes, flip, drawn):
        """The view that `draw_view` drew."""
        geometry = send(torch.cat((boxes, flip[:, None]), 1), images.device)
        crops = crop_resize(images, geometry[:, :4], self.size, geometry[:, 4] > 0)
        return apply_operations(self.operations, drawn, crops)


# ------------------------------------------------------------------------------------------------- multi-crop

class Crops(NamedTuple):
    """The crops of one photograph; default_collate puts the batch in front."""
    global_crops: torch.Tensor  # [2 or more, 3, G, G] uint8
    local_crops: torch.Tensor   # [L, 3, l, l] uint8

    def to(self, device):
        return Crops(*(send(crops, device) for crops in self))


class MultiCrop:
    """The crops of DINO's multi-crop (Caron et al., 2021): two large ones of a photograph, some small ones.

    Runs in a loader's worker, but depends on the photograph and one seed alone. Boxes are those of
    torchvision's RandomResizedCrop, and so are the pixels, of its version 2 on uint8 tensors (bicubic,
    antialiased): PIL's filter in coarser integers, 3 times as fast.

    global_size, local_size: sides in pixels. global_scale, local_scale: ranges of the crop's fraction of the
    area. local_number: of small crops, 0 or more. rand_augment: timm's name of a RandAugment, such as
    "rand-n2-m10-mstd0.5", to be applied to the global crops. global_number: of large crops, at least 2.
    ValueError for a name that timm does not know.
    """

    def __init__(self, global_size=224, global_scale=(0.4, 1.0), local_size=96, local_scale=(0.05, 0.4),
                 local_number=8, rand_augment=None, global_number=2):
        self.global_size, self.local_size = global_size, local_size
        self.global_number, self.local_number = global_number, local_number
        scales = torch.tensor([global_scale] * global_number + [local_scale] * local_number)
        self.scale = scales[:, :1], scales[:, 1:]
        self.rand_augment = rand_augment and _rand_augment(rand_augment)

    def __call__(self, image, seed):
        """RGB PIL image, integer of which the last 32 bits count -> Crops. ValueError for other images."""
        if image.mode != "RGB":
            raise ValueError(f"MultiCrop takes RGB images, got mode {image.mode}; convert it first")
        generator = torch.Generator().manual_seed(seed)
        boxes = draw_boxes(len(self.scale[0]), *image.size[::-1], self.scale, CROP_RATIO, generator)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, H, W], channels last in memory
        crops = Crops(*(torch.empty(number, 3, size, size, dtype=torch.uint8) for number, size in
                        ((self.global_number, self.global_size), (self.local_number, self.local_size))))
        for crop, box in zip((*crops.global_crops, *crops.local_crops), boxes.int().tolist()):
            crop.copy_(resized_crop(pixels, *box, [*crop.shape[1:]], InterpolationMode.BICUBIC))
        if self.rand_augment:
            seeds = torch.randint(2**32, (self.global_number,), generator=generator)
            for crop, crop_seed in zip(crops.global_crops, seeds.tolist()):
                crop.copy_(_rand_augmented(crop, self.rand_augment, crop_seed))
        return crops


def _rand_augment(config):
    from timm.data.auto_augment import rand_augment_transform  # slow to import, and seldom wanted
    try:
        return keep_one_bit(rand_augment_transform(config, {}))
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"timm knows no RandAugment {config!r}; one is rand-n2-m10-mstd0.5") from error


def keep_one_bit(rand_augment):
    """Posterisation to a bit at least, in place: timm may ask for none, which Pillow 13 refuses."""
    for operation in rand_augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return rand_augment


def _posterize(image, bits, **_):
    return ImageOps.posterize(image, min(max(bits, 1), 8))


def _rand_augmented(crop, rand_augment, seed):
    """RandAugment of a uint8 crop [3, S, S] by its own seed. timm draws from the global generators of Python
    and NumPy, which are restored afterwards."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed), np.random.seed(seed)
    try:
        image = rand_augment(Image.fromarray(crop.permute(1, 2, 0).numpy()))
    finally:
        random.setstate(states[0]), np.random.set_state(states[1])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class MultiCropAugmentation(torch.nn.Module):
    """The views of DINO's multi-crop from MultiCrop's crops: all that is not geometry, in batches.

    Distributions are those of DINO's transforms on PIL images; values stay in float, PIL rounds to 8 bits.

    erasing: probability of timm's RandomErasing(mode="pixel") in the first global view. blur_sigma: range of
    the blur's deviation in pixels; DINO's is for views of 224, so smaller ones may want less.
    """

    def __init__(self, erasing=0.0, blur_sigma=(0.1, 2.0)):
        super().__init__()

        def draw_sigma(count, size, generator):
            return (torch.empty(count).uniform_(*blur_sigma, generator=generator),)

        self.operations = [
            Operation(0.5, partial(torch.flip, dims=(3,))),
            Operation(0.8, jitter, partial(draw_jitter, (0.4, 0.4, 0.2, 0.1))),
            Operation(0.2, grayscale),
            Operation((1.0, 0.1, 0.5), gaussian_blur, draw_sigma),
            Operation((0.0, 0.2, 0.0), solarize),
            Operation(1.0, partial(normalize, mean=IMAGENET_MEAN, std=IMAGENET_STD)),
            Operation((erasing, 0.0, 0.0), erase, draw_erased),
        ]

    def forward(self, crops, generator, rank=0, world=1):
        """Crops of this rank's B photographs -> G + L views, float32 [B, 3, S, S] each, global views first.
        Global views are by turns of DINO's two kinds.

        generator: torch.Generator on the CPU, the only source of randomness, in the same state on all ranks.
        Each draws for world * B photographs and keeps its own part, so the number of ranks does not matter.
        ValueError for images that are not uint8, or of other shapes.
        """
        _check_images("global_crops", crops.global_crops, "BG3SS")
        _check_images("local_crops", crops.local_crops, "BL3SS")
        batch, (large, small) = len(crops.global_crops), (field.shape[1] for field in crops)
        views = []
        with torch.autocast(crops.global_crops.device.type, enabled=False):  # bfloat16 is coarser than 8 bits
            for images, kinds in ((crops.global_crops, [view % 2 for view in range(large)]),
                                  (crops.local_crops, [2] * small)):
                drawn = draw_operations(self.operations, kinds, batch, images.shape[-1], generator, rank,
                                        world)
                changed = apply_operations(self.operations, drawn, images.flatten(0, 1).float().div_(255))
                views += changed.view(images.shape).unbind(1)       # [B, V, 3, S, S] -> V of [B, 3, S, S]
        return views


def _check_images(name, images, shape):
    sizes = images.shape[:1] + images.shape[-2:]
    if images.dtype != torch.uint8 or images.ndim != len(shape) or images.shape[-3] != 3 or 0 in sizes:
        raise ValueError(f"{name} must be non-empty uint8 [{', '.join(shape)}], "
                         f"got {images.dtype} {list(images.shape)}")
