"""Commands of the course under test: called here, or as processes that a test waits for, interrupts and kills."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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


def record_at_smoke(lesson: Path, folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a lesson at smoke in a folder by nbval, which compares its stable cells with what is stored: its record."""
    shutil.copy(lesson, folder)  # nbval works in the notebook's folder
    plugins = ["-p", "course", "-p", "nbval.plugin"]
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=3600", "-q", f"--rootdir={folder}"]
    command = [sys.executable, "-m", "pytest", *plugins, *options, folder / lesson.name]
    settings = {"LABKIT_PRESET": "smoke", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    nbval = subprocess.run(command, cwd=folder, env={**environment, **settings}, capture_output=True, text=True)
    assert nbval.returncode == 0, nbval.stdout[-5000:]
    return json.loads(next(folder.glob("runs/*/record.json")).read_text(encoding="utf-8"))


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
