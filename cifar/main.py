"""Trains AUC-CL on small images on one device, with k-NN accuracy after every epoch.

    python main.py                                                  # ResNet-50 on CIFAR-10, downloaded if missing
    python main.py --dataset shapes --arch tiny --epochs 20         # no download, minutes on a CPU
    python main.py --dataset folder --data_path DIR --arch small    # DIR/train/<class>/*, DIR/test/<class>/*
    python main.py --preset released-cifar                          # what the authors' released code optimises

The same command again resumes. Written below --output_dir: checkpoint.pth, log.txt (a JSON record per epoch), the
same records as ..._statistics.csv and for TensorBoard, and curves.png at the end.
"""
import contextlib
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import utils  # noqa: E402

# Defaults by preset; the reasons for `paper`'s values stand in results/README.md.
RECIPES = {
    "paper": dict(projector=(2048, 1024), batch_size=256, epochs=200, lr=2e-3, schedule="cosine", warmup_epochs=2.0,
                  weight_decay=1e-4, crop_scale=(0.2, 1.0), weights_lr=1e-3, learn=("a", "b", "alpha")),
    "released-cifar": dict(projector=(512, 128), batch_size=128, epochs=500, lr=1e-3, schedule="constant",
                           warmup_epochs=0.0, weight_decay=1e-4, crop_scale=(0.08, 1.0), weights_lr=1e-3, learn=("b",)),
}
FREE_ON_RESUME = ("output_dir", "data_path", "device", "save_every")
PAIR_IMAGES = 512  # test images whose pairs the AUC is taken over
EVAL_BATCH = 512
NOTE_EVERY = 10    # steps between looks at the loss, each of which waits for the device


def parse_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    recipe = lambda text, name: utils.by_preset(text, RECIPES, name)  # noqa: E731
    utils.add_objective_flags(parser, RECIPES)
    add("--dataset", default="cifar10", help="cifar10, cifar100, stl10 or another set of data.py; folder: class folders "
        "of any images; shapes: drawn by code")
    add("--data_path", type=utils.path, help="folder of --dataset folder, or where to download (default: datasets beside "
        "this script)")
    add("--image_size", type=utils.number(int, 8, 1024), help="pixels a side (default: 96 for stl10, else 32)")
    add("--arch", default="resnet50", help="resnet18, resnet34, resnet50; small (1.2 M parameters) or tiny (0.08 M), for CPUs")
    add("--projector", type=utils.positive_int, nargs="+", help=recipe("widths of the projection head's layers", "projector"))
    add("--batch_size", type=utils.number(int, 2, 2**31), help=recipe("images per batch, each in two views", "batch_size"))
    add("--accum_iter", type=utils.positive_int, default=1, help="gradient accumulation steps; negatives come from one "
        "batch, so it equals a larger batch in expectation, not in bits")
    add("--epochs", type=utils.positive_int, help=recipe("passes over the data", "epochs"))
    add("--lr", type=utils.positive_float, help=recipe("peak learning rate of AdamW", "lr"))
    add("--schedule", choices=("cosine", "constant"), help=recipe("learning rate schedule", "schedule"))
    add("--warmup_epochs", type=utils.non_negative_float, help=recipe("linear warm-up epochs", "warmup_epochs"))
    add("--weight_decay", type=utils.non_negative_float, help=recipe("weight decay of the network", "weight_decay"))
    add("--crop_scale", type=float, nargs=2, metavar=("MIN", "MAX"), help=recipe("area of a crop, as a share of the image", "crop_scale"))
    add("--nb_knn", type=utils.positive_int, default=200, help="neighbours that vote")
    add("--temperature", type=utils.positive_float, default=0.07, help="temperature of the k-NN votes exp(cos / T)")
    add("--seed", type=utils.non_negative_int, default=0, help="seed of weights, order and augmentation")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--amp", choices=("auto", "bf16", "none"), default="auto", help="autocast; auto: bf16 where the hardware has it")
    add("--compile", action="store_true", help="compile the network: minutes at the start, then faster steps")
    add("--save_every", type=utils.positive_int, help="steps between checkpoints inside an epoch (default: at its end only)")
    add("--output_dir", type=utils.path, help="output folder (default: results/DATASET_ARCH_PRESET_bBATCH_sSEED beside "
        "this script)")
    args = parser.parse_args(argv)
    utils.complete_objective_flags(args, RECIPES)
    if args.dataset == "shapes":
        utils.refuse(args, ("data_path", "image_size"), "with --dataset shapes, which is drawn by code at 32 pixels")
    utils.check_range(args, "crop_scale", 1)
    dataset = args.dataset.replace("/", "-")
    name = f"{dataset}_{args.arch}_{args.preset}_b{args.batch_size * args.accum_iter}_s{args.seed}"
    args.output_dir = (args.output_dir or HERE / "results" / name).resolve()
    args.data_path = args.data_path or (None if args.dataset == "folder" else HERE / "datasets")
    return args


