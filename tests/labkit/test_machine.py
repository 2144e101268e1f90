"""The fingerprint and the measured ceilings: what they hold, what they leave alone, what they refuse."""

import getpass
import json
import platform
import re
import timeit
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from labkit import environment, machine
from labkit.errors import InputError
from labkit.machine import Ceilings, Gpu, bandwidth_sweep, ceilings, datasheet_ceilings, fingerprint, lookup

CPU = torch.device("cpu")
H100 = Gpu("NVIDIA H100 80GB HBM3", 1, 85_520_809_984, 52_428_800, 132, "9.0", "580.159.04", "13.0")


@pytest.fixture(scope="module")
def measured() -> Ceilings:
    return ceilings("cpu", dtypes=["fp32", "bf16"], budget_s=0.5)


def test_fingerprint_says_what_a_result_depends_on():
    here = fingerprint("cpu")
    assert here.device == "cpu"
    assert here.threads == torch.get_num_threads()
    assert here.torch == torch.__version__
    assert 1 <= here.cores <= here.logical_cores
    assert here.memory > 2**30
    assert here.python == platform.python_version()


def test_fingerprint_is_json_and_names_no_host_user_or_folder():
    text = json.dumps(fingerprint("cpu").to_dict())
    private = {platform.node(), getpass.getuser(), str(Path.home()), str(Path.cwd())}
    assert not [name for name in private if len(name) > 3 and name in text]


def test_fingerprint_follows_the_thread_count():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert fingerprint("cpu").threads == 1
    finally:
        torch.set_num_threads(before)


def test_fingerprint_survives_a_precision_set_per_backend():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert fingerprint("cpu").float32_matmul_precision in ("mixed", "high")
    finally:
        matmul.fp32_precision = before


@pytest.mark.skipif(platform.system() != "Linux", reason="reads sysfs")
def test_caches_grow_with_the_level():
    caches = list(fingerprint("cpu").caches.values())
    assert caches == sorted(caches)
    assert fingerprint("cpu").last_level_cache >= max(caches, default=0)


@pytest.mark.parametrize(
    ("model", "cores", "slug"),
    [
        ("AMD EPYC", 2, "amd-epyc-2c"),
        ("AMD EPYC 9R14 96-Core Processor", 96, "amd-epyc-9r14-96c"),
        ("Intel(R) Core(TM) i7-10750H CPU @ 2.60GHz", 6, "intel-core-i7-10750h-6c"),
        ("13th Gen Intel(R) Core(TM) i7-1355U", 10, "intel-core-i7-1355u-10c"),
        ("AMD Ryzen 7 7840U w/ Radeon 780M Graphics", 8, "amd-ryzen-7-7840u-w-radeon-780m-graphics-8c"),
        ("Apple M1 Max", 10, "apple-m1-max-10c"),
    ],
)
def test_cpu_slug_is_the_model_and_its_cores(model: str, cores: int, slug: str):
    here = replace(fingerprint("cpu"), cpu=model, physical_cores=cores, affinity=tuple(range(2 * cores)))
    assert here.slug == slug


def test_gpu_slug_and_label_name_the_gpu():
    here = replace(fingerprint("cpu"), device="cuda", gpu=H100)
    assert here.slug == "nvidia-h100-80gb-hbm3"
    assert here.label == "NVIDIA H100 80GB HBM3, 80 GiB, driver 580.159.04, CUDA 13.0"
    assert lookup(H100.name, H100.memory).name == "H100 SXM"


def test_pinned_process_counts_only_its_own_cores():
    here = replace(fingerprint("cpu"), physical_cores=8, affinity=(3,))
    assert here.cores == 1
    assert "1 core," in here.label


