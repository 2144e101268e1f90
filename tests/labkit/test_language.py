"""Language models in engines against transformers: the same tokens however they are asked for, and perplexity."""

from functools import partial

import pytest
import torch
from llamas import greedy, llama, text
from refusals import Refusals, check_refusal, refused

from labkit.data import datasets, models, training
from labkit.deploy import decoder_graph, engines, language
from labkit.quantization import weight_only
from labkit.quantization.weight_only import WeightOnlyLinear
from labkit.storage import formats as storage

READY = language.available()
genai = pytest.mark.skipif(READY["openvino-genai"] != "ready", reason="needs openvino-genai")
SIZES = {"intermediate_size": 128, "max_position_embeddings": 512}
MODEL = llama(**SIZES)
LENGTHS, NEW = [30, 12, 1, 300], [20, 7, 30, 1]
PROMPTS = [text(n, n)[0] for n in LENGTHS]
TOKENS = text(300, 7)[0]


@pytest.fixture(scope="module")
def engine() -> language.LanguageEngine:
    return language.prepare("openvino-genai", MODEL, weights="float32")


def same(ids, expected) -> bool:
    return len(ids) == len(expected) and all(map(torch.equal, ids, expected))


# --- the same function ------------------------------------------------------------------------------------------------


@genai
def test_every_request_gets_the_tokens_that_transformers_gives_it_alone(engine):
    texts = engine.generate(PROMPTS, max_new_tokens=NEW)
    assert same(texts.ids, [greedy(MODEL, prompt[None], n)[0] for prompt, n in zip(PROMPTS, NEW, strict=True)])
    assert texts.calls == max(NEW), "one call for all requests"
    assert same(engine.generate([PROMPTS[0][None]], max_new_tokens=20).ids, texts.ids[:1])


@genai
def test_requests_that_join_and_leave_get_the_same_tokens_in_the_steps_of_two_places(engine):
    served = engine.serve(PROMPTS, max_new_tokens=NEW, max_batch=2)
    assert same(served.ids, engine.generate(PROMPTS, max_new_tokens=NEW).ids)
    assert [len(times) for times in served.token_s] == NEW
    assert served.steps == 37, "20 and 7 begin, 30 joins after 7 steps, 1 after 20: the last of 30 comes at step 37"
    third, last = served.token_s[2], served.token_s[3]
    assert third[0] > served.token_s[1][-1] and last[0] > served.token_s[0][-1], "they wait for a place"
    alone = engine.serve(PROMPTS, max_new_tokens=NEW, max_batch=1)
    assert alone.steps == sum(NEW) and same(alone.ids, served.ids)


@genai
@pytest.mark.parametrize(
    "options",
    [
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ],
    ids=["a tied head", "keys of their own", "other positions"],
)
def test_other_decoders_of_the_type_are_the_same_function(options):
    model = llama(**SIZES, **options)
    engine = language.prepare("openvino-genai", model, weights="float32")
    expected = training.perplexity(model, TOKENS, window=100)
    assert engine.perplexity(TOKENS, window=100) == pytest.approx(expected, rel=1e-5)
    assert same(engine.generate(PROMPTS[:1], max_new_tokens=9).ids, [greedy(model, PROMPTS[0][None], 9)[0]])


@genai
def test_perplexity_is_that_of_the_model_to_the_rounding_of_float32(engine):
    expected = training.perplexity(MODEL, TOKENS, window=100)
    assert engine.perplexity(TOKENS, window=100) == pytest.approx(expected, rel=1e-5)
    other = training.perplexity(MODEL, TOKENS.flip(0), window=100)
    assert abs(other / expected - 1) > 1e-3, "or the test shows nothing"


@genai
def test_the_file_alone_is_a_model_with_a_state_whose_tokens_see_those_before_them(tmp_path):
    """In OpenVINO without GenAI, which puts pages where the file has a mask and a state."""
    decoder_graph.Stateful(MODEL, "float32").save(tmp_path / "decoder.xml")
    # else keys and values are kept in 8 bits, unasked
    request = engines.request(tmp_path / "decoder.xml", KV_CACHE_PRECISION="f32")
    ids, parts = TOKENS[:40], []
    for start, end in ((0, 25), (25, 26), (26, 40)):
        ends = {"attention_mask": torch.ones(1, end).long(), "position_ids": torch.arange(start, end)[None]}
        named = {"input_ids": ids[None, start:end], **ends, "beam_idx": torch.zeros(1, dtype=torch.int32)}
        result = request.infer({name: tensor.numpy() for name, tensor in named.items()})
        parts.append(torch.from_numpy(result["logits"].copy()))
    torch.testing.assert_close(torch.cat(parts, 1), MODEL(ids[None]).logits.detach(), rtol=1e-4, atol=1e-4)


