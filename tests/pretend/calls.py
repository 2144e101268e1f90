"""Calls of labkit on small models, with answers that every device gives alike: CALLS, {name: function of a Device}."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import families
import llamas
import torch
from networks import Residual, randomise_
from torch import Tensor, nn

from labkit import artifact, distillation, training
from labkit.attention import blockwise, mla, speculative
from labkit.attention.cache import POLICIES, EvictingCache, QuantizedCache
from labkit.attention.decoder import Decoder, decoder
from labkit.counting import count
from labkit.deploy import parity, serving
from labkit.modules.losses import batch_loss
from labkit.pruning import blockwise as blockwise_pruning
from labkit.pruning import (
    channels,
    depth,
    heads,
    nm,
    permutation,
    scores,
    sensitivity,
    sparse,
    sparsegpt,
    sr_ste,
    transformers,
    unstructured,
)
from labkit.quantization import (
    affine,
    awq,
    fold,
    formats,
    gptq,
    kv,
    mixed_precision,
    ptq,
    qat,
    rotation,
    rounding,
    weight_only,
)
from labkit.quantization.kv import KVFormat
from labkit.quantization.simulated import weight_grid


class Device:
    """A device that a call gets its models and tensors on, and which remembers them, to see that they stay there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: list[tuple[Tensor, Tensor]] = []  # as handed out, and a copy on the CPU
        self.models: list[nn.Module] = []

    def __call__(self, value: Any) -> Any:
        """Place a tensor, a model, or a list, tuple or dict of them."""
        if isinstance(value, Tensor):
            placed = value.to(self.name)
            self.tensors.append((placed, value.detach().cpu().clone()))
            return placed
        if isinstance(value, nn.Module):
            self.models.append(value.to(self.name))
            return value
        if isinstance(value, dict):
            return {key: self(part) for key, part in value.items()}
        return type(value)(self(part) for part in value)

    def moved(self) -> list[str]:
        """List what is no longer on this device, or no longer holds the numbers that it was handed out with."""
        changed = []
        for number, (tensor, before) in enumerate(self.tensors):
            if tensor.device.type != self.name or not torch.equal(tensor.detach().cpu(), before):
                changed.append(f"tensor {number}")
        for number, model in enumerate(self.models):
            tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            changed += [f"model {number}: {name}" for name, x in tensors.items() if x.device.type != self.name]
        return changed


Call = Callable[[Device], Any]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- convolutions -----------------------------------------------------------------------------------------------------

IMAGES = random(12, 3, 8, 8)
LABELS = torch.arange(12) % 5
LOOK_AT_DATA = ("taylor", "taylor_abs", "obd", "wanda", "activation")  # criteria


