"""ResNet-20 through a pipeline: what each step gives, and whether the gains multiply, in any order.

    python benchmarks/pipelines.py                                  prune, heal, int8, engine
    python benchmarks/pipelines.py --order engine int8              one order of some of the steps
    python benchmarks/pipelines.py --order int8 prune heal engine   an order that cannot work, and says why

Every row: accuracy on the 10,000 test images with its change paired with the first model's, bytes of what is deployed,
speed-ups over eager float32 at the same batch, seconds that the step took. A folder keeps what is trained.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from labkit import datasets, models, training
from labkit.deploy import parity, pipeline
from labkit.deploy.pipeline import Stage, Step
from labkit.pruning import channels
from labkit.quantization import ptq

LARGE = 32  # the larger of the two batches that are timed, and that of the test


def steps(ratio: float, epochs: int, engine: str) -> dict[str, Step]:
    train = datasets.fashion_mnist("train")
    few = [train.images[:512]]

    def prune(model: nn.Module) -> nn.Module:
        labelled = [(train.images[:512], train.labels[:512])]
        options = {"criterion": "taylor", "round_to": 8, "batches": labelled}
        return channels.prune(model, (train.images[:2],), ratio=ratio, **options).model

    def heal(model: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        batches = training.Batches((train.images, train.labels), 128, seed=0)
        training.train_(model, batches, epochs=epochs, max_lr=0.05, label="healing")
        return model.requires_grad_(False)

    table = [
        Step("prune", prune),
        Step("heal", heal, trains=True),
        Step("int8", lambda model: ptq.quantize(model, few).model),
        Step("engine", engine=engine),
    ]
    return {step.name: step for step in table}


def line(stage: Stage) -> str:
    name = f"{stage.steps[-1]:7} {stage.engine:12}"
    if stage.error:
        return f"{name} {stage.error}"
    judged = stage.parity
    speeds = "  ".join(
        f"{label} {x:5.2f} [{low:5.2f}, {high:5.2f}]" for label, (x, low, high) in stage.speedups.items()
    )
    change = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*judged.change)
    return f"{name} {judged.accuracy:.4f} {change} points  {stage.bytes:9,} bytes  {stage.seconds:6.1f} s  {speeds}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", nargs="+", default=["prune", "heal", "int8", "engine"])
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/pipelines"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a comparison")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = steps(options.ratio, options.epochs, options.engine)
    order = [table[name] for name in options.order]
    model, test = models.resnet20(), datasets.fashion_mnist("test")
    size = len(test) // LARGE * LARGE
    batches = [*zip(test.images[:size].split(LARGE), test.labels[:size].split(LARGE), strict=True)]
    examples = {"batch 1": test.images[:1], f"batch {LARGE}": test.images[:LARGE]}
    folder = options.folder / f"{options.engine}-{options.ratio}-{options.epochs}"
    calibration = [datasets.fashion_mnist("train", 512).images]
    reference = parity.Reference(model, batches)
    rows = pipeline.execute(
        model, {"": order}, examples, reference, folder=folder, batches=calibration, budget_s=options.budget
    )
    print(*map(line, rows[""]), sep="\n")


if __name__ == "__main__":
    main()
