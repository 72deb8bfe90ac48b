"""What the scripts share and what knows no model, loss or augmentation: errors, device, seeds, schedules, checkpoints, logs,
interruption and data sets."""
import argparse
import csv
import json
import math
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
import uuid
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Iterator
from urllib.parse import urlparse

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torchvision import datasets, transforms
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------------------ user errors

class UserError(Exception):
    """Something the user can mend. Its message is one line: what is wrong, then what to do."""

    def __init__(self, message: str):
        super().__init__(message.rsplit("UserError: ", 1)[-1].strip())  # a DataLoader puts its worker's traceback before it


def run_script(main) -> None:
    """Calls main(); a UserError, or a mistaken flag, ends the process with one line on stderr and exit code 2.

    With several ranks, the first that fails says why, and all others end within seconds without a word."""
    try:
        main()
        _leave_process_group()
    except UserError as error:
        if _fault_watch.report(2) if _fault_watch else _speaks():
            _fail(str(error))
        _end(2)
    except KeyboardInterrupt:  # before or after the loop that `Interruption` guards
        sys.exit(130)
    except Exception as error:
        if _fault_watch is None:
            raise
        if _fault_watch.report(1):
            traceback.print_exc()
            print(f"error: rank {rank()}: {_reason(error)}", file=sys.stderr, flush=True)
        _end(1)


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _speaks() -> bool:
    """Whether this process tells its error: of those of a host that stumble over the same flags, the first."""
    return _joining or int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))) == 0


def _end(code: int) -> None:
    if _fault_watch is None:
        sys.exit(code)
    time.sleep(3 * _FaultWatch.POLL)  # the others see the fault before this rank's connections close
    os._exit(code)                    # an orderly exit would wait for collectives that will never come


class ArgumentParser(argparse.ArgumentParser):
    """Shows defaults in --help, and reports a mistaken flag in the same one line as every other error."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=_HelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default is not None and action.help else action.help


def positive_int(text: str) -> int:
    value = int(text)
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must lie between 1 and 2^31 - 1, got {text}")
    return value


def non_negative_int(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 2^63 - 1, got {text}")
    return value


def non_negative_float(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1e9, got {text}")
    return value


def positive_float(text: str) -> float:
    if (value := non_negative_float(text)) == 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def number_or_sum(text: str) -> float | str:
    return text if text == "sum" else float(text)


def boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"must be true or false, got {text}")


def plain(args: argparse.Namespace) -> dict:
    """The flags as plain data, for a checkpoint."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


# -------------------------------------------------------------------------------------------------- processes and device

MEETING = timedelta(minutes=30)  # that processes wait for one another at the start


def add_process_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; several processes take a GPU each")
    parser.add_argument("--dist_url", default="env://", help="where processes meet: env://, tcp://HOST:PORT, file://PATH")
    # Older launchers pass it; LOCAL_RANK, which all of them set, is what counts.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def select_device(name: str) -> torch.device:
    """The torch device of a --device flag; "auto" takes CUDA, then MPS, then the CPU. UserError if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    try:
        device = torch.device(name)
        if available.get(device.type, False) and (device.index or 0) < (torch.cuda.device_count() if device.type == "cuda" else 1):
            return device
    except RuntimeError:  # no device's name
        pass
    raise UserError(f"device {name!r} is not available here; use --device {'|'.join(k for k, v in available.items() if v)}")


def select_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of an --amp flag, None for full precision. "auto" takes bf16 where the hardware has it natively."""
    if name in ("none", "fp16"):
        return torch.float16 if name == "fp16" else None
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native or name == "bf16" else None


