"""Image augmentation in batches, on the device that holds the images.

The SimCLR augmentation of small images (CIFAR): uint8 `[B, 3, H, W]` in, two normalised float views out.

    augment = SimCLRAugmentation(size=32, scale=(0.2, 1.0))
    view0, view1 = augment(images, torch.Generator().manual_seed(0))

Drawing and applying are apart. `draw` makes the random parameters, one per image, from the generator it is given; the
functions that apply them are pure and know no randomness. So a view is reproducible from its generator alone, and every
function can be compared with torchvision's at the same parameters. Float images are in [0, 1] until `normalize`.
"""
import math
from typing import NamedTuple

import torch

# Per-channel statistics of the 50,000 CIFAR-10 training images. The deviation is over all pixels; the 0.2023, 0.1994,
# 0.2010 of many recipes is the mean of the deviations of single images.
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, to the digits that torchvision uses
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of `factors` and entries of `order`
CROP_TRIES = 10

# Images per thread that go through all operations together on a CPU, where an operation should find its input in the
# core's cache. A compromise: their colours in float take 0.8 MB, and fewer images would not repay the calls.
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

    def __init__(self, size=32, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8,
                 grayscale_p=0.2, flip_p=0.5, mean=CIFAR_MEAN, std=CIFAR_STD):
        super().__init__()
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be 0 < low <= high, got {scale}")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be 0 < low <= high, got {ratio}")
        if len(jitter) != 4 or min(jitter) < 0 or jitter[HUE] > 0.5:
            raise ValueError(f"jitter must be four strengths >= 0, hue's at most 0.5, got {jitter}")
        self.size, self.scale, self.ratio, self.jitter = size, scale, ratio, jitter
        self.jitter_p, self.grayscale_p, self.flip_p = jitter_p, grayscale_p, flip_p
        self.mean, self.std = mean, std

    def draw(self, count, height, width, generator):
        """Parameters of one view of each of `count` images of height x width, on the generator's device."""
        device = generator.device
        boxes = draw_boxes(count, height, width, self.scale, self.ratio, generator)
        chance = torch.rand(3, count, generator=generator, device=device)
        order = torch.rand(count, 4, generator=generator, device=device).argsort(1)
        low = torch.tensor([max(0, 1 - s) for s in self.jitter[:HUE]] + [-self.jitter[HUE]], device=device)
        high = torch.tensor([1 + s for s in self.jitter[:HUE]] + [self.jitter[HUE]], device=device)
        factors = low + (high - low) * torch.rand(count, 4, generator=generator, device=device)
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
        # Sorted by the place of hue in the order, those without jitter last: runs that `jitter` need not split.
        place = torch.where(parameters.jittered, (parameters.order == HUE).int().argmax(1), 4)
        rows = place.argsort(stable=True)
        boxes, flip, _, order, factors, grayscale = (field[rows] for field in parameters)
        boxes, flip, rows = boxes.to(device), flip.to(device), rows.to(device)

        runs = torch.bincount(place, minlength=5).tolist()
        if device.type == "cpu":  # small parts of one run each, for the cache
            parts = _slices(runs, IMAGES_PER_THREAD * torch.get_num_threads())
        else:                     # few and large, for the launches
            parts = _slices((sum(runs[:4]), runs[4]), len(images))
        views = torch.empty(len(images), 3, self.size, self.size, device=device)
        for part in parts:
            view = crop_resize(images.index_select(0, rows[part]), boxes[part], self.size, flip[part])
            if part.start < sum(runs[:4]):
                view = jitter(view, order[part], factors[part])
            grey = grayscale[part].nonzero().squeeze(1).to(device)
            view.index_copy_(0, grey, to_grayscale(view.index_select(0, grey)).expand(-1, 3, -1, -1))
            views.index_copy_(0, rows[part], normalize(view, self.mean, self.std))
        return views


def _slices(runs, longest):
    """Consecutive slices over runs of the given lengths, each run in equal slices of at most `longest`."""
    slices, start = [], 0
    for length in runs:
        pieces = math.ceil(length / longest)
        slices += [slice(start + length * i // pieces, start + length * (i + 1) // pieces) for i in range(pieces)]
        start += length
    return slices
