"""Parity on constructed answers, whose intervals can be had by hand, and on models that were changed on purpose."""

import functools
import math

import changed_answers
import pytest
import torch
from refusals import Refusals, check_refusal, refused
from scipy.stats import binom, norm
from torch import nn

from labkit.deploy import parity
from labkit.errors import EqualityError, InputError


def scores(classes: list[int], sure: list[bool], width: int = 3) -> torch.Tensor:
    """[N, width] with these first classes, by a wide margin or by almost none."""
    margins = torch.where(torch.tensor(sure), 5.0, 0.01)
    return torch.zeros(len(classes), width).scatter(1, torch.tensor(classes)[:, None], margins[:, None])


def test_agreement_and_margins_are_counted():
    sure = [True] * 60 + [False] * 40
    reference = scores([0] * 100, sure)
    other = scores([0] * 60 + [0] * 30 + [1] * 10, sure)  # ten flips, all where the model was not sure
    result = parity.compare_scores(reference, other)
    assert (result.examples, result.sure) == (100, 60)
    low, high = result.agreement[1:]
    assert result.agreement[0] == 0.9
    assert (binom.sf(89, 100, low), binom.cdf(90, 100, high)) == pytest.approx((0.025, 0.025)), "Clopper and Pearson"
    assert result.sure_agreement[0] == 1.0 and result.max_abs == pytest.approx(0.01)
    assert result.accuracy is result.change is None


def test_the_change_of_accuracy_is_paired():
    """200 of 1000 turn wrong and 190 others right: -1 point, with the interval of McNemar's 390 discordant pairs."""
    labels = torch.zeros(1000, dtype=torch.long)
    reference = scores([0] * 700 + [1] * 300, [True] * 1000)
    other = scores([0] * 500 + [1] * 200 + [0] * 190 + [1] * 110, [True] * 1000)
    result = parity.compare_scores(reference, other, labels)
    assert result.accuracy == pytest.approx(0.69) and result.change[0] == pytest.approx(-1.0)
    half = 100 * norm.ppf(0.975) * math.sqrt((390 / 1000 - 0.01**2) / 999)  # by the normal law, good for many pairs
    assert result.change[1:] == pytest.approx((-1 - half, -1 + half), rel=0.04)
    assert result.change[1] < -1 - half and result.change[2] > -1 + half, "the exact interval is wider"


@functools.cache
def passes(wins: int, losses: int, examples: int, points: float) -> bool:
    """Answers of which so many turned right and wrong: True if the gate lets the candidate pass."""
    answers, sure = [1] * wins + [0] * (examples - wins), [True] * examples
    others = [0] * (examples - losses) + [1] * losses
    labels = torch.zeros(examples, dtype=torch.long)
    try:
        parity.compare_scores(scores(answers, sure), scores(others, sure), labels).require(points=points)
    except EqualityError:
        return False
    return True


@pytest.mark.parametrize(
    ("examples", "wins"),
    [(100, 0.0), (300, 0.0), (300, 0.002), (1000, 0.0), pytest.param(1000, 0.005, marks=pytest.mark.slow)],
)
def test_few_of_the_candidates_at_the_limit_pass(examples, wins):
    """Exactly a point is lost in truth. All counts of changed answers are tried, weighted with their probability."""
    passed, losses = 0.0, wins + 0.01
    for won, lost, probability in changed_answers.counts(wins, losses, examples, negligible=1e-6):
        if passes(won, lost, examples, 1.0):
            passed += probability
    print(f"{examples} examples, {wins:.1%} turn right: {passed:.2%} pass")
    assert passed <= 0.025


def test_a_loss_makes_the_verdict_no_milder():
    """Of 100 answers one more wrong: the lower end falls. Without any change it has the width that 100 answers have."""
    labels, sure = torch.zeros(100, dtype=torch.long), [True] * 100
    reference = scores([0] * 100, sure)
    ends = []
    for losses in (0, 1, 2):
        other = scores([0] * (100 - losses) + [1] * losses, sure)
        ends.append(parity.compare_scores(reference, other, labels).change[1])
    assert ends[0] == pytest.approx(-100 * (1 - 0.025**0.01)) and ends[0] > ends[1] > ends[2]