if __name__ == "__main__":
    utils.check_flags(parse_args)

import torch  # noqa: E402

import distributed  # noqa: E402
from auccl_loss import AUCCLLoss, pair_auc  # noqa: E402
from augmentations import CIFAR_MEAN, CIFAR_STD, SimCLRAugmentation, normalize  # noqa: E402
from cifar.curves import draw_curves  # noqa: E402
from cifar.data import ImageData, load_data  # noqa: E402
from eval_knn import knn_accuracy  # noqa: E402
from vision_transformer import MultiCropNet, build_backbone, mlp_head  # noqa: E402


class Run:
    """A training run, built from the flags: data, network, objective, optimiser, and how far it has come. `data` and
    `criterion`, where given, replace those that the flags name."""

    def __init__(self, args, data: ImageData | None = None, criterion: torch.nn.Module | None = None):
        self.args = args
        self.device = distributed.init_distributed(args.device)
        if distributed.world_size() > 1:
            raise utils.UserError("cifar/main.py trains on one device; start it without a launcher")
        self.amp_dtype = utils.select_amp(args.amp, self.device)
        torch.backends.cudnn.deterministic = True  # the same command gives the same bits
        torch.manual_seed(args.seed)
        with utils.user_errors():
            criterion = criterion or AUCCLLoss.preset(args.preset, **utils.objective_arguments(args))
            backbone = build_backbone(f"cifar/{args.arch}")
            self.augment = SimCLRAugmentation(args.image_size or 32, tuple(args.crop_scale))
        self.criterion = criterion.to(self.device)
        model = MultiCropNet(backbone, mlp_head(backbone.embed_dim, args.projector))
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.network = torch.compile(self.model) if args.compile else self.model
        self.data = data or load_data(args.dataset, args.data_path, args.image_size)
        self.augment.size = self.data.train.shape[-1]
        self.data_checksum = [len(self.data.train), self.data.train.sum(dtype=torch.int64).item()]
        self.steps = len(self.data.train) // (args.batch_size * args.accum_iter)  # per epoch
        if self.steps == 0:
            raise utils.UserError(f"a batch of {args.batch_size} x {args.accum_iter} images is larger than the data set's "
                                  f"{len(self.data.train)}; lower --batch_size or --accum_iter")
        self.optimizer = torch.optim.AdamW([
            {"params": list(self.model.parameters()), "lr": args.lr, "weight_decay": args.weight_decay},
            *self.criterion.param_groups(args.weights_lr or 0.0)], fused=self.device.type in ("cpu", "cuda"))
        for group in self.optimizer.param_groups:
            group["base_lr"] = group["lr"]
        self.epoch = self.step = 0  # the next to run; step counts within the epoch
        self.sums = torch.zeros(3, device=self.device)  # of loss, positive and negative mean score over the epoch so far
        self.epoch_seconds = self.seconds = 0.0         # of this epoch's training; of whole epochs with evaluation

    def state_dict(self):
        backbone = {"arch": f"cifar/{self.args.arch}", "patch_size": None, "image_size": self.data.train.shape[-1],
                    "mean": list(CIFAR_MEAN), "std": list(CIFAR_STD)}  # what the evaluation scripts must know
        return {"student": self.model.state_dict(), "backbone": backbone, "loss": self.criterion.state_dict(),
                "optimizer": self.optimizer.state_dict(), "epoch": self.epoch, "step": self.step, "sums": self.sums,
                "epoch_seconds": self.epoch_seconds, "seconds": self.seconds, "data": self.data_checksum,
                "args": utils.plain(self.args)}

    def load_state_dict(self, state, path):
        """Resumes from the checkpoint `state`, read from `path`. UserError if it is of another network or other data."""
        utils.check_same_data(state, self.data_checksum, path)
        utils.load_parts(state, {"student": self.model, "loss": self.criterion, "optimizer": self.optimizer}, path)
        self.sums.copy_(state["sums"])
        for name in ("epoch", "step", "epoch_seconds", "seconds"):
            setattr(self, name, state[name])

    def check_finite(self):
        """UserError if the loss or a weight is not finite: nothing of it must be saved."""
        tensors = (self.sums, *self.model.parameters(), *self.criterion.parameters())
        if not all(torch.isfinite(x).all() for x in tensors):
            raise utils.UserError(utils.diverged("the loss or a weight", self.epoch, self.step))


