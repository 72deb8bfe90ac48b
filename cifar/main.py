"""Trains AUC-CL on small images on one device, with k-NN accuracy after every epoch.

    python main.py                                                # ResNet-50, CIFAR-10 (fetched if absent)
    python main.py --preset released-cifar                        # what the authors' released code optimises
    python main.py --dataset folder --data_path DIR --arch small  # DIR/train/<class>/*, DIR/test/<class>/*
    python main.py --dataset shapes --arch tiny --projector 512 256 --batch_size 64 --epochs 14 --lr 1.2e-2

The last needs no download, and minutes on a CPU. The same command again resumes. --output_dir receives
checkpoint.pth, log.txt (a JSON record per epoch), the same records as ..._statistics.csv and for TensorBoard,
and curves.png at the end.
"""
import contextlib
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import utils  # noqa: E402
from utils import UserError, non_negative_float, positive_float, positive_int  # noqa: E402

# Defaults by preset; those of `paper` serve every preset that is not here. Reasons: results/README.md.
RECIPES = {
    "paper": dict(
        projector=(2048, 1024), batch_size=256, epochs=200, lr=2e-3, schedule="cosine", warmup_epochs=2.0,
        weight_decay=1e-4, crop_scale=(0.2, 1.0), weights_lr=1e-3),
    "released-cifar": dict(
        projector=(512, 128), batch_size=128, epochs=500, lr=1e-3, schedule="constant", warmup_epochs=0.0,
        weight_decay=1e-4, crop_scale=(0.08, 1.0), weights_lr=1e-3),
}
FREE_ON_RESUME = ("output_dir", "data_path", "deterministic", "device", "save_every")
PAIR_IMAGES = 512  # test images whose pairs the AUC is taken over
EVAL_BATCH = 512
NOTE_EVERY = 10    # steps between looks at the loss, each of which waits for the device


def parse_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    recipe = lambda text, name: utils.by_preset(text, RECIPES, name)  # noqa: E731
    utils.add_objective_flags(parser, RECIPES)
    add("--dataset", default="cifar10", help="cifar10, cifar100, stl10, ... (see data.py), folder for class "
        "folders, or shapes, drawn by code")
    add("--data_path", type=utils.path, help="root of --dataset (default: datasets beside this script)")
    add("--image_size", type=utils.number(int, 8, 1024), help="pixels a side (default: 32; stl10: 96)")
    add("--arch", default="resnet50", choices=("resnet18", "resnet34", "resnet50", "small", "tiny"),
        help="network for small images; for CPUs small or tiny")
    add("--init_weights", type=utils.path, help="file of a backbone's weights to start from")
    add("--projector", type=positive_int, nargs="+", help=recipe("widths of the head's layers", "projector"))
    add("--batch_size", type=utils.number(int, 2, 2**31), help=recipe("images per batch", "batch_size"))
    add("--views", type=utils.number(int, 2, 64), default=2, help="views of an image per step; the time of a "
        "step grows with them, images per second count images")
    add("--accum_iter", type=positive_int, default=1, help="gradient accumulation steps; negatives come from "
        "one batch, so it equals a larger batch in expectation, not in bits")
    add("--epochs", type=positive_int, help=recipe("passes over the data", "epochs"))
    add("--lr", type=positive_float, help=recipe("peak learning rate of AdamW", "lr"))
    add("--schedule", choices=("cosine", "constant"), help=recipe("learning rate schedule", "schedule"))
    add("--warmup_epochs", type=non_negative_float, help=recipe("linear warm-up epochs", "warmup_epochs"))
    add("--weight_decay", type=non_negative_float, help=recipe("the network's weight decay", "weight_decay"))
    add("--crop_scale", type=float, nargs=2, metavar=("MIN", "MAX"),
        help=recipe("share of the image's area in a crop", "crop_scale"))
    add("--nb_knn", type=positive_int, default=200, help="neighbours that vote")
    add("--temperature", type=positive_float, default=0.07, help="temperature T of their votes exp(cos / T)")
    add("--seed", type=utils.non_negative_int, default=0, help="seed of weights, order and augmentation")
    add("--deterministic", action="store_true", help="the same bits again on GPUs, too, with slower kernels")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--amp", choices=("auto", "bf16", "none"), default="auto", help="autocast; auto: bf16 if native")
    add("--compile", action="store_true", help="compile the network: minutes at the start, then faster steps")
    add("--save_every", type=positive_int, help="steps between checkpoints (default: one at an epoch's end)")
    add("--output_dir", type=utils.path,
        help="output folder (default: results/DATASET_ARCH_PRESET_bBATCH_sSEED beside this script)")
    args = parser.parse_args(argv)
    utils.complete_objective_flags(args, RECIPES)
    if args.views > 2 and args.preset == "released-cifar":
        raise UserError("--preset released-cifar takes two views; leave --views out")
    if args.dataset == "shapes":
        utils.refuse(args, ("data_path", "image_size"), "with --dataset shapes, which is drawn at 32 pixels")
    utils.check_range(args, "crop_scale", 1)
    batch = args.batch_size * args.accum_iter
    name = f"{args.dataset}_{args.arch}_{args.preset}_b{batch}_s{args.seed}".replace("/", "-")
    args.output_dir = (args.output_dir or HERE / "results" / name).resolve()
    args.data_path = args.data_path or (None if args.dataset == "folder" else HERE / "datasets")
    return args


