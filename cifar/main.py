"""Trains AUC-CL on small images on one device, with k-NN accuracy after every epoch.

    python main.py                                                  # ResNet-50 on CIFAR-10, downloaded if missing
    python main.py --dataset shapes --arch small --epochs 20        # no download, minutes on a CPU
    python main.py --dataset folder --data_path DIR --arch small    # DIR/train/<class>/*, DIR/test/<class>/*
    python main.py --preset released-cifar                          # what the authors' released code optimises

The same command again resumes. Everything is written below --output_dir: checkpoint.pth, log.txt (a JSON record an epoch), the
same records as ..._statistics.csv and for TensorBoard, and curves.png at the end.
"""
import contextlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import utils  # noqa: E402
from auccl_loss import SCORES, WEIGHTS, AUCCLLoss, pair_auc  # noqa: E402
from augmentations import CIFAR_MEAN, CIFAR_STD, SimCLRAugmentation, normalize  # noqa: E402
from cifar.curves import draw_curves  # noqa: E402
from cifar.data import DATASETS, ImageData, load_data  # noqa: E402
from cifar.model import ARCHS, ContrastiveNet, extract_features  # noqa: E402
from eval_knn import knn_accuracy  # noqa: E402

HERE = Path(__file__).resolve().parent
# What a flag that is not given takes from --preset; the reasons for `paper`'s values stand in results/README.md.
RECIPES = {
    "paper": dict(projector=(2048, 1024), batch_size=256, epochs=200, lr=2e-3, schedule="cosine", warmup_epochs=2.0,
                  weight_decay=1e-4, crop_scale=(0.2, 1.0), weights_lr=1e-3, learn=WEIGHTS),
    "released-cifar": dict(projector=(512, 128), batch_size=128, epochs=500, lr=1e-3, schedule="constant", warmup_epochs=0.0,
                           weight_decay=1e-4, crop_scale=(0.08, 1.0), weights_lr=1e-3, learn=("b",)),
}
PAPER_ONLY = ("negative_weight", "margin_negative_weight", "score")  # arguments of AUCCLLoss that the release has fixed
FREE_ON_RESUME = ("output_dir", "data_path", "device", "save_every")
PAIR_IMAGES = 512  # test images whose pairs the AUC is taken over
EVAL_BATCH = 512
NOTE_EVERY = 10   # steps between looks at the loss, each of which waits for the device


def parse_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--preset", choices=RECIPES, default="paper", help="objective, and the defaults below that depend on it")
    add("--dataset", choices=DATASETS, default="cifar10", help="'folder': class folders of any images; 'shapes': drawn by code")
    add("--data_path", type=Path, help="the folder of --dataset folder, or where to download (default: datasets beside this script)")
    add("--image_size", type=utils.positive_int, help="pixels a side (default: 96 for stl10, else 32)")
    add("--arch", choices=ARCHS, default="resnet50", help="backbone; 'small' is for CPUs")
    add("--projector", type=utils.positive_int, nargs="+", help=_by_preset("widths of the projection head's layers", "projector"))
    add("--batch_size", type=utils.positive_int, help=_by_preset("images a batch, each seen in two views", "batch_size"))
    add("--accum_iter", type=utils.positive_int, default=1, help="batches whose gradients make one step")
    add("--epochs", type=utils.positive_int, help=_by_preset("passes over the data", "epochs"))
    add("--lr", type=utils.positive_float, help=_by_preset("learning rate of AdamW", "lr"))
    add("--schedule", choices=("cosine", "constant"), help=_by_preset("of the learning rates", "schedule"))
    add("--warmup_epochs", type=utils.non_negative_float, help=_by_preset("of linear warm-up", "warmup_epochs"))
    add("--weight_decay", type=utils.non_negative_float, help=_by_preset("of the network", "weight_decay"))
    add("--crop_scale", type=float, nargs=2, metavar=("MIN", "MAX"), help=_by_preset("share of the area in a crop", "crop_scale"))
    add("--weights_lr", type=utils.non_negative_float, help=_by_preset("learning rate of a, b and alpha", "weights_lr"))
    add("--learn", nargs="+", choices=(*WEIGHTS, "none"), help=_by_preset("which of a, b, alpha are learned", "learn"))
    add("--negative_weight", type=utils.number_or_sum, help="nu: a number, or 'sum' for the negatives per anchor (default: the loss's)")
    add("--margin_negative_weight", type=utils.number_or_sum, help="kappa, likewise (default: the loss's)")
    add("--score", choices=SCORES, help="of a pair (default: the loss's)")
    add("--nb_knn", type=utils.positive_int, default=200, help="neighbours that vote")
    add("--temperature", type=utils.positive_float, default=0.07, help="of the k-NN votes exp(cos / T)")
    add("--seed", type=utils.non_negative_int, default=0, help="of weights, order and augmentation")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--amp", choices=("auto", "bf16", "none"), default="auto", help="autocast; auto takes bf16 where the hardware has it")
    add("--compile", action="store_true", help="compile the network: minutes at the start, then faster steps")
    add("--save_every", type=utils.positive_int, help="steps between checkpoints inside an epoch (default: at its end only)")
    add("--output_dir", type=Path, help="where to write (default: results/DATASET_ARCH_PRESET_bBATCH_sSEED beside this script)")
    return complete_args(parser.parse_args(argv))