def train_one_epoch(run, save, interruption):
    """One pass over the data, from run.step on; exits early if interrupted. `save()` writes a checkpoint."""
    args = run.args
    run.model.train()
    batches = utils.epoch_batches(len(run.data.train), args.batch_size, args.seed, run.epoch, run.step * args.accum_iter)
    generator = torch.Generator()
    bar = utils.progress(range(run.step, run.steps), run.step, run.steps, f"epoch {run.epoch + 1}/{args.epochs}")
    for step in bar:
        started = time.monotonic()
        set_learning_rates(run, step)
        generator.manual_seed(utils.stream_seed(args.seed, run.epoch, step))
        run.optimizer.zero_grad()
        for _ in range(args.accum_iter):
            images = run.data.train[next(batches)].to(run.device, non_blocking=True)      # uint8 [B, 3, S, S]
            views = run.augment(images, generator)                                        # 2 of [B, 3, S, S]
            with utils.autocast(run.device, run.amp_dtype):
                loss = run.criterion(*run.network(views))                                 # [2, B, D] -> scalar
            (loss / args.accum_iter).backward()                   # network, a, b descend; alpha ascends
            run.sums += torch.stack([loss.detach(), *run.criterion.means]) / args.accum_iter
        run.optimizer.step()
        run.step = step + 1
        run.epoch_seconds += time.monotonic() - started
        if run.step % NOTE_EVERY == 0:
            bar.set_postfix_str(f"loss {run.sums[0].item() / run.step:.4g}")
        if interruption.signal or (args.save_every and run.step % args.save_every == 0 and run.step < run.steps):
            save()
        if interruption.signal:
            interruption.exit(f"saved after step {run.step}/{run.steps} of epoch {run.epoch + 1}; the same command resumes")


def set_learning_rates(run, step):
    """The schedule's factor times each group's own rate: a linear warm-up, then a cosine to 0 or a constant."""
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
        rows = [backbone(normalize(batch.to(run.device), CIFAR_MEAN, CIFAR_STD)
                         .contiguous(memory_format=torch.channels_last)).float() for batch in images.split(EVAL_BATCH)]
    return torch.cat(rows)


@torch.inference_mode()
def evaluate(run):
    """k-NN accuracy of the backbone's features, and the AUC of positive against negative pairs of embeddings over a
    random choice of test images under two random views, the same ones in every epoch."""
    args, data = run.args, run.data
    top1, top5 = knn_accuracy(features(run, data.bank), data.bank_labels, features(run, data.test), data.test_labels,
                              ks=(args.nb_knn,), temperature=args.temperature)[args.nb_knn]
    generator = torch.Generator().manual_seed(utils.stream_seed(args.seed))
    chosen = torch.randperm(len(data.test), generator=generator)[:PAIR_IMAGES]  # class folders come sorted by class
    views = run.augment(data.test[chosen].to(run.device), generator)
    with utils.autocast(run.device, run.amp_dtype):
        z0, z1 = run.model.eval()(views)
    return {"test_acc@1": top1, "test_acc@5": top5, "test_auc": pair_auc(z0, z1)}