if __name__ == "__main__":
    utils.check_flags(parse_args)

import torch  # noqa: E402

import distributed  # noqa: E402
from auccl_loss import pair_auc  # noqa: E402
from augmentations import CIFAR_MEAN, CIFAR_STD, SimCLRAugmentation, normalize  # noqa: E402
from cifar.curves import draw_curves  # noqa: E402
from cifar.data import ImageData, load_data  # noqa: E402
from eval_knn import knn_accuracy  # noqa: E402
from pretrained import Description, init_backbones  # noqa: E402
from vision_transformer import MultiCropNet, build_backbone, mlp_head  # noqa: E402


class Run:
    """A training run, built from the flags: data, network, objective, optimiser, and how far it has come.
    `data` and `criterion`, where given, replace those that the flags name."""

    def __init__(self, args, data: ImageData | None = None, criterion: torch.nn.Module | None = None):
        self.args = args
        self.device = utils.select_device(args.device)
        self.amp_dtype = utils.select_amp(args.amp, self.device)
        utils.set_backends(self.device, args.deterministic)
        torch.manual_seed(args.seed)
        self.criterion = (criterion or utils.build_criterion(args)).to(self.device)
        with utils.user_errors():
            backbone = build_backbone(f"cifar/{args.arch}")
        self.model = MultiCropNet(backbone, mlp_head(backbone.embed_dim, args.projector))
        self.model.to(self.device, memory_format=utils.memory_format(self.model, self.device, self.amp_dtype))
        self.network = torch.compile(self.model) if args.compile else self.model
        self.data = data or load_data(args.dataset, args.data_path, args.image_size)
        self.data_checksum = [len(self.data.train), self.data.train.sum(dtype=torch.int64).item()]
        self.augment = SimCLRAugmentation(self.data.train.shape[-1], args.crop_scale)
        self.description = Description(f"cifar/{args.arch}", None, self.augment.size, CIFAR_MEAN, CIFAR_STD)
        self.images_per_step = args.batch_size * args.accum_iter
        self.steps = utils.steps_per_epoch(len(self.data.train), self.images_per_step,
                                           "--batch_size or --accum_iter")
        self.optimizer = torch.optim.AdamW([
            {"params": list(self.model.parameters()), "lr": args.lr, "weight_decay": args.weight_decay},
            *self.criterion.param_groups(args.weights_lr)], fused=self.device.type in ("cpu", "cuda"))
        for group in self.optimizer.param_groups:
            group["base_lr"] = group["lr"]
        self.epoch = self.step = 0  # the next to run; step counts within the epoch
        self.sums = torch.zeros(3, device=self.device)  # over the epoch: loss, positive and negative mean
        self.epoch_seconds = self.seconds = 0.0         # this epoch's training; all epochs with evaluation

    def state_dict(self):
        return {"student": self.model.state_dict(), "backbone": self.description._asdict(),
                "loss": self.criterion.state_dict(), "optimizer": self.optimizer.state_dict(),
                "epoch": self.epoch, "step": self.step, "sums": self.sums,
                "epoch_seconds": self.epoch_seconds, "seconds": self.seconds,
                "data": self.data_checksum, "args": utils.plain(self.args)}

    def load_state_dict(self, state, path):
        """Resumes from the checkpoint `state`, read from `path`. UserError if its network or data differ."""
        parts = {"student": self.model, "loss": self.criterion, "optimizer": self.optimizer}
        utils.load_parts(state, parts, path)
        utils.check_same_data(state, self.data_checksum, path)
        self.sums.copy_(state["sums"])
        for name in ("epoch", "step", "epoch_seconds", "seconds"):
            setattr(self, name, state[name])

    def check_finite(self):
        """UserError if the loss or a weight is not finite: nothing of it must be saved."""
        tensors = (self.sums, *self.model.parameters(), *self.criterion.parameters())
        if not all(torch.isfinite(x).all() for x in tensors):
            raise UserError(utils.diverged("the loss or a weight", self.epoch, self.step - 1))


