"""What scripts share: user errors, flags, device, autocast, seeds, schedules, checkpoints, log, interruption.

torch is imported inside the functions that need it, so that --help and a mistaken flag are answered at once.
"""
import argparse
import contextlib
import csv
import json
import math
import os
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np

OBJECTIVE = "negative_weight", "margin_negative_weight", "score"  # arguments of AUCCLLoss that are flags
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
LOST_RANK = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out")


# ------------------------------------------------------------------------------------------------ user errors

class UserError(Exception):
    """Invalid user input, reported in one line: what is wrong, then what to do."""

    def __init__(self, message: str):
        own = message.rsplit("UserError: ", 1)[-1]  # a loader's worker prepends its traceback
        super().__init__(" ".join(own.split()))


def run_script(main) -> None:
    """Calls main(). Invalid input and file errors end in one line and exit code 2, the loss of another rank
    in one line and exit code 1; any other exception is a defect and keeps its traceback."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter fails to flush it
        _exit("standard output was closed", 2)
    except (UserError, OSError) as error:
        _exit(reason(error), 2)
    except (RuntimeError, MemoryError) as error:
        lines = [line for line in str(error).splitlines() if any(words in line for words in NO_MEMORY)]
        if lines or isinstance(error, MemoryError):
            _exit(f"{lines[0] if lines else 'out of memory'}; lower the batch, image or network size", 1)
        if _many_ranks() and any(word in str(error).lower() for word in LOST_RANK):
            _exit(f"lost contact with another rank, which failed or is unreachable ({reason(error)})", 1)
        raise


def check_flags(parse_args) -> None:
    """Answers --help and mistaken flags, before a script imports torch, which takes seconds."""
    run_script(parse_args)


@contextlib.contextmanager
def user_errors():
    """Turns a ValueError about an argument that a flag gave into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def reason(error: BaseException) -> str:
    """One line for an exception: an OSError's text and file, else the last line of the message."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def _many_ranks() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _exit(message: str, code: int):
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank != "0" and code == 2:
        time.sleep(5)  # an error that all ranks make is reported once: the launcher ends this rank meanwhile
    message = (f"error: rank {rank}: " if code == 1 else "error: ") + " ".join(message.split())
    print(message, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun prints its message last
        extra = {"timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    if _many_ranks():
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)  # an orderly exit would wait for collectives that never complete
    sys.exit(code)


# ------------------------------------------------------------------------------------------------------ flags

class ArgumentParser(argparse.ArgumentParser):
    """Shows defaults in --help, and reports a mistaken flag as a UserError."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=_HelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default is not None and action.help else action.help


def number(kind: type, low: float, high: float):
    """The type of a flag that takes a number from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {what} from {low:.12g} to {high:.12g}, got {text!r}")
        return value
    return parse


positive_int, non_negative_int = number(int, 1, 2**31 - 1), number(int, 0, 2**63 - 1)
positive_float, non_negative_float = number(float, 1e-30, 1e9), number(float, 0, 1e9)
probability, pixels = number(float, 0, 1), number(int, 1, 4096)


def number_or_sum(text: str) -> float | str:
    return text if text == "sum" else positive_float(text)


def boolean(text: str) -> bool:
    if text.lower() in ("true", "on", "1", "false", "off", "0"):
        return text.lower() in ("true", "on", "1")
    raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")


def path(text: str) -> Path:
    if not text:  # an unset shell variable would mean the current folder
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    return Path(text)


def refuse(args: argparse.Namespace, names, why: str) -> None:
    """UserError if one of the flags, whose defaults are None or False, was given but has no effect."""
    if given := [f"--{name}" for name in names if getattr(args, name) not in (None, False)]:
        raise UserError(f"{', '.join(given)} cannot be used {why}; leave it out")


def check_range(args: argparse.Namespace, name: str, high: float) -> None:
    """UserError unless the two numbers of the flag are 0 < MIN <= MAX <= high."""
    first, last = getattr(args, name)
    if not 0 < first <= last <= high:
        raise UserError(f"--{name} needs 0 < MIN <= MAX <= {high:g}, got {first} {last}")


def plain(args: argparse.Namespace) -> dict:
    """The flags as plain data, for a checkpoint."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def _show(value):
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def add_process_flags(parser) -> None:
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; several processes take one GPU each")
    add("--dist_url", default="env://", help="rendezvous: env://, tcp://HOST:PORT or file://PATH")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # old launchers; LOCAL_RANK counts