def test_ceilings_give_the_best_of_each(measured: Ceilings):
    assert measured.how == "measured"
    assert set(measured.flops) == {"fp32", "bf16"}
    assert set(measured.bandwidths) == {"copy", "triad", "read"}
    assert measured.bandwidth == max(measured.bandwidths.values())
    assert measured.flops["fp32"] > 1e8
    assert measured.bandwidth > 1e8
    assert measured.ridge("fp32") == measured.flops["fp32"] / measured.bandwidth


def test_ceilings_read_back_from_json(measured: Ceilings):
    back = Ceilings(**json.loads(json.dumps(measured.to_dict())))
    assert back.flops == measured.flops
    assert back.ridge("bf16") == measured.ridge("bf16")


def test_ceilings_leave_the_process_as_it_was():
    torch.manual_seed(7)
    torch.set_float32_matmul_precision("high")
    try:
        before = (torch.get_rng_state(), torch.get_num_threads())
        ceilings("cpu", dtypes=["fp32"], budget_s=0.5)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert torch.get_num_threads() == before[1]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", [name for name, (_, on_cpu) in machine.PRODUCTS.items() if on_cpu])
def test_product_is_a_linear_layer_of_random_numbers(name: str):
    call = machine._product(name, 64, CPU)
    result = call()
    held = {cell: value.cell_contents for cell, value in zip(call.__code__.co_freevars, call.__closure__, strict=True)}
    expected = held["x"].double() @ held["weight"].double().t()
    torch.testing.assert_close(held["out"].double(), expected, rtol=0.02, atol=0.2)
    assert held["x"].unique().numel() > 32
    assert result is None or result.shape == (64, 64)


def test_stream_arrays_are_four_times_the_last_cache():
    here = replace(fingerprint("cpu"), last_level_cache=17 * 2**20, memory=2**36)
    calls, moved = machine._streams(here, CPU)
    size = 4 * 17 * 2**20
    assert moved == {("copy", size): 2 * size, ("triad", size): 3 * size, ("read", size): size}
    assert calls.keys() == moved.keys()


def test_stream_arrays_fit_a_small_memory():
    here = replace(fingerprint("cpu"), last_level_cache=2**30, memory=2**30)
    assert {size for _, size in machine._streams(here, CPU)[1]} == {2**26}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sweep_reads_its_working_set_over_and_over_in_one_call(threads: int):
    size = 48 * 2**10
    call, moved = machine._read_over_and_over(torch.ones(2**16), size, threads)
    assert call().sum() * 4 == moved  # every element read is a one
    assert 2**27 < moved <= 2**28
    assert call().shape == (threads,)


def test_sweep_gives_a_bandwidth_for_every_size():
    sizes = [2**22, 2**16, 2**18]
    swept = bandwidth_sweep("cpu", sizes=sizes, budget_s=0.1)
    assert [size for size, _ in swept] == sorted(sizes)
    assert all(bandwidth > 1e8 for _, bandwidth in swept)


@pytest.mark.timing
def test_sweep_finds_the_first_cache_faster_than_the_memory():
    before = environment.snapshot(CPU)
    swept = dict(bandwidth_sweep("cpu", sizes=[2**15, 2**28], budget_s=2.0))
    if (environment.foreign_cores(before, environment.snapshot(CPU)) or 0.0) > 0.15:
        pytest.skip("other programs kept the cores busy, and threads waited for each other: nothing to be seen")
    assert swept[2**15] > 1.5 * swept[2**28]


