"""Pretrains a ViT or ResNet with AUC-CL on multi-crop views, with an EMA teacher, on any number of processes.

    torchrun --nproc_per_node=8 main.py --arch vit_small --data_path DIR --output_dir OUT
    python -m torch.distributed.launch --nproc_per_node=8 main.py --data_path DIR --output_dir OUT   # or srun
    python main.py --teacher none --data_path DIR    # the paper's Algorithm 1: one network, two views, no EMA
    python main.py --preset released-imagenet ...    # what the authors' released code optimises

DIR holds images, in class folders or not. The same command again resumes. Written to OUT: checkpoint.pth,
log.txt (JSON records, those of the screen and TensorBoard); at the end curves.png and backbone.safetensors.
"""
import hashlib
import math
import os
import time
from collections import Counter
from contextlib import closing, nullcontext

import utils
from utils import UserError, boolean, non_negative_float, non_negative_int, positive_float, positive_int

# Defaults by preset; those of `paper` serve every preset that is not here. Reasons: results/README.md.
RECIPES = {
    "paper": dict(out_dim=1024, weights_lr=1e-3, rand_augment="none", erasing=0.0),
    "released-imagenet": dict(out_dim=65536, weights_lr=1e-3, rand_augment="rand-n2-m10-mstd0.5",
                              erasing=0.2),
}
DEFAULTS = {"patch_size": 16, "drop_path_rate": 0.1, "momentum_teacher": 0.996, "local_crops_number": 8,
            "warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 30}
FREE_ON_RESUME = ("output_dir", "data_path", "deterministic", "device", "dist_url", "local_rank",
                  "num_workers", "print_freq", "save_every", "saveckp_freq", "knn_every", "knn_data_path",
                  "skip_bad_images", "download")


def parse_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    recipe = lambda text, name: utils.by_preset(text, RECIPES, name)  # noqa: E731
    default = lambda text, name: f"{text} (default: {DEFAULTS[name]})"  # noqa: E731
    span = dict(type=float, nargs=2, metavar=("MIN", "MAX"))
    add = parser.add_argument_group("network").add_argument
    add("--arch", default="vit_small", help="vit_tiny, vit_small, vit_base, a ResNet, or timm/NAME")
    add("--patch_size", type=positive_int, help=default("pixels a side of a vit_*'s patches", "patch_size"))
    add("--drop_path_rate", type=utils.probability,
        help=default("stochastic depth of a vit_* student", "drop_path_rate"))
    add("--out_dim", type=positive_int, help=recipe("width of the head's output", "out_dim"))
    add("--norm_last_layer", type=boolean, default=True, help="fixed row norms of the head's last layer")
    add("--use_bn_in_head", type=boolean, default=False, help="batch norm in the head")
    add("--init_weights", type=lambda text: text if text.startswith("timm/") else utils.path(text),
        help="file of a backbone's weights, or timm/NAME (with --download), to start from")
    add("--teacher", choices=("ema", "none"), default="ema", help="EMA of the student; none: symmetric views")
    add("--momentum_teacher", type=utils.probability,
        help=default("EMA momentum; a cosine ends at 1", "momentum_teacher"))

    group = parser.add_argument_group("objective")
    utils.add_objective_flags(group, RECIPES)
    add, released = group.add_argument, "released-imagenet: "
    add("--warmup_teacher_temp", type=positive_float,
        help=default(released + "first temperature", "warmup_teacher_temp"))
    add("--teacher_temp", type=positive_float, help=default(released + "final temperature", "teacher_temp"))
    add("--warmup_teacher_temp_epochs", type=non_negative_int,
        help=default(released + "epochs between", "warmup_teacher_temp_epochs"))

    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", choices=("adamw", "sgd", "lars"), default="adamw", help="sgd and lars: momentum 0.9")
    add("--lr", type=positive_float, default=5e-4, help="peak learning rate per 256 images, scaled linearly")
    add("--min_lr", type=non_negative_float, default=1e-6, help="learning rate at the end of the cosine")
    add("--warmup_epochs", type=non_negative_float, default=10.0, help="linear warm-up epochs")
    add("--weight_decay", type=non_negative_float, default=0.04,
        help="weight decay at the start; none on biases, norms, a, b and alpha")
    add("--weight_decay_end", type=non_negative_float, default=0.4, help="weight decay at a cosine's end")
    add("--clip_grad", type=non_negative_float, default=3.0, help="limit of each gradient's norm; 0: none")
    add("--freeze_last_layer", type=non_negative_int, default=1, help="epochs with a frozen last layer")
    add("--batch_size_per_gpu", type=utils.number(int, 2, 2**31), default=64, help="images per process")
    add("--accum_iter", type=positive_int, default=1, help="gradient accumulation steps; negatives "
        "come from one micro-batch, so it equals a larger batch in expectation, not in bits")
    add("--epochs", type=positive_int, default=100, help="passes over the data")
    add("--amp", choices=("auto", "bf16", "fp16", "none"),
        help="autocast (default: auto, bf16 where the hardware has it)")
    add("--use_fp16", type=boolean, help="alias: true for --amp fp16, false for --amp none")
    add("--grad_checkpointing", action="store_true", help="activation checkpointing: less memory, more time")
    add("--compile", action="store_true", help="compile the student: minutes at the start, then faster steps")
    add("--seed", type=non_negative_int, default=0, help="seed of weights, order, views and stochastic depth")
    add("--deterministic", action="store_true", help="the same bits again on GPUs, too, with slower kernels")

    add = parser.add_argument_group("views").add_argument
    add("--views", type=utils.number(int, 2, 64), help="global views, with --teacher none (default: 2)")
    add("--global_crops_size", type=utils.pixels, default=224, help="pixels a side of a global view")
    add("--global_crops_scale", **span, default=[0.4, 1.0], help="share of the image's area in a global view")
    add("--local_crops_number", type=non_negative_int,
        help=default("local views, with a teacher", "local_crops_number"))
    add("--local_crops_size", type=utils.pixels, default=96, help="pixels a side of a local view")
    add("--local_crops_scale", **span, default=[0.05, 0.4], help="share of the image's area in a local view")
    add("--blur_sigma", **span, default=[0.1, 2.0], help="standard deviation of the blur, in pixels")
    add("--rand_augment", help=recipe("RandAugment of global views by timm's name, or none", "rand_augment"))
    add("--erasing", type=utils.probability,
        help=recipe("probability of erasing a box of the first global view", "erasing"))

    add = parser.add_argument_group("data and output").add_argument
    add("--data_path", type=utils.path, required=True, help="folder of training images, or root of --dataset")
    add("--dataset", help="instead of a folder: cifar10, stl10, ... or hfds/NAME of the Hugging Face hub")
    add("--download", action="store_true", help="fetch --dataset or --init_weights timm/NAME if not here yet")
    add("--skip_bad_images", action="store_true", help="replacement of undecodable images by the next one")
    add("--num_workers", type=non_negative_int, default=utils.default_workers(), help="loader workers")
    add("--output_dir", type=utils.path, default=utils.Path("."), help="output folder")
    add("--saveckp_freq", type=non_negative_int, default=20, help="epochs between kept checkpoints; 0: none")
    add("--save_every", type=positive_int, help="steps between checkpoints (default: one at an epoch's end)")
    add("--print_freq", type=positive_int, default=10, help="steps between records")
    add("--knn_every", type=positive_int, help="epochs between k-NN evaluations on --knn_data_path")
    add("--knn_data_path", type=utils.path, help="labelled images: folder with train/ and val/ (or test/)")
    utils.add_process_flags(parser)
    return complete_args(parser.parse_args(argv))


def complete_args(args):
    """Fills in what other flags decide. UserError for flags that contradict each other."""
    utils.complete_objective_flags(args, RECIPES)
    if args.use_fp16 is not None:
        utils.refuse(args, ("amp",), "with --use_fp16")
        args.amp, args.use_fp16 = "fp16" if args.use_fp16 else "none", None
    args.amp = args.amp or "auto"
    if args.teacher == "ema":
        utils.refuse(args, ("views",), "with a teacher, which sees two; use --local_crops_number")
        if args.preset == "poster" or args.margin_negative_weight not in (None, 1.0):
            raise UserError("--preset poster and --margin_negative_weight are for symmetric views: a student "
                            "that faces a teacher would collapse; add --teacher none")
    else:
        utils.refuse(args, ("momentum_teacher", "local_crops_number"), "with --teacher none")
    if args.preset != "released-imagenet":
        utils.refuse(args, ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs"),
                     "without --preset released-imagenet")
    if not args.arch.startswith("vit_"):
        utils.refuse(args, ("patch_size", "drop_path_rate"), "with a network that is no vit_*")
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.views = args.views or 2
    if args.teacher == "none":
        args.local_crops_number = 0
        if args.preset == "released-imagenet":
            raise UserError("--preset released-imagenet needs a teacher; leave --teacher none out")
    if args.compile and args.grad_checkpointing and not args.arch.startswith(("vit_", "timm/")):
        raise UserError("torch cannot compile a ResNet with --grad_checkpointing; leave it or --compile out")
    if args.local_crops_number == 0:
        args.local_crops_size = args.global_crops_size
    args.rand_augment = None if args.rand_augment == "none" else args.rand_augment
    utils.check_range(args, "global_crops_scale", 1)
    utils.check_range(args, "local_crops_scale", 1)
    utils.check_range(args, "blur_sigma", 1000)
    if bool(args.knn_every) != bool(args.knn_data_path):
        raise UserError("--knn_every and --knn_data_path need each other; give both")
    return args


if __name__ == "__main__":
    utils.check_flags(parse_args)

import torch  # noqa: E402
from timm.layers import convert_sync_batchnorm, set_fused_attn  # noqa: E402
from timm.optim import Lars  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

import distributed  # noqa: E402
from augmentations import IMAGENET_MEAN, IMAGENET_STD, MultiCrop, MultiCropAugmentation  # noqa: E402
from cifar.curves import draw_curves  # noqa: E402
from data import (PRETRAINING, build_dataset, build_splits, eval_transform, image_files,  # noqa: E402
                  load_image, seeded_loader)
from eval_knn import knn_accuracy  # noqa: E402
from pretrained import Description, export_backbone, extract_features, init_backbones  # noqa: E402
from vision_transformer import VIT_ARCHS, MultiCropNet, ProjectionHead, build_backbone  # noqa: E402


# ------------------------------------------------------------------------------------------------------ build

class MultiCropImages(Dataset):
    """Training images by (index, seed): Crops, and the number of undecodable images that were skipped."""

    def __init__(self, args):
        self.crop = MultiCrop(args.global_crops_size, args.global_crops_scale, args.local_crops_size,
                              args.local_crops_scale, args.local_crops_number, args.rand_augment, args.views)
        self.folder, self.skip_bad = args.data_path, args.skip_bad_images
        if args.dataset:
            split = PRETRAINING.get(args.dataset, "train")
            self.source = build_dataset(args.dataset, self.folder, split, download=args.download)
        elif (self.folder / "train").exists() and {"val", "test"} & {*os.listdir(self.folder)}:
            raise UserError(f"{self.folder} holds test images too; give --data_path {self.folder / 'train'}")
        else:
            self.source = image_files(self.folder)
        names = [args.dataset] if args.dataset else self.source
        self.checksum = [len(self), hashlib.sha256(b"\n".join(map(os.fsencode, names))).hexdigest()]

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        index, seed = key
        for skipped in range(len(self) if self.skip_bad else 1):
            try:
                item = self.source[(index + skipped) % len(self)]
                image = load_image(self.folder / item) if isinstance(item, str) else item[0]
                return self.crop(image, seed), skipped
            except UserError as error:
                bad = str(error).partition(";")[0]
        raise UserError(f"{bad}; put an image there, or, if the file exists, add --skip_bad_images")


class Run:
    """A training run, built from the flags: data, networks, objective, optimiser, and how far it has come.

    Another objective replaces `criterion`. It is called as criterion.teacher_student(targets, embeddings) or
    criterion(z0, z1, ...), and has `means`, the last mean positive and negative score, and
    `param_groups(lr)`, of its own parameters, whose gradients must be equal on all ranks.
    """

    def __init__(self, args, device, criterion=None):
        self.args, self.device = args, device
        self.amp_dtype = utils.select_amp(args.amp, device)
        utils.set_backends(device, args.deterministic)
        # torch's fused attention is the slower one on CPUs in bf16, in the backward pass of short sequences
        set_fused_attn(device.type != "cpu" or self.amp_dtype is None)
        torch.manual_seed(args.seed)  # the same weights on all ranks
        self.criterion = (criterion or utils.build_criterion(args)).to(device)
        with utils.user_errors():
            self.images = MultiCropImages(args)
            self.augment = MultiCropAugmentation(args.erasing, args.blur_sigma)
            self.student = build_network(args, args.drop_path_rate)
            self.teacher = build_teacher(args, self.student) if args.teacher == "ema" else None
        self.labelled = args.knn_data_path and build_splits(
            "folder", args.knn_data_path, eval_transform(args.global_crops_size, IMAGENET_MEAN, IMAGENET_STD))
        world = distributed.world_size()
        self.batch_size = args.batch_size_per_gpu * world  # images of a micro-batch, over all ranks
        self.images_per_step = self.batch_size * args.accum_iter
        self.peak_lr = args.lr * self.images_per_step / 256
        self.steps = utils.steps_per_epoch(len(self.images), self.images_per_step,
                                           "--batch_size_per_gpu or --accum_iter")
        if args.grad_checkpointing:
            try:
                self.student.backbone.set_grad_checkpointing(True)
            except AssertionError as error:  # timm's
                raise UserError(f"{args.arch} has no --grad_checkpointing; leave it out") from error
        for network in filter(None, (self.student, self.teacher)):
            network.to(device, memory_format=utils.memory_format(network, device, self.amp_dtype))
            if world > 1 and device.type == "cuda":  # torch has no SyncBatchNorm for CPUs
                convert_sync_batchnorm(network)  # timm's: torch's drops the activations of timm's batch norms
        self.network = torch.compile(self.student) if args.compile else self.student  # what the step calls
        if world > 1:
            self.network = DistributedDataParallel(self.network)
            self.network.broadcast_buffers = False  # as an argument torch 2.14 deprecates it
        self.optimizer = build_optimizer(self)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        self.parts = {"student": self.student, **({"teacher": self.teacher} if self.teacher else {}),
                      "loss": self.criterion, "optimizer": self.optimizer, "scaler": self.scaler}
        self.eval_backbone = (self.teacher or self.student).backbone
        self.description = Description(args.arch, args.patch_size if args.arch in VIT_ARCHS else None,
                                       args.global_crops_size, IMAGENET_MEAN, IMAGENET_STD)
        self.epoch = self.step = 0  # the next to run; step counts within the epoch
        self.sums, self.sums_at_last_log = Counter(), Counter()  # over the steps of the epoch, by name

    def state_dict(self):
        """The checkpoint. UserError if a weight or running statistic is not finite: nothing must be saved."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        weights = *state["student"].values(), *self.criterion.parameters()  # `u` is NaN before the first step
        if not all(torch.isfinite(x).all() for x in weights):
            raise UserError(utils.diverged("a weight", self.epoch, self.step))
        return state | {"backbone": self.description._asdict(), "epoch": self.epoch, "step": self.step,
                        "sums": dict(self.sums), "sums_at_last_log": dict(self.sums_at_last_log),
                        "batch_size": self.batch_size, "data": self.images.checksum,
                        "args": utils.plain(self.args)}

    def load_state_dict(self, state, path):
        """Resumes from `state`, the checkpoint at `path`. UserError for another network, batch or data."""
        utils.check_same_data(state, self.images.checksum, path)
        if state["batch_size"] != self.batch_size:
            raise UserError(f"{path} was trained on batches of {state['batch_size']} images, here they "
                            f"have {self.batch_size}; change --batch_size_per_gpu or the number of processes")
        utils.load_parts(state, self.parts, path)
        self.epoch, self.step = state["epoch"], state["step"]
        self.sums, self.sums_at_last_log = Counter(state["sums"]), Counter(state["sums_at_last_log"])


def build_network(args, drop_path_rate):
    backbone = build_backbone(args.arch, args.patch_size, args.global_crops_size, drop_path_rate).eval()
    for size in {args.global_crops_size, args.local_crops_size}:
        try:
            with torch.no_grad():
                backbone(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"{args.arch} takes no crops of {size} pixels: {error}; resize them") from error
    return MultiCropNet(backbone.train(), ProjectionHead(
        backbone.embed_dim, args.out_dim, use_bn=args.use_bn_in_head, norm_last_layer=args.norm_last_layer))


def build_teacher(args, student):
    """A copy of the student without gradients and stochastic depth. As in DINO, it stays in train mode: its
    batch-norm statistics are EMAs of the student's, hence momentum 0."""
    teacher = build_network(args, drop_path_rate=0.0).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    for module in teacher.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return teacher


def build_optimizer(run):
    """One optimiser for the network and for a, b and alpha, which ascends by a gradient reversal in the loss.
    Only the first group decays. `lr_scale`: a group's learning rate as a multiple of the schedule's."""
    decayed, others = [], []  # others: biases, norms, and weight_norm's g of the last layer, original0
    for name, parameter in run.student.named_parameters():
        if parameter.requires_grad:
            (others if parameter.ndim == 1 or name.endswith("original0") else decayed).append(parameter)
    groups = [{"params": decayed, "lr": run.peak_lr}, {"params": others, "lr": run.peak_lr},
              *run.criterion.param_groups(run.args.weights_lr)]
    groups = [{**group, "lr_scale": group["lr"] / run.peak_lr} for group in groups]
    if run.args.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.0, fused=run.device.type in ("cpu", "cuda"))
    return (torch.optim.SGD if run.args.optimizer == "sgd" else Lars)(groups, momentum=0.9)