def default_workers() -> int:
    """Loader workers of each process: 10, or its share of the cores that it may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, min(10, cores // (int(here) if here.isdigit() and int(here) else 1)))


def by_preset(text: str, recipes: dict, name: str) -> str:
    """A help text with the default of the preset `paper`, and of those that differ from it."""
    defaults = {preset: _show(recipe[name]) for preset, recipe in recipes.items()}
    others = [f"{value} for {preset}" for preset, value in defaults.items() if value != defaults["paper"]]
    return f"{text} (default: {'; '.join([str(defaults['paper']), *others])})"


def add_objective_flags(parser, recipes: dict) -> None:
    """The flags of the objective. recipes: preset -> defaults of the flags that are not given; those of
    `paper` serve all presets of auccl_loss.py that are not there."""
    add, released = parser.add_argument, ", ".join(name for name in recipes if name != "paper")
    add("--preset", default="paper", help=f"objective: paper, hard, quartic, poster or {released}")
    add("--negative_weight", type=number_or_sum, help="nu: a number, or sum (default: the preset's)")
    add("--margin_negative_weight", type=number_or_sum, help="kappa: likewise")
    add("--score", choices=("cosine", "unit"), help="score of a pair (default: cosine)")
    add("--learn", nargs="+", choices=("a", "b", "alpha", "none"),
        help="learned weights of the objective (default: the preset's)")
    add("--weights_lr", type=non_negative_float,
        help=by_preset("learning rate of a, b and alpha", recipes, "weights_lr"))


def complete_objective_flags(args: argparse.Namespace, recipes: dict) -> None:
    """Fills in what the preset decides. UserError for flags that contradict it."""
    if args.preset.startswith("released"):
        if args.preset not in recipes:
            raise UserError(f"--preset {args.preset} is not for this script; see --help")
        refuse(args, OBJECTIVE, f"with --preset {args.preset}, which fixes it")
    if args.learn and "none" in args.learn:
        if len(args.learn) > 1:
            raise UserError("--learn none contradicts the other names behind --learn; give one of them")
        refuse(args, ("weights_lr",), "with --learn none")
        args.learn = []
    for name, value in recipes.get(args.preset, recipes["paper"]).items():
        if getattr(args, name) is None:
            setattr(args, name, list(value) if isinstance(value, tuple) else value)  # as a checkpoint does


def build_criterion(args: argparse.Namespace):
    """The objective that the flags name; args.learn becomes the list of what it learns. UserError for an
    unknown preset, and for weights that it cannot learn."""
    from auccl_loss import WEIGHTS, AUCCLLoss
    given = {name: getattr(args, name) for name in (*OBJECTIVE, "learn") if getattr(args, name) is not None}
    with user_errors():
        criterion = AUCCLLoss.preset(args.preset, **given)
    args.learn = [name for name in WEIGHTS if getattr(criterion, name).requires_grad]
    return criterion


def add_backbone_flags(parser) -> None:
    """The flags of a pretrained backbone and of how it is run."""
    add = parser.add_argument
    add("--pretrained_weights", type=path, help="checkpoint of main.py, cifar/main.py or DINO, or weights of "
        "timm or torchvision (default: checkpoint.pth of the current folder)")
    add("--checkpoint_key", help="network of a checkpoint with several (default: teacher, or the only one)")
    add("--random_weights", action="store_true", help="untrained network, the baseline")
    add("--arch", help="vit_*, a ResNet, timm/NAME or cifar/NAME (default: the checkpoint's)")
    add("--patch_size", type=positive_int, help="pixels a side of a ViT's patches (default: checkpoint's)")
    add("--image_size", type=pixels,
        help="pixels a side, where the file does not tell (default: timm's, or 224)")
    add("--batch_size_per_gpu", type=positive_int, default=128, help="images per batch of each process")
    add("--num_workers", type=non_negative_int, default=default_workers(), help="loader workers per process")
    add("--amp", choices=("none", "auto", "bf16", "fp16"), default="none", help="autocast of the backbone")
    add("--seed", type=non_negative_int, default=0, help="seed of random weights and of the choice of images")
    add_process_flags(parser)


def add_evaluation_flags(parser) -> None:
    """The flags that evaluations of a pretrained backbone share."""
    add = parser.add_argument
    add("--dataset", default="folder", help="folder, cifar10, cifar100, stl10, flowers102, caltech101, "
        "food101, pets, aircraft, dtd, eurosat, svhn, or hfds/NAME of the Hugging Face hub")
    add("--data_path", type=path, help="folder with train/ and val/ (or test/), or the root of --dataset "
        "(default for a --dataset: cifar/datasets beside this script)")
    add("--download", action="store_true", help="fetch --dataset if it is not in --data_path")
    add_backbone_flags(parser)


# ---------------------------------------------------------------------------------------- device and autocast

def select_device(name: str):
    """The torch.device of a --device flag; "auto" takes CUDA, then MPS, then the CPU. UserError if absent."""
    import torch
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    names = [kind for kind, there in available.items() if there]
    with contextlib.suppress(RuntimeError):  # not a device's name
        device = torch.device(names[0] if name == "auto" else name)
        if device.type in names and (device.index or 0) < max(1, torch.cuda.device_count()):
            return device
    raise UserError(f"device {name!r} is not available here; use --device {'|'.join(names)}")


def select_amp(name: str, device):
    """The dtype of an --amp flag, None for full precision. "auto": bf16 where the hardware has it."""
    import torch
    if name in ("none", "fp16"):
        return torch.float16 if name == "fp16" else None
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        native &= torch.backends.cpu.get_cpu_capability() == "AVX512"  # not if ATEN_CPU_CAPABILITY forbids it
    return torch.bfloat16 if native or name == "bf16" else None


def settle_amp(args: argparse.Namespace, device) -> None:
    """Replaces `--amp auto` by what it is here: a resume on other hardware must do the same."""
    if args.amp == "auto":
        args.amp = "bf16" if select_amp("auto", device) else "none"


def autocast(device, dtype):
    """torch.autocast in `dtype`; None for full precision."""
    import torch
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def set_backends(device, deterministic: bool, tf32: bool = True) -> None:
    """Chooses a GPU's kernels: the fastest, cuDNN's by measurement, or if `deterministic` those that give the
    same bits again. tf32: float32 convolutions and products with 10 bits of mantissa, except in the objective
    and k-NN, which are exact. CPUs are deterministic and exact as they are."""
    import torch
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        # ViTs resize their position embeddings, whose gradient has no deterministic kernel: a warning
        torch.use_deterministic_algorithms(deterministic, warn_only=True)


def memory_format(network, device, dtype):
    """The faster layout of images and convolutions: channels_last, except for wide networks in float32 on
    CPUs without AVX-512 (measured: results/speed.md)."""
    import torch
    wide = any(len(parameter) >= 512 for parameter in network.parameters() if parameter.ndim == 4)
    avx2 = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return torch.contiguous_format if avx2 and dtype is None and wide else torch.channels_last


def send(tensor, device):
    """Copies a CPU tensor to `device`: asynchronously, from pinned memory, to a GPU. On MPS an asynchronous
    copy may read memory that has been freed."""
    import torch
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def peak_memory(device) -> float | None:
    """Peak GB of tensors on a GPU, or of this process on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        import torch
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def millions(network) -> str:
    """The network's number of parameters."""
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.2f}"


