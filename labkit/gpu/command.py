"""The command `labkit gpu`: a thin layer over steps, trips and wheels, imported when they are needed."""

import signal
import sys
from pathlib import Path

import click

from labkit import paths
from labkit.errors import InputError

OUT = paths.ROOT / "runs" / "gpu"


@click.group(invoke_without_command=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=OUT, help="Default: runs/gpu/.")
@click.option("--minutes", type=click.FloatRange(min=1), default=30.0, show_default=True, help="For this call.")
@click.option("--bring", "brought", type=click.Path(path_type=Path), help="Folder to take trips or results from first.")
@click.option("--plan", is_flag=True, help="Only say what would run, and what is missing for it.")
@click.pass_context
def gpu(ctx: click.Context, out: Path, minutes: float, brought: Path | None, plan: bool) -> None:
    """Run all that needs a GPU: tests, lessons at full, benchmarks; record and pack the results.

    Call it again to go on. Exit code 0: all is done; 1: a step failed; 2: nothing could run; 3: steps are left.
    """
    from labkit.gpu import steps, wheels

    steps.environment()
    if ctx.invoked_subcommand:
        return
    if not plan:
        steps.require_gpu()
    if brought:
        _take(brought, out)
    if lacking := wheels.missing(wheels.here(), wheels.required()):
        raise InputError(
            f"These packages are missing here: {', '.join(map(str, lacking))}; run ./lab setup where there is a "
            "network, else bring trips that `labkit gpu prepare` made."
        )
    out = out.resolve()
    todo, state = steps.steps(out), steps.State.load(out / "state.json", steps.key())
    if plan:
        for line in steps.plan(todo, state, 60 * minutes):
            click.echo(line)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        outcomes = steps.run(todo, out, minutes, state=state, say=click.echo)
    except KeyboardInterrupt:
        click.echo("\nlabkit: interrupted; the step under way left nothing behind, finished ones are kept.", err=True)
        sys.exit(130)
    click.echo("\n".join(["", *map(str, outcomes), "", *steps.packed(out)]))
    sys.exit(steps.exit_code(outcomes))


@gpu.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option("--has", required=True, type=click.Path(path_type=Path), help="Its `pip list --format=freeze`, a file.")
@click.option("--trip", type=click.FloatRange(min=1), default=64.0, show_default=True, help="MB that a trip may carry.")
def prepare(folder: Path, has: Path, trip: float) -> None:
    """Here, with a network: make the trips for a GPU machine without one (Linux x86-64, Python 3.12)."""
    from labkit.gpu import trips, wheels

    try:
        there = wheels.installed(has.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{has} cannot be read ({error.strerror}); give that machine's list of packages.") from None
    for made in trips.prepare(folder, there, trip_bytes=int(trip * 1e6)):
        size = sum(file.stat().st_size for file in made.iterdir()) / 1e6
        click.echo(f"{made}  {size:.1f} MB: there, ./lab gpu take {made.name}, and with the last one ./lab gpu --bring")


@gpu.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=OUT, help="Default: runs/gpu/.")
def take(folder: Path, out: Path) -> None:
    """Take up what was brought, without running anything: trips there, packed results here."""
    _take(folder, out)


def _take(folder: Path, out: Path) -> None:
    """Trips, results of an earlier call, or both."""
    from labkit.gpu import steps, trips

    results = sorted(folder.glob("results-*.zip"))
    if not results or trips.lists(folder):
        taken = trips.take(folder)
        click.echo(f"taken   {len(taken.whole)} files are whole, still to come: {', '.join(taken.missing) or 'none'}")
    if results:
        from labkit import readme

        click.echo(f"taken   {len(steps.take(folder, out))} results")
        readme.update()  # it lists the machines that recorded
