"""The course's real data by name: Fashion-MNIST, movie-review snippets, the Debian handbook's prose and four photos.

All of it is committed under data/ (sources and licences: data/manifest.toml). The splits follow from the data, not
from a random generator: they are the same on every machine. Nothing here downloads or augments.
"""

import gzip
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

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
    """N snippets and labels int64 [N]: 1 positive, 0 negative."""

    texts: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def fashion_mnist(split: str = "train", n: int | None = None, *, seed: int = 0) -> Split:
    """Fashion-MNIST (Xiao et al. 2017): "train" 55,000, "validation" 5,000 (kept out of "train"), "test" 10,000 images.

    Validation images are for choices, test images for the figure that is reported. `n` draws a subset with `seed` whose
    classes differ by at most one image. Raises InputError for an unknown split or an `n` outside 1..size.
    """
    check_choice(split, SPLITS, "split")
    stem = "t10k" if split == "test" else "train"
    images = torch.from_numpy(_idx(f"fashion-mnist/{stem}-images-idx3-ubyte.gz"))  # uint8 [N, 28, 28]
    labels = torch.from_numpy(_idx(f"fashion-mnist/{stem}-labels-idx1-ubyte.gz")).long()  # [N]
    if split != "test":  # validation: the last images of each class in the file's order
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        for digit in range(len(FASHION_CLASSES)):
            held_out[(labels == digit).nonzero().flatten()[-_VALIDATION_PER_CLASS:]] = True
        of_split = held_out if split == "validation" else ~held_out
        images, labels = images[of_split], labels[of_split]
    subset = _balanced(labels, n, seed)
    images = images[subset].unsqueeze(1).float().div_(255)  # [N, 1, 28, 28]
    return Split(images.sub_(FASHION_MEAN).div_(FASHION_STD), labels[subset])


def reviews(split: str = "train", n: int | None = None) -> Reviews:
    """Movie-review snippets (Hutto & Gilbert 2014), labelled by the sign of their mean human rating.

    "train" 7,682, "validation" 800, "test" 2,000; half of each is positive. Snippets that differ only in case, spaces
    or punctuation count once, so none is in two splits. `n` draws a subset whose classes differ by at most one.
    Raises InputError for an unknown split or an `n` outside 1..size.
    """
    check_choice(split, SPLITS, "split")
    file = fetch.path("reviews/movieReviewSnippets_GroundTruth.txt.gz")
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").splitlines()
    first_of = {}  # normalised text -> (rating, text)
    for line in lines:
        _, rating, text = line.split("\t")
        if float(rating) != 0:
            first_of.setdefault(re.sub(r"\W+", " ", text.lower()).strip(), (float(rating), text))
    # sorting by a hash shuffles the file (it is ordered by label) in a way that no version of a generator can change
    shuffled = [first_of[key] for key in sorted(first_of, key=lambda key: hashlib.sha256(key.encode()).digest())]
    positive = [text for rating, text in shuffled if rating > 0]
    negative = [text for rating, text in shuffled if rating < 0]
    bounds = _review_bounds(min(len(positive), len(negative)))[split]
    # alternating classes: any run of an even number of snippets is balanced
    pairs = zip(negative[slice(*bounds)], positive[slice(*bounds)], strict=True)
    texts, labels = [text for pair in pairs for text in pair], torch.tensor([0, 1] * (bounds[1] - bounds[0]))
    subset = _balanced(labels, n, seed=0)
    return Reviews([texts[i] for i in subset.tolist()], labels[subset])


def handbook(part: str = "test") -> str:
    """Prose of the Debian Administrator's Handbook (Hertzog & Mas); paragraphs are separated by an empty line.

    "calibration" and "test" come from different chapters. Raises InputError for another part.
    """
    check_choice(part, ("calibration", "test"), "part")
    return gzip.decompress(fetch.path(f"handbook/{part}.txt.gz").read_bytes()).decode("utf-8")


def photos() -> dict[str, Image.Image]:
    """Four RGB photos by name, to show a model at work: chelsea (a cat), coffee, china (a palace), flower."""
    return {name: Image.open(fetch.path(f"photos/{file}")).convert("RGB") for name, file in PHOTOS.items()}


def photo_crops(n: int, names: Sequence[str] = tuple(PHOTOS), *, seed: int = 0) -> list[Image.Image]:
    """n random squares of each named photo, photo after photo, with sides from half to all of its shorter side.

    Crops of one photo are alike: they show how a network treats that photo, not how it does on photos in general.
    Raises InputError for an unknown name or an `n` below 1.
    """
    check_whole(n, "n")
    images, generator, crops = photos(), torch.Generator().manual_seed(seed), []
    for name in names:
        check_choice(name, PHOTOS, "photo")
        photo = images[name]
        for share, across, down in torch.rand(n, 3, generator=generator).tolist():
            side = round(min(photo.size) * (1 + share) / 2)
            x, y = round(across * (photo.width - side)), round(down * (photo.height - side))
            crops.append(photo.crop((x, y, x + side, y + side)))
    return crops


def _idx(name: str) -> np.ndarray:
    """An idx file of unsigned bytes (LeCun's MNIST page): 0, 0, type 8, rank, rank big-endian sizes, the bytes."""
    raw = bytearray(gzip.decompress(fetch.path(name).read_bytes()))  # a bytearray: torch wants a writable buffer
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _review_bounds(per_class: int) -> dict[str, tuple[int, int]]:
    bounds, start = {}, 0
    for name, size in _REVIEWS_PER_CLASS.items():
        bounds[name] = (start, start + size)
        start += size
    return {**bounds, "train": (start, per_class)}


def _balanced(labels: Tensor, n: int | None, seed: int) -> Tensor:
    """Positions [n] of a class-balanced random subset, in the data's order; all of them for n=None."""
    if n is None:
        return torch.arange(len(labels))
    check_whole(n, "n", most=len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty_like(labels)  # how many of the same class come before, in random order
    for label in labels.unique():
        same = order[labels[order] == label]
        rank[same] = torch.arange(len(same))
    return order[rank[order].argsort(stable=True)[:n]].sort().values
