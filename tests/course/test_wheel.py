"""The wheel, made from the sdist and installed where there is no repository: what is in both, and what runs there."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from course.cli import ANYWHERE, main
from labkit import files

pytestmark = pytest.mark.slow
MADE_BY_SETUPTOOLS = ("PKG-INFO", "setup.cfg", ".egg-info/")
README = (files.ROOT / "README.md").read_text(encoding="utf-8")
MINUTE = README.split("## labkit in one minute")[1].split("```python\n")[1].split("```")[0]
NEEDS = {'"openvino"': "openvino", "(engine)": "openvino", '"openvino-genai"': "openvino_genai"}
MODELS = """
import torch
from labkit import datasets, models
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
cnn, bert = models.resnet20(), models.minilm_finetuned()
sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
llm = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
split = datasets.fashion_mnist("test", 512)
images, batches = split.images[:64], split.images[:256].split(64)
judge = datasets.fashion_mnist("test", 2048)  # 512 images could not exclude a loss of a point
test = list(zip(judge.images.split(64), judge.labels.split(64)))
reviews = list(models.review_batches("train", 8, batch_size=2, max_len=8))
tokens = torch.randint(0, 61, (1, 128))
texts, ids = tokens.split(64, 1), tokens[:, :16]
model, inputs = cnn, images
baseline, candidate = lambda: images @ images.mT, lambda: images.sum()
"""


@pytest.fixture(scope="module")
def committed() -> list[str]:
    """The files that are or will be committed."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git clone")
    return [name for name in listed.split("\0") if name and (files.ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(committed: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, made of a copy of the repository, and the wheel, made of what is in the sdist."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in committed:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files.ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


class Elsewhere:
    """A virtual environment with the wheel, beside this environment's packages but not its labkit; a folder to be in.

    A file with a path brings the packages: the line of an editable installation is not read from there.
    """

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.folder, home = folder / "empty", folder / "environment"
        self.folder.mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
        self.python, self.labkit = home / "bin" / "python", home / "bin" / "labkit"
        places = {name: Path(path) for name, path in sysconfig.get_paths(vars={"base": home, "platbase": home}).items()}
        self.packages = places["purelib"]
        here = dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
        (self.packages / "packages_of_the_tests.pth").write_text("\n".join(here) + "\n")
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", "--no-index", "--quiet"]
        subprocess.run([*pip, wheel], check=True)
        no_network = Path(__file__).parent.parent / "no_network"
        self.environment = {**os.environ, "PYTHONPATH": str(no_network), "HF_HUB_OFFLINE": "1"}

    def run(self, *command: object, **settings: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            list(map(str, command)),
            cwd=self.folder, env={**self.environment, **settings}, capture_output=True, text=True, timeout=3600,
        )  # fmt: skip


@pytest.fixture(scope="module")
def elsewhere(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    (wheel,) = built.glob("*.whl")
    return Elsewhere(wheel, tmp_path_factory.mktemp("elsewhere") / "it's a tür")


def test_the_sdist_is_the_repository(committed: list[str], built: Path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
        (lab,) = (member for member in archive.getmembers() if member.name.endswith("/lab"))
    assert {name for name in names if not any(part in name for part in MADE_BY_SETUPTOOLS)} == set(committed)
    assert lab.mode & 0o111


def test_the_wheel_has_every_file_of_labkit_and_course_and_what_they_read_beside_them(
    committed: list[str], built: Path
):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        of_repository = {name: files.ROOT / name.removeprefix("labkit/repository/") for name in names}
        differ = [name for name, file in of_repository.items() if file.read_bytes() != archive.read(name)]
    packages = {name for name in committed if name.startswith(("labkit/", "course/"))}
    data = {name for name in committed if name.startswith("data/") and not name.endswith(".py")}
    checks = {path.relative_to(files.ROOT).as_posix() for path in files.CHECKS.glob("*.py")}
    beside = data | checks | {"pyproject.toml", "notebooks/claims.toml", "notebooks/glossary.md"}
    assert names == packages | {f"labkit/repository/{name}" for name in beside}
    assert differ == []


def test_labkit_is_the_wheel_s_with_its_data_claims_tables_and_kernels(elsewhere: Elsewhere):
    code = """
import json, shutil, labkit
from labkit import claims, datasets, fetch, files, machine
from labkit.deploy import targets
from labkit.storage import native
lacking = [name for name, asset in fetch.assets().items() if not asset.carrier and asset.state != "ready"]
print(json.dumps({
    "from": labkit.__file__, "root": str(files.ROOT), "lacking": lacking, "photos": len(datasets.photos()),
    "claims": len(claims.load()), "devices": len(machine.DEVICES), "targets": len(targets.by_status()),
    "kernels": [name for name in native.ARGUMENTS if native.load(name)], "compiler": bool(shutil.which("g++")),
}))"""
    done = elsewhere.run(elsewhere.python, "-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
    here = json.loads(done.stdout)
    assert Path(here["from"]).is_relative_to(elsewhere.packages), "this is the repository's labkit"
    assert Path(here["root"]).is_relative_to(elsewhere.packages)
    assert here["lacking"] == [] and here["photos"] and here["claims"] and here["devices"] and here["targets"]
    assert here["kernels"] == (["sparse_linear", "nm_mask", "int4_linear"] if here["compiler"] else [])


def test_the_lines_of_labkit_in_one_minute_run(elsewhere: Elsewhere):
    """With 3 of 100 steps; on a CPU that adds in int16 the line that refuses 8 bits runs with 7, as it says."""
    lines = [line.replace("steps=100", "steps=3") for line in MINUTE.splitlines() if line.strip()]
    needs = {line: [module for mark, module in NEEDS.items() if mark in line] for line in lines}
    left_out = [line for line in lines if not all(map(find_spec, needs[line]))]
    code = """
import json, sys
from labkit.errors import InputError
models, lines = json.load(open(sys.argv[1]))
names = {}
exec(models, names)
for line in lines:
    print(line, flush=True)
    try:
        exec(line, names)
    except InputError as error:
        if "quantize the weights to 7 bits" not in str(error):
            raise
        exec("calibrated = labkit.quantization.ptq.quantize(cnn, batches, weights=7)", names)
        exec(line, names)
print(names["labkit"].__file__)"""
    script, work = elsewhere.folder.parent / "minute.py", elsewhere.folder.parent / "minute.json"
    script.write_text(code)
    work.write_text(json.dumps([MODELS, [line for line in lines if line not in left_out]]))
    done = elsewhere.run(elsewhere.python, "-P", script, work)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert Path(done.stdout.splitlines()[-1]).is_relative_to(elsewhere.packages)
    assert list(elsewhere.folder.iterdir()) == []  # nothing was left in the folder where they ran
    if left_out:
        pytest.skip("not installed here, so these did not run: " + "; ".join(left_out))


def test_a_command_without_the_packages_of_the_course_is_a_sentence(elsewhere: Elsewhere):
    code = "import sys; sys.modules['click'] = None; from course.__main__ import main; main()"
    done = elsewhere.run(elsewhere.python, "-c", code)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("labkit: this needs click, which is not installed: pip install 'FILE.whl[course]'.\n")


def without_lessons(command: str) -> str:
    return (
        f"Error: `labkit {command}` needs the lessons with their answers, which are in the course's repository: clone "
        f"it, and give `./lab {command}` there.\n"
    )


def test_each_command_that_needs_the_lessons_says_so(elsewhere: Elsewhere):
    """One as a program; then all in one process, which is started once."""
    done = elsewhere.run(elsewhere.labkit, "run", "01")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", without_lessons("run"))
    code = """
import json, sys
from click.testing import CliRunner
from course.cli import main
for name in sys.argv[1:]:
    result = CliRunner().invoke(main, [name, "01"], prog_name="labkit")
    print(json.dumps([name, [result.exit_code, result.stdout, result.stderr]]))
"""
    names = sorted(set(main.commands) - set(ANYWHERE))
    done = elsewhere.run(elsewhere.python, "-c", code, *names)
    answers = dict(map(json.loads, done.stdout.splitlines()))
    assert len(names) > 5 and answers == {name: [2, "", without_lessons(name)] for name in names}, done.stderr
    assert list(elsewhere.folder.iterdir()) == []


def test_the_commands_that_need_no_lessons_work(elsewhere: Elsewhere, tmp_path: Path):
    listed = elsewhere.run(elsewhere.labkit, "data", "list").stdout.splitlines()
    assert listed and all(line.startswith("ready") for line in listed if " committed " in line)
    nothing = elsewhere.run(elsewhere.labkit, "doctor", "--json", LABKIT_CACHE=str(tmp_path))
    report = {row["name"]: row for row in json.loads(nothing.stdout)["findings"]}
    assert report["packages"]["good"] and report["kernel"]["good"], report
    assert re.search(r"lacks minilm .*; run labkit data fetch minilm ", report["data"]["text"])
    refused = elsewhere.run(elsewhere.labkit, "report")
    assert refused.returncode == 2 and refused.stderr.startswith("Error: There is no folder runs; run a lesson first")
