"""k-NN accuracy on CIFAR-10 against the clock, on a CPU, from random weights and without labels.

    python cifar/speedrun.py                                            # CIFAR-10, downloaded if missing
    python cifar/speedrun.py --dataset folder --data_path DIR           # class folders train/ and test/

80.4 % (69.6 % without whitening), all included: seeds 0 and 1 reached 80.4 in 68 minutes of one core each (63
of CPU time), seed 2 80.3 in 48 minutes of two. Intel Xeon with AMX, bf16, torch 2.14.1. Trials:
results/speedrun.md.

Accuracy is that of the 10,000 test images by their 200 nearest of all 50,000 training images (T = 0.07).

1. A frozen first layer, the whitening transform of 3 x 3 patches, spares the network the learning of filters
   and the backward pass through its largest images.
2. A ResNet shaped for CPUs: the first layer halves the resolution, wide layers work on few pixels, and images
   of three or four pixels a side lie side by side in a convolution.
3. The loss is AUC-CL with a fourth moment (preset `quartic`), optimised by Muon, one warm-up and one cosine;
   the first three fifths of the steps on views of 24 instead of 32 pixels a side.
4. Features are the pooled outputs of all three stages, of an image and its mirror image, whitened by the
   statistics of the training images (no labels): otherwise a few large components decide which images are
   neighbours.
"""
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: E402

VIEWS, BATCH = 2, 256           # views of an image, images per step
LR, LR_NORMS, LR_WEIGHTS = 8e-3, 4e-3, 1e-3     # of matrices (Muon), of norms and of a, b, alpha
WARM_UP = 0.1                   # share of the steps
SMALL, SHARE_SMALL = 24, 0.6    # pixels a side of the views, in the first share of the steps
WIDTHS = 96, 192, 512           # of the stages, at 16, 8 and 4 pixels a side of 32
PROJECTOR = 2048, 256
K, TEMPERATURE = 200, 0.07


