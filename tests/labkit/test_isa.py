"""Each rung of the ladder is a process with the cap that it says, and integers are the same on all of them."""

import pytest
import torch
from refusals import check_refusal

from labkit.deploy import isa
from labkit.errors import LabError

x86 = pytest.mark.skipif(not isa.rungs()["AVX2"], reason="needs an x86 CPU with AVX2")
WITHOUT_VNNI = ("AVX2", "AVX512_CORE")


def products(factors: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> list:
    import os

    import torch

    integers = {bits: torch._int_mm(a, b) for bits, (a, b) in factors.items()}
    return [os.environ["ONEDNN_MAX_CPU_ISA"], torch.get_num_threads(), integers]


def numbers(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two matrices of the integers of these bits, as int8."""
    draw, end = torch.Generator().manual_seed(0), 2 ** (bits - 1)
    a, b = (torch.randint(-end, end, size, generator=draw) for size in ((32, 64), (64, 16)))
    return a.to(torch.int8), b.to(torch.int8)


@x86
@pytest.mark.slow
def test_each_rung_gives_the_same_integers_of_7_bits_and_those_with_vnni_of_8():
    """Without VNNI pairs of products are added in 16 bits, which those of 8 bits overflow (oneDNN, int8 inference)."""
    factors = {bits: numbers(bits) for bits in (7, 8)}
    exact = {bits: a.long() @ b.long() for bits, (a, b) in factors.items()}
    results = isa.ladder(products, factors)
    assert list(results) == [name for name, has in isa.rungs().items() if has]
    for rung, (cap, threads, integers) in results.items():
        assert (cap, threads) == (rung, torch.get_num_threads())
        assert torch.equal(integers[7].long(), exact[7])
        assert torch.equal(integers[8].long(), exact[8]) or rung in WITHOUT_VNNI


def test_a_rung_needs_those_below_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(isa, "fingerprint", lambda device: type("Cpu", (), {"features": ("avx2", "vnni")}))
    assert isa.rungs() == dict.fromkeys(isa.RUNGS, False) | {"AVX2": True}
    monkeypatch.setattr(isa, "fingerprint", lambda device: type("Cpu", (), {"features": ("neon",)}))
    check_refusal("no AVX2", lambda: isa.ladder(products, {}))


@x86
def test_only_the_named_rungs_are_climbed():
    factors = {7: numbers(7)}
    results = isa.ladder(products, factors, names=["AVX2"])
    assert {rung: cap for rung, (cap, *_) in results.items()} == {"AVX2": "AVX2"}
    check_refusal("There is no rung 'SSE4'", lambda: isa.ladder(products, factors, names=["SSE4"]))


@x86
def test_what_fails_in_a_rung_is_told():
    def fails():
        raise RuntimeError("no such kernel")

    def closes_over():
        return fails

    with pytest.raises(
        LabError, match="AVX2 ended with code 1: RuntimeError: no such kernel"
    ):  # ends as the child does
        isa.ladder(fails)
    check_refusal("closes over (fails): give it as arguments", lambda: isa.ladder(closes_over))
    check_refusal("cannot be sent", lambda: isa.ladder(torch.relu))
