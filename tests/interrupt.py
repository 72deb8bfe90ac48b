"""Runs scripts in forked processes; a signal hits one at the n-th call of a function, an instant chosen."""
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
import utils

POINTS = {"step": (torch.optim.AdamW, "step"),  # within an epoch
          "fsync": (os, "fsync"),               # a file is written aside, but not renamed yet
          "replace": (os, "replace"),           # it has just been renamed
          "evaluate": (None, "evaluate")}       # of the script
PATIENCE = 90                                   # seconds before a process that hangs is killed


def run(arguments: list[str], folder: Path, point: str | None = None, count: int = 0, name: str = "KILL",
        script=None, code: int | None = None) -> SimpleNamespace:
    """`script.main(arguments)`, by default cifar/main.py's, as its users start it: returncode (negative for a
    signal), stdout and stderr, which are also files of `folder`. code: the returncode that is asserted.

    point: a key of POINTS, at whose `count`-th call SIG`name` goes to the process and its workers, as
        from a terminal or launcher.
    """
    script = script or importlib.import_module("cifar.main")
    result = _wait(_start(arguments, folder, point, count, name, script, {}))
    assert code in (None, result.returncode), result
    return result


def run_ranks(arguments, folder: Path, script, world: int = 2, victim: int = 0, point: str | None = None,
              count: int = 0, name: str = "KILL", variables=("RANK", "WORLD_SIZE", "LOCAL_RANK"),
              codes: tuple | None = None) -> list:
    """The script in `world` processes that meet as a launcher's do, by the environment `variables` for rank,
    number of ranks and rank on this host; `point` concerns rank `victim`. `arguments`: also by rank.
    codes: the returncodes that are asserted."""
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(world):
        (place := folder / str(rank)).mkdir(exist_ok=True)
        given = arguments(rank) if callable(arguments) else arguments
        values = dict(zip(variables, (str(rank), str(world), str(rank))))
        at = point if rank == victim else None
        started.append(_start(given, place, at, count, name, script, meeting | values))
    results = [_wait(process) for process in started]
    assert codes in (None, tuple(result.returncode for result in results)), results
    return results


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _start(arguments, folder, point, count, name, script, environment):
    files = [folder / name for name in ("stdout", "stderr")]
    if (pid := os.fork()) == 0:
        os.environ.update(environment)
        _become_script(arguments, files, point, count, name, script)
    return pid, files


def _wait(process):
    pid, files = process
    deadline = time.monotonic() + PATIENCE
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    if ended == (0, 0):
        os.killpg(pid, signal.SIGKILL)
        ended = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(ended[1])
    return SimpleNamespace(returncode=code, stdout=files[0].read_text(), stderr=files[1].read_text())


def _become_script(arguments, files, point, count, name, script):
    code = 1
    try:
        os.setsid()
        for descriptor, (file, stream) in enumerate(zip(files, ("stdout", "stderr")), 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            setattr(sys, stream, open(descriptor, "w", buffering=1, closefd=False))
        torch.set_num_threads(1)  # the parent's threads are not here
        if point:
            _arm(point, count, name, script)
        utils.run_script(lambda: script.main(arguments))
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _arm(point, count, name, script=None):
    owner, attribute = POINTS[point]
    owner = owner or script
    original, calls = getattr(owner, attribute), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs)
        if calls == count:
            os.killpg(0, getattr(signal, f"SIG{name}"))
        return result
    setattr(owner, attribute, counted)
