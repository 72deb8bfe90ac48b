"""Pretrains a ViT or ResNet with AUC-CL on multi-crop views, with an EMA teacher, on any number of processes.

    python -m torch.distributed.launch --nproc_per_node=8 main.py --arch vit_small --data_path DIR --output_dir OUT
    torchrun --nproc_per_node=8 main.py --arch resnet50 --data_path DIR --output_dir OUT    # or srun, or plain python
    python main.py --teacher none --data_path DIR --output_dir OUT    # the paper's Algorithm 1: one network, two views
    python main.py --preset released-imagenet ...                     # what the authors' released code optimises

DIR holds images, in class folders or not. The same command again resumes. Written to OUT: checkpoint.pth, log.txt
(JSON records, the same as on the screen and in TensorBoard) and, at the end, curves.png and backbone.safetensors.
"""
import contextlib
import hashlib
import math
import os
import time
from contextlib import nullcontext

import utils

# Defaults by preset; the reasons for `paper`'s values stand in results/README.md.
RECIPES = {
    "paper": dict(out_dim=1024, learn=("a", "b", "alpha"), weights_lr=1e-3, rand_augment="none", erasing=0.0),
    "released-imagenet": dict(out_dim=65536, learn=(), weights_lr=None, rand_augment="rand-n2-m10-mstd0.5", erasing=0.2),
}
FREE_ON_RESUME = ("output_dir", "data_path", "device", "dist_url", "local_rank", "num_workers", "print_freq",
                  "save_every", "saveckp_freq", "knn_every", "knn_data_path", "skip_bad_images", "download",
                  "batch_size_per_gpu")  # the batch of all ranks must stay, see check_batch


