"""A language model in OpenVINO GenAI: several texts at once, guesses looked up in the text, and perplexity.

OpenVINO GenAI brings pages, continuous batching and prompt lookup. The engine gets the graph `decoder_graph.Stateful`,
or reads a GGUF file in its own way: the zero points of Q4_1 are rounded to integers, which they are not.

Perplexity is measured on the deployed files: the engine scores a text with the kernels and the cache that generate.
Equal before fast: in "f32", with weights in float16 or float32, the engine gives the greedy tokens of the model that it
was prepared from, to the last token; a text does not depend on the texts generated beside it.
"""

import math
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from labkit.attention.decoder import check_text
from labkit.data import training
from labkit.deploy import decoder_graph, engines
from labkit.deploy.openvino_runtimes import cpu_settings
from labkit.deploy.serving import new_tokens
from labkit.deploy.simulation import Times
from labkit.errors import InputError, check_choice, check_whole

PACKAGES = {"openvino-genai": ("openvino_genai",)}  # by engine; openvino_genai brings OpenVINO
# Without these OpenVINO takes bfloat16 where the CPU has it, keeps keys and values in 8 bits, and rounds activations.
_F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
_BF16 = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"}
_A8 = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 32}
_EXACT = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
PRECISIONS = {"f32": _F32 | _EXACT, "f32-a8": _F32 | _A8, "bf16-a8": _BF16 | _A8}
MATCH = 3  # tokens that have to agree before their continuation is guessed


class Texts(NamedTuple):
    """Generated texts.

    ids: each prompt with its new tokens, [T + new].
    calls: steps of the model, shared by all.
    """

    ids: list[Tensor]
    calls: int


class ServedTexts(NamedTuple):
    """Generated texts of requests that joined and left while others ran.

    ids: each prompt with its new tokens, [T + new].
    token_s: seconds from the start until each new token was there, [new] for each request.
    steps: steps of the model, shared by all that ran.
    """

    ids: list[Tensor]
    token_s: list[Times]
    steps: int


@dataclass(frozen=True, eq=False)
class LanguageEngine:
    """A language model in an engine.

    bytes: size of the deployed files.
    prepare_seconds: time to write the files.
    load_seconds: time to read the files, compile for this CPU and give the first token.
    vocabulary: number of token ids.
    positions: length of the longest text, in tokens.
    """

    name: str
    bytes: int
    load_seconds: float
    prepare_seconds: float
    vocabulary: int
    positions: int
    backend: "_GenAI"

    def generate(self, prompts: Sequence[Tensor], *, max_new_tokens: int | Sequence[int], lookup: int = 0) -> Texts:
        """Continue each prompt [T] (or [1, T]) greedily and past any end of text, all prompts at once.

        max_new_tokens: a number, or a number for each prompt.
        lookup: up to so many tokens are guessed in a step, from the earlier place where the last MATCH tokens stood;
            0: no guesses. The texts are the same, unless rounding decides between two logits: expect equal texts in
            "f32". The first call with guesses reads the files a second time.
        Raises InputError for prompts that are no text of the model and for numbers below 1 (lookup: below 0).
        """
        new = self._new_tokens(max_new_tokens, prompts)
        check_whole(lookup, "lookup", 0)
        continuations, calls = self.backend.generate(_as_lists(prompts), new, lookup)
        return Texts(_joined(prompts, continuations), calls)

    def serve(
        self, prompts: Sequence[Tensor], *, max_new_tokens: int | Sequence[int], max_batch: int = 8
    ) -> ServedTexts:
        """Continue each prompt greedily, at most `max_batch` at a time: whoever waits joins when somebody leaves.

        The arguments are those of `generate`, the texts too.
        """
        new = self._new_tokens(max_new_tokens, prompts)
        check_whole(max_batch, "max_batch")
        continuations, token_s, steps = self.backend.serve(_as_lists(prompts), new, max_batch)
        return ServedTexts(_joined(prompts, continuations), [np.array(times) for times in token_s], steps)

    def _new_tokens(self, max_new_tokens: int | Sequence[int], prompts: Sequence[Tensor]) -> list[int]:
        """Return the number of new tokens of each prompt; InputError for what the model cannot continue."""
        new = new_tokens(max_new_tokens, prompts)
        for prompt, count in zip(prompts, new, strict=True):
            check_text(prompt, count, self.vocabulary, self.positions)
        return new

    def perplexity(self, tokens: Tensor, *, window: int = 512) -> float:
        """Compute the perplexity of tokens [T] in windows, like `training.perplexity`, with the deployed kernels."""
        losses = []
        for row in training.windows(tokens, window):
            check_text(row, 1, self.vocabulary, self.positions)
            log_probabilities = self.backend.log_probabilities(row.tolist())
            losses.append(-log_probabilities.mean())
        return math.exp(float(np.mean(losses)))


