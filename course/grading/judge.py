"""One answer judged: the check runs here, the answer in a process of its own that can only compute and reply.

The check calls a stand-in. It sends the arguments over a socket, the answer's process calls the learner's function,
and what comes back is read as data (torch's weights_only reader), never as code. So an answer that rewrites the check,
torch or Python does so in its own process only, and a result that claims to equal everything cannot get across.
What the process may do otherwise is sandbox.py's; which cells belong to an answer is submissions.py's.
"""

import contextlib
import io
import os
import pickle
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from torch import Tensor, nn

from course.grading import sandbox
from labkit import checks

MEMORY = 1 << 30  # bytes that an answer may take, beyond what Python and torch have taken already
LARGEST_REPLY = 64 << 20  # bytes
_NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
READABLE = [  # what may come back besides plain values and tensors
    *(kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module)),
    *(multiarray._reconstruct, multiarray.scalar, np.ndarray, np.dtype, *(type(np.dtype(one)) for one in _NUMBERS)),
]


@dataclass(frozen=True)
class Task:
    """What one answer's process needs. `before` are course statements, `answer` the learner's cell."""

    check: str
    function: str
    before: tuple[str, ...]
    answer: str
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What became of an answer. kind: passed, wrong, not done, broken (it does not run), stopped (by a limit)."""

    kind: str
    reasons: tuple[str, ...] = ()
    measures: tuple[str, ...] = field(default=(), compare=False)  # what shut the answer's process in


class Stopped(BaseException):
    """The answer's process was ended or died; no check may catch this."""


class Broken(Exception):
    """The cell did not define the function."""


def judge(task: Task) -> Verdict:
    """Judge one answer. To be called in a process with a single thread, which forks the answer's."""
    torch.set_num_threads(1)
    limit = sandbox.address_space() + 4 * MEMORY  # what comes back is read and compared here
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with apart(lambda: _define(task), task.seconds) as answer:
        try:
            answer.start()
            result = checks.check(task.check, answer)
        except NotImplementedError:
            return Verdict("not done", ("not done yet",), answer.measures)
        except Broken as error:
            return Verdict("broken", (str(error),), answer.measures)
        except Stopped as error:
            return Verdict("stopped", (str(error),), answer.measures)
        except Exception as error:  # of a check, over a value that no check expected
            return Verdict("wrong", (f"the check met {type(error).__name__} over what it returned",), answer.measures)
    return Verdict("passed" if result.passed else "wrong", result.failures, answer.measures)


