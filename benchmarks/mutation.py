"""Faults put into labkit, one at a time: do the tests of the changed module find them?

    python benchmarks/mutation.py --seed 1                              120 mutants, drawn from all of labkit
    python benchmarks/mutation.py --seed 1 --results mutants.jsonl      keeps the verdicts, and goes on where it stopped
    python benchmarks/mutation.py --seed 1 --only labkit/timing         of one room

A mutant is labkit with one operator, number, comparison, condition, loop or decorator changed, by the operators of
cosmic-ray. A place in the code is drawn first, then one of the mutants at that place, so that an addition with eleven
replacements weighs as much as a comparison with two. Annotations are left out: nothing reads them.

A mutant is killed if a test fails that passes on the unchanged code, or takes longer than the time limit. It is tried
first on the test files that import its module, then on those of its room: the fast tests before the slow ones. Tests
of the clock, of the night and of whole lessons are left out. Mutants that no test should kill, since they compute the
same, stand in mutants.toml with the reason, and do not count. Exit code 1 if fewer than 90 % of the others are killed.
"""

import argparse
import ast
import difflib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from queue import SimpleQueue

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from tqdm import tqdm

import labkit
from labkit.files import ROOT

MUTANTS = 120
GOAL = 0.9
SECONDS = 300  # for a test; the slowest takes a minute
MARKS = tuple(f"{speed} and not nightly and not timing and not lesson and not gpu" for speed in ("not slow", "slow"))
NO_TESTS = 5  # pytest's exit code where the marks leave no test
TIME_LIMIT = "time limit"
HARMLESS = Path(__file__).with_name("mutants.toml")
AUTHOR = ("-c", "user.name=mutation", "-c", "user.email=mutation@localhost")


@dataclass(frozen=True)
class Site:
    """A place in a file at which at least one operator of cosmic-ray has a mutant.

    path: relative to the repository. line, column: where the changed code begins. mutants: (operator's name, number of
    the occurrence in the file), one for each mutant.
    """

    path: str
    line: int
    column: int
    mutants: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Verdict:
    """A mutant and the outcome of the tests: killed_by is a test file, "time limit", or "" for a survivor."""

    path: str
    line: int
    operator: str
    diff: str
    killed_by: str


def harmless() -> set[tuple[str, str, str]]:
    """Read the mutants that no test should kill: (path, removed line, added line)."""
    listed = tomllib.loads(HARMLESS.read_text(encoding="utf-8"))["mutant"]
    return {(mutant["path"], mutant["old"], mutant["new"]) for mutant in listed}


def lines_of(verdict: Verdict) -> tuple[str, str, str]:
    """Return (path, removed line, added line) of a mutant; "" for no line, and without blank lines."""
    lines = verdict.diff.splitlines()
    removed = " ".join(line[1:].strip() for line in lines if line.startswith("-"))
    added = " ".join(line[1:].strip() for line in lines if line.startswith("+"))
    return verdict.path, removed.strip(), added.strip()


def sites(path: Path) -> list[Site]:
    """Find every place of a file that can be mutated, in the order of the file."""
    nodes = list(ast_nodes(get_ast(path.read_text(encoding="utf-8"))))
    mutants = defaultdict(list)
    for name in operator_names():
        operator_class = get_operator(name)
        if operator_class.arguments():  # these need a choice of our own
            continue
        operator = operator_class()
        starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(starts):
            mutants[start].append((name, occurrence))
    relative = path.relative_to(ROOT).as_posix()
    return [Site(relative, *start, tuple(mutants[start])) for start in sorted(mutants)]


def changes_what_runs(source: str, mutated: str) -> bool:
    """Tell if a mutant is a program, and another one than before once type annotations are left out."""
    try:
        return without_annotations(mutated) != without_annotations(source)
    except SyntaxError:  # cosmic-ray takes the / and * of a signature for operators
        return False


