"""Runs in a process of their own that end before their time, and what they leave."""

import hashlib
import os
import signal
from pathlib import Path

from conftest import Quiet

from qkit.workflows.quantize import Request, quantize

BLOCKS = 4


def contents(folder: Path) -> dict[str, str]:
    """{file: sha256} of everything in a folder but the lock, which names the last process."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lock")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Bomb(Quiet):
    """Kills its own process, as kill -9 would, when progress was told ``after`` times."""

    def __init__(self, after: int) -> None:
        self.left = after

    def start(self, what: str, total: int) -> None:
        self.step()

    def step(self, amount: int = 1) -> None:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(action) -> int:
    """Wait status of a forked child that runs ``action``; 0 when it came to its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def killed_after(request: Request, out: Path, after: int) -> bool:
    """Run until progress was told ``after`` times; whether the run was killed before its end."""
    return killed(in_child(lambda: quantize(request, out, Bomb(after))))
