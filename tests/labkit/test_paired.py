"""Changes between two models on the same images and texts: intervals by hand, against scipy, and of known truth."""

import math

import changed_answers
import numpy as np
import pytest
import torch
from refusals import Refusals, check_refusal, refused
from scipy.stats import beta, binomtest

from labkit.errors import InputError
from labkit.timing import stats


def answers(wins: int, losses: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """(after, before) of two models: so many answers turn right, so many wrong, and the others stay wrong."""
    after, before = np.zeros((2, images), bool)
    after[:wins] = True
    before[wins : wins + losses] = True
    return after, before


# accuracy over images ------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 30, 300, 10_000])
def test_without_a_changed_answer_the_interval_has_its_exact_width(images):
    """(1 - p)^n = 0.025 at the end: so many of n images may have changed with none seen."""
    _, low, high = stats.accuracy_change(*answers(0, 0, images))
    assert (1 - high) ** images == pytest.approx(0.025) and low == -high


@pytest.mark.parametrize(("losses", "images"), [(1, 300), (10, 1000), (7, 7)])
def test_with_losses_alone_the_lower_end_is_clopper_and_pearsons(losses, images):
    value, low, high = stats.accuracy_change(*answers(0, losses, images))
    expected = binomtest(losses, images).proportion_ci(0.95, method="exact").high
    assert value == -losses / images and low == pytest.approx(-expected) and low <= value < high


@pytest.mark.parametrize(
    ("wins", "losses", "images"), [(1, 1, 300), (3, 8, 300), (15, 2, 300), (9, 2, 50), (190, 200, 1000), (20, 10, 30)]
)
def test_the_ends_are_quantiles_of_products_drawn_at_random(wins, losses, images):
    """Fay and Lumbard 2021: the lower of the two quantiles of D (2 W - 1), D and W as Clopper and Pearson have them."""
    rng, discordant = np.random.default_rng(0), wins + losses
    value, low, high = stats.accuracy_change(*answers(wins, losses, images))
    assert value == pytest.approx((wins - losses) / images)

    def drawn(counted: int, of: int, upper: bool) -> np.ndarray:
        if upper and counted == of:
            return np.ones(400_000)
        return beta.rvs(counted + upper, of - counted + (not upper), size=400_000, random_state=rng)

    shares = [drawn(discordant, images, upper) for upper in (False, True)]
    least = min(np.quantile(share * (2 * drawn(wins, discordant, False) - 1), 0.025) for share in shares)
    most = max(np.quantile(share * (2 * drawn(wins, discordant, True) - 1), 0.975) for share in shares)
    assert (low, high) == pytest.approx((least, most), abs=4e-3 * (most - least) + 1e-4)


def test_the_interval_excludes_zero_if_and_only_if_mcnemars_exact_test_rejects():
    for discordant in range(1, 25):
        for wins in range(discordant + 1):
            _, low, high = stats.accuracy_change(*answers(wins, discordant - wins, 100))
            rejects = binomtest(wins, discordant).pvalue <= 0.05
            assert (low > 0 or high < 0) == rejects


def test_pairing_makes_the_interval_narrow_where_most_answers_agree():
    rng, widths, inside = np.random.default_rng(0), [], 0
    for _ in range(500):
        u = rng.uniform(size=400)
        value, low, high = stats.accuracy_change(u < 0.80, u < 0.75)
        inside += low <= 0.05 <= high
        widths.append(high - low)
        assert low <= value <= high
    assert inside >= 475
    assert np.mean(widths) < 0.055  # unpaired it would be 0.11


def held(wins: float, losses: float, images: int) -> float:
    """Add up the probability of all counts whose interval holds the truth, exactly."""
    total, truth = 0.0, wins - losses
    for won, lost, probability in changed_answers.counts(wins, losses, images, negligible=1e-7):
        _, low, high = stats.accuracy_change(*answers(won, lost, images))
        total += probability * (low <= truth <= high)
    return total


@pytest.mark.parametrize(
    ("wins", "losses", "images"), [(0.0, 0.01, 300), (0.005, 0.015, 300), (0.02, 0.03, 100), (0.3, 0.2, 20)]
)
def test_the_interval_holds_the_truth_at_least_as_often_as_it_says(wins, losses, images):
    assert held(wins, losses, images) >= 0.95 - 1e-4


# accuracy over images and seeds --------------------------------------------------------------------


def test_over_seeds_the_interval_adds_the_images_and_the_seeds():
    """Per seed -1, -2 and -3 points; an image's change averages over the seeds."""
    after, before = np.ones((3, 200), bool), np.ones((3, 200), bool)
    for seed, losses in enumerate((2, 4, 6)):
        after[seed, :losses] = False
    value, low, high = stats.accuracy_change_over_seeds(after, before)
    _, seeds_low, seeds_high = stats.mean_ci([-0.01, -0.02, -0.03])
    assert value == pytest.approx(-0.02)
    images_low, images_high = stats.accuracy_change(*answers(0, 4, 200))[1:]  # 4 images' worth of losses
    assert low == pytest.approx(value - math.hypot(value - images_low, value - seeds_low))
    assert high == pytest.approx(value + math.hypot(images_high - value, seeds_high - value))


def test_equal_answers_of_all_seeds_leave_the_width_over_images():
    same = np.ones((3, 300), bool)
    assert stats.accuracy_change_over_seeds(same, same) == stats.accuracy_change(same[0], same[0])
    assert stats.accuracy_change_over_seeds(same[:1], same[:1]) == (0, -1, 1), "a single seed tells nothing of seeds"


# any values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 100.0, True])
def test_right_answers_have_the_exact_interval_in_any_unit(unit):
    after, before = answers(3, 8, 300)
    exact = [unit * x for x in stats.accuracy_change(after, before)]
    assert stats.paired_difference((unit * after).tolist(), (unit * before).tolist()) == pytest.approx(exact)


def test_answers_that_all_agree_have_a_width():
    for answer in (0, 100):
        _, low, high = stats.paired_difference([answer] * 300, [answer] * 300)
        assert low < 0 < high


def test_other_values_have_students_interval():
    first, second = np.random.default_rng(0).normal(size=(2, 40))
    assert stats.paired_difference(first, second) == stats.mean_ci((first - second).tolist())


# perplexity ----------------------------------------------------------------------------------------

LOSSES, TOKENS = [3.0, 3.5, 2.5, 3.2, 2.9, 3.1, 3.3], [100, 400, 50, 100, 200, 300, 100]


def test_a_perplexity_weighs_each_text_by_its_tokens():
    value, low, high = stats.perplexity_ci(LOSSES, TOKENS)
    assert value == pytest.approx(math.exp(np.average(LOSSES, weights=TOKENS))) and low < value < high


def test_a_ratio_of_perplexities_is_paired():
    """Texts differ by far more than the models: unpaired, no difference could be told."""
    rises = [0.05, 0.06, 0.04, 0.05, 0.06, 0.05, 0.04]
    after = [loss + rise for loss, rise in zip(LOSSES, rises, strict=True)]
    value, low, high = stats.perplexity_ci(after, TOKENS, LOSSES)
    assert value == pytest.approx(math.exp(np.average(rises, weights=TOKENS)))
    assert 1.03 < low < value < high < 1.08
    _, unpaired_low, unpaired_high = stats.perplexity_ci(after, TOKENS)
    assert unpaired_high / unpaired_low > 1.3


def test_tokens_of_a_text_are_no_independent_evidence():
    """Read to twice the length, the same texts with the same changes leave the interval as wide."""
    twice = [2 * n for n in TOKENS]
    assert stats.perplexity_ci(LOSSES, twice) == pytest.approx(stats.perplexity_ci(LOSSES, TOKENS))


def test_too_few_texts_and_texts_without_a_difference_have_no_interval():
    assert stats.perplexity_ci([3.0] * 5, [100] * 5) == (pytest.approx(math.exp(3)), 0, math.inf)
    assert stats.perplexity_ci(LOSSES[:5], TOKENS[:5])[1:] == (0, math.inf)
    assert stats.perplexity_ci(LOSSES, TOKENS, LOSSES) == (1, 0, math.inf)


def test_a_single_text_that_changes_leaves_the_far_end_open():
    """One resampling in three leaves the text out, and nothing tells how much such a text may change."""
    _, low, high = stats.perplexity_ci([3.1, *[3.0] * 6], [100] * 7, [3.0] * 7)
    assert low <= 1.0145 and high == math.inf


def losses_of_draws(draws: int, shift: float, seed: int) -> np.ndarray:
    """Losses [draws, 12 texts] of 3 nats and a shift."""
    return 3 + shift + 0.05 * np.random.default_rng(seed).standard_normal((draws, 12))


def test_a_ratio_of_a_single_draw_has_the_interval_over_texts():
    after, before = losses_of_draws(1, 0.3, 1), losses_of_draws(1, 0.0, 2)
    expected = stats.perplexity_ci(after[0], [100] * 12, before[0])
    assert stats.perplexity_ratio(after, before, 100) == pytest.approx(expected)


def test_draws_that_differ_widen_the_interval_of_a_ratio():
    before = losses_of_draws(1, 0.0, 2)
    alike = before + 0.3 + 0.01 * losses_of_draws(1, 0.0, 3).repeat(3, 0)
    spread = alike + np.array([[-0.1], [0.0], [0.1]])
    narrow, wide = (stats.perplexity_ratio(after, before, 100) for after in (alike, spread))
    assert narrow[0] == pytest.approx(wide[0]) and wide[1] < narrow[1] < narrow[2] < wide[2]
    _, low, high = stats.mean_ci([-0.1, 0.0, 0.1])
    assert math.log(wide[2] / wide[0]) > high and math.log(wide[0] / wide[1]) > -low


def test_draws_are_paired():
    chance = np.array([[-0.5], [0.0], [0.5]])
    before = losses_of_draws(3, 0.0, 4) + chance
    _, low, high = stats.perplexity_ratio(before + 0.1 + 0.001 * losses_of_draws(3, 0, 5), before, 100)
    assert 1.1 < low < high < 1.12


RIGHT = np.ones(4, bool)
REFUSALS: Refusals = {
    "30 values or more, got 29 and 29": lambda: stats.paired_difference([1] * 29, [1] * 29),
    "equally long": lambda: stats.paired_difference([1] * 30, [1] * 31),
    "answers [images], got [4] and [3]": lambda: stats.accuracy_change(RIGHT, RIGHT[:3]),
    "got [0] and [0]": lambda: stats.accuracy_change([], []),
    "neither right nor wrong": lambda: stats.accuracy_change([0.5], [1]),
    "answers [seeds, images], got [4] and [4]": lambda: stats.accuracy_change_over_seeds(RIGHT, RIGHT),
    "the shapes [6] and [7]": lambda: stats.perplexity_ci(LOSSES, TOKENS[:6]),
    "the shapes [0]": lambda: stats.perplexity_ci([], []),
    "loss is NaN or infinite": lambda: stats.perplexity_ci([math.nan, *LOSSES[1:]], TOKENS),
    "losses [draws, texts], got [6] and [6]": lambda: stats.perplexity_ratio(LOSSES[:6], LOSSES[:6], 9),
    "got [2, 3] and [3, 3]": lambda: stats.perplexity_ratio(np.ones((2, 3)), np.ones((3, 3)), 9),
    "has 0 tokens": lambda: stats.perplexity_ci(LOSSES, [0, *TOKENS[1:]]),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)


def test_answers_may_be_tensors():
    right = torch.tensor([True, False, True])
    assert stats.accuracy_change(right, ~right)[0] == pytest.approx(1 / 3)
    with pytest.raises(InputError, match="got"):
        stats.accuracy_change(right, right[:2])
