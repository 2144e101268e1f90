"""SmolLM2's decode step at batch 1 with weights in fp32, bf16, int8 and int4, beside the bytes that it has to read.

    python benchmarks/llm_decode.py                     caches of 64 and 512 tokens, one thread
    python benchmarks/llm_decode.py --peers             and the linears alone in ONNX Runtime and OpenVINO

Timed are the whole step on top of a cache, call after call, and the step's 211 linears alone, each on its input in the
step, with the CPU's caches emptied before. The bound is the least bytes over the bandwidth that the machine reaches on
as many threads; a step's weights may lie in a large last cache, and the bound ignores the cache. If a block's weights,
read from the cache again and again, take as long as all blocks' from memory, unpacking is the limit and not memory.
Ratios are over fp32 in eager torch, far from the bandwidth: read the share of the roof beside the ratios.

int8: a scale a row; int4: groups of 64 with zero points, the head in int8 or in int4 too; both on torch's kernels, with
activations in bfloat16 (A16). "int4, A8": labkit's kernel, the head in int4 too, with activations quantized to 8 bits
in groups of 64, and all else in fp32. Peers, the head in int4: MatMulNBits of ONNX Runtime with accuracy_level 4 and
OpenVINO's compressed weights quantize the activations to 8 bits as well (A8); accuracy_level 1 and a dynamic group of 0
do not (A32). Whole steps are transformers' in eager torch or, with "Decoder", those of `labkit.attention.decoder`, in
fewer operators and 121 products in place of 211.
"""

import argparse
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from attention import step as decoder_step
from torch import Tensor, nn

from labkit import bench, machine, models, roofline
from labkit.attention.decoder import Decoder
from labkit.bits import to_bits
from labkit.deploy import engines
from labkit.modules import hooks
from labkit.quantization import affine, integer, weight_only
from labkit.storage import int4

Calls = list[tuple[nn.Module, Tensor]]  # the linears of a step, each with its input
Row = dict[str, Any]
GROUP, BLOCKS = 64, 30


def quantized(bits: int, head: int) -> nn.Module:
    """Return SmolLM2, SIMULATED, with the blocks' 210 linears in `bits` and the head in `head`."""
    model = models.smollm2()
    options = {4: {"group_size": GROUP}, 8: {"group_size": None, "symmetric": True}}
    new = weight_only.quantize(model, bits, **options[bits])
    new.lm_head = weight_only.quantize(model.lm_head, head, **options[head])
    return new


def on_torch(bits: int, head: int) -> nn.Module:
    """Return SmolLM2 on torch's integer kernels, all else in bfloat16."""
    return integer.convert(quantized(bits, head)).bfloat16()


def on_labkit() -> nn.Module:
    """Return SmolLM2 on labkit's int4 kernel, all else in float32."""
    return int4.convert(quantized(4, 4))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "fp32": models.smollm2,
    "bf16": partial(models.smollm2, torch.bfloat16),
    "int8": partial(on_torch, 8, 8),
    "int4": partial(on_torch, 4, 8),
    "int4, head too": partial(on_torch, 4, 4),
    "int4, A8": on_labkit,
}
IN_DECODER = ("fp32", "int4, A8")
LINEARS = nn.Linear | integer.PackedLinear | int4.Int4Linear


