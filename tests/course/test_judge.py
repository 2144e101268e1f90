"""An answer in a process of its own gets the verdict that it gets here, sentence for sentence, right or wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from labkit import checks, files

LESSONS = sorted({check_id.partition(".")[0] for check_id in checks.known()})
COMPARE = """
import importlib, json, sys
import torch
from labkit import checks
from course.grading import judge

torch.set_num_threads(1)
bank, found = importlib.import_module(f"mutants.lesson{sys.argv[1]}"), []
wrong = [(check_id, name, fn) for check_id, some in bank.WRONG.items() for name, fn in some.items()]
right = [(check_id, "right", fn) for check_id, some in bank.RIGHT.items() for fn in some]
for check_id, name, fn in wrong + right:
    here = checks.check(check_id, fn)
    with judge.apart(lambda fn=fn: fn, 60) as answer:
        answer.start()
        there = checks.check(check_id, answer)
    if here != there:
        found.append([check_id, name, here.failures, there.failures])
print(json.dumps({"compared": len(wrong + right), "differ": found}))
"""


def alone(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh Python with one thread, as the grader does."""
    path = os.pathsep.join([str(files.ROOT), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_wall_changes_no_verdict(lesson: str):
    said = alone(COMPARE, lesson)
    assert said.returncode == 0, said.stderr
    result = json.loads(said.stdout)
    assert result["compared"] > 10 and result["differ"] == []


SERVE = """
import torch
from torch import nn
from course.grading import judge

def change(tensor, module, listed, known):
    tensor.zero_()
    module.weight.requires_grad_(False)
    module.bias = None
    module.out_features = 7
    listed.append(1)
    known["new"] = tensor
    del known["old"]
    return module, module.weight

base = torch.ones(4, 4)
view, linear, listed, known = base[:, ::2], nn.Linear(2, 3), [], {"old": 1}
with judge.apart(lambda: change, 20) as answer:
    answer.start()
    same, weight = answer(view, linear, listed, known)
assert base.sum() == 8 and not view.any(), base
assert linear.bias is None and linear.out_features == 7 and not linear.weight.requires_grad
assert listed == [1] and list(known) == ["new"]
assert torch.equal(weight, linear.weight)
print("as if it were here")
"""


def test_what_an_answer_does_to_its_arguments_is_seen_by_the_check():
    said = alone(SERVE)
    assert said.stdout == "as if it were here\n", said.stderr


LIMITS = """
import os, pathlib, threading
from course.grading import judge

def tries(what):
    if what == "thread":
        threading.Thread(target=print).start()
    if what == "file":
        pathlib.Path("big").write_bytes(bytes(judge.sandbox.LARGEST_FILE + 1))
    if what == "own":
        pathlib.Path("small").write_text("x")
        return pathlib.Path("small").read_text()
    if what == "reply":
        return "x" * (judge.LARGEST_REPLY + 1)
    if what == "root":
        return os.listdir("/")
    if what == "signal":
        os.kill(1, 0)
    if what == "import":
        import wave  # of the standard library, and nobody's so far
        return wave.__name__
    if what == "half":
        return len(bytes(judge.MEMORY // 2))
    if what == "hog":
        return len(bytes(2 * judge.MEMORY))
    if what == "network":
        import socket
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53))
    return "nothing stopped it"

for what in ("thread", "file", "own", "reply", "root", "signal", "import", "half", "hog", "network"):
    with judge.apart(lambda: tries, 20) as answer:
        answer.start()
        try:
            print(what, answer(what))
        except BaseException as error:
            print(what, type(error).__name__, error)
"""


ORDINARY = """
import os
from course.grading import judge
os.setresgid(54321, 54321, 54321)
os.setresuid(54321, 54321, 54321)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces and Landlock are Linux's")
@pytest.mark.parametrize("before", ["", ORDINARY], ids=["as whoever runs the tests", "as an ordinary user"])
def test_what_the_sandbox_holds_back(before: str):
    if before and os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    if before and not all(folder.stat().st_mode & 1 for folder in (*files.ROOT.parents, *Path(sys.prefix).parents)):
        pytest.skip("the course lies in a folder that other users may not enter")
    lines = alone(before + LIMITS).stdout.splitlines()
    said = dict(line.split(" ", 1) for line in lines)
    assert said["own"] == "x" and "unreachable" in said["network"]
    assert before or said["import"] == "wave"  # somebody else may not be let into this Python's folder
    assert "can't start new thread" in said["thread"]
    assert "File too large" in said["file"] or "SIGXFSZ" in said["file"]
    assert said["half"].isdigit() and "MemoryError" in said["hog"]  # beyond what Python and torch have taken already
    assert "67 MB, more than any exercise asks for" in said["reply"]
    assert "PermissionError" in said["root"] and "PermissionError" in said["signal"]