@genai
def test_guesses_from_the_text_save_steps_and_change_nothing(engine):
    prompt = text(12, 3)[0].repeat(4)
    plain = engine.generate([prompt], max_new_tokens=60)
    guessed = engine.generate([prompt], max_new_tokens=60, lookup=4)
    assert same(plain.ids, guessed.ids) and same(plain.ids, [greedy(MODEL, prompt[None], 60)[0]])
    assert guessed.calls < plain.calls == 60
    several = [engine.generate(PROMPTS, max_new_tokens=NEW, lookup=guesses).ids for guesses in (0, 4)]
    assert same(*several)


def stored_numbers(weight: torch.Tensor, weights: str) -> torch.Tensor:
    """float32 [out, in]: what `decoder_graph` stores of a weight."""
    stored = decoder_graph.WEIGHTS[weights](weight)
    return stored.codes.float() * (1 if stored.scale is None else stored.scale.float())


def test_what_is_stored_in_int8_are_the_numbers_of_the_storage_format():
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0)) + 0.3
    weight[0], weight[1] = 0.7, 0  # no range
    expected = storage.FORMATS["int8"].unpack(storage.FORMATS["int8"].pack(weight), weight.shape)
    torch.testing.assert_close(stored_numbers(weight, "int8"), expected, rtol=0, atol=1e-6)


@genai
@pytest.mark.parametrize("weights", ["float16", "int8"])
def test_an_engine_multiplies_with_the_numbers_that_are_stored(weights: str):
    """Perplexity of the engine beside that of torch with the same numbers."""
    model = llama(**SIZES)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(stored_numbers(parameter.detach(), weights))
    engine = language.prepare("openvino-genai", MODEL, weights=weights)
    expected, exact = (training.perplexity(m, TOKENS, window=100) for m in (model, MODEL))
    assert engine.perplexity(TOKENS, window=100) == pytest.approx(expected, rel=1e-5)
    assert weights == "float16" or abs(expected / exact - 1) > 1e-4, "or the test shows nothing"


@genai
@pytest.mark.parametrize("options", [{"bits": 4, "group_size": 32}, {"bits": 4, "symmetric": "signed"}, {"bits": 6}])
def test_layers_that_were_quantized_keep_their_codes(options):
    model = weight_only.quantize(MODEL, **options)
    assert any(isinstance(module, WeightOnlyLinear) for module in model.modules())
    engine = language.prepare("openvino-genai", model, weights="float32")
    expected = training.perplexity(model, TOKENS, window=100)
    assert engine.perplexity(TOKENS, window=100) == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(engines.available()["openvino"] != "ready", reason="needs OpenVINO")
@pytest.mark.parametrize("form", [decoder_graph.Stateful, decoder_graph.Stateless])
def test_a_file_holds_the_bytes_of_its_format(form, tmp_path):
    def size(model, weights):
        form(model, weights).save(tmp_path / f"{weights}.xml")
        return (tmp_path / f"{weights}.bin").stat().st_size

    sizes = {weights: size(MODEL, weights) for weights in decoder_graph.WEIGHTS}
    parameters = sum(p.numel() for p in MODEL.parameters())
    assert 0.99 < sizes["float32"] / (4 * parameters) < 1.05 and 0.99 < sizes["float16"] / (2 * parameters) < 1.05
    assert 0.99 < sizes["int8"] / parameters < 1.1, "and a scale a row"
    assert size(llama(**SIZES, tie_word_embeddings=True), "int8") < sizes["int8"] - 61 * 64


@genai
def test_the_bytes_of_an_engine_are_those_of_its_files(tmp_path):
    decoder_graph.Stateful(MODEL, "int8").save(tmp_path / "openvino_model.xml")
    engine = language.prepare("openvino-genai", MODEL, weights="int8")
    assert engine.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