def make_record(run, evaluation):
    """The record of the epoch just trained: means over its steps, its evaluation, the weights, rates and times."""
    loss, positive, negative = (run.sums / run.steps).tolist()
    images = run.steps * run.args.batch_size * run.args.accum_iter
    return {"epoch": run.epoch, "train_loss": loss, **evaluation, "positive": positive, "negative": negative,
            **weights(run), "train_lr": run.optimizer.param_groups[0]["lr"],
            "images_per_s": images / run.epoch_seconds, "seconds": run.seconds}


def weights(run):
    return {name: weight.item() for name, weight in run.criterion.named_parameters() if name in ("a", "b", "alpha")}


def train(args, data: ImageData | None = None, criterion: torch.nn.Module | None = None) -> tuple[Run, list[dict]]:
    """Trains what the flags describe to the end, or resumes it; the finished run and its records, one per epoch.

    data, criterion: replace those that the flags name. A criterion is called as criterion(z0, z1) and has, like
        AUCCLLoss, `param_groups(lr)` for its own parameters, if any, and after a call `means`, the mean positive and
        negative score.
    """
    folder = args.output_dir
    checkpoint = folder / "checkpoint.pth"
    free = FREE_ON_RESUME + (("epochs",) if args.schedule == "constant" else ())  # a cosine depends on its length
    with contextlib.closing(utils.lock_folder(folder)):
        state = utils.read_resume(args, checkpoint, free)
        run = Run(args, data, criterion)
        if state:
            run.load_state_dict(state, checkpoint)
        log = utils.RunLog(folder, (run.epoch, run.step), table=f"{folder.name}_statistics.csv")
        if run.epoch >= args.epochs:
            print(f"the run in {folder} is finished, after {run.epoch} epochs")
            return run, log.records
        print(f"{args.dataset}: {len(run.data.train)} images; {args.arch} with {utils.millions(run.model.backbone)} M "
              f"parameters and a head with {utils.millions(run.model.head)} M; {run.device}, "
              f"{run.amp_dtype or torch.float32}; {run.steps} steps per epoch\nfrom epoch {run.epoch + 1}, step {run.step + 1}, "
              f"to epoch {args.epochs}; {folder}", flush=True)
        if args.warmup_epochs >= args.epochs:
            print(f"note: --warmup_epochs {args.warmup_epochs:g} outlasts --epochs {args.epochs}: the learning rate ends "
                  "below its peak")

        def save():
            run.check_finite()
            utils.save_checkpoint(run.state_dict(), checkpoint)
        with contextlib.closing(utils.Interruption()) as interruption:
            if state is None:
                save()  # from now on a log has its checkpoint
            if (run.epoch, run.step) == (0, 0):
                log.write({"epoch": -1, **evaluate(run), **weights(run)})  # the untrained network
            while run.epoch < args.epochs:
                train_one_epoch(run, save, interruption)
                run.check_finite()
                started = time.monotonic()
                evaluation = evaluate(run)
                run.seconds += run.epoch_seconds + time.monotonic() - started
                log.write(make_record(run, evaluation))
                run.epoch, run.step, run.epoch_seconds = run.epoch + 1, 0, 0.0
                run.sums.zero_()
                save()
                if interruption.signal:
                    interruption.exit(f"saved after epoch {run.epoch}; the same command resumes")
    return run, log.records


def main(argv=None):
    args = parse_args(argv)
    _, records = train(args)
    curves = args.output_dir / "curves.png"
    draw_curves({args.output_dir.name: records}, curves)
    print(f"curves: {curves}", flush=True)


if __name__ == "__main__":
    utils.run_script(main)