def without_annotations(source: str) -> str:
    """Dump the syntax tree of a file without its type annotations."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def draw(paths: list[Path], count: int, seed: int) -> list[tuple[Site, str, str]]:
    """Draw mutants: (place, operator's name, the file's text with the fault)."""
    places = [site for path in tqdm(paths, desc="places to mutate") for site in sites(path)]
    generator = random.Random(seed)
    generator.shuffle(places)
    drawn = []
    for site in places:
        if len(drawn) == count:
            break
        name, occurrence = generator.choice(site.mutants)
        source = (ROOT / site.path).read_text(encoding="utf-8")
        mutated = mutate_code(source, get_operator(name)(), occurrence)
        if changes_what_runs(source, mutated):
            drawn.append((site, name, mutated))
    return drawn


@cache
def imported(path: Path) -> set[str]:
    """List the modules of labkit that a file imports, by the names of the files that they lie in.

    A dotted name in a string counts as an import: `labkit.on_demand` takes such names.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return {labkit.SHORT_NAMES.get(name, name) for name in names if name.startswith("labkit")}


def module_of(path: Path) -> str:
    """Name the module in a file of the repository."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def tests_of(path: str) -> list[list[str]]:
    """List the test files of a module of labkit in groups, the nearest first.

    The first group imports the module, the next ones import a module of its room that stands on it, at a greater
    distance each time. A module that serves other rooms only is tested by the tests of the modules that import it.
    """
    module, room = module_of(ROOT / path), list((ROOT / path).parent.glob("*.py"))
    groups, reached, newest = [], {module}, {module}
    while newest:
        earlier = set().union(*groups)
        groups.append([file for file in tests_that_import(newest) if file not in earlier])
        newest = importers(room, newest) - reached
        reached |= newest
    if not any(groups):
        groups = [tests_that_import(importers((ROOT / "labkit").rglob("*.py"), {module}))]
    return [group for group in groups if group]


def importers(files: Iterable[Path], modules: set[str]) -> set[str]:
    """List the modules in `files` that import one of `modules`."""
    return {module_of(file) for file in files if modules & imported(file)}


def tests_that_import(modules: set[str]) -> list[str]:
    """List the test files that import one of `modules`, sorted, relative to the repository."""
    files = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if modules & imported(file)]
    return [file.relative_to(ROOT).as_posix() for file in files]


def copy_repository(folder: Path) -> Path:
    """Copy what git tracks into `folder`, a git repository of its own."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for command in (["init", "-q"], ["add", "."], [*AUTHOR, "commit", "-q", "-m", "copy"]):  # tests ask for the commit
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def run_tests(folder: Path, files: list[str]) -> str:
    """Run test files, or single tests, in a copy of the repository: the fast ones, then the slow ones.

    Returns the test that failed first, "time limit" for one that took too long, or "" if all pass.
    """
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    limit = ["--timeout", str(SECONDS), "--timeout-method", "thread"]  # ends the process, also in an endless C call
    for marks in MARKS:
        # nbval takes some seconds to import, and notebooks are none of the tests
        plugins = ["-p", "no:cacheprovider", "-p", "no:nbval"]
        command = [sys.executable, "-m", "pytest", "-x", "-q", *plugins, *limit, "-m", marks, *files]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode in (0, NO_TESTS):
            continue
        failed = first_failure(done.stdout)
        if not failed and done.returncode != 1:  # 1 and no summary: pytest-timeout ended the process
            raise SystemExit(f"pytest ended with {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
        return failed or TIME_LIMIT
    return ""


def run_tests_of(folder: Path, path: str) -> str:
    """Run the tests of a module, the nearest first, until a test fails; returns as `run_tests` does."""
    for files in tests_of(path):
        if killed_by := run_tests(folder, files):
            return killed_by
    return ""


def first_failure(output: str) -> str:
    """Read the name of the failed test, or of the file that could not be collected, from pytest's summary."""
    for line in output.splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            name = line.split(" ", maxsplit=1)[1]
            return re.match(r"\S+?(\[.*\])?(?= - |$)", name)[0]  # a test's parameters may hold spaces and " - "
    return ""


def check_unchanged(folder: Path, test: str) -> None:
    """Stop the program if a test that killed a mutant fails on the unchanged code as well."""
    if run_tests(folder, [test]):
        raise SystemExit(f"The unchanged code does not pass {test}: mend that first.")


def judge(folder: Path, site: Site, operator: str, mutated: str) -> Verdict:
    """Put a mutant into a copy of the repository, run the tests of its module, and put the file back."""
    original = (ROOT / site.path).read_text(encoding="utf-8")
    changed = folder / site.path
    changed.write_text(mutated, encoding="utf-8")
    try:
        killed_by = run_tests_of(folder, site.path)
    finally:
        changed.write_text(original, encoding="utf-8")
    if killed_by and killed_by != TIME_LIMIT:
        check_unchanged(folder, killed_by)
    diff = difflib.unified_diff(original.splitlines(), mutated.splitlines(), lineterm="", n=0)
    lines = [line for line in diff if not line.startswith(("---", "+++", "@@"))]
    return Verdict(site.path, site.line, operator, "\n".join(lines), killed_by)


def verdicts(drawn: list[tuple[Site, str, str]], known: dict[tuple, Verdict], jobs: int) -> Iterator[Verdict]:
    """Judge the mutants that are not among `known`, `jobs` at a time, each in a copy of the repository of its own.

    The verdicts come in the order in which they are reached.
    """
    with tempfile.TemporaryDirectory(prefix="labkit-mutants-") as work:
        folders = SimpleQueue()
        for number in range(jobs):
            folder = Path(work, str(number))
            folder.mkdir()
            folders.put(copy_repository(folder))

        def in_a_copy(mutant: tuple[Site, str, str]) -> Verdict:
            site, operator, mutated = mutant
            if (site.path, site.line, operator) in known:
                return known[site.path, site.line, operator]
            folder = folders.get()
            try:
                return judge(folder, site, operator, mutated)
            finally:
                folders.put(folder)

        with ThreadPoolExecutor(jobs) as pool:
            judged = [pool.submit(in_a_copy, mutant) for mutant in drawn]
            try:
                for verdict in tqdm(as_completed(judged), total=len(drawn), desc="mutants"):
                    yield verdict.result()
            finally:
                pool.shutdown(cancel_futures=True)  # after an error no further mutants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=MUTANTS, help="mutants to draw")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--only", default="labkit", help="a folder or a file of labkit")
    parser.add_argument("--results", type=Path, help="a file of JSON lines that keeps the verdicts")
    options = parser.parse_args()

    only = ROOT / options.only
    paths = [only] if only.is_file() else sorted(only.rglob("*.py"))
    drawn = draw(paths, options.count, options.seed)
    rows = options.results.read_text().splitlines() if options.results and options.results.exists() else []
    known = {(row["path"], row["line"], row["operator"]): Verdict(**row) for row in map(json.loads, rows)}
    survivors = uncounted = 0
    not_to_kill = harmless()
    for verdict in verdicts(drawn, known, options.jobs):
        if options.results and (verdict.path, verdict.line, verdict.operator) not in known:
            with options.results.open("a") as file:
                file.write(json.dumps(asdict(verdict)) + "\n")
        if verdict.killed_by:
            continue
        if lines_of(verdict) in not_to_kill:
            uncounted += 1
        else:
            survivors += 1
            tqdm.write(f"survived: {verdict.path}:{verdict.line} {verdict.operator}\n{verdict.diff}")
    counted = len(drawn) - uncounted
    killed = counted - survivors
    print(
        f"{killed} of {counted} mutants killed ({killed / counted:.0%}), seed {options.seed}; {uncounted} more of "
        f"{len(drawn)} are harmless (mutants.toml)"
    )
    sys.exit(killed < GOAL * counted)


if __name__ == "__main__":
    main()