def train_one_epoch(run, save, interruption):
    """One pass over the data, from run.step on; exits early if interrupted. `save()` writes a checkpoint."""
    args = run.args
    run.model.train()
    batches = utils.epoch_batches(len(run.data.train), args.batch_size, args.seed, run.epoch,
                                  start=run.step * args.accum_iter)
    generator = torch.Generator()
    bar = utils.progress(range(run.step, run.steps), run.step, run.steps,
                         f"epoch {run.epoch + 1}/{args.epochs}")
    for step in bar:
        started = time.monotonic()
        set_learning_rates(run, step)
        generator.manual_seed(utils.stream_seed(args.seed, run.epoch, step))
        run.optimizer.zero_grad()
        for _ in range(args.accum_iter):
            images = utils.send(run.data.train[next(batches)], run.device)     # uint8 [B, 3, S, S]
            views = run.augment(images, generator, args.views)                 # V of [B, 3, S, S]
            with utils.autocast(run.device, run.amp_dtype):
                loss = run.criterion(*run.network(views))                      # [V, B, D] -> scalar
            (loss / args.accum_iter).backward()               # network, a, b descend; alpha ascends
            run.sums += torch.stack([loss.detach(), *run.criterion.means]) / args.accum_iter
        run.optimizer.step()
        run.step = step + 1
        run.epoch_seconds += time.monotonic() - started
        if run.step % NOTE_EVERY == 0:
            bar.set_postfix_str(f"loss {run.sums[0].item() / run.step:.4g}", refresh=False)
        due = args.save_every and run.step % args.save_every == 0 and run.step < run.steps
        interrupted = interruption.signal  # read once: a signal that comes later waits for the next step
        if due or interrupted:
            save()
        if interrupted:
            interruption.exit(run)


def set_learning_rates(run, step):
    """Scales each group's own rate: a linear warm-up, then a cosine to 0 or a constant."""
    args = run.args
    factor = utils.cosine_schedule(run.epoch * run.steps + step, args.epochs * run.steps, 1.0,
                                   final=1.0 if args.schedule == "constant" else 0.0,
                                   warmup_steps=round(args.warmup_epochs * run.steps))
    for group in run.optimizer.param_groups:
        group["lr"] = factor * group["base_lr"]


@torch.inference_mode()
def features(run, images):
    """The backbone's features [N, F] of images uint8 [N, 3, S, S], without augmentation."""
    backbone = run.model.backbone.eval()
    with utils.autocast(run.device, run.amp_dtype):
        return torch.cat([backbone(normalize(batch.to(run.device), CIFAR_MEAN, CIFAR_STD)).float()
                          for batch in images.split(EVAL_BATCH)])


@torch.inference_mode()
def evaluate(run):
    """k-NN accuracy of the backbone's features, and the AUC of positive against negative pairs of embeddings.
    The pairs are of two views of a random choice of test images, the same in every epoch."""
    args, data = run.args, run.data
    top1, top5 = knn_accuracy(features(run, data.bank), data.bank_labels, features(run, data.test),
                              data.test_labels, ks=(args.nb_knn,), temperature=args.temperature)[args.nb_knn]
    generator = torch.Generator().manual_seed(utils.stream_seed(args.seed))
    chosen = torch.randperm(len(data.test), generator=generator)[:PAIR_IMAGES]  # sets come sorted by class
    views = run.augment(data.test[chosen].to(run.device), generator)
    with utils.autocast(run.device, run.amp_dtype):
        z0, z1 = run.model.eval()(views)
    return {"test_acc@1": top1, "test_acc@5": top5, "test_auc": pair_auc(z0, z1)}