def peak_memory(device: torch.device) -> int:
    """Bytes that tensors took at most on a GPU, or this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def init_distributed(device: str = "auto", dist_url: str = "env://") -> torch.device:
    """Joins the process group if a launcher (torchrun, torch.distributed.launch, srun) started this process, and returns
    the device to use: gloo serves CPUs, nccl GPUs. UserError if the device is not there or the processes do not meet."""
    global _fault_watch, _joining
    _joining = True
    _read_slurm()
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return select_device(device)
    chosen = _device_of_rank(device)
    if os.environ["RANK"] == "0":  # a job script that forgot srun would wait here
        print(f"waiting for {world} processes at {os.environ.get('MASTER_ADDR', dist_url)}", file=sys.stderr, flush=True)
    try:
        own_rank = int(os.environ["RANK"])
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", store=_meet(dist_url, own_rank, world),
                                rank=own_rank, world_size=world)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{world} processes were started but do not meet at --dist_url {dist_url}: {_reason(error)}") from error
    host = urlparse(dist_url).hostname or os.environ.get("MASTER_ADDR", "localhost")
    _fault_watch = _FaultWatch(host)
    _fault_watch.start()
    return chosen


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, replaced by its sum over ranks."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def same_over_ranks(*numbers: int) -> bool:
    """Whether all ranks call this with the same numbers."""
    low = torch.tensor(numbers)
    high = low.clone()
    if world_size() > 1:
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
    return torch.equal(low, high)


def gather_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """All `count` items in order, on every rank; `rows` [n, ...] are items rank, rank + W, rank + 2W, ... on this one of W."""
    if world_size() == 1:
        return rows
    longest = -(-count // world_size())
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:count]


def share(rows):
    """This rank's part of what all ranks hold: items rank, rank + W, ... on W ranks, as `gather_rows` takes them."""
    return rows[rank()::world_size()]


def _read_slurm() -> None:
    """Names what srun says about this process as torch's launchers do. The variables of a launcher come first."""
    env = os.environ
    tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))  # of the step, that is of srun; of the job
    if "RANK" in env or "SLURM_PROCID" not in env or tasks == "1":
        return
    # The first host of a list like gpu[07-09,12],login1
    host = re.match(r"([^\[,]+)(?:\[(\w+))?", env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "localhost")))
    env.setdefault("MASTER_ADDR", host[1] + (host[2] or ""))
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000))  # jobs on one host should differ
    env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=tasks, LOCAL_RANK=env.get("SLURM_LOCALID", "0"))


def _meet(url: str, own_rank: int, world: int) -> dist.Store:
    """The store that the process group is set up by, cleared of what an earlier attempt left there: torchrun keeps one store over
    restarts, where a fast rank could find the former address of a slow one. So each process names itself anew, and rank 0 answers
    with a prefix until all have it."""
    store = next(dist.rendezvous(url, own_rank, world, timeout=MEETING))[0]
    name, deadline = uuid.uuid4().hex, time.monotonic() + MEETING.total_seconds()
    if own_rank > 0:
        store.set(f"name/{own_rank}", name)
        prefix = store.get(f"answer/{name}").decode()
        store.add(f"met/{prefix}", 1)
        return dist.PrefixStore(prefix, store)
    while store.add(f"met/{name}", 0) < world - 1:
        for other in range(1, world):
            if store.check([f"name/{other}"]):
                store.set(f"answer/{store.get(f'name/{other}').decode()}", name)
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all of them came within {MEETING}")
        time.sleep(0.05)
    return dist.PrefixStore(name, store)


def _device_of_rank(name: str) -> torch.device:
    local, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ":" in name or name == "mps":
        raise UserError(f"--device {name} is one device, but there are several processes; use cuda or cpu")
    device = select_device("cpu" if name == "auto" and not torch.cuda.is_available() else name)
    if device.type != "cuda":
        return device
    if local_world > torch.cuda.device_count():
        raise UserError(f"{local_world} processes were started on this host, which has {torch.cuda.device_count()} GPUs; lower "
                        "--nproc_per_node, or use --device cpu")
    device = torch.device("cuda", local % torch.cuda.device_count())  # Slurm may show each process its own GPU alone, as 0
    torch.cuda.set_device(device)
    return device


