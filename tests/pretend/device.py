"""Install the pretend device: from then on torch has one CUDA device, cuda:0, which computes on the CPU.

`library` makes the tensors and the operators. This module answers what `torch.cuda` asks the driver.
"""

import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Self

import torch
import torch._dynamo

from pretend import kernels, library

NAME = "Pretend GPU"
MEMORY = 4 * 2**30
PROPERTIES = SimpleNamespace(
    name=NAME, uuid="00000000-0000-0000-0000-000000000000", major=9, minor=0, total_memory=MEMORY, L2_cache_size=2**20,
    multi_processor_count=132, warp_size=32, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    is_integrated=False, is_multi_gpu_board=False, gcnArchName="",
)  # fmt: skip


def install() -> int:
    """Install the device in this process, for good, and return how many kernels were replaced.

    library.Unavailable, in one sentence, where the device cannot be had; nothing is changed then.
    """
    replaced = library.load()
    for name, value in (_queries() | _memory() | _random_numbers() | _streams()).items():
        setattr(torch.cuda, name, value)
        if hasattr(torch.cuda.random, name):
            setattr(torch.cuda.random, name, value)
    torch.cuda._initialized = True
    torch.cuda.default_generators = (torch.ops.pretend.default_generator(),)
    torch.UntypedStorage.clone = _clone_of_storage(torch.UntypedStorage.clone)
    kernels.register()
    _leave_out_kernels_of_the_gpu_alone()
    return replaced


def calls_in_float64() -> int:
    """Return how many operators had a float64 tensor of the device so far; 0 on a card, which does not count them."""
    return torch.ops.pretend.calls_in_float64() if torch.cuda.get_device_name() == NAME else 0


def _queries() -> dict[str, Any]:
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "device": nullcontext,
        "_device": nullcontext,
        "can_device_access_peer": lambda device, peer: False,
        "get_device_name": lambda device=None: NAME,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "is_bf16_supported": lambda including_emulation=True: True,
    }


def _memory() -> dict[str, Any]:
    def bytes_in_use(device: Any = None) -> int:
        return torch.ops.pretend.bytes_in_use()

    def peak_bytes(device: Any = None) -> int:
        return torch.ops.pretend.peak_bytes()

    return {
        "memory_allocated": bytes_in_use,
        "memory_reserved": bytes_in_use,
        "max_memory_allocated": peak_bytes,
        "max_memory_reserved": peak_bytes,
        "reset_peak_memory_stats": lambda device=None: torch.ops.pretend.reset_peak_bytes(),
        "mem_get_info": lambda device=None: (MEMORY - bytes_in_use(), MEMORY),
        "memory_summary": lambda device=None, abbreviated=False: "",
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
    }


def _random_numbers() -> dict[str, Any]:
    default = torch.ops.pretend.default_generator()

    def manual_seed(seed: int) -> None:
        default.manual_seed(seed)

    def set_rng_state(state: torch.Tensor, device: Any = "cuda") -> None:
        default.set_state(state)

    return {
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed,
        "seed": default.seed,
        "seed_all": default.seed,
        "initial_seed": default.initial_seed,
        "get_rng_state": lambda device="cuda": default.get_state(),
        "set_rng_state": set_rng_state,
        "get_rng_state_all": lambda: [default.get_state()],
        "set_rng_state_all": lambda states: set_rng_state(states[0]),
    }


class Event:
    """A moment on the CPU's clock.

    A card's events would have times for work that the CPU did between them. Here a time is refused if the device was
    given nothing: whoever takes it has chosen the wrong clock.
    """

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> None:
        self.timing = enable_timing
        self.seconds: float | None = None
        self.calls = 0  # of operators on the device until then

    def record(self, stream: Any = None) -> None:
        self.calls = torch.ops.pretend.calls()
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: Self) -> float:
        if not (self.timing and end.timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.seconds is None or end.seconds is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if self.calls == end.calls:
            raise RuntimeError("Between these events the device was given nothing, so that their time is not its own.")
        return 1e3 * (end.seconds - self.seconds)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """All work is done when it is given."""

    def wait(self, stream: Any = None) -> None:
        """All work is done when it is given."""


class Stream:
    """The one stream, under another name: work is done when it is given."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = torch.device("cuda", 0)
        self.cuda_stream = 0

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """All work is done when it is given."""

    def wait_event(self, event: Event) -> None:
        """All work is done when it is given."""

    def wait_stream(self, stream: Any) -> None:
        """All work is done when it is given."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """There is no other stream to return to."""


class CUDAGraph:
    """What is captured runs once, at the capture; a replay gives the device one operator, and changes nothing."""

    def replay(self) -> None:
        torch.zeros(1, device="cuda")

    def reset(self) -> None:
        """Nothing was recorded."""


@contextmanager
def _graph(cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"):
    yield


def _streams() -> dict[str, Any]:
    return {
        "synchronize": lambda device=None: None,
        "Event": Event,
        "Stream": Stream,
        "current_stream": Stream,
        "default_stream": Stream,
        "set_stream": lambda stream: None,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": CUDAGraph,
        "graph": _graph,
        "is_current_stream_capturing": lambda: False,
    }


def _clone_of_storage(clone_by_torch: Any) -> Any:
    """Let copy.deepcopy of a CUDA tensor ask the pretend device for memory: torch's own way asks CUDA's allocator."""

    def clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            return clone_by_torch(storage)
        numbers = torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage)
        return numbers.clone().untyped_storage()

    return clone


def _leave_out_kernels_of_the_gpu_alone() -> None:
    """Let torch choose operators that the CPU has kernels for: no cuDNN, and attention of products and a softmax."""
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(True)
