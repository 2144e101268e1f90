"""Importance of heads against slow references and true removal, and lists of the lowest that have the asked length."""

import gc
import weakref
from functools import partial

import pytest
import torch
from families import batches, family, inputs, mean_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Refusals, check_refusal, refused
from torch import Tensor, nn

from labkit.graph import anatomy
from labkit.modules.batches import evaluating
from labkit.modules.losses import summed_loss
from labkit.pruning import heads, transformers

CLASSIFIER, DECODER = "bert", "llama"


def doubled(name: str) -> nn.Module:
    return family(name).double()


@torch.no_grad()
def attention_maps(model: nn.Module, batch) -> list[Tensor]:
    """The attention probabilities of every layer, [B, heads, queries, keys] each, as the scores see them."""
    maps = {}
    with evaluating(model, seed=0), heads._observing(model, anatomy.attentions(model), maps.__setitem__):
        model(**batch)
    return [maps[i] for i in sorted(maps)]


@pytest.mark.slow
@pytest.mark.parametrize("method", heads.METHODS)
@pytest.mark.parametrize("name", [CLASSIFIER, DECODER])
def test_score_depends_neither_on_padding_nor_on_how_batches_are_cut(name, method):
    model = doubled(name)
    whole = heads.head_importance(model, batches(name, 6), method)
    assert whole.shape == (3, 4) and whole.dtype == torch.float64 and not whole.requires_grad
    for other in (batches(name, 1), iter(batches(name, 4, pad=5))):
        torch.testing.assert_close(heads.head_importance(model, other, method), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", [CLASSIFIER, "gpt2"])  # float64 all the way; Llama's norms go down to float32
def test_taylor_is_the_slope_of_the_loss_of_each_example(name):
    model, step = doubled(name), 1e-5
    parts = anatomy.attentions(model)
    total, terms = torch.zeros(3, 4, dtype=torch.float64), 0
    for batch in batches(name, 1):
        terms += summed_loss(model, batch)[1]
        for layer in range(3):
            for head in range(4):
                ends = []
                for sign in (1, -1):
                    z = torch.ones(3, 4, dtype=torch.float64)
                    z[layer, head] += sign * step
                    with torch.no_grad(), heads.scaling(model, parts, z):
                        ends.append(summed_loss(model, batch)[0])
                total[layer, head] += ((ends[0] - ends[1]) / (2 * step)).abs()
    torch.testing.assert_close(heads.head_importance(model, batches(name)), total / terms, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", [CLASSIFIER, "gpt2"])
def test_ablation_is_the_loss_of_the_model_that_is_really_pruned(name):
    model = doubled(name)
    data = batches(name)
    found = heads.head_importance(model, data, "ablation")
    for layer, head in ((0, 1), (2, 3)):
        pruned = transformers.prune_heads(model, {layer: [head]}).model
        lost = mean_loss(pruned, data) - mean_loss(model, data)
        assert float(found[layer, head]) == pytest.approx(lost, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt", "llama", "t5"])
def test_maps_are_probabilities_of_the_right_keys_with_sdpa_too(name):
    model = family(name)
    config = model.config.to_dict()
    assert model.config._attn_implementation == "sdpa"
    maps = attention_maps(model, inputs(name))
    assert len(maps) == len(anatomy.attentions(model))
    for a in maps:
        torch.testing.assert_close(a.sum(-1), torch.ones(a.shape[:-1]))
    if name != "t5":
        valid = inputs(name)["attention_mask"].bool()
        assert all((a.transpose(1, 3)[~valid][:, :, 0] == 0).all() for a in maps)  # no one attends to padding
    assert model.config._attn_implementation == "sdpa" and model.config.to_dict() == config
    model.set_attn_implementation("eager")
    for a, b in zip(maps, attention_maps(model, inputs(name)), strict=True):
        assert torch.equal(a, b)


def test_what_is_no_probability_is_refused():
    model = family("bert")
    model.set_attn_implementation("eager")
    layer = model.bert.encoder.layer[1].attention.self
    layer.register_forward_hook(lambda module, args, output: (output[0], output[1] - 0.5))  # as biases would be
    call = partial(heads.head_importance, model, [inputs("bert")], "entropy")
    check_refusal("layer.1.attention.self gives no attention probabilities", call)


def test_probabilities_are_those_that_the_output_is_made_of():
    model = family("bert")
    layer = model.bert.encoder.layer[0].attention
    seen = {}
    layer.self.value.register_forward_hook(lambda m, a, out: seen.update(value=out))
    layer.output.dense.register_forward_pre_hook(lambda m, a: seen.update(context=a[0]))
    a = attention_maps(model, inputs("bert"))[0]
    value = seen["value"].unflatten(-1, (4, 8)).transpose(1, 2)  # [B, heads, T, size]
    torch.testing.assert_close((a @ value).transpose(1, 2).flatten(2), seen["context"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [CLASSIFIER, DECODER])
def test_entropy_and_confidence_against_a_loop(name):
    model = doubled(name)
    sums, count = torch.zeros(2, 3, 4, dtype=torch.float64), 0
    for batch in batches(name):
        maps = attention_maps(model, batch)
        for i, mask in enumerate(batch["attention_mask"]):
            length = int(mask.sum())
            for q in range(length):
                keys = q + 1 if name == DECODER else length
                if keys == 1:
                    continue
                count += 1
                for layer, a in enumerate(maps):
                    p = a[i, :, q, :keys]
                    entropy = -(p * p.log()).sum(-1)
                    sums[:, layer] += torch.stack([1 - entropy / torch.tensor(keys).log(), p.max(-1).values])
    for method, expected in zip(("entropy", "confidence"), sums / count, strict=True):
        found = heads.head_importance(model, batches(name), method)
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)


def test_a_focused_head_that_writes_nothing_is_top_by_entropy_and_zero_by_ablation():
    model = doubled("bert")
    attention = model.bert.encoder.layer[1].attention
    with torch.no_grad():
        attention.self.query.weight[:8] *= 50
        attention.output.dense.weight[:, :8] = 0
    entropy, ablation, taylor = (
        heads.head_importance(model, batches("bert"), method) for method in ("entropy", "ablation", "taylor")
    )
    assert entropy.argmax() == 4  # layer 1, head 0
    assert ablation[1, 0] == 0 and taylor[1, 0] == 0


@pytest.mark.parametrize("method", heads.METHODS)
def test_model_stays_as_it_was(method):
    model = family("bert").train()
    model.bert.embeddings.requires_grad_(False)
    trained = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    heads.head_importance(model, batches("bert"), method)
    assert all(module.training for module in model.modules()) and torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(
        p.grad is None and not module._forward_pre_hooks for module in model.modules() for p in model.parameters()
    )
    check_refusal("batches is empty", partial(heads.head_importance, model, [], method), leaves=model)
    assert all(module.training for module in model.modules())


@pytest.mark.slow
def test_frozen_models_and_pruned_ones_have_importances_too():
    model = doubled("bert")
    whole = heads.head_importance(model, batches("bert"))
    assert torch.equal(heads.head_importance(model.requires_grad_(False), batches("bert")), whole)
    pruned = transformers.prune_heads(model, {1: [0, 2]}).model
    for method in ("taylor", "entropy", "ablation"):
        found = heads.head_importance(pruned, batches("bert"), method)
        assert found.shape == (3, 4) and found[1, 2:].isnan().all() and found.isnan().sum() == 2
    assert transformers.prune_heads(pruned, heads.lowest_heads(found, 7)).report.equal


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "t5"])
@pytest.mark.parametrize("method", ["taylor", "ablation", "entropy", "confidence"])
def test_images_and_encoder_decoders(name, method):
    batch = {**inputs(name), "labels": torch.tensor([0, 1]) if name == "vit" else torch.randint(3, 61, (3, 5))}
    batch.pop("decoder_input_ids", None)
    if name == "t5" and method in ("entropy", "confidence"):
        batch["decoder_input_ids"] = batch.pop("labels")
    found = heads.head_importance(family(name), [batch], method)
    assert found.shape == (len(anatomy.attentions(family(name))), 4) and found.isfinite().all()


def test_a_decoders_batches_may_be_plain_tokens_with_its_own_as_labels():
    model = doubled("gpt2")
    data = [batch["input_ids"] for batch in batches("gpt2")]
    found = heads.head_importance(model, data)
    torch.testing.assert_close(heads.head_importance(model, [(ids,) for ids in data]), found)
    named = [{"input_ids": ids, "labels": ids} for ids in data]
    torch.testing.assert_close(heads.head_importance(model, named), found)


def test_loss_fn_takes_the_place_of_the_models_own():
    model = doubled("bert")
    own = heads.head_importance(model, batches("bert"))
    data = [{key: x for key, x in batch.items() if key != "labels"} for batch in batches("bert")]
    wanted = [batch["labels"] for batch in batches("bert")]
    lookup = {tuple(b["input_ids"].flatten().tolist()): y for b, y in zip(data, wanted, strict=True)}

    def loss_fn(output, batch):
        return nn.functional.cross_entropy(output.logits, lookup[tuple(batch["input_ids"].flatten().tolist())])

    torch.testing.assert_close(heads.head_importance(model, data, loss_fn=loss_fn), own)


@pytest.mark.parametrize("method", heads.METHODS)
def test_batches_are_let_go_one_by_one_and_with_them_their_graphs(method):
    """A graph that is kept keeps its batch: the embedding's backward pass needs the token ids."""
    alive = []
    model = family(CLASSIFIER)
    gc.freeze()  # else each collection below searches all that was imported

    def stream():
        for batch in batches(CLASSIFIER, 1):
            gc.collect()
            assert sum(ids() is not None for ids in alive) <= 2  # the first one tells where the heads are, and is kept
            tokens = batch["input_ids"].clone()
            alive.append(weakref.ref(tokens))
            yield {**batch, "input_ids": tokens}
            del tokens

    heads.head_importance(model, stream(), method)
    assert len(alive) == 6


# --- lowest_heads -----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 6))
def test_exactly_n_heads_go_ties_included_and_one_stays_in_each_layer(data, layers, number):
    values = data.draw(st.lists(st.integers(0, 3), min_size=layers * number, max_size=layers * number))
    importance = torch.tensor(values, dtype=torch.float64).view(layers, number)
    n = data.draw(st.integers(1, layers * number))
    if n > layers * (number - 1):
        check_refusal(f"from 1 to {layers * (number - 1)} heads can go", partial(heads.lowest_heads, importance, n))
        return
    lowest = heads.lowest_heads(importance, n)
    assert sum(len(gone) for gone in lowest.values()) == n == len({(k, h) for k, gone in lowest.items() for h in gone})
    assert all(len(gone) < number for gone in lowest.values())
    for layer in range(layers):  # within a layer nothing that stays is lower than something that goes
        gone = lowest.get(layer, [])
        stays = [h for h in range(number) if h not in gone]
        if gone:
            assert importance[layer, gone].max() <= importance[layer, stays].min()


def test_what_a_layer_may_not_give_the_next_lowest_of_the_others_gives():
    importance = torch.arange(24.0).view(6, 4)  # the lowest six lie in layers 0 and 1
    assert heads.lowest_heads(importance, 6) == {0: [0, 1, 2], 1: [0, 1, 2]}
    importance[0, 1:] = torch.nan  # a layer with a single head
    assert heads.lowest_heads(importance, 4) == {1: [0, 1, 2], 2: [0]}


# --- refusals ---------------------------------------------------------------------------------------------------------

BERT, DATA = family("bert"), batches("bert")
HEADS_INSIDE = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # its projection is no module to be hooked
REFUSALS: Refusals = {
    "no method 'lrp'": lambda: heads.head_importance(BERT, DATA, "lrp"),
    "needs a loss": lambda: heads.head_importance(family("minilm"), [inputs("minilm")]),
    "put it in a list": lambda: heads.head_importance(BERT, DATA[0]),
    "Linear has no attention heads": lambda: heads.head_importance(nn.Linear(2, 2), [torch.ones(1, 2)], "entropy"),
    "TransformerEncoderLayer has no attention heads": lambda: heads.head_importance(
        HEADS_INSIDE, [torch.ones(1, 3, 8)], "taylor", loss_fn=lambda y, x: y.mean()
    ),
    "must be [layers, heads]": lambda: heads.lowest_heads(torch.ones(4), 1),
    "n is 0": lambda: heads.lowest_heads(torch.ones(2, 4), 0),
    "n is 1.5": lambda: heads.lowest_heads(torch.ones(2, 4), 1.5),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call, leaves=BERT)
