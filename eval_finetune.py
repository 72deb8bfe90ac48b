"""Fine-tunes a pretrained backbone under a new classifier on labelled images, on any number of processes.

    python eval_finetune.py --pretrained_weights run/checkpoint.pth --data_path IMAGENET
    torchrun --nproc_per_node=8 eval_finetune.py ...
    python eval_finetune.py ... --fraction 0.1                 # 10 % of the labels; --shots 5: 5 a class
    python eval_finetune.py ... --dataset cifar10 --crop_scale 0.5 1 --erasing 0              # small images
    python eval_finetune.py ... --random_weights --arch vit_small --layer_decay 1             # the baseline

The usual recipe for ViTs, DeiT's augmentation and BEiT's layer-wise decay, from timm's parts. Nothing is
chosen on test images: the last epoch counts. The same command again resumes. Written to --output_dir:
checkpoint.pth.tar and log.txt (a JSON record per epoch); at the end classifier.safetensors, weights that
timm.create_model(NAME, num_classes=C, checkpoint_path=...) and the other scripts here read.
"""
import functools
import math
import time
from contextlib import closing, nullcontext
from pathlib import Path

import utils
from utils import UserError, non_negative_float, positive_float, positive_int, probability

FREE_ON_RESUME = ("output_dir", "data_path", "device", "dist_url", "download", "local_rank", "num_workers",
                  "pretrained_weights", "batch_size_per_gpu")  # a checksum and the total batch count
CHECKPOINT = "checkpoint.pth.tar"  # as eval_linear.py


def parse_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    utils.add_evaluation_flags(parser)
    add = parser.add_argument
    add("--output_dir", type=utils.path, default=Path("finetune"),
        help="folder of the results and the checkpoint, below the current folder")
    add("--epochs", type=positive_int, default=100, help="passes over the training images")
    add("--lr", type=positive_float, default=5e-4,
        help="peak learning rate of the classifier per 256 images, scaled linearly")
    add("--min_lr", type=non_negative_float, default=1e-6, help="learning rate at the end of the cosine")
    add("--warmup_epochs", type=non_negative_float, default=5.0, help="linear warm-up epochs")
    add("--weight_decay", type=non_negative_float, default=0.05, help="weight decay, not of biases and norms")
    add("--layer_decay", type=utils.number(float, 1e-3, 1), default=0.75,
        help="learning rate of a layer relative to that of the layer above it")
    add("--drop_path", type=probability, help="stochastic depth of a vit_* (default: 0.1)")
    add("--mixup", type=non_negative_float, default=0.8, help="alpha of mixup; 0: none")
    add("--cutmix", type=non_negative_float, default=1.0, help="alpha of CutMix; 0: none")
    add("--smoothing", type=probability, default=0.1, help="label smoothing")
    add("--rand_augment", default="rand-m9-mstd0.5-inc1", help="RandAugment by timm's name, or none")
    add("--crop_scale", type=float, nargs=2, metavar=("MIN", "MAX"), default=[0.08, 1.0],
        help="share of the image's area in a crop")
    add("--erasing", type=probability, default=0.25, help="probability of random erasing")
    add("--clip_grad", type=non_negative_float, default=0.0, help="limit of the gradient's norm; 0: none")
    add("--ema", type=probability, help="decay of an EMA of the weights, then tested and exported instead")
    add("--num_labels", type=positive_int, help="number of classes (default: the data set's)")
    add("--val_freq", type=positive_int, default=1, help="epochs between evaluations")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--shots", type=positive_int, help="training images of each class (default: all)")
    add("--fraction", type=utils.number(float, 1e-9, 1),
        help="share of each class's training images, such as 0.01 (default: all)")
    args = parser.parse_args(argv)
    utils.check_range(args, "crop_scale", 1)
    if args.batch_size_per_gpu % 2:
        raise UserError("--batch_size_per_gpu must be even, for mixup blends the images of a batch in pairs")
    return args


if __name__ == "__main__":
    utils.check_flags(parse_args)

import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from timm.data import Mixup, create_transform  # noqa: E402
from timm.data.auto_augment import RandAugment  # noqa: E402
from timm.layers import convert_sync_batchnorm  # noqa: E402
from timm.optim import param_groups_layer_decay  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import data  # noqa: E402
import distributed  # noqa: E402
import pretrained  # noqa: E402
from augmentations import keep_one_bit  # noqa: E402
from vision_transformer import ResNet, VisionTransformer  # noqa: E402


# ------------------------------------------------------------------------------------------------------ build

def augmentation(description: pretrained.Description, args):
    """timm's, of training images: PIL image -> [3, S, S]."""
    try:
        transform = create_transform(
            description.image_size, is_training=True, scale=args.crop_scale, color_jitter=None,
            auto_augment=None if args.rand_augment == "none" else args.rand_augment,
            interpolation="bicubic", re_prob=args.erasing, re_mode="pixel", mean=description.mean,
            std=description.std)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"timm knows no --rand_augment {args.rand_augment}; one is rand-m9-mstd0.5-inc1, or "
                        "none") from error
    for step in transform.transforms:
        if isinstance(step, RandAugment):
            keep_one_bit(step)
    return transform


