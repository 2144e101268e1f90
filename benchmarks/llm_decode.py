"""SmolLM2's decode step at batch 1 with weights in fp32, bf16, int8 and int4, beside the bytes that it has to read.

    python benchmarks/llm_decode.py                     caches of 64 and 512 tokens, one thread
    python benchmarks/llm_decode.py --peers             and the linears alone in ONNX Runtime and OpenVINO

Timed are the whole step on top of a cache, call after call, and its 211 linears alone, each on the input that it has in
a step, with the CPU's caches emptied before. The bound is the least bytes over the bandwidth that this machine reaches
on as many threads; a step's weights may lie in a large last cache, of which the bound knows nothing. Where one block's
weights, read from the cache again and again, take as long as all blocks' from memory, unpacking is the limit and not
memory. Ratios are over fp32 in eager torch, which is far from that bandwidth: read the share of the roof beside them.

int8: a scale a row; int4: groups of 64 with zero points, the head in int8 or in int4 too; both on torch's kernels, with
activations in bfloat16 (A16). Peers, the head in int4: MatMulNBits of ONNX Runtime with accuracy_level 4 and OpenVINO's
compressed weights quantize the activations to 8 bits as well (A8); accuracy_level 1 and a dynamic group of 0 do not
(A32).
"""

import argparse
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit import bench, machine, models, roofline
from labkit.bits import to_bits
from labkit.deploy import engines
from labkit.modules import hooks
from labkit.quantization import affine, integer, weight_only

Calls = list[tuple[nn.Module, Tensor]]  # the linears of a step and what they are called with
GROUP, BLOCKS = 64, 30


def quantized(bits: int, head: int) -> nn.Module:
    """SmolLM2 on real kernels, the 210 linears of its blocks in `bits`; all else is in bfloat16, as they want it."""
    model = models.smollm2()
    options = {4: {"group_size": GROUP}, 8: {"group_size": None, "symmetric": True}}
    new = weight_only.quantize(model, bits, **options[bits])
    new.lm_head = weight_only.quantize(model.lm_head, head, **options[head])
    return integer.convert(new).bfloat16()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "fp32": models.smollm2,
    "bf16": lambda: models.smollm2(torch.bfloat16),
    "int8": partial(quantized, 8, 8),
    "int4": partial(quantized, 4, 8),
    "int4, head too": partial(quantized, 4, 4),
}


def linears(model: nn.Module, prompt: Tensor) -> Calls:
    names = [name for name, x in model.named_modules() if isinstance(x, nn.Linear | integer.PackedLinear)]
    calls: Calls = []
    step = roofline.decode_step(model, prompt)
    with (
        torch.inference_mode(),
        hooks.watching(model, names, lambda name, x, _: calls.append((model.get_submodule(name), x.clone()))),
    ):
        step()
    return calls


def replay(calls: Calls) -> Tensor:
    for layer, x in calls:
        y = layer(x)
    return y


# --- peers ------------------------------------------------------------------------------------------------------------
# Each gives (a call of all linears as nodes of one graph, the bytes of its weights).

Peer = tuple[Callable[[], Sequence[Any]], int]


def onnxruntime_linears(calls: Calls, accuracy_level: int) -> Peer:
    """MatMulNBits, on the codes of `weight_only.rtn`."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants, outputs, size = [], [], [], 0
    for i, (layer, _) in enumerate(calls):
        rows, columns = layer.weight.shape
        weight = weight_only.rtn(layer.weight.detach(), 4, group_size=GROUP)
        zero = weight.zero.view(rows, -1).to(torch.uint8)
        zero = F.pad(zero, (0, zero.shape[1] % 2))
        codes = to_bits(weight.codes, 4).view(rows, columns // GROUP, GROUP // 2)
        arrays = {"codes": codes, "scale": weight.scale.float().flatten(), "zero": to_bits(zero, 4)}
        constants += [numpy_helper.from_array(x.numpy(), f"{name}{i}") for name, x in arrays.items()]
        size += sum(x.nbytes for x in arrays.values())
        names, options = [f"x{columns}", *(f"{name}{i}" for name in arrays)], {"bits": 4, "block_size": GROUP}
        options |= {"K": columns, "N": rows, "accuracy_level": accuracy_level}
        nodes.append(helper.make_node("MatMulNBits", names, [f"y{i}"], domain="com.microsoft", **options))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [1, rows]))
    arrays = inputs_by_width(calls)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in arrays.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "linears", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return partial(engines.session(model.SerializeToString()).run, None, arrays), size


def openvino_linears(calls: Calls, dynamic_group: int | None) -> Peer:
    """fp32 (None), or int4 by NNCF with activations quantized in groups (0: not)."""
    import openvino
    from openvino import opset13 as ops

    arrays = inputs_by_width(calls)
    inputs = {name: ops.parameter(list(x.shape), name=name) for name, x in arrays.items()}
    weights = [layer.weight.detach() for layer, _ in calls]
    products = [ops.matmul(inputs[f"x{w.shape[1]}"], ops.constant(w.numpy()), False, True) for w in weights]
    model = openvino.Model([ops.result(x) for x in products], list(inputs.values()), "linears")
    size = sum(w.nbytes for w in weights)
    settings = {}
    if dynamic_group is not None:
        os.environ["CI"] = "true"  # else it reports its use over the network
        import nncf

        mode = nncf.CompressWeightsMode.INT4_ASYM
        model = nncf.compress_weights(model, mode=mode, group_size=GROUP, ratio=1.0, all_layers=True)
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = dynamic_group
        size = sum(w.numel() // 2 + w.numel() // GROUP * 5 // 2 for w in weights)
    request = engines.request(model, **settings)
    return lambda: list(request.infer(arrays, share_inputs=True).values()), size


def inputs_by_width(calls: Calls) -> dict[str, Any]:
    return {f"x{x.shape[-1]}": x.float().reshape(1, -1).numpy() for _, x in calls}


PEERS: dict[str, tuple[str, Callable[[Calls], Peer]]] = {
    "ORT int4, A8": ("onnxruntime", partial(onnxruntime_linears, accuracy_level=4)),
    "ORT int4, A32": ("onnxruntime", partial(onnxruntime_linears, accuracy_level=1)),
    "OpenVINO fp32": ("openvino", partial(openvino_linears, dynamic_group=None)),
    "OpenVINO int4, A8": ("nncf", partial(openvino_linears, dynamic_group=32)),
    "OpenVINO int4, A32": ("nncf", partial(openvino_linears, dynamic_group=0)),
}


def decibels(calls: Calls, results: Sequence[Any]) -> float:
    """Of a peer's results against fp32, each linear on the input of its width."""
    arrays = inputs_by_width(calls)
    exact = [F.linear(torch.from_numpy(arrays[f"x{x.shape[-1]}"]), layer.weight) for layer, x in calls]
    noise = torch.cat([torch.as_tensor(y).flatten() for y in results])
    return affine.sqnr(torch.cat([y.flatten() for y in exact]), noise)