class _FaultWatch(threading.Thread):
    """Ends this process when another rank has failed: it may be waiting in a collective for one that will never come.

    Rank 0 hosts a store, apart from the process group's, which a rank that fails leaves word in and all others poll. Each counts its
    polls there, so that rank 0 misses one that was killed."""
    POLL = 0.3   # seconds
    LOST = 100   # polls of rank 0 without one of another rank

    def __init__(self, host: str):
        super().__init__(daemon=True)
        port = torch.zeros((), dtype=torch.int64)
        if rank() == 0:
            self.server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            port.fill_(self.server.port)
        dist.broadcast(port, 0)
        self.store = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=30))
        self.stopped = False

    def run(self):
        polls, last = 0, [(b"", 0)] * world_size()  # of each rank: its latest count, and rank 0's when that was new
        while not self.stopped:
            time.sleep(self.POLL)
            polls += 1
            if self.stopped:
                return
            try:
                self.store.set(f"polls{rank()}", str(polls))
                code = int(self.store.get("fault")) if self.store.check(["fault"]) else 0
                for other in range(1, world_size()) if rank() == 0 else ():
                    count = self.store.get(f"polls{other}") if self.store.check([f"polls{other}"]) else b""
                    last[other] = last[other] if count == last[other][0] else (count, polls)
                    if polls - last[other][1] > self.LOST and self.report(1):
                        _fail(f"rank {other} no longer answers; it was killed, or its host is gone")
                        _end(1)
            except RuntimeError:  # rank 0 is gone
                code = 1
                if not self.stopped and rank() == 1:
                    _fail("rank 0 no longer answers; it was killed, or its host is gone")
            if code and not self.stopped:
                os._exit(code)

    def report(self, code: int) -> bool:
        """Leaves word that this rank fails with exit code `code`; whether it is the first, which has to say why."""
        self.stopped = True
        try:
            first = self.store.add("reports", 1) == 1
            if first:
                self.store.set("fault", str(code))
        except RuntimeError:  # rank 0 is gone
            first = rank() == 1
        return first


_fault_watch: _FaultWatch | None = None
_joining = False  # the flags are read; what goes wrong from now on may concern this process alone


def _leave_process_group() -> None:
    if _fault_watch:
        dist.barrier()  # no rank's success may look like a fault to another
        _fault_watch.stopped = True
        dist.barrier()
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------- seeds, order, schedules

def stream_seed(*keys: int) -> int:
    """A 63-bit seed for the random stream named by `keys` (seed, rank, epoch, step, ...). Streams of different keys are
    independent, and none needs to be saved: after a resume the keys name it again."""
    words = np.random.SeedSequence((len(keys), *keys)).generate_state(1, np.uint64)  # it takes (1,) and (1, 0) for the same
    return int(words[0] >> np.uint64(1))


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int, start: int = 0) -> Iterator[torch.Tensor]:
    """Index batches [batch_size] of one epoch's random order of `count` images, from batch `start` on; a last, smaller batch
    is left out. The order is a function of seed and epoch, so that a resumed epoch goes on where it stopped."""
    generator = torch.Generator().manual_seed(stream_seed(seed, epoch))
    order = torch.randperm(count, generator=generator)
    for batch in range(start, count // batch_size):
        yield order[batch * batch_size:(batch + 1) * batch_size]


def cosine_schedule(step: int, steps: int, base: float, final: float = 0.0, warmup_steps: int = 0) -> float:
    """The value at `step` (0-based) of `steps`: a linear warm-up to `base`, which reaches it after `warmup_steps` steps, then
    half a cosine down to `final` at the last step. The warm-up may be longer than the run."""
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * min(1.0, progress)))


# ------------------------------------------------------------------------------------------------------------ checkpoints

