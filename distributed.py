"""Processes that work together, started by torchrun, torch.distributed.launch or srun; or one alone.

Every function also works in a single process without a process group.
"""
import contextlib
import ipaddress
import os
import re
import socket
import sys
import threading
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlparse

import torch
import torch.distributed as dist

import utils
from utils import UserError

TIMEOUT = timedelta(minutes=30)  # of the rendezvous and of a collective
PATIENCE = 30                    # seconds before a rank says that it still waits for the others
LOST = 30                        # seconds without an answer from another host before a collective fails


def init_distributed(device: str = "auto", dist_url: str = "env://") -> torch.device:
    """Joins the process group if a launcher started this process. Returns the device to use: nccl serves
    GPUs, gloo CPUs. UserError for impossible ranks, a missing device, or a rendezvous that fails."""
    _read_slurm()
    world, rank = _variable("WORLD_SIZE", 1), _variable("RANK", None)
    if world < 1 or world > 1 and (rank is None or not 0 <= rank < world):
        raise UserError(f"WORLD_SIZE={world} and RANK={rank} contradict each other; start the processes with "
                        "torchrun, or unset both")
    local, local_world = _variable("LOCAL_RANK", rank), _variable("LOCAL_WORLD_SIZE", 1)
    chosen = utils.select_device(device)
    if world > 1 and chosen.type != "cpu":
        if ":" in device or chosen.type == "mps":
            raise UserError(f"--device {chosen} is one device for {world} processes; use cuda or cpu")
        gpus = torch.cuda.device_count()
        own = gpus == 1 and "SLURM_PROCID" in os.environ  # Slurm may show each process its own GPU
        if local_world > gpus and not own:
            raise UserError(f"{local_world} processes were started on this host, which has {gpus} GPU"
                            f"{'s' * (gpus > 1)}; start fewer, or use --device cpu")
        chosen = torch.device("cuda", local % gpus)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    if world > 1:
        _join(dist_url, rank, world, chosen)
    return chosen


def barrier() -> None:
    """Returns when all ranks have come here."""
    if world_size() > 1:
        dist.barrier()


def leave() -> None:
    """Leaves the process group, when all ranks have come here."""
    barrier()
    if world_size() > 1:
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, overwritten by its sum over ranks."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_of_floats(*values: float) -> list[float]:
    """Each of the numbers, summed over ranks."""
    return sum_over_ranks(torch.tensor(values, dtype=torch.float64)).tolist()


def check_same_over_ranks(*numbers: int) -> None:
    """UserError unless all ranks call this with the same numbers, of a run's position and data."""
    extremes = torch.tensor([numbers, [-number for number in numbers]])
    if world_size() > 1:
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if not torch.equal(extremes[0], -extremes[1]):
        raise UserError("processes see different checkpoints or images; --output_dir and --data_path must be "
                        "the same folders on all hosts")


def share(rows):
    """This rank's part of what all ranks hold: items rank, rank + W, ... of W ranks."""
    return rows[rank()::world_size()]


def gather_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """All `count` items in order, on every rank; `rows` [n, ...] is this rank's `share` of them."""
    if world_size() == 1:
        return rows
    gathered = rows.new_empty(count, *rows.shape[1:])
    for source in range(world_size()):  # one rank's rows after the other's: they may take gigabytes
        part = rows.contiguous() if source == rank() else torch.empty_like(gathered[source::world_size()])
        dist.broadcast(part, source)
        gathered[source::world_size()] = part
    return gathered


def gather_uneven(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, one rank after the other, on every rank's CPU; each may have any number."""
    parts = [rows.cpu()] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, parts[0])
    return torch.cat(parts)


@torch.no_grad()
def average_buffers(network):
    """Averages batch-norm running statistics over ranks: without SyncBatchNorm each rank has its own."""
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    if world_size() > 1 and buffers:
        means = sum_over_ranks(torch.cat([buffer.flatten() for buffer in buffers])).div_(world_size())
        for buffer, mean in zip(buffers, means.split([buffer.numel() for buffer in buffers])):
            buffer.copy_(mean.view_as(buffer))