def parse_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    recipe = lambda text, name: utils.by_preset(text, RECIPES, name)  # noqa: E731
    span = dict(type=float, nargs=2, metavar=("MIN", "MAX"))
    add = parser.add_argument_group("network").add_argument
    add("--arch", default="vit_small", help="vit_tiny, vit_small, vit_base, a ResNet of torchvision, or timm/NAME")
    add("--patch_size", type=utils.positive_int, default=16, help="pixels a side of a ViT's patches")
    add("--drop_path_rate", type=utils.number(float, 0, 0.99), default=0.1, help="stochastic depth of a ViT student")
    add("--out_dim", type=utils.positive_int, help=recipe("width of the head's output", "out_dim"))
    add("--norm_last_layer", type=utils.boolean, default=True, help="unit row norms of the head's last layer, held fixed")
    add("--use_bn_in_head", type=utils.boolean, default=False, help="batch norm in the head")
    add("--teacher", choices=("ema", "none"), default="ema", help="EMA of the student, or none: both views in one network")
    add("--momentum_teacher", type=utils.probability, default=0.996, help="EMA momentum, raised to 1 by a cosine")

    group = parser.add_argument_group("objective")
    utils.add_objective_flags(group, RECIPES)
    add = group.add_argument
    add("--warmup_teacher_temp", type=utils.positive_float, default=0.04, help="released-imagenet: first teacher temperature")
    add("--teacher_temp", type=utils.positive_float, default=0.07, help="released-imagenet: final teacher temperature")
    add("--warmup_teacher_temp_epochs", type=utils.non_negative_int, default=30,
        help="released-imagenet: epochs from the first to the final temperature")

    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", choices=("adamw", "sgd", "lars"), default="adamw", help="optimiser; sgd and lars with momentum 0.9")
    add("--lr", type=utils.positive_float, default=5e-4, help="peak learning rate for a batch of 256, scaled linearly")
    add("--min_lr", type=utils.non_negative_float, default=1e-6, help="learning rate at the end of the cosine")
    add("--warmup_epochs", type=utils.non_negative_float, default=10.0, help="linear warm-up epochs")
    add("--weight_decay", type=utils.non_negative_float, default=0.04, help="weight decay at the start; none on biases, "
        "norms, a, b and alpha")
    add("--weight_decay_end", type=utils.non_negative_float, default=0.4, help="weight decay at the end of its cosine")
    add("--clip_grad", type=utils.non_negative_float, default=3.0, help="largest gradient norm of each parameter; 0: none")
    add("--freeze_last_layer", type=utils.non_negative_int, default=1, help="epochs with the head's last layer frozen")
    add("--batch_size_per_gpu", type=utils.positive_int, default=64, help="images per batch of each process")
    add("--accum_iter", type=utils.positive_int, default=1, help="gradient accumulation steps; negatives come from one "
        "micro-batch, so it equals a larger batch in expectation, not in bits")
    add("--epochs", type=utils.positive_int, default=100, help="passes over the data")
    add("--amp", choices=("auto", "bf16", "fp16", "none"), help="autocast (default: auto, bf16 where the hardware has it)")
    add("--use_fp16", type=utils.boolean, help="alias: true for --amp fp16, false for --amp none")
    add("--grad_checkpointing", action="store_true", help="activation checkpointing: less memory, more time")
    add("--compile", action="store_true", help="compile the student: minutes at the start, then faster steps")
    add("--seed", type=utils.non_negative_int, default=0, help="seed of weights, order, augmentation and stochastic depth")

    add = parser.add_argument_group("views").add_argument
    add("--global_crops_size", type=utils.positive_int, default=224, help="pixels a side of the two global views")
    add("--global_crops_scale", **span, default=[0.4, 1.0], help="area of a global view, as a share of the image")
    add("--local_crops_number", type=utils.non_negative_int, default=8, help="local views, seen by the student")
    add("--local_crops_size", type=utils.positive_int, default=96, help="pixels a side of a local view")
    add("--local_crops_scale", **span, default=[0.05, 0.4], help="area of a local view, as a share of the image")
    add("--blur_sigma", **span, default=[0.1, 2.0], help="standard deviation of the blur, in pixels")
    add("--rand_augment", help=recipe("RandAugment of the global views, in timm's notation, or none", "rand_augment"))
    add("--erasing", type=utils.probability, help=recipe("probability of erasing a box of the first global view", "erasing"))

    add = parser.add_argument_group("data and output").add_argument
    add("--data_path", type=utils.path, required=True, help="folder of training images, or the root of --dataset")
    add("--dataset", help="data set instead of a folder: cifar10, stl10, ... or hfds/NAME of the Hugging Face hub")
    add("--download", action="store_true", help="fetch --dataset if it is not in --data_path")
    add("--skip_bad_images", action="store_true", help="replace images that cannot be decoded by the next one, and count them")
    add("--num_workers", type=utils.non_negative_int, default=utils.default_workers(), help="loader workers per process")
    add("--output_dir", type=utils.path, default=utils.Path("."), help="output folder")
    add("--saveckp_freq", type=utils.non_negative_int, default=20, help="epochs between checkpoints that are kept; 0: none")
    add("--save_every", type=utils.positive_int, help="steps between checkpoints inside an epoch (default: at its end only)")
    add("--print_freq", type=utils.positive_int, default=10, help="steps between records")
    add("--knn_every", type=utils.positive_int, help="epochs between k-NN evaluations on --knn_data_path")
    add("--knn_data_path", type=utils.path, help="labelled images: folder with train/ and val/ (or test/)")
    utils.add_process_flags(parser)
    return complete_args(parser.parse_args(argv))


def complete_args(args):
    """Fills in what other flags decide. UserError for flags that contradict each other."""
    utils.complete_objective_flags(args, RECIPES)
    if args.preset == "released-imagenet" and args.teacher == "none":
        raise utils.UserError("--preset released-imagenet needs a teacher; leave --teacher none out")
    if args.use_fp16 is not None:
        utils.refuse(args, ("amp",), "with --use_fp16")
        args.amp, args.use_fp16 = "fp16" if args.use_fp16 else "none", None
    args.amp = args.amp or "auto"
    if args.teacher == "none":
        args.local_crops_number = 0
    args.rand_augment = None if args.rand_augment == "none" else args.rand_augment
    utils.check_range(args, "global_crops_scale", 1)
    utils.check_range(args, "local_crops_scale", 1)
    utils.check_range(args, "blur_sigma")
    if bool(args.knn_every) != bool(args.knn_data_path):
        raise utils.UserError("--knn_every and --knn_data_path need each other; give both")
    return args