def net() -> nn.Module:
    """Three convolutions, one of them past a batch norm and a sum."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise_(Residual()).eval()


def folded() -> nn.Module:
    return fold.fold_batch_norm(net(), IMAGES[:2])


def image_batches() -> list[tuple[Tensor, Tensor]]:
    return [(IMAGES[:6], LABELS[:6]), (IMAGES[6:], LABELS[6:])]


def answers(model: nn.Module, on: Device) -> Tensor:
    return model.eval()(on(IMAGES)).detach()


def _prune_channels(on: Device, criterion: str) -> Tensor:
    batches = {"batches": on(image_batches())} if criterion in LOOK_AT_DATA else {}
    pruned = channels.prune(on(net()), on(IMAGES[:2]), ratio=0.5, criterion=criterion, **batches)
    return answers(pruned.model, on)


def _prune_weights(on: Device, criterion: str) -> Tensor:
    batches = {"batches": on(image_batches())} if criterion in LOOK_AT_DATA else {}
    return answers(unstructured.prune(on(net()), 0.5, criterion=criterion, **batches), on)


def _score_weights(on: Device, criterion: str) -> list[Tensor]:
    table = scores.saliency(on(net()), criterion, on(image_batches()))
    return list(table.values())


def _scan_sensitivity(on: Device) -> list[float]:
    def evaluate(model: nn.Module) -> float:
        return training.accuracy(model, on(image_batches()))

    scan = sensitivity.scan(on(net()), on(IMAGES[:2]), evaluate, [0.5], progress=False)
    return [row.metric for row in scan.rows]


def _train_with_two_four(on: Device) -> Tensor:
    model = sr_ste.prepare(on(net()).train(), ignore=["stem", "conv2", "fc"])
    training.train_(model, on(image_batches()), epochs=1, max_lr=0.01, precision="fp32")
    return answers(sr_ste.finish(model), on)


def _prune_two_four(on: Device) -> Tensor:
    return answers(nm.prune(on(net()), ignore=["stem", "conv2", "fc"]), on)


def _permute(on: Device) -> Tensor:
    return answers(permutation.permute(on(net()), on(IMAGES[:2])), on)


def _calibrate(on: Device, observer: str) -> Tensor:
    return answers(ptq.quantize(on(folded()), [on(IMAGES[:6])], observer=observer).model, on)


def _measure_sensitivity(on: Device) -> list[float]:
    calibrated = ptq.quantize(on(folded()), [on(IMAGES[:6])])
    return [row["db"] for row in mixed_precision.sensitivity(calibrated, [on(IMAGES[:6])], bits=(4,))]


def _train_quantized(on: Device, method: str) -> Tensor:
    model = qat.prepare(on(folded()), [on(IMAGES[:6])], method=method)
    qat.finetune_(model, on(image_batches()), steps=2)
    qat.freeze(model)
    return answers(model, on)


def _fold(on: Device) -> Tensor:
    return answers(fold.fold_batch_norm(on(net()), on(IMAGES[:2])), on)


def _equalize(on: Device) -> Tensor:
    return answers(fold.equalize(on(folded()), on(IMAGES[:2])), on)


def _train(on: Device) -> Tensor:
    model = on(net())
    training.train_(model, on(image_batches()), epochs=1, max_lr=0.01, precision="fp32")
    return answers(model, on)


def _reestimate_norms(on: Device) -> Tensor:
    model = on(net())
    training.reestimate_norms_(model, on(image_batches()))
    return answers(model, on)


def _accuracy(on: Device) -> float:
    return training.accuracy(on(net()), on(image_batches()))


def _distil(on: Device) -> Tensor:
    teacher, student = on(net()), on(randomise_(net(), seed=1))
    loss_fn = distillation.distilling(teacher, alpha=0.5, temperature=2.0)
    training.train_(student, on(image_batches()), epochs=1, max_lr=0.01, precision="fp32", loss_fn=loss_fn)
    return answers(student, on)


def _count(on: Device) -> list[int]:
    work = count(on(net()), on(IMAGES))
    return [work.flops, work.bytes]


# --- language models --------------------------------------------------------------------------------------------------

TOKENS = torch.randint(3, families.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def text_batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": TOKENS}, {"input_ids": TOKENS.flip(1)}]


def bert_batches() -> list[dict[str, Tensor]]:
    return families.batches("bert")


def bert_inputs() -> list[dict[str, Tensor]]:
    return [{key: x for key, x in batch.items() if key != "labels"} for batch in bert_batches()]


def llama_logits(model: nn.Module, on: Device) -> Tensor:
    return model(on(TOKENS)).logits.detach()


def bert_logits(model: nn.Module, on: Device) -> Tensor:
    return model(**on(bert_inputs()[0])).logits.detach()


def _prune_by_block(on: Device, pattern: float | tuple[int, int], method: str) -> Tensor:
    model = on(families.family("llama"))
    return llama_logits(blockwise_pruning.prune(model, pattern, method=method, batches=on(text_batches())), on)


def _importance_of_heads(on: Device, method: str) -> Tensor:
    return heads.head_importance(on(families.family("bert")), on(bert_batches()), method)


def _prune_heads(on: Device) -> Tensor:
    model = transformers.prune_heads(on(families.family("bert")), families.heads_to_remove("bert")).model
    return bert_logits(model, on)


def _prune_neurons(on: Device, criterion: str) -> Tensor:
    model = on(families.family("bert"))
    batches = {"batches": on(bert_batches())} if criterion == "wanda" else {}
    return bert_logits(transformers.prune_ffn(model, 0.3, criterion=criterion, **batches).model, on)


def _importance_of_layers(on: Device, method: str) -> Tensor:
    return depth.layer_importance(on(families.family("llama")), on(text_batches()), method)


def _prune_layers(on: Device) -> Tensor:
    return llama_logits(depth.prune_layers(on(families.family("llama")), [1]).model, on)


def _quantize_weights(on: Device, method: str) -> Tensor:
    batches = {"batches": on(text_batches())} if method in ("gptq", "awq") else {}
    model = on(families.family("llama", width=64, neurons=64))  # which blocks of 64 fill
    model = weight_only.quantize(model, 4, group_size=8, method=method, **batches)
    return llama_logits(model, on)


def _rotate(on: Device) -> Tensor:
    return llama_logits(rotation.rotate(on(families.family("llama"))), on)


def _smooth(on: Device) -> Tensor:
    return bert_logits(fold.smooth(on(families.family("bert")), on(bert_inputs())), on)


def _quantize_keys(on: Device) -> Tensor:
    with kv.quantized(KVFormat(4, 4, "token", "token", group_size=8, window=2)):
        return llama_logits(on(families.family("llama")), on)


def _heal(on: Device) -> Tensor:
    teacher = on(families.family("bert", hidden_dropout_prob=0, attention_probs_dropout_prob=0))
    student = distillation.shallow(teacher, 2)
    distillation.heal_(student, on(bert_batches()), teacher=teacher, steps=2, max_lr=1e-3)
    return bert_logits(student.eval(), on)


def _perplexity(on: Device) -> float:
    return training.perplexity(on(families.family("llama")), on(TOKENS[0]), window=4)


def _loss(on: Device) -> Tensor:
    return batch_loss(on(families.family("bert")), on(bert_batches()[0])).detach()


def llama(on: Device) -> Decoder:
    return decoder(on(families.family("llama")))


def _decode(on: Device, make_cache: Callable[[Decoder], Any]) -> Tensor:
    model = llama(on)
    cache = make_cache(model)
    steps = on(list(TOKENS.split(1, 1)))
    return torch.cat([model.hidden(ids, cache) for ids in steps], 1)


def _decode_kind(on: Device, kind: str) -> Tensor:
    """Continue a prompt by a prompt and a token, on a decoder with windows, caps or norms."""
    model = decoder(on(llamas.kin(kind)))
    cache = model.cache(12, 2)
    states = [model.hidden(ids, cache) for ids in on(list(TOKENS[:, :12].split((7, 4, 1), 1)))]
    return model.logits(torch.cat(states, 1))


def _serve_kind(on: Device, kind: str) -> list[Tensor]:
    return serving.serve(on(llamas.kin(kind)), _prompts(on), max_new_tokens=9, page_size=3).ids


def _decode_with_evictions(on: Device, policy: str) -> Tensor:
    return _decode(on, lambda model: EvictingCache(model.layout, 2, 6, policy=policy, sinks=1))


def _prompts(on: Device) -> list[Tensor]:
    return on([TOKENS[0, :5], TOKENS[1, :3]])


def _serve(on: Device, **options: Any) -> list[Tensor]:
    return serving.serve(llama(on), _prompts(on), max_new_tokens=4, **options).ids


def _generate(on: Device) -> list[Tensor]:
    return serving.generate(on(families.family("llama")), _prompts(on), max_new_tokens=4, page_size=2)


def _speculate(on: Device, drafted: bool, temperature: float) -> Tensor:
    draft = llama(on) if drafted else "lookup"
    options = {"draft": draft, "temperature": temperature, "max_new_tokens": 6}
    return speculative.generate(llama(on), on(TOKENS[0, :6]), **options).ids


# --- tensors ----------------------------------------------------------------------------------------------------------

WEIGHT = random(8, 16)
INPUTS = random(64, 16, seed=1)
HESSIAN = INPUTS.T @ INPUTS


def _layer(on: Device) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return on(nn.Linear(16, 8))


def _adaround(on: Device) -> Tensor:
    layer, inputs = _layer(on), on(INPUTS)
    return rounding.adaround(layer, weight_grid(layer, 4), inputs, layer(inputs).detach(), steps=10)


def _correct_bias(on: Device) -> Tensor:
    layer = _layer(on)
    return rounding.bias_correction(layer, layer.weight.detach().round(decimals=1), on(INPUTS.mean(0)))


def _scale_columns(on: Device) -> Tensor:
    def rounded(weight: Tensor) -> Tensor:
        return affine.fake_quantize(weight, bits=4, axis=0)

    return awq.awq([on(WEIGHT)], on(HESSIAN), on(INPUTS.abs().mean(0)), rounded)


def _distillation_loss(on: Device, beta: float) -> Tensor:
    return distillation.distillation_loss(on(random(4, 10)), on(random(4, 10, seed=1)), temperature=2.0, beta=beta)


def _attend(on: Device, causal: bool) -> Tensor:
    return blockwise.attention(*on(random(3, 1, 2, 9, 8)), causal=causal, block=4)


def _attend_to_latents(on: Device, attention: Callable[..., Tensor]) -> Tensor:
    shapes = (1, 2, 5, 4), (1, 2, 5, 2), (1, 5, 6), (1, 5, 2), (2, 4, 6), (2, 4, 6)
    return attention(*(on(random(*shape, seed=i)) for i, shape in enumerate(shapes)))


def _verify(on: Device) -> list[Any]:
    target, draft = random(4, 6).softmax(-1), random(3, 6, seed=1).softmax(-1)
    number, law = speculative.verify(on(target), on(draft), on(torch.tensor([1, 4, 2])), on(torch.full((3,), 0.4)))
    return [number, law]


def _convert_to_sparse(on: Device, format: str) -> Tensor:
    pruned = unstructured.prune(nn.Sequential(_layer(on), nn.ReLU()), 0.5)
    return sparse.convert(pruned, format=format)(on(INPUTS))


def _pack(on: Device) -> int:
    return artifact.size(weight_only.quantize(on(families.family("llama")), 4, group_size=8), "int4")


CALLS: dict[str, Call] = {
    **{f"channels.prune {name}": partial(_prune_channels, criterion=name) for name in scores.UNIT_CRITERIA},
    **{f"unstructured.prune {name}": partial(_prune_weights, criterion=name) for name in ("magnitude", "wanda")},
    **{f"scores.saliency {name}": partial(_score_weights, criterion=name) for name in ("taylor", "activation")},
    "sensitivity.scan": _scan_sensitivity,
    "sr_ste": _train_with_two_four,
    "nm.prune": _prune_two_four,
    "nm.mask": lambda on: nm.mask(on(WEIGHT), 2, 4),
    "nm.compress": lambda on: nm.decompress(nm.compress(on(WEIGHT * nm.mask(WEIGHT)))),
    "permutation.permute": _permute,
    "permutation.search": lambda on: permutation.search(on(WEIGHT.abs())),
    **{f"ptq.quantize {name}": partial(_calibrate, observer=name) for name in ("minmax", "moving", "histogram")},
    "mixed_precision.sensitivity": _measure_sensitivity,
    **{f"qat {name}": partial(_train_quantized, method=name) for name in ("ste", "lsq")},
    "fold.fold_batch_norm": _fold,
    "fold.equalize": _equalize,
    "fold.smooth": _smooth,
    "training.train_": _train,
    "training.reestimate_norms_": _reestimate_norms,
    "training.accuracy": _accuracy,
    "training.perplexity": _perplexity,
    "losses.batch_loss": _loss,
    "distillation.distilling": _distil,
    "distillation.heal_": _heal,
    **{f"distillation_loss {beta}": partial(_distillation_loss, beta=beta) for beta in (0.0, 0.5, 1.0)},
    "distillation.relation_loss": lambda on: distillation.relation_loss(on(random(4, 10)), on(random(4, 6, seed=1))),
    "counting.count": _count,
    **{
        f"blockwise.prune {pattern} {method}": partial(_prune_by_block, pattern=pattern, method=method)
        for pattern in ((2, 4), 0.5)
        for method in ("magnitude", "wanda", "sparsegpt")
    },
    "sparsegpt.sparsegpt": lambda on: sparsegpt.sparsegpt(on(WEIGHT), on(HESSIAN)),
    **{f"head_importance {name}": partial(_importance_of_heads, method=name) for name in heads.METHODS},
    "transformers.prune_heads": _prune_heads,
    **{f"transformers.prune_ffn {name}": partial(_prune_neurons, criterion=name) for name in ("magnitude", "wanda")},
    **{f"layer_importance {name}": partial(_importance_of_layers, method=name) for name in depth.METHODS},
    "depth.prune_layers": _prune_layers,
    **{f"sparse.convert {name}": partial(_convert_to_sparse, format=name) for name in ("dense", "coo", "csr")},
    **{f"weight_only {name}": partial(_quantize_weights, method=name) for name in weight_only.METHODS},
    "artifact.size": _pack,
    "rotation.rotate": _rotate,
    "gptq.gptq": lambda on: gptq.gptq(on(WEIGHT), on(HESSIAN), group_size=8).dequantize(),
    "gptq.rtn": lambda on: gptq.rtn(on(WEIGHT), group_size=8).dequantize(),
    "awq.awq": _scale_columns,
    "rounding.adaround": _adaround,
    "rounding.bias_correction": _correct_bias,
    "affine.fake_quantize": lambda on: affine.fake_quantize(on(WEIGHT), bits=4, axis=0),
    "affine.sqnr": lambda on: affine.sqnr(on(WEIGHT), on(WEIGHT.round(decimals=1))),
    **{f"formats.fake {name}": lambda on, name=name: formats.fake(on(random(4, 64)), name) for name in formats.FORMATS},
    "kv.fake_quantize": lambda on: kv.fake_quantize(on(random(1, 2, 9, 8)), 4, "token", group_size=8),
    "kv.quantized": _quantize_keys,
    **{f"blockwise.attention {causal}": partial(_attend, causal=causal) for causal in (False, True)},
    "mla.expanded": partial(_attend_to_latents, attention=mla.expanded),
    "mla.absorbed": partial(_attend_to_latents, attention=mla.absorbed),
    "decoder": partial(_decode, make_cache=lambda model: model.cache(12, 2)),
    **{f"decoder evicting {name}": partial(_decode_with_evictions, policy=name) for name in POLICIES},
    "decoder quantized": partial(_decode, make_cache=lambda model: QuantizedCache(model.layout, 2)),
    **{f"decoder {kind}": partial(_decode_kind, kind=kind) for kind in llamas.KINDS},
    **{f"serving.serve {kind}": partial(_serve_kind, kind=kind) for kind in llamas.KINDS},
    "serving.generate": _generate,
    "serving.serve": _serve,
    "serving.serve static": partial(_serve, batching="static"),
    "serving.serve in chunks": partial(_serve, chunk=2),
    "speculative.generate": partial(_speculate, drafted=False, temperature=0.0),
    "speculative.generate drafted": partial(_speculate, drafted=True, temperature=1.0),
    "speculative.verify": _verify,
    "parity.compare_scores": lambda on: parity.compare_scores(on(random(9, 4)), on(random(9, 4, seed=1))).agreement,
}


def places(answer: Any) -> set[str]:
    """List the devices that the tensors of an answer are on."""
    if isinstance(answer, Tensor):
        return {answer.device.type}
    return set() if isinstance(answer, int | float) else {place for part in answer for place in places(part)}


def numbers(answer: Any) -> list[Tensor]:
    """List the tensors and numbers of an answer, on the CPU."""
    if isinstance(answer, Tensor):
        return [answer.detach().cpu()]
    if isinstance(answer, int | float):
        return [torch.tensor(answer if math.isfinite(answer) else float(answer))]
    return [part for item in answer for part in numbers(item)]


def difference(first: Any, second: Any) -> str:
    """Say how two answers differ in numbers or dtypes; nothing where they are alike to float32's rounding."""
    try:
        torch.testing.assert_close(numbers(second), numbers(first), rtol=1e-3, atol=1e-4, equal_nan=True)
    except AssertionError as error:
        return str(error)
    return ""
