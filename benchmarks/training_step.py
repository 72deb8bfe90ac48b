"""Images per second of a training step of cifar/main.py against the plain way: float32, PIL, contiguous.

    python benchmarks/training_step.py                                   # ResNet-18, a minute
    python benchmarks/training_step.py --arch small resnet50 --batch_size 256
    python benchmarks/training_step.py --device cuda --runs 20

Ours is main.py's own step, bf16 where the hardware has it. The plain step augments with torchvision on PIL
images, within the step, since loader workers would take their time from the same cores. The floor is our
step's convolutions and matrix products alone. Steps alternate, medians count. Operations are counted by
torch, a multiply-add as two, and held against the rate of a large matrix product in our step's precision.
"""
import contextlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: E402
from benchmarks.augmentation import torchvision_on_pil  # noqa: E402
from benchmarks.measure import (RecordProducts, alternate, compare_step, extra_memory,  # noqa: E402
                                machine, median_wall, time_shares)
from cifar import main as cifar  # noqa: E402
from cifar.data import ImageData  # noqa: E402


def make_steps(arch, batch_size, device):
    """Two calls without arguments, our training step and the plain one; and the dtype of ours."""
    images, labels = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8), torch.zeros(batch_size)
    data, flags = ImageData(images, images, labels, images, labels), ["--arch", arch, "--device", device]
    ours, plain = (cifar.Run(cifar.parse_args([*flags, "--batch_size", str(batch_size), "--amp", amp]), data)
                   for amp in ("auto", "none"))
    plain.model.to(memory_format=torch.contiguous_format)
    make_views = torchvision_on_pil(images)

    def our_step():
        ours.step = 0  # of an epoch of one step
        with contextlib.redirect_stderr(io.StringIO()):  # no progress bar
            cifar.train_one_epoch(ours, save=None, interruption=SimpleNamespace(signal=None))

    def plain_step():
        plain.optimizer.zero_grad()
        plain.criterion(*plain.model([view.to(plain.device) for view in make_views()])).backward()
        plain.optimizer.step()
    return our_step, plain_step, ours.amp_dtype or torch.float32


def main(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--arch", nargs="+", default=["resnet18"], help="networks of cifar/main.py")
    add("--batch_size", type=utils.number(int, 2, 10**6), default=128, help="images per step")
    add("--runs", type=utils.positive_int, default=3, help="timed steps of each, after two that warm up")
    add("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    print(f"{machine()}; {args.device}, batch {args.batch_size}, medians of {args.runs} steps", flush=True)
    for arch in args.arch:
        ours, plain, dtype = make_steps(arch, args.batch_size, args.device)
        ours()
        with FlopCounterMode(display=False) as counter, RecordProducts() as floor:
            ours()
        calls = {"ours": ours, "plain": plain, "floor": floor}
        times = median_wall(alternate(calls, args.runs, warmup=2))
        compared = compare_step(times, args.batch_size, counter.get_total_flops(), dtype, args.device)
        print(f"{arch}: {compared}", flush=True)
        del calls, floor
        if args.device == "cpu":
            print(f"{arch}: {time_shares(ours)}", flush=True)
        else:
            print(f"{arch}: a step adds {extra_memory(lambda: ours, device=args.device):.0f} MB", flush=True)


if __name__ == "__main__":
    utils.run_script(main)
