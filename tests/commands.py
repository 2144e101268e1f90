"""Commands of the course under test: called here, or as processes that a test waits for, interrupts and kills."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from click.testing import CliRunner, Result

from course.cli import main


def labkit(*arguments: object) -> Result:
    """The command in this process, as ./lab would call it."""
    return CliRunner().invoke(main, list(map(str, arguments)))


def started(notebooks: Path, *arguments: object) -> subprocess.Popen:
    """The command as a process of its own, on the lessons in a folder."""
    code = "import sys, pathlib, course.cli as c; c.files.NOTEBOOKS = pathlib.Path(sys.argv.pop(1)); c.main()"
    command = [sys.executable, "-c", code, notebooks, *arguments]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"still waiting after {seconds} s"
        time.sleep(0.05)


def accepts_connections(port: int) -> bool:
    try:
        socket.create_connection(("localhost", port), timeout=5).close()
    except OSError:
        return False
    return True
