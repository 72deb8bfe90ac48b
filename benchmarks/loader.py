"""Photographs per CPU second through main.py's multi-crop loader, against torchvision's transforms on PIL
images.

    python benchmarks/loader.py                             # photographs made of noise
    python benchmarks/loader.py --data_path DIR             # any folder with images in it
    python benchmarks/loader.py --device cuda               # the device's part there

Two global and eight local views of every photograph, on one thread. "worker" is what a loader's worker does:
decode, crop and resize; "device part" is the rest; the plain recipe does everything in the worker. They take
turns, and medians of CPU time count, which other programs on the core disturb least; on a GPU of wall time.
"""
import random
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
import torchvision
from PIL import ImageFilter
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.transforms import InterpolationMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main as pretraining  # noqa: E402
import utils  # noqa: E402
from augmentations import CROP_RATIO, IMAGENET_MEAN, IMAGENET_STD, MultiCropAugmentation  # noqa: E402
from benchmarks.measure import alternate, machine, make_images  # noqa: E402
from data import load_image  # noqa: E402


def plain_recipe():
    """DINO's recipe with torchvision's transforms: PIL image -> 10 normalised tensors."""
    def blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    def view(size, scale, blur_p, solarize_p=0.0):
        return transforms.Compose([
            transforms.RandomResizedCrop(size, scale, CROP_RATIO, InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([transforms.Lambda(blur)], p=blur_p),
            transforms.RandomSolarize(128, p=solarize_p),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ])
    views = [view(224, (0.4, 1.0), 1.0), view(224, (0.4, 1.0), 0.1, 0.2)] + [view(96, (0.05, 0.4), 0.5)] * 8
    return lambda image: [augment(image) for augment in views]


def main(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data_path", type=Path, help="folder of images (default: made of noise)")
    add("--images", type=utils.positive_int, default=32, help="photographs per timed run")
    add("--device", default="cpu", help="device of the rest, cpu or cuda")
    add("--repeats", type=utils.positive_int, default=5, help="timed runs of each")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.data_path is None:
            make_images(Path(folder), args.images)
        flags = pretraining.parse_args(["--data_path", str(args.data_path or folder)])
        images = pretraining.MultiCropImages(flags)
        keys = [(index, index) for index in range(min(args.images, len(images)))]       # (index, seed)
        files = [images.folder / images.source[index] for index, _ in keys]
        crops = default_collate([images[key][0] for key in keys]).to(torch.device(args.device))
        plain, augment, generator = plain_recipe(), MultiCropAugmentation(), torch.Generator().manual_seed(0)
        times = alternate({
            "decoding": lambda: [load_image(path) for path in files],
            "worker": lambda: [images[key] for key in keys],
            "device part": lambda: augment(crops, generator),
            "plain recipe": lambda: [plain(load_image(path)) for path in files]}, args.repeats)
    print(f"{machine()}, torchvision {torchvision.__version__}; {len(keys)} photographs, {args.repeats} runs")
    seconds = {name: median(cpu) / len(keys) for name, (_, cpu) in times.items()}
    if args.device == "cpu":
        seconds["worker + device part"] = seconds["worker"] + seconds["device part"]
    else:
        seconds["device part"] = median(times["device part"][0]) / len(keys)
    for name, each in seconds.items():
        print(f"{name:>20}: {1e3 * each:6.2f} ms a photograph, {1 / each:6.1f} photographs/s, "
              f"{seconds['plain recipe'] / each:5.1f} times the plain recipe")


if __name__ == "__main__":
    utils.run_script(main)
