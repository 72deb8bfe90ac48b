"""Training and evaluation over several hosts: network namespaces, each with its own address and name (Linux).

    python benchmarks/hosts.py        # five minutes on two idle cores; needs iproute2 and util-linux, no root

torchrun joins the hosts by c10d rendezvous, main.py trains on them: the weights equal those of one host with
as many processes. A host is cut off: every rank ends within a minute, with one line. With --max-restarts
the run goes on when the host is back, to the same weights. eval_knn.py and eval_linear.py over two hosts
equal one process. As on Debian, a host's own name resolves to 127.0.1.1 on it, so GLOO_SOCKET_IFNAME names
the interface; without it they ask for it. Exit code 1 if a check fails, 0 if namespaces are not allowed.
"""
import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NAMESPACES = ["unshare", "--map-root-user", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child",
              "--mount-proc"]  # all that is made here ends with them
INTERFACE, LIMIT = {"GLOO_SOCKET_IFNAME": "eth0"}, 600  # LIMIT: seconds before a launch counts as hanging
TRAIN = ("main.py --arch vit_tiny --patch_size 8 --global_crops_size 32 --local_crops_size 16 "
         "--local_crops_number 2 --out_dim 64 --epochs 2 --print_freq 1 --save_every 2 --amp none "
         "--batch_size_per_gpu 4").split()
failed = []


def report(name: str, good: bool, started: float, *launches) -> None:
    """Prints whether a check passes, else also the last lines of the launches."""
    print(f"{'ok' if good else 'FAILED':6} {time.monotonic() - started:4.0f} s  {name}", flush=True)
    if not good:
        failed.append(name)
        print(*(launch.tell() for launch in launches), flush=True)


def make_hosts(count: int) -> None:
    """Hosts h1, h2, ... with addresses 10.0.0.1, ...; cables go to port1, port2, ... of a bridge."""
    commands = ["mount -t tmpfs tmpfs /run", "ip link add name bridge type bridge", "ip link set bridge up"]
    for n in range(1, count + 1):
        commands += [f"ip netns add h{n}", f"ip link add port{n} type veth peer name eth0 netns h{n}",
                     f"ip link set port{n} master bridge up", f"ip -n h{n} link set lo up",
                     f"ip -n h{n} addr add 10.0.0.{n}/24 dev eth0", f"ip -n h{n} link set eth0 up"]
    for command in commands:
        subprocess.run(command.split(), check=True)
    for n in range(1, count + 1):
        names = [f"{'127.0.1.1' if m == n else f'10.0.0.{m}'} h{m}\n" for m in range(1, count + 1)]
        Path(f"/run/hosts{n}").write_text("127.0.0.1 localhost\n" + "".join(names))


class Launch:
    """torchrun of `script`, started on the first `hosts` hosts, with `local` processes on each."""

    def __init__(self, folder: Path, script: list[str], hosts=1, local=1, restarts=0, environment=INTERFACE):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={hosts}",
                   f"--nproc_per_node={local}", "--rdzv-backend=c10d", "--rdzv-endpoint=h1:29500",
                   f"--max-restarts={restarts}", *script, "--device", "cpu", "--num_workers", "0",
                   "--output_dir", str(folder / "out")]
        self.log, self.started, self.processes, self.files = folder / "out/log.txt", time.monotonic(), [], []
        for n in range(1, hosts + 1):
            enter = f'hostname h{n} && mount --bind /run/hosts{n} /etc/hosts && exec "$@"'
            inside = ["nsenter", f"--net=/run/netns/h{n}", "unshare", "--mount", "--uts",
                      "sh", "-c", enter, "-"]
            self.files.append(folder / f"h{n}.txt")
            with open(self.files[-1], "w") as file:
                self.processes.append(subprocess.Popen(
                    [*inside, *command], cwd=ROOT, stdout=file, stderr=file, start_new_session=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}))

    def wait_for(self, condition, limit=LIMIT) -> bool:
        """Whether the condition comes true within `limit` seconds; then, or else, the run goes on."""
        deadline = time.monotonic() + limit
        while not (met := condition()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return bool(met)

    def finish(self) -> bool:
        """Whether all launchers end with code 0. Whatever is left is killed."""
        self.wait_for(lambda: all(process.poll() is not None for process in self.processes))
        return self.kill() == [0] * len(self.processes)

    def kill(self) -> list[int]:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return [process.wait() for process in self.processes]

    def errors(self) -> list[list[str]]:
        """The error lines of each host's ranks."""
        return [[line for line in file.read_text().splitlines() if line.startswith("error: ")]
                for file in self.files]

    def records(self) -> int:
        return self.log.read_text().count("\n") if self.log.exists() else 0

    def tell(self) -> str:
        return "".join(f"\n--- {file}\n{file.read_text()[-1500:]}" for file in self.files)


def tensors(path: Path) -> list:
    """The tensors of a checkpoint, in order."""
    def walk(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from walk(item)
    return list(walk(torch.load(path, weights_only=True)))


def same_weights(first: Path, second: Path) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(first), tensors(second), strict=True))


