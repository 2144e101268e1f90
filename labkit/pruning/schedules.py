"""How fast to prune: schedules of sparsity over rounds, iterative pruning that follows one, lottery tickets.

Zhu & Gupta 2017 (cubic), Frankle & Carbin 2019 and Frankle et al. 2020 (rewinding). A round is prune, then train; the
training loop is the caller's. A schedule is the sparsity of the whole model after each round, the last one the target.
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


def linear(target: float, rounds: int) -> tuple[float, ...]:
    """s_t = target * t / n: the same number of weights in every round."""
    target = _checked(target, rounds)
    return (*(target * t / rounds for t in range(1, rounds)), target)


def cubic(target: float, rounds: int) -> tuple[float, ...]:
    """s_t = target * (1 - (1 - t / n)^3): many weights early, few late. Zhu & Gupta 2017, To prune, or not to prune."""
    target = _checked(target, rounds)
    return (*(target * (1 - (1 - t / rounds) ** 3) for t in range(1, rounds)), target)


def exponential(target: float, rounds: int) -> tuple[float, ...]:
    """1 - s_t = (1 - target)^(t / n): the same fraction of what remains in every round, as Frankle & Carbin 2019."""
    target = _checked(target, rounds)
    if target == 1:
        raise InputError("A constant fraction of what remains never reaches sparsity 1: take linear or cubic, or less.")
    return (*(1 - (1 - target) ** (t / rounds) for t in range(1, rounds)), target)


SCHEDULES: dict[str, Callable[[float, int], tuple[float, ...]]]
SCHEDULES = {"linear": linear, "cubic": cubic, "exponential": exponential}


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
    """Prunes a copy of `model` to schedule[0], trains it, prunes on to schedule[1], and so on: `unstructured.prune`.

    schedule: sparsities that do not fall, such as cubic(0.9, 5). With scope "global" every one is reached to within a
        weight, since each round prunes the masked model to the asked total.
    fine_tune(model, round): trains the model in place, with an optimizer of its own. torch's generators are seeded from
        (seed, round) for it and are as before afterwards. Masks hold through `load_state_dict`, so a search for a
        lottery ticket loads the state of the start before it trains.
    seed, options: of `unstructured.prune` (criterion, scope, batches, loss_fn, ignore); batches are read once a round.
    """
    check_several(schedule, "schedule")
    check_function(fine_tune, "fine_tune")
    seed = seeded(seed).initial_seed()
    schedule = tuple(fraction(step, "a step of the schedule") for step in schedule)
    if not schedule or any(later < earlier for earlier, later in itertools.pairwise(schedule)):
        raise InputError(
            f"The schedule is {schedule}, but it needs at least one sparsity and none below the one before."
        )
    options["ignore"] = named_parts(model, options.get("ignore", ()), "ignore")
    for number, asked in enumerate(schedule):
        model = prune(model, asked, seed=seed, **options)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed * 1_000_003 + number)  # no round of one seed is a round of another
            fine_tune(model, number)
    return model


def rewind(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` with its masks and everything else from `state`: the ticket, ready to be trained again.

    state: a state_dict of the dense model. Taken at initialisation it gives the winning ticket of Frankle & Carbin
        2019, The Lottery Ticket Hypothesis; taken early in training, the rewinding of Frankle et al. 2020, Linear Mode
        Connectivity and the Lottery Ticket Hypothesis; that of a newly initialised model, the random re-initialisation
        which is the control of both.
    """
    _masks(model)
    check_mapping(state, "state", "name: tensor")
    for name, x in state.items():
        if not isinstance(x, Tensor):
            raise InputError(f"state[{name!r}] is a {type(x).__name__}, but it must be a tensor: give a state_dict.")
    expected, shapes = ({name: x.shape for name, x in each.items()} for each in (model.state_dict(), state))
    if wrong := [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]:
        raise InputError(
            f"The state differs from the model at {', '.join(wrong[:5])}: give a state_dict of the same architecture."
        )
    ticket = copy.deepcopy(model)
    ticket.load_state_dict(state)  # the masks hold
    return ticket


def random_ticket(model: nn.Module, state: Mapping[str, Tensor], *, seed: int = 0) -> nn.Module:
    """`rewind` with the mask of every weight shuffled: as many weights a layer, but not the ones that pruning chose."""
    generator = seeded(seed)
    shuffled = {}
    for name, mask in _masks(model).items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        shuffled[name] = mask.flatten()[order].view(mask.shape)
    return rewind(with_masks(make_permanent(model), shuffled), state)


def _masks(model: nn.Module) -> dict[str, Tensor]:
    if not (held := masks(model)):
        raise InputError(
            "The model holds no masks, so it is no ticket: prune it first; for one that was loaded with its zeros, "
            "prune(model, sparsity(model)) does."
        )
    return held