def add_classifier(backbone: torch.nn.Module, num_labels: int) -> None:
    """Makes features [B, F] logits [B, C], in place. Keys are those of timm and torchvision."""
    if isinstance(backbone, ResNet):
        backbone.fc = torch.nn.Linear(backbone.embed_dim, num_labels)
        backbone.group_matcher = functools.partial(timm.models.ResNet.group_matcher, backbone)
    else:
        backbone.reset_classifier(num_labels)


def build_optimizer(model: torch.nn.Module, lr: float, weight_decay: float, layer_decay: float):
    """AdamW. `lr_scale`: a layer's learning rate as a multiple of the classifier's."""
    undecayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_layer_decay(model, weight_decay, undecayed, layer_decay=layer_decay)
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr, weight_decay=0.0, fused=fused)


class Run:
    """A training run, built from the flags: data, network, optimiser, and how far it has come."""

    def __init__(self, args, device: torch.device):
        self.args, self.device = args, device
        self.amp_dtype = utils.select_amp(args.amp, device)
        drop_path_rate = 0.1 if args.drop_path is None else args.drop_path
        model, description = pretrained.load_from_flags(args, drop_path_rate)
        if not isinstance(model, VisionTransformer):
            utils.refuse(args, ("drop_path",), "with a backbone that is no vit_*")
        train, test = data.build_splits(args.dataset, args.data_path, download=args.download)
        test.transform = data.eval_transform(description.image_size, description.mean, description.std)
        self.num_labels = data.count_labels(args.num_labels, train, test)
        rows = data.choose_subset(torch.tensor(train.targets), args.shots, args.fraction, args.seed).tolist()
        self.train, self.test = data.SeededViews(train.subset(rows), augmentation(description, args)), test
        self.fingerprint = [pretrained.checksum(model), len(rows), train.checksum(), test.checksum()]
        self.images_per_step = args.batch_size_per_gpu * distributed.world_size()
        self.peak_lr = args.lr * self.images_per_step / 256
        self.steps = utils.steps_per_epoch(len(rows), self.images_per_step, "--batch_size_per_gpu")
        self.mixup = Mixup(args.mixup, args.cutmix, prob=float(args.mixup + args.cutmix > 0),
                           label_smoothing=args.smoothing, num_classes=self.num_labels)

        add_classifier(model, self.num_labels)
        model.requires_grad_(True)
        model.to(device, memory_format=utils.memory_format(model, device, self.amp_dtype))
        self.model = self.network = model
        if distributed.world_size() > 1:
            if device.type == "cuda":  # torch has no SyncBatchNorm for CPUs
                convert_sync_batchnorm(model)  # timm's, as in main.py
            self.network = DistributedDataParallel(model)
            self.network.broadcast_buffers = False  # as an argument torch 2.14 deprecates it
        self.optimizer = build_optimizer(model, self.peak_lr, args.weight_decay, args.layer_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        self.parts = {"model": model, "optimizer": self.optimizer, "scaler": self.scaler}
        self.ema = args.ema and ModelEmaV3(model, args.ema, use_warmup=True)
        if self.ema:
            self.parts["ema"] = self.ema.module
        self.description = description
        self.epoch = self.step = 0  # the next to run; step counts within the epoch
        self.loss_sum = 0.0         # over the epoch's steps
        self.flags = {**utils.plain(args), "batch_size": self.images_per_step}

    def state_dict(self) -> dict:
        """The checkpoint. UserError if a weight is not finite: nothing of it must be saved."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise UserError(utils.diverged("a weight", self.epoch, self.step))
        return {name: part.state_dict() for name, part in self.parts.items()} | {
            "backbone": self.description._asdict(), "epoch": self.epoch, "step": self.step,
            "loss_sum": self.loss_sum, "fingerprint": self.fingerprint, "args": self.flags}

    def load_state_dict(self, state: dict, path: Path) -> None:
        """Resumes from `state`, the checkpoint at `path`. UserError for another backbone or other images."""
        if state["fingerprint"] != self.fingerprint:
            raise UserError(f"{path} had another backbone or other images; choose another --output_dir")
        utils.load_parts(state, self.parts, path)
        for name in ("epoch", "step", "loss_sum"):
            setattr(self, name, state[name])


def make_loader(run: Run):
    """This rank's part of the batches left of the epoch. Mixup blends row i of a batch with row -1 - i; a
    rank takes both, so that any number of ranks blends the same images."""
    args, size = run.args, run.images_per_step
    upper = distributed.share(range(size // 2))
    own = [*upper, *(size - 1 - row for row in reversed(upper))]
    batches = utils.epoch_batches(len(run.train), size, args.seed, run.epoch, run.step)
    return data.seeded_loader(run.train, (batch[own] for batch in batches), (args.seed, run.epoch),
                              run.device, args.num_workers)


# --------------------------------------------------------------------------------------------------- training

def train_one_epoch(run: Run, save, interruption: utils.Interruption) -> None:
    """One pass over the data, from run.step on. A signal to any rank ends all of them, after `save()`."""
    args, device, rank, world = run.args, run.device, distributed.rank(), distributed.world_size()
    total, warmup = args.epochs * run.steps, round(args.warmup_epochs * run.steps)
    title = f"epoch {run.epoch + 1}/{args.epochs}"
    run.network.train()
    batches = utils.progress(make_loader(run), run.step, run.steps, title, quiet=rank > 0)
    for step, (images, labels) in enumerate(batches, run.step):
        at = run.epoch * run.steps + step
        lr = utils.cosine_schedule(at, total, run.peak_lr, args.min_lr, warmup)
        for group in run.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        utils.seed_all(utils.stream_seed(args.seed, run.epoch, step, 0))   # of mixup, equal on all ranks
        images, targets = run.mixup(images.to(device), labels.to(device))  # [B, 3, S, S], [B, C]
        torch.manual_seed(utils.stream_seed(args.seed, run.epoch, step, 1, rank))  # of stochastic depth
        with utils.autocast(device, run.amp_dtype):
            loss = F.cross_entropy(run.network(images), targets)
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        loss, interrupted = distributed.sum_of_floats(loss.item() / world, interruption.signal is not None)
        if not math.isfinite(loss):
            raise UserError(utils.diverged("the loss", run.epoch, step))
        run.scaler.unscale_(run.optimizer)
        if args.clip_grad:
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.clip_grad)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        distributed.average_buffers(run.model)
        if run.ema:
            run.ema.update(run.model, at + 1)
        run.step, run.loss_sum = step + 1, run.loss_sum + loss
        if interrupted:
            save()
            distributed.leave()
            interruption.exit(run)


def evaluate(run: Run) -> dict:
    """Loss and accuracies on the test images, of the EMA if there is one."""
    network = (run.ema.module if run.ema else run.model).eval()
    logits, labels = pretrained.extract_features(network, run.test, run.device, run.args.batch_size_per_gpu,
                                                 run.args.num_workers, run.amp_dtype, "test")
    scores = score(logits.cpu(), labels.cpu())  # MPS lacks float64
    return {f"test_{name}": value for name, value in scores.items()}


def score(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Of logits [N, C] and labels [N]: the loss and, in percent, acc1, acc5 (top-C if C < 5) and class_acc1,
    the mean over classes of acc1."""
    classes = logits.shape[1]
    hits = logits.topk(min(5, classes)).indices == labels[:, None]  # [N, 5]
    counts, right = (rows.bincount(minlength=classes) for rows in (labels, labels[hits[:, 0]]))
    means = hits[:, 0].double().mean(), hits.any(1).double().mean(), (right / counts)[counts > 0].mean()
    return {"loss": F.cross_entropy(logits, labels).item(),
            **{name: 100 * mean.item() for name, mean in zip(("acc1", "acc5", "class_acc1"), means)}}


# ------------------------------------------------------------------------------------------------------- main

def train(args, device: torch.device) -> None:
    """Trains to the end, or resumes. The first rank writes the files."""
    started, first = time.monotonic(), distributed.rank() == 0
    run, path = Run(args, device), args.output_dir / CHECKPOINT
    state = utils.read_resume(args, path, FREE_ON_RESUME, run.flags)
    if state:
        run.load_state_dict(state, path)
    distributed.check_same_over_ranks(run.epoch, run.step, *run.fingerprint)
    log = utils.RunLog(args.output_dir, (run.epoch, run.step), run.steps) if first else None

    def save():
        saved = run.state_dict()
        if first:
            utils.save_checkpoint(saved, path)

    if first and run.epoch < args.epochs:
        utils.announce(run, f"{len(run.train)} images to train on, {len(run.test)} to test on; classes: "
                       f"{run.num_labels}; {run.description.arch} with {utils.millions(run.model)} M "
                       "parameters", distributed.world_size())
    with closing(utils.Interruption()) as interruption:
        if state is None:
            save()  # read_resume refuses a log without a checkpoint
        while run.epoch < args.epochs:
            train_one_epoch(run, save, interruption)
            record = {"epoch": run.epoch, "train_loss": run.loss_sum / run.steps,
                      "train_lr": max(group["lr"] for group in run.optimizer.param_groups)}
            if run.epoch % args.val_freq == 0 or run.epoch + 1 == args.epochs:
                save()  # a signal or a fault during the evaluation loses no step
                record |= evaluate(run)
            record["seconds"], started = time.monotonic() - started, time.monotonic()
            if log:
                log.write(record)
            run.epoch, run.step, run.loss_sum = run.epoch + 1, 0, 0.0
            save()
    if first and log.records:
        exported = args.output_dir / "classifier.safetensors"
        pretrained.export_backbone(run.ema.module if run.ema else run.model, run.description, exported)
        print(f"weights: {exported}", flush=True)


def main(argv=None):
    args = parse_args(argv)
    device = distributed.init_distributed(args.device, args.dist_url)
    utils.set_backends(device, deterministic=True)
    utils.settle_amp(args, device)
    with closing(utils.lock_folder(args.output_dir)) if distributed.rank() == 0 else nullcontext():
        train(args, device)
    distributed.leave()


if __name__ == "__main__":
    utils.run_script(main)
