"""No hand-in harms the machine, its instructor or another student: every attack of attacks.py, beside honest students.

As root and as an ordinary user, with the versions of Landlock that kernels from 5.13 on have, and without it.
"""

import ctypes
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from attacks import ATTACKS, PRELUDE, Attack
from commands import wait_until
from handins import CONV, FULL, LESSON, solved, with_first_line, write
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from course import grade
from labkit import files
from labkit.storage import native

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="seccomp and Landlock are Linux's"),
    pytest.mark.slow,
]
ORDINARY = 54321  # a user id that no account has
HONEST = ("honest", "0 first", "zoe, the last")
# Files, sockets and signals: all that the versions of Landlock treat differently. The rest of the table is tried with
# the newest version, and each night without Landlock.
BY_VERSION = frozenset({
    "read", "write", "truncate", "names", "attributes", "permissions", "network", "signals", "neighbours"
})  # fmt: skip
ALL = frozenset(attack.category for attack in ATTACKS)
SCRIPT = """
import json, sys
from pathlib import Path
from course import grade
book = grade.grade(Path(sys.argv[1]), seconds=5, newest_abi=int(sys.argv[2]))
grade.write(book, Path(sys.argv[1]))
rows = [(row.student, row.exercise.id, row.points, row.result, row.reason) for row in book.grades]
print(json.dumps([rows, book.measures, book.incomplete]))
"""


@dataclass
class School:
    """A class's folder, and what lies around it, all owned by the user who grades."""

    folder: Path
    user: int
    attacks: tuple[Attack, ...]

    @property
    def students(self) -> Path:
        return self.folder / "class"

    def places(self) -> str:
        """The lines of an answer that name what there is to attack."""
        named = {
            "CLASS": self.students, "NEIGHBOUR": self.students / "honest" / f"{LESSON}.ipynb",
            "HOME": self.folder / "home", "EMPTY": self.folder / "empty", "MODELS": self.folder / "cache",
            "MODEL": self.folder / "cache" / "model", "LISTENING": self.folder / "listening", "ABSTRACT": self.abstract,
            "LESSONS": files.NOTEBOOKS, "LABKIT": files.ROOT / "labkit", "LESSON": LESSON,
        }  # fmt: skip
        return "".join(f"{name} = {str(value)!r}\n" for name, value in named.items())

    @property
    def abstract(self) -> str:
        return f"labkit-{self.folder.name}"

    def state(self) -> dict[Path, tuple]:
        """All that can be changed about each file; without what grading and matplotlib write themselves."""
        written = [self.students / name for name in grade.FILES]
        written += [self.folder / "home" / name for name in (".cache", ".config")]
        paths = [self.folder, *self.folder.rglob("*")]
        return {path: _state(path) for path in paths if not {path, *path.parents} & set(written)}


def _state(path: Path) -> tuple:
    status = path.lstat()
    attributes = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    changed = None if path.name in ("class", "home") else status.st_mtime_ns  # these two get new files, see above
    content = path.read_bytes() if path.is_file() else b""
    return status.st_mode, status.st_uid, status.st_gid, changed, attributes, content


def cases() -> Iterator[object]:
    """Yield (version of Landlock, user, categories of attacks); all but three of them are tried each night only.

    Version 0 is a kernel without Landlock. The version that a new kernel has is tried as both users; without Landlock
    an ordinary user has the least protection.
    """
    each_time = [(6, 0, ALL), (6, ORDINARY, ALL), (0, ORDINARY, BY_VERSION)]
    rarely = itertools.product((3, 2, 1, 0), (0, ORDINARY), (BY_VERSION,))
    each_night = [*rarely, (0, 0, ALL - BY_VERSION), (0, ORDINARY, ALL - BY_VERSION)]
    for case in dict.fromkeys([*each_time, *each_night]):
        version, user, categories = case
        marks = () if case in each_time else pytest.mark.nightly
        who = "as an ordinary user" if user else "as whoever runs the tests"
        what = "" if categories >= BY_VERSION else "-the rest"
        yield pytest.param(*case, marks=marks, id=f"{who}-Landlock {version}{what}")


@pytest.fixture
def school(abi: int, user: int, categories: frozenset[str]) -> Iterator[School]:
    if abi > newest_abi():
        pytest.skip(f"this kernel has Landlock {newest_abi()}")
    if user and os.geteuid() != 0:
        pytest.skip("only root can become somebody else, and the other half of these tests runs as an ordinary user")
    if user and not shutil.which("setpriv"):
        pytest.skip("needs setpriv (util-linux)")
    folder = Path(tempfile.mkdtemp(prefix="labkit-school-"))
    try:
        attacks = [attack for attack in ATTACKS if attack.category in categories]
        opened = School(folder, user, tuple(attacks))
        furnish(opened)
        yield opened
    finally:
        shutil.rmtree(folder)