def linears(model: nn.Module, prompt: Tensor) -> Calls:
    """Return the linears of a decode step after `prompt` [1, T], in order, each with its input in the step."""
    names = [name for name, x in model.named_modules() if isinstance(x, LINEARS)]
    calls: Calls = []

    def keep(name: str, x: Tensor, _: Tensor) -> None:
        calls.append((model.get_submodule(name), x.clone()))

    step = roofline.decode_step(model, prompt)
    with torch.inference_mode(), hooks.watching(model, names, keep):
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
    """Make a graph of MatMulNBits, on the codes of `weight_only.rtn`."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants, outputs = [], [], []
    size = 0
    for i, (layer, _) in enumerate(calls):
        rows, columns = layer.weight.shape
        weights = packed(layer.weight.detach())
        size += sum(x.nbytes for x in weights.values())
        for name, x in weights.items():
            constants.append(numpy_helper.from_array(x.numpy(), f"{name}{i}"))
        node = helper.make_node(
            "MatMulNBits",
            [f"x{columns}", *(f"{name}{i}" for name in weights)],
            [f"y{i}"],
            domain="com.microsoft",
            bits=4,
            block_size=GROUP,
            K=columns,
            N=rows,
            accuracy_level=accuracy_level,
        )
        nodes.append(node)
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [1, rows]))
    arrays = inputs_by_width(calls)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in arrays.items()]
    graph = helper.make_graph(nodes, "linears", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = engines.session(model.SerializeToString())
    return partial(session.run, None, arrays), size


def packed(weight: Tensor) -> dict[str, Tensor]:
    """Round a weight [out, in] to 4 bits, in the layout of MatMulNBits: codes, scales and zero points."""
    rows, columns = weight.shape
    rounded = weight_only.rtn(weight, 4, group_size=GROUP)
    codes = to_bits(rounded.codes, 4).view(rows, columns // GROUP, GROUP // 2)
    zero = rounded.zero.view(rows, -1).to(torch.uint8)
    zero = F.pad(zero, (0, zero.shape[1] % 2))
    return {"codes": codes, "scale": rounded.scale.float().flatten(), "zero": to_bits(zero, 4)}


def openvino_linears(calls: Calls, dynamic_group: int | None) -> Peer:
    """Make a graph in fp32 (None), or in int4 by NNCF with activations quantized in groups (0: not quantized)."""
    import openvino
    from openvino import opset13 as ops

    arrays = inputs_by_width(calls)
    inputs = {name: ops.parameter(list(x.shape), name=name) for name, x in arrays.items()}
    weights = [layer.weight.detach() for layer, _ in calls]
    results = []
    for weight in weights:
        x = inputs[f"x{weight.shape[1]}"]
        product = ops.matmul(x, ops.constant(weight.numpy()), False, True)
        results.append(ops.result(product))
    model = openvino.Model(results, list(inputs.values()), "linears")
    size = sum(weight.nbytes for weight in weights)
    settings = {}
    if dynamic_group is not None:
        os.environ["CI"] = "true"  # else it reports its use over the network
        import nncf

        mode = nncf.CompressWeightsMode.INT4_ASYM
        model = nncf.compress_weights(model, mode=mode, group_size=GROUP, ratio=1.0, all_layers=True)
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = dynamic_group
        size = 0
        for weight in weights:
            groups = weight.numel() // GROUP
            size += weight.numel() // 2 + groups * 5 // 2  # a group: scale of 2 bytes, zero point of half a byte
    request = engines.request(model, **settings)

    def run() -> list[np.ndarray]:
        return list(request.infer(arrays, share_inputs=True).values())

    return run, size


def inputs_by_width(calls: Calls) -> dict[str, np.ndarray]:
    """Return for each width of the linears' inputs an input [1, width], named "x" and the width."""
    arrays = {}
    for _, x in calls:
        width = x.shape[-1]
        arrays[f"x{width}"] = x.float().reshape(1, width).numpy()
    return arrays


PEERS: dict[str, tuple[str, Callable[[Calls], Peer]]] = {
    "ORT int4, A8": ("onnxruntime", partial(onnxruntime_linears, accuracy_level=4)),
    "ORT int4, A32": ("onnxruntime", partial(onnxruntime_linears, accuracy_level=1)),
    "OpenVINO fp32": ("openvino", partial(openvino_linears, dynamic_group=None)),
    "OpenVINO int4, A8": ("nncf", partial(openvino_linears, dynamic_group=32)),
    "OpenVINO int4, A32": ("nncf", partial(openvino_linears, dynamic_group=0)),
}


def decibels(calls: Calls, results: Sequence[Any]) -> float:
    """Compare a peer's results with fp32, each linear on the input of its width."""
    arrays = inputs_by_width(calls)
    exact = []
    for layer, x in calls:
        array = torch.from_numpy(arrays[f"x{x.shape[-1]}"])
        exact.append(F.linear(array, layer.weight).flatten())
    rounded = [torch.as_tensor(y).flatten() for y in results]
    return affine.sqnr(torch.cat(exact), torch.cat(rounded))


# --- the tables -------------------------------------------------------------------------------------------------------


def rows(
    calls: dict[str, Callable[[], Any]], size: dict[str, int], bandwidth: float, budget_s: float, cache: str = "hot"
) -> Iterator[Row]:
    """Compare each call with the first, in pairs. size: least bytes that each call has to read."""
    baseline, *candidates = calls
    for name in candidates:
        names = (baseline, name)
        comparison = bench.compare(calls[baseline], calls[name], names=names, budget_s=budget_s, cache=cache)
        low, high = comparison.ci95
        if name == candidates[0]:
            print_row(baseline, comparison.baseline.median_s, " " * 20, size[baseline], bandwidth)
        ratio = f"{comparison.speedup:5.2f}x [{low:.2f}, {high:.2f}]"
        print_row(name, comparison.candidate.median_s, ratio, size[name], bandwidth)
        yield {"bytes": size[name], "bandwidth": bandwidth, **comparison.to_dict()}


