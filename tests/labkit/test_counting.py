"""FLOPs and bytes counted from operators equal those counted by hand, for every operator that the course uses.

Hand counts: a multiply-add is 2 FLOPs; least bytes are what is read of what was there, once, and what remains, once.
"""

import copy
import dataclasses
import math

import llamas
import pytest
import torch
import torch.nn.functional as F
import transformers
from refusals import Refusals, check_refusal, refused
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models import resnet18

from labkit.timing.counting import count
from labkit.timing.work import Work

B, L, D, H = 2, 6, 16, 4  # batch, length, width, heads
X = torch.randn(B, L, D)


def sdpa(kv_heads: int = H, **kwargs):
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=kv_heads != H, **kwargs)

    return attend, [torch.randn(B, heads, L, D) for heads in (H, kv_heads, kv_heads)]


def sdpa_math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhlt,bhtd->bhld", torch.einsum("bhld,bhtd->bhlt", q, k).softmax(-1), v)


def image(channels: int, *sides: int) -> Tensor:
    return torch.randn(B, channels, *sides)


def int8(*shape: int) -> Tensor:
    return torch.randint(-8, 8, shape, dtype=torch.int8)


ATTENTION = 4 * B * H * L * L * D
MHA = 2 * B * L * 4 * D * D + 4 * B * L * L * D  # four projections; D is split over the heads
# name -> callable, inputs, FLOPs by hand
PRODUCTS = {
    "linear": (nn.Linear(D, 5), [X], 2 * B * L * D * 5),
    "linear without bias": (nn.Linear(D, 5, bias=False), [X], 2 * B * L * D * 5),
    "matmul": (torch.matmul, [X, torch.randn(D, 3)], 2 * B * L * D * 3),
    "matmul broadcast": (torch.matmul, [torch.randn(3, 1, 4, 5), torch.randn(2, 5, 6)], 2 * 3 * 2 * 4 * 5 * 6),
    "bmm": (torch.bmm, [X, X.mT.contiguous()], 2 * B * L * D * L),
    "baddbmm": (torch.baddbmm, [torch.randn(B, L, L), X, X.mT.contiguous()], 2 * B * L * D * L),
    "addbmm": (torch.addbmm, [torch.randn(L, L), X, X.mT.contiguous()], 2 * B * L * D * L),
    "einsum": (lambda a, b: torch.einsum("bld,de->ble", a, b), [X, torch.randn(D, 7)], 2 * B * L * D * 7),
    "mv": (torch.mv, [torch.randn(4, 5), torch.randn(5)], 2 * 4 * 5),
    "addmv": (torch.addmv, [torch.randn(4), torch.randn(4, 5), torch.randn(5)], 2 * 4 * 5),
    "dot": (torch.dot, [torch.randn(9), torch.randn(9)], 2 * 9),
    # 2 x outputs x (channels in a group x kernel)
    "conv1d": (nn.Conv1d(4, 6, 3), [image(4, 9)], 2 * B * 6 * 7 * 4 * 3),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1, stride=2), [image(4, 9, 9)], 2 * B * 6 * 5 * 5 * 4 * 9),
    "conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2), [image(4, 9, 9)], 2 * B * 6 * 7 * 7 * 2 * 9),
    "conv2d depthwise": (nn.Conv2d(4, 4, 3, groups=4), [image(4, 9, 9)], 2 * B * 4 * 7 * 7 * 9),
    "conv3d": (nn.Conv3d(2, 3, 2), [image(2, 4, 4, 4)], 2 * B * 3 * 27 * 2 * 8),
    # each input meets the whole kernel
    "conv2d transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), [image(4, 5, 5)], 2 * B * 4 * 25 * 6 * 9),
    "conv2d transposed grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), [image(4, 5, 5)], 2 * B * 4 * 25 * 3 * 9),
    "attention": (*sdpa(), ATTENTION),
    "attention causal": (*sdpa(is_causal=True), ATTENTION),
    "attention masked": (*sdpa(attn_mask=torch.ones(L, L).tril().bool()), ATTENTION),
    "attention of grouped queries": (*sdpa(2), ATTENTION),
    "attention by math": (sdpa_math, sdpa()[1], ATTENTION),
    "attention by einsum": (by_einsum, sdpa()[1], ATTENTION),
    "attention decoding": (sdpa()[0], [torch.randn(B, H, 1, D), *sdpa()[1][1:]], ATTENTION // L),
    "multi-head attention": (nn.MultiheadAttention(D, H, batch_first=True), [X, X, X], MHA),
    "encoder layer": (nn.TransformerEncoderLayer(D, H, 24, batch_first=True), [X], MHA + 4 * B * L * D * 24),
    "int_mm": (torch._int_mm, [int8(32, 16), int8(16, 8)], 2 * 32 * 16 * 8),
    "lstm": (nn.LSTM(D, 5), [X], 2 * B * L * 4 * 5 * (D + 5)),
    "lstm of two layers, both ways": (
        nn.LSTM(D, 5, num_layers=2, bidirectional=True, batch_first=True),
        [X],
        2 * B * L * 2 * 4 * 5 * ((D + 5) + (10 + 5)),
    ),
    "gru": (nn.GRU(D, 5), [X], 2 * B * L * 3 * 5 * (D + 5)),
    "rnn": (nn.RNN(D, 5), [X], 2 * B * L * 5 * (D + 5)),
    "lstm cell": (nn.LSTMCell(D, 5), [X[0]], 2 * L * 4 * 5 * (D + 5)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_flops_equal_hand_count(name: str) -> None:
    fn, inputs, flops = PRODUCTS[name]
    work = count(fn, *inputs)
    assert (work.flops, work.uncounted) == (flops, {})


# The same table on operands of each kind: rounding, device and dtype change no FLOP.
@pytest.mark.parametrize("name", ["linear", "conv2d grouped", "attention", "multi-head attention", "encoder layer"])
@pytest.mark.parametrize("to", [{"dtype": torch.bfloat16}, {"device": "meta"}], ids=["bf16", "meta"])
def test_flops_do_not_depend_on_dtype_and_device(name: str, to: dict) -> None:
    fn, inputs, flops = PRODUCTS[name]
    fn = copy.deepcopy(fn).to(**to) if isinstance(fn, nn.Module) else fn
    assert count(fn, *[t.to(**to) for t in inputs]).flops == flops


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in PRODUCTS if name != "int_mm"])
def test_cuda_counts_as_the_cpu(name: str) -> None:
    fn, inputs, flops = PRODUCTS[name]
    fn = copy.deepcopy(fn).cuda() if isinstance(fn, nn.Module) else fn
    if name == "attention masked":
        fn, _ = sdpa(attn_mask=torch.ones(L, L, device="cuda").tril().bool())
    work = count(fn, *[t.cuda() for t in inputs])
    assert (work.flops, work.uncounted) == (flops, {})