def furnish(school: School) -> None:
    """Put into the folder what the attacks are after, and every student's hand-in; all belongs to the grader."""
    school.folder.chmod(0o755)
    for name in ("class", "home", "empty", "cache"):
        (school.folder / name).mkdir()
    (school.folder / "cache" / "model").write_bytes(b"weights" * 1000)
    if all(map(native.load, native.ARGUMENTS)):  # else the grading would compile them into this cache
        shutil.copytree(files.cache_dir() / "kernels", school.folder / "cache" / "kernels")
    for student in HONEST:
        write(school.students, student, with_first_line(CONV, "# SECRET-OF-HONEST"))
    attacked = next(cell for cell in solved().cells if f"def {CONV}(" in cell.source)
    for attack in school.attacks:
        write(school.students, attack.name, hand_in(attacked, attack, school))
    if school.user:
        for path in (school.folder, *school.folder.rglob("*")):
            os.chown(path, school.user, school.user)
    with suppress(OSError):  # not every file system has them
        os.setxattr(school.folder / "cache" / "model", "user.kept", b"1")


def hand_in(cell: NotebookNode, attack: Attack, school: School) -> NotebookNode:
    """A notebook with one answer, which attacks: `cell`, a solved one, with the attack at its beginning."""
    docstring = next(line for line in cell.source.splitlines() if line.strip().startswith('"""'))
    once = "if calls:\n    return None\ncalls.append(1)\n"
    body = textwrap.indent(f"{once}{attack.source.strip()}\nreturn None", "    ")
    source = PRELUDE + "calls = []\n" + school.places() + cell.source.replace(docstring, f"{docstring}\n{body}")
    return new_notebook(cells=[new_code_cell(source, id=cell.id)], metadata={"labkit": {"lesson": LESSON}})


def as_user(user: int) -> list[str]:
    """The beginning of a command that runs as a user, who may enter Python's folder where else only root may."""
    if not user:
        return []
    command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    if not all(folder.stat().st_mode & 1 for folder in (*files.ROOT.parents, *Path(sys.base_prefix).parents)):
        command += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return command


def newest_abi() -> int:
    """The version of Landlock that the kernel has; 0 where there is none."""
    return max(0, ctypes.CDLL(None).syscall(444, None, 0, 1))


@pytest.mark.parametrize(("abi", "user", "categories"), list(cases()))
def test_nobody_loses_a_point_and_nothing_changes(school: School, abi: int):
    environment = {
        **os.environ,
        "PYTHONPATH": str(files.ROOT),
        "HOME": str(school.folder / "home"),
        "LABKIT_CACHE": str(school.folder / "cache"),
        "TOKEN_OF_THE_INSTRUCTOR": "secret",
    }
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as abstract:
        for server, address in ((listening, school.folder / "listening"), (abstract, f"\0{school.abstract}")):
            server.bind(str(address))
            server.listen()
            server.setblocking(False)
        before = school.state()
        command = [*as_user(school.user), sys.executable, "-c", SCRIPT, str(school.students), str(abi)]
        graded = subprocess.run(command, cwd=files.ROOT, env=environment, capture_output=True, text=True, timeout=300)
        for server in (listening, abstract):
            with pytest.raises(BlockingIOError):
                server.accept()
        after = school.state()
    assert graded.returncode == 0, graded.stderr
    rows, measures, incomplete = json.loads(graded.stdout)
    assert ("Landlock)" in measures) and ("(no Landlock)" in measures) == (abi == 0) and not incomplete
    lost = [(student, *row) for student, *row in rows if student in HONEST and row[2] != "passed"]
    assert lost == [] and sum(row[0] in HONEST for row in rows) == len(HONEST) * len(FULL)
    verdicts = {name: (result, reason) for name, id, _, result, reason in rows if id == "01.1"}
    assert [attack.name for attack in school.attacks if verdicts[attack.name][0] == "passed"] == []
    expected = [attack for attack in school.attacks if abi or not attack.needs_landlock]
    wrong = {a.name: verdicts[a.name] for a in expected if not re.search(a.reason, verdicts[a.name][1])}
    print(json.dumps(wrong, indent=1))
    assert wrong == {}
    assert after == before
    for name in ("grades.csv", "grades.html"):
        text = (school.students / name).read_text(encoding="utf-8")
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    wait_until(lambda: not leftover(school))


def leftover(school: School) -> list[psutil.Process]:
    """Processes of the grading that are still there, known by the environment that they were given."""
    return [process for process in psutil.process_iter() if cache_of(process) == str(school.folder / "cache")]


def cache_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("LABKIT_CACHE")
    except psutil.Error:
        return None


def test_the_table_is_large_and_has_no_name_twice():
    names = {attack.name for attack in ATTACKS}
    assert len(names) == len(ATTACKS)
    assert sum(attack.category in BY_VERSION for attack in ATTACKS) >= 60
    assert len({attack.category for attack in ATTACKS} - BY_VERSION) >= 5
