"""The results that the first pages open with: a sentence, a picture and the lesson whose record has the numbers."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from course import notebooks
from labkit import files, show
from labkit.lesson import experiments
from labkit.lesson.records import RunRecord, recorded

PICTURES = files.ROOT / "course" / "site" / "static"
TOGETHER = "all steps over the best eager way"  # a number of lesson 13
WIDTH, BAR, MARGIN = 6.8, 0.42, 0.75  # inches: of a picture, of a bar's row, of the axis below


@dataclass(frozen=True)
class Bar:
    """A number with its interval, or with its range over processes."""

    label: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Headline:
    """A result.

    lesson: two digits.
    text: the result in a sentence or two, as Markdown.
    axis: what the bars measure.
    form: how a number is written, as "{:.1f}x".
    bars: the numbers; the last is the result's.
    """

    lesson: str
    text: str
    axis: str
    form: str
    bars: Sequence[Bar]

    @property
    def picture(self) -> str:
        """Name of the picture's file."""
        return f"result_{self.lesson}.svg"

    @property
    def labels(self) -> list[str]:
        """The words beside each bar: the number, and in brackets its ends without the unit."""
        labels = []
        for bar in self.bars:
            low, high = (self.written(end).rstrip("x") for end in (bar.low, bar.high))
            labels.append(f"{self.written(bar.value)} ({low} to {high})")
        return labels

    def written(self, value: float) -> str:
        """Write a number in the headline's form."""
        return self.form.format(value)


# --- the results ------------------------------------------------------------------------------------------------------


def headlines() -> list[Headline]:
    """Read the results from the records."""
    return [all_steps_together(recorded("13")[0]), language_model_in_four_bits(), two_bits_without_training()]


def all_steps_together(run: RunRecord) -> Headline:
    """ResNet-20 with half of its channels, healed, in int8 and an engine, beside each process's fastest eager torch.

    run: a record of lesson 13. In an older one the norms of the eager network are not folded, and the text says so, or
        the number beside each process's fastest way is not recorded, and is a quotient of two speed-ups.
    """
    is_folded = run.named("all steps, best folded eager, ResNet-20") is not None
    one_image = "ResNet-20, norms folded, batch 1" if is_folded else "ResNet-20, batch 1"
    best_eager = "best folded eager, ResNet-20" if is_folded else "best eager, ResNet-20"
    names = {
        "half of the channels": f"smaller, {one_image}",
        "an engine": f"engine, {one_image}",
        "an engine in int8": f"int8 + engine, {one_image}",
    }
    fastest = fastest_eager(run, best_eager)
    if run.named(TOGETHER) is not None:  # the lesson's own number, from calls in pairs
        together = bar(run, "all three", TOGETHER)
    else:
        together = quotient(run, "all three", f"all steps, {best_eager}", fastest)
    bars = [quotient(run, label, name, fastest) for label, name in names.items()] + [together]
    accuracy = next(claim for claim in run.claims if claim.id == "13.3")
    least, most = (-end for end in reversed(accuracy.ci95))
    seeds = accuracy.trained["seeds"]
    result = f"ResNet-20 answers {together.value:.1f} times as fast for {-accuracy.value:.1f} points of accuracy"
    evidence = f"{between(run, together)}, on {machine(run.machine)}"
    eager = "eager PyTorch with folded norms" if is_folded else "eager PyTorch"
    return Headline(
        lesson="13",
        text=f"**{result}**: half of its channels, 8-bit integers and an inference engine, one image at a time on one "
        f"core, beside {eager} in the faster layout, on two cores where they help ({evidence}). "
        f"{'' if is_folded else folding_alone()}The loss, {least:.1f} to {most:.1f} points over 10,000 images and "
        f"{seeds} seeds, is that of the same int8 network in PyTorch; the engine's own answers were not judged.",
        axis="times as fast as eager at its fastest",
        form="{:.1f}x",
        bars=bars,
    )


def folding_alone() -> str:
    """Say what folding the norms gives eager, for a record whose eager network has norms."""
    folded = recorded("12")[0].named("step norms folded, batch 1").value
    return f"Folding the norms, as an engine does, would make eager {folded:.1f} times as fast (lesson 12). "


def language_model_in_four_bits() -> Headline:
    """A decode step of SmolLM2 in few bits."""
    run = recorded("09")[0]
    names = {
        "bf16": "bf16, decode step",
        "int8, torch": "int8, torch, decode step",
        "int4, torch": "int4, torch, decode step",
        "int4, labkit": "int4, labkit, decode step",
    }
    bars = [bar(run, label, name) for label, name in names.items()]
    step = bars[-1]
    loss = run.named("perplexity, GPTQ over float")
    least, most = loss.ci95
    return Headline(
        lesson="09",
        text=f"**SmolLM2 writes a token {step.value:.1f} times as fast in four bits** as in eager float32 "
        f"({between(run, step)}, on {machine(run.machine)}), by an int4 "
        f"kernel of 200 lines that the lesson reads. By GPTQ, the four bits cost a factor of {loss.value:.2f} in "
        f"perplexity ({least:.2f} to {most:.2f} over texts), on a copy of the model with noise in its weights, because "
        f"the file's had been rounded to four bits before.",
        axis="times as fast as eager float32",
        form="{:.1f}x",
        bars=bars,
    )