@contextlib.contextmanager
def apart(define: Callable[[], Callable], seconds: float) -> Iterator["Answer"]:
    """The function that `define` makes, in a shut-in process that ends with the context."""
    own = Path(tempfile.mkdtemp(prefix="answer-"))
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        _be_the_answer(there, define, own, seconds)  # does not return
    there.close()
    try:
        yield Answer(here, child, time.monotonic() + seconds, seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
        here.close()
        shutil.rmtree(own, ignore_errors=True)


class Answer:
    """The learner's function seen from the check: called like it, changing its arguments as it does."""

    def __init__(self, channel: socket.socket, child: int, until: float, seconds: float) -> None:
        self._channel, self._child, self._until, self._seconds = channel, child, until, seconds
        self.measures: tuple[str, ...] = ()

    def start(self) -> None:
        """Wait until the process is shut in and has run the cell; Broken where that failed."""
        self.measures = tuple(self._reply([]))
        if said := self._reply([]):
            kind, text = said
            raise NotImplementedError if kind == "NotImplementedError" else Broken(text)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        modules = {type(m) for one in (*args, *kwargs.values()) for m in _modules(one)}
        self._with_time(lambda: _send(self._channel, pickle.dumps((args, kwargs))))
        kind, *said = self._reply(modules)
        if kind == "raised":
            name, text = map(str, said)
            raise NotImplementedError(text) if name == "NotImplementedError" else type(name, (Exception,), {})(text)
        result, changed_args, changed_kwargs = said
        _mirror(list(args), list(changed_args))
        _mirror(kwargs, changed_kwargs)
        return result

    def _reply(self, modules: Any) -> Any:
        data = self._with_time(lambda: _receive(self._channel))
        try:
            with torch.serialization.safe_globals([*READABLE, *modules]):
                return torch.load(io.BytesIO(data), weights_only=True)
        except Exception:
            raise TypeError(
                "your function returned something else than numbers, texts, tensors, modules and containers of them"
            ) from None

    def _with_time(self, exchange: Callable[[], Any]) -> Any:
        try:
            self._channel.settimeout(max(self._until - time.monotonic(), 0.01))
            return exchange()
        except TimeoutError:
            raise Stopped(f"stopped after {self._seconds:g} s: an endless loop, or far slower than needed") from None
        except (OSError, EOFError) as error:
            raise Stopped(self._death(error)) from None

    def _death(self, error: Exception) -> str:
        if error.args and isinstance(error, EOFError):
            return str(error)
        until = time.monotonic() + 2
        while (
            hasattr(os, "waitid") and time.monotonic() < until
        ):  # it stays a zombie, so that its number is not given to another
            if ended := os.waitid(os.P_PID, self._child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                by_signal = ended.si_code != os.CLD_EXITED
                how = signal.Signals(ended.si_status).name if by_signal else f"code {ended.si_status}"
                return f"its process ended ({how}): it ran into a limit on memory or time, or left Python"
            time.sleep(0.02)
        return "its process no longer replies"


def _modules(value: Any) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield from value.modules()
    elif isinstance(value, list | tuple | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _modules(one)


def _mirror(mine: Any, theirs: Any) -> Any:
    """Do to the check's own object what the answer did to its copy; what cannot be changed is returned anew."""
    match mine, theirs:
        case Tensor(), Tensor():
            if mine.shape == theirs.shape and mine.dtype == theirs.dtype and mine.stride() == theirs.stride():
                if not torch.equal(mine, theirs):
                    mine.data.copy_(theirs.data)
            else:
                mine.data = theirs.data
            if mine.is_leaf and mine.requires_grad != theirs.requires_grad:
                mine.requires_grad_(theirs.requires_grad)
        case nn.Module(), nn.Module():
            _mirror(mine.__dict__, theirs.__dict__)
        case dict(), dict():
            for gone in mine.keys() - theirs.keys():
                del mine[gone]
            for key, value in theirs.items():
                mine[key] = _mirror(mine[key], value) if key in mine else value
        case list(), list():
            same = len(mine) == len(theirs)
            mine[:] = [_mirror(one, other) for one, other in zip(mine, theirs, strict=True)] if same else theirs
        case (np.ndarray(), np.ndarray()) if mine.shape == theirs.shape and not mine.flags.readonly:
            mine[...] = theirs
        case _:
            return theirs
    return mine


# in the answer's process ------------------------------------------------------------------------------------


def _be_the_answer(channel: socket.socket, define: Callable[[], Callable], own: Path, seconds: float) -> None:
    """Shut in, define, then serve calls until the channel closes."""
    try:
        os.setsid()
        _keep_only(channel.fileno())
        _send(channel, _packed(sandbox.shut(own, seconds=seconds, memory=MEMORY)))
        try:
            function = define()
        except BaseException as error:
            _send(channel, _packed((type(error).__name__, _said(error))))
            os._exit(0)
        _send(channel, _packed(None))
        while True:
            args, kwargs = pickle.loads(_receive(channel))
            _send(channel, _answered(function, args, kwargs))
    except BaseException:
        os._exit(1)


def _answered(function: Callable, args: tuple, kwargs: Mapping[str, Any]) -> bytes:
    try:
        return _packed(("returned", function(*args, **kwargs), args, kwargs))
    except Exception as error:
        return _packed(("raised", type(error).__name__, " ".join(str(error).split())[:300]))


def _define(task: Task) -> Callable:
    """Run the statements of the course and the learner's cell; the function that the check asks for."""
    space: dict[str, Any] = {"__name__": "__main__"}
    for statement in task.before:
        with contextlib.suppress(Exception):  # what the answer does not need may need what is not there
            exec(compile(statement, "<the lesson>", "exec"), space)
    try:
        exec(compile(task.answer, "<your cell>", "exec"), space)
    except Exception:  # a try-out below the function may need the lesson around it
        if not callable(space.get(task.function)):
            raise
    if not callable(space.get(task.function)):
        raise NameError(f"the cell defines no function called {task.function}")
    return space[task.function]


def _said(error: BaseException) -> str:
    if isinstance(error, NameError) and "defines no function" in str(error):
        return str(error)
    return f"the cell raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _keep_only(kept: int) -> None:
    """Close every other file: the way back to the grader above all. What the answer prints goes nowhere."""
    os.closerange(3, kept)
    os.closerange(kept + 1, 4096)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


# messages: a length of eight bytes, then that many ---------------------------------------------------------------


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _send(channel: socket.socket, data: bytes) -> None:
    channel.sendall(struct.pack("!Q", len(data)) + data)


def _receive(channel: socket.socket) -> bytes:
    (length,) = struct.unpack("!Q", _exactly(channel, 8))
    if length > LARGEST_REPLY:
        raise EOFError(f"it returned {length / 1e6:.0f} MB, more than any exercise asks for")
    return _exactly(channel, length)


def _exactly(channel: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = channel.recv(min(length - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
