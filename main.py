"""Pretrains a ViT or ResNet with AUC-CL on multi-crop views: a student and its moving average, any number of processes.

    python -m torch.distributed.launch --nproc_per_node=8 main.py --arch vit_small --data_path DIR --output_dir OUT
    torchrun --nproc_per_node=8 main.py --arch resnet50 --data_path DIR --output_dir OUT   # srun and plain python work too
    python main.py --teacher none --data_path DIR --output_dir OUT    # Algorithm 1 of the paper: one network, two views
    python main.py --preset released-imagenet ...                     # what the authors' released code optimises

DIR holds images, in class folders or not. The same command again resumes. Into OUT go checkpoint.pth, log.txt (JSON records, the
same as on the screen and in TensorBoard) and, at the end, backbone.safetensors, which timm loads.
"""
import hashlib
import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from timm.layers import set_fused_attn
from timm.optim import Lars
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.datasets.folder import IMG_EXTENSIONS

import utils
from auccl_loss import SCORES, WEIGHTS, AUCCLLoss
from augmentations import IMAGENET_MEAN, IMAGENET_STD, MultiCrop, MultiCropAugmentation
from eval_knn import extract_features, knn_accuracy
from vision_transformer import VIT_ARCHS, MultiCropNet, ProjectionHead, build_backbone

# What a flag that is not given takes from --preset; the reasons for `paper`'s values stand in results/README.md.
RECIPES = {
    "paper": dict(out_dim=1024, learn=WEIGHTS, weights_lr=1e-3, rand_augment="none", erasing=0.0),
    "released-imagenet": dict(out_dim=65536, learn=(), weights_lr=None, rand_augment="rand-n2-m10-mstd0.5", erasing=0.2,
                              warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=30),
}
PAPER_ONLY = ("negative_weight", "margin_negative_weight", "score", "learn", "weights_lr")  # the release has fixed them
RELEASED_ONLY = ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs")       # of its softmax
TEACHER_ONLY = ("momentum_teacher", "local_crops_number", "local_crops_size", "local_crops_scale")
VIT_ONLY = ("patch_size", "drop_path_rate")
DEFAULTS = dict(momentum_teacher=0.996, local_crops_number=8, local_crops_size=96, local_crops_scale=(0.05, 0.4), patch_size=16,
                drop_path_rate=0.1)  # of flags that some other flags rule out
FREE_ON_RESUME = ("output_dir", "data_path", "device", "dist_url", "local_rank", "num_workers", "print_freq", "save_every",
                  "saveckp_freq", "knn_every", "knn_data_path", "skip_bad_images", "download",
                  "batch_size_per_gpu")  # the batch of all ranks must stay, see Run


