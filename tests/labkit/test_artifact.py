"""Sizes are those of real files, masked weights are stored as they compute, and what is stored comes back."""

import copy

import pytest
import torch
from refusals import Refusals, check_refusal, refused
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from labkit.pruning import nm
from labkit.quantization import affine, formats
from labkit.storage.artifact import pack, size
from labkit.storage.formats import FORMATS, ROUNDED

OUT, IN = 64, 128


def zeroed(w: Tensor, share: float) -> Tensor:
    """With exactly this share of its entries set to zero."""
    return w.flatten().index_fill(0, torch.randperm(w.numel())[: round(share * w.numel())], 0).view_as(w)


def unpacked(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The dense tensors that `pack` was given."""
    dense = {name: tensor for name, tensor in packed.items() if ":" not in name}
    for name, format in {tuple(name.split(":")[:2]) for name in packed if ":" in name}:
        prefix = f"{name}:{format}:"
        arrays = {key.removeprefix(prefix): part for key, part in packed.items() if key.startswith(prefix)}
        dense[name] = FORMATS[format].unpack(arrays, arrays.pop("shape").tolist())
    return dense


def payload(model, format: str = "dense") -> int:
    """Bytes of the file without its header (whose length the first eight bytes tell)."""
    data = save(pack(model, format))
    assert size(model, format) == len(data)
    return len(data) - 8 - int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ROUNDED])
def test_a_model_comes_back_from_its_file(format: str) -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 10), nn.Linear(10, 5))
    model = model.bfloat16()  # which every format holds as it is
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight *= nm.mask(layer.weight)
    back, state = unpacked(load(save(pack(model, format)))), model.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in state.items())


def test_a_file_holds_the_formats_bytes_and_the_shape() -> None:
    weight = zeroed(torch.randn(OUT, IN), 0.9)
    n, rest = int(weight.count_nonzero()), torch.zeros(7)
    assert payload({"w": weight, "bias": rest}) == 4 * OUT * IN + 28
    assert payload({"w": weight, "bias": rest}, "csr") == 8 * n + 4 * (OUT + 1) + 2 * 4 + 28
    assert payload({"w": weight.view(OUT, 8, 4, 4)}, "bitmask") == 4 * n + OUT * IN // 8 + 4 * 4
    assert payload({"w": (weight * nm.mask(weight)).half()}, "nm") == 0.5625 * 2 * OUT * IN + 2 * 4


def test_only_two_to_four_weights_are_stored_so() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight *= nm.mask(model[0].weight)
    stored = pack(model, "nm")
    assert {name for name in stored if ":" in name} == {f"0.weight:nm:{p}" for p in ("values", "metadata", "shape")}
    assert "1.weight" in stored and "2.weight" in stored


@pytest.mark.parametrize("format", ["dense", "csr"])
def test_a_shared_tensor_is_stored_once(format: str) -> None:
    tied = nn.ModuleDict({"embedding": nn.Embedding(40, 16), "head": nn.Linear(16, 40, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    assert payload(tied, format) == payload(nn.Embedding.from_pretrained(tied["head"].weight, freeze=False), format)


def test_tensors_in_one_storage_are_stored_each_once() -> None:
    flat = torch.randn(64)
    assert payload({"a": flat[:32].view(4, 8), "b": flat[32:].view(4, 8)}) == 4 * 64
    assert payload({"a": flat[:40], "b": flat[20:]}) == 4 * (40 + 44)
    assert payload({"a": torch.randn(4, 8)[:, ::2]}) == 4 * 16


def test_empty_weights_take_no_bytes() -> None:
    assert payload({"w": torch.zeros(3, 0), "v": torch.zeros(4, 4)}, "csr") == 4 * 5 + 8


def test_buffers_count_and_stay_dense() -> None:
    model = nn.BatchNorm2d(6)
    model.register_buffer("table", torch.zeros(8, 8))
    assert payload(model, "csr") == payload(model) == 4 * (4 * 6 + 64) + 8


class Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


@pytest.mark.parametrize("format", ["dense", "csr", "bitmask"])
def test_a_masked_model_is_stored_as_it_computes(format: str) -> None:
    plain, mask = nn.Sequential(nn.Linear(IN, OUT)), zeroed(torch.ones(OUT, IN), 0.75)
    by_torch, by_parametrization = copy.deepcopy(plain), copy.deepcopy(plain)
    prune.custom_from_mask(by_torch[0], "weight", mask)
    parametrize.register_parametrization(by_parametrization[0], "weight", Masked(mask))
    with torch.no_grad():
        plain[0].weight *= mask
    for model in (by_torch, by_torch.state_dict(), by_parametrization):
        assert size(model, format) == size(plain, format)
        assert torch.equal(unpacked(pack(model, format))["0.weight"], plain[0].weight)


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(16, 8)), nn.Dropout()).train()
    before = copy.deepcopy(model.state_dict())
    size(model)
    assert model.training and model[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_quantised_and_sparse_tensors_are_stored_by_what_they_hold() -> None:
    dense = nn.Sequential(nn.Linear(IN, OUT))
    quantised = torch.ao.quantization.quantize_dynamic(dense, {nn.Linear}, dtype=torch.qint8)
    assert sum(t.nbytes for t in pack(quantised).values() if t.dtype is torch.int8) == OUT * IN
    assert size(quantised) < 0.35 * size(dense)
    csr = zeroed(torch.randn(OUT, IN), 0.9).to_sparse_csr()
    assert payload({"w": csr}) == csr.values().nbytes + csr.col_indices().nbytes + csr.crow_indices().nbytes


def test_few_bits_count_codes_scales_and_zeros() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, 9))  # with biases in float32
    weights, biases = OUT * IN + 9 * OUT, 4 * (OUT + 9)
    shapes = 2 * 2 * 4
    assert payload(model, "int8") == weights + 2 * (OUT + 9) + biases + shapes
    groups = weights // 64
    assert payload(model, "int4") == weights // 2 + 2 * groups + -(-groups // 2) + biases + shapes
    assert payload(model, "mxfp4") == weights // 2 + weights // 32 + biases + shapes
    mixed = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(27, 9))  # whose second layer blocks do not fill
    assert "1.weight" in pack(mixed, "q4_1") and "0.weight:q4_1:blocks" in pack(mixed, "q4_1")
    check_refusal(
        "no weight has rows of whole blocks of 32 weights", lambda: size({"1.weight": mixed[1].weight}, "q4_1")
    )


@pytest.mark.parametrize("format", ROUNDED)
def test_a_model_of_few_bits_comes_back_rounded(format: str) -> None:
    model = nn.Sequential(nn.Conv2d(64, 6, 3), nn.Linear(64, 10))
    back = unpacked(load(save(pack(model, format))))
    for name, value in model.state_dict().items():
        assert affine.sqnr(value, back[name]) > 15


def test_quantised_tensors_in_a_state_dict_count_by_their_bits() -> None:
    weight = torch.randn(OUT, IN)
    groups = OUT * IN // 64
    four = affine.quantize(weight, 4, symmetric=False, group_size=64)
    assert payload({"w": four}) == OUT * IN // 2 + 4 * groups + groups // 2
    assert payload({"w": affine.quantize(weight, 3, axis=0)}) == OUT * IN * 3 // 8 + 4 * OUT  # a zero that is 0 is none
    assert payload({"w": affine.quantize(weight, 8, axis=0)}) == OUT * IN + 4 * OUT
    assert payload({"w": formats.quantize(weight, "nvfp4")}) == OUT * IN // 2 + OUT * IN // 16 + 4
    assert payload({"w": formats.quantize(weight, "e4m3")}) == OUT * IN


def test_memory_formats_do_not_matter() -> None:
    conv = nn.Conv2d(8, 8, 3)
    assert size(copy.deepcopy(conv).to(memory_format=torch.channels_last), "csr") == size(conv, "csr")


REFUSALS: Refusals = {
    "no format 'zip': choose one of dense, coo, csr": lambda: size(nn.Linear(4, 4), "zip"),
    "no weight has two zeros in each four input channels (looked at weight)": lambda: size(nn.Linear(4, 4), "nm"),
    "looked at a model without matrices": lambda: size(nn.BatchNorm1d(4), "nm"),
    "needs a module or a state dict, not a int": lambda: size(3),
    "'weight' is on the meta device and has no values to store": lambda: size(nn.Linear(4, 4, device="meta")),
    "needs its parametrization, which a state dict lacks": lambda: size(
        nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)).state_dict()
    ),
}


@refused(REFUSALS)
def test_what_cannot_be_stored_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)