def replace_file(path: Path, write, mode: str = "w") -> None:
    """Has `write(file)` fill a file aside and renames it, so that `path` holds the old or the new content, whole, at every
    moment. UserError if the disk is full or refuses; the old content is then still there."""
    aside = path.with_name(path.name + ".partial")
    try:
        with open(aside, mode, newline=None if "b" in mode else "") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps what write() raises in a RuntimeError
        aside.unlink(missing_ok=True)
        kept = "; what was saved before is intact" if path.exists() else ""
        raise UserError(f"cannot write {path}: {_reason(error)}{kept}. Make room, then run the same command again") from error


def save_checkpoint(state: dict, path: Path) -> None:
    """Replaces the checkpoint at `path`, see `replace_file`."""
    replace_file(path, lambda file: torch.save(state, file), "wb")


def load_checkpoint(path: Path, advice: str = "move it away or restore a copy") -> dict:
    """A checkpoint's dict, on the CPU. Never runs code from the file (`weights_only`); UserError if it cannot be read, which ends
    with the advice if the file holds what only code could build."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Exception as error:  # torch.load raises half a dozen types for damaged files
        code = isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower()
        advice = advice if code else "move it away or restore a copy"
        raise UserError(f"cannot read checkpoint {path}: {_reason(error)}; {advice}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(state).__name__}, not a dict")
    return state


def check_same_run(saved: dict, args: dict, path: Path, free: tuple[str, ...] = ()) -> None:
    """UserError if the flags saved in a checkpoint contradict those of this run; the names in `free` may differ."""
    differing = [f"--{name} {_flag(saved.get(name))} there, {_flag(value)} here"
                 for name, value in args.items() if name not in free and saved.get(name) != value]
    if differing:
        raise UserError(f"{path} belongs to another run: {'; '.join(differing)}. Resume with the same flags, or choose "
                        "another --output_dir")


def read_resume(args: argparse.Namespace, folder: Path, free: tuple[str, ...]) -> dict | None:
    """The checkpoint.pth of a run in `folder`, None if there is none. UserError if it is no checkpoint of a run with the same
    flags, those in `free` aside, or if only the log of a run is left."""
    path = folder / "checkpoint.pth"
    if not path.exists():
        if read_records(folder / "log.txt"):
            raise UserError(f"{folder / 'log.txt'} belongs to a run whose checkpoint is gone; move it away or choose another "
                            "--output_dir")
        return None
    state = load_checkpoint(path)
    if not isinstance(state.get("args"), dict):
        raise UserError(f"{path} is no checkpoint of this script: it lacks its flags; move it away")
    check_same_run(state["args"], plain(args), path, free)
    return state


def make_output_dir(path: Path, flag: str = "--output_dir") -> Path:
    """The folder, made if missing. UserError if it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink(missing_ok=True)  # another rank may have been faster
    except OSError as error:
        raise UserError(f"cannot write to the output folder {path}: {_reason(error)}; choose another {flag}") from error
    return path


def _flag(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _reason(error: Exception) -> str:
    while not isinstance(error, OSError) and isinstance(error.__context__, Exception):
        error = error.__context__  # what torch.save wraps
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0][:200]


def leave_group(worker: int) -> None:
    """A loader's `worker_init_fn`: a signal that a terminal or a launcher sends to a run's whole process group stays clear of the
    workers, without which the run could not go on to save."""
    if hasattr(os, "setsid"):
        os.setsid()


