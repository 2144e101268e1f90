"""Pruned transformers of every family: equal to the masked dense model, with a cache, and as their config says."""

import copy
import functools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import DECODERS, FAMILIES, GROUPED, LLAMA, batches, family, heads_to_remove, inputs
from networks import blind
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.data import models
from labkit.graph import anatomy, surgery
from labkit.graph.groups import Coupling
from labkit.modules import stacks
from labkit.pruning import depth, transformers
from labkit.pruning.channels import Pruned

EVERY = list(FAMILIES)
QUICK = ("bert", "llama")
KINDS = {
    "heads": lambda model, name: transformers.prune_heads(model, heads_to_remove(name)),
    "ffn": lambda model, name: transformers.prune_ffn(model, 0.3),
    "depth": lambda model, name: depth.prune_layers(model, [1]),
}


def cases(*rows):
    """Parameters, the family first; but for BERT and Llama left out of quick runs."""
    slow = pytest.mark.slow
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [pytest.param(*row, marks=() if row[0] in QUICK else slow) for row in rows]


@functools.cache
def pruned_by(kind: str, name: str) -> Pruned:
    """The same for all tests that only read it."""
    return KINDS[kind](family(name), name)


@torch.no_grad()
def output(model: nn.Module, name: str) -> torch.Tensor:
    return model(**inputs(name))[0]


def assert_equal(a: torch.Tensor, b: torch.Tensor, model: nn.Module) -> None:
    """To rounding: 8 eps sqrt(terms) of the largest value, terms being what is summed on the way to an output."""
    terms = sum(min(x.shape) for x in model.parameters() if x.dim() == 2)
    assert float((a - b).abs().max()) <= 8 * torch.finfo(a.dtype).eps * terms**0.5 * float(a.abs().max())


def heads_of(model: nn.Module) -> list[int]:
    return [part.heads for part in anatomy.attentions(model)]


def neurons_of(model: nn.Module) -> list[int]:
    coupling = Coupling.of(model, (), anatomy.example(model))
    return [coupling.groups[part.group].units for part in anatomy.feed_forwards(model, coupling)]


@pytest.mark.parametrize(
    ("name", "kind", "attention"),
    cases(
        *[(name, "heads", "sdpa") for name in EVERY],
        *[(name, "ffn", "sdpa") for name in ("bert", "gpt2", "llama", "vit", "t5", "neox", "falcon", "modernbert")],
        *[(name, "heads", "eager") for name in ("bert", "gpt2", "llama", "t5")],
    ),
)
def test_pruned_equals_masked_in_fp32(name, kind, attention):
    model = family(name)
    model.set_attn_implementation(attention)
    pruned = pruned_by(kind, name) if attention == "sdpa" else KINDS[kind](model, name)
    assert pruned.report.equal and pruned.plan.parameters[1] < pruned.plan.parameters[0]
    assert sum(x.numel() for x in pruned.model.parameters()) == pruned.plan.parameters[1]
    if not (name == "olmo2" and kind == "heads"):  # whose norm over all heads no weight of the dense model can express
        dense = output(blind(model, pruned.plan.kept), name)
        assert_equal(dense, output(pruned.model, name), model)
        assert float((dense - output(model, name)).abs().max()) > 1e-3 * float(dense.abs().max())  # something went


@pytest.mark.parametrize("name", cases("bert", "minilm", "gpt2", "llama", "t5", "neox", "falcon"))
def test_each_layer_has_its_heads_and_neurons(name):
    layers = 6 if name == "t5" else 3
    assert heads_of(family(name)) == [8 if name == "minilm" else 4] * layers
    assert neurons_of(family(name)) == [24] * (4 if name == "t5" else 3)


@pytest.mark.parametrize("name", cases("bert", "gpt2", "opt", "llama", "vit", "falcon", "modernbert"))
def test_pruned_layers_equal_skipped_ones(name):
    model = family(name)
    pruned = pruned_by("depth", name)
    assert pruned.report.equal and pruned.report.tolerance == 0
    with depth.skipping([model.get_submodule(stacks.stack(model))[1]]):
        expected = output(model, name)
    assert torch.equal(expected, output(pruned.model, name))
    assert not torch.equal(expected, output(model, name))


