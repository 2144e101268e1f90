"""The command line of the course: each command of ./lab is a function, and imports the module for its work.

A LabError ends a command with a sentence and exit code 2. Slow imports stand inside the commands, so that --help
answers at once; before the first installation, ./lab prints --help from course/help.txt.
"""

import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from labkit import files
from labkit.errors import DataError, InputError, LabError
from labkit.files import full_disk_told
from labkit.lesson.parameters import PRESETS, SMOKE

if TYPE_CHECKING:
    from course.store import Job, Run
    from course.sweep import Outcome

RUNS = Path("runs") if files.IN_WHEEL else files.ROOT / "runs"
SITE = files.ROOT / "build" / "site"
OUT = click.option("--out", type=click.Path(path_type=Path), default=RUNS, help="Folder for results. Default: runs/.")
ANYWHERE = ("data", "doctor", "report")  # commands that a wheel and a class's folder have too


class _Group(click.Group):
    group_class = type  # a group inside the group is a _Group too

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; InputError for an unknown name, or for a command that needs lessons in a place without."""
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            close = get_close_matches(name, self.commands, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(self.commands)}."
            raise InputError(f"There is no command {name}; {hint}")
        lessons_are_here = files.COMMAND == "./lab" or ctx.parent is not None
        asks_for_help = "-h" in args or "--help" in args
        if not lessons_are_here and not asks_for_help and name not in ANYWHERE:
            raise InputError(
                f"`labkit {name}` needs the lessons with their answers, which are in the course's repository: "
                f"clone it, and give `./lab {name}` there."
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; a LabError or a full disk ends with a sentence and code 2, Ctrl-C with code 130.

        Any further exception is a bug and shows a traceback.
        """
        try:
            with full_disk_told():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nlabkit: interrupted.", err=True)
            sys.exit(130)
        except LabError as error:
            sentence = click.ClickException(str(error))
            sentence.exit_code = 2
            raise sentence from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Inference optimisation, measured: run the lessons, take them, and see what was measured."""


@main.command()
@click.option("--cpu", is_flag=True, expose_value=False, help="Install the CPU build of torch, which is much smaller.")
@click.option(
    "--with", expose_value=False, metavar="EXTRA,...",
    help="Install these extras of pyproject.toml too, now and whenever it has changed: engines, serving, gpu, ...",
)  # fmt: skip
def setup() -> None:
    """Install the course and fetch its models, as the other commands do on first use.

    \b
    ./lab setup --with engines,serving
    """
    click.echo("ready: ./lab run, ./lab test, ./lab start 00")  # ./lab has done the work


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--quick", is_flag=True, help="Only the tests that take a moment: about a minute together.")
@click.option(
    "--pretend-gpu", is_flag=True, help="Only what needs a GPU, on a pretend one: see tests/pretend/README.md."
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[PYTEST ARGUMENTS]...")
def test(quick: bool, pretend_gpu: bool, arguments: tuple[str, ...]) -> None:
    """Run the tests: three at a time, whole lessons first, and then, alone, those that read the clock.

    Tests that need a GPU run on a pretend one after that, where torch's CUDA build and g++ are installed.

    Arguments are passed on to one plain call of pytest: ./lab test tests/labkit/test_bench.py -x
    """
    at_once = ["-n", "3", "--dist", "loadfile", "--no-loadscope-reorder"]  # in the order of tests/conftest.py
    on_pretend_gpu = [*at_once, "--pretend-gpu", *_tests_marked("gpu"), "-m"]
    if arguments:
        pretend = ["--pretend-gpu"] if pretend_gpu else []
        calls = [[*pretend, *arguments]]
    elif pretend_gpu:
        calls = [[*on_pretend_gpu, "gpu and not nightly"]]
    elif quick:
        calls = [[*at_once, "-m", "not slow and not lesson and not timing and not nightly"]]
    else:
        calls = [
            [*at_once, "-m", "not timing and not nightly"],
            ["-m", "timing and not nightly", *_tests_marked("timing")],
        ]
        if _has_torch_for_cuda():  # else it takes most of a minute to skip them all
            calls.append([*on_pretend_gpu, "gpu and not lesson and not nightly"])
    first_failure = 0
    for call in calls:
        environment = dict(os.environ)
        if "-n" in call:
            environment["OMP_NUM_THREADS"] = "1"
        code = subprocess.call([sys.executable, "-m", "pytest", *call], cwd=files.ROOT, env=environment)
        first_failure = first_failure or code
    sys.exit(first_failure)


def _has_torch_for_cuda() -> bool:
    """Return True for torch's CUDA build, which the pretend GPU stands on."""
    import torch

    return torch.version.cuda is not None