def make_loader(run):
    """This rank's part of the batches left of the epoch. A crop depends on the image's index, the epoch and
    the seed alone, not on the worker or rank."""
    args, size, done = run.args, run.args.batch_size_per_gpu, run.step * run.args.accum_iter
    own = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    batches = utils.epoch_batches(len(run.images), run.batch_size, args.seed, run.epoch, done)
    return seeded_loader(run.images, (batch[own] for batch in batches), (args.seed, run.epoch), run.device,
                         args.num_workers)


# --------------------------------------------------------------------------------------------------- training

def train_one_epoch(run, log, save, interruption):
    """One pass over the data, from run.step on. A signal to any rank ends all of them, after `save()`."""
    args, network, teacher, criterion, scaler = run.args, run.network, run.teacher, run.criterion, run.scaler
    rank, world, generator = distributed.rank(), distributed.world_size(), torch.Generator()
    network.train()
    batches = iter(make_loader(run))
    for step in range(run.step, run.steps):
        started = time.monotonic()
        micro_batches = [next(batches) for _ in range(args.accum_iter)]
        waited = time.monotonic() - started
        momentum = set_schedules(run)
        torch.manual_seed(utils.stream_seed(args.seed, run.epoch, step, 0, rank))  # of stochastic depth
        run.optimizer.zero_grad()
        means, skipped = torch.zeros(3, device=run.device), 0   # loss, mean positive and negative score
        for number, (crops, replaced) in enumerate(micro_batches, 1):
            generator.manual_seed(utils.stream_seed(args.seed, run.epoch, step, number))
            views = run.augment(crops.to(run.device), generator, rank, world)   # V of [B, 3, S, S]
            last = number == args.accum_iter                    # when DDP averages gradients over ranks
            with nullcontext() if world == 1 or last else network.no_sync():
                with utils.autocast(run.device, run.amp_dtype):
                    embeddings = network(views)                                 # [V, B, D]
                    if teacher is None:
                        loss = criterion(*embeddings)
                    else:
                        with torch.no_grad():
                            targets = teacher(views[:2])                        # [2, B, D]
                        loss = criterion.teacher_student(targets, embeddings)
                scaler.scale(loss / args.accum_iter).backward()                 # only alpha ascends
            means += torch.stack([loss.detach(), *criterion.means]) / (args.accum_iter * world)
            skipped += replaced.sum().item()
        loss, positive, negative, skipped, interrupted = distributed.sum_of_floats(
            *means.tolist(), skipped, interruption.signal is not None)
        if not math.isfinite(loss):
            raise UserError(utils.diverged("the loss", run.epoch, step))

        scaler.unscale_(run.optimizer)
        clip_gradients(run.student.parameters(), args.clip_grad)
        if run.epoch < args.freeze_last_layer:
            run.student.head.last_layer.zero_grad()
        scaler.step(run.optimizer)
        scaler.update()
        distributed.average_buffers(run.student)
        if teacher:
            update_teacher(teacher, run.student, momentum)

        run.step = step + 1
        run.sums.update(steps=1, train_loss=loss, positive=positive, negative=negative, skipped=skipped,
                        seconds=time.monotonic() - started, waited=waited)
        if log and run.step % args.print_freq == 0:
            log.write(make_record(run, since_last_log=True))
        if interrupted or args.save_every and run.step % args.save_every == 0 and run.step < run.steps:
            save()
        if interrupted:
            distributed.leave()
            interruption.exit(run)