# --- SmolLM2 ----------------------------------------------------------------------------------------------------------


@genai
@pytest.mark.slow
def test_smollm2_in_int8_is_within_one_per_cent_of_perplexity_and_batches_as_alone():
    model, tokenizer = models.smollm2(), models.tokenizer("smollm2")
    tokens = torch.tensor(tokenizer(datasets.handbook("test"), verbose=False)["input_ids"])
    read = tokens[:512]
    exact = training.perplexity(model, read, window=256)
    half = language.prepare("openvino-genai", model)
    prompts = [tokens[start : start + 16] for start in (3000, 4000)]
    assert same(half.generate(prompts[:1], max_new_tokens=8).ids, [greedy(model, prompts[0][None], 8)[0]])
    assert half.perplexity(read, window=256) == pytest.approx(exact, rel=1e-3)
    engine = language.prepare("openvino-genai", model, weights="int8", precision="f32-a8")
    assert engine.perplexity(read, window=256) / exact - 1 < 0.01
    together = engine.generate(prompts, max_new_tokens=8)
    assert same(together.ids, [engine.generate([prompt], max_new_tokens=8).ids[0] for prompt in prompts])
    assert engine.bytes < 0.52 * half.bytes


# --- sentences --------------------------------------------------------------------------------------------------------


GOOD = PROMPTS[0]


def generate(engine: language.LanguageEngine, *prompts: torch.Tensor, **options) -> object:
    return engine.generate(prompts, **{"max_new_tokens": 3, **options})


REFUSALS: Refusals = {  # calls with an engine
    "A text has to be token ids from 0 to 60 ... at least one": lambda engine: generate(engine, GOOD[:0]),
    "give what the model's tokenizer gives": lambda engine: generate(engine, GOOD + 60),
    "got torch.float32": lambda engine: generate(engine, GOOD.float()),
    "There are 0 prompts": lambda engine: generate(engine),
    "max_new_tokens is 0, but it must be a whole number from 1": lambda engine: generate(
        engine, GOOD, max_new_tokens=0
    ),
    "give one for each": lambda engine: generate(engine, GOOD, max_new_tokens=[3, 3]),
    "530 tokens are more than the 512": lambda engine: generate(engine, GOOD, max_new_tokens=500),
    "lookup is -1": lambda engine: generate(engine, GOOD, lookup=-1),
    "with at least one window of 100": lambda engine: engine.perplexity(TOKENS[:20], window=100),
    "window is 1": lambda engine: engine.perplexity(TOKENS, window=1),
    "A text has to be token ids from 0 to 60": lambda engine: engine.perplexity(TOKENS + 60, window=100),
}
UNPREPARED: Refusals = {  # calls with a folder
    "There is no language engine 'tensorrt': choose one of openvino-genai": lambda _: language.prepare(
        "tensorrt", MODEL
    ),
    "There is no format of weights 'int3'": lambda _: prepare(MODEL, weights="int3"),
    "There is no precision 'f64'": lambda _: prepare(MODEL, precision="f64"),
    "There is no file ... none.gguf: give a GGUF file": lambda folder: prepare(folder / "none.gguf"),
    "is no GGUF file of a language model": lambda folder: prepare(folder / "wrong.gguf"),
    "Linear is no decoder of the Llama type": lambda _: prepare(torch.nn.Linear(3, 3)),
    "nf4 has no kernel in this engine": lambda _: prepare(weight_only.quantize(MODEL, method="nf4")),
}
prepare = partial(language.prepare, "openvino-genai")


@genai
@refused(REFUSALS)
def test_what_an_engine_cannot_read_or_write_is_refused_in_a_sentence(engine, words, call):
    check_refusal(words, partial(call, engine))


@genai
@refused(UNPREPARED)
def test_what_cannot_be_prepared_is_refused_in_a_sentence(tmp_path, words, call):
    (tmp_path / "wrong.gguf").write_bytes(b"no model" * 9)
    check_refusal(words, partial(call, tmp_path))


def test_what_is_missing_is_told_with_what_installs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("labkit.deploy.engines._present", lambda package: False)
    assert language.available() == {
        "openvino-genai": "openvino-genai needs openvino_genai, which is not installed: ./lab setup --with llm."
    }
    check_refusal("./lab setup --with llm", lambda: prepare(MODEL))