if __name__ == "__main__":
    utils.check_flags(parse_args)

import torch  # noqa: E402
from timm.layers import set_fused_attn  # noqa: E402
from timm.optim import Lars  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

import distributed  # noqa: E402
from auccl_loss import AUCCLLoss  # noqa: E402
from augmentations import IMAGENET_MEAN, IMAGENET_STD, MultiCrop, MultiCropAugmentation  # noqa: E402
from cifar.curves import draw_curves  # noqa: E402
from data import build_dataset, build_splits, eval_transform, image_files, load_image  # noqa: E402
from eval_knn import knn_accuracy  # noqa: E402
from pretrained import Description, export_backbone, extract_features  # noqa: E402
from vision_transformer import (VIT_ARCHS, MultiCropNet, ProjectionHead, build_backbone,  # noqa: E402
                                convert_sync_batchnorm)

SUMS = ("steps", "train_loss", "positive", "negative", "skipped", "seconds", "waited")  # over the steps of an epoch


# ------------------------------------------------------------------------------------------------------------ build

class MultiCropImages(Dataset):
    """Training images by (index, seed): Crops, and the number of images skipped."""

    def __init__(self, args):
        self.crop = MultiCrop(args.global_crops_size, args.global_crops_scale, args.local_crops_size,
                              args.local_crops_scale, args.local_crops_number, args.rand_augment)
        self.skip_bad, self.folder = args.skip_bad_images, args.data_path
        if args.dataset:
            self.source = build_dataset(args.dataset, args.data_path, "train", download=args.download)
            names = [args.dataset]
        else:
            self.source = names = find_images(args.data_path)
        digest = hashlib.sha256(b"\n".join(map(os.fsencode, names))).hexdigest()
        self.checksum = [len(self), digest]  # a resume must see the same data

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        index, seed = key
        for skipped in range(len(self) if self.skip_bad else 1):
            try:
                item = self.source[(index + skipped) % len(self)]
                return self.crop(load_image(self.folder / item) if isinstance(item, str) else item[0], seed), skipped
            except utils.UserError as error:
                bad = str(error).partition(";")[0]
        raise utils.UserError(f"{bad}; put an image under the same name, or add --skip_bad_images if the file exists")


def find_images(folder):
    """Names of all image files below `folder`. UserError if there are none, or if it holds a test set beside them."""
    if not folder.is_dir():
        raise utils.UserError(f"no folder {folder}; --data_path must name a folder of images")
    if (folder / "train").is_dir() and any((folder / split).is_dir() for split in ("val", "test")):
        raise utils.UserError(f"{folder} holds train/ beside test images; train on --data_path {folder / 'train'}")
    return image_files(folder)


