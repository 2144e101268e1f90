"""What each step of the instruction ladder buys: the same work with oneDNN capped, in a process a rung.

    python benchmarks/isa.py                   products of 256 x 1024 x 1024, a convolution, ResNet-20 in OpenVINO

Beside its time each row has a ratio: the time of MKL's float32 product, which takes no cap, over that of the row. So
ratios of a row can be compared between rungs. Rows that are refused say why. Weights have 7 bits: without VNNI, pairs
of products of 8 bits overflow, and labkit refuses them.
"""

import argparse

import torch

from labkit.deploy import isa


def rows(budget_s: float) -> dict[str, str]:
    """Runs in a process of its own; float32's ratio to each row."""
    import copy
    from functools import partial

    import torch

    from labkit import bench, datasets, models
    from labkit.deploy import engines
    from labkit.errors import LabError
    from labkit.quantization import integer, ptq

    torch.manual_seed(0)
    x, weight = torch.randn(256, 1024), torch.randn(1024, 1024)
    codes = [torch.randint(-127, 128, size, dtype=torch.int8) for size in ((256, 1024), (1024, 1024))]
    linear = torch.nn.Linear(1024, 1024).eval().requires_grad_(False)
    linear.weight.copy_(weight)
    half, images = copy.deepcopy(linear).bfloat16(), datasets.fashion_mnist("train", 64).images
    network, convolution = models.resnet20(), torch.nn.Conv2d(64, 64, 3, padding=1)
    fp32 = partial(torch.nn.functional.linear, x, weight)
    simulated = ptq.quantize(network, [images], weights=7).model  # 8 bits overflow where there is no VNNI
    work = {
        "int8 product": lambda: partial(torch._int_mm, codes[0], codes[1].t()),
        "bfloat16 Linear": lambda: partial(half, x.bfloat16()),
        "float32 convolution": lambda: partial(convolution, torch.randn(8, 64, 28, 28)),
        "ResNet-20 int8, torch": lambda: partial(integer.convert(simulated), images),
        "ResNet-20, OpenVINO": lambda: partial(engines.prepare("openvino", network, images), images),
        "ResNet-20 bf16, OpenVINO": lambda: partial(engines.prepare("openvino-bf16", network, images), images),
        "ResNet-20 int8, OpenVINO": lambda: partial(engines.prepare("openvino", simulated, images), images),
    }
    table = {}
    for name, build in work.items():
        try:
            comparison = bench.compare(fp32, build(), names=("float32", name), budget_s=budget_s)
            low, high = comparison.ci95
            milliseconds = 1e3 * comparison.candidate.median_s
            table[name] = f"{milliseconds:7.2f} ms  {comparison.speedup:5.2f} [{low:5.2f}, {high:5.2f}]"
        except (LabError, RuntimeError) as error:
            table[name] = str(error).splitlines()[0][:100]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds a comparison")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("this CPU has", *(name for name, has in isa.rungs().items() if has))
    for rung, table in isa.ladder(rows, options.budget, timeout_s=600).items():
        print(rung, *(f"  {name:25} {text}" for name, text in table.items()), sep="\n")


if __name__ == "__main__":
    main()