def complete_args(args):
    """Fills in what the preset decides. UserError for flags that contradict each other."""
    if args.learn == ["none"] and args.weights_lr is not None:
        raise utils.UserError("--weights_lr has nothing to step with --learn none; leave one of them out")
    if args.dataset == "shapes" and (args.data_path or args.image_size):
        raise utils.UserError("shapes are drawn by code, at 32 pixels; leave --data_path and --image_size out")
    if args.dataset == "folder" and not args.data_path:
        raise utils.UserError("--dataset folder needs --data_path DIR, a folder that holds train/ and test/")
    if args.image_size and not 8 <= args.image_size <= 1024:
        raise utils.UserError("--image_size must lie between 8 and 1024 pixels")
    if args.preset != "paper" and (given := [f"--{name}" for name in PAPER_ONLY if getattr(args, name) is not None]):
        raise utils.UserError(f"{', '.join(given)} cannot be used with --preset {args.preset}, which fixes it; use --preset paper")
    for name, value in RECIPES[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.learn, args.projector, args.crop_scale = list(args.learn), list(args.projector), list(args.crop_scale)
    if "none" in args.learn and len(args.learn) > 1:
        raise utils.UserError(f"--learn none contradicts --learn {' '.join(set(args.learn) - {'none'})}; give one of them")
    if not 0 < args.crop_scale[0] <= args.crop_scale[1] <= 1:
        raise utils.UserError("--crop_scale needs 0 < MIN <= MAX <= 1")
    if args.batch_size < 2:
        raise utils.UserError("--batch_size must be at least 2: negative pairs need two images")
    name = f"{args.dataset}_{args.arch}_{args.preset}_b{args.batch_size * args.accum_iter}_s{args.seed}"
    args.output_dir = (args.output_dir or HERE / "results" / name).resolve()
    args.data_path = args.data_path or HERE / "datasets"
    return args


def _by_preset(text, name):
    show = lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else value  # noqa: E731
    return f"{text} (default: {', '.join(f'{show(recipe[name])} for {preset}' for preset, recipe in RECIPES.items())})"


class Run:
    """What a training run consists of, built from the flags: data, network, objective, optimiser, and how far it has come.
    `data` and `criterion`, where given, take the place of those that the flags name."""

    def __init__(self, args, data: ImageData | None = None, criterion: torch.nn.Module | None = None):
        self.args = args
        self.device = utils.select_device(args.device)
        self.amp_dtype = utils.select_amp(args.amp, self.device)
        torch.backends.cudnn.deterministic = True  # the same command gives the same bits
        self.criterion = (criterion or build_criterion(args)).to(self.device)
        self.data = data or load_data(args.dataset, args.data_path, args.image_size)
        if len(self.data.test) < 2:
            raise utils.UserError(f"the test set has {len(self.data.test)} image; the AUC of its pairs needs at least two")
        self.fingerprint = fingerprint(self.data)  # a resume must see the same data
        self.steps = len(self.data.train) // (args.batch_size * args.accum_iter)  # per epoch
        if self.steps == 0:
            raise utils.UserError(f"a batch of {args.batch_size} x {args.accum_iter} images is larger than the data set's "
                                  f"{len(self.data.train)}; lower --batch_size or --accum_iter")
        torch.manual_seed(args.seed)
        self.model = ContrastiveNet(args.arch, args.projector).to(self.device, memory_format=torch.channels_last)
        self.network = torch.compile(self.model) if args.compile else self.model
        self.optimizer = torch.optim.AdamW([
            {"params": list(self.model.parameters()), "lr": args.lr, "weight_decay": args.weight_decay},
            *self.criterion.param_groups(args.weights_lr, adaptive=True)], fused=self.device.type in ("cpu", "cuda"))
        for group in self.optimizer.param_groups:
            group["base_lr"] = group["lr"]
        self.augment = SimCLRAugmentation(self.data.train.shape[-1], tuple(args.crop_scale))
        self.epoch = self.step = 0  # the next to run; step counts within the epoch
        self.sums = torch.zeros(3, device=self.device)  # of loss, positive and negative mean score over the epoch so far
        self.epoch_seconds = self.seconds = 0.0  # of this epoch's training; of whole epochs with evaluation

    def state_dict(self):
        backbone = {"arch": f"cifar/{self.args.arch}", "patch_size": None, "image_size": self.data.train.shape[-1],
                    "mean": list(CIFAR_MEAN), "std": list(CIFAR_STD)}  # what the evaluation scripts must know
        return {"student": self.model.state_dict(), "backbone": backbone, "loss": self.criterion.state_dict(),
                "optimizer": self.optimizer.state_dict(), "epoch": self.epoch, "step": self.step, "sums": self.sums,
                "epoch_seconds": self.epoch_seconds, "seconds": self.seconds, "data": self.fingerprint, "args": utils.plain(self.args)}

    def load_state_dict(self, state, path):
        """Goes on from the checkpoint `state`, read from `path`. UserError if it is of another network or other data."""
        try:
            if state["data"] != self.fingerprint:
                raise utils.UserError(f"{path} was trained on other images: {state['data'][0]} there, {self.fingerprint[0]} here, or "
                                      "other content. Give the same data, or choose another --output_dir")
            self.model.load_state_dict(state["student"])
            self.criterion.load_state_dict(state["loss"])
            self.optimizer.load_state_dict(state["optimizer"])
            for name in ("epoch", "step", "epoch_seconds", "seconds"):
                setattr(self, name, state[name])
            self.sums.copy_(state["sums"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise utils.UserError(f"{path} does not fit this script's network: {error!r}; move it away") from error

    def check_finite(self):
        """UserError if the loss or a weight is not finite: nothing of it must be saved."""
        tensors = (self.sums, *self.model.parameters(), *self.criterion.parameters())
        if not all(torch.isfinite(x).all() for x in tensors):
            raise utils.UserError(f"training diverged: the loss or a weight is not finite at step {self.step} of epoch "
                                  f"{self.epoch + 1}; start anew with a lower --lr or --weights_lr. The last checkpoint is as it was")

    def autocast(self):
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)


def fingerprint(data: ImageData) -> list[int]:
    """Two numbers that differ between different training images, but for chance."""
    return [len(data.train), data.train.sum(dtype=torch.int64).item()]


def build_criterion(args):
    """The objective that the flags describe. UserError for values that it refuses."""
    given = {name: getattr(args, name) for name in PAPER_ONLY if getattr(args, name) is not None}
    try:
        return AUCCLLoss.preset(args.preset, learn=tuple(name for name in args.learn if name != "none"), **given)
    except ValueError as error:
        raise utils.UserError(str(error)) from error


def train_epoch(run, save, interruption):
    """One pass over the data; goes on at run.step, and leaves there if interrupted. `save()` writes a checkpoint."""
    args = run.args
    run.model.train()
    batches = utils.epoch_batches(len(run.data.train), args.batch_size, args.seed, run.epoch, start=run.step * args.accum_iter)
    generator = torch.Generator()
    title = f"epoch {run.epoch + 1}/{args.epochs}"
    for step, note in utils.progress(range(run.step, run.steps), run.step, run.steps, title):
        started = time.monotonic()
        set_learning_rates(run, step)
        generator.manual_seed(utils.stream_seed(args.seed, run.epoch, step))
        run.optimizer.zero_grad()
        for _ in range(args.accum_iter):
            images = run.data.train[next(batches)].to(run.device, non_blocking=True)      # uint8 [B, 3, S, S]
            views = torch.cat(run.augment(images, generator))                             # [2B, 3, S, S]
            with run.autocast():
                z0, z1 = run.network(views.contiguous(memory_format=torch.channels_last)).chunk(2)  # [B, D] each
                loss = run.criterion(z0, z1)
            (loss / args.accum_iter).backward()
            run.sums += torch.stack([loss.detach(), *run.criterion.means]) / args.accum_iter
        run.optimizer.step()
        run.step = step + 1
        run.epoch_seconds += time.monotonic() - started
        if run.step % NOTE_EVERY == 0:
            note(f"loss {run.sums[0].item() / run.step:.4g}")
        if interruption.signal or (args.save_every and run.step % args.save_every == 0 and run.step < run.steps):
            save()
        if interruption.signal:
            interruption.leave(f"saved after step {run.step}/{run.steps} of epoch {run.epoch + 1}; the same command resumes")


def set_learning_rates(run, step):
    """The schedule's factor times each group's own rate: a linear warm-up, then a cosine to 0 or a constant."""
    args = run.args
    factor = utils.cosine_schedule(run.epoch * run.steps + step, args.epochs * run.steps, 1.0,
                                   final=1.0 if args.schedule == "constant" else 0.0,
                                   warmup_steps=round(args.warmup_epochs * run.steps))
    for group in run.optimizer.param_groups:
        group["lr"] = factor * group["base_lr"]


def features(run, images):
    """The backbone's features [N, F] of images uint8 [N, 3, S, S], without augmentation."""
    with run.autocast():
        rows = extract_features(run.model.backbone, (
            normalize(batch.to(run.device), CIFAR_MEAN, CIFAR_STD).contiguous(memory_format=torch.channels_last)
            for batch in images.split(EVAL_BATCH)))
    return rows.cpu() if run.device.type == "mps" else rows  # the k-NN votes in float64, which MPS lacks


@torch.no_grad()
def evaluate(run):
    """k-NN accuracy of the backbone's features, and the AUC of positive against negative pairs of embeddings, over a random
    choice of test images under two random views, the same ones in every epoch."""
    args, data = run.args, run.data
    top1, top5 = knn_accuracy(features(run, data.bank), data.bank_labels, features(run, data.test), data.test_labels,
                              ks=(args.nb_knn,), temperature=args.temperature)[args.nb_knn]
    generator = torch.Generator().manual_seed(utils.stream_seed(args.seed))
    chosen = torch.randperm(len(data.test), generator=generator)[:PAIR_IMAGES]  # class folders come sorted by class
    views = run.augment(data.test[chosen].to(run.device), generator)
    run.model.eval()
    with run.autocast():
        z0, z1 = (run.model(view.contiguous(memory_format=torch.channels_last)) for view in views)
    return {"test_acc@1": top1, "test_acc@5": top5, "test_auc": pair_auc(z0, z1)}


def make_record(run, evaluation):
    """The record of the epoch just trained: means over its steps, its evaluation, the weights, rates and times."""
    loss, positive, negative = (run.sums / run.steps).tolist()
    weights = {name: weight.item() for name, weight in run.criterion.named_parameters() if name in WEIGHTS}
    images = run.steps * run.args.batch_size * run.args.accum_iter
    return {"epoch": run.epoch, "train_loss": loss, **evaluation, "positive": positive, "negative": negative, **weights,
            "train_lr": run.optimizer.param_groups[0]["lr"], "images_per_s": images / run.epoch_seconds, "seconds": run.seconds}


def train(args, data: ImageData | None = None, criterion: torch.nn.Module | None = None) -> tuple[Run, list[dict]]:
    """Trains what the flags describe, or goes on with it, to the end; the finished run and its records, one an epoch.

    data, criterion: in place of those that the flags name. A criterion is called as criterion(z0, z1) and has, like AUCCLLoss,
        `param_groups` for its own parameters, if any, and after a call `means`, the mean positive and negative score.
    """
    folder = utils.make_output_dir(args.output_dir)
    checkpoint = folder / "checkpoint.pth"
    free = FREE_ON_RESUME + (("epochs",) if args.schedule == "constant" else ())  # a cosine depends on its length
    state = utils.read_resume(args, folder, free)
    run = Run(args, data, criterion)
    if state:
        run.load_state_dict(state, checkpoint)
    log = utils.RunLog(folder, (run.epoch, run.step), csv_name=f"{folder.name}_statistics.csv")
    parameters = sum(p.numel() for p in run.model.parameters())
    print(f"{args.dataset}: {len(run.data.train)} images; {args.arch}, {parameters / 1e6:.1f} M parameters; {run.device}, "
          f"{run.amp_dtype or torch.float32}; epoch {run.epoch}, step {run.step}; {folder}", flush=True)

    def save():
        run.check_finite()
        utils.save_checkpoint(run.state_dict(), checkpoint)
    with contextlib.closing(utils.Interruption()) as interruption:
        if state is None:
            save()  # from now on a log has its checkpoint
        while run.epoch < args.epochs:
            train_epoch(run, save, interruption)
            run.check_finite()
            started = time.monotonic()
            evaluation = evaluate(run)
            run.seconds += run.epoch_seconds + time.monotonic() - started
            log.write(make_record(run, evaluation))
            run.epoch, run.step, run.epoch_seconds = run.epoch + 1, 0, 0.0
            run.sums.zero_()
            save()
            if interruption.signal:
                interruption.leave(f"saved after epoch {run.epoch}; the same command resumes")
    if not log.records:
        raise utils.UserError(f"the run in {folder} is finished, but its log.txt is gone; choose another --output_dir to run it again")
    return run, log.records


def main(argv=None):
    args = parse_args(argv)
    _, records = train(args)
    curves = args.output_dir / "curves.png"
    draw_curves({args.output_dir.name: records}, curves)
    print(f"done: {utils.format_record(records[-1])}\ncurves: {curves}", flush=True)


if __name__ == "__main__":
    utils.run_script(main)