class Run:
    """A training run, built from the flags: data, networks, objective, optimiser, and how far it has come."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.amp_dtype = utils.select_amp(args.amp, device)
        torch.backends.cudnn.deterministic = True
        # torch's fused attention is the slower one on CPUs in bf16, in the backward pass of short sequences
        set_fused_attn(device.type != "cpu" or self.amp_dtype is None)
        torch.manual_seed(args.seed)  # the same weights on all ranks
        with utils.user_errors():
            self.criterion = AUCCLLoss.preset(args.preset, **utils.objective_arguments(args)).to(device)
            self.images = MultiCropImages(args)
            self.augment = MultiCropAugmentation(args.erasing, args.blur_sigma).to(device)
            self.student = build_network(args, args.drop_path_rate)
            self.teacher = build_teacher(args, self.student) if args.teacher == "ema" else None
        self.labelled = args.knn_data_path and build_splits(
            "folder", args.knn_data_path, eval_transform(args.global_crops_size, IMAGENET_MEAN, IMAGENET_STD))

        self.batch_size = args.batch_size_per_gpu * distributed.world_size()  # images that the objective sees at once
        self.steps = len(self.images) // (self.batch_size * args.accum_iter)  # per epoch
        check_batch(self)
        if args.grad_checkpointing:
            self.student.backbone.set_grad_checkpointing(True)
        for network in filter(None, (self.student, self.teacher)):
            network.to(device, memory_format=torch.channels_last)
            if distributed.world_size() > 1 and device.type == "cuda":  # torch has no SyncBatchNorm for CPUs
                convert_sync_batchnorm(network)
        self.network = torch.compile(self.student) if args.compile else self.student
        if distributed.world_size() > 1:
            self.network = DistributedDataParallel(self.network)
        self.optimizer = build_optimizer(args, self.student, self.criterion, self.batch_size * args.accum_iter)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        self.epoch = self.step = 0  # the next to run; step counts within the epoch
        self.sums, self.sums_at_last_log = dict.fromkeys(SUMS, 0.0), dict.fromkeys(SUMS, 0.0)

    def parts(self):
        teacher = {"teacher": self.teacher} if self.teacher else {}
        return {"student": self.student, **teacher, "loss": self.criterion, "optimizer": self.optimizer,
                "scaler": self.scaler}

    def describe(self):
        """What the evaluation scripts must know of the backbone."""
        patch_size = self.args.patch_size if self.args.arch in VIT_ARCHS else None
        return Description(self.args.arch, patch_size, self.args.global_crops_size, IMAGENET_MEAN, IMAGENET_STD)

    def state_dict(self):
        backbone = {name: list(value) if isinstance(value, tuple) else value
                    for name, value in self.describe()._asdict().items() if name != "checkpoint_key"}
        return {**{name: part.state_dict() for name, part in self.parts().items()}, "backbone": backbone,
                "epoch": self.epoch, "step": self.step, "sums": self.sums, "sums_at_last_log": self.sums_at_last_log,
                "batch_size": self.batch_size, "data": self.images.checksum, "args": utils.plain(self.args)}

    def load_state_dict(self, state, path):
        """Resumes from the checkpoint `state`, read from `path`. UserError if it is of another network, batch or data."""
        utils.check_same_data(state, self.images.checksum, path)
        per_rank, saved = self.args.batch_size_per_gpu, state["args"]["batch_size_per_gpu"]
        if state["batch_size"] != self.batch_size or not self.criterion.gather and saved != per_rank:
            raise utils.UserError(f"{path} was trained on batches of {state['batch_size']} images, {saved} per process; here "
                                  f"they are {self.batch_size}, {per_rank} per process. Change --batch_size_per_gpu, so "
                                  "that its product with the number of processes stays")
        utils.load_parts(state, self.parts(), path)
        for name in ("epoch", "step", "sums", "sums_at_last_log"):
            setattr(self, name, state[name])

    def check_finite(self):
        """UserError if a weight or a buffer is not finite: nothing of it must be saved."""
        networks = filter(None, (self.student, self.teacher, self.criterion))
        if not all(torch.isfinite(x).all() for network in networks for x in network.state_dict().values()):
            raise utils.UserError(utils.diverged("a weight", self.epoch, self.step))

    def backbone(self):
        """The backbone to evaluate and to export."""
        return (self.teacher or self.student).backbone


def check_batch(run):
    """UserError for a batch that is too small for negative pairs, or larger than the data set."""
    args, images = run.args, len(run.images)
    if run.batch_size < 2 or not run.criterion.gather and args.batch_size_per_gpu < 2:
        raise utils.UserError("negative pairs need two images: --batch_size_per_gpu must be at least 2")
    if run.steps == 0:
        raise utils.UserError(f"a step takes {run.batch_size} x {args.accum_iter} images, more than the data set's {images}; "
                              "lower --batch_size_per_gpu or --accum_iter")


def build_network(args, drop_path_rate):
    backbone = build_backbone(args.arch, args.patch_size, args.global_crops_size, drop_path_rate)
    try:  # both sizes, with one image
        for size in {args.global_crops_size, args.local_crops_size if args.local_crops_number else args.global_crops_size}:
            with torch.no_grad():
                backbone.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"{args.arch} cannot take crops of {size} pixels: {error}; change the crops' size") from error
    head = ProjectionHead(backbone.embed_dim, args.out_dim, use_bn=args.use_bn_in_head, norm_last_layer=args.norm_last_layer)
    return MultiCropNet(backbone.train(), head)


def build_teacher(args, student):
    """A copy of the student without gradients and stochastic depth. As in DINO, it stays in train mode: its batch-norm
    statistics are EMAs of the student's, hence momentum 0."""
    teacher = build_network(args, drop_path_rate=0.0).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return teacher


