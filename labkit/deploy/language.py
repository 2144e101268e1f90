"""A language model in an engine: a prompt, several at once, guesses looked up in the text, and perplexity.

Perplexity is of what is deployed: the engine scores the text with the file, the kernels and the cache that generate.
Equal before fast: in "f32", weights in float16 or float32, an engine gives the greedy tokens of the model that it was
prepared from, to the last one; a text does not depend on what else is generated with it.

OpenVINO GenAI (pages, continuous batching, prompt lookup) gets a graph of `decoder_graph`, or reads a GGUF file in its
own way: it rounds the zero points of Q4_1 to integers, which they are not. llama.cpp reads GGUF and takes a request
after the other, since its Python binding does not batch; this part is UNTESTED: written after the source of
llama-cpp-python 0.3.36, and never run.
"""

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from labkit.attention.decoder import check_text
from labkit.data import training
from labkit.deploy import decoder_graph, engines
from labkit.deploy.serving import new_tokens
from labkit.errors import InputError, check_choice, check_whole

# Without these OpenVINO takes bfloat16 where the CPU has it, keeps keys and values in 8 bits, and rounds activations.
_F32, _BF16 = ({"INFERENCE_PRECISION_HINT": kind, "KV_CACHE_PRECISION": kind} for kind in ("f32", "bf16"))
_A8, _FLOATS = ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": size} for size in (32, 0))
PRECISIONS = {"f32": _F32 | _FLOATS, "f32-a8": _F32 | _A8, "bf16-a8": _BF16 | _A8}
MATCH = 3  # tokens that have to agree before what followed them is guessed


class Texts(NamedTuple):
    """ids: each prompt with its new tokens, [T + new]. calls: of the model, one for all requests at a time."""

    ids: list[Tensor]
    calls: int


@dataclass(frozen=True, eq=False)
class LanguageEngine:
    """A language model in an engine.

    bytes: of the files that are deployed. load_seconds: to read them, compile for this CPU and give the first token.
    prepare_seconds: to write them. vocabulary, positions: token ids and tokens of a text that the model knows.
    """

    name: str
    bytes: int
    load_seconds: float
    prepare_seconds: float
    vocabulary: int
    positions: int
    backend: "_GenAI | _LlamaCpp"

    def generate(self, prompts: Sequence[Tensor], *, max_new_tokens: int | Sequence[int], lookup: int = 0) -> Texts:
        """Each prompt [T] (or [1, T]) with its new tokens, greedily and past any end of text, all requests at once.

        max_new_tokens: a number, or one for each prompt.
        lookup: up to so many tokens are guessed a step from where the last MATCH tokens stood before in the text; 0:
            none. It is the same text, but where rounding decides between logits that are equal but for that: so in
            "f32". The first use reads the files a second time. Of "openvino-genai" alone.
        InputError for prompts that are no text of the model and for numbers below 1 (of lookup below 0).
        """
        new = new_tokens(max_new_tokens, prompts)
        check_whole(lookup, "lookup", 0)
        for prompt, count in zip(prompts, new, strict=True):
            check_text(prompt, count, self.vocabulary, self.positions)
        texts, calls = self.backend.generate([prompt.flatten().tolist() for prompt in prompts], new, lookup)
        pairs = zip(prompts, texts, strict=True)
        return Texts([torch.cat([prompt.flatten(), prompt.new_tensor(text)]) for prompt, text in pairs], calls)

    def perplexity(self, tokens: Tensor, *, window: int = 512) -> float:
        """As `training.perplexity`: of the artefact, by the kernels that generate."""
        rows = training.windows(tokens, window)
        for row in rows:
            check_text(row, 1, self.vocabulary, self.positions)
        losses = [-self.backend.log_probabilities(row.tolist()).mean() for row in rows]
        return math.exp(float(np.mean(losses)))


def available() -> dict[str, str]:
    """ "ready" for each name that `prepare` takes, or what is missing and how to install it."""
    return {name: engines.missing(name, row.packages) or "ready" for name, row in LANGUAGE_ENGINES.items()}


def prepare(
    name: str, model: nn.Module | str | Path, *, weights: str = "float16", precision: str = "f32"
) -> LanguageEngine:
    """`model` in the engine `name`, on torch.get_num_threads() threads (of that moment).

    name: "openvino-genai", or "llama.cpp" (UNTESTED).
    model: a LlamaForCausalLM of transformers, for "openvino-genai" alone, which is left as it was; layers that
        `weight_only.quantize` made keep their codes. Or a GGUF file, which the engine reads by itself.
    weights: how the others are stored: a name of `decoder_graph.WEIGHTS`; of a GGUF file nothing is changed.
    precision: of OpenVINO's CPU, one of PRECISIONS: sums, keys and values in float32 or bfloat16; with "a8" it rounds
        what products with integer weights get to 8 bits, in groups of 32, which is how it reaches int8 instructions.

    InputError for an engine that is not installed, a file that is not there, and a model that it cannot take.
    """
    check_choice(name, LANGUAGE_ENGINES, "language engine")
    engines.check_present(name, LANGUAGE_ENGINES[name].packages)
    check_choice(precision, PRECISIONS, "precision")
    start, folder = time.perf_counter(), tempfile.TemporaryDirectory()
    if isinstance(model, nn.Module):
        if name != "openvino-genai":
            raise InputError(f"{name} reads a GGUF file and got a {type(model).__name__}: give the file's path.")
        path = Path(folder.name)
        decoder_graph.Stateful(model, weights).save(path / "openvino_model.xml")  # the name that GenAI looks for
        files, vocabulary, positions = path.iterdir(), model.config.vocab_size, model.config.max_position_embeddings
    else:
        path = Path(model)
        if not path.is_file():
            raise InputError(f"There is no file {path}: give a GGUF file, or a LlamaForCausalLM.")
        files, (vocabulary, positions) = [path], _gguf_sizes(path)
    size = sum(file.stat().st_size for file in files)
    written = time.perf_counter()
    backend = LANGUAGE_ENGINES[name].read(path, PRECISIONS[precision], folder)
    backend.generate([[0]], [1], 0)
    loaded = time.perf_counter()
    return LanguageEngine(name, size, loaded - written, written - start, vocabulary, positions, backend)