def make_record(run):
    """The record of the epoch just trained: means over its steps, evaluation, the objective's weights, times.
    Before the first step, that of the untrained network: epoch -1, None for what only training gives."""
    started, trained = time.monotonic(), run.step > 0
    evaluation = evaluate(run)
    loss, positive, negative = (run.sums / run.steps).tolist() if trained else 3 * [None]
    weights = {name: x.item() for name, x in run.criterion.named_parameters() if name in ("a", "b", "alpha")}
    run.seconds += run.epoch_seconds + time.monotonic() - started
    return {"epoch": run.epoch if trained else -1, "train_loss": loss, **evaluation,
            "positive": positive, "negative": negative, **weights,
            "train_lr": run.optimizer.param_groups[0]["lr"] if trained else None,
            "images_per_s": run.step * run.images_per_step / run.epoch_seconds if trained else None,
            "seconds": run.seconds}


def train_epochs(run, checkpoint, log):
    """Trains to the last epoch, with a record and a checkpoint after each."""
    def save():
        run.check_finite()
        utils.save_checkpoint(run.state_dict(), checkpoint)

    with contextlib.closing(utils.Interruption()) as interruption:
        if not checkpoint.exists():
            save()  # read_resume refuses a log without a checkpoint
        if run.epoch == run.step == 0 and not log.records:
            log.write(make_record(run))
        while run.epoch < run.args.epochs:
            train_one_epoch(run, save, interruption)
            save()  # a signal or a fault during the evaluation loses no step
            log.write(make_record(run))
            run.epoch, run.step, run.epoch_seconds = run.epoch + 1, 0, 0.0
            run.sums.zero_()
            save()
            if interruption.signal:
                interruption.exit(run)


def train(args, data: ImageData | None = None, criterion: torch.nn.Module | None = None):
    """Trains what the flags describe to the end, or resumes it. Returns the finished Run and its records.

    data, criterion: replace those that the flags name. A criterion is called with the V views' embeddings
        as criterion(z0, z1, ...) and has, like AUCCLLoss, `param_groups(lr)` for its own parameters, if any,
        and after a call `means`, the mean positive and negative score.
    """
    utils.settle_amp(args, distributed.init_distributed(args.device))
    if distributed.world_size() > 1:
        raise UserError("cifar/main.py trains on one device; start it without a launcher")
    criterion = criterion or utils.build_criterion(args)  # sets args.learn, which a resume compares
    folder, checkpoint = args.output_dir, args.output_dir / "checkpoint.pth"
    free = FREE_ON_RESUME + ("epochs",) * (args.schedule == "constant")  # a cosine depends on its length
    with contextlib.closing(utils.lock_folder(folder)):
        state = utils.read_resume(args, checkpoint, free)
        run = Run(args, data, criterion)
        if state:
            run.load_state_dict(state, checkpoint)
        elif args.init_weights:
            init_backbones([run.model.backbone], args.init_weights, run.description)
        if run.epoch < args.epochs:
            backbone, head = map(utils.millions, (run.model.backbone, run.model.head))
            utils.announce(run, f"{args.dataset}: {len(run.data.train)} images; {args.arch} with {backbone} "
                           f"M parameters and a head with {head} M")
            log = utils.RunLog(folder, (run.epoch, run.step), table=f"{folder.name}_statistics.csv")
            train_epochs(run, checkpoint, log)
            log.board.close()  # else each run of a study leaves a thread and an open file
            return run, log.records
        print(f"the run in {folder} is finished, after {run.epoch} epochs")
        return run, utils.read_records(folder / "log.txt")


def main(argv=None):
    args = parse_args(argv)
    _, records = train(args)
    if records:
        curves = args.output_dir / "curves.png"
        title = (f"{args.dataset}, {args.arch}, {args.preset}, batch {args.batch_size * args.accum_iter}, "
                 f"lr {args.lr:g}, {args.epochs} epochs, seed {args.seed}")
        draw_curves({args.output_dir.name: records}, curves, title)
        print(f"curves: {curves}", flush=True)


if __name__ == "__main__":
    utils.run_script(main)
