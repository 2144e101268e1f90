"""A language model in an engine: a prompt, several at once, guesses looked up in the text, and perplexity.

Perplexity is of what is deployed: the engine scores the text with the file, the kernels and the cache that generate.
Equal before fast: in "f32", weights in float16 or float32, an engine gives the greedy tokens of the model that it was
prepared from, to the last one; a text does not depend on what else is generated with it.

OpenVINO GenAI (pages, continuous batching, prompt lookup) gets a graph of `decoder_graph`, or reads a GGUF file in its
own way: it rounds the zero points of Q4_1 to integers, which they are not. llama.cpp reads GGUF and serves a request
after the other, since its Python binding does not batch; it is UNTESTED: no test of the course has run it.
"""

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

from labkit import training
from labkit.attention.decoder import check_text
from labkit.deploy import decoder_graph, engines
from labkit.deploy.serving import Texts, new_tokens
from labkit.errors import InputError, check_choice, check_whole

# Without these OpenVINO takes bfloat16 where the CPU has it, keeps keys and values in 8 bits, and rounds activations.
_F32, _BF16 = ({"INFERENCE_PRECISION_HINT": kind, "KV_CACHE_PRECISION": kind} for kind in ("f32", "bf16"))
_A8, _FLOATS = ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": size} for size in (32, 0))
PRECISIONS = {"f32": _F32 | _FLOATS, "f32-a8": _F32 | _A8, "bf16": _BF16 | _FLOATS, "bf16-a8": _BF16 | _A8}
MATCH = 3  # tokens that have to agree before what followed them is guessed
Steps = list[tuple[list[int], float]]  # tokens that a request got at a time, and when, seconds


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
            "f32". The first use reads the files a second time.
        InputError for prompts that are no text of the model and for numbers below 1 (of lookup below 0).
        """
        new = new_tokens(max_new_tokens, prompts)
        check_whole(lookup, "lookup", 0)
        for prompt, count in zip(prompts, new, strict=True):
            check_text(prompt, count, self.vocabulary, self.positions)
        steps, calls = self.backend.generate([prompt.flatten().tolist() for prompt in prompts], new, lookup)
        ids, times = [], []
        for prompt, count, request in zip(prompts, new, steps, strict=True):
            tokens = [token for step, _ in request for token in step]
            ids.append(torch.cat([prompt.flatten(), prompt.new_tensor(tokens[:count])]))
            times.append(np.array([now for step, now in request for _ in step][:count]))
        return Texts(ids, times, calls)

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
    name: str,
    model: nn.Module | str | Path,
    *,
    weights: str = "float16",
    precision: str = "f32",
    folder: str | Path | None = None,
) -> LanguageEngine:
    """`model` in the engine `name`, on torch.get_num_threads() threads (of that moment).

    name: "openvino-genai", or "llama.cpp" (untested).
    model: a LlamaForCausalLM of transformers, for "openvino-genai" alone, which is left as it was; layers that
        `weight_only.quantize` made keep their codes. Or a GGUF file, that the engine reads by itself.
    weights: how the others are stored: a name of `decoder_graph.WEIGHTS`; of a GGUF file nothing is changed.
    precision: of OpenVINO's CPU, one of PRECISIONS: sums, keys and values in float32 or bfloat16; with "a8" it rounds
        what products with integer weights get to 8 bits, in groups of 32, which is how it reaches int8 instructions.
    folder: keeps what is written there; else it lasts as long as the engine.

    InputError for an engine that is not installed, a file that is not there, and a model that it cannot take.
    """
    check_choice(name, LANGUAGE_ENGINES, "language engine")
    engines.check_present(name, LANGUAGE_ENGINES[name].packages)
    check_choice(weights, decoder_graph.WEIGHTS, "format of weights")
    check_choice(precision, PRECISIONS, "precision")
    temporary = tempfile.TemporaryDirectory() if folder is None else None
    target = Path(temporary.name if temporary else folder)
    start = time.perf_counter()
    if isinstance(model, nn.Module):
        if name != "openvino-genai":
            raise InputError(f"{name} reads a GGUF file and got a {type(model).__name__}: give the file's path.")
        target.mkdir(parents=True, exist_ok=True)
        files = [target / f"openvino_model.{kind}" for kind in ("xml", "bin")]  # by which names GenAI looks for them
        decoder_graph.write_openvino(model, files[0], weights=weights)
        vocabulary, positions = model.config.vocab_size, model.config.max_position_embeddings
    else:
        target = Path(model)
        if not target.is_file():
            raise InputError(f"There is no file {target}: give a GGUF file, or a LlamaForCausalLM.")
        files = [target]
        vocabulary, positions = _gguf_sizes(target)
    written = time.perf_counter()
    backend = LANGUAGE_ENGINES[name].read(target, PRECISIONS[precision], temporary)
    backend.generate([[0]], [1], 0)
    loaded = time.perf_counter()
    size = sum(file.stat().st_size for file in files)
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

    def generate(self, prompts: Sequence[list[int]], new: Sequence[int], lookup: int) -> tuple[list[Steps], int]:
        guesses = {"num_assistant_tokens": lookup, "max_ngram_size": MATCH} if lookup else {}
        pipeline = self._pipeline(bool(lookup))
        start, calls, steps = time.perf_counter(), 0, [[] for _ in prompts]
        handles = [self._add(pipeline, i, *x, **guesses) for i, x in enumerate(zip(prompts, new, strict=True))]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            calls, now = calls + 1, time.perf_counter() - start
            for request, handle in zip(steps, handles, strict=True):
                while handle.can_read():
                    request += [(output.generated_ids, now) for output in handle.read().values()]
        return steps, calls

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
    """llama.cpp by llama-cpp-python, requests one after the other. UNTESTED: no test of the course has run it."""

    def __init__(self, path: Path, settings: dict[str, Any], keep: object) -> None:
        self.path, self.models = path, {}

    def generate(self, prompts: Sequence[list[int]], new: Sequence[int], lookup: int) -> tuple[list[Steps], int]:
        start, calls, steps = time.perf_counter(), 0, []
        model = self._model(lookup, scores=False)
        for prompt, count in zip(prompts, new, strict=True):
            model.reset()
            steps.append([])
            for token in model.generate(prompt, temp=0.0):
                steps[-1].append(([token], time.perf_counter() - start))
                calls += 1
                if len(steps[-1]) == count:
                    break
        return steps, calls

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        model = self._model(0, scores=True)
        model.reset()
        model.eval(ids)
        scores = torch.from_numpy(model.scores[: len(ids) - 1]).log_softmax(-1)
        return scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()

    def _model(self, lookup: int, scores: bool) -> Any:
        import llama_cpp
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        if (lookup, scores) not in self.models:
            threads = torch.get_num_threads()
            options = {"n_threads": threads, "n_threads_batch": threads, "n_ctx": 2048, "logits_all": scores}
            if lookup:
                options["draft_model"] = LlamaPromptLookupDecoding(max_ngram_size=MATCH, num_pred_tokens=lookup)
            self.models[lookup, scores] = llama_cpp.Llama(str(self.path), verbose=False, **options)
        return self.models[lookup, scores]


class LanguageRuntime(NamedTuple):
    """packages: what it imports. read(path, settings of the precision, what has to live as long) -> backend."""

    packages: tuple[str, ...]
    read: Callable[[Path, dict[str, Any], object], "_GenAI | _LlamaCpp"]


LANGUAGE_ENGINES = {
    "openvino-genai": LanguageRuntime(("openvino_genai",), _GenAI),  # which brings OpenVINO
    "llama.cpp": LanguageRuntime(("llama_cpp",), _LlamaCpp),
}
