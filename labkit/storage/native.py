"""labkit's own C++ (csrc/): compiled on first use into the user's cache, its arrays packed, its functions called.

Without a compiler a warning says so once, and slower code gives the same results. CPU only, for inference only; how the
two kernels work and why they are fast is said in csrc/sparse_linear.cpp and csrc/nm_mask.cpp.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path

import torch
from torch import Tensor

from labkit import files
from labkit.errors import InputError

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-Wno-psabi", "-Wno-unknown-pragmas")
THREADS = (("-fopenmp",), ())  # the second where the compiler has no OpenMP: one thread
ISAS = ("generic", "avx2", "avx512")  # the instruction sets that the sources distinguish, by their number there
_INT, _INDEX, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
ARGUMENTS = {
    "sparse_linear": [_INT] * 3 + [_INDEX] * 4 + [_POINTER, _INDEX] + [_POINTER] * 7,
    "nm_mask": [_INT] * 5 + [_INDEX, _POINTER, _POINTER],
}
LANES = 16  # rows of a chunk of the sparse layout, as in the C++
VALUES = (torch.float32, torch.bfloat16)  # what its values may be
NM_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN = "The weight holds NaN, which has no rank: look for the step that it comes from."

# --- compiling --------------------------------------------------------------------------------------------------------


@functools.cache
def load(name: str) -> ctypes.CDLL | None:
    """The library of csrc/<name>.cpp, or None where it cannot be compiled: then a warning says why, once."""
    try:
        library = ctypes.CDLL(str(_compiled(SOURCES / f"{name}.cpp")))
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        cure = "install g++ or clang++, or name one in the environment variable CXX"
        if getattr(error, "errno", None):  # the system's: the cache cannot be written
            cure = "name a folder that can be written in LABKIT_CACHE, or fill that one before it is made read-only"
        warnings.warn(
            f"labkit's {name}.cpp could not be compiled ({reason}), so slower code is used: {cure}.", stacklevel=4
        )
        return None
    getattr(library, name).argtypes = ARGUMENTS[name]
    return library


def best_isa(name: str) -> int:
    """The number in ISAS of the best instruction set that the compiled csrc/<name>.cpp can use here."""
    return getattr(load(name), f"{name}_best_isa")()


def isas(name: str) -> tuple[str, ...]:
    """The instruction sets that csrc/<name>.cpp can use here, the best one last; empty without a compiler."""
    return ISAS[: best_isa(name) + 1] if load(name) else ()


def compiler() -> list[str]:
    """The C++ compiler's command: CXX, or the first one on the PATH; FileNotFoundError where there is none."""
    command = shlex.split(os.environ.get("CXX", ""))
    for choice in [command] if command else [["g++"], ["clang++"], ["c++"]]:
        if path := shutil.which(choice[0]):
            return [path, *choice[1:]]
    raise FileNotFoundError(f"there is no {command[0] if command else 'g++, clang++ or c++'} on the PATH")


def _compiled(source: Path) -> Path:
    """The shared library for this source, compiler and machine; compiled unless the cache has it."""
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    key = "\0".join([source.read_text(), version, *command, *FLAGS, platform.system(), platform.machine()])
    target = files.cache_dir() / "kernels" / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    with files.replacing(target) as partial:  # a second process that does the same at once harms nothing
        for threads in THREADS:
            whole = [*command, *FLAGS, *threads, "-o", str(partial), str(source)]
            done = subprocess.run(whole, capture_output=True, text=True, timeout=300)
            if done.returncode == 0:
                return target
        error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise subprocess.SubprocessError(f"{command[0]} failed: {error}")


# --- sparse_linear: the layout, SELL-C-sigma (Kreutzer et al. 2014) in blocks of inputs -------------------------------


