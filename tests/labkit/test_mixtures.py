"""Mixtures of experts: single weights of every expert are counted and pruned, each expert as a weight of its own."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from refusals import check_refusal
from torch import Tensor, nn

from labkit.modules.hessians import expert_inputs
from labkit.modules.weights import prunable
from labkit.pruning import channels, nm, scores, sr_ste, unstructured
from labkit.pruning.sparsegpt import sparsegpt
from labkit.quantization import weight_only

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"vocab_size": 61, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
SIZES |= {"num_local_experts": 4, "num_experts": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")  # the last one keeps [experts, in, out], and has biases


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[name](**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("batched_mm")  # which takes float64 too
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batches(n: int = 2, tokens: int = 24) -> list[Tensor]:
    return list(torch.randint(3, 61, (n, 2, tokens), generator=torch.Generator().manual_seed(1)))


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Every matrix of the blocks, [out, in]: of linear layers, and of every expert. Routers and embeddings are none."""
    found = {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    for name, stack in model.named_parameters():
        if "experts" in name and stack.dim() == 3:
            transposed = model.config.model_type == "gpt_oss"
            found |= {f"{name}[{e}]": x.t() if transposed else x for e, x in enumerate(stack)}
    return {name: x.detach() for name, x in found.items()}


def zeros(matrix: Tensor) -> float:
    return float((matrix == 0).float().mean())


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("scope", unstructured.SCOPES)
def test_half_of_all_weights_is_zero_where_half_is_asked_for(name, scope):
    model = build(name)
    pruned = unstructured.prune(model, 0.5, scope=scope)
    every = torch.cat([x.flatten() for x in [*matrices(pruned).values(), pruned.lm_head.weight.detach()]])
    assert zeros(every) == pytest.approx(0.5, abs=0.001) and unstructured.sparsity(pruned) == zeros(every)
    if scope != "global":
        assert {zeros(x) for x in matrices(pruned).values()} == {0.5}
    if scope == "row":
        assert all(zeros(row) == 0.5 for x in matrices(pruned).values() for row in x)
    names = [key for key, weight in prunable(model).items() if weight.experts]
    assert unstructured.sparsity(unstructured.prune(model, 0.5, ignore=names), ignore=names) == pytest.approx(
        0.5, abs=0.001
    )


def test_an_expert_is_pruned_as_a_weight_of_its_own():
    """An expert with weights a hundred times smaller loses as much as any other, and what the others would alone."""
    model = build("mixtral")
    name = "model.layers.0.mlp.experts.down_proj"
    with torch.no_grad():
        model.get_parameter(name)[1] /= 100
    pruned = unstructured.prune(model, 0.25, scope="layer").get_parameter(name)
    for dense, sparse in zip(model.get_parameter(name), pruned, strict=True):
        threshold = dense.abs().flatten().kthvalue(dense.numel() // 4).values
        assert torch.equal(sparse, dense * (dense.abs() > threshold))


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_expert_keeps_the_pattern(name, method):
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    pruned = nm.prune(model, method=method, batches=None if method == "magnitude" else batches())
    assert all(nm.is_nm(x) and zeros(x) == 0.5 for x in matrices(pruned).values())
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    with torch.no_grad():  # the masks hold
        for parameter in pruned.parameters():
            parameter += 1
        pruned(batches()[0])
    assert all(zeros(x) == 0.5 for x in matrices(pruned).values())


def routed(model: nn.Module, layer: int) -> dict[str, list[Tensor]]:
    """What each expert of a Mixtral's layer reads, {matrix: [tokens, in] for each expert}, worked out by hand."""
    block = model.model.layers[layer].mlp
    reads: list[Tensor] = []
    hook = block.register_forward_pre_hook(lambda _, args: reads.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        for batch in batches():
            model(batch)
    hook.remove()
    x = torch.cat(reads)
    chosen = F.linear(x, block.gate.weight).topk(2).indices
    tokens = [x[[e in row for row in chosen.tolist()]] for e in range(4)]
    experts, hidden = block.experts, []
    for e, t in enumerate(tokens):
        gate, up = (t @ experts.gate_up_proj[e].t()).chunk(2, -1)
        hidden.append((F.silu(gate) * up).detach())
    return {"gate_up_proj": tokens, "down_proj": hidden}


def test_the_norms_of_wanda_are_those_of_the_tokens_that_are_routed_to_an_expert():
    model = build("mixtral").double()
    found = scores.saliency(model, "wanda", batches())
    for layer in range(2):
        for attribute, inputs in routed(model, layer).items():
            name = f"model.layers.{layer}.mlp.experts.{attribute}"
            for e, x in enumerate(inputs):
                expected = model.get_parameter(name)[e].detach().abs() * x.norm(dim=0)
                torch.testing.assert_close(found[name][e], expected, rtol=1e-9, atol=1e-12)
    means = scores.saliency(model, "activation", batches())["model.layers.0.mlp.experts.down_proj"]
    for e, x in enumerate(routed(model, 0)["down_proj"]):
        torch.testing.assert_close(means[e], x.abs().mean(0).expand_as(means[e]), rtol=1e-9, atol=1e-12)


def test_sparsegpt_of_an_expert_is_that_of_its_matrix_and_its_tokens():
    model = build("mixtral").double()
    inputs = routed(model, 0)  # of the first layer: the attention before it is dense in both
    pruned = nm.prune(model, method="sparsegpt", batches=batches())
    for attribute, xs in inputs.items():
        name = f"model.layers.0.mlp.experts.{attribute}"
        for e, x in enumerate(xs):
            expected, _ = sparsegpt(model.get_parameter(name)[e].detach(), x.t() @ x, (2, 4))
            torch.testing.assert_close(pruned.get_parameter(name)[e].detach(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_expert_that_no_token_reaches_is_pruned_by_magnitude_and_said(method):
    model = build("mixtral")
    router = model.model.layers[0].mlp.gate
    router.register_forward_hook(lambda _, args, output: (*output[:2], output[2].clamp(max=2)))
    with pytest.warns(UserWarning, match=r"No token of the batches is routed to 1 of the 4 experts of model.layers.0"):
        pruned = nm.prune(model, method=method, batches=batches())
    name = "model.layers.0.mlp.experts.down_proj"
    dense, sparse = model.get_parameter(name)[3].detach(), pruned.get_parameter(name)[3].detach()
    torch.testing.assert_close(sparse, dense * nm.mask(dense), rtol=1e-5, atol=1e-6)


def test_masks_that_move_reach_experts_and_end_fixed():
    model = sr_ste.prepare(build("gpt_oss"), 2, 4)
    model(batches()[0]).logits.sum().backward()
    fixed = sr_ste.finish(model)
    assert all(nm.is_nm(x) and zeros(x) == 0.5 for x in matrices(fixed).values())


@pytest.mark.parametrize("name", MIXTURES)
def test_quantization_says_that_it_does_not_reach_experts(name):
    model = build(name)
    words = "experts.gate_up_proj is the weight of a ... , but only Linears"
    check_refusal(words, lambda: weight_only.quantize(model, group_size=16), leaves=model)


def test_the_inputs_of_an_expert_are_the_rows_that_are_routed_to_it():
    weight = prunable(build("mixtral"))["model.layers.0.mlp.experts.gate_up_proj"]
    x, chosen = torch.randn(5, 32), torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0], [2, 1]])
    inputs = expert_inputs(weight, x, chosen)
    assert [len(rows) for rows in inputs] == [3, 4, 3, 0]
    assert torch.equal(inputs[2], x[[1, 2, 4]])


def mixtral(**sizes: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES | sizes)).eval()
    return model, torch.randint(3, 61, (2, 5))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_as_many_experts_as_gates_and_values_stay_as_many(implementation):
    model, ids = mixtral(num_local_experts=16, num_experts=16, intermediate_size=8)
    small = channels.prune(model, (), {"input_ids": ids}, ratio=0.5, scope="layer").model
    expected = small(ids).logits
    small.set_experts_implementation(implementation)
    torch.testing.assert_close(small(ids).logits, expected)
    assert small.model.layers[0].mlp.experts.num_experts == 16


def test_experts_of_a_width_that_products_of_groups_refuse_run():
    model, ids = mixtral(intermediate_size=6)
    small = channels.prune(model, (), {"input_ids": ids}, ratio=0.5, scope="layer").model
    assert small.model.layers[0].mlp.experts.down_proj.shape[-1] == 3
    assert small(ids).logits.isfinite().all()
    assert model.config._experts_implementation == "grouped_mm"