# ------------------------------------------------------------------------------------ seeds, order, schedules

def stream_seed(*keys: int) -> int:
    """A 63-bit seed of the random stream named by `keys` (seed, epoch, ...). Streams of different keys are
    independent. Nothing is saved: a resumed run derives the same seeds."""
    sequence = np.random.SeedSequence((len(keys), *keys))  # the length, as (1,) and (1, 0) would be equal
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def steps_per_epoch(images: int, images_per_step: int, flags: str) -> int:
    """Steps without a last, smaller one. UserError, which names the flags to lower, if there are none."""
    if images_per_step > images:
        raise UserError(f"a step takes {images_per_step} images, more than the {images} of the data set; "
                        f"lower {flags}")
    return images // images_per_step


def seed_all(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch."""
    import torch
    random.seed(seed), np.random.seed(seed % 2**32), torch.manual_seed(seed)


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int, start: int = 0):
    """Yields index batches [batch_size] of an epoch's random order of `count` images, from batch `start` on,
    without a last, smaller one. The order depends on seed and epoch alone."""
    import torch
    order = torch.randperm(count, generator=torch.Generator().manual_seed(stream_seed(seed, epoch)))
    for batch in range(start, count // batch_size):
        yield order[batch * batch_size:(batch + 1) * batch_size]


def cosine_schedule(step: int, steps: int, base: float, final: float = 0.0, warmup_steps: int = 0) -> float:
    """The value at `step` (from 0) of `steps`: a linear warm-up that reaches `base` after `warmup_steps`,
    then half a cosine to `final` at the last step. The warm-up may be longer than the run."""
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * min(1.0, progress)))


# ------------------------------------------------------------------------------------- checkpoints and resume

def replace_file(path: Path, write, mode: str = "w") -> None:
    """Lets `write(file)` fill a temporary file, then renames it: `path` holds the old or the new content,
    whole. Text is UTF-8, with names of files as they are. UserError if that fails."""
    temporary = path.with_name(path.name + ".partial")
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    try:
        with writing_to(path):
            with open(temporary, mode, **text) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing_to(place: Path):
    """Names the file or folder in errors of writing, whose own texts do not: a full disk's, say."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError while it handles the OSError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write to {place}: {reason(cause)}. What it held is intact. Make room there, "
                        "or make it writable, then run the same command again") from error


