"""Speculative decoding: tokens are guessed ahead and verified in one call, and the text's distribution does not change.

Leviathan, Kalman & Matias 2022 (arXiv:2211.17192, algorithm 1); Chen et al. 2023 (arXiv:2302.01318). Guesses come from
a small model, or from the text itself: prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.arguments import check_floats, check_tensor
from labkit.attention.decoder import Decoder, decoder
from labkit.errors import InputError, check_number, check_whole

MATCHES = (3, 2)  # tokens that have to agree, tried in this order; a match of one token costs more than it gives


@dataclass(frozen=True, eq=False)
class Generated:
    """A generated text, and how far the guesses helped.

    ids: the prompt and the new tokens, with as many dimensions as the prompt.
    proposed, accepted: numbers of guesses, and of guesses that became text.
    calls: calls of the model, the call for the prompt included; without guesses, a call for each new token.
    """

    ids: Tensor
    proposed: int
    accepted: int
    calls: int


def generate(
    model: nn.Module | Decoder,
    ids: Tensor,
    *,
    draft: str | nn.Module | Decoder = "lookup",
    k: int = 4,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generated:
    """Continue `ids` by max_new_tokens, with up to k guesses for each call of the model.

    model: a ForCausalLM of transformers that `Decoder` takes, or a `Decoder`, which saves the conversion.
    ids: token ids of the prompt, [T] or [1, T].
    draft: "lookup", or such a model with the same vocabulary.
    k: most guesses for a call of the model; 0 is plain decoding.
    temperature: temperature of the model and of the draft; 0 takes the most likely token.
    The text has the same distribution as without guesses. At temperature 0 the text is the same, unless rounding
    decides between two logits: a call with more rows adds up in another order. Expect equal texts in float32, and not
    in bfloat16.
    Raises InputError for ids that are no text of the model, k or temperature below 0, and a draft that does not fit.
    """
    target = decoder(model)
    check_whole(k, "k", 0)
    check_whole(max_new_tokens, "max_new_tokens")
    check_number(temperature, "temperature", 0)
    check_whole(seed, "seed", 0)
    target.check(ids, max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    proposer = _proposer(draft, target, ids, max_new_tokens, temperature, generator)
    text = ids.flatten()
    end = len(text) + max_new_tokens
    cache = target.cache(end)
    proposed = accepted = calls = 0
    while len(text) < end:
        most = min(k, end - len(text) - 1)
        guesses, draft_laws = proposer.propose(text, most)
        unread = torch.cat([text, guesses])[cache.length :]
        hidden = target.hidden(unread[None], cache)
        checked = len(guesses) + 1  # tokens that the model predicts: at each guess, and after all
        logits = target.logits(hidden[0, -checked:])
        laws = probabilities(logits, temperature)  # [n + 1, V]
        uniform = torch.rand(len(guesses), generator=generator)
        right, law = verify(laws, draft_laws, guesses, uniform)
        token = torch.multinomial(law.cpu(), 1, generator=generator)
        text = torch.cat([text, guesses[:right], token.to(text)])
        cache.crop(len(text) - 1)  # the rejected guesses were computed in vain
        proposed += len(guesses)
        accepted += right
        calls += 1
    text = text.view(*ids.shape[:-1], -1)
    return Generated(text, proposed, accepted, calls)


def verify(target: Tensor, draft: Tensor, guesses: Tensor, uniform: Tensor) -> tuple[int, Tensor]:
    """Return the number of accepted guesses, and the distribution [V] of the token after the accepted guesses.

    target [n + 1, V]: the model's probabilities p at each guess, and after all guesses.
    draft [n, V]: the probabilities q from which guesses [n] were drawn.
    uniform [n]: random numbers in [0, 1).
    Leviathan et al., algorithm 1. Guess x is accepted with probability min(1, p(x) / q(x)); the first rejected guess is
    replaced by a token from max(0, p - q) / sum max(0, p - q).
    Together: q min(1, p / q) + (1 - sum min(p, q)) max(0, p - q) / sum max(0, p - q) = p.
    """
    number = len(guesses)
    vocabulary = target.shape[-1]
    if len(target) != number + 1 or draft.shape != (number, vocabulary):
        raise InputError(
            f"{number} guesses do not belong to laws {list(target.shape)} and {list(draft.shape)}: give the "
            "model's [n + 1, V] and the draft's [n, V]."
        )
    for i, guess in enumerate(guesses.tolist()):
        p, q = target[i], draft[i]
        if uniform[i] * q[guess] >= p[guess]:
            rest = (p - q).clamp(min=0)
            return i, rest / rest.sum()
    return number, target[-1]


def lookup(text: Tensor, k: int) -> Tensor:
    """Guess up to k tokens: the continuation of the text's last 3 (or 2) tokens at an earlier place in text [T].

    Of several places the latest with k tokens behind is taken, or else the first. Returns no token if there is none.
    """
    check_tensor(text, "text")
    check_whole(k, "k", 0)
    if text.dim() != 1:
        raise InputError(f"text has shape {list(text.shape)}, but it must be token ids [T]: call .flatten() first.")
    for size in MATCHES:
        if len(text) <= size:
            continue
        earlier = text[:-1].unfold(0, size, 1)  # [places, size]
        same = (earlier == text[-size:]).all(1)
        starts = same.nonzero().flatten() + size
        if len(starts):
            full = starts[starts + k <= len(text)]
            best = full[-1] if len(full) else starts[0]
            start = int(best)
            return text[start : start + k]
    return text[:0]


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Turn logits [..., V] into the distribution of the next token [..., V]; temperature 0: all on the largest."""
    check_floats(logits, "logits")
    check_number(temperature, "temperature", 0)
    if temperature == 0:
        most_likely = logits.argmax(-1)
        return F.one_hot(most_likely, logits.shape[-1]).float()
    return (logits.float() / temperature).softmax(-1)


