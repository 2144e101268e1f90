"""Pruned transformers of every family: equal to the masked dense model, with a cache, and back from the disk."""

import copy
import functools
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from families import DECODERS, FAMILIES, GROUPED, family, heads_to_remove, inputs
from torch import nn

from labkit import models
from labkit.errors import DataError, InputError
from labkit.pruning import anatomy, depth, pretrained, surgery, transformers
from labkit.pruning.channels import Pruned

EVERY = list(FAMILIES)
WITHOUT_DEPTH = ("t5",)  # two stacks
WITHOUT_WIDTH = ("minilm", "t5")  # the width is what they give
KINDS = {
    "heads": lambda model, name: transformers.prune_heads(model, heads_to_remove(name)),
    "ffn": lambda model, name: transformers.prune_ffn(model, 0.3),
    "ffn_global": lambda model, name: transformers.prune_ffn(model, 0.3, scope="global"),
    "width": lambda model, name: transformers.prune_width(model, 0.25),
    "depth": lambda model, name: depth.prune_layers(model, [1]),
}


@functools.cache
def pruned_by(kind: str, name: str) -> Pruned:
    """One for all tests that only read it."""
    return KINDS[kind](family(name), name)


def able(name: str, kind: str) -> bool:
    return not (kind == "depth" and name in WITHOUT_DEPTH) and not (kind == "width" and name in WITHOUT_WIDTH)


def pairs(names: Iterable[str], kinds: Iterable[str]) -> list[tuple[str, str]]:
    return [(name, kind) for name in names for kind in kinds if able(name, kind)]


def masked(model: nn.Module, kept) -> nn.Module:
    """The dense model with zeros where an output or down projection reads what was removed: no help from the tracer."""
    new = copy.deepcopy(model)
    parts = anatomy.anatomy(new)
    for name in [part.output for part in parts.attentions] + [part.down for part in parts.feed_forwards]:
        weight = new.get_submodule(name).weight
        dim = 0 if "Conv1D" in type(new.get_submodule(name)).__name__ else 1
        if (indices := kept.get(f"{name}.weight", {}).get(dim)) is not None:
            gone = torch.ones(weight.shape[dim], dtype=torch.bool)
            gone[indices] = False
            with torch.no_grad():
                weight.index_fill_(dim, gone.nonzero().squeeze(1), 0)
    return new


@torch.no_grad()
def output(model: nn.Module, name: str) -> torch.Tensor:
    return model(**inputs(name))[0]


def assert_equal(a: torch.Tensor, b: torch.Tensor, terms: int) -> None:
    """To rounding: 8 eps sqrt(terms) of the largest value, terms being what is summed on the way to an output."""
    tolerance = 8 * torch.finfo(a.dtype).eps * terms**0.5 * float(a.abs().max())
    assert float((a - b).abs().max()) <= tolerance


def terms(model: nn.Module) -> int:
    return sum(min(x.shape) for x in model.parameters() if x.dim() == 2)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("heads", "sdpa"), ("ffn", "sdpa"), ("ffn_global", "sdpa"), ("heads", "eager"), ("ffn", "eager")],
)
@pytest.mark.parametrize("name", EVERY)
def test_pruned_equals_masked_in_fp32(name, kind, attention):
    model = family(name)
    model.set_attn_implementation(attention)
    pruned = pruned_by(kind, name) if attention == "sdpa" else KINDS[kind](model, name)
    assert pruned.report.equal and pruned.plan.parameters[1] < pruned.plan.parameters[0]
    assert sum(x.numel() for x in pruned.model.parameters()) == pruned.plan.parameters[1]
    dense = output(masked(model, pruned.plan.kept), name)
    assert_equal(dense, output(pruned.model, name), terms(model))
    assert float((dense - output(model, name)).abs().max()) > 1e-3 * float(dense.abs().max())  # something was removed