def build_optimizer(args, student, criterion, images_per_step):
    """One optimiser for the network and for a, b and alpha, which ascends through a reversed gradient in the loss.
    `lr_scale`: a group's learning rate as a multiple of the schedule's."""
    decayed, others = [], []  # others: biases, norms, and the gains of the head's last layer
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (others if parameter.ndim == 1 or name.endswith("original0") else decayed).append(parameter)
    peak = args.lr * images_per_step / 256
    weights = criterion.param_groups(args.weights_lr or 0.0)
    groups = [{"params": decayed, "decayed": True, "lr_scale": 1.0}, {"params": others, "weight_decay": 0.0, "lr_scale": 1.0},
              *({**group, "lr_scale": group["lr"] / peak} for group in weights)]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=peak, fused=decayed[0].device.type in ("cpu", "cuda"))
    return (torch.optim.SGD if args.optimizer == "sgd" else Lars)(groups, lr=peak, momentum=0.9)


def make_loader(run):
    """This rank's part of the batches that are left of the epoch. A crop depends on the image's index, the epoch and
    the seed alone, not on the worker or rank."""
    args, first = run.args, distributed.rank() * run.args.batch_size_per_gpu
    batches = utils.epoch_batches(len(run.images), run.batch_size, args.seed, run.epoch, run.step * args.accum_iter)
    keys = ([(index, utils.stream_seed(args.seed, run.epoch, index))
             for index in batch[first:first + args.batch_size_per_gpu].tolist()] for batch in batches)
    return DataLoader(run.images, batch_sampler=keys, num_workers=args.num_workers,
                      pin_memory=run.device.type == "cuda", worker_init_fn=utils.leave_group)


# --------------------------------------------------------------------------------------------------------- training

def train_one_epoch(run, log, save, interruption):
    """One pass over the data, from run.step on; exits early if any rank was interrupted. `save()` writes a checkpoint."""
    args, student, teacher, criterion, optimizer, scaler = (
        run.args, run.student, run.teacher, run.criterion, run.optimizer, run.scaler)
    student.train()
    batches, generator = iter(make_loader(run)), torch.Generator()
    while run.step < run.steps:
        started, waited = time.monotonic(), 0.0
        momentum = set_schedules(run)
        torch.manual_seed(utils.stream_seed(args.seed, distributed.rank(), run.epoch, run.step))  # of stochastic depth
        optimizer.zero_grad()
        means, skipped = 0.0, 0
        for micro_batch in range(args.accum_iter):
            waiting = time.monotonic()
            crops, replaced = next(batches)
            waited += time.monotonic() - waiting
            generator.manual_seed(utils.stream_seed(args.seed, run.epoch, run.step, micro_batch))
            views = run.augment(crops.to(run.device), generator, distributed.rank(), distributed.world_size())
            last = micro_batch + 1 == args.accum_iter or distributed.world_size() == 1
            with nullcontext() if last else run.network.no_sync():
                with utils.autocast(run.device, run.amp_dtype):
                    embeddings = run.network(views)                   # V of [B, 3, S, S] -> [V, B, D], global views first
                    if teacher is None:
                        loss = criterion(*embeddings)
                    else:
                        with torch.no_grad():
                            targets = teacher(views[:2])              # [2, B, D]
                        loss = criterion.teacher_student(targets, embeddings)
                scaler.scale(loss / args.accum_iter).backward()       # network, a, b descend; alpha ascends
            means = means + torch.stack([loss.detach(), *criterion.means]) / args.accum_iter
            skipped += replaced.sum().item()
        totals = distributed.sum_of_floats(*means.tolist(), skipped, float(interruption.signal is not None))
        loss, positive, negative = (total / distributed.world_size() for total in totals[:3])
        skipped, stopping = totals[3:]
        if not math.isfinite(loss):
            raise utils.UserError(utils.diverged("the loss", run.epoch, run.step))

        scaler.unscale_(optimizer)
        clip_gradients(student.parameters(), args.clip_grad)
        if run.epoch < args.freeze_last_layer:
            for parameter in student.head.last_layer.parameters():
                parameter.grad = None
        scaler.step(optimizer)
        scaler.update()
        average_buffers(student)
        if teacher:
            update_teacher(teacher, student, momentum)

        run.step += 1
        add_to_sums(run, steps=1, train_loss=loss, positive=positive, negative=negative, skipped=skipped,
                    seconds=time.monotonic() - started, waited=waited)
        if log and run.step % args.print_freq == 0:
            log.write(make_record(run, since_last_log=True))
        if stopping or (args.save_every and run.step % args.save_every == 0 and run.step < run.steps):
            save()
        if stopping:
            distributed.leave()
            interruption.exit(f"saved after step {run.step}/{run.steps} of epoch {run.epoch + 1}; the same command resumes")


