"""The data sets are what they are said to be: sizes, balance, splits that share nothing, figures recomputed."""

import gzip
import re

import pytest
import torch
from refusals import Refusals, check_refusal, refused

from labkit.data import datasets, fetch


def words(text: str) -> str:
    """A text up to case, spaces and punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


@pytest.fixture(scope="module")
def training_file() -> torch.Tensor:
    """The pixels of all training images as they are stored, from 0 to 255."""
    raw = gzip.decompress(fetch.path("fashion-mnist/train-images-idx3-ubyte.gz").read_bytes())[16:]
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


@pytest.fixture(scope="module")
def fashion_mnist() -> dict[str, datasets.Split]:
    return {split: datasets.fashion_mnist(split) for split in datasets.SPLITS}


@pytest.mark.slow
def test_fashion_mnist_normalisation_is_the_training_images_own(training_file: torch.Tensor) -> None:
    pixels = training_file.double() / 255
    assert pixels.mean().item() == pytest.approx(datasets.FASHION_MEAN, abs=5e-5)
    assert pixels.std().item() == pytest.approx(datasets.FASHION_STD, abs=5e-5)


@pytest.mark.parametrize(("split", "size"), [("train", 55_000), ("validation", 5_000), ("test", 10_000)])
def test_fashion_mnist_splits_are_balanced_and_of_the_stated_size(
    fashion_mnist: dict[str, datasets.Split], split: str, size: int
) -> None:
    data = fashion_mnist[split]
    assert data.images.shape == (size, 1, 28, 28)
    assert data.images.dtype == torch.float32
    assert data.labels.bincount().tolist() == [size // 10] * 10


@pytest.mark.slow
def test_fashion_mnist_training_and_validation_are_the_whole_file(
    fashion_mnist: dict[str, datasets.Split], training_file: torch.Tensor
) -> None:
    raw = gzip.decompress(fetch.path("fashion-mnist/train-labels-idx1-ubyte.gz").read_bytes())[8:]
    train, validation = fashion_mnist["train"], fashion_mnist["validation"]
    both = train.images.sum(dtype=torch.float64) + validation.images.sum(dtype=torch.float64)
    whole = training_file.sum(dtype=torch.float64) / 255
    expected = (whole - datasets.FASHION_MEAN * len(training_file)) / datasets.FASHION_STD
    assert len(train) + len(validation) == len(raw)
    assert both.item() == pytest.approx(expected.item(), rel=1e-4, abs=100)


@pytest.mark.parametrize("n", [1, 10, 73, 1000])
def test_fashion_mnist_subset_is_balanced_and_repeats(n: int) -> None:
    first, again = datasets.fashion_mnist("test", n), datasets.fashion_mnist("test", n)
    counts = first.labels.bincount(minlength=10)
    assert len(first) == n
    assert counts.max() - counts.min() <= 1
    assert torch.equal(first.images, again.images)


def test_fashion_mnist_first_test_image_is_an_ankle_boot(fashion_mnist: dict[str, datasets.Split]) -> None:
    assert datasets.FASHION_CLASSES[fashion_mnist["test"].labels[0]] == "Ankle boot"


def test_reviews_are_labelled_by_the_sign_of_their_rating() -> None:
    text = gzip.decompress(fetch.path("reviews/movieReviewSnippets_GroundTruth.txt.gz").read_bytes()).decode()
    ratings = {line.split("\t")[2]: float(line.split("\t")[1]) for line in text.splitlines()}
    for split in ("train", "validation", "test"):
        data = datasets.reviews(split)
        assert [int(ratings[text] > 0) for text in data.texts] == data.labels.tolist()
        assert all(ratings[text] != 0 for text in data.texts)


def test_no_review_is_in_two_splits_or_twice_in_one() -> None:
    texts = [words(text) for split in ("train", "validation", "test") for text in datasets.reviews(split).texts]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize(("split", "size"), [("train", 7_682), ("validation", 800), ("test", 2_000)])
def test_review_splits_are_balanced_and_of_the_stated_size(split: str, size: int) -> None:
    assert datasets.reviews(split).labels.bincount().tolist() == [size // 2, size // 2]


def test_review_subset_is_balanced() -> None:
    data = datasets.reviews("test", 101)
    assert len(data.texts) == len(data.labels) == 101
    assert abs(int(data.labels.sum()) * 2 - 101) == 1


def test_handbook_parts_share_no_paragraph() -> None:
    calibration, test = (set(datasets.handbook(part).split("\n\n")) for part in ("calibration", "test"))
    assert not calibration & test
    assert min(len(calibration), len(test)) > 1000


def test_photos_are_rgb() -> None:
    photos = datasets.photos()
    assert sorted(photos) == ["chelsea", "china", "coffee", "flower"]
    assert all(photo.mode == "RGB" and min(photo.size) >= 256 for photo in photos.values())


@pytest.mark.parametrize("n", [0, -1, 10**9, 1.5, True])
@pytest.mark.parametrize("load", [datasets.fashion_mnist, datasets.reviews])
def test_subset_size_outside_the_split_is_refused(load, n: object) -> None:
    check_refusal(f"n is {n!r}, but it must be a whole number from 1 to ... .", lambda: load("test", n))


def test_photo_crops_are_squares_of_their_photo_and_repeat_with_the_seed():
    crops, photos = datasets.photo_crops(3, seed=5), datasets.photos().values()
    for crop, photo in zip(crops, [photo for photo in photos for _ in range(3)], strict=True):
        shorter = min(photo.size)
        assert crop.width == crop.height and shorter / 2 - 1 <= crop.width <= shorter
    again = datasets.photo_crops(3, seed=5)
    assert all(one.tobytes() == other.tobytes() for one, other in zip(crops, again, strict=True))
    assert crops[0].tobytes() != datasets.photo_crops(1, seed=6)[0].tobytes()


REFUSALS: Refusals = {
    "There is no split 'val': choose one of train, validation, test": lambda: datasets.fashion_mnist("val"),
    "no split 'val': choose one of train, validation, test": lambda: datasets.reviews("val"),
    "no part 'train': choose one of calibration, test": lambda: datasets.handbook("train"),
    "n is 0": lambda: datasets.photo_crops(0),
}


@refused(REFUSALS)
def test_what_is_not_there_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)