def parse_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument_group("network").add_argument
    add("--arch", default="vit_small", help=f"{', '.join(VIT_ARCHS)}, a ResNet of torchvision, or timm/NAME for any of timm's")
    add("--patch_size", type=utils.positive_int, help="pixels a side of a ViT's patches (default: 16)")
    add("--drop_path_rate", type=utils.non_negative_float, help="stochastic depth of a ViT student (default: 0.1)")
    add("--out_dim", type=utils.positive_int, help=_by_preset("width of the head's output", "out_dim"))
    add("--norm_last_layer", type=utils.boolean, default=True, help="hold the row norms of the head's last layer at 1")
    add("--use_bn_in_head", type=utils.boolean, default=False, help="batch norm in the head")
    add("--teacher", choices=("ema", "none"), default="ema", help="moving average of the student, or none: both views in one network")
    add("--momentum_teacher", type=utils.non_negative_float, help="of the moving average, raised to 1 by a cosine (default: 0.996)")

    add = parser.add_argument_group("objective").add_argument
    add("--preset", choices=RECIPES, default="paper", help="objective, and the defaults that depend on it")
    add("--negative_weight", type=utils.number_or_sum, help="nu: a number, or 'sum' for the negatives per anchor (default: the loss's)")
    add("--margin_negative_weight", type=utils.number_or_sum, help="kappa, likewise (default: the loss's)")
    add("--score", choices=SCORES, help="of a pair (default: the loss's)")
    add("--learn", nargs="+", choices=(*WEIGHTS, "none"), help="which of a, b, alpha are learned (default: all, for paper)")
    add("--weights_lr", type=utils.non_negative_float, help=f"Adam's rate for a, b and alpha (default: {RECIPES['paper']['weights_lr']})")
    add("--warmup_teacher_temp", type=utils.non_negative_float, help="released-imagenet: the softmax's first temperature (default: 0.04)")
    add("--teacher_temp", type=utils.non_negative_float, help="released-imagenet: its final temperature (default: 0.07)")
    add("--warmup_teacher_temp_epochs", type=utils.non_negative_int, help="released-imagenet: epochs from one to the other (default: 30)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", choices=("adamw", "sgd", "lars"), default="adamw", help="of the network; sgd and lars with momentum 0.9")
    add("--lr", type=utils.positive_float, default=5e-4, help="peak learning rate for a batch of 256 images, scaled to a step's")
    add("--min_lr", type=utils.non_negative_float, default=1e-6, help="at the end of the cosine")
    add("--warmup_epochs", type=utils.non_negative_float, default=10.0, help="of linear warm-up")
    add("--weight_decay", type=utils.non_negative_float, default=0.04, help="at the start; none on biases, norms, a, b, alpha")
    add("--weight_decay_end", type=utils.non_negative_float, default=0.4, help="at the end of its cosine")
    add("--clip_grad", type=utils.non_negative_float, default=3.0, help="largest gradient norm of each parameter by itself; 0: none")
    add("--freeze_last_layer", type=utils.non_negative_int, default=1, help="epochs at the start with the head's last layer held")
    add("--batch_size_per_gpu", type=utils.positive_int, default=64, help="images a process and batch")
    add("--accum_iter", type=utils.positive_int, default=1, help="batches whose gradients make one step")
    add("--epochs", type=utils.positive_int, default=100, help="passes over the data")
    add("--amp", choices=("auto", "bf16", "fp16", "none"), help="autocast (default: auto, bf16 where the hardware has it)")
    add("--use_fp16", type=utils.boolean, help="true: --amp fp16, false: --amp none")
    add("--grad_checkpointing", action="store_true", help="recompute activations in the backward pass: less memory, more time")
    add("--compile", action="store_true", help="compile the student: minutes at the start, then faster steps")
    add("--seed", type=utils.non_negative_int, default=0, help="of weights, order, augmentation and stochastic depth")

    add = parser.add_argument_group("views").add_argument
    add("--global_crops_size", type=utils.positive_int, default=224, help="pixels a side of the two global views")
    add("--global_crops_scale", type=float, nargs=2, default=(0.4, 1.0), metavar=("MIN", "MAX"), help="their share of the image's area")
    add("--local_crops_number", type=utils.non_negative_int, help="local views, for the student (default: 8)")
    add("--local_crops_size", type=utils.positive_int, help="pixels a side (default: 96)")
    add("--local_crops_scale", type=float, nargs=2, metavar=("MIN", "MAX"), help="share of the image's area (default: 0.05 0.4)")
    add("--blur_sigma", type=float, nargs=2, default=(0.1, 2.0), metavar=("MIN", "MAX"), help="of the blur, in pixels")
    add("--rand_augment", help=_by_preset("RandAugment of the global views, in timm's notation, or 'none'", "rand_augment"))
    add("--erasing", type=float, help=_by_preset("probability of erasing a box of the first global view", "erasing"))

    add = parser.add_argument_group("data and output").add_argument
    add("--data_path", type=Path, required=True, help="folder of the training images; with --dataset, the data set's root")
    add("--dataset", type=utils.dataset_name, help="a set instead of a folder: cifar10, stl10, ... or a source of timm "
        "that is read by index, such as hfds/NAME")
    add("--download", action="store_true", help="fetch --dataset if it is not in --data_path")
    add("--skip_bad_images", action="store_true", help="take the next image for one that cannot be decoded, and count them")
    add("--num_workers", type=utils.non_negative_int, default=10, help="processes that decode and crop, for each training process")
    add("--output_dir", type=Path, default=Path("."), help="where to write")
    add("--saveckp_freq", type=utils.non_negative_int, default=20, help="epochs between checkpoints that are kept, 0: keep none")
    add("--save_every", type=utils.positive_int, help="steps between checkpoints inside an epoch (default: at its end only)")
    add("--print_freq", type=utils.positive_int, default=10, help="steps between records")
    add("--knn_every", type=utils.positive_int, help="epochs between k-NN evaluations on --knn_data_path")
    add("--knn_data_path", type=Path, help="labelled images: a folder that holds train/ and val/ (or test/), each with class folders")
    utils.add_process_flags(parser)
    return complete_args(parser.parse_args(argv))