def two_bits_without_training() -> Headline:
    """Accuracy that ResNet-20 loses in weights of two bits, by the way of rounding."""
    record = experiments.read("rounding_ladder")
    ways = {
        "rounded to the nearest point": (2, "largest", "nearest", "none", 128),
        "and norms estimated anew": (2, "largest", "nearest", "norms", 128),
        "and ranges by least squares": (2, "least squares", "nearest", "norms", 128),
        "AdaRound, ranges by least squares": (2, "least squares", "AdaRound", "none", 128),
    }
    lost = {}
    for row in record.settings["changes"]:
        if row["before"] == "float":
            way = tuple(row["after"])
            lost[way] = [-100 * row[end] for end in ("change", "high", "low")]
    bars = [Bar(label, *lost[way]) for label, way in ways.items()]
    first, last = bars[0], bars[-1]
    images, draws = record.settings["test images"], record.settings["seeds"]
    interval = f"{last.low:.1f} to {last.high:.1f}"
    return Headline(
        lesson="07",
        text=f"**Weights of two bits lose {last.value:.1f} points instead of {first.value:.0f}**, without a label and "
        f"without training: each weight is rounded up or down so that its layer's outputs stay ({interval} over "
        f"{images:,} images and {draws} draws of 128 calibration images).",
        axis="points of accuracy lost",
        form="{:.1f}",
        bars=bars,
    )


def bar(run: RunRecord, label: str, name: str) -> Bar:
    """Read a number over the processes of a run."""
    spread = run.spread(name)
    return Bar(label, spread.median, spread.smallest, spread.largest)


def fastest_eager(run: RunRecord, race: str) -> list[float]:
    """Read the fastest eager way's speed-up over the way that the race divides by, for each process.

    race: name of the race of the eager ways.
    """
    ways = [entry.name for entry in run.measurements if re.fullmatch(rf"channels .*, {race}", entry.name)]
    of_processes = zip(*(run.over_processes(name) for name in ways), strict=True)
    return [max(1.0, *speed_ups) for speed_ups in of_processes]


def quotient(run: RunRecord, label: str, name: str, baselines: Sequence[float]) -> Bar:
    """Divide a speed-up by a baseline's, process by process, and read the quotient over the processes.

    baselines: for each process the baseline's speed-up over the same opponent.
    """
    pairs = zip(run.over_processes(name), baselines, strict=True)
    quotients = [value / baseline for value, baseline in pairs]
    return Bar(label, statistics.median(quotients), min(quotients), max(quotients))


def between(run: RunRecord, bar: Bar) -> str:
    """Tell the range of a number over the processes of a run."""
    processes = run.spread("seconds").processes
    return f"{bar.low:.1f} to {bar.high:.1f} over {processes} processes"


def machine(facts: Mapping[str, Any]) -> str:
    """Name the processor and the number of cores of a machine's facts."""
    return ", ".join(facts["label"].split(", ")[:2])


# --- the pages --------------------------------------------------------------------------------------------------------


def markdown(pictures: str, lessons: str) -> str:
    """Write the results for a page: for each the sentence, which links to the lesson, and the picture.

    pictures: address of the folder of pictures.
    lessons: address of the folder of notebooks.
    """
    names = {path.name[:2]: path.name for path in notebooks.all_lessons()}
    parts = []
    for headline in headlines():
        if headline.lesson not in names:  # a site of some lessons
            continue
        link = f"[Lesson {headline.lesson}]({lessons}/{names[headline.lesson]})"
        picture = f"![{alt(headline)}]({pictures}/{headline.picture})"
        parts += [f"{headline.text} {link}", picture]
    return "\n\n".join(parts)


def alt(headline: Headline) -> str:
    """Describe the picture in words."""
    numbers = [f"{bar.label} {headline.written(bar.value)}" for bar in headline.bars]
    return f"Bars, {headline.axis}: {', '.join(numbers)}."


def draw(headline: Headline, folder: Path = PICTURES) -> None:
    """Draw the bars with their ends, and write the picture as SVG, which carries its description."""
    with matplotlib.rc_context({"svg.hashsalt": headline.picture}):
        show.style()
        figure = _figure(headline)
        figure.savefig(folder / headline.picture, metadata={"Date": None, "Description": alt(headline)})


def _figure(headline: Headline) -> Figure:
    count = len(headline.bars)
    figure = Figure(figsize=(WIDTH, MARGIN + BAR * count), layout="constrained")
    axes = figure.subplots()
    colours = [show.COLOURS[0]] * (count - 1) + [show.COLOURS[1]]
    axes.barh(range(count), [bar.value for bar in headline.bars], color=colours)
    for place, (bar, label) in enumerate(zip(headline.bars, headline.labels, strict=True)):
        axes.hlines(place, bar.low, bar.high, color="black", linewidth=2)
        axes.text(bar.high, place, f" {label}", va="center")
    axes.set_yticks(range(count), [bar.label for bar in headline.bars])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlim(0, 1.8 * max(bar.high for bar in headline.bars))
    axes.set_xlabel(headline.axis)
    return figure


def description(picture: Path) -> str:
    """Read what a picture shows from the SVG's own description."""
    words = re.search(r"<dc:description>(.*?)</dc:description>", picture.read_text(encoding="utf-8"), re.DOTALL)
    return words[1].strip() if words else ""