@pytest.mark.parametrize(
    ("name", "kind"),
    cases(*[(name, kind) for name in DECODERS for kind in ("heads", "depth")], ("t5", "heads")),
)
def test_generation_with_a_cache_equals_that_without(name, kind):
    pruned = pruned_by(kind, name).model
    prompt = {"input_ids": inputs(name)["input_ids"][:1], "attention_mask": torch.ones(1, 9, dtype=torch.int64)}
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    with models.quietly():
        cached = pruned.generate(**prompt, **options, use_cache=True)
        plain = pruned.generate(**prompt, **options, use_cache=False)
    assert cached.shape[1] >= 5 and torch.equal(cached, plain)


def test_cache_shrinks_with_its_kv_heads():
    model = transformers.prune_heads(family("llama"), {layer: [2, 3] for layer in range(3)}).model
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]  # 2 is a number of KV heads too
    with torch.no_grad():
        cache = model(**inputs("llama"), use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == [1, 1, 1]


@pytest.mark.parametrize(
    ("gone", "q", "k"), [([0, 2], [8, 24], [0, 8]), ([2, 3], [0, 8], [0]), ([1, 2, 3], [0], [0]), ([0, 2, 3], [8], [0])]
)
def test_query_heads_go_evenly_from_the_groups_that_stay_and_with_them_go_whole_groups(gone, q, k):
    kept = transformers.prune_heads(family("llama"), {1: gone}).plan.kept
    rows = {heads: [h + i for h in heads for i in range(8)] for heads in (tuple(q), tuple(k))}
    assert kept["model.layers.1.self_attn.q_proj.weight"][0].tolist() == rows[tuple(q)]
    assert kept["model.layers.1.self_attn.o_proj.weight"][1].tolist() == rows[tuple(q)]
    if len(k) == 1:
        assert kept["model.layers.1.self_attn.v_proj.weight"][0].tolist() == rows[tuple(k)]
    else:
        assert "model.layers.1.self_attn.v_proj.weight" not in kept


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_input_model_stays_as_it_was(name):
    model = family(name)
    model.train()
    next(iter(model.parameters())).requires_grad_(False)
    weights = {key: x.clone() for key, x in model.state_dict().items()}
    config, written = copy.deepcopy(model.config.to_dict()), str(model)
    for kind in KINDS:
        if (name, kind) != ("t5", "depth"):
            pruned = KINDS[kind](model, name)
            assert pruned.model is not model and all(module.training for module in pruned.model.modules())
            assert not next(iter(pruned.model.parameters())).requires_grad
    assert model.config.to_dict() == config and str(model) == written
    assert all(torch.equal(x, weights[key]) for key, x in model.state_dict().items())
    assert all(module.training for module in model.modules())


# --- neurons ----------------------------------------------------------------------------------------------------------


def one_neuron_left(model: nn.Module, criterion: str, data=None) -> tuple[list[int], list[nn.Module]]:
    """In every layer the neuron that the criterion finds most important, and the linear module that reads it."""
    coupling = Coupling.of(model, (), anatomy.example(model))
    downs = [part.down for part in anatomy.feed_forwards(model, coupling)]
    kept = transformers.prune_ffn(model, 23 / 24, criterion=criterion, batches=data, check=False).plan.kept
    modules = [model.get_submodule(name) for name in downs]
    dims = [1 - stacks.out_dim(module) for module in modules]
    return [int(kept[f"{name}.weight"][dim]) for name, dim in zip(downs, dims, strict=True)], modules


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_the_values_of_a_single_head_are_no_neurons(name: str):
    model = family(name)
    first = anatomy.attentions(model)[0]
    single = transformers.prune_heads(model, {0: range(1, first.heads)}).model
    narrower = transformers.prune_ffn(single, 0.5).model
    assert heads_of(narrower) == heads_of(single) == [1, *heads_of(model)[1:]]
    for attention in anatomy.attentions(single):
        widths = [network.get_submodule(attention.output).weight.shape for network in (single, narrower)]
        assert widths[0] == widths[1]


def test_wanda_is_the_root_mean_square_of_what_a_layer_loses():
    model, data = family("llama").double(), batches("llama")
    best, downs = one_neuron_left(model, "wanda", data)
    for neuron, down in zip(best, downs, strict=True):
        seen = []
        handle = down.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for batch in data:
                model(**batch)
        handle.remove()
        a = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, data, strict=True)])
        lost = [(a[:, [j]] * down.weight[:, j]).pow(2).sum(1).mean().sqrt() for j in range(24)]
        assert neuron == int(torch.stack(lost).argmax())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_magnitude_is_the_norm_of_all_that_belongs_to_a_neuron(name):
    model = family(name)
    best, downs = one_neuron_left(model, "magnitude")
    for neuron, down in zip(best, downs, strict=True):
        parent = next(p for p, module in model.named_modules() if module is down).rpartition(".")[0]
        if name == "bert":
            parent = parent.removesuffix(".output")
        squares = torch.zeros(24)
        for module_name, module in model.get_submodule(parent).named_modules():
            if stacks.is_linear(module) and "attention" not in module_name:
                weight = module.weight.T if stacks.out_dim(module) else module.weight  # [outputs, inputs]
                squares += weight.square().sum(0 if module is down else 1)
                squares += 0 if module is down or module.bias is None else module.bias.square()
        assert neuron == int(squares.argmax())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_neurons_of_experts_go_from_all_of_them_alike(name):
    import transformers as hub

    sizes = {**LLAMA, "num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    with models.quietly(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(hub, f"{name}ForCausalLM")(getattr(hub, f"{name}Config")(**sizes, decoder_sparse_step=1)).eval()
    pruned = transformers.prune_ffn(model, 0.5)
    assert pruned.report.equal and [row.left for row in pruned.plan.units if row.removed] == [12] * 3
    experts = pruned.model.model.layers[0].mlp.experts
    weights = (experts.gate_up_proj, experts.down_proj)
    gate_up, down = (x.mT for x in weights) if name == "GptOss" else weights  # whose gates and ups alternate
    assert gate_up.shape == (3, 24, 32) and down.shape == (3, 32, 12)
    check_refusal(
        "belongs to none: take magnitude or random",
        lambda: transformers.prune_ffn(model, 0.5, criterion="wanda", batches=batches("llama")),
    )


@pytest.mark.slow
def test_random_neurons_repeat_by_seed():
    left = [transformers.prune_ffn(family("bert"), 0.5, criterion="random", seed=s).plan.kept for s in (0, 0, 1)]
    same = [all(torch.equal(left[0][key][0], kept[key][0]) for key in kept if key.endswith("bias")) for kept in left]
    assert same == [True, True, False]


@pytest.mark.slow
def test_width_is_rounded_and_in_the_config():
    model = family("llama")
    assert transformers.prune_ffn(model, 0.4, round_to=8).model.config.intermediate_size == 16
    assert transformers.prune_ffn(model, 0.9, round_to=16).model.config.intermediate_size == 16
    assert transformers.prune_ffn(model, 0.0).plan.kept == {}


# --- config -----------------------------------------------------------------------------------------------------------


def assert_comes_back(pruned: nn.Module, name: str, folder) -> None:
    with models.quietly():
        pruned.save_pretrained(folder)
        again = type(pruned).from_pretrained(folder)
    assert torch.equal(output(pruned, name), output(again.eval(), name))


@pytest.mark.parametrize("kind", ["ffn", "depth"])
@pytest.mark.parametrize("name", cases("bert", "distilbert", "gpt2", "opt", "llama", "gemma", "vit", "t5"))
def test_config_says_it_where_all_layers_agree(name, kind, tmp_path):
    if (name, kind) != ("t5", "depth"):
        assert_comes_back(pruned_by(kind, name).model, name, tmp_path)


@pytest.mark.parametrize("name", cases("llama", "qwen3", "vit", "t5"))
def test_config_has_the_number_of_heads_where_the_architecture_can_be_built_so(name, tmp_path):
    heads = [1, 3] if name in GROUPED else [1]
    model = family(name)
    pruned = transformers.prune_heads(model, dict.fromkeys(range(len(heads_of(model))), heads)).model
    assert pruned.config.num_attention_heads == 4 - len(heads)
    assert_comes_back(pruned, name, tmp_path)


@pytest.mark.parametrize("name", cases("bert", "gpt2"))
def test_config_is_left_where_head_size_is_width_by_heads(name):
    pruned = transformers.prune_heads(family(name), {layer: [1] for layer in range(3)}).model
    assert pruned.config.num_attention_heads == 4
    assert heads_of(pruned) == [3, 3, 3]


# each with another way to hold its heads; the other families are saved, loaded and exported each night
BY_DAY = ("bert", "gpt2", "llama", "vit", "t5", "falcon", "codegen", "phi3")
BY_NIGHT = tuple(name for name in EVERY if name not in BY_DAY)
LOADING = """
import sys
import torch
from families import family, inputs
from labkit.pruning import surgery
with torch.no_grad():
    for name in sys.argv[2:]:
        model = family(name)
        for parameter in model.parameters():
            parameter.zero_()  # all that it computes comes from the file
        loaded = surgery.load(model, f"{sys.argv[1]}/{name}")
        torch.save(loaded(**inputs(name))[0], f"{sys.argv[1]}/{name}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("names", [BY_DAY, pytest.param(BY_NIGHT, marks=pytest.mark.nightly)], ids=["day", "night"])
def test_a_model_of_any_family_is_loaded_in_a_new_process(names, tmp_path, offline):
    for name in names:
        pruned = pruned_by("heads", name)
        surgery.save(pruned.model, [pruned.plan], tmp_path / name)
    environment = {**offline, "PYTHONPATH": f"{Path(__file__).parents[1]}:{offline['PYTHONPATH']}"}
    subprocess.run([sys.executable, "-c", LOADING, str(tmp_path), *names], env=environment, check=True)
    for name in names:
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), output(pruned_by("heads", name).model, name)), name


# --- other models, compile, export ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchvision_vit_loses_neurons_and_layers_but_not_heads():
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model, image = VisionTransformer(16, 8, 3, 4, 32, 24, num_classes=5).eval(), {"x": torch.randn(2, 3, 16, 16)}
    assert transformers.prune_ffn(model, 0.5, kwargs=image).report.equal
    assert depth.prune_layers(model, [0], kwargs=image).report.equal
    headless = "no attention heads that labkit can read"
    check_refusal(headless, lambda: transformers.prune_heads(model, {0: [0]}, kwargs=image))
    check_refusal("give kwargs", lambda: transformers.prune_ffn(model, 0.5))


@pytest.mark.slow
def test_whisper_and_bart_are_called_with_what_their_config_says():
    from transformers import BartConfig, BartForConditionalGeneration, WhisperConfig, WhisperForConditionalGeneration

    sizes = {"vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
    sizes |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_ffn_dim": 24 for part in ("encoder", "decoder")}
    sound = {"num_mel_bins": 8, "max_source_positions": 10, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for model in (
        WhisperForConditionalGeneration(WhisperConfig(**sizes, **sound, decoder_start_token_id=1)),
        BartForConditionalGeneration(BartConfig(**sizes)),
    ):
        assert transformers.prune_heads(model.eval(), {0: [1]}).report.equal
        assert transformers.prune_ffn(model, 0.5).report.equal


@pytest.mark.slow
def test_compiles_whole():
    pruned = pruned_by("heads", "llama").model
    with torch.no_grad():
        compiled = torch.compile(pruned, backend="aot_eager", fullgraph=True)(**inputs("llama"), use_cache=False)[0]
    assert_equal(output(pruned, "llama"), compiled, pruned)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BY_DAY, *(pytest.param(name, marks=pytest.mark.nightly) for name in BY_NIGHT)])
def test_exports_again(name):
    cache = {"use_cache": False} if name in (*DECODERS, "t5") else {}
    pruned = pruned_by("heads", name).model
    program = torch.export.export(pruned, (), {**inputs(name), **cache})
    other = {**inputs(name, seed=1), **cache}
    with torch.no_grad():
        assert_equal(pruned(**other)[0], program.module()(**other)[0], pruned)


@pytest.mark.slow
def test_exports_to_onnx(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    pruned = pruned_by("heads", "llama").model
    with torch.no_grad():
        kwargs = {**inputs("llama"), "use_cache": False}
        torch.onnx.export(pruned, (), tmp_path / "model.onnx", kwargs=kwargs, dynamo=True)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    exported = session.run(None, {key: x.numpy() for key, x in inputs("llama").items()})[0]
    assert_equal(output(pruned, "llama"), torch.from_numpy(exported), pruned)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_on_a_gpu_as_on_a_cpu(name):
    model, batch = family(name), {key: x.cuda() for key, x in inputs(name).items()}
    if name == "bert":
        batch["labels"] = torch.tensor([0, 1, 1]).cuda()
    on_cpu = transformers.head_importance(model, [{key: x.cpu() for key, x in batch.items()}])
    on_gpu = transformers.head_importance(model.cuda(), [batch])
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-6)
    for method in ("entropy", "ablation"):
        assert transformers.head_importance(model, [batch], method).device.type == "cpu"
    assert transformers.prune_heads(model, heads_to_remove(name)).report.equal
    assert transformers.prune_ffn(model, 0.3, criterion="wanda", batches=[batch]).report.equal
    assert depth.layer_importance(model, [batch]).shape == (3,)
    pruned = depth.prune_layers(model, [1])
    assert pruned.report.equal and next(pruned.model.parameters()).is_cuda


# --- errors -----------------------------------------------------------------------------------------------------------


def heads(name, chosen):
    return lambda: transformers.prune_heads(family(name), chosen)


def neurons(**options):
    return lambda: transformers.prune_ffn(family("bert"), **{"ratio": 0.5, **options})


BARE, X = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), {"input": torch.ones(3, 4)}
REFUSALS: Refusals = {
    "no layer 3": heads("bert", {3: [0]}),
    "head 4": heads("bert", {0: [4]}),
    "head True": heads("bert", {0: [True]}),
    "all of its 4 heads": heads("bert", {0: [0, 1, 2, 3, 3]}),
    "names no head": heads("bert", {}),
    "must be {layer": heads("bert", [0, 1]),
    "[1, 2] would stay: remove whole groups": heads("llama", {0: [1]}),
    "in one matrix: remove whole groups": heads("falcon", {0: [0, 2]}),
    "attentions [3, 5] share their position biases": heads("t5", {3: [1], 5: [2]}),
    **{
        f"ratio is {wrong!r}, but it must be a number from 0 to 1": neurons(ratio=wrong)
        for wrong in (-0.1, 1.5, math.nan, True, "half")
    },
    "leaves none of the 24 neurons": neurons(ratio=1.0),
    "no criterion 'L1'": neurons(criterion="L1"),
    "give batches": neurons(criterion="wanda"),
    "round_to is 0": neurons(round_to=0),
    "no attention heads": lambda: transformers.prune_heads(BARE, {0: [0]}, kwargs=X),
    "no feed-forward network": lambda: transformers.prune_ffn(BARE, 0.5, kwargs=X),
    "no list of transformer layers": lambda: depth.prune_layers(BARE, [0]),
    "2 lists of layers": lambda: depth.prune_layers(family("t5"), [0]),
}


@refused(REFUSALS)
def test_what_cannot_be_cut_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)


def test_numpy_indices_and_repeated_ones_are_taken():
    import numpy as np

    pruned = transformers.prune_heads(family("bert"), {np.int64(0): np.array([1, 1, 2])})
    assert heads_of(pruned.model) == [2, 4, 4]


class Packed(nn.Module):
    """Queries, keys and values of all heads from one product, told apart before the heads are."""

    def __init__(self):
        super().__init__()
        self.heads, self.qkv, self.out = 4, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1)).unbind(-2)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.mT / 6**0.5).softmax(-1)
        return x + self.out((scores @ v).transpose(1, 2).flatten(2))


def test_heads_of_one_product_for_queries_keys_and_values():
    torch.manual_seed(0)
    pruned = transformers.prune_heads(Packed().eval(), {0: [1]}, kwargs={"x": torch.randn(2, 5, 24)})
    assert pruned.report.equal and pruned.model.heads == 3 and pruned.model.qkv.out_features == 54
