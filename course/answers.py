"""Running students' answers with the checks, each answer in a process without any other student's work.

A warm process imports once all modules needed by the answers. For each answer the warm process forks a keeper. The
keeper reads the answer from the grader, forks once more, and has the answer run shut in (course.sandbox). So a
student's source is in the memory of the grader, of its keeper and of its own process, never where a different answer
runs, and the death of a keeper costs no second answer the grade.
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
    """An answer to run.

    check     id of the check, such as "03.1"
    function  name of the function to be checked
    before    sources of cells; the answer may use imports, definitions and constants of these cells
    source    source of the answer's cell
    note      for the reader of the grade, on how the answer was found
    """

    check: str
    function: str
    before: Sequence[str]
    source: str
    note: str = ""


class CheckedAnswer(NamedTuple):
    """The verdict on an answer.

    result    an element of RESULTS
    reason    a sentence
    measures  the walls around the answer, in words
    """

    result: str
    reason: str
    measures: str


class Runner:
    """A warm process, ready to run answers.

    remarks  sentences on parts of checks left out
    """

    def __init__(self, control: socket.socket, pool: Executor) -> None:
        """Wait until the warm process is ready. `control` is the socket to it, `pool` waits for the verdicts."""
        self._control = control
        self._pool = pool
        ready = control.makefile().readline()  # "" if the process has ended
        self.remarks: list[str] = json.loads(ready or "[]")

    def run(self, answers: Mapping[int, Answer]) -> Iterator[tuple[int, CheckedAnswer | None]]:
        """Run answers, several at once, and yield (key, verdict) in the order of completion.

        answers  by key

        The verdict is None if a process of the grader was ended from outside.
        """
        places = {self._pool.submit(self._verdict, answer): place for place, answer in answers.items()}
        for future in as_completed(places):
            yield places[future], future.result()

    def _verdict(self, answer: Answer) -> CheckedAnswer | None:
        ours, theirs = socket.socketpair()
        with ours, suppress(OSError):  # the process at the other end may be gone
            with theirs:
                socket.send_fds(self._control, [b"."], [theirs.fileno()])
            ours.sendall(json.dumps(asdict(answer)).encode())
            ours.shutdown(socket.SHUT_WR)
            reply = ours.makefile().read()
            if reply:
                return CheckedAnswer(*json.loads(reply))
        return None


@contextmanager
def runner(imports: Sequence[str], *, seconds: float, newest_abi: int = sandbox.NEWEST_ABI) -> Iterator[Runner]:
    """Start a warm process, and end the process with all its children on leaving.

    imports     import statements to execute first
    seconds     the limit for an answer
    newest_abi  the newest version of Landlock to use, 0 for none
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
    """Import the modules, then fork a keeper for each new connection; only the keeper reads from the connection."""
    for statement in imports:
        with suppress(Exception):
            exec(statement, {})
    remarks = _load_kernels()
    gc.collect()
    gc.freeze()  # a fork then copies fewer pages
    with socket.socket(fileno=0) as control:
        control.sendall(f"{json.dumps(remarks)}\n".encode())
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no keeper waits to be asked how it ended
        while True:
            _, handles, _, _ = socket.recv_fds(control, 1, 1)
            if not handles:  # the grader has closed the other end
                return
            connection = socket.socket(fileno=handles[0])
            if os.fork() == 0:
                control.close()
                _keep(connection, seconds, newest_abi)
            connection.close()


def _load_kernels() -> list[str]:
    """Load labkit's C++ for the checks, since no compiler runs in the sandbox; returns a remark without a compiler."""
    from labkit.storage import native

    if all(native.load(name) for name in native.ARGUMENTS):
        return []
    return [
        "labkit's C++ could not be compiled here, so checks left out what needs it (a part of 02.3): install g++ or "
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
    """Check an answer; returns result and reason, a line each.

    Called in the shut-in process, where the answer may change everything.
    """
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
        return _without_function(answer, raised)
    try:
        result = checks.check(answer.check, function)
    except NotImplementedError:
        return "not done\nnot done yet"
    except BaseException as error:  # of a check, over a value that no check expected
        return f"wrong\nthe check met {type(error).__name__} over what it returned"
    return "passed\n" if result.passed else f"wrong\n{'; '.join(result.failures)}"


def _without_function(answer: Answer, raised: BaseException | None) -> str:
    """Tell why a cell left no function to check. `raised` is the exception of the cell, if any."""
    if isinstance(raised, NotImplementedError):
        return "not done\nnot done yet"
    if raised is None:
        return f"broken\nthe cell defines no function called {answer.function}"
    message = " ".join(str(raised).split())[:LONGEST_REASON]
    return f"broken\nthe cell raised {type(raised).__name__}: {message}"


def definitions(source: str) -> Iterator[ast.stmt]:
    """Yield the statements of a cell that run without the cells above: imports, functions, classes and constants.

    `choose = lab.answer("03.2", choose)` becomes `choose = choose`.
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
                if isinstance(value, ast.Lambda) or _is_constant(value):
                    yield node


def _is_constant(value: ast.expr) -> bool:
    return not any(isinstance(part, ast.Name | ast.Call) for part in ast.walk(value))


def _plain(source: str) -> str:
    """Replace the lines for IPython alone (%magic, !command) by `pass`."""
    lines = ["pass" if re.match(r"[%!]", line) else line for line in source.splitlines()]
    return "\n".join(lines)


if __name__ == "__main__":
    _serve(*json.loads(sys.argv[1]))
