"""Students' answers run with their checks, each in a process of its own that holds nobody else's.

A warm process imports once what the answers need. For each answer it forks a keeper, which only then reads the answer
from the grader, forks once more, and has the answer run shut in (course.sandbox). So a student's source is in the
grader's memory, its keeper's and its own, and never where another answer runs; and a keeper that dies costs no other
answer its grade.
"""

import ast
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from course import sandbox
from labkit import files
from labkit.lesson import check as checks

RESULTS = ("passed", "wrong", "not done", "broken", "stopped")
LONGEST_REASON = 300  # characters
AT_ONCE = min(4, os.cpu_count() or 1)
_ENVIRONMENT = re.compile(  # what an answer sees: nobody's keys and tokens
    r"PATH|HOME|LANG|LC_.+|TZ|CXX|PYTHON.+|LD_LIBRARY_PATH|XDG_CACHE_HOME|LABKIT_.+|(ATEN|ONEDNN|DNNL|MKL)_.+"
)
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # since it forks


@dataclass(frozen=True)
class Answer:
    """A source to run in a process of its own, with the id of its check and the name of the function to be checked.

    before: cells whose imports, definitions and constants the answer may use. note: for whoever reads the grade, on how
    the answer was found.
    """

    check: str
    function: str
    before: Sequence[str]
    source: str
    note: str = ""


class CheckedAnswer(NamedTuple):
    """One of RESULTS, the reason, and the measures that shut the answer in."""

    result: str
    reason: str
    measures: str


class Runner:
    """A warm process, ready to run answers. remarks: sentences on parts of checks that it has to leave out."""

    def __init__(self, control: socket.socket, pool: Executor) -> None:
        self._control, self._pool = control, pool
        ready = control.makefile().readline()  # "" if the process has ended
        self.remarks: list[str] = json.loads(ready or "[]")

    def run(self, answers: Mapping[int, Answer]) -> Iterator[tuple[int, CheckedAnswer | None]]:
        """Yield each answer's key and verdict as it is done; None where the process that had to say it is gone."""
        places = {self._pool.submit(self._verdict, answer): place for place, answer in answers.items()}
        for done in as_completed(places):
            yield places[done], done.result()

    def _verdict(self, answer: Answer) -> CheckedAnswer | None:
        ours, theirs = socket.socketpair()
        with ours, suppress(OSError):  # the process at the other end may be gone
            with theirs:
                socket.send_fds(self._control, [b"."], [theirs.fileno()])
            ours.sendall(json.dumps(asdict(answer)).encode())
            ours.shutdown(socket.SHUT_WR)
            if reply := ours.makefile().read():
                return CheckedAnswer(*json.loads(reply))
        return None


@contextmanager
def runner(imports: Sequence[str], *, seconds: float, newest_abi: int = sandbox.NEWEST_ABI) -> Iterator[Runner]:
    """A warm process that has executed the statements `imports`; it and all that it started are ended on leaving.

    seconds: the limit for one answer. newest_abi: the newest version of Landlock to use, 0 for none.
    """
    inherited = {name: value for name, value in os.environ.items() if _ENVIRONMENT.fullmatch(name)}
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(AT_ONCE) as pool, ours, theirs:  # the pool's threads end when the process has
        process = subprocess.Popen(
            [sys.executable, "-m", "course.answers", json.dumps([imports, seconds, newest_abi])],
            cwd=files.ROOT,
            env={**inherited, **_ONE_THREAD, "CUDA_VISIBLE_DEVICES": ""},
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the grader, which then ends them all
        )
        theirs.close()
        try:
            yield Runner(ours, pool)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# the warm process ---------------------------------------------------------------------------------


def _serve(imports: Sequence[str], seconds: float, newest_abi: int) -> None:
    """Import what is needed, then fork a keeper for each connection that comes, without reading from it."""
    for statement in imports:
        with suppress(Exception):
            exec(statement, {})
    remarks = _load_kernels()
    gc.collect()
    gc.freeze()  # a fork then copies fewer pages
    with socket.socket(fileno=0) as control:
        control.sendall(f"{json.dumps(remarks)}\n".encode())
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no keeper waits to be asked how it ended
        while handles := socket.recv_fds(control, 1, 1)[1]:
            connection = socket.socket(fileno=handles[0])
            if os.fork() == 0:
                control.close()
                _keep(connection, seconds, newest_abi)
            connection.close()


