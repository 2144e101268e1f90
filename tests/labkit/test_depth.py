"""Layer importance against a loop over tokens, and models that lost layers: the same logits, a cache that fits."""

from functools import partial

import pytest
import torch
from families import batches, family, inputs, mean_loss
from refusals import Refusals, check_refusal, refused
from torch import Tensor, nn

from labkit.data import models
from labkit.graph import anatomy, surgery
from labkit.pruning import depth, transformers

DISTANCES = ("cosine", "angular", "l2")


def by_tokens(model: nn.Module, data: list[dict[str, Tensor]], n: int, distance) -> Tensor:
    """Mean distance of every block's input and output, token by token, from the model's own hidden states."""
    values: list[list[float]] = []
    for batch in data:
        with torch.no_grad():
            given = {key: x for key, x in batch.items() if key != "labels"}
            states = model.base_model(**given, output_hidden_states=True).hidden_states
        for i, mask in enumerate(batch["attention_mask"]):
            for t in range(int(mask.sum())):
                vectors = [x[i, t] for x in states]
                values.append([distance(x, y) for x, y in zip(vectors, vectors[n:], strict=False)])
    return torch.tensor(values, dtype=torch.float64).mean(0)


def angle(x: Tensor, y: Tensor) -> float:
    return float(torch.acos(torch.dot(x, y) / x.norm() / y.norm()) / torch.pi)


@pytest.mark.parametrize("n", [1, 2])
def test_distances_are_means_over_valid_tokens(n):
    model = family("bert").double()  # whose last hidden state is the last layer's output
    data = batches("bert")
    found = {method: depth.layer_importance(model, data, method, n=n) for method in DISTANCES}
    assert all(x.shape == (4 - n,) and x.dtype == torch.float64 for x in found.values())
    cosine = by_tokens(model, data, n, lambda x, y: 1 - float(torch.dot(x, y) / x.norm() / y.norm()))
    torch.testing.assert_close(found["cosine"], cosine)
    torch.testing.assert_close(found["angular"], by_tokens(model, data, n, angle))
    torch.testing.assert_close(found["l2"], by_tokens(model, data, n, lambda x, y: float((y - x).norm() / x.norm())))


@pytest.mark.parametrize("method", depth.METHODS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_importance_depends_neither_on_padding_nor_on_how_batches_are_cut(name, method):
    model = family(name).double()
    whole = depth.layer_importance(model, batches(name, 6), method)
    for other in (batches(name, 1), iter(batches(name, 4, pad=4))):
        torch.testing.assert_close(depth.layer_importance(model, other, method), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", depth.METHODS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_every_method_and_a_model_that_stays_as_it_was(name, method):
    model = family(name).train()
    data = [{**inputs("vit"), "labels": torch.tensor([0, 1])}] if name == "vit" else batches(name)
    found = depth.layer_importance(model, data, method)
    assert found.shape == (3,) and found.isfinite().all()
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", depth.METHODS)
def test_every_valid_token_counts_once(method):
    """Also where a batch has one, a last one that differs in length, or none."""
    model = family("llama").double()
    ids = torch.randint(3, 61, (1, 2), generator=torch.Generator().manual_seed(0))
    single = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1]])}  # one predicted token
    whole = depth.layer_importance(model, [single], method)
    padded = {"input_ids": ids.repeat(2, 1), "attention_mask": torch.tensor([[1, 1], [0, 0]])}
    torch.testing.assert_close(depth.layer_importance(model, [padded], method), whole)
    torch.testing.assert_close(depth.layer_importance(model, [single, single], method), whole)
    assert float(whole.abs().min()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_loss_is_that_of_the_model_without_the_block(n):
    model, data = family("gpt2").double(), batches("gpt2")
    found = depth.layer_importance(model, data, "loss", n=n)
    for first in range(4 - n):
        pruned = depth.prune_layers(model, range(first, first + n)).model
        assert float(found[first]) == pytest.approx(mean_loss(pruned, data) - mean_loss(model, data), rel=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "falcon", "neox", "gpt_neo"])
