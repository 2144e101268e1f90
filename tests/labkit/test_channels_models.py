"""Whole architectures, half of the channels, one call and no recipe: torchvision's and small ones of transformers."""

import families
import pytest
import torch
import torchvision
from networks import randomise_
from torch import nn

from labkit.pruning.channels import prune

# Side of the image, and what is left of the parameters at most.
MODELS = {
    "resnet18": (32, 0.28),
    "resnext50_32x4d": (32, 0.30),
    "alexnet": (64, 0.28),
    "mobilenet_v3_large": (32, 0.33),
    "efficientnet_b0": (32, 0.34),
    "densenet121": (32, 0.30),
    "googlenet": (64, 0.34),
    "inception_v3": (299, 0.30),
    "squeezenet1_0": (32, 0.37),
    "shufflenet_v2_x1_0": (32, 0.42),
    "regnet_y_400mf": (32, 0.30),
    "convnext_tiny": (32, 0.28),
    "vit_b_16": (32, 0.28),
    "swin_v2_t": (64, 0.28),
    "maxvit_t": (224, 0.28),
}


def build(name: str, side: int) -> nn.Module:
    torch.manual_seed(0)
    size = {"image_size": side} if name == "vit_b_16" else {}
    model = torchvision.models.get_model(name, weights=None, **size)
    return randomise_(model)


NIGHTLY = ("inception_v3", "maxvit_t", "densenet121", "shufflenet_v2_x1_0", "regnet_y_400mf")
NIGHTLY += ("alexnet", "efficientnet_b0", "googlenet", "resnext50_32x4d")


def marks(name: str) -> tuple:
    if name == "resnet18":
        return ()
    return (pytest.mark.slow, pytest.mark.nightly) if name in NIGHTLY else (pytest.mark.slow,)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in MODELS])
@pytest.mark.filterwarnings("ignore:The default weight init")
def test_half_of_the_channels_of_a_torchvision_model(name):
    side, most = MODELS[name]
    model, x = build(name, side), torch.randn(1, 3, side, side)
    pruned = prune(model, x, ratio=0.5, scope="layer")
    before, after = pruned.plan.parameters
    assert pruned.report.equal and pruned.report.scale > 0
    assert pruned.report.error < 1e-5 * pruned.report.scale, "a tenth of the tolerance in float32, and rounding only"
    assert after / before < most
    assert sum(p.numel() for p in pruned.model.parameters()) == after


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The default weight init")
def test_auxiliary_heads_train_on():
    small = prune(build("googlenet", 64), torch.randn(1, 3, 64, 64), ratio=0.5).model.train()
    assert [x.shape for x in small(torch.randn(2, 3, 64, 64))] == [(2, 1000)] * 3


@pytest.mark.slow
def test_segmentation_and_its_dictionary():
    torch.manual_seed(0)
    model = randomise_(torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=4))
    x = torch.randn(1, 3, 32, 32)
    pruned = prune(model, x, ratio=0.5, scope="layer")
    assert pruned.report.equal and pruned.plan.parameters[1] < 0.3 * pruned.plan.parameters[0]
    assert pruned.model(x)["out"].shape == (1, 4, 32, 32)


@pytest.mark.slow
def test_a_detection_backbone_with_its_feature_pyramid():
    torch.manual_seed(0)
    build_backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone
    model, x = randomise_(build_backbone(backbone_name="resnet18", weights=None)), torch.randn(1, 3, 64, 64)
    pruned = prune(model, x, ratio=0.5, scope="layer")
    assert pruned.report.equal and pruned.plan.parameters[1] < 0.3 * pruned.plan.parameters[0]
    assert [y.shape[1] for y in pruned.model(x).values()] == [256] * 5


SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=60)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "first", "heads", "width"),
    [
        ("bert", "bert.encoder.layer.0.attention.self.query.weight", (4, 2), 16),
        ("minilm", "encoder.layer.0.attention.self.query.weight", (8, 4), 32),  # its output is its width, which stays
        ("llama", "model.layers.0.self_attn.q_proj.weight", (2, 1), 16),  # two query heads share a key-value head
        ("gpt2", "transformer.h.0.attn.c_attn.weight", (4, 2), 16),
    ],
)
def test_a_transformer_with_its_heads_neurons_and_width(name, first, heads, width, attention):
    model = families.family(name)
    model.set_attn_implementation(attention)
    inputs = families.inputs(name)
    pruned = prune(model, (), inputs, ratio=0.5, scope="layer")
    assert pruned.report.equal and pruned.report.scale > 0
    assert {row.name: (row.units, row.left) for row in pruned.plan.units}[first] == heads
    assert pruned.model(**inputs)[0].shape[0] == 3
    assert pruned.model.get_input_embeddings().weight.shape[1] == width


def test_experts_in_float32_are_pruned():
    """On the meta device torch multiplies experts in bfloat16 only."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    model, inputs = transformers.MixtralForCausalLM(config).eval(), {"input_ids": torch.randint(0, 60, (2, 9))}
    implementation = model.config._experts_implementation
    pruned = prune(model, (), inputs, ratio=0.5, scope="layer")
    assert pruned.report.equal and pruned.plan.parameters[1] < 0.3 * pruned.plan.parameters[0]
    assert model.config._experts_implementation == pruned.model.config._experts_implementation == implementation
    assert pruned.model(**inputs)[0].isfinite().all()
