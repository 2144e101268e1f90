"""Three models that are not in the course, in the pipeline of lesson 13, each named by a parameter.

    python benchmarks/own_models.py --folder DIR               3 minutes on an idle core, and writes the record
    python benchmarks/own_models.py --quick                    tries the pipeline on few examples, and writes nothing
    ./lab run 13 -p MODEL benchmarks.own_models:mobilenet      the lesson with one of them

`mobilenet` is torchvision's MobileNetV3 (small) and `plain` a network of six convolutions, both on Fashion-MNIST;
`words` is a perceptron over 2,048 hashed words of film reviews. Each is trained from scratch here for some seconds:
what counts is what the pipeline does with it. Half of the channels (or neurons) go, then healing, int8 in torch, an
engine. The interval of a change of accuracy is exact over the test examples, with a single training. Times are not
recorded. The note of claim 13.3 cites the record.
"""

import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from labkit import datasets, training
from labkit.deploy import engines, own_model, pipeline
from labkit.deploy.pipeline import Stage, Step
from labkit.lesson import experiments
from labkit.records import cost, quality, result

QUESTION = "does the pipeline of lesson 13 take models that it has not seen?"
RATIO, HEAL_STEPS = 0.5, 200
IMAGES, WORDS = 12_000, 2048
Given = tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def mobilenet() -> Given:
    """torchvision's MobileNetV3 (small) for grey images, with stride 1 in the first convolution."""
    from torchvision.models import mobilenet_v3_small

    torch.manual_seed(0)
    model = mobilenet_v3_small(num_classes=10)
    model.features[0][0] = nn.Conv2d(1, 16, 3, stride=1, padding=1, bias=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # torchvision's 0.01 is for longer trainings
    return trained(model, *images(), epochs=2)


def plain() -> Given:
    """Six convolutions with BatchNorm and two linear layers, without a shortcut."""
    torch.manual_seed(0)
    layers, channels = [], 1
    for out in (32, 32, 64, 64, 96, 96):
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        if out == channels:
            layers.append(nn.MaxPool2d(2))
        channels = out
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)]
    return trained(nn.Sequential(*layers, *head), *images(), epochs=2)


def words() -> Given:
    """A perceptron with two hidden layers over the hashed words of film reviews."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WORDS, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 2))
    train, test = (datasets.reviews(split) for split in ("train", "test"))
    return trained(model, (hashed(train.texts), train.labels), (hashed(test.texts), test.labels), epochs=3)


MODELS: dict[str, Callable[[], Given]] = {"mobilenet": mobilenet, "plain": plain, "words": words}


def images() -> list[tuple[Tensor, Tensor]]:
    """Fashion-MNIST: IMAGES training images, and all test images, with labels."""
    parts = datasets.fashion_mnist("train", IMAGES), datasets.fashion_mnist("test")
    return [(part.images, part.labels) for part in parts]


def hashed(texts: list[str]) -> Tensor:
    """Count words by their hash, float32 [texts, WORDS]."""
    counts = torch.zeros(len(texts), WORDS)
    for row, text in zip(counts, texts, strict=True):
        for word in text.lower().split():
            row[zlib.crc32(word.encode()) % WORDS] += 1
    return counts


def trained(model: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], epochs: int) -> Given:
    """Train from scratch, and return the model in eval mode with its data."""
    batches = training.Batches(train, 128, seed=0)
    training.train_(model, batches, epochs=epochs, max_lr=3e-3, optimizer="adamw")
    return model.eval().requires_grad_(False), train, test


def compressed(name: str, folder: Path, quick: bool) -> dict[str, Any]:
    """Take a model through the steps, and return the rows."""
    own = own_model.load(f"{Path(__file__).stem}:{name}", Path(__file__).parent)
    ready = engines.available()["openvino"] == "ready"
    table = own_model.steps(own, ratio=RATIO, heal_steps=2 if quick else HEAL_STEPS)
    order = [*table.values(), Step("engine", engine="openvino" if ready else "torch-channels-last")]
    examples = {"batch 1": own.test[0][:1], "batch 50": own.test[0][:50]}
    options = {"folder": folder / name, "batches": [own.few[0]], "budget_s": 0.1}
    stages = pipeline.execute(own.model, {"usual": order}, examples, own.reference(50), **options)["usual"]
    return {"rows": [row(name, stage) for stage in stages]}


def row(name: str, stage: Stage) -> dict[str, Any]:
    """What a stage says, for the record; an order that ends early has the error's sentence."""
    line = {"model": name, "after": stage.steps[-1], "error": stage.error}
    if stage.error:
        return line | dict.fromkeys(("accuracy", "points", "low", "high", "bytes"))
    change = dict(zip(("points", "low", "high"), stage.parity.change, strict=True))
    return line | {"accuracy": stage.parity.accuracy, "bytes": stage.bytes} | change


def main() -> None:
    import resumable  # beside this script; the lesson imports the module from elsewhere

    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    rows = []
    for name in MODELS:
        one = resumable.once(
            options.folder / f"{name}.pt", lambda name=name: compressed(name, options.folder, options.quick)
        )
        rows += one["rows"]
    if options.quick:
        print(*rows, sep="\n")
        return
    columns = {
        "error": result(),
        "accuracy": quality("fraction"),
        "points": quality("points", low="low", high="high"),
        "bytes": cost("B"),
    }
    settings = {"ratio": RATIO, "steps of healing": HEAL_STEPS, "training images": IMAGES}
    seconds = time.perf_counter() - begin
    by = ("model", "after")
    experiments.save(Path(__file__).stem, QUESTION, rows, by=by, columns=columns, settings=settings, seconds=seconds)


if __name__ == "__main__":
    main()