def _by_preset(text, name):
    return f"{text} (default: {', '.join(f'{recipe[name]} for {preset}' for preset, recipe in RECIPES.items())})"


def complete_args(args):
    """Fills in what other flags decide. UserError for flags that contradict each other."""
    def refuse(names, why):
        if given := [f"--{name}" for name in names if getattr(args, name) is not None]:
            raise utils.UserError(f"{', '.join(given)} cannot be used {why}; leave it out")

    if args.preset == "paper":
        refuse(RELEASED_ONLY, "with --preset paper, which has no softmax")
    else:
        refuse(PAPER_ONLY, f"with --preset {args.preset}, which fixes it")
        if args.teacher == "none":
            raise utils.UserError("--preset released-imagenet needs a teacher; leave --teacher none out")
    if args.learn == ["none"]:
        refuse(["weights_lr"], "with --learn none")
    if args.teacher == "none":
        refuse(TEACHER_ONLY, "with --teacher none, which trains on the two global views")
    if args.local_crops_number == 0:
        refuse(["local_crops_size", "local_crops_scale"], "with --local_crops_number 0")
    if args.arch not in VIT_ARCHS:
        refuse(VIT_ONLY, f"with --arch {args.arch}, which is none of the ViTs")
    if args.use_fp16 is not None:
        refuse(["amp"], "with --use_fp16")
    args.amp = args.amp or {None: "auto", True: "fp16", False: "none"}[args.use_fp16]
    args.use_fp16 = None  # said by --amp now
    for name, value in (RECIPES[args.preset] | DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.teacher == "none":
        args.local_crops_number = 0
    if args.arch not in VIT_ARCHS:
        args.patch_size = args.drop_path_rate = None
    args.learn, args.rand_augment = [*args.learn], None if args.rand_augment == "none" else args.rand_augment
    if "none" in args.learn and len(args.learn) > 1:
        raise utils.UserError("--learn none contradicts the other names behind --learn; give one of them")
    for name in ("global_crops_scale", "local_crops_scale", "blur_sigma"):
        low, high = getattr(args, name)
        if not 0 < low <= high or name != "blur_sigma" and high > 1:
            raise utils.UserError(f"--{name} needs 0 < MIN <= MAX{' <= 1' if name != 'blur_sigma' else ''}, got {low} {high}")
        setattr(args, name, [low, high])
    if not 0 <= args.erasing <= 1 or args.momentum_teacher > 1 or (args.drop_path_rate or 0) >= 1:
        raise utils.UserError("--erasing and --momentum_teacher must lie between 0 and 1, --drop_path_rate below 1")
    if args.patch_size and (odd := [size for size in (args.global_crops_size, args.local_crops_number and args.local_crops_size)
                                    if size % args.patch_size]):
        raise utils.UserError(f"crops of {odd[0]} pixels are no multiple of --patch_size {args.patch_size}; change one of them")
    if bool(args.knn_every) != bool(args.knn_data_path):
        raise utils.UserError("--knn_every and --knn_data_path need each other; give both")
    return args


# -------------------------------------------------------------------------------------------------------------------- data

def _checked(make, *args, **kwargs):
    """make(...), whose complaint about a flag's value is a UserError."""
    try:
        return make(*args, **kwargs)
    except ValueError as error:
        raise utils.UserError(str(error)) from error


class MultiCropImages(Dataset):
    """Training images by (index, seed): Crops, and the number of images skipped. UserError for one that cannot be decoded."""

    def __init__(self, args):
        self.crop = _checked(MultiCrop, args.global_crops_size, args.global_crops_scale, args.local_crops_size, args.local_crops_scale,
                             args.local_crops_number, args.rand_augment)
        self.skip_bad = args.skip_bad_images
        self.folder = args.data_path
        self.source = (utils.build_dataset(args.dataset, args.data_path, "train", download=args.download) if args.dataset
                       else find_images(args.data_path))
        if isinstance(self.source, IterableDataset):
            raise utils.UserError(f"{args.dataset} can only be read as a stream, which a resumed run cannot enter where it stopped; "
                                  "give a source that is read by index, or unpack it into a folder")
        names = args.dataset or "\n".join(self.source)
        self.fingerprint = [len(self), hashlib.sha256(names.encode()).hexdigest()]  # a resume must see the same data

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        index, seed = key
        for skipped in range(len(self) if self.skip_bad else 1):
            try:
                return self.crop(self._load((index + skipped) % len(self)), seed), skipped
            except utils.UserError as error:
                bad = error
        raise utils.UserError(f"{str(bad).partition(';')[0]}; replace it by an image of the same name, or add --skip_bad_images")

    def _load(self, index):
        item = self.source[index]
        return utils.load_image(self.folder / item) if isinstance(item, str) else item[0]


def find_images(folder):
    """Names of all image files below `folder`, relative to it, sorted. UserError if there are none."""
    if not folder.is_dir():
        raise utils.UserError(f"no folder {folder}; --data_path must name a folder of images")
    if all((folder / split).is_dir() for split in ("train", "val")):
        raise utils.UserError(f"{folder} holds train/ and val/: give the images to train on, --data_path {folder / 'train'}")
    files = sorted(os.path.relpath(os.path.join(place, name), folder) for place, _, names in os.walk(folder, followlinks=True)
                   for name in names if name.lower().endswith(IMG_EXTENSIONS))
    if not files:
        raise utils.UserError(f"no images in {folder}; --data_path must name a folder of images ({', '.join(IMG_EXTENSIONS)})")
    return files


def make_loader(run):
    """This rank's part of the batches that are left of the epoch. What a sample looks like depends on its index, the epoch and
    the seed alone: neither the worker nor the rank matters."""
    args, rank = run.args, utils.rank()
    batches = utils.epoch_batches(len(run.images), run.batch_size, args.seed, run.epoch, start=run.step * args.accum_iter)
    own = slice(rank * args.batch_size_per_gpu, (rank + 1) * args.batch_size_per_gpu)
    keys = ([(index, utils.stream_seed(args.seed, run.epoch, index)) for index in batch[own].tolist()] for batch in batches)
    return DataLoader(run.images, batch_sampler=keys, num_workers=args.num_workers,
                      pin_memory=run.device.type == "cuda", worker_init_fn=utils.leave_group)


# --------------------------------------------------------------------------------------------------------------------- run

class Run:
    """What a training run consists of, built from the flags: data, networks, objective, optimisers, and how far it has come."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.amp_dtype = utils.select_amp(args.amp, device)
        torch.backends.cudnn.deterministic = True
        self.criterion = build_criterion(args).to(device)
        self.images = MultiCropImages(args)
        self.batch_size = args.batch_size_per_gpu * utils.world_size()  # images the objective sees at once
        if self.batch_size < 2 or not self.criterion.gather and args.batch_size_per_gpu < 2:
            raise utils.UserError("negative pairs need two images: --batch_size_per_gpu must be at least 2")
        self.steps = len(self.images) // (self.batch_size * args.accum_iter)  # per epoch
        if self.steps == 0:
            raise utils.UserError(f"a step takes {args.batch_size_per_gpu} x {utils.world_size()} x {args.accum_iter} images, more than "
                                  f"the data set's {len(self.images)}; lower --batch_size_per_gpu or --accum_iter")
        self.augment = _checked(MultiCropAugmentation, args.erasing, args.blur_sigma)
        self.labelled = load_labelled(args)

        set_fused_attn(device.type != "cpu")  # on a CPU, torch's is up to 8 times as slow backwards as timm's plain one
        torch.manual_seed(args.seed)  # the same weights on all ranks
        self.student = build_network(args, args.drop_path_rate or 0.0).to(device, memory_format=torch.channels_last)
        self.teacher = None
        if args.teacher == "ema":
            self.teacher = make_teacher(args, self.student).to(device, memory_format=torch.channels_last)
        if args.grad_checkpointing:
            self.student.backbone.set_grad_checkpointing(True)
        if utils.world_size() > 1 and device.type == "cuda":  # torch has none for CPUs
            for part in filter(None, (self.student, self.teacher)):
                nn.SyncBatchNorm.convert_sync_batchnorm(part)
        self.network = torch.compile(self.student) if args.compile else self.student  # what the step calls
        if utils.world_size() > 1:
            self.network = DistributedDataParallel(self.network)
        self.optimizers = build_optimizers(args, self.student, self.criterion)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)

        self.epoch = self.step = 0  # the next to run; step counts within the epoch
        # Over the epoch so far: loss, positive and negative mean score, skipped images, steps, seconds, those of waiting for data
        self.sums = torch.zeros(7, dtype=torch.float64)
        self.noted_sums = self.sums.clone()  # at the last record

    def state_dict(self):
        args = self.args
        backbone = {"arch": args.arch, "patch_size": args.patch_size, "image_size": args.global_crops_size,
                    "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}  # what the evaluation scripts must know
        teacher = {"teacher": self.teacher.state_dict()} if self.teacher else {}
        return {"student": self.student.state_dict(), **teacher, "backbone": backbone, "loss": self.criterion.state_dict(),
                **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}, "scaler": self.scaler.state_dict(),
                "epoch": self.epoch, "step": self.step, "sums": self.sums, "noted_sums": self.noted_sums,
                "batch_size": self.batch_size, "data": self.images.fingerprint, "args": utils.plain(args)}

    def load_state_dict(self, state, path):
        """Goes on from the checkpoint `state`, read from `path`. UserError if it is of another network, batch or other data."""
        try:
            if state["data"] != self.images.fingerprint:
                raise utils.UserError(f"{path} was trained on other images: {state['data'][0]} there, {len(self.images)} here, or other "
                                      "names. Give the same data, or choose another --output_dir")
            local = "batch_size_per_gpu" if not self.criterion.gather else None
            if state["batch_size"] != self.batch_size or local and state["args"][local] != getattr(self.args, local):
                raise utils.UserError(f"{path} was trained on batches of {state['batch_size']} images, {state['args']['batch_size_per_gpu']} a "
                                      f"process; here they are {self.batch_size}, {self.args.batch_size_per_gpu} a process. On another "
                                      "number of processes change --batch_size_per_gpu, so that their product stays")
            self.student.load_state_dict(state["student"])
            if self.teacher:
                self.teacher.load_state_dict(state["teacher"])
            self.criterion.load_state_dict(state["loss"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state[name])
            self.scaler.load_state_dict(state["scaler"])
            for name in ("epoch", "step", "sums", "noted_sums"):
                setattr(self, name, state[name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise utils.UserError(f"{path} does not fit this script's network: {error!r}; move it away") from error

    def check_finite(self):
        """UserError if a weight or a buffer is not finite: nothing of it must be saved."""
        networks = filter(None, (self.student, self.teacher, self.criterion))
        if not all(torch.isfinite(x).all() for network in networks for x in network.state_dict().values()):
            raise utils.UserError(self.diverged("a weight"))

    def check_ranks_agree(self):
        """UserError if ranks found different checkpoints or images: they would train apart, or wait for one another for ever."""
        content = int(self.images.fingerprint[1][:15], 16)
        if not utils.same_over_ranks(self.epoch, self.step, self.steps, content):
            raise utils.UserError("the processes see different checkpoints or images; --output_dir and --data_path must be the same "
                                  "folders on all hosts")

    def diverged(self, what):
        return (f"training diverged: {what} is not finite at step {self.step} of epoch {self.epoch}; start anew with a lower --lr or "
                "--weights_lr. The last checkpoint is as it was")

    def autocast(self):
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def evaluated(self):
        """The backbone to evaluate and to export."""
        return (self.teacher or self.student).backbone


def build_criterion(args):
    """The objective that the flags describe."""
    given = {name: getattr(args, name) for name in PAPER_ONLY[:3] if getattr(args, name) is not None}
    return _checked(AUCCLLoss.preset, args.preset, learn=tuple(name for name in args.learn if name != "none"), **given)


def build_network(args, drop_path_rate):
    backbone = _checked(build_backbone, args.arch, args.patch_size or 16, args.global_crops_size, drop_path_rate)
    if args.arch.startswith("timm/"):
        check_sizes(args, backbone)
    return MultiCropNet(backbone, ProjectionHead(backbone.embed_dim, args.out_dim, use_bn=args.use_bn_in_head,
                                                 norm_last_layer=args.norm_last_layer))


@torch.no_grad()
def check_sizes(args, backbone):
    """UserError for crops of a size that a model of timm does not take."""
    for size in {args.global_crops_size, args.local_crops_size if args.local_crops_number else args.global_crops_size}:
        try:
            backbone.eval()(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise utils.UserError(f"{args.arch} cannot take crops of {size} pixels: {error}; change the crops' size") from error


def make_teacher(args, student):
    """A copy of the student without gradients and stochastic depth. Its batch norms normalise by the batch, as the student's, but
    their running statistics, like all that it holds, are moving averages of the student's."""
    teacher = build_network(args, drop_path_rate=0.0).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return teacher


def build_optimizers(args, student, criterion):
    """The network's optimiser and, if a, b or alpha are learned, Adam for them: of the three that --optimizer offers, not all can
    ascend, and a step for a network is none for a score. By the names they have in a checkpoint."""
    decayed, others = [], []  # others: biases, norms, and the gains of the head's last layer
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (others if parameter.ndim == 1 or name.endswith("original0") else decayed).append(parameter)
    make = {"adamw": lambda groups: torch.optim.AdamW(groups, fused=decayed[0].device.type in ("cpu", "cuda")),
            "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
            "lars": lambda groups: Lars(groups, momentum=0.9)}[args.optimizer]
    # The step sets the learning rates, and the first group's weight decay.
    optimizers = {"optimizer": make([{"params": decayed}, {"params": others, "weight_decay": 0.0}])}
    if groups := criterion.param_groups(args.weights_lr or 0.0, adaptive=True):
        optimizers["weights_optimizer"] = torch.optim.Adam(groups)
    return optimizers


# ---------------------------------------------------------------------------------------------------------------- training

def train_epoch(run, log, save, interruption):
    """One pass over the data; goes on at run.step, and leaves there if interrupted. `save()` writes a checkpoint."""
    args = run.args
    batches = iter(make_loader(run))
    while run.step < run.steps:
        started = time.monotonic()
        parts = [next(batches) for _ in range(args.accum_iter)]
        waited = time.monotonic() - started
        set_schedules(run)
        torch.manual_seed(utils.stream_seed(args.seed, utils.rank(), run.epoch, run.step))  # of stochastic depth
        totals = train_step(run, parts, stop=interruption.signal is not None)
        run.step += 1
        run.sums += torch.cat([totals[:4], totals.new_tensor([1, time.monotonic() - started, waited])])
        if run.step % args.print_freq == 0:
            record = make_record(run, run.sums - run.noted_sums, step=run.step)
            run.noted_sums = run.sums.clone()
            if log:
                log.write(record)
        if totals[4] > 0 or (args.save_every and run.step % args.save_every == 0 and run.step < run.steps):
            save()
        if totals[4] > 0:
            interruption.leave(f"saved after step {run.step}/{run.steps} of epoch {run.epoch}; the same command resumes")


def train_step(run, parts, stop):
    """One step of descent in the network, a and b and of ascent in alpha, then the teacher's, on `parts`, a batch for each
    gradient. Returns the means of loss, positive and negative score, the images skipped, and how many ranks want to `stop`:
    float64 [5], over all ranks."""
    args = run.args
    run.student.train()
    for optimizer in run.optimizers.values():
        optimizer.zero_grad()
    totals = torch.zeros(5, dtype=torch.float64)
    for number, (crops, skipped) in enumerate(parts, 1):
        crops = crops._replace(global_crops=crops.global_crops.to(run.device, non_blocking=True),
                               local_crops=crops.local_crops.to(run.device, non_blocking=True))
        views = [view.contiguous(memory_format=torch.channels_last) for view in run.augment(crops)]    # V of [B, 3, S, S]
        with run.network.no_sync() if number < len(parts) and utils.world_size() > 1 else nullcontext():
            with run.autocast():
                loss = compute_loss(run, views)
            run.scaler.scale(loss / len(parts)).backward()
        means = torch.stack([loss.detach(), *run.criterion.means]).double().cpu() / (len(parts) * utils.world_size())
        totals[:4] += torch.cat([means, skipped.sum()[None]])
    totals[4] = stop
    utils.sum_over_ranks(totals)
    if not totals.isfinite().all():
        raise utils.UserError(run.diverged("the loss"))

    for optimizer in run.optimizers.values():
        run.scaler.unscale_(optimizer)
    clip_gradients(run.student.parameters(), args.clip_grad)
    if run.epoch < args.freeze_last_layer:
        for parameter in run.student.head.last_layer.parameters():
            parameter.grad = None
    for optimizer in run.optimizers.values():
        run.scaler.step(optimizer)
    run.scaler.update()
    average_buffers(run.student)
    if run.teacher:
        update_teacher(run.teacher, run.student, run.momentum)
    return totals


def compute_loss(run, views):
    """The objective of the batch; `views`, the two global ones first, are [B, 3, S, S]."""
    if run.teacher is None:
        return run.criterion(*run.network(views))                              # [n, D], [n, D]
    with torch.no_grad():
        targets = run.teacher(views[:2])                                       # [2, n, D]
    return run.criterion.teacher_student(targets, run.network(views))          # [V, n, D]


@torch.no_grad()
def clip_gradients(parameters, max_norm):
    """Scales the gradient of each parameter by itself down to a norm of at most `max_norm`, as DINO does; 0 leaves them alone."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if max_norm and grads:
        norms = torch.stack(torch._foreach_norm(grads))
        torch._foreach_mul_(grads, (max_norm / (norms + 1e-6)).clamp(max=1).unbind())


@torch.no_grad()
def average_buffers(network):
    """Gives all ranks the mean of their batch norms' running statistics: without SyncBN each has its own."""
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    if buffers and utils.world_size() > 1:
        mean = utils.sum_over_ranks(torch.cat([buffer.flatten() for buffer in buffers])) / utils.world_size()
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


def set_schedules(run):
    """Learning rates, weight decay, the teacher's momentum and temperature of the step to come."""
    args = run.args
    at, total = run.epoch * run.steps + run.step, args.epochs * run.steps
    peak = args.lr * run.batch_size * args.accum_iter / 256
    lr = utils.cosine_schedule(at, total, peak, args.min_lr, round(args.warmup_epochs * run.steps))
    for group in run.optimizers["optimizer"].param_groups:
        group["lr"] = lr
    run.optimizers["optimizer"].param_groups[0]["weight_decay"] = utils.cosine_schedule(
        at, total, args.weight_decay, args.weight_decay_end)
    for group in run.optimizers["weights_optimizer"].param_groups if "weights_optimizer" in run.optimizers else ():
        group["lr"] = args.weights_lr * lr / peak
    run.momentum = utils.cosine_schedule(at, total, args.momentum_teacher, 1.0)
    if args.preset == "released-imagenet":
        part = min(1.0, run.epoch / max(1, args.warmup_teacher_temp_epochs))
        run.criterion.teacher_temp = args.warmup_teacher_temp + part * (args.teacher_temp - args.warmup_teacher_temp)


# ----------------------------------------------------------------------------------------------------- records, evaluation

def make_record(run, sums, **more):
    """The record of the steps that `sums` was taken over."""
    args = run.args
    steps = sums[4].item()
    loss, positive, negative, skipped, _, seconds, waited = (sums / steps).tolist()
    group = run.optimizers["optimizer"].param_groups[0]
    left = (args.epochs - run.epoch) * run.steps - run.step
    record = {"epoch": run.epoch, **more, "train_loss": loss, "train_lr": group["lr"], "train_wd": group["weight_decay"],
              "positive": positive, "negative": negative, **{name: getattr(run.criterion, name).item() for name in WEIGHTS},
              "images_per_s": run.batch_size * args.accum_iter / seconds, "data_wait": waited / seconds,
              "memory_gb": utils.peak_memory(run.device) / 1e9, "hours_left": left * seconds / 3600}
    return record | ({"skipped": round(skipped * steps)} if args.skip_bad_images else {})


def load_labelled(args):
    """The labelled images of --knn_data_path, training and test split, as the evaluation scripts see them; None without."""
    if not args.knn_data_path:
        return None
    transform = utils.eval_transform(args.global_crops_size, IMAGENET_MEAN, IMAGENET_STD)
    return utils.build_splits("folder", args.knn_data_path, transform)


@torch.no_grad()
def evaluate(run):
    """k-NN accuracy (k = 20) of the backbone's features on the labelled images: the teacher's, or the student's without one."""
    backbone = run.evaluated().eval()
    bank, queries = (extract_features(backbone, split, run.device, run.args.batch_size_per_gpu, run.args.num_workers, run.amp_dtype)
                     for split in run.labelled)
    backbone.train()
    top1, top5 = knn_accuracy(*bank, *queries, ks=(20,))[20]
    return {"knn_acc@1": top1, "knn_acc@5": top5}


def export_backbone(run, path):
    """The backbone alone, under timm's keys, in a file that runs no code when it is read."""
    from safetensors.torch import save
    tensors = {name: tensor.cpu().contiguous() for name, tensor in run.evaluated().state_dict().items()}
    content = save(tensors, metadata={"arch": run.args.arch})
    utils.replace_file(path, lambda file: file.write(content), "wb")


def main(argv=None):
    args = parse_args(argv)
    device = utils.init_distributed(args.device, args.dist_url)
    if args.amp == "auto":
        args.amp = "bf16" if utils.select_amp("auto", device) else "none"  # a resume elsewhere must do the same
    folder = utils.make_output_dir(args.output_dir)
    checkpoint = folder / "checkpoint.pth"
    state = utils.read_resume(args, folder, FREE_ON_RESUME)
    run = Run(args, device)
    fresh = state is None
    if not fresh:
        run.load_state_dict(state, checkpoint)
        del state  # as large as the run itself
    run.check_ranks_agree()
    log = utils.RunLog(folder, (run.epoch, run.step), run.steps) if utils.rank() == 0 else None
    interruption = utils.Interruption()
    if log:
        parameters = sum(p.numel() for p in run.student.parameters())
        print(f"{len(run.images)} images; {args.arch}, {parameters / 1e6:.1f} M parameters with the head; {utils.world_size()} x {device}, "
              f"{run.amp_dtype or torch.float32}; {run.steps} steps an epoch of {run.batch_size} x {args.accum_iter} images; epoch "
              f"{run.epoch}, step {run.step}; {folder}", flush=True)

    def save(name="checkpoint.pth"):
        run.check_finite()
        if utils.rank() == 0:
            utils.save_checkpoint(run.state_dict(), folder / name)
    if fresh:
        save()  # from now on a log has its checkpoint
    while run.epoch < args.epochs:
        train_epoch(run, log, save, interruption)
        run.check_finite()
        record = make_record(run, run.sums)
        if args.knn_every and ((run.epoch + 1) % args.knn_every == 0 or run.epoch + 1 == args.epochs):
            record |= evaluate(run)
        if log:
            log.write(record)
        run.epoch, run.step = run.epoch + 1, 0
        run.sums.zero_()
        run.noted_sums.zero_()
        if args.saveckp_freq and (run.epoch - 1) % args.saveckp_freq == 0:
            save(f"checkpoint{run.epoch - 1:04}.pth")
        save()  # last: a run killed before resumes in front of all that
    interruption.close()
    if log:
        export_backbone(run, folder / "backbone.safetensors")
        print(f"done: {folder / 'backbone.safetensors'}", flush=True)


if __name__ == "__main__":
    utils.run_script(main)
