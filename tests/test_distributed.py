"""Joining a process group by the variables of launchers, and what ranks tell one another (gloo, forked)."""
import contextlib
import os
import re
import socket
from datetime import timedelta
from types import SimpleNamespace

import distributed
import interrupt
import pytest
import torch
import torch.distributed as dist
from conftest import refusal, run_ranks


@pytest.fixture
def environment(monkeypatch):
    """Sets os.environ to what is given alone."""
    return lambda **values: monkeypatch.setattr(os, "environ", values)


PAIR = {"WORLD_SIZE": "2", "RANK": "0"}


@pytest.mark.parametrize("values, url, message", [
    ({"WORLD_SIZE": "2"}, "env://", "WORLD_SIZE=2 and RANK=None contradict"),
    ({"WORLD_SIZE": "x"}, "env://", "WORLD_SIZE='x' is no whole number"),
    ({"WORLD_SIZE": "2", "RANK": "2"}, "env://", "RANK=2 contradict"),
    (PAIR, "env://", "do not meet.*MASTER_"),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "x"}, "env://",
     "SLURM_STEP_NUM_TASKS='x' is no whole number"),
    (PAIR | {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"}, "env://",
     "cannot resolve host 'nowhere.invalid'; check"),
    (PAIR, "file:///nowhere/x/meet", "no folder /nowhere/x"), (PAIR, "nonsense", "do not meet at nonsense"),
    (PAIR, "tcp://localhost:99999", "do not meet at tcp://localhost:99999")])
def test_a_rendezvous_that_cannot_be_is_refused_at_once(environment, monkeypatch, values, url, message):
    def resolve(host, port):
        if host != "localhost":
            raise OSError("Name or service not known")
    monkeypatch.setattr(distributed.socket, "getaddrinfo", resolve)  # without asking a name server
    environment(**values)
    assert re.search(message, refusal(distributed.init_distributed, "cpu", url))


def test_a_rank_that_waits_says_so(environment, monkeypatch, capfd, tmp_path):
    environment(**PAIR)
    monkeypatch.setattr(distributed, "PATIENCE", 0.1)
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=0.5))
    url = f"file://{tmp_path}/meet"
    assert f"the 2 processes do not meet at {url}: " in refusal(distributed.init_distributed, "cpu", url)
    assert capfd.readouterr().err.startswith("rank 0 still waits for the other ranks of 2 at file:///")


