"""Real data of the course by name: Fashion-MNIST, movie-review snippets, the Debian handbook's prose and four photos.

All data are committed under data/ (sources and licences: data/manifest.toml). The splits follow from the data, not
from a random generator, so the splits are the same on every machine. No function downloads or augments.
"""

import gzip
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from labkit.data import fetch
from labkit.errors import check_choice, check_whole

# Mean and standard deviation of the pixels of all 60,000 training images, scale 0..1; tests/test_datasets.py
# recomputes them.
FASHION_MEAN, FASHION_STD = 0.2860, 0.3530
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_VALIDATION_PER_CLASS = 500  # of 6,000 training images in each class

SPLITS = ("train", "validation", "test")
REVIEW_CLASSES = ("negative", "positive")
# "train" is the rest of the smaller class, and as many of the other
_REVIEWS_PER_CLASS = {"test": 1000, "validation": 400}

PHOTOS = {"chelsea": "chelsea.png", "coffee": "coffee.png", "china": "china.jpg", "flower": "flower.jpg"}


@dataclass(frozen=True)
class Split:
    """Images float32 [N, 1, 28, 28], normalised, and labels int64 [N] in 0..9 (names: FASHION_CLASSES)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Reviews:
    """N snippets of text, and labels int64 [N]: 1 positive, 0 negative."""

    texts: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def fashion_mnist(split: str = "train", n: int | None = None) -> Split:
    """Load Fashion-MNIST (Xiao et al. 2017), 28x28 grey images of ten kinds of clothes.

    split: "train" 55,000 images, "validation" 5,000 (held out of "train") for choices, "test" 10,000 for the reported
        number.
    n: size of a subset in which the classes differ by at most one image; None for all.
    Raises InputError for an unknown split or an `n` outside 1..size.
    """
    check_choice(split, SPLITS, "split")
    stem = "t10k" if split == "test" else "train"
    images = torch.from_numpy(_idx(f"fashion-mnist/{stem}-images-idx3-ubyte.gz"))  # uint8 [N, 28, 28]
    labels = torch.from_numpy(_idx(f"fashion-mnist/{stem}-labels-idx1-ubyte.gz")).long()  # [N]
    if split != "test":
        held_out = _held_out(labels)
        in_split = held_out if split == "validation" else ~held_out
        images, labels = images[in_split], labels[in_split]
    subset = _balanced(labels, n)
    images = images[subset].unsqueeze(1).float().div_(255)  # [N, 1, 28, 28]
    return Split(images.sub_(FASHION_MEAN).div_(FASHION_STD), labels[subset])


def reviews(split: str = "train", n: int | None = None) -> Reviews:
    """Load movie-review snippets (Hutto & Gilbert 2014), labelled by the sign of the mean human rating.

    split: "train" 7,682 snippets, "validation" 800, "test" 2,000; half of each are positive. Snippets that differ only
        in case, spaces or punctuation count once, so that no snippet is in two splits.
    n: size of a subset in which the classes differ by at most one; None for all.
    Raises InputError for an unknown split or an `n` outside 1..size.
    """
    check_choice(split, SPLITS, "split")
    rated = _rated_snippets(fetch.path("reviews/movieReviewSnippets_GroundTruth.txt.gz"))
    positive = [text for rating, text in rated if rating > 0]
    negative = [text for rating, text in rated if rating < 0]
    start, end = _review_bounds(min(len(positive), len(negative)))[split]
    # alternating classes: any run of an even number of snippets is balanced
    texts = []
    for pair in zip(negative[start:end], positive[start:end], strict=True):
        texts += pair
    labels = torch.tensor([0, 1] * (end - start))
    subset = _balanced(labels, n)
    return Reviews([texts[i] for i in subset.tolist()], labels[subset])


def handbook(part: str = "test") -> str:
    """Load prose of the Debian Administrator's Handbook (Hertzog & Mas); an empty line separates paragraphs.

    part: "calibration" or "test", from different chapters.
    Raises InputError for an unknown part.
    """
    check_choice(part, ("calibration", "test"), "part")
    return gzip.decompress(fetch.path(f"handbook/{part}.txt.gz").read_bytes()).decode("utf-8")


def photos() -> dict[str, Image.Image]:
    """Load four RGB photos by name, to show a model at work: chelsea (a cat), coffee, china (a palace), flower."""
    paths = {name: fetch.path(f"photos/{file}") for name, file in PHOTOS.items()}
    return {name: Image.open(path).convert("RGB") for name, path in paths.items()}


def photo_crops(n: int, *, seed: int = 0) -> list[Image.Image]:
    """Cut random squares from the four photos, with sides from half to all of the photo's shorter side.

    n: number of squares from each photo, photo after photo.
    seed: seed that draws the squares.
    Crops of a photo are alike: a network's results on them are about that photo, not about photos in general.
    Raises InputError for an `n` below 1.
    """
    check_whole(n, "n")
    generator = torch.Generator().manual_seed(seed)
    crops = []
    for photo in photos().values():
        for share, across, down in torch.rand(n, 3, generator=generator).tolist():
            side = round(min(photo.size) * (1 + share) / 2)
            x = round(across * (photo.width - side))
            y = round(down * (photo.height - side))
            crops.append(photo.crop((x, y, x + side, y + side)))
    return crops


def _idx(name: str) -> np.ndarray:
    """Read an idx file of unsigned bytes (LeCun's MNIST page): 0, 0, type 8, rank, rank big-endian sizes, the bytes."""
    raw = bytearray(gzip.decompress(fetch.path(name).read_bytes()))  # a bytearray: torch wants a writable buffer
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _held_out(labels: Tensor) -> Tensor:
    """Mark the validation images, bool [N]: the last images of each class in the file's order."""
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(FASHION_CLASSES)):
        positions = (labels == label).nonzero().flatten()
        held_out[positions[-_VALIDATION_PER_CLASS:]] = True
    return held_out