# --- the tables -------------------------------------------------------------------------------------------------------


def rows(
    calls: dict[str, Callable[[], Any]], size: dict[str, int], bandwidth: float, budget_s: float, cache: str = "hot"
) -> Iterator[dict[str, Any]]:
    """Each against the first, in pairs. size: the least bytes that each has to read."""
    baseline, *others = calls
    for name in others:
        names = (baseline, name)
        comparison = bench.compare(calls[baseline], calls[name], names=names, budget_s=budget_s, cache=cache)
        (low, high), sides = comparison.ci95, (comparison.baseline, comparison.candidate)
        for side, (key, measurement) in enumerate(zip(names, sides, strict=True)):
            if side or name == others[0]:
                bound, seconds = size[key] / bandwidth, measurement.median_s
                ratio = f"{comparison.speedup:5.2f}x [{low:.2f}, {high:.2f}]" if side else " " * 20
                print(
                    f"  {key:19} {1e3 * seconds:6.2f} ms  {1 / seconds:6.1f} /s  {ratio}  {size[key] / 1e6:6.1f} MB, "
                    f"at least {1e3 * bound:5.2f} ms: {bound / seconds:4.0%} of the roof",
                    flush=True,
                )
        yield {"bytes": size[name], "bandwidth": bandwidth, **comparison.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512], help="in the cache")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds a comparison")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--json", type=Path, help="file for every sample")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bandwidth = machine.ceilings().bandwidth
    print(f"{machine.fingerprint().label}, {options.threads} threads, {bandwidth / 1e9:.1f} GB/s")
    decoders = {name: build() for name, build in MODELS.items()}
    prompt = torch.randint(1000, 40000, (1, max(options.tokens)))
    recorded = {name: linears(model, prompt) for name, model in decoders.items()}
    proofs = [
        row for name in decoders if name.startswith("int") for row in integer.prove(decoders[name], prompt[:, :8])
    ]
    wrong = sum(row["wrong"] for row in proofs)
    print(f"{wrong} results of the real kernels are further from float64 than their roundings")

    records = []
    for tokens in options.tokens:
        print(f"A step on a cache of {tokens} tokens:")
        steps = {name: roofline.decode_step(model, prompt[:, :tokens]) for name, model in decoders.items()}
        size = {name: roofline.count(step).bytes for name, step in steps.items()}
        records += [{"step": tokens, **row} for row in rows(steps, size, bandwidth, options.budget)]
    print("Its linears alone:")
    runs: dict[str, Callable[[], Any]] = {name: partial(replay, calls) for name, calls in recorded.items()}
    size = {name: roofline.count(run).bytes for name, run in runs.items()}
    for name, (package, build) in PEERS.items() if options.peers else ():
        if importlib.util.find_spec(package) is None:
            print(f"  {name}: {package} is not installed")
            continue
        runs[name], size[name] = build(recorded["fp32"])
        print(f"  {name}: {decibels(recorded['fp32'], runs[name]()):.1f} dB")
    records += [{"linears": True, **row} for row in rows(runs, size, bandwidth, options.budget, cache="cold")]
    print("The linears of the first block over and over, from the cache, times the number of blocks:")
    for name, calls in recorded.items():
        inner = calls[:-1]  # without the head
        block = inner[: len(inner) // BLOCKS]
        cold = bench.measure(partial(replay, inner), budget_s=options.budget / 4, cache="cold")
        hot = bench.measure(partial(replay, block), budget_s=options.budget / 4)
        print(f"  {name:19} {1e3 * BLOCKS * hot.median_s:6.2f} ms; all, from memory: {1e3 * cold.median_s:6.2f} ms")
        records.append({"cached": name, "hot": hot.to_dict(), "cold": cold.to_dict()})
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
