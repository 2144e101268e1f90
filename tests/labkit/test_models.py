"""The models are the ones that they are called: parameter counts, known predictions, weights that say what they are."""

import json
import subprocess
import sys

import pytest
import torch

from labkit import datasets, models, store, training
from labkit.errors import DataError, InputError


@pytest.fixture(autouse=True, scope="module")
def fetched() -> None:
    """The models in the cache. Missing ones are an error, not a skip: `./lab test` fetches before it runs pytest."""
    missing = [row["name"] for row in store.listing() if row["state"] != "ready"]
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
        ("smollm2", 134_515_008),
        ("resnet50", 25_557_032),  # torchvision's own table
        ("vit_b16", 86_567_656),  # torchvision's own table
        ("bert_base", 109_482_240),
        ("llama3_8b_layer", 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336 + 2)),  # q, o, k, v, three of the MLP, two norms
    ],
)
def test_model_has_the_stated_parameters_and_is_ready_to_use(name: str, count: int) -> None:
    model = models.load(name)
    assert parameters(model) == count
    assert not any(module.training for module in model.modules())
    assert {(parameter.dtype, parameter.device.type) for parameter in model.parameters()} == {(torch.float32, "cpu")}
    assert model.weights_are == models.MODELS[name].weights


def test_resnet20_reaches_the_accuracy_of_its_record() -> None:
    record = json.loads(store.path("checkpoints/resnet20-fashion-mnist.json").read_text())
    data = datasets.fashion_mnist("test", 2000)
    found = training.accuracy(models.resnet20(), training.Batches((data.images, data.labels), 500))
    expected = record["test_accuracy"]
    assert abs(found - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5  # four standard errors of the subset


def test_efficientnet_names_the_cat_and_the_espresso() -> None:
    photos = datasets.photos()
    with torch.inference_mode():
        chances = models.efficientnet_lite0()(models.imagenet_input([photos["chelsea"], photos["coffee"]])).softmax(-1)
    names = models.imagenet_classes()
    assert names[chances[0].argmax()] in {"tabby", "tiger cat", "Egyptian cat"}
    assert names[chances[1].argmax()] == "espresso"
    assert chances[1].max() > 0.9


def test_minilm_puts_like_sentences_closer() -> None:
    sentences = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply today after the news."]
    batch = models.tokenizer("minilm")(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        vectors = models.mean_pool(models.minilm()(**batch).last_hidden_state, batch["attention_mask"])
    alike = vectors @ vectors.T
    assert alike[0, 1] > alike[0, 2] + 0.5
    assert torch.allclose(alike.diagonal(), torch.ones(3), atol=1e-5)


def test_mean_pool_leaves_padding_out() -> None:
    hidden = torch.tensor([[[3.0, 0.0], [1.0, 0.0], [9.0, 9.0]]])
    assert torch.equal(models.mean_pool(hidden, torch.tensor([[1, 1, 0]])), torch.tensor([[1.0, 0.0]]))


def test_smollm2_predicts_the_handbook() -> None:
    tokens = models.tokenizer("smollm2")(datasets.handbook("test"), return_tensors="pt")["input_ids"][0]
    # a random model would be near its vocabulary of 49,152, a wrongly read one in the hundreds
    assert 15 < training.perplexity(models.smollm2(), tokens[:2048]) < 40


def test_smollm2_half_precision_is_the_same_weights() -> None:
    half, full = models.smollm2(torch.float16), models.smollm2()
    assert all(torch.equal(a.float(), b) for a, b in zip(half.parameters(), full.parameters(), strict=True))


def test_tokenizers_give_back_the_text() -> None:
    text = "the kernel boots, then 3 services start."
    for name in ("minilm", "smollm2"):
        tokens = models.tokenizer(name)(text)["input_ids"]
        assert models.tokenizer(name).decode(tokens, skip_special_tokens=True) == text


def test_models_load_without_a_network(offline: dict[str, str]) -> None:
    code = "from labkit import models; models.minilm(); models.smollm2(); models.tokenizer('smollm2')"
    subprocess.run([sys.executable, "-c", code], env=offline, check=True)


def test_review_batches_are_cut_to_their_longest_text() -> None:
    for batch in models.review_batches("test", 64, batch_size=8):
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["attention_mask"][:, -1].any()
        assert batch["input_ids"].shape[1] <= 48


def test_fine_tuned_minilm_is_trained_once_and_found_again(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    minilm = store.path("minilm")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    (tmp_path / "minilm").symlink_to(minilm)
    state = torch.random.get_rng_state()
    first = models.minilm_finetuned(steps=2)
    (folder,) = (tmp_path / "made").iterdir()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    again = models.minilm_finetuned(steps=2)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    record = json.loads((folder / "record.json").read_text())
    assert record["steps"] == 2
    assert 0.3 < record["validation_accuracy"] < 0.9


@pytest.mark.parametrize("name", ["resnet50", "vit_b16"])
def test_random_image_models_run_and_repeat(name: str) -> None:
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        first, again = models.load(name)(images), models.load(name)(images)
    assert first.shape == (1, 1000)
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), state)


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


def test_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"no model is called 'bert'; there are resnet20, .* and labkit.models.hub"):
        models.load("bert")


def test_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="there is a tokenizer for 'minilm' and 'smollm2', not for 'bert'"):
        models.tokenizer("bert")


@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_steps_that_are_no_count_are_refused(steps: object) -> None:
    with pytest.raises(InputError, match="steps must be a whole number from 1 up, or None for the whole epoch"):
        models.minilm_finetuned(steps=steps)


@pytest.mark.parametrize(
    ("id", "task", "sentence"),
    [
        ("two words", "base", "a hub id looks like 'owner/name'; it is 'two words'"),
        ("../etc/passwd", "base", "a hub id looks like 'owner/name'"),
        ("owner/name", "chat", "task must be one of 'base', 'causal-lm'"),
        ("torchvision/nothing", "base", "torchvision has no model called 'nothing'"),
    ],
)
def test_bad_hub_ids_are_refused(id: str, task: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        models.hub(id, task=task)


def test_hub_out_of_reach_says_what_to_do(offline: dict[str, str]) -> None:
    code = "from labkit import models; models.hub('nobody-here/no-such-model')"
    process = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True)
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("labkit.errors.DataError: nobody-here/no-such-model could not be had")
    assert "take a model of labkit.models.MODELS" in last
