"""The intervals of the lessons are over images, seeds and texts: their own functions, taken out of their cells."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lesson_cells import function

from course import notebooks
from labkit import stats
from labkit.lesson import challenge

BY_HAND = re.compile(r"\b1\.96\b|\bhypot\(|\bppf\(|rule of\s+three|\b300 / len|\bRUN\)\.mean\(1\)\.tolist\(\)")
SEEDS, IMAGES, TEXTS, TOKENS = 3, 200, 8, 50


def cells(lesson: str) -> dict[str, str]:
    return {cell.id: cell.source for cell in notebooks.read(notebooks.find(lesson)).cells if cell.cell_type == "code"}


@pytest.mark.parametrize("lesson", [path.stem[:2] for path in notebooks.all_lessons()])
def test_no_lesson_makes_an_interval_by_hand(lesson: str):
    assert [name for name, source in cells(lesson).items() if BY_HAND.search(source)] == []


# --- perplexity: over texts -------------------------------------------------------------------------------------------


def perplexity_ratio(lesson: str, extra: torch.Tensor) -> stats.Estimate:
    """The lesson's perplexity over that of another model, from the extra loss of each token [texts, tokens]."""
    texts, tokens = extra.shape
    if lesson == "09":
        return function("09", "perplexity", length=tokens + 1)(extra, torch.zeros_like(extra))
    scores = {"a": {"nats": extra}, "all tokens": {"nats": torch.zeros_like(extra)}}
    lost = function("11", "lost", scores=scores, after=tokens, texts=texts)
    return tuple(math.exp(end) for end in lost("a"))


READERS = ["09", "11"]


def extra_loss(texts: int) -> torch.Tensor:
    """Extra losses of tokens whose texts differ, [texts, tokens]."""
    generator = torch.Generator().manual_seed(0)
    of_text = 0.1 + 0.05 * torch.randn(texts, 1, generator=generator, dtype=torch.float64)
    return of_text + torch.randn(texts, TOKENS, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("lesson", READERS)
def test_a_ratio_of_perplexities_has_the_interval_over_texts(lesson: str):
    extra = extra_loss(TEXTS)
    expected = stats.perplexity_ci(extra.mean(1).tolist(), [TOKENS] * TEXTS)
    assert perplexity_ratio(lesson, extra) == pytest.approx(expected)


@pytest.mark.parametrize("lesson", READERS)
def test_five_texts_have_no_interval_however_many_tokens_they_have(lesson: str):
    value, low, high = perplexity_ratio(lesson, extra_loss(5))
    assert value > 0 and (low, high) == (0, math.inf)


# --- accuracy: over images, and over seeds where there are seeds ------------------------------------------------------


def test_needles_have_exact_intervals_over_texts():
    ends_of = function("11", "ends_of", texts=10)
    assert ends_of(torch.zeros(10, dtype=torch.bool)) == stats.clopper_pearson(0, 10)[1:]


# --- planes of the challenges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lesson", "column"), [("08", "accuracy"), ("09", "perplexity ratio"), ("11", "needles"), ("13", "accuracy")]
)
def test_the_plane_of_a_challenge_has_intervals(lesson: str, column: str):
    sources = cells(lesson)
    sources = [source for name, source in sources.items() if name.startswith(("challenge", "planned"))]
    assert any(f'"{column} ci95"' in source for source in sources)


def test_a_plan_of_lesson_13_has_its_accuracy_over_images():
    on_plane = function("13", "on_plane")
    parity = SimpleNamespace(examples=IMAGES, accuracy=0.9)
    point = on_plane(SimpleNamespace(parity=parity, bytes=60_000))
    assert point["accuracy ci95"] == pytest.approx([100 * x for x in stats.clopper_pearson(180, IMAGES)[1:]])
    assert (point["accuracy"], point["file"]) == pytest.approx((90, 60))
    goals = {"file": (None, 75.0, "kB"), "accuracy": (89.0, None, "%")}
    assert challenge.checked(goals, point) == {key: pytest.approx(value) for key, value in point.items()}


def test_a_plan_of_lesson_13_is_judged_on_the_split_that_is_asked_for():
    """The pipeline keeps its rows in a folder: the row of one split is never read for another."""
    folders = []
    names = {
        "Step": lambda *_, **__: None,
        "datasets": SimpleNamespace(
            fashion_mnist=lambda *_: SimpleNamespace(images=torch.ones(2), labels=torch.ones(2))
        ),
        "lab": SimpleNamespace(by_preset=lambda *_: 2),
        "parity": SimpleNamespace(Reference=lambda *_: None),
        "pipeline": SimpleNamespace(execute=lambda *_, folder, **__: folders.append(folder) or {"yours": [None]}),
    }
    planned = function("13", "planned", **names, folder=Path("plans"), resnet=None, few=[], budget=1)
    for ratio in (0.4, 0.5):
        for split in ("validation", "test"):
            planned({"steps": ["cut"], "ratio": ratio}, split)
    assert len(set(folders)) == 4