def parse_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--dataset", default="cifar10", choices=("cifar10", "folder"), help="folder: class folders")
    add("--data_path", type=utils.path, default=Path(__file__).resolve().parent / "datasets",
        help="root of CIFAR-10, or the folder with train/ and test/")
    add("--epochs", type=utils.positive_float, default=18.0, help="passes over the training images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--seed", type=utils.non_negative_int, default=0, help="seed of weights, order and views")
    add("--output", type=utils.path, help="file that the result is added to, as a line of JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    utils.check_flags(parse_args)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from timm.optim import Muon  # noqa: E402
from torch import nn  # noqa: E402

from auccl_loss import AUCCLLoss  # noqa: E402
from augmentations import CIFAR_MEAN, CIFAR_STD, SimCLRAugmentation, normalize  # noqa: E402
from cifar.data import load_data  # noqa: E402
from eval_knn import knn_accuracy  # noqa: E402
from vision_transformer import SideBySideConv2d, mlp_head  # noqa: E402


# ---------------------------------------------------------------------------------------------------- network

def whitening_layer(images, side=3, stride=2, epsilon=1e-2):
    """A frozen convolution to the whitened principal components of side x side patches, each also negated, so
    that a ReLU keeps both signs. images: uint8 [N, 3, H, W]. Returns the layer and its number of channels."""
    patches = F.unfold(normalize(images, CIFAR_MEAN, CIFAR_STD), side).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh((patches.T @ patches / len(patches)).double())
    filters = (vectors / (values + epsilon).sqrt()).T.float().view(-1, 3, side, side)
    layer = nn.Conv2d(3, 2 * len(filters), side, stride, side // 2, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.cat([filters, -filters]))
    return layer, 2 * len(filters)


class Block(nn.Module):
    """ResNet's basic block: [B, in, H, W] -> [B, out, H / stride, W / stride]."""

    def __init__(self, width_in, width, stride):
        super().__init__()
        self.residual = nn.Sequential(
            SideBySideConv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            SideBySideConv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.shortcut = nn.Identity() if width_in == width else nn.Sequential(
            nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        return F.relu(self.residual(x) + self.shortcut(x), inplace=True)


class Backbone(nn.Module):
    """[B, 3, S, S] -> the means over pixels of every stage's output: a list of [B, width]."""

    def __init__(self, images):
        super().__init__()
        first, channels = whitening_layer(images)
        self.stem = nn.Sequential(first, nn.ReLU(inplace=True), nn.Conv2d(channels, WIDTHS[0], 1, bias=False),
                                  nn.BatchNorm2d(WIDTHS[0]), nn.ReLU(inplace=True))
        self.stages = nn.ModuleList(Block(before, width, 1 if before == width else 2)
                                    for before, width in zip((WIDTHS[0], *WIDTHS), WIDTHS))

    def forward(self, x):
        x, features = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            features.append(x.mean((2, 3)))
        return features


# --------------------------------------------------------------------------------------------------- training

def build_optimizer(network, criterion):
    """Muon (Jordan et al., 2024) for what is a matrix, AdamW for the rest."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [{"params": [parameter for parameter in parameters if parameter.ndim > 1], "lr": LR},
              {"params": [parameter for parameter in parameters if parameter.ndim == 1], "lr": LR_NORMS,
               "use_fallback": True}]
    groups += [group | {"use_fallback": True} for group in criterion.param_groups(LR_WEIGHTS)]
    optimizer = Muon(groups, nesterov=True)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


def train(backbone, images, args, device, amp_dtype):
    """Trains the backbone, with a projector that is then thrown away. images: uint8 [N, 3, 32, 32]."""
    projector = mlp_head(WIDTHS[-1], PROJECTOR)
    network = nn.ModuleList([backbone, projector]).train()
    network.to(device, memory_format=utils.memory_format(network, device, amp_dtype))
    criterion = AUCCLLoss.preset("quartic").to(device)
    optimizer = build_optimizer(network, criterion)
    augment_small, augment = SimCLRAugmentation(SMALL), SimCLRAugmentation(images.shape[-1])
    generator = torch.Generator().manual_seed(utils.stream_seed(args.seed))
    steps, epoch, start = round(args.epochs * (len(images) // BATCH)), 0, time.monotonic()
    if steps == 0:
        raise utils.UserError(f"{args.epochs:g} epochs of {len(images)} images are no step of {BATCH}; "
                              "raise --epochs, or add images")
    batches = iter(())
    for step in range(steps):
        if (rows := next(batches, None)) is None:
            batches = utils.epoch_batches(len(images), BATCH, args.seed, epoch)
            rows, epoch = next(batches), epoch + 1
        for group in optimizer.param_groups:
            group["lr"] = utils.cosine_schedule(step, steps, group["peak"], 0.0, round(WARM_UP * steps))
        batch, small = utils.send(images[rows], device), step < SHARE_SMALL * steps
        views = (augment_small if small else augment)(batch, generator, VIEWS)      # V of [B, 3, S, S]
        with utils.autocast(device, amp_dtype):
            embeddings = projector(backbone(torch.cat(views))[-1])                # [V B, D]
        loss = criterion(*embeddings.float().chunk(VIEWS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99 or step == steps - 1:
            seconds = time.monotonic() - start
            print(f"step {step + 1}/{steps}: loss {loss.item():.4f}, {seconds:.0f} s, "
                  f"{(step + 1) * BATCH * VIEWS / seconds:.0f} views/s", flush=True)
            if not math.isfinite(loss.item()):
                raise utils.UserError(f"the loss is not finite at step {step + 1}; try another --seed")


# ------------------------------------------------------------------------------------------------- evaluation

@torch.inference_mode()
def extract(backbone, images, device, amp_dtype):
    """Every stage's unit features, of an image and its mirror image added: uint8 [N, 3, S, S] -> [N, F]."""
    features = []
    for batch in images.split(500):
        batch = normalize(batch.to(device), CIFAR_MEAN, CIFAR_STD)
        with utils.autocast(device, amp_dtype):
            stages = zip(backbone(batch), backbone(batch.flip(3)))  # pairs of [B, width]
        features.append(torch.cat([sum(F.normalize(x.float(), dim=1) for x in pair) for pair in stages], 1))
    return torch.cat(features)


def whiten(bank, queries):
    """Both [*, F] less the bank's mean, in its principal components, each scaled to variance 1."""
    mean = bank.mean(0)
    values, vectors = torch.linalg.eigh((bank - mean).T.cov(correction=0).cpu().double())  # MPS lacks float64
    varies = values > 1e-6 * values[-1]     # few images leave directions without variance
    transform = (vectors[:, varies] / values[varies].sqrt()).float().to(bank.device)
    return (bank - mean) @ transform, (queries - mean) @ transform


def main(argv=None):
    args, start = parse_args(argv), time.monotonic()
    device = utils.select_device(args.device)
    amp_dtype = utils.select_amp("auto", device)
    utils.set_backends(device, deterministic=False)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    data = load_data(args.dataset, args.data_path, None)
    backbone = Backbone(data.train[:2000])
    train(backbone, data.train, args, device, amp_dtype)
    backbone.eval()
    bank, queries = (extract(backbone, images, device, amp_dtype) for images in (data.bank, data.test))
    accuracy = {}
    for name, features in (("mirrored", (bank, queries)), ("whitened", whiten(bank, queries))):
        top1, _ = knn_accuracy(features[0], data.bank_labels, features[1], data.test_labels, (K,),
                               TEMPERATURE)[K]
        accuracy[name] = round(top1, 2)
    record = {"epochs": args.epochs, "seed": args.seed, **accuracy,
              "seconds": round(time.monotonic() - start), "cpu_seconds": round(time.process_time()),
              "threads": torch.get_num_threads(), "device": str(device), "torch": torch.__version__}
    print(f"k-NN accuracy {accuracy['whitened']:.2f} % (not whitened: {accuracy['mirrored']:.2f} %) after "
          f"{record['seconds']} s, {record['cpu_seconds']} s of CPU time", flush=True)
    if args.output:
        with open(args.output, "a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    utils.run_script(main)
