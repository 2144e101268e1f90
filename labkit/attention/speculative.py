"""Tokens guessed ahead and checked in one call: the law of the text stays that of the model, whoever guesses.

Leviathan, Kalman & Matias 2022 (arXiv:2211.17192, algorithm 1); Chen et al. 2023 (arXiv:2302.01318). Guesses come from
a small model, or from the text itself: prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.arguments import check_floats, check_tensor
from labkit.attention.decoder import Decoder, decoder
from labkit.errors import InputError, check_number, check_whole

MATCHES = (3, 2)  # tokens that have to agree, tried in this order; a match of one token costs more than it gives

Guesses = tuple[Tensor, Tensor]  # token ids [n], and the probabilities [n, V] from which they were drawn
Propose = Callable[[Tensor, int], Guesses]  # propose(text [T], at most so many)


@dataclass(frozen=True, eq=False)
class Generated:
    """A text with what was generated, and what the guesses were worth.

    ids: the prompt and the new tokens, of as many dimensions as the prompt.
    proposed, accepted: guesses made, and those that became text.
    calls: of the model, the one for the prompt included; without guesses there is one for each new token.
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

    model: a LlamaForCausalLM of transformers, or a `Decoder`, which saves its making. ids: [T] or [1, T].
    draft: "lookup", or a model with the same vocabulary. k: 0 is plain decoding.
    temperature: of the model and the draft; 0 takes the most likely token. The text has the same law as without
        guesses, and at temperature 0 it is the same text, but where the rounding of a call with other rows decides
        between logits that are equal but for that: so in float32, not in bfloat16.
    Raises InputError for ids that are no text of the model, k or temperature below 0, and a draft that does not fit.
    """
    target = decoder(model)
    check_whole(k, "k", 0)
    check_whole(max_new_tokens, "max_new_tokens")
    check_number(temperature, "temperature", 0)
    check_whole(seed, "seed", 0)
    target.check(ids, max_new_tokens)
    propose, generator = _proposer(draft, target, ids, max_new_tokens, temperature, seed)
    text, end = ids.flatten(), ids.numel() + max_new_tokens
    cache = target.cache(end)
    proposed = accepted = calls = 0
    while len(text) < end:
        guesses, law = propose(text, min(k, end - len(text) - 1))
        hidden = target.hidden(torch.cat([text, guesses])[None, cache.length :], cache)
        laws = probabilities(target.logits(hidden[0, -len(guesses) - 1 :]), temperature)  # [n + 1, V]
        n, following = verify(laws, law, guesses, torch.rand(len(guesses), generator=generator))
        token = torch.multinomial(following.cpu(), 1, generator=generator).to(text)
        text = torch.cat([text, guesses[:n], token])
        cache.crop(len(text) - 1)  # what follows the accepted guesses was computed in vain
        proposed, accepted, calls = proposed + len(guesses), accepted + n, calls + 1
    return Generated(text.view(*ids.shape[:-1], -1), proposed, accepted, calls)


def verify(target: Tensor, draft: Tensor, guesses: Tensor, uniform: Tensor) -> tuple[int, Tensor]:
    """How many guesses are accepted, and the law [V] of the token after them (Leviathan et al., algorithm 1).

    target [n + 1, V]: the model's probabilities p where each guess stands, and after all. draft [n, V]: those q from
        which guesses [n] were drawn. uniform [n]: random numbers in [0, 1).
    Guess x is accepted with probability min(1, p(x) / q(x)); the first one that is not is replaced by a token of the
    law max(0, p - q) / sum max(0, p - q). Together: q min(1, p / q) + (1 - sum min(p, q)) max(0, p - q) / sum = p.
    """
    if len(target) != len(guesses) + 1 or draft.shape != (len(guesses), target.shape[-1]):
        raise InputError(
            f"{len(guesses)} guesses do not belong to laws {list(target.shape)} and {list(draft.shape)}: give the "
            "model's [n + 1, V] and the draft's [n, V]."
        )
    for i, guess in enumerate(guesses.tolist()):
        if uniform[i] * draft[i, guess] >= target[i, guess]:
            rest = (target[i] - draft[i]).clamp(min=0)
            return i, rest / rest.sum()
    return len(guesses), target[-1]


def lookup(text: Tensor, k: int) -> Tensor:
    """Up to k tokens that followed the last 3 tokens (or 2) of text [T] where they stood before; none if nowhere.

    The latest place that has k tokens after it, or else the first.
    """
    check_tensor(text, "text")
    check_whole(k, "k", 0)
    if text.dim() != 1:
        raise InputError(f"text has shape {list(text.shape)}, but it must be token ids [T]: call .flatten() first.")
    for size in MATCHES:
        if len(text) > size:
            places = (text[:-1].unfold(0, size, 1) == text[-size:]).all(1).nonzero().flatten() + size
            if len(places):
                full = places[places + k <= len(text)]
                start = int(full[-1] if len(full) else places[0])
                return text[start : start + k]
    return text[:0]


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Logits [..., V] to the law from which a token is drawn, [..., V]; at temperature 0 all on the largest logit."""
    check_floats(logits, "logits")
    check_number(temperature, "temperature", 0)
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return (logits.float() / temperature).softmax(-1)


def _proposer(
    draft: str | nn.Module | Decoder, target: Decoder, ids: Tensor, new: int, temperature: float, seed: int
) -> tuple[Propose, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(draft, str):
        if draft != "lookup":
            raise InputError(f'There is no draft {draft!r}: give "lookup" or a model.')
        return lambda text, k: _certain(lookup(text, k), target.vocabulary), generator
    model = decoder(draft)
    if (model.vocabulary, model.special) != (target.vocabulary, target.special):
        raise InputError(
            f"The draft has {model.vocabulary} tokens with {model.special} as special ones, and the model "
            f"{target.vocabulary} with {target.special}: give a draft with the same tokenizer."
        )
    model.check(ids, new)
    cache = model.cache(ids.numel() + new)

    def propose(text: Tensor, k: int) -> Guesses:
        cache.crop(min(cache.length, len(text) - 1))  # the guesses that were not accepted
        start, laws = len(text), []
        for _ in range(k):
            hidden = model.hidden(text[None, cache.length :], cache)
            laws.append(probabilities(model.logits(hidden[0, -1]), temperature))
            text = torch.cat([text, torch.multinomial(laws[-1].cpu(), 1, generator=generator).to(text)])
        return text[start:], torch.stack(laws) if laws else _certain(text[start:], target.vocabulary)[1]

    return propose, generator


def _certain(guesses: Tensor, vocabulary: int) -> Guesses:
    """Guesses that were not drawn: all probability on each."""
    return guesses, F.one_hot(guesses, vocabulary).float()
