"""The models are the ones that they are called: parameter counts, known predictions, weights that say what they are."""

import json

import pytest
import torch
from refusals import check_refusal
from torchvision.models import ResNet18_Weights

from labkit.data import datasets, fetch, models, training
from labkit.errors import DataError


@pytest.fixture(autouse=True, scope="module")
def fetched() -> None:
    """The models in the cache. Missing ones are an error, not a skip: `./lab test` fetches before it runs pytest."""
    missing = [row.name for row in fetch.assets().values() if row.state != "ready"]
    if missing:
        raise DataError(
            f"{', '.join(missing)} not ready; run `./lab data fetch` once, with a network, then this again."
        )


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet20", 272_186),
        ("efficientnet_lite0", 4_652_008),  # table of the TensorFlow EfficientNet-lite release: 4.7 M
        ("minilm", 22_713_216),
        pytest.param("smollm2", 134_515_008, marks=pytest.mark.slow),
        ("resnet50", 25_557_032),  # torchvision's own table
        pytest.param("bert_base", 109_482_240, marks=[pytest.mark.slow, pytest.mark.nightly]),
        # q, o, k, v, three of the MLP, two norms
        pytest.param("llama3_8b_layer", 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336 + 2), marks=pytest.mark.slow),
    ],
)
def test_model_has_the_stated_parameters_and_is_ready_to_use(name: str, count: int) -> None:
    model = getattr(models, name)()
    assert parameters(model) == count
    assert not any(module.training for module in model.modules())
    assert {(parameter.dtype, parameter.device.type) for parameter in model.parameters()} == {(torch.float32, "cpu")}


@pytest.mark.slow
def test_resnet20_reaches_the_accuracy_of_its_record() -> None:
    record = json.loads(fetch.path("checkpoints/resnet20-fashion-mnist.json").read_text())
    data = datasets.fashion_mnist("test", 1000)
    found = training.accuracy(models.resnet20(), training.Batches((data.images, data.labels), 500))
    expected = record["test_accuracy"]
    assert abs(found - expected) < 4 * (expected * (1 - expected) / 1000) ** 0.5  # four standard errors of the subset


def test_efficientnet_names_the_cat_and_the_espresso() -> None:
    photos = datasets.photos()
    with torch.inference_mode():
        chances = models.efficientnet_lite0()(models.imagenet_input([photos["chelsea"], photos["coffee"]])).softmax(-1)
    names = ResNet18_Weights.DEFAULT.meta["categories"]
    assert names[chances[0].argmax()] in {"tabby", "tiger cat", "Egyptian cat"}
    assert names[chances[1].argmax()] == "espresso"
    assert chances[1].max() > 0.9


@pytest.mark.slow
def test_smollm2_predicts_the_handbook() -> None:
    tokens = models.tokenizer("smollm2")(datasets.handbook("test"), return_tensors="pt")["input_ids"][0]
    # a random model would be near its vocabulary of 49,152, a wrongly read one in the hundreds
    assert 15 < training.perplexity(models.smollm2(), tokens[:1024]) < 40


@pytest.mark.slow
def test_smollm2_half_precision_is_the_same_weights() -> None:
    half, full = models.smollm2(torch.float16), models.smollm2()
    assert all(torch.equal(a.float(), b) for a, b in zip(half.parameters(), full.parameters(), strict=True))


def test_review_batches_are_cut_to_their_longest_text() -> None:
    for batch in models.review_batches("test", 64, batch_size=8):
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["attention_mask"][:, -1].any()
        assert batch["input_ids"].shape[1] <= 48


@pytest.mark.slow
def test_fine_tuned_minilm_is_within_half_a_point_of_whole_fine_tuning() -> None:
    accuracy = json.loads(fetch.path("checkpoints/minilm-reviews-delta.json").read_text())["accuracy"]
    assert accuracy["delta"]["test"] > accuracy["whole"]["test"] - 0.005
    share = training.accuracy(models.minilm_finetuned(), models.review_batches("test", 200))
    expected = accuracy["delta"]["test"]
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 200) ** 0.5  # four standard errors of the subset


def test_a_delta_adds_its_product_and_replaces_what_it_names() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    up, down, bias = torch.randn(2, 1), torch.randn(1, 3), torch.randn(2)
    adapted = models.with_delta(model, {"0.up": up, "0.down": down, "0.bias": bias})
    x = torch.randn(5, 3)
    assert torch.allclose(adapted(x), x @ (model[0].weight + up @ down).T + bias, atol=1e-6)
    assert not torch.equal(model[0].bias, bias)  # the argument stays as it was


def test_random_models_repeat_and_leave_the_random_state() -> None:
    state = torch.random.get_rng_state()
    first, again = models.resnet50(), models.resnet50()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
def test_llama_layer_is_causal() -> None:
    layer = models.llama3_8b_layer(torch.bfloat16)
    hidden = torch.randn(1, 6, 4096, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    changed = hidden.clone()
    changed[:, 5] = 0
    with torch.inference_mode():
        one, two = layer(hidden), layer(changed)
    assert one.shape == hidden.shape
    assert torch.equal(one[:, :5], two[:, :5])
    assert not torch.equal(one[:, 5], two[:, 5])


def test_unknown_tokenizer_is_refused() -> None:
    check_refusal("no tokenizer 'bert': choose one of minilm, smollm2", lambda: models.tokenizer("bert"))