@pytest.mark.timing
def test_no_plain_call_beats_the_roofs():
    """In turns: memory shared with other machines of a host may become twice as fast from one second to the next."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    source, out = torch.ones(2**25), torch.empty(2**25)
    products, copies, found = [], [], []
    for _ in range(6):
        found.append(ceilings("cpu", dtypes=["fp32"], budget_s=0.5))
        products += timeit.repeat(lambda: torch.mm(a, b), number=1, repeat=5)
        copies += timeit.repeat(lambda: out.copy_(source), number=1, repeat=5)
    busy = [warning for one in found for warning in one.warnings if "other programs" in warning]
    if busy:
        pytest.skip(f"no roof to test against: {busy[0]}")
    assert 2 * 512**3 / min(products) < 1.3 * max(one.flops["fp32"] for one in found)
    assert 2 * source.nbytes / min(copies) < 1.3 * max(one.bandwidth for one in found)


def test_neighbours_and_spread_are_warned_of():
    before = environment.Snapshot(wall_s=0.0, own_s=0.0, busy_s=0.0)
    alone = environment.Snapshot(wall_s=2.0, own_s=4.0, busy_s=4.1)
    crowded = environment.Snapshot(wall_s=2.0, own_s=2.0, busy_s=4.0)
    assert machine._doubts(CPU, before, alone) == []
    assert "1.0 cores busy" in machine._doubts(CPU, before, crowded)[0]
    assert machine._spread([[1.0, 1.1, 1.2]]) == []
    assert "2.0 times" in machine._spread([[1.0, 1.1, 1.2], [1.0, 2.0, 3.0]])[0]


def test_datasheet_ceilings_are_the_dense_peaks():
    h100 = datasheet_ceilings("H100 SXM")
    assert h100.how == "datasheet"
    assert h100.ridge("bf16") == pytest.approx(295.3, abs=0.1)
    assert datasheet_ceilings("NVIDIA H100 80GB HBM3") == h100


ERRORS = {
    "unknown datasheet": (lambda: datasheet_ceilings("H1000"), "'H1000' is not in the catalogue .* choose one of V100"),
    "ceiling not measured": (
        lambda: datasheet_ceilings("T4").ridge("fp8"),
        "no 'fp8' ceiling for T4: choose one of fp32",
    ),
    "unknown dtype": (lambda: ceilings("cpu", dtypes=["int3"]), r"some of fp32, .* got \['int3'\]"),
    "dtype of a GPU": (lambda: ceilings("cpu", dtypes=["tf32"]), r"some of fp32, .* got \['tf32'\]"),
    "no dtype": (lambda: ceilings("cpu", dtypes=[]), r"some of fp32, .* got \[\]"),
    "no budget": (lambda: ceilings("cpu", budget_s=0), "budget_s has to be .* got 0"),
    "unknown device": (lambda: fingerprint("tpu"), "'cpu' or 'cuda', got 'tpu'"),
    "device of no name": (lambda: bandwidth_sweep(3.5), "'cpu' or 'cuda', got 3.5"),
    "device not there": (lambda: ceilings("cuda:63"), "sees no device 'cuda:63'"),
    "size too small": (lambda: bandwidth_sweep("cpu", sizes=[64]), r"bytes between .* got \[64\]"),
    "size too large": (lambda: bandwidth_sweep("cpu", sizes=[2**50]), "bytes between"),
    "no size": (lambda: bandwidth_sweep("cpu", sizes=[]), r"bytes between .* got \[\]"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_refused_in_one_sentence(case: str):
    call, sentence = ERRORS[case]
    with pytest.raises(InputError, match=sentence) as caught:
        call()
    assert re.search(r"[.]$", str(caught.value))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_ceilings_stay_under_the_datasheet():
    here = fingerprint("cuda")
    found = ceilings("cuda", budget_s=5.0)
    assert found.device == here.gpu.name
    known = lookup(here.gpu.name, here.gpu.memory)
    if known is None:
        pytest.skip(f"{here.gpu.name} is not in the catalogue")
    assert 0.3 * known.bandwidth < found.bandwidth < 1.02 * known.bandwidth
    for dtype in set(found.flops) & set(known.flops):
        assert 0.2 * known.flops[dtype] < found.flops[dtype] < 1.05 * known.flops[dtype], dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_sweep_shows_the_l2_above_the_memory():
    l2 = fingerprint("cuda").gpu.l2
    swept = dict(bandwidth_sweep("cuda", sizes=[l2 // 2, 16 * l2], budget_s=2.0))
    assert swept[l2 // 2] > swept[16 * l2]
