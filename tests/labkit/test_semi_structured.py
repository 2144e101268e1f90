"""2:4 on torch's kernels: what they take is said before, and where they run they give the dense result."""

import pytest
import torch
import torch.nn.functional as F
from refusals import check_refusal
from torch import nn

from labkit.pruning import nm
from labkit.pruning.semi_structured import BACKENDS, available, convert, plan, refusal, shapes


def two_four(out, width, dtype=torch.float32):
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(0))
    return (weight * nm.mask(weight)).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_every_multiple_is_taken_and_nothing_between(backend, dtype):
    rows, columns = shapes(backend)[dtype]
    assert refusal(two_four(rows, 2 * columns), dtype=dtype, backend=backend) == ""
    for out, width in ((rows // 2, columns), (rows, columns // 2), (rows, columns + 4)):
        said = refusal(two_four(out, width), dtype=dtype, backend=backend)
        assert f"{out} x {width}, but for {dtype} {backend} takes multiples of {rows} x {columns}" in said


def test_the_shapes_of_the_installed_torch():
    """fp16 32 x 64, int8 16 x 128, as torch 2.9 to 2.13 have them; a change of torch's should be noticed here."""
    assert shapes("cutlass")[torch.float16] == (32, 64) and shapes("cutlass")[torch.int8] == (16, 128)
    assert shapes("cusparselt")[torch.float16] == (16, 16) and shapes("cusparselt")[torch.int8] == (32, 32)


@pytest.mark.parametrize(
    "weight, arguments, said",
    [
        (torch.zeros(64, 64, 3, 3), {}, "has 4 dimensions"),
        (torch.zeros(64, 64), {}, "no 2:4 weights of torch.float32: convert to"),
        (torch.ones(64, 64), {"dtype": torch.float16}, "more than two nonzeros in a group of four"),
        (torch.zeros(0, 64), {"dtype": torch.float16}, "0 x 64"),
    ],
)
def test_a_refusal_says_why(weight, arguments, said):
    assert said in refusal(weight, **arguments, backend="cusparselt")


def test_the_plan_of_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10), nn.Conv2d(64, 64, 1))
    assert all(row.refusal for row in plan(model))
    pruned = nm.prune(model)
    rows = plan(pruned)
    assert [row.name for row in rows] == ["0.weight", "2.weight"]
    assert rows[0].refusal == "" and "10 x 64" in rows[1].refusal


def test_nothing_is_simulated_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "no CUDA device" in available()
    check_refusal("no CUDA device", lambda: convert(two_four(64, 64, torch.float16)))


def test_an_unknown_backend():
    words = "no backend 'tpu': choose one of cusparselt, cutlass"
    check_refusal(words, lambda: refusal(torch.zeros(64, 64), backend="tpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernels_give_the_dense_result(dtype):
    if reason := available():
        pytest.skip(reason)
    weight, x = two_four(256, 512, dtype).cuda(), torch.randn(128, 512, dtype=dtype, device="cuda")
    expected = F.linear(x.double(), weight.double())
    eps = torch.finfo(dtype).eps
    error = (F.linear(x, convert(weight)).double() - expected).abs().max()
    assert error <= 8 * eps * 512**0.5 * expected.abs().max()


@pytest.mark.gpu
def test_masks_on_the_gpu_are_those_on_the_cpu():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    for n, m in ((2, 4), (4, 8), (1, 16)):
        assert torch.equal(nm.mask(weight.cuda(), n, m).cpu(), nm.mask(weight, n, m))