def test_a_gate_refuses_what_is_not_excluded():
    labels, sure = torch.zeros(4000, dtype=torch.long), [True] * 4000
    reference = scores([0] * 4000, sure)
    good = parity.compare_scores(reference, scores([0] * 3990 + [1] * 10, sure), labels)
    assert good.require(points=1.0) is good
    bad = parity.compare_scores(reference, scores([0] * 3900 + [1] * 100, sure), labels)
    with pytest.raises(EqualityError, match=r"change of accuracy is -2.50 points on 4000 examples .* candidate fails"):
        bad.require(points=1.0)
    unsure = parity.compare_scores(reference[:300], scores([0] * 299 + [1], sure[:300]), labels[:300])
    with pytest.raises(EqualityError, match=r"-0.33 points on 300 examples \(-1.84 to .* not decided .* more examples"):
        unsure.require(points=1.0)
    few = parity.compare_scores(reference[:100], reference[:100])
    with pytest.raises(
        EqualityError, match=r"share of other answers is \+0.00 points on 100 examples \(-3.62 to .* give labels"
    ):
        few.require(points=1.0)
    many = parity.compare_scores(reference, scores([0] * 3900 + [1] * 100, sure))
    with pytest.raises(EqualityError, match="not decided"):  # other answers may have turned right
        many.require(points=1.0)
    assert few.require(db=100) is few
    with pytest.raises(EqualityError, match="and 60 dB are required"):
        good.require(points=1.0, db=60)
    with pytest.raises(InputError, match="give points"):
        good.require()


def test_a_model_is_judged_on_batches_with_and_without_labels():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Dropout(0.9), nn.Linear(8, 4)).train(), torch.randn(64, 8)
    other = nn.Sequential(nn.Identity(), nn.Linear(8, 4))
    other.load_state_dict(model.state_dict())
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(24)]
    same = parity.Reference(model, batches).judge(other)
    assert same.max_abs == 0 and same.sqnr_db == math.inf and same.change[0] == 0 and same.examples == 64
    assert model.training and parity.Reference(model, [x]).judge(other).change is None
    with torch.no_grad():
        other[1].weight[0] += 3.0
    assert parity.Reference(model, batches).judge(other).agreement[0] < 0.9
    with pytest.raises(InputError, match="batches is empty"):
        parity.Reference(model, [])


CLASSIFIER, X = nn.Linear(8, 4), torch.randn(64, 8)
Y = torch.arange(64) % 4
MANY = torch.randn(40, 3)


def reference(*batches: object) -> parity.Reference:
    return parity.Reference(CLASSIFIER, list(batches))


REFUSALS: Refusals = {
    "The inputs of DataParallel have no names": lambda: parity.Reference(nn.DataParallel(CLASSIFIER), [X]),
    "model is a list": lambda: parity.Reference([CLASSIFIER], [X]),
    "batches is one Tensor": lambda: parity.Reference(CLASSIFIER, X),
    "batches is one int": lambda: parity.Reference(CLASSIFIER, 3),
    "A batch's labels is a list": lambda: reference((X, Y.tolist())),
    "labels [63] do not fit together": lambda: reference((X, Y[:63])).judge(CLASSIFIER),
    "candidate is a str": lambda: reference(X).judge("engine"),
    "scores [64, 3] do not fit together": lambda: reference(X).judge(nn.Linear(8, 3)),
    "but no such tensor came back": lambda: reference(X).judge(lambda input: "cat"),
    "give a classifier": lambda: parity.Reference(nn.Flatten(0), [X]),
    "these scores have one": lambda: parity.Reference(nn.Linear(8, 1), [X]).judge(nn.Linear(8, 1)),
    "reference is a list": lambda: parity.compare_scores([[1.0]], MANY),
    "scores is None": lambda: parity.compare_scores(MANY, None),
    "scores is torch.int64": lambda: parity.compare_scores(MANY, MANY.long()),
    "labels is a list": lambda: parity.compare_scores(MANY, MANY, [0] * 40),
    "labels [40, 3]": lambda: parity.compare_scores(MANY, MANY, MANY),
    "points is '1'": lambda: parity.compare_scores(MANY, MANY).require(points="1"),
    "db is nan": lambda: parity.compare_scores(MANY, MANY).require(db=math.nan),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)


def test_few_examples_are_judged_and_decide_nothing():
    judged = reference((X[:8], Y[:8])).judge(CLASSIFIER)
    assert judged.change[0] == 0 and judged.change[1] < -30
    with pytest.raises(EqualityError, match=r"on 8 examples .* not decided"):
        judged.require(points=5.0)
