"""Choose the layers of a simulated model that become integers: those that are faster so, by the clock of this machine.

Three steps. `integer_seconds` times each layer in integers and in floats, in its place in a call of the model.
`cheapest` chooses the layers so that their seconds and those of the changes between codes and floats are least. At last
the model so chosen is compared with the model all in integers and the models all in floats, and the fastest is
returned: seconds of layers decide about layers, never about the whole.
"""

import contextlib
import copy
from collections.abc import Mapping, MutableMapping
from functools import partial
from typing import Any

import networkx
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from labkit.errors import InputError
from labkit.modules.batches import evaluating
from labkit.modules.replacing import replace_
from labkit.quantization import calls
from labkit.quantization.integer_graph import CodePlan, lower_
from labkit.quantization.integer_seconds import LayerSeconds, Seconds, layer_seconds
from labkit.quantization.ptq_graph import compute_constants, remove_identities
from labkit.quantization.simulated import FakeQuantized, QuantizationPoint, Quantizer
from labkit.timing.bench import compare
from labkit.timing.fingerprint import fingerprint

MARGIN = 1.03  # a layer is left in floats if int8 takes 3 % longer: the timing of a layer scatters by as much
PAIR_S = 2.0  # seconds for a comparison of two whole models
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def convert(model: nn.Module, named: Mapping[str, Any]) -> nn.Module:
    """Return the fastest model for a call, of integers, of floats or of both, with its `report` as `integer_report`.

    model: a simulated model whose layers all have integer kernels.
    named: the arguments of the call, by name.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, FakeQuantized)]
    with torch.no_grad(), evaluating(model):
        calls.run(model, **named)
        if isinstance(model, fx.GraphModule):
            model = copy.deepcopy(model)
            compute_constants(model)
        in_floats = {dtype: partly_float(model, dict.fromkeys(layers, dtype)) for dtype in float_types()}
        seconds = layer_seconds(model, in_floats, layers, named)
        choices = _choices(layers, seconds)
        wholes = _whole_models(model, choices, in_floats["float32"], named)
        whole_s = _seconds_of_whole_models(wholes, named)
    best = min(whole_s, key=whole_s.get)
    result = wholes[best]
    result.integer_report = report(seconds, choices, whole_s, best)
    return result


def _choices(layers: list[str], seconds: LayerSeconds) -> dict[str, str]:
    """Return {layer: "int8", or the type in which the layer stays}; a layer that was not called becomes integers."""
    integers = cheapest(seconds)
    choices = dict.fromkeys(layers, "int8")
    for name in layers:
        if name in seconds.integer and name not in integers:
            choices[name] = seconds.fastest_float(name)
    return choices


def cheapest(seconds: LayerSeconds) -> set[str]:
    """Choose the layers that become integers so that the sum of all seconds is least: a minimum cut, which is exact.

    A layer on the side of the integers pays its seconds in integers, on the other side `MARGIN` times its least seconds
    in floats. Two layers that hand on codes pay a conversion if the cut runs between them (Greig, Porteous and Seheult
    1989, Exact Maximum A Posteriori Estimation for Binary Images). A step to codes is paid once, and is held on the
    side of the integers by any of its readers there.
    """
    network = networkx.DiGraph()
    for layer, integer_s in seconds.integer.items():
        float_s = seconds.floats[seconds.fastest_float(layer)][layer]
        network.add_edge(layer, "floats", capacity=_nanoseconds(integer_s))
        network.add_edge("integers", layer, capacity=_nanoseconds(MARGIN * float_s))
    for (giver, reader), conversion_s in seconds.conversions.items():
        network.add_edge(giver, reader, capacity=_nanoseconds(conversion_s))
        network.add_edge(reader, giver, capacity=_nanoseconds(conversion_s))
    for number, step in enumerate(seconds.quantizes):
        network.add_edge(number, "floats", capacity=_nanoseconds(step.seconds))
        for reader in step.readers:
            network.add_edge(reader, number)  # without a capacity: never cut
    _, (integers, _) = networkx.minimum_cut(network, "integers", "floats")
    return integers & seconds.integer.keys()


def _nanoseconds(seconds: float) -> int:
    """Return whole nanoseconds: the flow behind a cut adds and subtracts, and floats would leave remainders."""
    return round(1e9 * seconds)


# --- models in which layers compute in floats -------------------------------------------------------------------------


def float_types() -> list[str]:
    """Return the types for layers that stay floats: bfloat16 only if the CPU multiplies it natively."""
    native = "bf16" in fingerprint("cpu").features
    return list(FLOATS) if native else ["float32"]


def partly_float(model: nn.Module, choices: Mapping[str, str]) -> nn.Module:
    """Return a copy of a simulated model in which some layers compute in floats.

    choices: {layer: "int8", or a key of FLOATS for a layer that computes in that type and rounds to no grid}.

    Points whose sum no kernel does any more are taken out: they would only round a value.
    """
    model = copy.deepcopy(model)
    for name, choice in choices.items():
        if choice != "int8":
            fake = model.get_submodule(name)
            model = replace_(model, name, _float_layer(fake, FLOATS[choice]))
    if isinstance(model, fx.GraphModule):
        _remove_points_without_a_kernel_(model)
    return model


def _float_layer(fake: FakeQuantized, dtype: torch.dtype) -> nn.Module:
    """Return a simulated layer without rounding to a grid; it takes and gives float32.

    The weight is the float model's if `ptq` made the simulated layer. If `qat` trained the layer, the rounded weight is
    what was trained, and stays.
    """
    layer = copy.deepcopy(fake.layer).requires_grad_(False)
    is_trained = type(fake.weight_quantizer) is not Quantizer
    if is_trained:
        layer.weight.copy_(fake.fake_weight())
    return layer if dtype is torch.float32 else _in_bfloat16_(layer)


def _remove_points_without_a_kernel_(model: fx.GraphModule) -> None:
    plan = CodePlan(model)
    terms = set()
    for addition in plan.layer_of_sum:
        terms.update(addition.all_input_nodes)
    for node in model.graph.nodes:
        if isinstance(plan.module(node), QuantizationPoint) and node not in terms:
            model.set_submodule(node.target, nn.Identity())
    remove_identities(model)


def _in_bfloat16_(module: nn.Module) -> nn.Module:
    """Let a module compute in bfloat16: floats among its arguments are rounded, bfloat16 results become float32."""
    module.bfloat16()
    if isinstance(module, fx.GraphModule):  # whose copies lose their hooks
        _change_types_in_graph_(module)
    else:
        module.register_forward_pre_hook(_round_arguments, with_kwargs=True)
        module.register_forward_hook(_give_float32)
    return module


def _change_types_in_graph_(module: fx.GraphModule) -> None:
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        users = list(node.users)
        with graph.inserting_after(placeholders[-1]):
            rounded = graph.call_function(_rounded, (node,))
        for user in users:
            user.replace_input_with(node, rounded)
    output = graph.output_node()
    with graph.inserting_before(output):
        output.args = (graph.call_function(_in_float32, output.args),)
    module.recompile()


def _round_arguments(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    rounded = [_rounded(x) for x in args]
    return tuple(rounded), {name: _rounded(x) for name, x in kwargs.items()}


def _rounded(x: Any) -> Any:
    return x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x


def _give_float32(_: nn.Module, args: tuple, results: Any) -> Any:
    if isinstance(results, MutableMapping):  # of transformers; a map over its tree would take 2 % of a small model
        for name, value in results.items():
            results[name] = _in_float32(value)
        return results
    return _in_float32(results)


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype is torch.bfloat16 else value
    return tree_map_only(Tensor, _in_float32, value)


# --- whole models -----------------------------------------------------------------------------------------------------


def _whole_models(
    model: nn.Module,
    choices: Mapping[str, str],
    in_float32: nn.Module,
    named: Mapping[str, Any],
) -> dict[str, nn.Module]:
    """Return the models to compare: all "int8", "mixed" as chosen layer by layer, and all in each type of floats.

    A model that does not run in bfloat16 is left out.
    """
    wholes = {"int8": lower_(copy.deepcopy(model)), "float32": in_float32}
    if set(choices.values()) not in ({"int8"}, {"float32"}):
        wholes["mixed"] = lower_(partly_float(model, choices))
    if "bfloat16" in float_types():
        in_bfloat16 = _in_bfloat16_(copy.deepcopy(in_float32))
        with contextlib.suppress(InputError):
            calls.run(in_bfloat16, **named)
            wholes["bfloat16"] = in_bfloat16
    return wholes


def _seconds_of_whole_models(wholes: Mapping[str, nn.Module], named: Mapping[str, Any]) -> Seconds:
    """Return the seconds of a call of each model; each is compared with the fastest before, in turns."""
    best, *challengers = wholes
    seconds: Seconds = {}
    for name in challengers:
        calls_in_turns = [partial(wholes[each], **named) for each in (best, name)]
        comparison = compare(*calls_in_turns, names=(best, name), device="cpu", budget_s=PAIR_S)
        seconds.setdefault(best, comparison.baseline.median_s)
        seconds[name] = seconds[best] / comparison.speedup
        if seconds[name] < seconds[best]:
            best = name
    return seconds


# --- the report -------------------------------------------------------------------------------------------------------


def report(
    seconds: LayerSeconds,
    choices: Mapping[str, str],
    whole_s: Seconds,
    best: str,
) -> list[dict[str, Any]]:
    """Describe a choice in rows, the first for the model as a whole (named ""), then a row for each layer.

    choices: {layer: choice by the seconds of layers}.
    whole_s: seconds of the whole models.
    best: name of the fastest whole model.

    Rows: "layer"; "int8_s", "float32_s", "bfloat16_s" and "mixed_s", seconds in a call, None if nothing was timed;
    "choice", a type or "mixed"; "reason".
    """
    rows = [_row("", whole_s, best, "the whole model is fastest so")]
    for name, choice in choices.items():
        by_type = seconds.of_layer(name)
        if best not in ("mixed", choice):
            rows.append(_row(name, by_type, best, f"the whole model is fastest in {best}"))
        else:
            rows.append(_row(name, by_type, choice, _reason(by_type, choice)))
    return rows


def _row(
    name: str,
    seconds: Seconds,
    choice: str,
    reason: str,
) -> dict[str, Any]:
    columns = {f"{kind}_s": seconds.get(kind) for kind in ("int8", *FLOATS, "mixed")}
    if choice == "bfloat16":
        reason += "; its numbers are rounded to 8 significant bits"
    return {"layer": name, **columns, "choice": choice, "reason": reason}


def _reason(by_type: Seconds, choice: str) -> str:
    """Return the reason for a layer's choice, from its seconds by type."""
    if not by_type:
        return "the example does not call it"
    in_floats = {dtype: seconds for dtype, seconds in by_type.items() if dtype != "int8"}
    dtype = min(in_floats, key=in_floats.get)
    ratio = by_type["int8"] / in_floats[dtype]
    comparison = f"int8 takes {ratio:.2f} of the time of {dtype}"
    int8_is_faster = ratio <= MARGIN
    if (choice == "int8") == int8_is_faster:
        return comparison
    if choice == "int8":
        return f"{comparison}, but leaving the codes of its neighbours would take longer"
    return f"{comparison}, but its neighbours are in floats, and the changes to codes and back would take longer"