def _join(url: str, rank: int, world: int, device: torch.device) -> None:
    address = f"tcp://{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT')}"
    where = address if url == "env://" else url
    host, folder = urlparse(where).hostname, Path(urlparse(where).path).parent
    if url.startswith("file://") and not folder.is_dir():
        raise UserError(f"--dist_url {url}: no folder {folder}; name one that all processes see")
    try:
        host and socket.getaddrinfo(host, None)
    except OSError:
        raise UserError(f"cannot resolve host {host!r}; check --dist_url or MASTER_ADDR") from None
    reminder = threading.Timer(PATIENCE, lambda: print(
        f"rank {rank} still waits for the other ranks of {world} at {where}", file=sys.stderr, flush=True))
    reminder.daemon = True
    reminder.start()
    try:
        store = next(dist.rendezvous(url, rank, world, timeout=TIMEOUT))[0]
        # torchrun keeps its store over restarts, with the addresses of the processes that ended
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        store.set_timeout(TIMEOUT)
        _check_address(store, rank, world)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        _notice_lost_hosts()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the {world} processes do not meet at {where}: {utils.reason(error)}") from error
    finally:
        reminder.cancel()


def _check_address(store, rank: int, world: int) -> None:
    """UserError if there are several hosts and gloo would tell the others an address of this one alone."""
    name = socket.gethostname()
    if rank in (0, world - 1):  # on the first and on the last host
        store.set(f"host of rank {rank}", name)
    first, last = store.multi_get(["host of rank 0", f"host of rank {world - 1}"])
    if first == last or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    try:
        addresses = sorted({info[4][0] for info in socket.getaddrinfo(name, None)})
    except OSError:
        addresses = ["127.0.0.1"]  # gloo's choice then
    if all(ipaddress.ip_address(address).is_loopback for address in addresses):
        there = ", ".join(interface for _, interface in socket.if_nameindex() if interface != "lo")
        raise UserError(f"other hosts cannot reach {name}: its name resolves to {', '.join(addresses)} here; "
                        "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to its network interface, one of "
                        f"{there}")


def _notice_lost_hosts() -> None:
    """Has Linux probe this process's connections: a collective fails LOST seconds after its peer's host was
    cut off, instead of after TIMEOUT. A host that is only busy still answers."""
    for entry in Path("/proc/self/fd").glob("*"):
        if entry.is_socket():
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in ((socket.TCP_KEEPIDLE, LOST // 3), (socket.TCP_KEEPINTVL, LOST // 6),
                                      (socket.TCP_KEEPCNT, 4), (socket.TCP_USER_TIMEOUT, 1000 * LOST)):
                    connection.setsockopt(socket.IPPROTO_TCP, option, value)  # the last in milliseconds


def _variable(name: str, default: int | None) -> int | None:
    """The whole number in an environment variable."""
    value = os.environ.get(name, "")
    if not value:
        return default
    if not value.lstrip("-").isdigit():
        raise UserError(f"{name}={value!r} is no whole number; unset it, or start with torchrun")
    return int(value)


def _read_slurm() -> None:
    """Translates srun's variables to those of torch's launchers, which come first."""
    env = os.environ
    tasks = _variable("SLURM_STEP_NUM_TASKS", 1)  # a batch script's own processes have SLURM_NTASKS alone
    if "RANK" in env or "SLURM_PROCID" not in env or tasks == 1:
        return
    hosts = env.get("SLURM_STEP_NODELIST", "localhost")
    host = re.match(r"([^\[,]+)(?:\[(\w+))?", hosts)  # the first of a list like gpu[07-09,12],login1
    env.setdefault("MASTER_ADDR", host[1] + (host[2] or ""))
    env.setdefault("MASTER_PORT", str(20000 + _variable("SLURM_JOB_ID", 0) % 20000))  # jobs share hosts
    counts = env.get("SLURM_STEP_TASKS_PER_NODE", str(tasks))
    nodes = []  # tasks of each node, from a list like 4(x2),3
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        nodes += [int(count)] * int(times or 1)
    node = _variable("SLURM_NODEID", 0)
    env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=str(tasks), LOCAL_RANK=env.get("SLURM_LOCALID", "0"),
               LOCAL_WORLD_SIZE=str(nodes[node] if node < len(nodes) else tasks))