def save_checkpoint(state: dict, path: Path) -> None:
    """Replaces the checkpoint at `path`, see `replace_file`."""
    import torch
    replace_file(path, lambda file: torch.save(state, file), "wb")


def load_checkpoint(path: Path, advice: str = "move it away or restore a copy") -> dict:
    """A checkpoint's dict, on the CPU; no code of the file is run. UserError if it cannot be read; `advice`
    is for a file that holds what only code could build."""
    import torch
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except (PermissionError, IsADirectoryError, MemoryError):
        raise
    except Exception as error:  # torch.load raises half a dozen types for damaged files
        if any(words in str(error) for words in NO_MEMORY):
            raise
        if "unsupported global" in str(error).lower():
            raise UserError(f"{path} holds more than tensors and plain data, which is not loaded; {advice}")
        raise UserError(f"{path} is empty, damaged or no checkpoint; move it away or restore a copy")
    if not isinstance(state, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(state).__name__}, not a dict")
    return state


def read_resume(args, path: Path, free: tuple[str, ...], flags: dict | None = None) -> dict | None:
    """The checkpoint of a run with the same flags, except those in `free`, which may change; None if there is
    neither checkpoint nor log. UserError if it belongs to another run, or if only its log.txt is left."""
    if not path.exists():
        if (log := path.with_name("log.txt")).exists() and log.stat().st_size:
            raise UserError(f"{log} belongs to another run, or {path.name} is gone; move it away "
                            "or choose another --output_dir")
        return None
    state = load_checkpoint(path)
    if not isinstance(saved := state.get("args"), dict):
        raise UserError(f"{path} is no checkpoint of this script: it lacks its flags; move it away")
    if differing := [f"--{name} {_show(saved.get(name))} there, {_show(value)} here"
                     for name, value in (flags or plain(args)).items()
                     if name not in free and saved.get(name) != value]:
        raise UserError(f"{path} belongs to another run: {'; '.join(differing)}. Resume with the same flags, "
                        "or choose another --output_dir")
    return state


def check_same_data(state: dict, checksum: list, path: Path) -> None:
    """UserError if the checkpoint was trained on other images; checksum: [number of images, ...]."""
    if state.get("data") != checksum:
        there = (state.get("data") or ["unknown"])[0]
        raise UserError(f"{path} was trained on other images (number there: {there}, here: {checksum[0]}); "
                        "give the same data, or choose another --output_dir")