@pytest.mark.parametrize("name", [name for name in EVERY if able(name, "depth")])
def test_pruned_layers_equal_skipped_ones(name):
    model = family(name)
    pruned = pruned_by("depth", name)
    assert pruned.report.equal and pruned.report.tolerance == 0
    with depth.skipping([model.get_submodule(anatomy.stack(model))[1]]):
        expected = output(model, name)
    assert torch.equal(expected, output(pruned.model, name))
    assert not torch.equal(expected, output(model, name))


@pytest.mark.parametrize("name", [name for name in EVERY if able(name, "width")])
def test_pruned_width_is_proved_and_the_same_in_every_layer(name):
    pruned = pruned_by("width", name)
    assert pruned.report.equal
    assert output(pruned.model, name).isfinite().all()
    up = anatomy.feed_forwards(pruned.model)[-1].up
    module = pruned.model.get_submodule(up)
    assert module.weight.shape[1 - anatomy.out_dim(module)] == 24


@pytest.mark.parametrize(("name", "kind"), pairs([*DECODERS, "t5"], KINDS))
def test_generation_with_a_cache_equals_that_without(name, kind):
    pruned = pruned_by(kind, name).model
    prompt = {"input_ids": inputs(name)["input_ids"][:1], "attention_mask": torch.ones(1, 9, dtype=torch.int64)}
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with models.quietly():
        cached = pruned.generate(**prompt, **options, use_cache=True)
        plain = pruned.generate(**prompt, **options, use_cache=False)
    assert cached.shape[1] >= 6 and torch.equal(cached, plain)


def test_cache_shrinks_with_its_kv_heads():
    pruned = transformers.prune_heads(family("llama"), {layer: [2, 3] for layer in range(3)}).model
    with torch.no_grad():
        cache = pruned(**inputs("llama"), use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == [1, 1, 1]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5"])
def test_input_model_stays_as_it_was(name):
    model = family(name)
    model.train()
    next(iter(model.parameters())).requires_grad_(False)
    weights = {key: x.clone() for key, x in model.state_dict().items()}
    config, written = copy.deepcopy(model.config.to_dict()), str(model)
    for kind in KINDS:
        if able(name, kind):
            pruned = KINDS[kind](model, name)
            assert pruned.model is not model and all(module.training for module in pruned.model.modules())
            assert not next(iter(pruned.model.parameters())).requires_grad
    assert model.config.to_dict() == config and str(model) == written
    assert all(torch.equal(x, weights[key]) for key, x in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_around_it_changes_nothing(kind):
    expected = output(pruned_by(kind, "llama").model, "llama")
    model, batches = family("llama"), [inputs("llama")]
    with torch.inference_mode():
        pruned = KINDS[kind](model, "llama")
        scores = transformers.head_importance(model, batches)
    assert pruned.report.equal and torch.equal(output(pruned.model, "llama"), expected)
    assert not any(x.is_inference() for x in pruned.model.parameters())
    assert torch.equal(scores, transformers.head_importance(model, batches))


# --- config and disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), pairs(EVERY, ["ffn", "depth"]))
def test_config_says_it_where_all_layers_agree(name, kind, tmp_path):
    pruned = pruned_by(kind, name).model
    with models.quietly():
        pruned.save_pretrained(tmp_path)
        again = type(pruned).from_pretrained(tmp_path)
    assert torch.equal(output(pruned, name), output(again.eval(), name))


@pytest.mark.parametrize("name", [*GROUPED, "gemma", "vit", "t5"])
def test_config_has_the_number_of_heads_where_the_architecture_can_be_built_so(name, tmp_path):
    heads = [1, 3] if name in GROUPED else [1]
    model = family(name)
    pruned = transformers.prune_heads(model, {i: heads for i in range(len(anatomy.attentions(model)))}).model
    assert pruned.config.num_attention_heads == 4 - len(heads)
    with models.quietly():
        pruned.save_pretrained(tmp_path)
        again = type(pruned).from_pretrained(tmp_path)
    assert torch.equal(output(pruned, name), output(again.eval(), name))


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "opt"])
def test_config_is_left_where_head_size_is_width_by_heads(name):
    pruned = transformers.prune_heads(family(name), {layer: [1] for layer in range(3)}).model
    assert pruned.config.num_attention_heads == 4
    assert [part.heads for part in anatomy.attentions(pruned)] == [3, 3, 3]


