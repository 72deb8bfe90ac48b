"""Views per second of SimCLRAugmentation against torchvision's transforms on PIL images.

    python benchmarks/augmentation.py
    python benchmarks/augmentation.py --batch_size 512 --repeats 20
    python benchmarks/augmentation.py --device cuda        # ours there; PIL stays on the CPU

Both make CIFAR-size SimCLR views of random images, on one CPU thread, in turns so that a change of the
machine's speed meets both; the medians count.
"""
import sys
from pathlib import Path
from statistics import median

import torch
import torchvision
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: E402
from augmentations import CIFAR_MEAN, CIFAR_STD, SimCLRAugmentation  # noqa: E402
from benchmarks.measure import alternate, machine  # noqa: E402


def torchvision_on_pil(images):
    """The same augmentation image by image: uint8 [B, 3, H, W] -> a function that makes two views of each."""
    augment = transforms.Compose([
        transforms.RandomResizedCrop(images.shape[-1], scale=(0.2, 1.0)),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(0.2),
        transforms.ToTensor(),
        transforms.Normalize(CIFAR_MEAN, CIFAR_STD),
    ])
    pil_images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    return lambda: [torch.stack([augment(image) for image in pil_images]) for _ in range(2)]


def main(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--batch_size", type=utils.positive_int, default=256, help="images per batch; each gives two views")
    add("--repeats", type=utils.positive_int, default=10, help="timed batches of each implementation")
    add("--device", default="cpu", help="device of ours, cpu or cuda")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    # 28 MB, freed at once: glibc then keeps freed memory instead of returning it, as in a training process.
    torch.zeros(7_000_000)
    images = torch.randint(0, 256, (args.batch_size, 3, 32, 32), dtype=torch.uint8)
    augment, generator = SimCLRAugmentation(size=32), torch.Generator().manual_seed(0)
    on_device = images.to(args.device)
    candidates = {"ours": lambda: augment(on_device, generator),
                  "torchvision on PIL": torchvision_on_pil(images)}
    times = {name: wall for name, (wall, _) in alternate(candidates, args.repeats, warmup=2).items()}
    print(f"{machine()}, torchvision {torchvision.__version__}; {args.device}, batch {args.batch_size}")
    views = 2 * args.batch_size
    for name, elapsed in times.items():
        print(f"{name:>20}: {views / median(elapsed):8.0f} views/s "
              f"(slowest {views / max(elapsed):.0f}, fastest {views / min(elapsed):.0f})")
    print(f"{'ratio of medians':>20}: {median(times['torchvision on PIL']) / median(times['ours']):8.1f}")


if __name__ == "__main__":
    utils.run_script(main)