def load_parts(state: dict, parts: dict, path: Path) -> None:
    """Loads `state[name]` into each of `parts`, name -> module or optimiser. UserError for a misfit."""
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} does not fit this run's {name}: {reason(error)}; move it away") from None


def diverged(what: str, epoch: int, step: int) -> str:
    return (f"training diverged: {what} is not finite at step {step + 1} of epoch {epoch + 1}; start anew "
            "with a lower --lr or --weights_lr. The last checkpoint was not overwritten")


def lock_folder(folder: Path):
    """Makes the folder and locks it until the returned file is closed or this process ends. UserError if
    another process holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "run.lock", "a+")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f"another run writes to {folder} ({file.read().strip()}); wait for it, or choose "
                        "another --output_dir") from None
    except (ImportError, OSError):  # Windows, and file systems without locks
        pass
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file


def ignore_group_signals(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: gives the worker a session of its own, so that a signal to the process
    group, as from a terminal or launcher, reaches the trainer alone, which saves before its workers end."""
    if hasattr(os, "setsid"):
        os.setsid()


class Interruption:
    """Turns SIGTERM and Ctrl-C into a request that the loop answers between two steps: save, then exit. A
    second signal ends the process at once."""

    def __init__(self):
        self.signal = None
        self._former = {sig: signal.signal(sig, self._request) for sig in (signal.SIGTERM, signal.SIGINT)}

    def close(self) -> None:
        for sig, handler in self._former.items():
            signal.signal(sig, handler)

    def _request(self, sig, frame):
        self.signal = sig
        signal.signal(sig, signal.SIG_DFL)

    def exit(self, run):
        """Ends the process, after a checkpoint of `run`."""
        place = f"step {run.step}/{run.steps} of epoch {run.epoch + 1}" if run.step else f"epoch {run.epoch}"
        print(f"saved after {place}; the same command resumes", file=sys.stderr, flush=True)
        sys.exit(128 + (self.signal or signal.SIGTERM))  # None: the signal went to another rank


# -------------------------------------------------------------------------------------------------------- log

SHORT = {"train_loss": "loss", "train_lr": "lr", "lr": "lr/256", "train_wd": "wd", "test_acc@1": "acc@1",
         "test_acc@5": "acc@5", "test_auc": "auc", "positive": "pos", "negative": "neg",
         "images_per_s": "img/s", "data_wait": "wait", "memory_gb": "GB", "hours_left": "hours",
         "seconds": "sec", "knn_acc@1": "knn@1", "knn_acc@5": "knn@5", "test_loss": "t_loss",
         "test_acc1": "acc@1", "test_acc5": "acc@5", "test_class_acc1": "class@1"}
NARROW = ("epoch", "step", "positive", "negative", "a", "b", "alpha")


def announce(run, what: str, processes: int = 1) -> None:
    """Says before the first step what is trained on what, from where to where, on the screen."""
    args = run.args
    print(f"{what}; {processes} x {run.device}, {run.amp_dtype or 'torch.float32'}\n"
          f"from epoch {run.epoch + 1}, step {run.step + 1}, to epoch {args.epochs}; {run.steps} steps per "
          f"epoch of {run.images_per_step} images; {args.output_dir}", flush=True)
    if args.warmup_epochs > args.epochs:
        print(f"note: --warmup_epochs {args.warmup_epochs:g} outlasts --epochs {args.epochs}; the learning "
              "rate ends below its peak", flush=True)