class Interruption:
    """Turns SIGTERM and Ctrl-C into a request that the loop answers between two steps: save, then leave. A second signal
    ends the process at once. `close` gives the signals their former meaning back, for a process that goes on to other things."""

    def __init__(self):
        self.signal = None
        self._former = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}

    def close(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _request(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def leave(self, message: str) -> None:
        if rank() == 0:
            print(message, file=sys.stderr, flush=True)
        _leave_process_group()
        sys.exit(128 + (self.signal or signal.SIGTERM))  # None: the signal went to another rank


# ------------------------------------------------------------------------------------------------------------------- logs

class RunLog:
    """Records (flat dicts with their "epoch", and a "step" if they are of a part of it) to the screen, `log.txt` (JSON lines),
    TensorBoard and, if it has a name, a CSV.

    position: (epoch, step) that runs next. On a resume, records of what lies beyond are dropped: they were written by a run
        that was killed before the checkpoint that would have kept them, and will be written again.
    steps: of an epoch, for TensorBoard's axis.
    """

    def __init__(self, folder: Path, position: tuple[int, int], steps: int = 1, csv_name: str | None = None):
        from torch.utils.tensorboard import SummaryWriter  # slow to import: not for --help
        self.text, self.table, self.steps = folder / "log.txt", folder / csv_name if csv_name else None, steps
        self.records = [r for r in read_records(self.text) if (r["epoch"], r.get("step", math.inf)) <= position]
        replace_file(self.text, lambda file: file.writelines(json.dumps(record) + "\n" for record in self.records))
        self._write_table()
        self.board = SummaryWriter(folder / "tensorboard", purge_step=position[0] * steps + position[1] + 1)

    def write(self, record: dict) -> None:
        print(format_record(record), flush=True)
        self.records.append(record)
        try:
            with open(self.text, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.text}: {_reason(error)}. Make room, then run the same command again") from error
        self._write_table()
        part = "steps" if "step" in record else "epochs"
        for name, value in record.items():
            if name not in ("epoch", "step"):
                self.board.add_scalar(f"{part}/{name}", value, record["epoch"] * self.steps + record.get("step", self.steps))
        self.board.flush()

    def _write_table(self) -> None:
        if self.table:
            rows = [list(self.records[0])] + [list(r.values()) for r in self.records] if self.records else []
            replace_file(self.table, lambda file: csv.writer(file).writerows(rows))


def read_records(path: Path) -> list[dict]:
    """The records of a log.txt, oldest first; none if there is no such file. A last line that a kill cut off is left out.
    UserError if another line is no record."""
    if not path.exists():
        return []
    try:
        records = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the log {path}: {_reason(error)}; move it away") from error
    if not all(isinstance(record, dict) and "epoch" in record for record in records):
        raise UserError(f"{path} is no log of epochs; move it away")
    return records


def format_record(record: dict) -> str:
    """A record as one line for the screen."""
    return "  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in record.items())


def progress(steps, done: int, total: int, title: str):
    """Iterates over `steps` with a bar and the time left on a terminal; in a file, a plain line a minute; on ranks but the first,
    nothing. `done` of `total` steps lie behind already. Yields (step, note): note(text) shows a few words beside the bar."""
    if rank() > 0:
        yield from ((step, lambda text: None) for step in steps)
        return
    if sys.stderr.isatty():
        with tqdm(steps, desc=title, initial=done, total=total, leave=False, dynamic_ncols=True) as bar:
            for step in bar:
                yield step, bar.set_postfix_str
        return
    started = printed = time.monotonic()
    latest = ""

    def note(text):
        nonlocal latest
        latest = text
    for count, step in enumerate(steps, 1):
        yield step, note
        if (now := time.monotonic()) - printed > 60:
            printed = now
            left = (now - started) / count * (total - done - count)
            print(f"{title}  step {done + count}/{total}  {latest}  {left / 60:.1f} min left", flush=True)


# -------------------------------------------------------------------------------------------------------------- data sets

DATASETS = ("cifar10", "cifar100", "stl10", "flowers102", "caltech101", "food101", "pets", "aircraft", "dtd", "eurosat", "svhn",
            "folder")
# Name -> torchvision's class, and its arguments for each split; several are put together: where an official validation set
# exists, evaluations train on it as well.
_TRAIN, _TEST, _ALL = {"split": "train"}, {"split": "test"}, {}
TORCHVISION = {
    "cifar10": ("CIFAR10", {"train": [{"train": True}], "test": [{"train": False}]}),
    "cifar100": ("CIFAR100", {"train": [{"train": True}], "test": [{"train": False}]}),
    "stl10": ("STL10", {"train": [_TRAIN], "test": [_TEST], "unlabeled": [{"split": "unlabeled"}]}),
    "flowers102": ("Flowers102", {"train": [_TRAIN, {"split": "val"}], "test": [_TEST]}),
    "caltech101": ("Caltech101", {"train": [_ALL], "test": [_ALL]}),
    "food101": ("Food101", {"train": [_TRAIN], "test": [_TEST]}),
    "pets": ("OxfordIIITPet", {"train": [{"split": "trainval"}], "test": [_TEST]}),
    "aircraft": ("FGVCAircraft", {"train": [{"split": "trainval"}], "test": [_TEST]}),
    "dtd": ("DTD", {"train": [_TRAIN, {"split": "val"}], "test": [_TEST]}),
    "eurosat": ("EuroSAT", {"train": [_ALL], "test": [_ALL]}),
    "svhn": ("SVHN", {"train": [_TRAIN], "test": [_TEST]}),
}
# Sets without an official split: how many of a class's n images are to train on; the others are the test set.
_TRAIN_PER_CLASS = {"caltech101": lambda n: 30, "eurosat": lambda n: (0.8 * n).round()}
_UNDECODABLE = OSError, ValueError, SyntaxError, Image.DecompressionBombError


def dataset_name(text: str) -> str:
    """The type of a --dataset flag."""
    if text not in DATASETS and "/" not in text:
        raise argparse.ArgumentTypeError(f"unknown data set {text!r}; choose from {', '.join(DATASETS)}, or a source of timm such "
                                         "as hfds/NAME or torch/NAME")
    return text


class LabelledImages(torch.utils.data.Dataset):
    """RGB images and their labels: item i is (PIL image, or what `transform` makes of it; int).

    classes: the names of labels 0, 1, ...; None where the source does not tell.
    targets: the labels of all images, as a list.
    """

    def __init__(self, source, classes: list[str] | None, transform=None, indices: list[int] | None = None):
        self.source, self.classes, self.transform, self.indices = source, classes, transform, indices

    def __len__(self):
        return len(self.source if self.indices is None else self.indices)

    def __getitem__(self, index: int):
        try:
            image, label = self.source[index if self.indices is None else self.indices[index]]
            image = image.convert("RGB")
        except _UNDECODABLE as error:
            raise UserError(f"cannot decode image {index} of the data set: {_reason(error)}; replace or remove it") from error
        return image if self.transform is None else self.transform(image), int(label)

    @cached_property
    def targets(self) -> list[int]:
        targets = _targets(self.source)
        return targets if self.indices is None else [targets[index] for index in self.indices]


class ImageStream(torch.utils.data.IterableDataset):
    """What `LabelledImages` is, for sources of timm that cannot be read by index (wds/, tfds/, hfids/); for one process."""

    def __init__(self, source, transform=None):
        self.source, self.classes, self.transform = source, None, transform

    def __iter__(self):
        for image, label in self.source:
            yield image if self.transform is None else self.transform(image), int(label)

    def __len__(self):
        return len(self.source)


def build_dataset(name: str, path: Path | None, split: str, transform=None, download: bool = True):
    """A labelled data set: LabelledImages, or ImageStream.

    Args:
        name: one of DATASETS: "folder", or a set of torchvision. Or a source of timm.data.create_dataset, "hfds/NAME", "wds/NAME"
            and so on, also with "timm/" before it: "timm/" alone is timm's reader of folders.
        path: torchvision's or timm's root, or the folder that holds `train/` and `test/` (or `val/`), each with a folder a class.
        split: "train" or "test"; for stl10 also "unlabeled". train includes an official validation set (flowers102, pets, aircraft,
            dtd). caltech101 and eurosat have no official split: by a fixed seed, 30 images of each class of caltech101 (its
            background left out) and 80 % of each of eurosat are for training, all others for testing.
        transform: of a PIL image.
        download: whether the set may be fetched into `path` where it is missing. Several ranks: the first fetches it.

    UserError for a set that is not there, a download that fails, a missing or empty folder, and, on access, an image that cannot
    be decoded.
    """
    if name == "folder":
        source = _image_folder(path, split)
        return LabelledImages(source, source.classes, transform)
    if download and rank() > 0:
        dist.barrier()
    dataset = _timm_dataset(name, path, split, download) if "/" in name else _torchvision_dataset(name, path, split, download)
    if download and world_size() > 1 and rank() == 0:
        dist.barrier()
    dataset.transform = transform
    return dataset


def build_splits(name: str, path: Path | None, transform=None, download: bool = False):
    """`build_dataset` of train and test. UserError also if their classes differ."""
    train, test = (build_dataset(name, path, split, transform, download) for split in ("train", "test"))
    if train.classes != test.classes:
        differing = sorted(set(train.classes or ()) ^ set(test.classes or ()))
        what = f"{', '.join(differing[:10])} in one of them" if differing else "the same in another order"
        raise UserError(f"train and test in {path} have different classes: {what}")
    return train, test


def eval_transform(image_size: int, mean, std):
    """PIL image -> [3, image_size, image_size], normalised: bicubic resize of the shorter side and centre crop. The crop takes
    7/8 of the shorter side (224 of 256, as is usual for ImageNet), of images for at most 96 pixels all of it."""
    resized = round(image_size * 8 / 7) if image_size > 96 else image_size
    return transforms.Compose([transforms.Resize(resized, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(image_size),
                               transforms.ToTensor(), transforms.Normalize(mean, std)])


def _torchvision_dataset(name: str, path: Path, split: str, download: bool) -> LabelledImages:
    constructor, splits = TORCHVISION[name]
    try:
        parts = [getattr(datasets, constructor)(path, **arguments, download=download) for arguments in splits[split]]
    except Exception as error:  # urllib, ssl, tarfile and torchvision each raise their own
        doing, hint = (f"download {name} into", "Copy its files there") if download else (
            f"read {name} in", "Give its folder as --data_path, let --download fetch it")
        raise UserError(f"cannot {doing} {path}: {_reason(error)}. {hint}, or give a local copy as class folders with --dataset "
                        "folder --data_path DIR (DIR/train, DIR/test)") from error
    source = parts[0] if len(parts) == 1 else torch.utils.data.ConcatDataset(parts)
    classes = getattr(parts[0], "classes", None) or getattr(parts[0], "categories", None)
    if classes is None:  # svhn: digits
        classes = [str(label) for label in range(10)]
    indices = None
    if name in _TRAIN_PER_CLASS:
        labels, generator = torch.tensor(_targets(source)), torch.Generator().manual_seed(0)
        train, test = split_by_class(labels, _TRAIN_PER_CLASS[name], generator)
        indices = (train if split == "train" else test).sort().values.tolist()
    return LabelledImages(source, list(classes), indices=indices)


def split_by_class(labels: torch.Tensor, take, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of a random choice out of every class, and of all others, both class by class.

    labels: [N] in [0, C), on the CPU. take: from the classes' numbers of images [C], float64, to how many to choose, a number
        or [C].
    """
    counts = labels.bincount()
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]     # within its class
    chosen = place < torch.as_tensor(take(counts.double())).expand(len(counts))[labels[order]]
    return order[chosen], order[~chosen]


def _targets(source) -> list[int]:
    if isinstance(source, torch.utils.data.ConcatDataset):
        return [label for part in source.datasets for label in _targets(part)]
    name = next((name for name in ("targets", "labels", "_labels", "y") if hasattr(source, name)), None)
    if name is None:
        raise UserError(f"{type(source).__name__} keeps no list of its labels; use a copy as class folders, --dataset folder")
    return [int(label) for label in getattr(source, name)]


def _timm_dataset(name: str, path: Path | None, split: str, download: bool) -> LabelledImages | ImageStream:
    import timm.data  # slow to import, and only this needs it
    source = name.removeprefix("timm/")
    kind = source.partition("/")[0].lower()
    if kind in ("hfds", "hfids") and not download:
        raise UserError(f"{source} comes over the network or from its library's cache; add --download to allow it")
    if kind not in ("hfds", "hfids", "tfds", "wds", "torch") or source.lower() in ("torch/folder", "torch/image_folder"):
        path = _split_folder(path, split)  # timm's own search falls back on the whole of `path`
    reason = "it has no labels"
    for part in ("train",) if split == "train" else ("test", "validation"):  # sources name it either way
        try:
            dataset = timm.data.create_dataset(source, root=path and str(path), split=part, search_split=False, download=download)
        except Exception as error:  # every source raises its own
            reason = _reason(error)
            continue
        dataset = _from_timm(dataset)
        if split == "train" or next(iter(dataset), (None, 0))[1] >= 0:  # some publish their test set with labels of -1
            return dataset
    raise UserError(f"timm cannot open {source}, {split}, in {path}: {reason}; check --dataset, --data_path")


def _from_timm(dataset) -> LabelledImages | ImageStream:
    from timm.data import ImageDataset
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return ImageStream(dataset)
    if isinstance(dataset, ImageDataset):
        reader = _TimmImages(dataset.reader)
        return LabelledImages(reader, reader.classes)
    classes = getattr(dataset, "classes", None)  # of ImageNet, tuples of synonyms
    return LabelledImages(dataset, classes and [name if isinstance(name, str) else ", ".join(name) for name in classes])


class _TimmImages:
    """A timm reader's images and labels. Its own data set would put another image in the place of one that cannot be decoded."""

    def __init__(self, reader):
        self.reader = reader
        names = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
        self.classes = sorted(names, key=names.get) if names else None

    def __len__(self):
        return len(self.reader)

    def __getitem__(self, index: int):
        file, label = self.reader[index]
        with file:
            return load_image(file, name=self.reader.filename(index)), label

    @property
    def targets(self):
        if hasattr(self.reader, "iter_targets"):
            return list(self.reader.iter_targets())
        return getattr(self.reader, "targets", None) or [label for _, label in self.reader.samples]


def _split_folder(path: Path | None, split: str) -> Path:
    """The folder below `path` that holds a split's class folders."""
    if path is None:
        raise UserError("--data_path is missing; name a folder that holds train/ and test/ (or val/), or choose a --dataset")
    names = ("test", "val") if split == "test" else (split,)
    folders = [path / name for name in names if (path / name).is_dir()]
    if not folders:
        raise UserError(f"no folder {' or '.join(str(path / name) for name in names)}: --data_path must name a folder that "
                        "holds train/ and test/ (or val/), each with a folder of images per class")
    # ImageNet's test/ is without labels, its val/ is what everyone tests on.
    return next((folder for folder in folders if any(entry.is_dir() for entry in folder.iterdir())), folders[0])


def _image_folder(path: Path | None, split: str):
    folder = _split_folder(path, split)
    try:
        return datasets.ImageFolder(folder, loader=load_image)
    except FileNotFoundError as error:
        raise UserError(f"no images to use in {folder}: {_reason(error)}. It must hold a folder of images per class") from error


def load_image(file, name=None) -> Image.Image:
    """The RGB image of a file. UserError, with its name, if it cannot be decoded."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except _UNDECODABLE as error:
        raise UserError(f"cannot decode image {name or file}: {_reason(error)}; replace or remove it") from error