def print_row(name: str, seconds: float, ratio: str, size: int, bandwidth: float) -> None:
    bound = size / bandwidth
    speed = f"{1e3 * seconds:6.2f} ms  {1 / seconds:6.1f} /s"
    roof = f"at least {1e3 * bound:5.2f} ms: {bound / seconds:4.0%} of the roof"
    megabytes = f"{size / 1e6:6.1f} MB"
    print(f"  {name:19} {speed}  {ratio}  {megabytes}, {roof}", flush=True)


def whole_steps(
    decoders: dict[str, nn.Module], prompt: Tensor, tokens: int, bandwidth: float, budget_s: float
) -> list[Row]:
    print(f"A step on a cache of {tokens} tokens:")
    prompt = prompt[:, :tokens]
    steps = {name: roofline.decode_step(model, prompt) for name, model in decoders.items()}
    for name in IN_DECODER:
        steps[f"{name}, Decoder"] = decoder_step(Decoder(decoders[name]), prompt)
    size = {name: roofline.count(step).bytes for name, step in steps.items()}
    return [{"step": tokens, **row} for row in rows(steps, size, bandwidth, budget_s)]


def linears_alone(recorded: dict[str, Calls], peers: bool, bandwidth: float, budget_s: float) -> list[Row]:
    print("Its linears alone:")
    runs = {name: partial(replay, calls) for name, calls in recorded.items()}
    size = {name: roofline.count(run).bytes for name, run in runs.items()}
    for name, (package, build) in PEERS.items() if peers else ():
        if importlib.util.find_spec(package) is None:
            print(f"  {name}: {package} is not installed")
            continue
        runs[name], size[name] = build(recorded["fp32"])
        exactness = decibels(recorded["fp32"], runs[name]())
        print(f"  {name}: {exactness:.1f} dB")
    return [{"linears": True, **row} for row in rows(runs, size, bandwidth, budget_s, cache="cold")]


def first_block(recorded: dict[str, Calls], budget_s: float) -> list[Row]:
    print("The linears of the first block over and over, from the cache, times the number of blocks:")
    records = []
    for name, calls in recorded.items():
        inner = calls[:-1]  # without the head
        block = inner[: len(inner) // BLOCKS]
        cold = bench.measure(partial(replay, inner), budget_s=budget_s / 4, cache="cold")
        hot = bench.measure(partial(replay, block), budget_s=budget_s / 4)
        from_cache_ms = 1e3 * BLOCKS * hot.median_s
        from_memory_ms = 1e3 * cold.median_s
        print(f"  {name:19} {from_cache_ms:6.2f} ms; all, from memory: {from_memory_ms:6.2f} ms")
        records.append({"cached": name, "hot": hot.to_dict(), "cold": cold.to_dict()})
    return records


def wrong_results(decoders: dict[str, nn.Module], recorded: dict[str, Calls], prompt: Tensor) -> int:
    """Count the results of torch's kernels beyond their roundings, and of labkit's with other bits than the reference.

    Torch's results for a prompt are compared with float64, labkit's in the calls of a step with `int4.reference`.
    """
    wrong = 0
    for name, model in decoders.items():
        for layer, x in recorded[name]:
            if isinstance(layer, int4.Int4Linear):
                wrong += int((layer(x) != int4.reference(x, layer.quantized())).sum())
        if any(isinstance(module, integer.PackedLinear) for module in model.modules()):
            wrong += sum(row["wrong"] for row in integer.prove(model, prompt))
    return wrong


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
    computer = machine.fingerprint().label
    print(f"{computer}, {options.threads} threads, {bandwidth / 1e9:.1f} GB/s")
    decoders = {name: build() for name, build in MODELS.items()}
    prompt = torch.randint(1000, 40000, (1, max(options.tokens)))
    recorded = {name: linears(model, prompt) for name, model in decoders.items()}
    wrong = wrong_results(decoders, recorded, prompt[:, :8])
    print(f"{wrong} results of the integer kernels are wrong")

    records = []
    for tokens in options.tokens:
        records += whole_steps(decoders, prompt, tokens, bandwidth, options.budget)
    records += linears_alone(recorded, options.peers, bandwidth, options.budget)
    records += first_block(recorded, options.budget)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
