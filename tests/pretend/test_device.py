"""What the pretend device refuses and allows. A card does the same, so that these tests run on one too."""

import copy
import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def x() -> Tensor:
    return torch.arange(16.0, device="cuda").reshape(4, 4)


CPU = torch.ones(4, 4)
MIXED: dict[str, Callable[[Tensor], object]] = {
    "a sum": lambda x: x + CPU,
    "a sum in place": lambda x: CPU.clone().add_(x),
    "a product": lambda x: x @ CPU,
    "a product into the CPU's memory": lambda x: torch.mm(x, x, out=torch.empty(4, 4)),
    "a concatenation": lambda x: torch.cat([x, CPU]),
    "a mask of torch.where": lambda x: torch.where(CPU > 0, x, x),
    "a mask of masked_fill": lambda x: x.masked_fill(CPU > 0, 0.0),
    "indices of index_select": lambda x: x.index_select(0, torch.tensor([0])),
    "indices of gather": lambda x: x.gather(0, torch.zeros(1, 4, dtype=torch.long)),
    "tokens of an embedding": lambda x: F.embedding(torch.tensor([0]), x),
    "a model and its input": lambda x: nn.Linear(4, 4)(x),
    "an image and a kernel": lambda x: F.conv2d(x[None, None], torch.ones(1, 1, 2, 2)),
    "labels of a loss": lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.long)),
    "a mask of attention": lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3, attn_mask=CPU > 0),
    "a CPU's tensor indexed by the device's": lambda x: CPU[x[0].long()],
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_are_refused(x: Tensor, name: str):
    with pytest.raises(RuntimeError, match=r"same device|indices should be either on cpu|same device as"):
        MIXED[name](x)


@pytest.mark.parametrize("read", [Tensor.numpy, Tensor.__array__], ids=["numpy", "asarray"])
def test_numpy_cannot_read_the_device(x: Tensor, read: Callable[[Tensor], object]):
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\) to copy the tensor to host memory first"):
        read(x)


GENERATORS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "randn": (lambda device, generator: torch.randn(3, device=device, generator=generator), "generator"),
    "randperm": (lambda device, generator: torch.randperm(3, device=device, generator=generator), "generator"),
    "normal_": (lambda device, generator: torch.empty(3, device=device).normal_(generator=generator), "generator"),
    "multinomial": (
        lambda device, generator: torch.multinomial(torch.ones(3, device=device), 1, generator=generator), "generator"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GENERATORS)
def test_the_generator_of_the_other_device_is_refused(name: str):
    draw, message = GENERATORS[name]
    for device, other in (("cuda", "cpu"), ("cpu", "cuda")):
        draw(device, torch.Generator(device).manual_seed(0))
        with pytest.raises(RuntimeError, match=message):
            draw(device, torch.Generator(other).manual_seed(0))


def test_the_device_draws_other_numbers_than_the_cpu_and_the_same_after_a_seed():
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(torch.rand(4, device="cuda").cpu())
    torch.manual_seed(3)
    assert torch.equal(*drawn) and not torch.equal(torch.rand(4), drawn[0])


# --- what is allowed --------------------------------------------------------------------------------------------------


def test_a_number_on_the_cpu_may_meet_the_device(x: Tensor):
    assert torch.equal((x + torch.tensor(2.0)).cpu(), x.cpu() + 2)
    assert x[torch.tensor([2, 0])].device.type == "cuda"


def test_views_share_memory(x: Tensor):
    x.t()[1:].zero_()
    x[:, 0].view(2, 2).mul_(2)
    assert x.cpu().tolist() == [[0, 0, 0, 0], [8, 0, 0, 0], [16, 0, 0, 0], [24, 0, 0, 0]]


def test_a_tensor_that_grows_stays_one_memory_with_its_views(x: Tensor):
    flat = x.view(-1)
    torch.add(torch.ones(5, 5, device="cuda"), 1, out=x.resize_(5, 5))
    x[0, 0] = 7
    assert flat[0].item() == 7 and flat.shape == (16,)


def test_copies_and_files_keep_device_and_ties(x: Tensor):
    model = nn.ModuleList([nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)])
    model[1].weight = model[0].weight
    twin = copy.deepcopy(model.cuda())
    assert twin[0].weight is twin[1].weight and twin[0].weight.is_cuda
    twin[0].weight.data.zero_()
    assert model[0].weight.any()
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, map_location="cpu")["x"], x.cpu())


def test_a_model_trains_on_the_device_as_on_the_cpu():
    def trained(device: str) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        images, labels = torch.randn(5, 1, 8, 8).to(device), torch.arange(5).to(device) % 3
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        return model[4].weight.detach().cpu()

    torch.testing.assert_close(trained("cuda"), trained("cpu"))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_net_gives_the_same_as_on_the_cpu(kind: type[nn.Module]):
    torch.manual_seed(0)
    net, x = kind(3, 4, num_layers=2, bidirectional=True), torch.randn(5, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(net.cuda()(x.cuda())[0].cpu(), net.cpu()(x)[0])


def test_a_product_of_fp8_numbers_is_that_of_their_values():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a card that multiplies FP8 numbers")
    torch.manual_seed(0)
    a, b = (torch.randn(32, 32).to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.tensor(0.5)
    product = torch._scaled_mm(a.cuda(), b.cuda().t(), scale.cuda(), scale.cuda(), out_dtype=torch.bfloat16)
    torch.testing.assert_close(product.cpu(), (0.25 * a.float() @ b.float().t()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compressed", [Tensor.to_sparse_csr, partial(Tensor.to_sparse_bsr, blocksize=(2, 2))])
def test_a_product_of_compressed_numbers_is_that_of_their_values(compressed: Callable, dtype: torch.dtype):
    torch.manual_seed(0)
    dense = torch.randn(4, 6).where(torch.rand(4, 6) > 0.5, 0).to("cuda", dtype)
    x = torch.randn(6, 4).to("cuda", dtype)
    torch.testing.assert_close(compressed(dense) @ x, dense @ x)


def test_autocast_is_that_of_the_device(x: Tensor):
    with torch.autocast("cuda", torch.bfloat16):
        assert (x @ x).dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype is torch.float32


def test_memory_is_counted_and_given_back():
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    big = torch.zeros(2**18, device="cuda")
    assert torch.cuda.memory_allocated() - before == 2**20
    view, number = big[:10], (big + 1).sum()
    del big
    assert torch.cuda.memory_allocated() - before >= 2**20  # which the view holds
    del view, number
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before >= 2**21
