"""Photographs per second through the multi-crop recipe on one core, against the same recipe on PIL images, one by one.

    python benchmarks/loader.py --data_path DIR                 # any folder with JPEG files in it
    python benchmarks/loader.py --data_path DIR --images 64 --repeats 9

Two global and eight local views of every photograph. "worker" is what a loader's worker does: decode, and cut the crops;
"device part" is what is left for the device, here on one thread of the CPU; the plain recipe does everything in the
worker. All take turns, so that a change of the machine's speed meets all of them; the medians count. Rates and ratios are
of CPU time, which other programs on the core disturb least; the DataLoader's is that of the process it feeds.
"""
import argparse
import random
import sys
from pathlib import Path
from statistics import median

import torch
import torchvision
from PIL import ImageFilter
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms
from torchvision.transforms import InterpolationMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from augmentations import CROP_RATIO, IMAGENET_MEAN, IMAGENET_STD, MultiCrop, MultiCropAugmentation  # noqa: E402
from benchmarks.measure import alternate, machine  # noqa: E402
from utils import load_image  # noqa: E402


def get_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, type=Path, help="folder of JPEG photographs, searched to any depth")
    parser.add_argument("--images", default=32, type=int, help="photographs per timed run")
    parser.add_argument("--repeats", default=7, type=int, help="timed runs of each")
    parser.add_argument("--rand_augment", default=None, help='timm RandAugment on the global crops, "rand-n2-m10-mstd0.5"')
    return parser.parse_args()


class RandomBlur:
    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))) if random.random() < self.p else image


def plain_recipe():
    """DINO's recipe with torchvision's transforms on a PIL image -> 10 normalised tensors."""
    def view(size, scale, blur, solarize=0.0):
        return transforms.Compose([
            transforms.RandomResizedCrop(size, scale, CROP_RATIO, InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
            RandomBlur(blur),
            transforms.RandomSolarize(128, p=solarize),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ])
    views = [view(224, (0.4, 1.0), 1.0), view(224, (0.4, 1.0), 0.1, 0.2)] + [view(96, (0.05, 0.4), 0.5)] * 8
    return lambda image: [augment(image) for augment in views]


class Photographs(Dataset):
    def __init__(self, files, crop):
        self.files, self.crop = files, crop

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return self.crop(load_image(self.files[index]), index)


def main():
    args = get_args()
    torch.set_num_threads(1)
    random.seed(0), torch.manual_seed(0)
    files = sorted(path for path in args.data_path.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    files = files[::max(1, len(files) // args.images)][:args.images]
    if not files:
        sys.exit(f"error: no JPEG files in {args.data_path}")
    plain, crop, augment = plain_recipe(), MultiCrop(rand_augment=args.rand_augment), MultiCropAugmentation()
    dataset = Photographs(files, crop)
    batch = default_collate([dataset[i] for i in range(len(files))])
    # One worker that lives through the runs; each batch crosses to this process through shared memory.
    loader = DataLoader(dataset, batch_size=min(8, len(files)), num_workers=1, persistent_workers=True)
    candidates = {
        "decode": lambda: [load_image(path) for path in files],
        "worker": lambda: [dataset[i] for i in range(len(files))],
        "DataLoader, 1 worker": lambda: list(loader),
        "device part on the CPU": lambda: augment(batch),
        "plain recipe": lambda: [plain(load_image(path)) for path in files],
    }
    times = {name: [median(seconds) / len(files) for seconds in both]
             for name, both in alternate(candidates, args.repeats).items()}
    times["worker + device part"] = [sum(both) for both in zip(times["worker"], times["device part on the CPU"])]
    print(f"{machine()}, torchvision {torchvision.__version__}; {len(files)} photographs, {args.repeats} runs")
    print(f"{'per photograph':>24} {'wall ms':>9} {'CPU ms':>9} {'photographs / CPU s':>20} {'times the plain recipe':>23}")
    for name, (wall, cpu) in times.items():
        rate = f"{1 / cpu:20.1f} {times['plain recipe'][1] / cpu:23.1f}" if "DataLoader" not in name else ""
        print(f"{name:>24} {wall * 1e3:9.2f} {cpu * 1e3:9.2f} {rate}")


if __name__ == "__main__":
    main()