def _gguf_sizes(path: Path) -> tuple[int, int]:
    """Of a GGUF file: token ids, and tokens of a text."""
    import gguf

    try:
        fields = gguf.GGUFReader(path).fields
        family = fields["general.architecture"].contents()
        return len(fields["tokenizer.ggml.tokens"].data), int(fields[f"{family}.context_length"].contents())
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(f"{path} is no GGUF file of a language model ({error}): give one.") from error


class _GenAI:
    """OpenVINO GenAI on the CPU. The prefix cache is off: with it a repeated prompt would cost nothing."""

    def __init__(self, path: Path, settings: dict[str, Any], keep: object) -> None:
        self.path, self.settings, self.keep = path, engines.cpu_settings() | settings, keep
        self.pipelines: dict[bool, Any] = {}  # with guesses and without; each holds its weights

    def generate(self, prompts: Sequence[list[int]], new: Sequence[int], lookup: int) -> tuple[list[list[int]], int]:
        guesses = {"num_assistant_tokens": lookup, "max_ngram_size": MATCH} if lookup else {}
        pipeline, calls = self._pipeline(bool(lookup)), 0
        handles = [self._add(pipeline, i, *x, **guesses) for i, x in enumerate(zip(prompts, new, strict=True))]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            calls += 1
        return [handle.read_all()[0].generated_ids[:count] for handle, count in zip(handles, new, strict=True)], calls

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """Of each token but the first, given those before it: [T - 1]."""
        pipeline = self._pipeline(False)
        handle = self._add(pipeline, 0, ids, 1, echo=True, logprobs=1)
        while pipeline.has_non_finished_requests():
            pipeline.step()
        return np.array(handle.read_all()[0].generated_log_probs[1 : len(ids)])

    def _add(self, pipeline: Any, index: int, ids: list[int], new: int, **options: Any) -> Any:
        import openvino
        import openvino_genai

        # It asks for a token that ends texts also where none does.
        options |= {"max_new_tokens": new, "ignore_eos": True, "eos_token_id": 0}
        return pipeline.add_request(index, openvino.Tensor(np.array([ids])), openvino_genai.GenerationConfig(**options))

    def _pipeline(self, guessing: bool) -> Any:
        import openvino_genai

        if guessing not in self.pipelines:
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens = False, 4096
            settings = self.settings | ({"prompt_lookup": True} if guessing else {})
            make = openvino_genai.ContinuousBatchingPipeline
            self.pipelines[guessing] = make(str(self.path), scheduler, "CPU", settings)
        return self.pipelines[guessing]


class _LlamaCpp:
    """llama.cpp by llama-cpp-python, requests one after the other. UNTESTED: never run."""

    def __init__(self, path: Path, settings: dict[str, Any], keep: object) -> None:
        self.path, self.models = path, {}

    def generate(self, prompts: Sequence[list[int]], new: Sequence[int], lookup: int) -> tuple[list[list[int]], int]:
        if lookup:
            raise InputError("llama.cpp is asked without guesses here: leave lookup at 0, or take openvino-genai.")
        model, texts = self._model(scores=False), []
        for prompt, count in zip(prompts, new, strict=True):
            model.reset()  # or a repeated prompt costs nothing
            texts.append(list(itertools.islice(model.generate(prompt, temp=0.0), count)))
        return texts, sum(new)

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        model = self._model(scores=True)
        model.reset()
        model.eval(ids)
        scores = torch.from_numpy(model.scores[: len(ids) - 1]).log_softmax(-1)
        return scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()

    def _model(self, scores: bool) -> Any:
        """scores: keeps the logits of every token; without, those of a prompt's last alone are computed."""
        import llama_cpp

        if scores not in self.models:
            threads = torch.get_num_threads()
            options = {"n_threads": threads, "n_threads_batch": threads, "n_ctx": 0, "logits_all": scores}
            self.models[scores] = llama_cpp.Llama(str(self.path), verbose=False, **options)
        return self.models[scores]


class LanguageRuntime(NamedTuple):
    """packages: what it imports. read(path, settings of the precision, what has to live as long) -> backend."""

    packages: tuple[str, ...]
    read: Callable[[Path, dict[str, Any], object], "_GenAI | _LlamaCpp"]


LANGUAGE_ENGINES = {
    "openvino-genai": LanguageRuntime(("openvino_genai",), _GenAI),  # which brings OpenVINO
    "llama.cpp": LanguageRuntime(("llama_cpp",), _LlamaCpp),
}
