import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from labkit import files

CONDA_NAMES = {"torch": "pytorch"}
BY_PIP = {"textalloc"}  # which the line `-e .` brings: not every package is on conda-forge
ANOTHER_MACHINE = re.compile(r"(?<![\w.+/-])/(?:work|root|home/\w+|Users/\w+)/")
REGISTRY = re.compile(
    r"\b(?:(?:test\.)?pypi\.org|pythonhosted\.org|deb\.debian\.org|npmjs\.(?:org|com)|anaconda\.org)\b"
)


def test_environment_yml_mirrors_pyproject():
    project = tomllib.loads((files.ROOT / "pyproject.toml").read_text())["project"]
    wanted = {"python" + project["requires-python"]}
    for line in project["dependencies"] + project["optional-dependencies"]["course"]:
        name, bounds = re.fullmatch(r"([\w.-]+)(.*)", line).groups()
        if name not in BY_PIP:
            wanted.add(CONDA_NAMES.get(name, name) + bounds)
    listed = yaml.safe_load((files.ROOT / "environment.yml").read_text())["dependencies"]
    assert {line for line in listed if isinstance(line, str)} == wanted
    assert [line["pip"] for line in listed if isinstance(line, dict)] == [["-e ."]]


def test_the_constraints_state_a_version_that_is_allowed_of_everything_that_the_tests_need():
    lines = (files.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    versions = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    project = tomllib.loads((files.ROOT / "pyproject.toml").read_text())["project"]
    needs = list(project["dependencies"])
    for extra in ("course", "test", "engines", "serving", "llm", "site", "gpu", "cluster"):
        needs += project["optional-dependencies"][extra]
    missing = []
    for need in map(Requirement, needs):
        version = versions.get(canonicalize_name(need.name), "0")
        if need.name not in (files.DISTRIBUTION, "pip") and not need.specifier.contains(version):
            missing.append(str(need))
    assert missing == [], "run .ci/lock"
    assert not [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.!]+", line)]  # no folder, no address


IMPORTED_AS = {
    "pillow": "PIL", "dask": "distributed", "ipykernel": "IPython", "inference-labkit": "course",
    "mlcommons-loadgen": "mlperf_loadgen",
}  # fmt: skip
# by nbclient, papermill, sphinx, jinja2, matplotlib
BROUGHT_BY_ANOTHER = {"traitlets", "jupyter_client", "docutils", "markupsafe", "cycler"}
OPTIONAL = {"pynvml", "nbval", "triton"}  # where they are not installed, a sentence or nothing


def packages(*extras: str) -> set[str]:
    """The names under which labkit's needs, and those of its extras, are imported."""
    project = tomllib.loads((files.ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    names = {re.match(r"[\w-]+", line)[0] for line in lines}
    return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}


def imports(package: str, *, at_once: bool) -> set[str]:
    """What the modules of `package` import beside the standard library: when they are imported, or at all."""
    names = set()
    for file in (files.ROOT / package).rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in tree.body if at_once else ast.walk(tree):
            match node:
                case ast.Import():
                    names |= {alias.name for alias in node.names}
                case ast.ImportFrom(level=0):
                    names.add(node.module)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {package}


def test_labkit_installs_alone_and_needs_what_it_imports():
    assert imports("labkit", at_once=True) <= packages()
    extras = packages("course", "engines", "edge", "serving", "llm")
    assert imports("labkit", at_once=False) <= extras | BROUGHT_BY_ANOTHER | OPTIONAL
    assert packages() - imports("labkit", at_once=False) <= {"pydantic"}


def test_what_the_course_imports_is_its_extra_s():
    everything = packages("course", "cluster", "site") | BROUGHT_BY_ANOTHER | OPTIONAL | {"labkit"}
    assert imports("course", at_once=False) <= everything


def committed_texts() -> Iterator[tuple[Path, str]]:
    """What is or will be committed, less the data sets, which speak of paths and hosts of their own."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listed, cwd=files.ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git clone")
    for name in names:
        file = files.ROOT / name
        is_data = name.startswith("data/") and file.suffix not in (".toml", ".py", ".json", ".md")
        if is_data or not file.is_file() or file.name == Path(__file__).name:
            continue
        try:
            yield file.relative_to(files.ROOT), file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # no text


FOREIGN_NAME = re.compile(r"(?m)^\W*pip install [^`\n]*(?<![-./\w])labkit\b|(?<![-.\w])labkit\[")


def test_nothing_tells_anybody_to_install_the_other_project_that_is_called_labkit():
    """Outputs of lessons and records of earlier runs stay what they were."""
    project = tomllib.loads((files.ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == files.DISTRIBUTION != "labkit"
    texts = ((file, text) for file, text in committed_texts() if file.suffix not in (".json", ".ipynb"))
    assert [f"{file}: {hit[0]}" for file, text in texts for hit in FOREIGN_NAME.finditer(text)] == []


@pytest.mark.slow
def test_nbval_takes_a_lesson_where_it_lies():
    """As in `pytest --nbval-lax notebooks/00_measuring_honestly.ipynb`; here its cells are collected and not run."""
    lesson = next(files.NOTEBOOKS.glob("00_*.ipynb"))
    options = ["--nbval-lax", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, lesson], cwd=files.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and f"{lesson.name}::Cell 0" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("pattern", [ANOTHER_MACHINE, REGISTRY], ids=["paths", "registries"])
def test_no_committed_text_names_a_machine_s_folder_or_a_registry(pattern: re.Pattern):
    assert [f"{file}: {hit[0]}" for file, text in committed_texts() for hit in pattern.finditer(text)] == []