@pytest.mark.filterwarnings("ignore")
def test_weight_only_products_count_as_dense() -> None:
    x = torch.randn(4, 128).bfloat16()
    eight = count(torch._weight_int8pack_mm, x, int8(64, 128), torch.ones(64).bfloat16())
    assert eight.flops == 2 * 4 * 128 * 64
    assert eight.bytes == 2 * 4 * 128 + 64 * 128 + 2 * 64 + 2 * 4 * 64
    codes = torch.randint(0, 16, (64, 128), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    four = count(torch._weight_int4pack_mm_for_cpu, x, packed, 32, torch.ones(4, 64, 2).bfloat16())
    assert four.flops == eight.flops
    assert four.bytes == 2 * 4 * 128 + 64 * 128 // 2 + 2 * 2 * 64 * 4 + 2 * 4 * 64


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["csr", "csc", "coo", "bsr"])
def test_sparse_products_count_what_is_stored(layout: str) -> None:
    dense = torch.randn(8, 12) * (torch.arange(12) % 3 == 0)
    if layout == "bsr":
        sparse, stored = dense.to_sparse_bsr((4, 4)), 8 * 12  # no block of 4 x 4 is empty
    else:
        sparse, stored = getattr(dense, f"to_sparse{'' if layout == 'coo' else '_' + layout}")(), 8 * 4
    assert count(lambda x: F.linear(x, sparse), torch.randn(5, 12)).flops == 2 * stored * 5
    assert count(lambda x: torch.sparse.mm(sparse, x), torch.randn(12, 7)).flops == 2 * stored * 7
    assert count(lambda x: sparse @ x, torch.randn(12)).flops == 2 * stored