def _load_kernels() -> list[str]:
    """Load labkit's own C++, which checks use as the lesson does: in the sandbox no compiler may be asked for it."""
    from labkit.storage import native

    if all(native.load(name) for name in native.ARGUMENTS):
        return []
    return [
        "labkit's C++ could not be compiled here, so checks left out what needs it (a part of 02.5): install g++ or "
        "clang++, and grade again."
    ]


def _keep(connection: socket.socket, seconds: float, newest_abi: int) -> None:
    """Read an answer, have it run, reply with the verdict, and end."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        answer = Answer(**json.loads(connection.makefile().read()))
        connection.sendall(json.dumps(_verdict(answer, seconds, newest_abi)).encode())
    finally:
        os._exit(0)


def _verdict(answer: Answer, seconds: float, newest_abi: int) -> CheckedAnswer:
    try:
        measures, text = sandbox.run(lambda: checked(answer), seconds=seconds, newest_abi=newest_abi)
    except (sandbox.Stopped, OSError) as error:
        return CheckedAnswer("stopped", str(error), "")
    result, _, reason = text.partition("\n")
    if result not in RESULTS:
        return CheckedAnswer("stopped", "its process replied with something else than a result", measures)
    return CheckedAnswer(result, reason[:LONGEST_REASON], measures)


# the answer's process -----------------------------------------------------------------------------


def checked(answer: Answer) -> str:
    """Result and reason, a line each. Runs shut in, with the answer, which may do to this process what it likes."""
    import torch

    torch.set_num_threads(1)
    space: dict[str, Any] = {"__name__": "__main__"}
    for source in answer.before:
        for statement in definitions(source):
            with suppress(BaseException):  # what the answer does not need may need what is not there
                exec(compile(ast.Module([statement], []), "<the lesson>", "exec"), space)
    raised = None
    try:
        exec(compile(_plain(answer.source), "<your cell>", "exec"), space)
    except BaseException as error:  # a try-out below the function may need the lesson around it
        raised = error
    function = space.get(answer.function)
    if not callable(function):
        if isinstance(raised, NotImplementedError):
            return "not done\nnot done yet"
        reason = f"raised {type(raised).__name__}: {' '.join(str(raised).split())[:LONGEST_REASON]}" if raised else ""
        return f"broken\nthe cell {reason or f'defines no function called {answer.function}'}"
    try:
        result = checks.check(answer.check, function)
    except NotImplementedError:
        return "not done\nnot done yet"
    except BaseException as error:  # of a check, over a value that no check expected
        return f"wrong\nthe check met {type(error).__name__} over what it returned"
    return "passed\n" if result.passed else f"wrong\n{'; '.join(result.failures)}"


def definitions(source: str) -> Iterator[ast.stmt]:
    """A cell's imports, functions, classes and constants: what may run without the cells above it.

    `choose = lab.answer("03.2", choose)` is `choose = choose`.
    """
    try:
        statements = ast.parse(_plain(source)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in statements:
        match node:
            case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.ClassDef():
                yield node
            case ast.Assign(value=ast.Call(func=ast.Attribute(attr="answer"), args=[_, ast.Name() as function])):
                yield ast.copy_location(ast.Assign(node.targets, function), node)  # above an answer all are worked
            case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
                if isinstance(value, ast.Lambda) or not any(
                    isinstance(part, ast.Name | ast.Call) for part in ast.walk(value)
                ):
                    yield node


def _plain(source: str) -> str:
    """The cell without the lines that only IPython understands (%magic, !command)."""
    return "\n".join("pass" if re.match(r"[%!]", line) else line for line in source.splitlines())


if __name__ == "__main__":
    _serve(*json.loads(sys.argv[1]))