def set_schedules(run):
    """Sets the learning rates, weight decay and teacher temperature of the step to come; returns the EMA momentum."""
    args, at, total = run.args, run.epoch * run.steps + run.step, run.args.epochs * run.steps
    peak = args.lr * run.batch_size * args.accum_iter / 256
    lr = utils.cosine_schedule(at, total, peak, args.min_lr, round(args.warmup_epochs * run.steps))
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group.get("decayed"):
            group["weight_decay"] = utils.cosine_schedule(at, total, args.weight_decay, args.weight_decay_end)
    if args.preset == "released-imagenet":
        part = min(1.0, run.epoch / max(1, args.warmup_teacher_temp_epochs))
        run.criterion.teacher_temp = args.warmup_teacher_temp + part * (args.teacher_temp - args.warmup_teacher_temp)
    return utils.cosine_schedule(at, total, args.momentum_teacher, 1.0)


@torch.no_grad()
def clip_gradients(parameters, max_norm):
    """Scales the gradient of each parameter down to a norm of at most `max_norm`, as DINO does; 0 leaves them alone."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if max_norm and grads:
        norms = torch.stack(torch._foreach_norm(grads))
        torch._foreach_mul_(grads, (max_norm / (norms + 1e-6)).clamp(max=1).unbind())


@torch.no_grad()
def average_buffers(network):
    """Averages batch-norm running statistics over ranks: without SyncBatchNorm each rank has its own."""
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    if buffers and distributed.world_size() > 1:
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        mean = distributed.sum_over_ranks(flat) / distributed.world_size()
        for buffer, part in zip(buffers, mean.split([buffer.numel() for buffer in buffers])):
            buffer.copy_(part.view_as(buffer))


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """teacher <- momentum teacher + (1 - momentum) student, for parameters and buffers alike; counters are copied."""
    averages, values = [], []
    for average, value in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True):
        if average.is_floating_point():
            averages.append(average)
            values.append(value)
        else:
            average.copy_(value)
    torch._foreach_lerp_(averages, values, 1 - momentum)


def add_to_sums(run, **values):
    for name, value in values.items():
        run.sums[name] += value


def make_record(run, since_last_log=False):
    """The record of the steps of the epoch so far, or of those since the last record."""
    args, group, sums, step = run.args, run.optimizer.param_groups[0], run.sums, {}
    if since_last_log:
        sums, step = {name: value - run.sums_at_last_log[name] for name, value in sums.items()}, {"step": run.step}
        run.sums_at_last_log = dict(run.sums)
    steps, seconds = sums["steps"], sums["seconds"]
    left = (args.epochs - run.epoch) * run.steps - run.step
    skipped = {"skipped": round(sums["skipped"])} if args.skip_bad_images else {}
    return {"epoch": run.epoch, **step, "train_loss": sums["train_loss"] / steps, "train_lr": group["lr"],
            "train_wd": group["weight_decay"], "positive": sums["positive"] / steps, "negative": sums["negative"] / steps,
            **{name: getattr(run.criterion, name).item() for name in ("a", "b", "alpha")},
            "images_per_s": steps * run.batch_size * args.accum_iter / seconds, "data_wait": sums["waited"] / seconds,
            "memory_gb": utils.peak_memory(run.device) / 1e9, "hours_left": left * seconds / steps / 3600, **skipped}


def evaluate(run):
    """k-NN accuracy (k = 20) of the backbone's features on the labelled images."""
    backbone = run.backbone().eval()
    bank, queries = (extract_features(backbone, split, run.device, run.args.batch_size_per_gpu, run.args.num_workers,
                                      run.amp_dtype) for split in run.labelled)
    backbone.train()
    top1, top5 = knn_accuracy(*bank, *queries, ks=(20,))[20]
    return {"knn_acc@1": top1, "knn_acc@5": top5}


