"""One rule for data and models on two devices: what a call is given goes to the model's device, and stays the caller's.

Without a second device that computes, `meta` stands for the other one: to bring its tensors to a model on the CPU is
refused by torch in words of its own, which no call that leaves them where they are can raise.
"""

import copy
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from llamas import VOCABULARY, llama, text
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from labkit import batches as batching
from labkit import counting, distillation, training
from labkit.data.resnet import ResNet8
from labkit.deploy import engines, export, parity
from labkit.errors import InputError
from labkit.modules import losses
from labkit.pruning import blockwise, channels, depth, heads, nm, permutation, transformers, unstructured
from labkit.pruning import coupling as groups
from labkit.quantization import affine, fold, ptq, qat, rounding, weight_only
from labkit.quantization.mixed_precision import sensitivity

CANNOT_BE_BROUGHT = "holds a tensor on meta|Cannot copy out of meta tensor"

Batch = tuple[Tensor, Tensor]
Call = Callable[[nn.Module, Any], Any]


def images() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 1, 28, 28, generator=generator), torch.arange(8) % 10


def tokens() -> dict[str, Tensor]:
    ids = torch.cat([text(9, seed) for seed in range(4)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def prompt(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in batch.items() if name != "labels"}


def convolution(channels_in: int = 1) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels_in, 4, 3).eval()


def rounded(layer: nn.Module, batch: Batch) -> Tensor:
    grid = affine.quantize(layer.weight.detach(), axis=0).grid
    outputs = torch.zeros(8, 4, 26, 26, device=batch[0].device)
    return rounding.adaround(layer, grid, batch[0], outputs, steps=2)


def distilled(model: nn.Module, batch: Batch) -> Tensor:
    loss_fn = distillation.distilling(copy.deepcopy(model).eval(), alpha=0.5, temperature=2.0)
    return loss_fn(model, batch)


def written(model: nn.Module, batch: Batch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        export.write_onnx(model, {"x": batch[0]}, Path(folder) / "model.onnx")


def noise_by_layer(model: nn.Module, batch: Batch) -> list[dict]:
    return sensitivity(ptq.quantize(model, [images()]), [batch])


IMAGES: dict[str, Call] = {
    "batches.split": batching.split,
    "batches.inputs": batching.inputs,
    "losses.batch_loss": losses.batch_loss,
    "losses.batch_loss, the caller's loss": lambda m, b: losses.batch_loss(m, b[0], lambda y, x: y.sum() + x.sum()),
    "losses.summed_loss": losses.summed_loss,
    "unstructured.prune, taylor": lambda m, b: unstructured.prune(m, 0.5, criterion="taylor", batches=[b]),
    "unstructured.prune, wanda": lambda m, b: unstructured.prune(m, 0.5, criterion="wanda", batches=[b]),
    "blockwise.prune": lambda m, b: blockwise.prune(m, 0.5, method="wanda", batches=[b]),
    "blockwise.prune, sparsegpt": lambda m, b: blockwise.prune(m, 0.5, method="sparsegpt", batches=[b]),
    "coupling.trace": lambda m, b: groups.trace(m, b[:1]),
    "channels.prune": lambda m, b: channels.prune(m, b[0], ratio=0.5),
    "channels.prune, taylor": lambda m, b: channels.prune(m, images()[0], ratio=0.5, criterion="taylor", batches=[b]),
    "channels.prune, the proof's input": lambda m, b: channels.prune(m, images()[0], ratio=0.5, check=b[0][:2]),
    "permutation.permute": lambda m, b: permutation.permute(m, b[0]),
    "ptq.quantize": lambda m, b: ptq.quantize(m, [b]),
    "mixed_precision.sensitivity": noise_by_layer,
    "qat.prepare": lambda m, b: qat.prepare(m, [b]),
    "fold.fold_batch_norm": lambda m, b: fold.fold_batch_norm(m, b[0]),
    "fold.equalize": lambda m, b: fold.equalize(m, b[0]),
    "training.train_": lambda m, b: training.train_(m, [b], epochs=1, max_lr=0.01),
    "training.accuracy": lambda m, b: training.accuracy(m, [b]),
    "training.reestimate_norms_": lambda m, b: training.reestimate_norms_(m, [b]),
    "distillation.distilling": distilled,
    "counting.count": lambda m, b: counting.count(m, b[0]),
    "engines.prepare": lambda m, b: engines.prepare("torch", m, b[0]),
    "export.program": lambda m, b: export.program(m, {"x": b[0]}),
    "export.write_onnx": written,
    "parity.Reference": lambda m, b: parity.Reference(m, [{"x": b[0]}]),
}
TOKENS: dict[str, Call] = {
    "nm.prune": lambda m, b: nm.prune(m, method="wanda", batches=[b]),
    "heads.head_importance, taylor": lambda m, b: heads.head_importance(m, [b], "taylor"),
    "heads.head_importance, entropy": lambda m, b: heads.head_importance(m, [b], "entropy"),
    "heads.head_importance, confidence": lambda m, b: heads.head_importance(m, [b], "confidence"),
    "heads.head_importance, ablation": lambda m, b: heads.head_importance(m, [b], "ablation"),
    "transformers.prune_heads": lambda m, b: transformers.prune_heads(m, {0: [0, 1]}, kwargs=prompt(b)),
    "transformers.prune_ffn": lambda m, b: transformers.prune_ffn(m, 0.5, criterion="wanda", batches=[b]),
    "transformers.prune_ffn, its example": lambda m, b: transformers.prune_ffn(m, 0.5, kwargs=prompt(b)),
    "depth.layer_importance": lambda m, b: depth.layer_importance(m, [b]),
    "depth.layer_importance, loss": lambda m, b: depth.layer_importance(m, [b], "loss"),
    "depth.prune_layers": lambda m, b: depth.prune_layers(m, [1], kwargs=prompt(b)),
    "weight_only.quantize, gptq": lambda m, b: weight_only.quantize(m, 4, group_size=32, method="gptq", batches=[b]),
    "weight_only.quantize, awq": lambda m, b: weight_only.quantize(m, 4, group_size=32, method="awq", batches=[b]),
    "fold.smooth": lambda m, b: fold.smooth(m, [prompt(b)]),
    "distillation.heal_": lambda m, b: distillation.heal_(m, [b], teacher=copy.deepcopy(m), max_lr=0.01, steps=1),
}
LAYERS: dict[str, Call] = {"rounding.adaround": rounded}
MODELS = {
    "images": (ResNet8, images, IMAGES),
    "tokens": (llama, tokens, TOKENS),
    "layers": (convolution, images, LAYERS),
}
CASES = [
    pytest.param(make, data, call, id=name) for make, data, calls in MODELS.values() for name, call in calls.items()
]

each_call = pytest.mark.parametrize(("make", "data", "call"), CASES)


def moved(value: Any, device: str) -> Any:
    return tree_map_only(Tensor, lambda x: x.to(device), value)


@each_call
def test_a_call_brings_its_data_to_the_model_s_device(make: Callable[[], nn.Module], data: Callable, call: Call):
    with pytest.raises((InputError, NotImplementedError), match=CANNOT_BE_BROUGHT):
        call(make().eval(), moved(data(), "meta"))


@pytest.mark.gpu
@each_call
def test_a_model_on_a_gpu_takes_the_cpu_s_data(make: Callable[[], nn.Module], data: Callable, call: Call):
    given = data()
    call(make().eval().cuda(), given)
    tensors = given.values() if isinstance(given, dict) else given
    assert {x.device.type for x in tensors} == {"cpu"}  # the caller's stay where they were


def test_what_is_in_place_already_is_not_copied():
    x, ids = torch.ones(2, 3), torch.arange(2)
    model = nn.Linear(3, 2)
    batch = (x, {"ids": ids, "flag": True}, [None, "text"])
    same = batching.placed(model, batch)
    assert same[0] is x and same[1]["ids"] is ids and same[1:] == ({"ids": ids, "flag": True}, [None, "text"])


def test_a_model_without_tensors_and_a_model_on_meta_leave_data_where_it_is():
    x = torch.ones(2, 3)
    assert batching.device_of(nn.ReLU()) is None and batching.placed(nn.ReLU(), x) is x
    assert batching.placed(nn.Linear(3, 2, device="meta"), x) is x


def test_a_model_of_integers_has_the_device_of_its_buffers():
    model = nn.Module()
    model.register_buffer("codes", torch.zeros(2, dtype=torch.int8, device="meta"))
    assert batching.device_of(model) == torch.device("meta")


class Named(NamedTuple):
    first: Tensor
    second: Tensor


def test_a_model_on_several_devices_moves_its_inputs_by_itself():
    x = torch.ones(2, 3)
    assert batching.placed(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, device="meta")), x) is x


@pytest.mark.parametrize("make", [tuple, list, lambda x: OrderedDict(enumerate(x)), lambda x: Named(*x)])
def test_a_batch_keeps_its_class_and_a_tensor_that_stands_twice_is_brought_once(make: Callable):
    x = torch.ones(2, 3)
    batch = make([x, x])
    moved = batching._on(torch.device("meta"), batch)
    first, second = moved.values() if isinstance(moved, dict) else moved
    assert type(moved) is type(batch) and first is second and first.device.type == "meta" and x.device.type == "cpu"


def test_a_tokenizer_s_batch_keeps_its_attributes():
    from transformers import BatchEncoding

    ids = torch.zeros(1, 4, dtype=torch.long)
    batch = batching.placed(nn.Embedding(VOCABULARY, 2), BatchEncoding({"input_ids": ids}))
    assert batch.input_ids is ids


def test_a_tokenizer_s_batch_is_brought_too():
    from transformers import BatchEncoding

    batch = BatchEncoding({"input_ids": torch.zeros(1, 4, dtype=torch.long, device="meta")})
    with pytest.raises(InputError, match=CANNOT_BE_BROUGHT):
        batching.placed(nn.Embedding(VOCABULARY, 2), batch)