def _tests_marked(mark: str) -> list[str]:
    """List the files with tests that have a mark: to import all tests takes ten seconds."""
    paths = files.ROOT.glob("tests/*/test_*.py")
    return [str(path) for path in paths if f"mark.{mark}" in path.read_text(encoding="utf-8")]


@main.command()
@click.option("--minutes", type=click.IntRange(1, 10_000), default=30, show_default=True, help="It ends after that.")
def gpu(minutes: int) -> None:
    """Run what needs a GPU: the tests, the benchmarks, and the lessons, at `class`, recorded in one process each.

    Given again it goes on: a step that ended well is left out while the code is the same, and of the lessons each that
    data/recorded/ has for such a machine, so that another machine goes on where this one stopped. For a record of five
    processes: ./lab run NN --device cuda --record, some 4 hours for all nine lessons with work for a GPU if they take
    as long as on two CPU cores, and 8 hours at most. Where no .venv is set up and the machine's own Python has torch,
    that Python is used as it is. Results: runs/gpu/ and data/recorded/.
    """
    sys.exit(subprocess.call([files.ROOT / ".ci" / "gpu", sys.executable, "--minutes", str(minutes)]))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object: good, findings (name, good, text), machine.")
def doctor(as_json: bool) -> None:
    """Check this machine and the installation, and say what to do. Exit code 1 if something is missing, else 0."""
    from course import doctor

    if as_json:
        report = doctor.report()
        click.echo(json.dumps(report, indent=1))
        sys.exit(not report["good"])
    good = True
    for finding in doctor.findings():
        good &= finding.good
        state = "OK" if finding.good else "FAIL"
        click.echo(f"{state:4}  {finding.name:9}  {finding.text}")
    sys.exit(not good)