class _Proposer(Protocol):
    def propose(self, text: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Guess up to k tokens after text [T]: ids [n], and the distributions [n, V] the ids were drawn from."""


class _Lookup:
    """Proposer that looks guesses up in the text; all probability lies on each guess."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def propose(self, text: Tensor, k: int) -> tuple[Tensor, Tensor]:
        guesses = lookup(text, k)
        return guesses, F.one_hot(guesses, self.vocabulary).float()


class _Draft:
    """Proposer that draws guesses from a small model, on a cache with room for `capacity` tokens."""

    def __init__(self, model: Decoder, capacity: int, temperature: float, generator: torch.Generator) -> None:
        self.model = model
        self.cache = model.cache(capacity)
        self.temperature = temperature
        self.generator = generator

    def propose(self, text: Tensor, k: int) -> tuple[Tensor, Tensor]:
        accepted = min(self.cache.length, len(text) - 1)
        self.cache.crop(accepted)
        start = len(text)
        laws = []
        for _ in range(k):
            unread = text[self.cache.length :]
            hidden = self.model.hidden(unread[None], self.cache)
            logits = self.model.logits(hidden[0, -1])
            law = probabilities(logits, self.temperature)
            token = torch.multinomial(law.cpu(), 1, generator=self.generator)
            text = torch.cat([text, token.to(text)])
            laws.append(law)
        if not laws:
            return text[start:], torch.zeros(0, self.model.vocabulary, device=text.device)
        return text[start:], torch.stack(laws)


def _proposer(
    draft: str | nn.Module | Decoder,
    target: Decoder,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> _Proposer:
    if isinstance(draft, str):
        if draft != "lookup":
            raise InputError(f'There is no draft {draft!r}: give "lookup" or a model.')
        return _Lookup(target.vocabulary)
    model = decoder(draft)
    if (model.vocabulary, model.special) != (target.vocabulary, target.special):
        raise InputError(
            f"The draft has {model.vocabulary} tokens with {model.special} as special ones, and the model "
            f"{target.vocabulary} with {target.special}: give a draft with the same tokenizer."
        )
    model.check(ids, max_new_tokens)
    return _Draft(model, ids.numel() + max_new_tokens, temperature, generator)