# ------------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    args = parse_args(argv)
    device = distributed.init_distributed(args.device, args.dist_url)
    if args.amp == "auto":
        args.amp = "bf16" if utils.select_amp("auto", device) else "none"  # a resume elsewhere must do the same
    with contextlib.closing(utils.lock_folder(args.output_dir)) if distributed.rank() == 0 else nullcontext():
        train(args, device)
    distributed.leave()


def train(args, device):
    """Trains to the end, or resumes. The first rank writes the files."""
    folder, first = args.output_dir, distributed.rank() == 0
    state = utils.read_resume(args, folder / "checkpoint.pth", FREE_ON_RESUME)
    fresh, run = state is None, Run(args, device)
    if not fresh:
        run.load_state_dict(state, folder / "checkpoint.pth")
        del state  # as large as the run itself
    content = int(run.images.checksum[1][:15], 16)
    if not distributed.same_over_ranks(run.epoch, run.step, run.steps, content):
        raise utils.UserError("the processes see different checkpoints or images; --output_dir and --data_path must be "
                              "the same folders on all hosts")
    log = utils.RunLog(folder, (run.epoch, run.step), run.steps) if first else None
    if first:
        announce(run, folder)

    def save(name="checkpoint.pth"):
        run.check_finite()
        if first:
            utils.save_checkpoint(run.state_dict(), folder / name)
    with contextlib.closing(utils.Interruption()) as interruption:
        if fresh:
            save()  # from now on a log has its checkpoint
        if args.knn_every and (run.epoch, run.step) == (0, 0):
            untrained = {"epoch": -1, **evaluate(run)}
            log and log.write(untrained)
        while run.epoch < args.epochs:
            train_one_epoch(run, log, save, interruption)
            run.check_finite()
            record = make_record(run)
            if args.knn_every and ((run.epoch + 1) % args.knn_every == 0 or run.epoch + 1 == args.epochs):
                record |= evaluate(run)
            log and log.write(record)
            run.epoch, run.step = run.epoch + 1, 0
            run.sums, run.sums_at_last_log = dict.fromkeys(SUMS, 0.0), dict.fromkeys(SUMS, 0.0)
            if args.saveckp_freq and (run.epoch - 1) % args.saveckp_freq == 0:
                save(f"checkpoint{run.epoch - 1:04}.pth")
            save()  # last: a run killed before this line resumes before all that
    if first:
        export_backbone(run.backbone(), run.describe(), folder / "backbone.safetensors")
        draw_curves({folder.resolve().name: log.records}, folder / "curves.png")
        print(f"backbone: {folder / 'backbone.safetensors'}\ncurves: {folder / 'curves.png'}", flush=True)


def announce(run, folder):
    args = run.args
    print(f"{len(run.images)} images; {args.arch} with {utils.millions(run.student.backbone)} M parameters and a head with "
          f"{utils.millions(run.student.head)} M; {distributed.world_size()} x {run.device}, "
          f"{run.amp_dtype or torch.float32}; {run.steps} steps per epoch of {run.batch_size} x {args.accum_iter} images\n"
          f"from epoch {run.epoch + 1}, step {run.step + 1}, to epoch {args.epochs}; {folder}", flush=True)
    if args.warmup_epochs >= args.epochs:
        print(f"note: --warmup_epochs {args.warmup_epochs:g} outlasts --epochs {args.epochs}: the learning rate does not reach "
              "its peak")


if __name__ == "__main__":
    utils.run_script(main)
