"""Sizes are those of real files, by the formulas that the documentation states, and what is packed comes back."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from labkit.artifact import pack, size
from labkit.errors import InputError
from labkit.storage import FORMATS

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
OUT, IN = 64, 128


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The dense tensors that `pack` was given."""
    names = {name.rsplit(":", 2)[0]: [*name.rsplit(":", 2), "dense"][1] for name in packed}
    return {
        name: packed[name]
        if format == "dense"
        else FORMATS[format].unpack(
            {part: packed[f"{name}:{format}:{part}"] for part in FORMATS[format].arrays},
            packed[f"{name}:{format}:shape"].tolist(),
        )
        for name, format in names.items()
    }


def zeroed(w: Tensor, share: float) -> Tensor:
    """With exactly this share of its entries set to zero."""
    gone = torch.randperm(w.numel())[: round(share * w.numel())]
    return w.flatten().index_fill(0, gone, 0).view_as(w)


def two_of_four(w: Tensor) -> Tensor:
    """Each four input channels keep the two that are largest."""
    groups = w.movedim(1, -1).unflatten(-1, (-1, 4))
    kept = torch.zeros_like(groups).scatter(-1, groups.abs().topk(2, dim=-1).indices, 1.0)
    return (groups * kept).flatten(-2).movedim(-1, 1).contiguous()


def payload(state: dict[str, Tensor], format: str) -> int:
    """Bytes of the serialisation without its header (whose length the first eight bytes tell)."""
    data = save(pack(state, format))
    assert size(state, format) == len(data)
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def weight(share: float = 0.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"w": zeroed(torch.rand(OUT, IN) + 1, share).to(dtype)}


N, SHAPE = OUT * IN, 2 * 4


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_bytes_follow_the_formulas(dtype: torch.dtype, share: float) -> None:
    s, n = dtype.itemsize, N - round(share * N)
    state = weight(share, dtype)
    assert payload(state, "dense") == N * s
    assert payload(state, "csr") == n * (s + 4) + 4 * (OUT + 1) + SHAPE
    assert payload(state, "bitmask") == n * s + N // 8 + SHAPE
    assert payload({"w": two_of_four(state["w"])}, "nm") == N * s // 2 + N // 8 + SHAPE


def test_csr_breaks_even_at_half_for_fp32_and_two_thirds_for_fp16() -> None:
    for dtype, even in ((torch.float32, 1 / 2), (torch.float16, 2 / 3)):
        for share, smaller in ((even - 0.02, False), (even + 0.02, True)):
            state = weight(share, dtype)
            assert (payload(state, "csr") < payload(state, "dense")) is smaller