# Least bytes by hand; N elements of 4 bytes.
N, ROWS = X.numel(), torch.arange(2)
OTHERS = {
    "add": (torch.add, [X, X.clone()], 12 * N),
    "gelu": (nn.GELU(), [X], 8 * N),
    "scale in bf16": (lambda x: x * 2, [X.bfloat16()], 4 * N),
    "compare": (torch.gt, [X, X.clone()], 9 * N),
    "a tensor with itself": (torch.mul, [X, X], 8 * N),
    "broadcast": (torch.add, [X, torch.randn(D)], 8 * N + 4 * D),
    "sum": (torch.sum, [X], 4 * N + 4),
    "mean of rows": (lambda x: x.mean(-1), [X], 4 * N + 4 * N // D),
    "softmax": (nn.Softmax(-1), [X], 8 * N),
    "layer norm": (nn.LayerNorm(D), [X], 8 * N + 8 * D),
    "batch norm": (nn.BatchNorm1d(L), [X], 8 * N + 16 * L),
    "group norm": (nn.GroupNorm(2, L), [X], 8 * N + 8 * L),
    "embedding": (nn.Embedding(50, D), [torch.arange(7)], 8 * 7 + 8 * 7 * D),
    "embedding, every row and more": (nn.Embedding(3, D), [torch.zeros(9).long()], 8 * 9 + 4 * 3 * D + 4 * 9 * D),
    "rows by index": (lambda x, i: x[i], [torch.randn(50, D), torch.arange(7)], 8 * 7 + 8 * 7 * D),
    "max pool": (nn.MaxPool2d(2), [image(3, 4, 4)], 4 * B * 3 * (16 + 4)),
    "average pool": (nn.AvgPool2d(3, stride=1), [image(3, 4, 4)], 4 * B * 3 * (16 + 4)),
    "global pool": (nn.AdaptiveAvgPool2d(1), [image(3, 4, 4)], 4 * B * 3 * (16 + 1)),
    "transpose": (lambda x: x.mT, [X], 0),
    "expanded": (lambda x: x.expand(5, *x.shape).sum(0), [X], 8 * N),
    "half of the columns": (lambda x: x[..., : D // 2] + 1, [X], 4 * N),
    "only the shape": (torch.zeros_like, [X], 4 * N),
    "relu in place": (torch.relu_, [X.clone()], 8 * N),
    "filled": (lambda x: x.fill_(1), [X.clone()], 4 * N),
    "some rows written": (
        lambda x, i, y: x.index_copy_(0, i, y),
        [torch.zeros(9, D), torch.arange(2), X[0, :2]],
        16 * D + 16,
    ),
    "qkv in slices": (lambda t: sum(part.sum() for part in t.chunk(3, -1)), [torch.randn(L, 48)], 4 * L * 48 + 4),
    "two rows of it": (lambda t: t[2:4].sum(), [torch.randn(L, 48)], 4 * 2 * 48 + 4),
    "the same, in three ways": (lambda t: t.sum() + t[0].sum() + t.mT.sum(), [torch.randn(L, 48)], 4 * L * 48 + 4),
}


@pytest.mark.parametrize("name", OTHERS)
def test_least_bytes_equal_hand_count(name: str) -> None:
    fn, inputs, nbytes = OTHERS[name]
    work = count(fn, *inputs)
    assert (work.flops, work.bytes, work.uncounted) == (0, nbytes, {})


def test_bytes_of_a_linear_layer_are_input_weight_bias_and_output() -> None:
    work = count(nn.Linear(D, 5), X)
    assert work.bytes == 4 * (N + 5 * D + 5 + B * L * 5)
    assert work.intensity == work.flops / work.bytes


def test_what_is_made_and_used_within_the_call_costs_nothing() -> None:
    work = count(nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, 5)), X)
    assert work.bytes == 4 * (N + 64 * D + 64 + 5 * 64 + 5 + B * L * 5)


def test_a_weight_used_twice_is_read_once() -> None:
    layer = nn.Linear(D, D, bias=False)
    work = count(lambda x: layer(layer(x)), X)
    assert work.bytes == 4 * (2 * N + D * D)
    assert work.flops == 2 * 2 * B * L * D * D


def test_by_module_adds_up_and_is_named_as_in_the_model() -> None:
    model = nn.Sequential(nn.Linear(D, 8), nn.Sequential(nn.Linear(8, 4)))
    first, second = 2 * B * L * D * 8, 2 * B * L * 8 * 4
    assert count(model, X).by_module == {"": first + second, "0": first, "1": second, "1.0": second}


def test_operators_without_a_formula_are_listed() -> None:
    layer = nn.Linear(D, D)
    work = count(lambda x: torch.fft.fft(layer(x)).real, X)
    assert work.uncounted == {"aten._fft_r2c": 1} and work.flops == count(layer, X).flops
    assert "uncounted: aten._fft_r2c x1" in str(work)


def test_resnet18_has_the_published_count() -> None:
    with torch.device("meta"):
        model = resnet18()
    assert count(model, torch.randn(1, 3, 224, 224, device="meta")).flops == 3_628_146_688


@pytest.mark.slow
def test_bert_counts_the_same_however_it_attends() -> None:
    length, d, layers = 128, 768, 2
    each = 2 * length * (4 * d * d + 2 * d * 4 * d) + 4 * length * length * d
    for implementation in ("sdpa", "eager"):
        config = transformers.BertConfig(num_hidden_layers=layers, attn_implementation=implementation)
        with torch.device("meta"):
            work = count(transformers.BertModel(config), input_ids=torch.zeros(1, length, dtype=torch.long))
        assert (work.flops, work.uncounted) == (layers * each + 2 * d * d, {})  # and the pooler


def llama(**changes) -> nn.Module:
    return llamas.llama(hidden_size=32, num_hidden_layers=3, intermediate_size=56, vocab_size=100, **changes)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
def test_decoding_reads_every_weight_and_the_cache_once_and_writes_one_token() -> None:
    model, past, token_kv = llama(tie_word_embeddings=True), 10, 2 * 3 * 2 * 8 * 4  # keys and values, ..., bytes
    ids = torch.randint(40, (1, past))
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    before = [layer.keys.clone() for layer in cache.layers]
    work = count(model, input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    frequencies, id_and_logits = 4 * 4, 8 + 4 * 100  # of the rotary embedding; what goes in and comes out
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert 0 <= work.bytes - (weights + (past + 1) * token_kv + frequencies + id_and_logits) < 100  # and some scalars
    linears = sum(p.numel() for p in model.parameters() if p.dim() == 2)  # the tied embedding as the head
    rotary = work.by_module.get("model.rotary_emb", 0)  # its angles are a product in some versions of transformers
    assert work.flops - rotary == 2 * linears + 3 * 4 * 4 * (past + 1) * 8 and rotary in (0, 2 * frequencies // 4)
    assert cache.get_seq_length() == past
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


def test_prefill_writes_the_cache() -> None:
    model, ids = llama(), torch.randint(40, (1, 10))
    with_cache, without = (count(model, input_ids=ids, use_cache=use) for use in (True, False))
    assert with_cache.flops == without.flops
    assert with_cache.bytes - without.bytes == 10 * 2 * 3 * 2 * 8 * 4


def test_cache_written_in_place_is_read_and_written_by_the_row() -> None:
    cache = torch.zeros(8, D)

    def step(x: Tensor, at: int) -> Tensor:
        cache[at] = x
        return x @ cache[: at + 1].T

    assert count(step, torch.randn(D), 3).bytes == 4 * (D + 4 * D + D + 4)  # x; four rows read, one written; the result


def test_model_and_random_state_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model[1].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    flags = [module.training for module in model.modules()]
    count(model, image(3, 8, 8))
    torch.random.set_rng_state(state)
    count(lambda: torch.randn(3))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()


def test_everything_is_put_back_when_the_call_fails() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 4)).train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count(model, torch.randn(2, 5))
    assert model.training and model[1].training and torch.backends.mha.get_fastpath_enabled()


def test_evaluation_is_what_is_counted() -> None:
    noisy, layer = nn.Sequential(nn.Dropout(0.5), nn.Linear(D, 5)).train(), nn.Linear(D, 5)
    assert count(noisy, X) == dataclasses.replace(count(layer, X), by_module=count(noisy, X).by_module)


@pytest.mark.slow
def test_compiled_code_counts_as_eager() -> None:
    layer = nn.Linear(D, 5)
    assert count(torch.compile(layer, backend="aot_eager"), X) == count(layer, X)
    assert count(torch.compile(lambda x: layer(x).relu(), backend="aot_eager"), X).flops == count(layer, X).flops


def test_inference_mode_hides_nothing() -> None:
    with torch.inference_mode():
        layer = nn.Linear(D, 5)
        assert count(layer, X.clone()).flops == 2 * B * L * D * 5
    assert count(torch.inference_mode()(sdpa()[0]), *sdpa()[1]).flops == ATTENTION


def test_a_work_prints_on_one_line() -> None:
    assert str(Work(flops=2 * 10**9, bytes=10**8)) == "2 GFLOP, 100 MB, 20 FLOP/byte"
    assert (Work(0, 0).intensity, Work(1, 0).intensity) == (0.0, math.inf)


CNN = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
IMAGES = torch.randn(2, 3, 8, 8)
REFUSALS: Refusals = {
    "needs a module or a function, not a int": lambda: count(3),
    "nested tensors: pad": lambda: count(torch.sin, torch.nested.nested_tensor([X[0], X[1, :2]])),
    "layout torch._mkldnn can't be looked into": lambda: count(lambda x: x.to_mkldnn().to_dense(), X),
    "not in a tuple: write count(model, *inputs)": lambda: count(CNN, (IMAGES,)),
    "not in a list: write count(model, *inputs)": lambda: count(CNN, [IMAGES]),
    "not in a dict: write count(model, **inputs)": lambda: count(CNN, {"input": IMAGES}),
    "count takes inputs one by one": lambda: count(torch.relu, (IMAGES,)),
    "not a NoneType": lambda: count(None),
    "not a str": lambda: count("model", IMAGES),
}


@pytest.mark.filterwarnings("ignore")  # of nested tensors
@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)


def test_a_tuple_that_the_call_takes_is_counted_and_an_error_of_its_own_passes_through():
    assert count(lambda pair: pair[0] @ pair[1], (X[0], X[0].mT)).flops > 0
    with pytest.raises(TypeError, match="missing"):
        count(CNN)