def available() -> dict[str, str]:
    """Return for each engine "ready", or a sentence that names the missing packages and how to install the first."""
    return {name: engines.missing(name, packages) or "ready" for name, packages in PACKAGES.items()}


def prepare(
    name: str, model: nn.Module | str | Path, *, weights: str = "float16", precision: str = "f32"
) -> LanguageEngine:
    """Prepare a language model for the engine `name`, on the current number of torch's threads.

    name: "openvino-genai".
    model: a LlamaForCausalLM of transformers, unchanged afterwards, whose layers from `weight_only.quantize` keep their
        codes; or the path of a GGUF file.
    weights: storage of all other layers, a name of `decoder_graph.WEIGHTS`; a GGUF file is left as it is.
    precision: a name of PRECISIONS: float32 or bfloat16 for sums, keys and values. With "a8" the inputs of products
        with integer weights are rounded to 8 bits, in groups of 32, and int8 instructions do the products.
    Raises InputError for an engine that is not installed, a missing file, and a model that the engine cannot take.
    """
    check_choice(name, PACKAGES, "language engine")
    engines.check_present(name, PACKAGES[name])
    check_choice(precision, PRECISIONS, "precision")
    start = time.perf_counter()
    folder = tempfile.TemporaryDirectory()
    if isinstance(model, nn.Module):
        path = Path(folder.name)
        decoder_graph.Stateful(model, weights).save(path / "openvino_model.xml")  # the name that GenAI looks for
        size = sum(file.stat().st_size for file in path.iterdir())
        vocabulary, positions = model.config.vocab_size, model.config.max_position_embeddings
    else:
        path = Path(model)
        if not path.is_file():
            raise InputError(f"There is no file {path}: give a GGUF file, or a LlamaForCausalLM.")
        size = path.stat().st_size
        vocabulary, positions = _gguf_sizes(path)
    written = time.perf_counter()
    backend = _GenAI(path, PRECISIONS[precision], folder)
    backend.generate([[0]], [1], 0)
    loaded = time.perf_counter()
    return LanguageEngine(name, size, loaded - written, written - start, vocabulary, positions, backend)


def _gguf_sizes(path: Path) -> tuple[int, int]:
    """Read from a GGUF file the number of token ids, and the length of the longest text."""
    import gguf

    try:
        fields = gguf.GGUFReader(path).fields
        family = fields["general.architecture"].contents()
        vocabulary = len(fields["tokenizer.ggml.tokens"].data)
        positions = int(fields[f"{family}.context_length"].contents())
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(f"{path} is no GGUF file of a language model ({error}): give one.") from error
    return vocabulary, positions


def _as_lists(prompts: Sequence[Tensor]) -> list[list[int]]:
    return [prompt.flatten().tolist() for prompt in prompts]


def _joined(prompts: Sequence[Tensor], continuations: Sequence[list[int]]) -> list[Tensor]:
    """Return each prompt [T] with its new tokens, [T + new]."""
    rows = [prompt.flatten() for prompt in prompts]
    return [torch.cat([row, row.new_tensor(new)]) for row, new in zip(rows, continuations, strict=True)]