def test_two_to_four_at_fp16_is_56_25_percent_and_bitmask_at_ninety_13_1_percent() -> None:
    half = {"w": two_of_four(torch.randn(OUT, IN).half())}
    assert (payload(half, "nm") - SHAPE) / payload(half, "dense") == 0.5625
    state = weight(0.9)
    assert (payload(state, "bitmask") - SHAPE) / payload(state, "dense") == pytest.approx(0.131, abs=5e-4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", ["dense", "csr", "coo", "bsr4", "bitmask", "nm"])
def test_what_is_packed_comes_back_through_the_file(format: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 10), nn.Linear(10, 5)).to(
        dtype
    )
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.copy_(two_of_four(layer.weight))
    back = unpack(load(save(pack(model, format))))
    want = model.state_dict()
    assert back.keys() == want.keys()
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in want.items())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_weight_survives_every_format(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    kept = torch.rand(shape, generator=generator) < data.draw(st.floats(0, 1))
    w = torch.randn(shape, generator=generator) * kept
    for format in ("csr", "bitmask"):
        assert torch.equal(unpack(pack({"w": w}, format))["w"], w)
    fours = two_of_four(torch.randn(shape[0], 4 * shape[1], *shape[2:], generator=generator))
    assert torch.equal(unpack(pack({"w": fours}, "nm"))["w"], fours)


def test_only_two_to_four_weights_are_stored_so() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(two_of_four(model[0].weight))
    stored = pack(model, "nm")
    assert {name for name in stored if ":" in name} == {f"0.weight:nm:{p}" for p in ("values", "metadata", "shape")}
    assert "1.weight" in stored and "2.weight" in stored


@pytest.mark.parametrize("format", ["dense", "csr"])
def test_a_shared_tensor_is_stored_once(format: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(40, 16)
            self.head = nn.Linear(16, 40, bias=False)
            self.head.weight = self.embedding.weight

    assert payload_of(Tied(), format) == payload_of(nn.Embedding(40, 16), format)


def payload_of(model: nn.Module, format: str) -> int:
    return sum(t.nbytes for t in pack(model, format).values())


def test_tensors_in_one_storage_are_stored_each_once() -> None:
    flat = torch.randn(64)
    assert payload({"a": flat[:32].view(4, 8), "b": flat[32:].view(4, 8)}, "dense") == 4 * 64
    assert payload({"a": torch.randn(4, 8)[:, ::2]}, "dense") == 4 * 16


def test_buffers_count_and_stay_dense() -> None:
    model = nn.BatchNorm2d(6)
    model.register_buffer("table", torch.zeros(8, 8))
    assert payload_of(model, "csr") == payload_of(model, "dense") == 4 * (4 * 6 + 64) + 8


@pytest.mark.parametrize("masked", ["prune", "parametrize"])
@pytest.mark.parametrize("format", ["dense", "csr", "bitmask"])
def test_a_masked_model_is_stored_as_it_computes(masked: str, format: str) -> None:
    class Mask(nn.Module):
        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, w: Tensor) -> Tensor:
            return w * self.mask

    plain = nn.Sequential(nn.Linear(IN, OUT))
    mask = zeroed(torch.ones(OUT, IN), 0.75)
    hidden = copy.deepcopy(plain)
    if masked == "prune":
        prune.custom_from_mask(hidden[0], "weight", mask)
    else:
        parametrize.register_parametrization(hidden[0], "weight", Mask(mask))
    with torch.no_grad():
        plain[0].weight.mul_(mask)
    assert size(hidden, format) == size(plain, format)
    assert torch.equal(unpack(pack(hidden, format))["0.weight"], plain[0].weight)


def test_a_state_dict_with_masks_is_stored_as_it_computes() -> None:
    layer = nn.Linear(IN, OUT)
    prune.l1_unstructured(layer, "weight", 0.9)
    assert size(layer.state_dict(), "csr") == size(layer, "csr")


def test_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(16, 8)), nn.Dropout()).train()
    before = copy.deepcopy(model.state_dict())
    size(model)
    assert model.training and model[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_int8_weights_are_stored_in_a_byte() -> None:
    dense = nn.Sequential(nn.Linear(IN, OUT))
    quantised = torch.ao.quantization.quantize_dynamic(dense, {nn.Linear}, dtype=torch.qint8)
    stored = pack(quantised)
    assert sum(t.nbytes for t in stored.values() if t.dtype is torch.int8) == N
    assert size(quantised) < 0.35 * size(dense)


@pytest.mark.filterwarnings("ignore")
def test_a_sparse_parameter_is_stored_by_its_components() -> None:
    sparse = weight(0.9)["w"].to_sparse_csr()
    stored = pack({"w": sparse})
    assert sum(t.nbytes for t in stored.values()) == sum(
        t.nbytes for t in (sparse.values(), sparse.col_indices(), sparse.crow_indices())
    )


def test_channels_last_and_meta() -> None:
    conv = nn.Conv2d(8, 8, 3)
    assert size(copy.deepcopy(conv).to(memory_format=torch.channels_last), "csr") == size(conv, "csr")
    with pytest.raises(InputError, match="'weight' is on the meta device and has no values to store"):
        size(conv.to("meta"))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: size(nn.Linear(4, 4), "zip"), "no format 'zip': choose from dense, coo, csr"),
        (lambda: size(nn.Linear(4, 4), "nm"), "no weight has two zeros in each four input channels .looked at weight."),
        (lambda: size(nn.BatchNorm1d(4), "nm"), "looked at a model without matrices"),
        (lambda: size(3), "needs a module or a state dict, not a int"),
        (
            lambda: size(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)).state_dict()),
            "needs its parametrization, which a state dict lacks",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        call()
