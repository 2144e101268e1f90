"""Checks of lesson 02: an exact magnitude mask, the arrays of CSR, a fair benchmark.

Each holds the answer against what has to be true of it, or against an independent computation: a count, arrays that are
really packed, the bytes that a call moves.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labkit import storage
from labkit.counting import count
from labkit.lesson.failures import Failures, has_parts, is_mask
from labkit.pruning import sparse, unstructured
from labkit.pruning.select import count_to_prune
from labkit.storage import native


def keep_mask(fn: Callable, failures: Failures) -> None:
    """keep_mask(weight, sparsity) -> bool tensor, True where kept."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(6, 10, generator=generator)
    for case, weight in {
        "random": random,
        "many ties": (random * 2).round(),
        "all equal": torch.full((3, 5), -0.5),
        "a transposed view": random.t(),
        "bfloat16": random.bfloat16(),
        "float16, with squares that round to 0": random.half() * 1e-4,
        "float64, with differences that float32 rounds away": 1 + 1e-12 * random.double(),
        "a parameter": nn.Parameter(random),  # the lesson gives the weights of its layers
        "a convolution": torch.randn(4, 3, 3, 3, generator=generator),
        "nine weights": random[0, :9],  # half of nine is 4.5, which is 5; round(4.5) is 4
    }.items():
        for sparsity in (0.0, 0.29, 0.5, 0.9, 1.0, 1):
            with failures.given(weight=case, sparsity=sparsity):
                _keep_mask(fn, failures, weight, sparsity)


def _keep_mask(fn: Callable, failures: Failures, weight: Tensor, sparsity: float) -> None:
    changed = "your function changed the weight; it should only return a mask"
    mask = failures.call(fn, weight, sparsity, changed=changed)
    if not failures.expect(is_mask(mask, weight), "return a bool tensor of the weight's shape"):
        return
    gone = int((~mask).sum())
    failures.expect(
        gone == count_to_prune(weight.numel(), sparsity),
        "the number of removed weights is not the whole number nearest to the fraction asked for, a half rounded up: "
        "look at ties, at rounding, at 0 and at 1",
        detail=f"expected {count_to_prune(weight.numel(), sparsity)} of {weight.numel()}, got {gone}",
    )
    if 0 < gone < weight.numel():
        failures.expect(
            bool(weight[~mask].abs().max() <= weight[mask].abs().min()),
            "a removed weight is larger in magnitude than one that is kept",
        )


def to_csr(fn: Callable, failures: Failures) -> None:
    """to_csr(weight) -> (values, columns, starts)."""
    generator = torch.Generator().manual_seed(2)
    random = torch.randn(7, 11, generator=generator)
    random[torch.rand(7, 11, generator=generator) < 0.6] = 0
    random[1, 1] = 1e-9  # small, and no zero
    bare = random.clone()
    bare[[0, 3, 6]] = 0
    for case, weight in {
        "random": random,
        "empty rows, the first and the last among them": bare,
        "no zeros": torch.ones(3, 5),
        "only zeros": torch.zeros(4, 2),
        "one row": random[:1],
        "a transposed view": random.t(),
        "bfloat16": random.bfloat16(),
        "bfloat16, with 301 nonzeros in a row": torch.ones(2, 301).bfloat16(),  # more than a byte or bfloat16 counts
    }.items():
        with failures.given(weight=case):
            _to_csr(fn, failures, weight)


def _to_csr(fn: Callable, failures: Failures, weight: Tensor) -> None:
    answer = failures.call(fn, weight, changed="your function changed the weight; it should only read it")
    tensors = has_parts(answer, 3) and all(isinstance(part, Tensor) for part in answer)
    failures.need(tensors, "return three tensors: values, columns, starts")
    values, columns, starts = answer
    packed = storage.FORMATS["csr"].pack(weight)
    types = values.dtype == weight.dtype and columns.dtype == starts.dtype == torch.int32
    failures.expect(types, "values keep the weight's type, columns and starts are torch.int32")
    failures.close(
        starts,
        packed["crow"],
        "the row starts are not where the rows begin: count the nonzeros before each row, from 0, and end with all",
    )
    for name, part, expected in (("values", values, packed["values"]), ("columns", columns, packed["col"])):
        failures.close(
            part,
            expected,
            f"the {name} differ from those of the nonzeros, row by row from left to right",
        )