class _GenAI:
    """OpenVINO GenAI on the CPU. The prefix cache is off: with it a repeated prompt would cost nothing.

    path: folder of the graph, or GGUF file.
    settings: properties of the CPU device.
    folder: temporary folder of the files, kept as long as the engine.
    """

    def __init__(self, path: Path, settings: dict[str, Any], folder: tempfile.TemporaryDirectory) -> None:
        self.path = path
        self.settings = cpu_settings() | settings
        self.folder = folder
        self.pipelines: dict[bool, Any] = {}  # with guesses and without; each holds its weights

    def generate(self, prompts: Sequence[list[int]], new: Sequence[int], lookup: int) -> tuple[list[list[int]], int]:
        """Continue the prompts: the new tokens of each prompt, and the number of steps."""
        guesses = {"num_assistant_tokens": lookup, "max_ngram_size": MATCH} if lookup else {}
        pipeline = self._pipeline(guessing=bool(lookup))
        handles = []
        for number, (prompt, count) in enumerate(zip(prompts, new, strict=True)):
            handles.append(self._add(pipeline, number, prompt, count, **guesses))
        steps = _run(pipeline)
        texts = []
        for handle, count in zip(handles, new, strict=True):
            (generation,) = handle.read_all()
            texts.append(generation.generated_ids[:count])
        return texts, steps

    def serve(
        self, prompts: Sequence[list[int]], new: Sequence[int], max_batch: int
    ) -> tuple[list[list[int]], list[list[float]], int]:
        """Continue the prompts, `max_batch` at a time: new tokens, their times in seconds, and the number of steps."""
        pipeline = self._pipeline(guessing=False)
        tokens: list[list[int]] = [[] for _ in prompts]
        token_s: list[list[float]] = [[] for _ in prompts]
        waiting = deque(range(len(prompts)))
        running: dict[int, Any] = {}  # handles by the number of the prompt
        steps = 0
        start = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < max_batch:
                number = waiting.popleft()
                running[number] = self._add(pipeline, number, prompts[number], new[number])
            pipeline.step()
            steps += 1
            now = time.perf_counter() - start
            for number, handle in running.items():
                while handle.can_read():
                    (generation,) = handle.read().values()
                    tokens[number] += generation.generated_ids
                    token_s[number] += [now] * len(generation.generated_ids)
            running = {number: handle for number, handle in running.items() if len(tokens[number]) < new[number]}
        return tokens, token_s, steps

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """Return the log-probability of each token but the first, given the tokens before: [T - 1]."""
        pipeline = self._pipeline(guessing=False)
        handle = self._add(pipeline, 0, ids, 1, echo=True, logprobs=1)
        _run(pipeline)
        (generation,) = handle.read_all()
        return np.array(generation.generated_log_probs[1 : len(ids)])

    def _add(self, pipeline: Any, number: int, ids: list[int], new: int, **options: Any) -> Any:
        """Add a request to a pipeline, and return its handle."""
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig(
            max_new_tokens=new,
            ignore_eos=True,
            eos_token_id=0,  # GenAI asks for a token that ends texts also where none does
            **options,
        )
        return pipeline.add_request(number, openvino.Tensor(np.array([ids])), config)

    def _pipeline(self, guessing: bool) -> Any:
        import openvino_genai

        if guessing not in self.pipelines:
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.enable_prefix_caching = False
            scheduler.max_num_batched_tokens = 4096
            settings = self.settings | ({"prompt_lookup": True} if guessing else {})
            pipeline = openvino_genai.ContinuousBatchingPipeline(str(self.path), scheduler, "CPU", settings)
            self.pipelines[guessing] = pipeline
        return self.pipelines[guessing]


def _run(pipeline: Any) -> int:
    """Step a pipeline until all requests are finished, and return the number of steps."""
    steps = 0
    while pipeline.has_non_finished_requests():
        pipeline.step()
        steps += 1
    return steps
