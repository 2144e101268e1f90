"""Schedules: the sparsity after each round of iterative pruning, the loop that follows a schedule, lottery tickets.

Zhu & Gupta 2017 (cubic), Frankle & Carbin 2019 and Frankle et al. 2020 (rewinding). A round prunes and then trains; the
training loop is the caller's. A schedule is a tuple with the sparsity of the whole model after each round; the last
entry is the target.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labkit.arguments import check_function, check_mapping, check_several, seeded
from labkit.errors import InputError, check_whole
from labkit.modules.masks import make_permanent, masks
from labkit.modules.weights import named_parts
from labkit.pruning.select import fraction
from labkit.pruning.unstructured import prune, with_masks

SEED_STEP = 1_000_003  # between the seeds of rounds, so that no round of a seed is a round of another seed


def linear(target: float, rounds: int) -> tuple[float, ...]:
    """s_t = target * t / n: the same number of weights in every round t of n."""
    target = _checked(target, rounds)
    earlier = [target * t / rounds for t in range(1, rounds)]
    return (*earlier, target)


def cubic(target: float, rounds: int) -> tuple[float, ...]:
    """s_t = target * (1 - (1 - t / n)^3): many weights early, few late. Zhu & Gupta 2017, To prune, or not to prune."""
    target = _checked(target, rounds)
    earlier = [target * (1 - (1 - t / rounds) ** 3) for t in range(1, rounds)]
    return (*earlier, target)


def exponential(target: float, rounds: int) -> tuple[float, ...]:
    """1 - s_t = (1 - target)^(t / n): the same fraction of the remaining weights in every round, Frankle & Carbin 2019.

    Raises InputError for a target of 1, which no such schedule reaches.
    """
    target = _checked(target, rounds)
    if target == 1:
        raise InputError("A constant fraction of what remains never reaches sparsity 1: take linear or cubic, or less.")
    earlier = [1 - (1 - target) ** (t / rounds) for t in range(1, rounds)]
    return (*earlier, target)


Schedule = Callable[[float, int], tuple[float, ...]]
SCHEDULES: dict[str, Schedule] = {"linear": linear, "cubic": cubic, "exponential": exponential}


def _checked(target: float, rounds: int) -> float:
    check_whole(rounds, "rounds")
    return fraction(target, "target")


def iterative(
    model: nn.Module,
    schedule: Sequence[float],
    fine_tune: Callable[[nn.Module, int], object],
    *,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Prune a copy of `model` in rounds: `unstructured.prune` to schedule[0], train, prune to schedule[1], and so on.

    schedule: sparsities that do not fall, such as cubic(0.9, 5). With scope "global" every sparsity is reached to
        within a weight, because each round prunes the masked model to a total.
    fine_tune: fine_tune(model, round) trains the model in place, with an optimizer of its own. torch's generators are
        seeded from (seed, round) for the call, and are as before afterwards. Masks hold through `load_state_dict`: to
        search for a lottery ticket, load the initial state and then train.
    seed, options: arguments of `unstructured.prune` (criterion, scope, batches, loss_fn, ignore); batches are read
        once a round.
    """
    check_several(schedule, "schedule")
    check_function(fine_tune, "fine_tune")
    seed = seeded(seed).initial_seed()
    schedule = tuple(fraction(step, "a step of the schedule") for step in schedule)
    falls = any(later < earlier for earlier, later in itertools.pairwise(schedule))
    if not schedule or falls:
        raise InputError(
            f"The schedule is {schedule}, but it needs at least one sparsity and none below the one before."
        )
    options["ignore"] = named_parts(model, options.get("ignore", ()), "ignore")
    for number, sparsity in enumerate(schedule):
        model = prune(model, sparsity, seed=seed, **options)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed * SEED_STEP + number)
            fine_tune(model, number)
    return model


def rewind(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a pruned `model` with the same masks and all values from `state`: a ticket to train again.

    state: a state_dict of the dense model. Taken at initialisation, the result is the winning ticket of Frankle &
        Carbin 2019, The Lottery Ticket Hypothesis; taken early in training, the rewinding of Frankle et al. 2020,
        Linear Mode Connectivity and the Lottery Ticket Hypothesis; taken from a newly initialised model, the random
        re-initialisation that is the control in both papers.

    Raises InputError for a model without masks, and for a state of another architecture.
    """
    _masks(model)
    check_mapping(state, "state", "name: tensor")
    for name, x in state.items():
        if not isinstance(x, Tensor):
            raise InputError(f"state[{name!r}] is a {type(x).__name__}, but it must be a tensor: give a state_dict.")
    expected, shapes = _shapes(model.state_dict()), _shapes(state)
    wrong = [name for name in expected | shapes if expected.get(name) != shapes.get(name)]
    if wrong:
        raise InputError(
            f"The state differs from the model at {', '.join(wrong[:5])}: give a state_dict of the same architecture."
        )
    ticket = copy.deepcopy(model)
    ticket.load_state_dict(state)  # the masks hold
    return ticket


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in state.items()}


def random_ticket(model: nn.Module, state: Mapping[str, Tensor], *, seed: int = 0) -> nn.Module:
    """`rewind` with the mask of every weight shuffled: the same number of weights in each layer, at random places."""
    generator = seeded(seed)
    shuffled = {}
    for name, mask in _masks(model).items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        shuffled[name] = mask.flatten()[order].view(mask.shape)
    dense = make_permanent(model)
    return rewind(with_masks(dense, shuffled), state)


def _masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks of a model; raise InputError for a model without masks."""
    masks_of_model = masks(model)
    if not masks_of_model:
        raise InputError(
            "The model holds no masks, so it is no ticket: prune it first; for one that was loaded with its zeros, "
            "prune(model, sparsity(model)) does."
        )
    return masks_of_model