def fair_sides(fn: Callable, failures: Failures) -> None:
    """fair_sides(layer, x, format) -> (dense call, sparse call)."""
    formats = ["kernel"] * (native.load("sparse_linear") is not None) + ["csr", "coo"]
    for format in formats:
        for masks, bias, batch in (("held by hooks", True, 3), ("permanent", False, 1)):
            with failures.given(format=format, masks=masks, bias=bias, batch=batch):
                _fair_sides(fn, failures, format, masks, bias, batch)


class _LargestArray(TorchDispatchMode):
    """The bytes of the largest array that is made inside; views and sparse tensors are none."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        old = {_address(array) for array in _arrays((args, kwargs))}
        for array in _arrays(made):
            if _address(array) not in old:
                self.nbytes = max(self.nbytes, array.nbytes)
        return made


def _arrays(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


def _address(array: Tensor) -> int:
    return array.untyped_storage().data_ptr()


@torch.no_grad()
def _fair_sides(fn: Callable, failures: Failures, format: str, masks: str, bias: bool, batch: int) -> None:
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(256, 192, bias=bias)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer = unstructured.prune(layer, 0.9)
    layer = layer if masks == "held by hooks" else unstructured.make_permanent(layer)
    x = torch.randn(batch, 256, generator=generator)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    answer = fn(layer, x, format)
    failures.need(has_parts(answer, 2) and all(map(callable, answer)), "return two functions, dense and sparse")
    for name, call in zip(("dense", "sparse"), answer, strict=True):
        output = call()
        same = isinstance(output, Tensor) and output.shape == (batch, 192) and sparse.close(layer(x), output)
        failures.need(
            same, f"the {name} side does not return what the pruned layer does: look at types, masks and the bias"
        )
    x.mul_(-2)
    again = all(sparse.close(layer(x), call()) for call in answer)
    failures.need(again, "after x has changed a side returns the old product: compute it within the call")
    moved = [count(call).bytes for call in answer]
    permanent = unstructured.make_permanent(layer)
    converted = sparse.convert(permanent, format=format, batch_size=batch)
    moved_in_format = count(lambda: converted(x)).bytes
    used = [layer.weight, x, layer(x)]
    if bias:
        used.append(layer.bias)
    needed = sum(tensor.nbytes for tensor in used)
    failures.expect(
        moved[0] <= 1.05 * needed,
        "the dense side moves more than its weight, x and the output: masks or copies are made anew at each call",
    )
    failures.expect(
        moved[0] >= 0.95 * needed,
        "the dense side reads less than a dense weight: the first function is to multiply by the layer held dense",
    )
    failures.expect(
        moved[1] < 0.6 * needed, "the sparse side reads a dense weight at each call: convert it once, outside"
    )
    failures.expect(
        abs(moved[1] / moved_in_format - 1) < 0.02,
        "the sparse side does not read what a layer in the format asked for reads; pass `format` on",
        detail=f"expected {moved_in_format} bytes, got {moved[1]}",
    )
    for name, call in zip(("dense", "sparse"), answer, strict=True):
        with _LargestArray() as largest:
            call()
        failures.expect(
            largest.nbytes < layer.weight.nbytes / 2,
            f"the {name} side makes an array as large as its weight at each call: prepare it once, outside",
        )
    after = layer.state_dict()
    unchanged = all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    failures.expect(unchanged, "your function changed the layer; take a copy")
    if masks == "held by hooks":
        outputs = [call() for call in answer]
        weights = [parameter for parameter in layer.parameters() if parameter.dim() == 2]
        for weight in weights:
            weight.mul_(3)
        same = all(torch.equal(output, call()) for output, call in zip(outputs, answer, strict=True))
        failures.expect(same, "a side prepares its weights at each call; prepare them once, outside")


CHECKS = {"02.1": keep_mask, "02.2": to_csr, "02.3": fair_sides}

TRIES = {
    "02.1": "10 weights, among them ties, views and 16-bit numbers, at 6 sparsities from 0 to 1",
    "02.2": "8 matrices, among them empty rows, views and 16-bit numbers",
    "02.3": "2 pruned layers in each format that works here, and looks at the bytes that a call moves",
}