@cache  # 0.1 s and 2 MB, and a lesson asks for several splits
def _rated_snippets(file: Path) -> tuple[tuple[float, str], ...]:
    """Read all distinct snippets with a rating other than 0, as (rating, text), in a fixed random order.

    The file is ordered by label. Sorting by a hash shuffles the snippets in an order that no version of a random
    generator can change.
    """
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").splitlines()
    first_of: dict[str, tuple[float, str]] = {}  # by text without case and punctuation
    for line in lines:
        _, rating, text = line.split("\t")
        if float(rating) != 0:
            words = re.sub(r"\W+", " ", text.lower()).strip()
            first_of.setdefault(words, (float(rating), text))
    by_hash = sorted(first_of, key=lambda words: hashlib.sha256(words.encode()).digest())
    return tuple(first_of[words] for words in by_hash)


def _review_bounds(per_class: int) -> dict[str, tuple[int, int]]:
    """Return (start, end) of each split in the list of a class's `per_class` snippets; `end` is exclusive."""
    bounds = {}
    start = 0
    for name, size in _REVIEWS_PER_CLASS.items():
        bounds[name] = (start, start + size)
        start += size
    return {**bounds, "train": (start, per_class)}


def _balanced(labels: Tensor, n: int | None) -> Tensor:
    """Draw the positions [n] of a class-balanced random subset, in the data's order; all positions for n=None."""
    if n is None:
        return torch.arange(len(labels))
    check_whole(n, "n", most=len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rank = torch.empty_like(labels)  # number of rows of the same class that come before, in random order
    for label in labels.unique():
        same_class = order[labels[order] == label]
        rank[same_class] = torch.arange(len(same_class))
    by_rank = order[rank[order].argsort(stable=True)]  # a row of each class, then a second row of each class, ...
    return by_rank[:n].sort().values
