"""How fast to prune: schedules of sparsity over rounds, iterative pruning that follows one, lottery-ticket rewinding.

Zhu & Gupta 2017 (cubic), Frankle & Carbin 2019 and Frankle et al. 2020 (rewinding). A round is prune, then train; the
training loop is the caller's. A schedule names the sparsity of the whole model, never a share of what remains.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit.errors import DataError, InputError
from labkit.files import replacing
from labkit.pruning.select import fraction
from labkit.pruning.unstructured import make_permanent, masks, prune, sparsity, with_masks

# --- schedules: the sparsity after each of n rounds, the last one the target ------------------------------------------


def one_shot(target: float, rounds: int = 1) -> tuple[float, ...]:
    """s_t = target: all in the first round; further rounds only train, so that it trains as much as the others."""
    return (_checked(target, rounds),) * rounds


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


SCHEDULES: dict[str, Callable[[float, int], tuple[float, ...]]] = {
    "one_shot": one_shot,
    "linear": linear,
    "cubic": cubic,
    "exponential": exponential,
}


def _checked(target: float, rounds: int) -> float:
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InputError(
            f"rounds is {rounds!r}, but it must be a whole number from 1: give how often to prune and train."
        )
    return fraction(target, "target")


# --- following one ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One round: the sparsity that the schedule asked for, the one reached, and what `fine_tune` returned after it."""

    asked: float
    reached: float
    metric: float | None


@dataclass(frozen=True)
class Iterated:
    """The pruned model, masks held, and its rounds in order."""

    model: nn.Module
    history: tuple[Round, ...]


def iterative(
    model: nn.Module,
    schedule: Sequence[float],
    fine_tune: Callable[[nn.Module, int], float | None],
    *,
    criterion: str = "magnitude",
    scope: str = "global",
    batches: Iterable | None = None,
    loss_fn=None,
    exclude: str | Iterable[str] = (),
    seed: int = 0,
    rewind_to: Mapping[str, Tensor] | None = None,
    folder: str | Path | None = None,
) -> Iterated:
    """Prunes a copy of `model` to schedule[0], trains it, prunes on to schedule[1], and so on: `unstructured.prune`.

    schedule: sparsities that do not fall, such as cubic(0.9, 5). With scope "global" every one is reached to within a
        weight, since each round prunes the masked model to the asked total.
    fine_tune(model, round): trains the model in place and returns a number to keep, or None. It makes its own
        optimizer; torch's generators are seeded from (seed, round) for it and are as before afterwards.
    rewind_to: a state_dict of the dense model (at initialisation, or early in training); the kept weights return to it
        before each fine_tune, which makes this the search for a lottery ticket. None keeps the trained weights.
    folder: where each round's end is kept, so that the same call goes on after an interruption, to the same result.
    """
    schedule = checked_schedule(schedule)
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    identity = {
        "schedule": list(schedule),
        "criterion": criterion,
        "scope": scope,
        "exclude": exclude,
        "seed": seed,
        "model": digest(model.state_dict()),
        "rewind_to": None if rewind_to is None else digest(rewind_to),
    }
    path = None if folder is None else Path(folder) / "rounds.pt"
    current, history = (model, ()) if path is None else _resume(model, path, identity)
    for number in range(len(history), len(schedule)):
        current = prune(
            current,
            schedule[number],
            criterion=criterion,
            scope=scope,
            batches=batches,
            loss_fn=loss_fn,
            exclude=exclude,
            seed=seed,
        )
        if rewind_to is not None:
            current = rewind(current, rewind_to)
        metric = tuned_(current, fine_tune, number, seed)
        history = (*history, Round(schedule[number], sparsity(current, exclude=exclude), metric))
        if path is not None:
            _save(current, history, path, identity)
    return Iterated(current, history)


def checked_schedule(schedule: Sequence[float]) -> tuple[float, ...]:
    """The schedule as a tuple of fractions that do not fall; anything else is an InputError."""
    schedule = tuple(fraction(step, "a step of the schedule") for step in schedule)
    if not schedule or any(later < earlier for earlier, later in itertools.pairwise(schedule)):
        raise InputError(
            f"The schedule is {schedule}, but it needs at least one sparsity and none below the one before."
        )
    return schedule


def tuned_(
    model: nn.Module, fine_tune: Callable[[nn.Module, int], float | None], number: int, seed: int
) -> float | None:
    """What fine_tune(model, number) returns; torch's generators are seeded for it, and as before afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed * 1_000_003 + number)  # no round of one seed is a round of another
        metric = fine_tune(model, number)
    return None if metric is None else float(metric)


def digest(state: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and values: equal for equal states."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _save(model: nn.Module, history: tuple[Round, ...], path: Path, identity: dict) -> None:
    rounds = [asdict(entry) for entry in history]
    state = {"identity": identity, "rounds": rounds, "model": model.state_dict(), "masks": masks(model)}
    with replacing(path) as partial:
        torch.save(state, partial)


def _resume(model: nn.Module, path: Path, identity: dict) -> tuple[nn.Module, tuple[Round, ...]]:
    """The model and the rounds that `path` holds, or `model` and none if there is no such file."""
    if not path.exists():
        return model, ()
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        other = [name for name, value in identity.items() if saved["identity"][name] != value]
        rounds = tuple(Round(**entry) for entry in saved["rounds"])
    except Exception as error:
        raise DataError(f"{path} cannot be read as a saved run: delete it to start over ({error}).") from error
    if other:
        raise InputError(
            f"{path} is of a run with another {', '.join(other)}: give the same arguments to go on with it, or another "
            "folder."
        )
    plain = make_permanent(model)
    plain.load_state_dict(saved["model"])
    return with_masks(plain, saved["masks"]), rounds


# --- lottery tickets --------------------------------------------------------------------------------------------------


def rewind(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` with its masks and everything else from `state`: the ticket, ready to be trained again.

    state: a state_dict of the dense model. Taken at initialisation it gives the winning ticket of Frankle & Carbin
    2019, The Lottery Ticket Hypothesis; taken early in training, the rewinding of Frankle et al. 2020, Linear Mode
    Connectivity and the Lottery Ticket Hypothesis; that of a newly initialised model, the random re-initialisation
    which is the control of both.
    """
    return _ticket(model, state, _held(model))


def random_ticket(model: nn.Module, state: Mapping[str, Tensor], *, seed: int = 0) -> nn.Module:
    """`rewind` with the mask of every weight shuffled: as many weights a layer, but not the ones that pruning chose."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = {}
    for name, mask in _held(model).items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        shuffled[name] = mask.flatten()[order].view(mask.shape)
    return _ticket(model, state, shuffled)


def _held(model: nn.Module) -> dict[str, Tensor]:
    if not (held := masks(model)):
        raise InputError(
            "The model holds no masks, so it is no ticket: prune it first; for one that was loaded with its zeros, "
            "prune(model, sparsity(model)) does."
        )
    return held


def _ticket(model: nn.Module, state: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> nn.Module:
    plain = make_permanent(model)
    own = plain.state_dict()
    if wrong := [name for name in {**own, **state} if _shape(own, name) != _shape(state, name)]:
        raise InputError(
            f"The state differs from the model at {', '.join(wrong[:5])}: give a state_dict of the same architecture."
        )
    plain.load_state_dict(state)
    return with_masks(plain, held)


def _shape(state: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return state[name].shape if name in state else None