def test_layers_are_numbered_anew_and_the_cache_has_one_entry_a_layer(name):
    pruned = depth.prune_layers(family(name), [0, 1])
    model = pruned.model
    assert model.config.num_hidden_layers == 1
    counter = "layer_id" if name == "gpt_neo" else "layer_idx"
    numbers = {getattr(m, counter) for m in model.modules() if counter in vars(m)}
    assert numbers == {0}
    with torch.no_grad():
        cache = model(**inputs(name), use_cache=True).past_key_values
    assert len(cache.layers) == 1


def test_plan_tells_what_is_gone():
    model = family("llama")
    plan = depth.prune_layers(model, [2, 0]).plan
    dense = dict(model.named_parameters())
    gone = {name for name in dense if name.startswith(("model.layers.0.", "model.layers.2."))}
    assert plan.kept.keys() == gone and all(len(dims[0]) == 0 for dims in plan.kept.values())
    assert plan.attributes == {"model.layers.1.self_attn": {"layer_idx": 0}}
    assert plan.parameters[0] - plan.parameters[1] == sum(dense[name].numel() for name in gone)
    assert plan.units[0].removed == 2 and plan.units[0].units == 3 and 0 < plan.macs[1] < plan.macs[0]


def test_heads_and_layers_in_a_row():
    model = transformers.prune_heads(family("llama"), {0: [0, 1], 2: [1, 3]}).model
    pruned = depth.prune_layers(model, [1])
    assert pruned.report.equal
    assert [part.heads for part in anatomy.attentions(pruned.model)] == [2, 2]


@pytest.mark.parametrize("name", ["llama", "modernbert"])  # no config says that ModernBERT's first layer is gone
def test_models_that_lost_layers_are_saved_and_loaded(name, tmp_path):
    heads = transformers.prune_heads(family(name), {0: [0, 1], 2: [1, 3]})
    layers = depth.prune_layers(heads.model, [0])
    surgery.save(layers.model, [heads.plan, layers.plan], tmp_path / "model")
    loaded = surgery.load(family(name), tmp_path / "model")
    assert loaded.config.num_hidden_layers == 2 and str(loaded) == str(layers.model)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs(name))[0], layers.model(**inputs(name))[0])
    call = partial(surgery.save, heads.model, [heads.plan, layers.plan], tmp_path / "model")
    check_refusal("layers' is not what the last plan left of it", call)


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


def test_a_layer_that_changes_the_width_cannot_go():
    class Narrowing(nn.Module):
        def __init__(self, *widths):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(n, n), nn.Linear(n, m)) for n, m in widths)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Narrowing((8, 8), (8, 4), (4, 4)), {"x": torch.randn(2, 8)}
    assert depth.prune_layers(model, [0, 2], kwargs=x).report.equal
    call = partial(depth.prune_layers, model, [1], kwargs=x, check=False)
    check_refusal("do not fit together", call, leaves=model)


# --- refusals ---------------------------------------------------------------------------------------------------------

LLAMA, BERT, DATA = family("llama"), family("bert"), batches("bert")
REFUSALS: Refusals = {
    "no layer 3": lambda: depth.prune_layers(LLAMA, [3]),
    "no layer -1": lambda: depth.prune_layers(LLAMA, [-1]),
    "no layer True": lambda: depth.prune_layers(LLAMA, [True]),
    "no layer 1.0": lambda: depth.prune_layers(LLAMA, [1.0]),
    "name at least one": lambda: depth.prune_layers(LLAMA, []),
    "leave at least one": lambda: depth.prune_layers(LLAMA, [0, 1, 2]),
    "no method 'mse'": lambda: depth.layer_importance(BERT, DATA, "mse"),
    "n is 0": lambda: depth.layer_importance(BERT, DATA, n=0),
    "n is 4": lambda: depth.layer_importance(BERT, DATA, n=4),
    "n is True": lambda: depth.layer_importance(BERT, DATA, n=True),
    "batches is empty": lambda: depth.layer_importance(BERT, []),
    "no list of transformer layers": lambda: depth.layer_importance(nn.Linear(2, 2), [torch.ones(1, 2)]),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence_and_the_model_keeps_its_layers(words, call):
    config = LLAMA.config.to_dict()
    check_refusal(words, call, leaves=LLAMA)
    assert LLAMA.config.to_dict() == config