@main.command()
@click.argument("lesson", default="all", metavar="[NN|all]")
@click.option("--preset", type=click.Choice(PRESETS), help="Sizes. Default: class for one lesson, smoke for all.")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, ...  Default: what the lesson says (auto).")
@OUT
@click.option("-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="Set a parameter; may be repeated.")
@click.option("--record", is_flag=True, help="Run in several processes and keep as reference: data/recorded/, outputs.")
@click.option("--processes", type=click.IntRange(1, 99), help="Of a recording. Default: 5.")
@click.option(
    "--resume", is_flag=True,
    help="Leave out what has a good result of the same code and parameters in OUT, with --record in data/recorded/.",
)  # fmt: skip
def run(
    lesson: str,
    preset: str | None,
    device: str | None,
    out: Path,
    pairs: tuple[tuple[str, str], ...],
    record: bool,
    processes: int | None,
    resume: bool,
) -> None:
    """Run a lesson, or all of them, and write the report.

    NN is a lesson's number; with --device, `all` leaves out the lessons that time another device only. A lesson's
    parameters are the names in the cell tagged `parameters`; names, types and ranges are checked before anything runs.
    Each result is a folder OUT/<lesson>/<preset>-<id>/ with the executed notebook, record.json and run.json; a failed
    run is kept beside it with "-failed". Asked for again, a lesson runs again; an interrupted recording goes on. The
    last line of a recording tells which lessons data/recorded/ has for this machine, and which it lacks.

    Exit code: 0 all ran, 1 a lesson failed, 2 something asked for cannot be had, 130 interrupted. After Ctrl-C no
    process and no half result is left, and earlier results are whole.

    \b
    ./lab run 03 --preset smoke -p RATIO 0.3 -p CRITERION taylor
    ./lab run all --device cuda --out /data/runs
    """
    from course import notebooks, reference, run

    done: list[Run] = []
    jobs: list[Job] = []
    if processes and not record:
        raise InputError("--processes is of a recording; give --record too, or leave it out.")
    _interrupt_once()
    try:
        values = _by_name([("PRESET", preset), ("DEVICE", device), *pairs])
        values.setdefault("PRESET", _default_preset("smoke" if lesson == "all" else "class"))
        paths = _all_on(device) if lesson == "all" else [notebooks.find(lesson)]
        jobs = [run.prepare(path, values, out) for path in paths]
        if not jobs:
            raise InputError(
                f"There is no lesson to run in {files.NOTEBOOKS}; take the course's notebooks from its repository."
            )
        if record:
            reference.require(jobs[0].parameters)
        count = processes or reference.RECORDED_RUNS
        for path, job in zip(paths, jobs, strict=True):
            if not record:
                _run(job, resume, done)
            elif not (resume and reference.recorded(job) >= count):
                _record(job, path, count, resume, done)
        if len(done) > 1:
            click.echo("\n".join(["", *map(str, done)]))
        if jobs[0].parameters["PRESET"] == "smoke":
            click.echo(f"note    {_smoke_note(done)}")
        if done:
            click.echo(f"report  {_report([out])}")
        if record:
            click.echo(f"note    {_records_note(jobs)}")
    except KeyboardInterrupt:
        results = "earlier results are as they were"
        if done:
            results = f"kept: {', '.join(result.lesson for result in done)}"
        click.echo(f"\nlabkit: interrupted; the lesson under way left nothing behind, {results}.", err=True)
        if record and jobs:
            click.echo(f"note    {_records_note(jobs)}")
        sys.exit(130)
    sys.exit(any(result.error for result in done))


def _all_on(device: str | None) -> list[Path]:
    """List all lessons, or those that take the device; the others are named on the screen."""
    from course import notebooks, run

    paths = notebooks.all_lessons()
    left_out = [path for path in paths if device and not run.takes_device(path, device)]
    if left_out:
        numbers = ", ".join(path.stem[:2] for path in left_out)
        click.echo(f"note    without {numbers}, which take no {device}")
    return [path for path in paths if path not in left_out]


def _smoke_note(done: "list[Run]") -> str:
    """Say that runs at smoke only tried the code, and where recorded results of the same lessons are shown."""
    numbers = [result.lesson[:2] for result in done]
    recorded = [number for number in numbers if any(files.RECORDED.glob(f"*/{number}.json"))]
    if not recorded:
        return f"{SMOKE}."
    return f"{SMOKE}. The report shows the recorded results instead, of {', '.join(recorded)}."


def _records_note(jobs: "Sequence[Job]") -> str:
    """Say which lessons data/recorded/ has for this machine, by this code and in how many processes, and which not."""
    from course import reference

    lessons: dict[str, list[str]] = defaultdict(list)
    for job in jobs:
        count = reference.recorded(job)
        state = f"recorded in {count} process{'es' * (count > 1)}" if count else "not recorded"
        lessons[state].append(job.lesson[:2])
    phrases = []
    for state in sorted(lessons, reverse=True):
        numbers = ", ".join(lessons[state])
        phrases.append(f"{state}: {numbers}")
    return "; ".join(phrases)


def _default_preset(usual: str) -> str:
    return os.environ.get("LABKIT_PRESET") or usual


def _run(job: "Job", resume: bool, done: "list[Run]") -> None:
    """Run a lesson, append the run to `done`, and show the run; `resume` reuses a good result."""
    from course import store

    _run_unless_finished(job, store.finished(job) if resume else None, done)


def _record(job: "Job", lesson: Path, count: int, resume: bool, done: "list[Run]") -> None:
    """Run a lesson in `count` processes, append the runs to `done`, and keep the runs as reference, if all are good."""
    from course import reference

    results = []
    for process, finished in reference.processes(job, count, resume=resume):
        click.echo(f"process {process.process} of {count} of {job.lesson}")
        result = _run_unless_finished(process, finished, done, reference.environment(results, count))
        if result.error:
            return
        results.append(result)
    for file in reference.keep(results, job, lesson):
        click.echo(f"recorded  {file}")


def _run_unless_finished(
    job: "Job", finished: "Run | None", done: "list[Run]", env: Mapping[str, str] | None = None
) -> "Run":
    from course import run

    result = finished or run.run(job, env=env, progress=True)
    done.append(result)  # at once: an interruption after this tells what is kept
    if sys.stderr.isatty():
        click.echo("\r\033[K", nl=False, err=True)
    click.echo(str(result))
    if result.error:
        click.echo(
            f"labkit: {job.lesson} stopped: {result.error}\n        see {result.notebook}",
            err=True,
        )
    return result


def _interrupt_once() -> None:
    """Let the first Ctrl-C or SIGTERM raise KeyboardInterrupt, and ignore further signals while the command ends."""

    def interrupt(number: int, frame: object) -> None:
        set_handlers(signal.SIG_IGN)
        raise KeyboardInterrupt

    def set_handlers(handler: Any) -> None:
        signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGTERM, handler)

    set_handlers(interrupt)


