"""Images per second of a training step of cifar/main.py against the plain way: float32, contiguous layout, PIL image by image.

    python benchmarks/training_step.py                                   # ResNet-18 and ResNet-50, batch 128; minutes
    python benchmarks/training_step.py --arch small --batch_size 256 --runs 10

Ours is the step as main.py takes it: batched augmentation, autocast where the hardware has bf16, channels_last, AUC-CL, AdamW. The
plain step differs in nothing but those three; its images are augmented within the step, since a loader's workers would take their
time from the same cores. Steps alternate, medians count. The operations of a step's forward and backward passes are counted by
torch and held against the rate of a large bf16 matrix product on the same machine.
"""
import argparse
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from auccl_loss import AUCCLLoss  # noqa: E402
from augmentations import SimCLRAugmentation  # noqa: E402
from benchmarks.augmentation import torchvision_on_pil  # noqa: E402
from benchmarks.measure import alternate, machine, matrix_rate, median_wall  # noqa: E402
from cifar.model import ARCHS, ContrastiveNet  # noqa: E402
from utils import select_amp  # noqa: E402

PROJECTOR = (2048, 1024)


def make_step(make_views, arch, amp_dtype, layout):
    """A call without arguments: one training step on the two batches of views that `make_views()` returns."""
    torch.manual_seed(0)
    model = ContrastiveNet(arch, PROJECTOR).to(memory_format=layout)
    criterion = AUCCLLoss()
    groups = [{"params": model.parameters()}, *criterion.param_groups(1e-3, adaptive=True)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)

    def step():
        views = torch.cat(make_views()).contiguous(memory_format=layout)
        optimizer.zero_grad()
        with torch.autocast("cpu", amp_dtype, enabled=amp_dtype is not None):
            loss = criterion(*model(views).chunk(2))
        loss.backward()
        optimizer.step()
    return step


def count_operations(arch, views):
    """Floating-point operations of one forward and backward pass, a multiply-add counting two."""
    with torch.device("meta"):
        model = ContrastiveNet(arch, PROJECTOR)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(views, 3, 32, 32)).sum().backward()
    return counter.get_total_flops()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=["resnet18", "resnet50"])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3, help="timed steps of each, after one that warms up")
    args = parser.parse_args()
    amp_dtype = select_amp("auto", torch.device("cpu"))
    print(f"{machine()}; batch {args.batch_size}, medians of {args.runs} steps, autocast {amp_dtype}")
    images = torch.randint(0, 256, (args.batch_size, 3, 32, 32), dtype=torch.uint8)
    for arch in args.arch:
        generator, augment = torch.Generator().manual_seed(0), SimCLRAugmentation()
        times = median_wall(alternate({
            "ours": make_step(lambda: augment(images, generator), arch, amp_dtype, torch.channels_last),
            "plain": make_step(torchvision_on_pil(images), arch, None, torch.contiguous_format)}, args.runs))
        rate = matrix_rate(torch.bfloat16)
        operations = count_operations(arch, 2 * args.batch_size)
        reached = operations / times["ours"] / 1e9
        print(f"{arch}: ours {args.batch_size / times['ours']:.1f} images/s, plain {args.batch_size / times['plain']:.1f}, ratio "
              f"{times['plain'] / times['ours']:.2f}; {operations / 1e9:.0f} GFLOP a step, {reached:.0f} GFLOP/s = "
              f"{100 * reached / rate:.0f}% of the {rate:.0f} GFLOP/s of a bf16 matrix product", flush=True)


if __name__ == "__main__":
    main()