def _group(out_features: int) -> int:
    """Outputs of a group, a multiple of 16: many pad less, since rows are sorted in them.

    But a thread takes a whole group, and its sums must stay in the second level cache: 512 x 64 float32 are 128 KiB.
    """
    group = min(512, max(64, out_features // 8))
    return _up(-(-out_features // -(-out_features // group)))


def _block(in_features: int, density: float) -> int:
    """Inputs of a block, a multiple of 16 and all blocks equally long.

    Sums are read and written once a block, so few nonzeros want long blocks; many want room beside x in a cache of 32
    KiB: 128 inputs x 64 columns of float32 fill it.
    """
    longest = 80 if density > 1 / 3 else 112 if density > 1 / 14 else 128
    return _up(-(-in_features // -(-in_features // longest)))


def _geometry(layout: dict[str, Tensor], shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """(block, blocks, group, groups) of a layout; its blocks are counted, since _block depends on the density."""
    group = _group(shape[0])
    groups = -(-shape[0] // group)
    blocks = max(1, len(layout["order"]) // (groups * group))
    return _up(-(-shape[1] // blocks)), blocks, group, groups


def _up(n: int) -> int:
    return -(-n // LANES) * LANES


def pack(weight: Tensor) -> dict[str, Tensor]:
    """The layout of `weight` [out, in]: values keep bfloat16 and are float32 otherwise; zeros are left out.

    values, columns [padded nonzeros]; order [groups * blocks * group]; lengths [groups * blocks * group / 16];
    starts [groups]: where each group's values begin.
    """
    out_features, in_features = weight.shape
    group, block = _group(out_features), _block(in_features, int(weight.count_nonzero()) / max(1, weight.numel()))
    groups, blocks = -(-out_features // group), -(-in_features // block)
    dense = weight.detach().to("cpu", torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32)
    dense = torch.nn.functional.pad(dense, (0, blocks * block - in_features, 0, groups * group - out_features))
    packed = [_pack_group(rows.view(group, blocks, block).transpose(0, 1)) for rows in dense.split(group)]
    values, columns, order, lengths = (torch.cat(parts) for parts in zip(*packed, strict=True))
    sizes = torch.tensor([len(part[0]) for part in packed])
    return {"values": values, "columns": columns, "order": order, "lengths": lengths, "starts": sizes.cumsum(0) - sizes}


def _pack_group(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, columns, order and lengths of one group of rows [blocks, group, block]."""
    nonzero = rows != 0
    counts, order = nonzero.sum(-1).sort(stable=True)  # [blocks, group], ascending: a chunk's last row is its longest
    lengths = counts[:, LANES - 1 :: LANES]  # [blocks, chunks]
    starts = (lengths.flatten().cumsum(0) - lengths.flatten()).view_as(lengths) * LANES
    rank = order.argsort(-1)  # [blocks, group]: where the sort put each row
    first = starts.gather(-1, rank // LANES) + rank % LANES  # [blocks, group]
    position = (first.unsqueeze(-1) + LANES * (nonzero.cumsum(-1) - 1))[nonzero]
    values = torch.zeros(int(lengths.sum()) * LANES, dtype=rows.dtype)
    columns = torch.zeros(len(values), dtype=torch.uint8)
    values[position] = rows[nonzero]
    columns[position] = torch.arange(rows.shape[-1], dtype=torch.uint8).expand(rows.shape)[nonzero]
    return values, columns, order.flatten().to(torch.int16), lengths.flatten().to(torch.uint8)


def unpack(layout: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The dense weight of `shape` (out, in) that was packed."""
    block, blocks, group, groups = _geometry(layout, shape)
    chunks = group // LANES
    values = layout["values"]
    chunk = torch.repeat_interleave(layout["lengths"].long() * LANES)  # of each value: (group, block, chunk) as one
    lane = torch.arange(len(values)) % LANES
    row = chunk // (blocks * chunks) * group + layout["order"].view(-1, LANES)[chunk, lane]
    column = chunk // chunks % blocks * block + layout["columns"]
    dense = values.new_zeros(groups * group, blocks * block)
    dense[row[values != 0], column[values != 0]] = values[values != 0]
    return dense[: shape[0], : shape[1]].contiguous()


def multiply(x: Tensor, layout: dict[str, Tensor], out_features: int, bias: Tensor | None) -> Tensor:
    """x W^T + bias on the CPU: x [batch, in] float32 -> [batch, out] float32, with torch.get_num_threads() threads.

    Inf and NaN in x may reach outputs whose weight for them is zero, as in a dense product they would.
    """
    batch, in_features = x.shape
    block, _, group, _ = _geometry(layout, (out_features, in_features))
    x = x.contiguous()
    y = x.new_empty(batch, out_features)
    load("sparse_linear").sparse_linear(
        best_isa("sparse_linear"), torch.get_num_threads(),
        layout["values"].dtype == torch.bfloat16, in_features, out_features, block, group, x.data_ptr(), batch,
        layout["values"].data_ptr(), layout["columns"].data_ptr(), layout["order"].data_ptr(),
        layout["lengths"].data_ptr(), layout["starts"].data_ptr(),
        None if bias is None else bias.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return y


# --- nm_mask ----------------------------------------------------------------------------------------------------------


def nm_takes(groups: Tensor) -> bool:
    """Whether there is compiled code for the N:M mask of groups [..., m] as they lie in memory."""
    if groups.device.type != "cpu" or groups.dtype not in NM_DTYPES or not groups.is_contiguous():
        return False
    library = load("nm_mask")
    return bool(library and library.nm_mask_takes(best_isa("nm_mask"), groups.element_size(), groups.shape[-1]))


def nm_largest(groups: Tensor, n: int, out: Tensor) -> None:
    """Writes into out [..., m], bool, which n of each group [..., m] are largest; of equal ones the first.

    Only for what `nm_takes` allows, out contiguous. Uses torch.get_num_threads() threads. InputError if there is a NaN.
    """
    size, infinity = groups.element_size(), torch.tensor(torch.inf, dtype=groups.dtype)
    largest = load("nm_mask").nm_mask(
        best_isa("nm_mask"), torch.get_num_threads(), size, n, groups.shape[-1], groups.numel(),
        groups.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    if largest > int(infinity.view(torch.int16 if size == 2 else torch.int32)):
        raise InputError(NAN)
