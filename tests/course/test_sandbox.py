"""What runs shut in computes and replies; everything else that it tries is refused, and harms nobody."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from course import seccomp
from labkit import files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="seccomp and Landlock are Linux's")
TRIES = {  # name -> an expression, and what is to come of it
    "compute": ("sum(range(10))", "45"),
    "import": ("__import__('wave').__name__", "'wave'"),  # of the standard library, and nobody's so far
    "half": ("len(bytes(sandbox.MEMORY // 2))", "536870912"),
    "hog": ("len(bytes(16 << 30))", "MemoryError"),
    "thread": ("threading.Thread(target=print).start()", "can't start new thread"),
    "fork": ("os.fork()", "Error"),
    "exec": ("os.execv('/bin/true', ['true'])", "PermissionError"),
    "udp": ("socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))", "PermissionError"),
    "tcp": ("socket.socket().connect(('127.0.0.1', 80))", "PermissionError"),
    "unix": ("socket.socket(socket.AF_UNIX).connect(sys.argv[1] + '/listening')", "PermissionError"),
    "kill": ("os.kill(os.getppid(), 9)", "PermissionError"),
    "stop": ("os.kill(os.getppid(), 19)", "PermissionError"),
    "signal": ("os.kill(1, 0)", "PermissionError"),
    "limits": ("resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))", "PermissionError"),
    "affinity": ("os.sched_setaffinity(os.getppid(), {0})", "PermissionError"),
    "priority": ("os.setpriority(os.PRIO_PROCESS, 0, 5)", "PermissionError"),
    "segments": ("[ctypes.CDLL(None).shmget(0, 4096, 0o1777), ctypes.CDLL(None).msgget(0, 0o1777)]", "[-1, -1]"),
    "root": ("os.listdir('/')", "PermissionError"),
    "lessons": ("os.listdir(str(files.NOTEBOOKS))", "PermissionError"),
    "others": ("open(sys.argv[1] + '/handed in').read()", "PermissionError"),
    "write": ("open(sys.argv[1] + '/new', 'w')", "PermissionError"),
    "temporary": ("tempfile.TemporaryFile()", "Error"),
    "truncate": ("os.truncate(sys.argv[1] + '/handed in', 0)", "PermissionError"),
    "cache": ("open(files.cache_dir() / 'x', 'w')", "Error"),
    "package": ("open(files.ROOT / 'labkit' / 'x.py', 'w')", "PermissionError"),
    "shared memory": ("os.memfd_create('x')", "PermissionError"),
    "segfault": ("ctypes.string_at(0)", "its process ended (SIGSEGV)"),
    "leave": ("os._exit(0)", "its process ended (code 0)"),
    "silence": ("os.closerange(0, 99) or input()", "its process ended"),
    "loop": ("[0 for _ in iter(int, 1)]", "stopped after 2 s: an endless loop"),
    "sleep": ("__import__('time').sleep(60)", "stopped after 2 s"),
    "output": ("[sys.stdout.write('x' * 1000) for _ in range(200_000)] and 1", "1"),
    "long": ("'x' * 10**7", "xxx"),
    "surrogate": ("chr(0xD800)", "ud800"),
}
SCRIPT = """
import ctypes, json, os, resource, socket, sys, tempfile, threading
from course import sandbox
from labkit import files

if sys.argv[2] != "0":
    os.setresgid(*3 * [int(sys.argv[2])])
    os.setresuid(*3 * [int(sys.argv[2])])
for name, expression in json.loads(sys.argv[3]).items():
    def work():
        try:
            return repr(eval(expression))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    try:
        measures, said = sandbox.run(work, seconds=2)
    except sandbox.Stopped as error:
        said = str(error)
    print(json.dumps([name, said]), flush=True)
print(json.dumps(["measures", measures]))
"""


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder with a file in it that everybody may read and write, were it not for the sandbox."""
    folder = Path(tempfile.mkdtemp())
    (folder / "handed in").write_text("somebody's work")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "user",
    [pytest.param(0, id="as whoever runs the tests"), pytest.param(54321, id="as a user", marks=pytest.mark.slow)],
)
def test_everything_but_computing_is_refused(outside: Path, user: int):
    if user and os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    if user and not all(folder.stat().st_mode & 1 for folder in (*files.ROOT.parents, *Path(sys.prefix).parents)):
        pytest.skip("the course lies in a folder that other users may not enter")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(outside / "listening"))
        listening.listen()
        listening.setblocking(False)
        for path in (outside, *outside.iterdir()):
            path.chmod(0o777)
        expressions = json.dumps({name: expression for name, (expression, _) in TRIES.items()})
        command = [sys.executable, "-c", SCRIPT, outside, str(user), expressions]
        process = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True, timeout=120)
        with pytest.raises(BlockingIOError):
            listening.accept()
    said = dict(map(json.loads, process.stdout.splitlines()))
    assert "seccomp" in said.pop("measures"), process.stderr
    assert {name: text[:200] for name, text in said.items() if TRIES[name][1] not in text} == {}
    assert said.keys() == TRIES.keys()
    assert (outside / "handed in").read_text() == "somebody's work" and not (outside / "new").exists()


HEADERS = {  # column of the table -> where Linux' numbers of the calls are, and how a line of it begins
    0: ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", r"#define __NR_"),
    1: ("/usr/include/asm-generic/unistd.h", r"#define __NR(?:3264)?_"),
}


@pytest.mark.parametrize("column", HEADERS)
def test_the_numbers_of_the_calls_are_the_kernel_s(column: int):
    file, prefix = HEADERS[column]
    if not Path(file).exists():
        pytest.skip(f"needs {file} (linux-libc-dev)")
    numbers = {name: int(number) for name, number in re.findall(rf"{prefix}(\w+)\s+(\d+)\b", Path(file).read_text())}
    numbers.setdefault("newfstatat", numbers.get("fstatat"))  # what the generic table calls it
    assert {name: row[column] for name, row in seccomp.ALLOWED.items()} == {
        name: numbers.get(name) for name in seccomp.ALLOWED
    }


def test_a_filter_fits_into_the_jumps_of_its_language():
    for machine in ("x86_64", "aarch64"):
        steps = seccomp.program(machine)
        assert len(steps) < 256 and len(seccomp.assembled(steps)) == 8 * len(steps)
