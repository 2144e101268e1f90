"""The law of the answers that change between two models: all counts, each with its probability."""

from collections.abc import Iterator

from scipy.stats import binom


def counts(wins: float, losses: float, examples: int, *, negligible: float) -> Iterator[tuple[int, int, float]]:
    """Yield (answers that turn right, answers that turn wrong, probability), without those of negligible probability.

    wins, losses: probability that an answer turns right, or wrong.
    """
    for discordant in range(examples + 1):
        of_discordant = binom.pmf(discordant, examples, wins + losses)
        if of_discordant < negligible:
            continue
        for lost in range(discordant + 1):
            probability = of_discordant * binom.pmf(lost, discordant, losses / (wins + losses))
            if probability > negligible:
                yield discordant - lost, lost, probability