def test_layer_types_follow_the_layers_that_stay():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = dict(vocab_size=61, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24)
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = Qwen2ForCausalLM(
        Qwen2Config(**sizes, num_hidden_layers=4, layer_types=kinds, use_sliding_window=True, sliding_window=4)
    ).eval()
    pruned = depth.prune_layers(model, [0, 2])
    assert pruned.model.config.layer_types == ["sliding_attention"] * 2 and pruned.report.equal
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    ids = inputs("qwen2")["input_ids"][:1]
    with models.quietly():
        cached, plain = (pruned.model.generate(ids, **options, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, plain)


CHILD = """
import json, sys, torch
from safetensors.torch import load_file
from labkit.pruning import transformers
different = []
for folder in json.loads(sys.argv[1]):
    model = transformers.load(folder).model
    given = load_file(folder + "/given.safetensors")
    wanted = given.pop("wanted")
    with torch.no_grad():
        if not torch.equal(model(**given)[0], wanted):
            different.append(folder)
print(json.dumps(different))
"""


def test_saved_models_give_the_same_logits_in_a_new_process(tmp_path):
    from safetensors.torch import save_file

    folders = []
    for name, kind in pairs(EVERY, KINDS):
        pruned = pruned_by(kind, name)
        folders.append(str(tmp_path / f"{name}-{kind}"))
        transformers.save(pruned, folders[-1])
        save_file({**inputs(name), "wanted": output(pruned.model, name)}, f"{folders[-1]}/given.safetensors")
    command = [sys.executable, "-c", CHILD, json.dumps(folders)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_several_prunings_and_a_changed_weight_come_back(name, tmp_path):
    model = family(name)
    for kind in ("heads", "ffn_global", "depth", "width"):
        model = KINDS[kind](model, name).model
        if kind == "heads":  # what is removed next is counted in the model that is there
            assert anatomy.attentions(model)[0].heads < 4
    with torch.no_grad():
        next(iter(model.parameters())).mul_(1.01)
    transformers.save(model, tmp_path)
    again = transformers.load(tmp_path).model
    assert torch.equal(output(model, name), output(again, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_comes_back(dtype, tmp_path):
    pruned = transformers.prune_heads(family("llama").to(dtype), {0: [0, 1]})
    transformers.save(pruned, tmp_path)
    assert {x.dtype for x in transformers.load(tmp_path).model.parameters()} == {dtype}


def test_damaged_or_missing_files_are_told(tmp_path):
    with pytest.raises(DataError, match="save it again"):
        transformers.load(tmp_path)
    transformers.save(transformers.prune_ffn(family("bert"), 0.5), tmp_path)
    (tmp_path / surgery.WEIGHTS).write_bytes(b"0" * 100)
    with pytest.raises(DataError, match="damaged"):
        transformers.load(tmp_path)


def test_what_is_no_model_of_transformers_is_not_saved(tmp_path):
    with pytest.raises(InputError, match=r"surgery\.save"):
        pretrained.save(nn.Linear(2, 2), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- torchvision, compile, export -------------------------------------------------------------------------------------


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(16, 8, 3, 4, 32, 24, num_classes=5).eval()


def test_torchvision_vit_loses_neurons_and_layers_but_not_heads():
    model = torchvision_vit()
    image = {"x": torch.randn(2, 3, 16, 16)}
    assert transformers.prune_ffn(model, 0.5, kwargs=image).report.equal
    assert depth.prune_layers(model, [0], kwargs=image).report.equal
    with pytest.raises(InputError, match="no attention heads that labkit knows"):
        transformers.prune_heads(model, {0: [0]}, kwargs=image)
    with pytest.raises(InputError, match="give kwargs"):
        transformers.prune_ffn(model, 0.5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_compiles_whole(name):
    pruned = pruned_by("heads", name).model
    given = inputs(name)
    with torch.no_grad():
        compiled = torch.compile(pruned, backend="aot_eager", fullgraph=True)(**given, use_cache=False)[0]
    assert_equal(output(pruned, name), compiled, terms(pruned))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_exports(name):
    pruned = pruned_by("heads", name).model
    given = {**inputs(name), "use_cache": False} if name == "llama" else inputs(name)
    with torch.no_grad():
        exported = torch.export.export(pruned, (), given)
        assert_equal(output(pruned, name), exported.module()(**given)[0], terms(pruned))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_exports_to_onnx(name, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    pruned = pruned_by("heads", name).model
    given = inputs(name)
    kwargs = {**given, "use_cache": False} if name == "llama" else given
    with torch.no_grad():
        torch.onnx.export(pruned, (), tmp_path / "model.onnx", kwargs=kwargs, dynamo=True)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {key: x.numpy() for key, x in given.items()})[0]
    assert_equal(output(pruned, name), torch.from_numpy(found), terms(pruned))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_on_a_gpu_as_on_a_cpu(name):
    model, batch = family(name), {key: x.cuda() for key, x in inputs(name).items()}
    if name == "bert":
        batch["labels"] = torch.tensor([0, 1, 1]).cuda()
    on_cpu = transformers.head_importance(model, [{key: x.cpu() for key, x in batch.items()}])
    on_gpu = transformers.head_importance(model.cuda(), [batch])
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-6)
    for method in ("entropy", "gate", "ablation"):
        assert transformers.head_importance(model, [batch], method).device.type == "cpu"
    assert transformers.prune_heads(model, heads_to_remove(name)).report.equal
    assert transformers.prune_ffn(model, 0.3, criterion="wanda", batches=[batch]).report.equal
    assert depth.layer_importance(model, [batch]).shape == (3,)
    pruned = depth.prune_layers(model, [1])
    assert pruned.report.equal and next(pruned.model.parameters()).is_cuda


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({3: [0]}, "no layer 3"),
        ({-1: [0]}, "no layer -1"),
        ({0: [4]}, "head 4"),
        ({0: [-1]}, "head -1"),
        ({0: [True]}, "head True"),
        ({0: [0, 1, 2, 3]}, "all of its 4 heads"),
        ({0: [0, 1, 2, 3, 3]}, "all of its 4 heads"),
        ({}, "names no head"),
        ({0: []}, "names no head"),
        ([0, 1], "must be {layer"),
    ],
)
def test_bad_heads_are_told(heads, message):
    with pytest.raises(InputError, match=message):
        transformers.prune_heads(family("bert"), heads)


def test_numpy_indices_and_repeated_ones_are_taken():
    import numpy as np

    pruned = transformers.prune_heads(family("bert"), {np.int64(0): np.array([1, 1, 2])})
    assert anatomy.attentions(pruned.model)[0].heads == 2


def test_uneven_query_heads_are_told_what_is_possible():
    with pytest.raises(InputError, match=r"\[1, 2\] would stay: remove whole groups"):
        transformers.prune_heads(family("llama"), {0: [1]})
    with pytest.raises(InputError, match="share their position biases"):
        transformers.prune_heads(family("t5"), {0: [1]})


def test_models_without_heads_neurons_or_layers_are_told():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(InputError, match="no attention heads"):
        transformers.prune_heads(model, {0: [0]})
    with pytest.raises(InputError, match="no feed-forward network"):
        transformers.prune_ffn(model, 0.5)
    with pytest.raises(InputError, match="no list of transformer layers"):
        depth.prune_layers(model, [0])
    with pytest.raises(InputError, match="2 lists of layers"):
        depth.prune_layers(family("t5"), [0])
    with pytest.raises(InputError, match="cannot shrink"):
        transformers.prune_width(family("minilm"), 0.5)


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan"), True, "half"])
def test_bad_ratios_are_told(ratio):
    with pytest.raises(InputError, match="must be a number from 0 to 1"):
        transformers.prune_ffn(family("bert"), ratio)
    with pytest.raises(InputError, match="must be a number from 0 to 1"):
        transformers.prune_width(family("bert"), ratio)