def _by_name(pairs: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """Map parameters to values, leaving out values of None; InputError for a parameter given twice."""
    values: dict[str, str] = {}
    for name, value in pairs:
        if name in values:
            raise InputError(f"{name} is given twice, as {values[name]} and as {value}; give it once.")
        if value is not None:
            values[name] = value
    return values


def _report(folders: list[Path]) -> str:
    """Write the report of the folders into the first folder, and return the report's address."""
    from course import report  # its imports take seconds

    return report.write(folders, folders[0] / "report.html").resolve().as_uri()


def _places_of_results() -> list[Path]:
    """List the folders of results: of ./lab run, of a learner's copies, of lessons opened in the repository."""
    from course import notebooks

    return [RUNS, notebooks.WORKSPACE / "runs", files.NOTEBOOKS / "runs"]


@main.command()
@click.argument("lesson", metavar="NN")
@click.option(
    "-g", "grid", multiple=True, metavar="NAME=V1,V2", help="Values of a parameter; all combinations are run."
)
@click.option("--seeds", type=click.IntRange(1, 10_000), help="Repeat each point for so many SEEDs, from its own on.")
@click.option("-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="Set a parameter at all points.")
@click.option("--preset", type=click.Choice(PRESETS), help="Default: class.")
@click.option("--on", default="local", show_default=True, metavar="PLACE", help="local, or dask://host:port.")
@click.option("--workers", type=click.IntRange(min=1), help="Runs at once. Default: 1, or one a GPU.")
@OUT
def sweep(
    lesson: str,
    grid: tuple[str, ...],
    seeds: int | None,
    pairs: tuple[tuple[str, str], ...],
    preset: str | None,
    on: str,
    workers: int | None,
    out: Path,
) -> None:
    """Run a lesson at every point of a grid, and write the report.

    All points are checked before the first one starts. What is done already is not run again, so the same command goes
    on after Ctrl-C, a lost worker or a lost scheduler. On a cluster OUT has to be a folder that all machines share;
    Slurm, Kubernetes and others through dask-jobqueue and its like: see course/sweep.py.

    Exit code: 0 all points have a result, 1 some failed, 2 something asked for cannot be had, 130 interrupted.

    \b
    ./lab sweep 03 -g RATIO=0.3,0.5,0.7 -g CRITERION=l1,taylor --seeds 5
    ./lab sweep 03 -g RATIO=0.3,0.5,0.7 --on dask://host:8786 --out /shared/runs
    """
    from tqdm import tqdm

    from course import notebooks, sweep

    axes = sweep.parse(grid)
    values = _by_name([("PRESET", preset), *pairs])
    if "PRESET" not in axes:
        values.setdefault("PRESET", _default_preset("class"))
    jobs = sweep.plan(notebooks.find(lesson), axes, values, seeds=seeds, out=out)
    ended: list[Outcome] = []
    _interrupt_once()
    try:
        with sweep.workers(on, jobs, workers) as crew:
            click.echo(f"{jobs[0].lesson}: {len(jobs)} points, {crew.count} at once")
            if crew.count > 1:
                click.echo("note    runs that share the cores of a machine blur each other's clocks")
            with tqdm(total=len(jobs), unit="run", desc=jobs[0].lesson[:2], disable=None) as bar:
                for outcome in sweep.outcomes(jobs, crew):
                    ended.append(outcome)
                    tqdm.write(_line_of_point(outcome, f"{len(ended):4}/{len(jobs)}"))
                    bar.update()
    except KeyboardInterrupt:
        click.echo("\nlabkit: interrupted; finished runs are kept, and the same command goes on from them.", err=True)
        sys.exit(130)
    click.echo(sweep.summary(ended))
    if any(outcome.run for outcome in ended):
        click.echo(f"report  {_report([out])}")
    sys.exit(any(outcome.failure for outcome in ended))


def _line_of_point(outcome: "Outcome", number: str) -> str:
    state = "done"
    if outcome.reused:
        state = "before"
    if outcome.failure:
        state = "failed"
    seconds = f"{outcome.run.seconds:5.0f} s" if outcome.run else ""
    return f"{state:6}  {number}  {seconds:7}  {outcome.job.label}"


@main.command()
@click.argument("folders", nargs=-1, metavar="[DIR]...", type=click.Path(path_type=Path))
def report(folders: tuple[Path, ...]) -> None:
    """Make one HTML page of the results in DIR..., written into the first of them, and rows.csv and rows.parquet.

    By default these are runs/, and the folders where lessons that were opened in an editor left their results:
    workspace/runs/ and notebooks/runs/.
    """
    existing = [folder for folder in _places_of_results() if folder.is_dir()]
    click.echo(_report(list(folders) or existing or [RUNS]))


@main.command()
@click.option("--serve/--no-serve", default=True, help="Show it on this machine until Ctrl-C, or only build it.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=SITE, help="Default: build/site.")
def site(serve: bool, port: int, out: Path) -> None:
    """Build the lessons, the claims and the measured machines as a web site, and serve it on this machine."""
    from course import site as pages

    server = pages.serve(out, port) if serve else None  # a port that is taken is said before the work
    first = pages.build(out, _places_of_results())
    if not server:
        click.echo(first.resolve().as_uri())
        return
    click.echo(f"http://localhost:{server.server_port}/   (Ctrl-C ends it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


@main.command()
@click.argument("lesson", metavar="NN")
@click.option("--browser/--no-browser", default=True, help="Open a browser, or only print the address.")
@click.option("--fresh", is_flag=True, help="Begin again with a new copy; the old one is kept under today's date.")
@click.option("--copy", "only_copy", is_flag=True, help="Only make the copy, to open it in VS Code or elsewhere.")
def start(lesson: str, browser: bool, fresh: bool, only_copy: bool) -> None:
    """Take a lesson: open your own copy, without the answers, in JupyterLab."""
    from course import notebooks

    older = notebooks.put_aside(lesson) if fresh else None
    copy = notebooks.prepare(lesson)
    number = copy.name[:2]
    click.echo(f"your copy: {copy}")
    click.echo(f"stuck? An exercise's worked answer: ./lab solution {number}.1")
    if older:
        click.echo(f"the copy that you had: {older}")
    if notebooks.has_changed(copy):
        click.echo(
            f"lesson {number} has changed since this copy was made; your work stays as it is. To get the new lesson, "
            f"with this copy kept beside it: ./lab start {number} --fresh"
        )
    if not only_copy:
        notebooks.open_in_jupyterlab(copy, browser=browser)


@main.command()
@click.argument("exercise", metavar="NN.K")
def solution(exercise: str) -> None:
    """Show the worked answer to an exercise, such as 03.1."""
    from course import notebooks

    click.echo(notebooks.exercise(exercise).solution)


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def release(folder: Path) -> None:
    """Make the folder that a class gets: all lessons without answers, an index, and labkit."""
    from course import notebooks

    copies = notebooks.release(folder)
    click.echo(f"{len(copies)} lessons without answers, labkit and its data: {folder.resolve()}")


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--seconds", type=click.FloatRange(min=1), default=30.0, show_default=True, help="Limit for one answer.")
@click.option(
    "--totals",
    type=(click.Choice(("canvas", "moodle")), click.Path(path_type=Path)),
    metavar="canvas|moodle FILE",
    help="Also write a row a student for that gradebook, to be imported there.",
)
def grade(folder: Path, seconds: float, totals: tuple[str, Path] | None) -> None:
    """Grade DIR/<student>/<lesson>.ipynb into DIR/grades.csv and DIR/grades.html.

    Files as Canvas downloads them, all in DIR, and Moodle's folders are understood: see notebooks/syllabi.

    Exit code: 0 all was graded, 1 a process of the grader was ended and some answers were not, 2 something asked for
    cannot be had.

    \b
    ./lab grade class --totals canvas points.csv
    """
    from tqdm import tqdm

    from course import grade
    from course import totals as gradebook

    if totals:
        gradebook.require_writable(totals[1])
    with tqdm(unit="answer", disable=None) as bar:

        def show(row: grade.Grade, number_of_answers: int) -> None:
            bar.total = number_of_answers
            bar.set_postfix_str(f"{row.student} {row.exercise.id}", refresh=False)
            bar.update()

        book = grade.grade(folder, seconds=seconds, on_grade=show)
    for path in grade.write(book, folder):
        click.echo(path.resolve().as_uri())
    if book.incomplete:
        no_totals = " No totals were written." if totals else ""
        click.echo(f"labkit: {book.incomplete}{no_totals}", err=True)
        sys.exit(1)
    if totals:
        gradebook.write(book, *totals)
        click.echo(totals[1].resolve().as_uri())


@main.group()
def data() -> None:
    """The data sets and models that the lessons use."""


@data.command("list")
def list_() -> None:
    """List all data and models: state, kind, size, name, licence."""
    from labkit.data.fetch import assets

    for asset in assets().values():
        state = f"{asset.state:8} {asset.kind:10}"
        size = f"{asset.bytes / 1e6:8.1f} MB"
        click.echo(f"{state} {size}  {asset.name:40} {asset.licence}")


@data.command("fetch")
@click.argument("names", nargs=-1, metavar="[NAME]...")
def fetch_(names: tuple[str, ...]) -> None:
    """Bring models into the user's cache (default: all that the lessons need)."""
    from labkit.data import fetch

    for name in names or fetch.models():
        click.echo(f"ready  {name}  {fetch.fetch(name)}")


@data.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
def verify(names: tuple[str, ...]) -> None:
    """Hash every file again (default: everything). Exit code 2 if one is missing or damaged."""
    from labkit.data import fetch

    wrong = 0
    for name in names or fetch.assets():
        try:
            fetch.verify(name)
            click.echo(f"ready  {name}")
        except DataError as error:
            wrong += 1
            click.echo(f"FAIL   {error}", err=True)
    sys.exit(2 if wrong else 0)


if __name__ == "__main__":
    main(prog_name="./lab")