def set_schedules(run):
    """Sets the learning rates, weight decay and teacher temperature of a step. Returns the EMA momentum."""
    args, at, total = run.args, run.epoch * run.steps + run.step, run.args.epochs * run.steps
    lr = utils.cosine_schedule(at, total, run.peak_lr, args.min_lr, round(args.warmup_epochs * run.steps))
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    decayed = run.optimizer.param_groups[0]
    decayed["weight_decay"] = utils.cosine_schedule(at, total, args.weight_decay, args.weight_decay_end)
    if args.preset == "released-imagenet":
        first, last, epochs = args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs
        part = run.epoch / max(1, epochs - 1) if run.epoch < epochs else 1      # DINO's np.linspace
        run.criterion.teacher_temp = first + part * (last - first)
    return utils.cosine_schedule(at, total, args.momentum_teacher, 1.0)


@torch.no_grad()
def clip_gradients(parameters, max_norm):
    """Scales each parameter's gradient down to a norm of at most `max_norm`, as DINO does; 0: any."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if max_norm and grads:
        norms = torch.stack(torch._foreach_norm(grads))
        torch._foreach_mul_(grads, (max_norm / (norms + 1e-6)).clamp(max=1).unbind())


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """teacher <- momentum teacher + (1 - momentum) student, for parameters and running statistics alike."""
    averages, values = ([x for x in network.state_dict().values() if x.is_floating_point()]
                        for network in (teacher, student))
    torch._foreach_lerp_(averages, values, 1 - momentum)


def make_record(run, since_last_log=False):
    """The record of the epoch so far, or of the steps since the last record."""
    args, group, sums, step = run.args, run.optimizer.param_groups[0], run.sums, {}
    if since_last_log:
        sums = {name: value - run.sums_at_last_log[name] for name, value in sums.items()}
        step, run.sums_at_last_log = {"step": run.step}, run.sums.copy()
    steps, seconds = sums["steps"], sums["seconds"]
    left = (args.epochs - run.epoch) * run.steps - run.step
    return {"epoch": run.epoch, **step, "train_loss": sums["train_loss"] / steps, "train_lr": group["lr"],
            "train_wd": group["weight_decay"], "positive": sums["positive"] / steps,
            "negative": sums["negative"] / steps,
            **{name: p.item() for name, p in run.criterion.named_parameters() if p.ndim == 0},
            "images_per_s": steps * run.images_per_step / seconds, "data_wait": sums["waited"] / seconds,
            "memory_gb": utils.peak_memory(run.device), "hours_left": left * seconds / steps / 3600,
            **({"skipped": round(sums["skipped"])} if args.skip_bad_images else {})}


def evaluate(run):
    """k-NN accuracy (k = 20) of the backbone's features on the labelled images."""
    args, backbone = run.args, run.eval_backbone.eval()
    bank, queries = (extract_features(backbone, split, run.device, args.batch_size_per_gpu, args.num_workers,
                                      run.amp_dtype) for split in run.labelled)
    backbone.train()
    top1, top5 = knn_accuracy(*bank, *queries, ks=(20,))[20]
    return {"knn_acc@1": top1, "knn_acc@5": top5}


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    args = parse_args(argv)
    device = distributed.init_distributed(args.device, args.dist_url)
    utils.settle_amp(args, device)
    criterion = utils.build_criterion(args)
    with closing(utils.lock_folder(args.output_dir)) if distributed.rank() == 0 else nullcontext():
        train(args, device, criterion)
    distributed.leave()