def check_training(folder: Path, script: list[str], hosts: int) -> None:
    """Leaves the checkpoint of one host in folder/one{hosts}."""
    one = Launch(folder / f"one{hosts}", script, local=hosts)
    good = one.finish()
    report(f"1 host x {hosts} processes trains", good, one.started, one)
    many = Launch(folder / f"many{hosts}", script, hosts)
    good = many.finish() and same_weights(*(run.log.with_name("checkpoint.pth") for run in (one, many)))
    report(f"{hosts} hosts x 1: weights and optimiser equal, bitwise", good, many.started, many)


def check_cut(folder: Path, script: list[str], restarts: int) -> None:
    run = Launch(folder / f"cut{restarts}", script, 2, restarts=restarts)
    run.wait_for(lambda: run.records() >= 3)
    subprocess.run("ip link set port2 down".split(), check=True)
    cut = time.monotonic()
    good = run.wait_for(lambda: all(run.errors()), 60) and all(len(lines) == 1 for lines in run.errors())
    report("h2 is cut off: both ranks end, with a line each", good, cut, run)
    if restarts == 0:
        good = run.wait_for(lambda: run.processes[0].poll() is not None, 60)
        report("... and the launcher of h1, which holds the store", good, cut, run)
        run.wait_for(lambda: run.processes[1].poll() is not None, 60)
        print("               the launcher of h2", "waits" if run.processes[1].poll() is None else "ended")
        run.kill()
    subprocess.run("ip link set port2 up".split(), check=True)
    if restarts:
        back = time.monotonic()
        good = run.finish() and same_weights(run.log.with_name("checkpoint.pth"),
                                             folder / "one2" / "out" / "checkpoint.pth")
        report("h2 is back: the run ends with the same weights", good, back, run)


def check_evaluation(folder: Path, weights: Path, labelled: Path) -> None:
    common = ["--pretrained_weights", str(weights), "--data_path", str(labelled), "--batch_size_per_gpu"]

    def run(script, hosts, *flags):
        launch = Launch(folder / f"{script}{hosts}", [script, *common, str(8 // hosts), *flags], hosts)
        return launch, launch.finish()
    (one, good), (two, also) = (run("eval_knn.py", hosts, "--nb_knn", "3", "5") for hosts in (1, 2))
    good = good and also and len({launch.log.with_name("knn.txt").read_text() for launch in (one, two)}) == 1
    report("eval_knn.py over 2 hosts equals one process, every digit", good, two.started, one, two)
    (one, good), (two, also) = (run("eval_linear.py", hosts, "--epochs", "2") for hosts in (1, 2))
    heads = [tensors(launch.log.with_name("checkpoint.pth.tar")) for launch in (one, two) if good and also]
    apart = max([(x.double() - y).abs().max().item() for x, y in zip(*heads, strict=True)], default=1)
    report(f"eval_linear.py over 2 hosts: heads and momentum equal one process's to {apart:.0e}",
           apart < 1e-5, two.started, one, two)


def check_names(folder: Path, script: list[str]) -> None:
    run = Launch(folder / "names", script, 2, environment={})
    ended = not run.finish()
    lines = [line for lines in run.errors() for line in lines]  # of the first, which ends the others
    good = ended and bool(lines) and all("GLOO_SOCKET_IFNAME" in line for line in lines)
    report("without GLOO_SOCKET_IFNAME all end, and a line asks for it", good, run.started, run)
    print(*lines[:1])


def main() -> None:
    if sys.argv[1:] != ["--inside"]:
        layout = argparse.RawDescriptionHelpFormatter
        argparse.ArgumentParser(description=__doc__, formatter_class=layout).parse_args()
        probe = subprocess.run([*NAMESPACES, "ip", "link"], capture_output=True, text=True)
        if probe.returncode:
            return print(f"skipped: namespaces are not allowed here: {probe.stderr.strip()}")
        os.execvp(NAMESPACES[0], [*NAMESPACES, sys.executable, __file__, "--inside"])
    make_hosts(3)
    with tempfile.TemporaryDirectory() as name:
        folder, generator = Path(name), torch.Generator().manual_seed(0)
        for number in range(48):  # two classes, one brighter than the other; a quarter to test on
            label, split = number % 2, "val" if number % 8 > 5 else "train"
            pixels = torch.randint(128 + 127 * label, (32, 32, 3), dtype=torch.uint8, generator=generator)
            path = folder / "images" / split / "ab"[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(path)
        script = [*TRAIN, "--data_path", str(folder / "images" / "train")]
        for hosts in (2, 3):
            check_training(folder, script, hosts)
        check_evaluation(folder, folder / "one2/out/checkpoint.pth", folder / "images")
        for restarts in (0, 3):
            check_cut(folder, script, restarts)
        check_names(folder, script)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