def test_the_device_of_a_process(environment, monkeypatch):
    chosen, init = [], distributed.init_distributed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    monkeypatch.setattr(distributed, "_join", lambda url, rank, world, device: None)
    environment()
    names = "cuda:1", "auto", "cpu"                                     # auto: the current one
    assert [str(init(name)) for name in names] == ["cuda:1", "cuda", "cpu"] and chosen == [1]
    environment(WORLD_SIZE="8", RANK="6", LOCAL_RANK="2", LOCAL_WORLD_SIZE="4")
    assert str(init("auto")) == "cuda:2" and chosen == [1, 2]
    assert "--device cuda:1 is one device for 8 processes" in refusal(init, "cuda:1")
    environment(WORLD_SIZE="8", RANK="6", LOCAL_RANK="6", LOCAL_WORLD_SIZE="8")
    assert "8 processes were started on this host, which has 4 GPUs" in refusal(init, "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "8 processes were started on this host, which has 1 GPU;" in refusal(init, "cuda")
    environment(WORLD_SIZE="8", RANK="6", LOCAL_RANK="6", LOCAL_WORLD_SIZE="8", SLURM_PROCID="6")
    # Slurm may show each task its own
    assert str(init("cuda")) == "cuda:0" and chosen == [1, 2, 0]


@pytest.mark.parametrize("other, address, interface, refused", [
    ("far", "127.0.1.1", "", True), ("far", None, "", True), ("far", "127.0.1.1", "eth0", False),
    ("far", "10.0.0.1", "", False), ("here", "127.0.1.1", "", False)])
def test_a_host_that_others_cannot_reach(environment, monkeypatch, other, address, interface, refused):
    def resolve(host, port):
        if address is None:
            raise OSError("Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]
    environment(GLOO_SOCKET_IFNAME=interface)
    monkeypatch.setattr(distributed.socket, "gethostname", lambda: "here")
    monkeypatch.setattr(distributed.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(distributed.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "ib0")])
    store = dist.HashStore()
    store.set("host of rank 2", other)
    if refused:
        assert re.search(r"cannot reach here: .* 127.0.*GLOO_SOCKET_IFNAME.* eth0, ib0$",
                         refusal(distributed._check_address, store, 0, 3))
    else:
        distributed._check_address(store, 0, 3)
    assert store.get("host of rank 0") == b"here"


TASK = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.mark.parametrize("given, expected", [
    ({"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "11", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "41",
      "SLURM_STEP_NODELIST": "gpu[07-09,12],login", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
      "SLURM_NODEID": "2"},
     {"RANK": "9", "WORLD_SIZE": "11", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "gpu07",
      "MASTER_PORT": "20041"}),
    (TASK | {"SLURM_STEP_NODELIST": "node-1,node-2", "MASTER_PORT": "5",
             "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
     {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "node-1",
      "MASTER_PORT": "5"}),
    (TASK | {"SLURM_STEP_NUM_TASKS": "1"}, {}),  # one task: no group
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {}),  # in a batch script, without srun
    (TASK | {"RANK": "1", "WORLD_SIZE": "4"}, {"RANK": "1", "WORLD_SIZE": "4"})])  # torchrun in a job
def test_what_slurm_says(environment, given, expected):
    environment(**given)
    distributed._read_slurm()
    assert {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} == expected


@pytest.mark.parametrize("world", [1, 3])
def test_shares_sums_and_gathers(world):
    rows = torch.arange(14).view(7, 2)

    def tell():
        rank = distributed.rank()
        gathered = [distributed.gather_rows(distributed.share(rows[:count]), count) for count in (7, 2, 1)]
        return (rank, distributed.world_size(), distributed.share(range(7)), gathered,
                distributed.sum_over_ranks(torch.tensor([rank, 1])), distributed.sum_of_floats(0.5, rank),
                distributed.check_same_over_ranks(3, 4),
                world > 1 and refusal(distributed.check_same_over_ranks, 3, min(rank, 1)))
    for rank, (own, size, share, gathered, total, floats, _, other) in enumerate(run_ranks(tell, world)):
        assert (own, size, list(share)) == (rank, world, [n for n in range(7) if n % world == rank])
        assert all(torch.equal(part, rows[:count]) for part, count in zip(gathered, (7, 2, 1)))
        assert total.tolist() == [sum(range(world)), world] and floats == [0.5 * world, sum(range(world))]
        assert world == 1 or other.startswith("processes see different checkpoints or images")


def test_a_restart_does_not_see_the_addresses_of_the_attempt_before(environment, monkeypatch):
    """torchrun keeps its store, with those of the processes that ended."""
    outliving, stores = dist.HashStore(), []
    monkeypatch.setattr(dist, "rendezvous", lambda *args, **more: iter([(outliving,)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, store, **more: stores.append(store))
    for waits_for_others in ("_check_address", "_notice_lost_hosts"):
        monkeypatch.setattr(distributed, waits_for_others, lambda *args: None)
    for attempt in ("0", "1"):
        environment(**PAIR, TORCHELASTIC_RESTART_COUNT=attempt, MASTER_ADDR="localhost", MASTER_PORT="29500")
        distributed.init_distributed("cpu")
        stores[-1].set("address", attempt)
    assert [store.get("address") for store in stores] == [b"0", b"1"]


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux")
def test_connections_between_hosts_are_probed(tmp_path):
    def main():
        distributed.init_distributed("cpu")
        for entry in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # no socket, or not connected
                connection = socket.socket(fileno=os.dup(int(entry)))
                if connection.family != socket.AF_UNIX and connection.getpeername():
                    print(connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                          connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
        distributed.leave()
    script = SimpleNamespace(main=lambda arguments: main())
    for result in interrupt.run_ranks([], tmp_path, script, codes=(0, 0)):
        probed = result.stdout.splitlines()  # of the store's connection and gloo's
        assert len(probed) > 1 and set(probed) == {"1 30000"}, result