def train(args, device, criterion=None):
    """Trains to the end, or resumes. The first rank writes the files."""
    folder, first = args.output_dir, distributed.rank() == 0
    checkpoint, curves = folder / "checkpoint.pth", folder / "curves.png"
    criterion = criterion or utils.build_criterion(args)  # sets args.learn, which a resume compares
    free = ("batch_size_per_gpu",) if args.preset == "paper" else ()  # others take pairs within each rank
    state = utils.read_resume(args, checkpoint, FREE_ON_RESUME + free)
    fresh, run = state is None, Run(args, device, criterion)
    if fresh and args.init_weights:
        backbones = [network.backbone for network in filter(None, (run.student, run.teacher))]
        init_backbones(backbones, args.init_weights, run.description, args.download)
    if not fresh:
        run.load_state_dict(state, checkpoint)
        del state  # as large as the run itself
    distributed.check_same_over_ranks(run.epoch, run.step, run.steps, int(run.images.checksum[1][:15], 16))
    if first and run.epoch < args.epochs:
        backbone, head = map(utils.millions, (run.student.backbone, run.student.head))
        utils.announce(run, f"{len(run.images)} images; {args.arch} with {backbone} M parameters and a head "
                       f"with {head} M", distributed.world_size())
    elif first:
        print(f"the run in {folder} is finished, after {run.epoch} epochs", flush=True)
    if run.epoch == args.epochs and curves.exists():
        return
    log = utils.RunLog(folder, (run.epoch, run.step), run.steps) if first else None

    def save(path=checkpoint):
        state = run.state_dict()
        if first:
            utils.save_checkpoint(state, path)

    with closing(utils.Interruption()) as interruption:
        if fresh:
            save()  # read_resume refuses a log without a checkpoint
        if args.knn_every and (run.epoch, run.step) == (0, 0):
            untrained = evaluate(run)
            if log:
                log.write({"epoch": -1, **untrained})
        while run.epoch < args.epochs:
            train_one_epoch(run, log, save, interruption)
            finished, record = run.epoch, make_record(run)
            if args.knn_every and ((finished + 1) % args.knn_every == 0 or finished + 1 == args.epochs):
                save()  # a signal or a fault during the evaluation loses no step
                record |= evaluate(run)
            if log:
                log.write(record)
            run.epoch, run.step, run.sums, run.sums_at_last_log = finished + 1, 0, Counter(), Counter()
            if args.saveckp_freq and finished % args.saveckp_freq == 0:
                save(folder / f"checkpoint{finished:04}.pth")
            save()  # last, so that a run killed earlier repeats all that an epoch ends with
    if log:
        export_backbone(run.eval_backbone, run.description, folder / "backbone.safetensors")
        draw_curves({folder.resolve().name: log.records}, curves)  # last: it tells that the run is finished
        print(f"backbone: {folder / 'backbone.safetensors'}\ncurves: {curves}", flush=True)


if __name__ == "__main__":
    utils.run_script(main)