class RunLog:
    """Writes records (flat dicts with an "epoch" from 0, and a "step" if they are of a part of it) to the
    screen, log.txt (JSON lines, only ever appended to), TensorBoard and, if named, a CSV table of the epochs.

    position: (epoch, step) that runs next; `records` holds what log.txt tells of the run before it.
    steps: steps per epoch, for TensorBoard's axis.
    """

    def __init__(self, folder: Path, position: tuple[int, int], steps: int = 1, table: str | None = None):
        from torch.utils.tensorboard import SummaryWriter  # slow to import
        self.path, self.steps, self.columns = folder / "log.txt", steps, []
        self.records = [record for record in read_records(self.path) if _position(record) <= position]
        self.table = folder / table if table else None
        threading.excepthook = _thread_error
        with writing_to(folder):
            self.board = SummaryWriter(folder / "tensorboard",
                                       purge_step=position[0] * steps + position[1] + 1)

    def write(self, record: dict) -> None:
        self._print(record)
        self.records.append(record)
        with writing_to(self.path.parent):
            with open(self.path, "a+b") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    file.write(b"" if file.read() == b"\n" else b"\n")  # a kill may have left half a line
                file.write(json.dumps(record).encode() + b"\n")
            axis, at = "epochs", record["epoch"] + 1
            if "step" in record:
                axis, at = "steps", record["epoch"] * self.steps + record["step"]
            for name, value in record.items():
                if name not in ("epoch", "step") and value is not None:
                    self.board.add_scalar(f"{axis}/{name}", value, at)
            self.board.flush()
        if self.table and "step" not in record:
            epochs = [record for record in self.records if "step" not in record]
            names = list(dict.fromkeys(name for record in epochs for name in record))
            rows = [[record.get(name, "") for name in names] for record in epochs]
            replace_file(self.table, lambda file: csv.writer(file).writerows([names, *rows]))

    def _print(self, record: dict) -> None:
        if new := [name for name in record if name not in self.columns]:
            self.columns += new
            print(" ".join(f"{SHORT.get(name, name):>{_width(name)}}" for name in self.columns))
        shown = record | {"epoch": record["epoch"] + 1}  # people count from 1
        texts = [format_value(shown.get(name), _width(name)).rjust(_width(name)) for name in self.columns]
        print(" ".join(texts), flush=True)


def _thread_error(args) -> None:
    """TensorBoard's thread hands a failed write to the main thread, which reports it."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def _width(name: str) -> int:
    return max(len(SHORT.get(name, name)), 6 if name in NARROW else 7)


def _position(record: dict) -> tuple[int, float]:
    return record["epoch"], record.get("step", math.inf)


def format_value(value, width: int = 7) -> str:
    """A value of a record; a float with up to four digits that fit into `width`."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    formats = (".0f",) if 1000 <= abs(value) < 1e5 else (".4g", ".3g", ".2g", ".1g")
    texts = [format(value, form) for form in formats]
    return next((text for text in texts if len(text) <= width), texts[-1])


def format_record(record: dict) -> str:
    """A record as one line of names and values; what is None is left out."""
    return "  ".join(f"{name} {format_value(x)}" for name, x in record.items() if x is not None)


def read_records(path: Path) -> list[dict]:
    """The records of a log.txt, the last of each (epoch, step), in order; none without a file. Lines that
    are no record (a kill may leave half a line) are reported and left alone."""
    records, bad = {}, []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            record = json.loads(line)
            if not isinstance(record["epoch"], int) or not isinstance(record.get("step", 0), int):
                raise TypeError
            records[_position(record)] = record
        except (ValueError, KeyError, TypeError, AttributeError):
            bad.append(number)
    if bad:
        print(f"note: {path}: {len(bad)} line(s) hold no record, the first is line {bad[0]}; they are kept",
              file=sys.stderr, flush=True)
    return [records[key] for key in sorted(records)]


def caption(name: str, length: int) -> str:
    """A file's name in a picture: at most `length` characters, and no formula between dollar signs."""
    name = os.fsencode(name).decode(errors="replace")
    return (name if len(name) <= length else name[:length - 1] + "…").replace("$", r"\$")


def progress(steps, done: int, total: int, title: str, quiet: bool = False):
    """A tqdm bar over `steps`, of which `done` of `total` were done before. Where there is no terminal: at
    most one line a minute, and none for what takes less."""
    from tqdm import tqdm
    wait = 0 if sys.stderr.isatty() else 60
    return tqdm(steps, desc=title, initial=done, total=total, disable=quiet, leave=False, dynamic_ncols=True,
                delay=wait, mininterval=wait or 0.1)
