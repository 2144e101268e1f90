"""Pruned networks leave torch: through torch.export and back from a file, and to ONNX, run there by ONNX Runtime."""

import copy
from pathlib import Path

import pytest
import torch
from networks import IMAGE, Depthwise, Residual, randomise_
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from labkit.pruning.channels import Pruned, prune

pytestmark = pytest.mark.slow
NETWORKS = {
    "residual": Residual,
    "depthwise": Depthwise,
    "vit": lambda: VisionTransformer(8, 4, 2, 4, 32, 24, num_classes=5),
}
ANY_BATCH = ({0: torch.export.Dim("batch")},)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_(NETWORKS[name]()).float()


@pytest.fixture(scope="module", params=NETWORKS)
def pruned(request: pytest.FixtureRequest) -> Pruned:
    return prune(build(request.param), torch.randn(IMAGE), ratio=0.5, scope="layer")


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, *IMAGE[1:], generator=torch.Generator().manual_seed(0))


def assert_equal(found: Tensor, pruned: Pruned, images: Tensor) -> None:
    """Against float64, within what float32 allows: 8 eps sqrt(K) of the largest output, as in `equality.Report`.

    K: the terms summed in all products of the dense model, so of the pruned one at least.
    """
    with torch.no_grad():
        expected = copy.deepcopy(pruned.model).double()(images.double())
    terms = sum(cost.terms for cost in pruned.plan.coupling.record.costs)
    tolerance = 8 * torch.finfo(torch.float32).eps * terms**0.5 * float(expected.abs().max())
    assert found.shape == expected.shape and float((found - expected).abs().max()) <= tolerance


def test_a_pruned_network_is_exported_and_read_back(pruned: Pruned, images: Tensor, tmp_path: Path):
    program = torch.export.export(pruned.model, (images[:2],), dynamic_shapes=ANY_BATCH)
    torch.export.save(program, tmp_path / "small.pt2")
    loaded = torch.export.load(tmp_path / "small.pt2")
    with torch.no_grad():
        assert_equal(loaded.module()(images), pruned, images)
    shapes = {name: x.shape for name, x in loaded.state_dict.items()}
    assert shapes == {name: x.shape for name, x in pruned.model.state_dict().items()}


def write_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    torch.onnx.export(model, (images,), path, dynamo=True, dynamic_shapes=ANY_BATCH, verbose=False)


def test_a_pruned_network_runs_in_onnx_runtime(request: pytest.FixtureRequest, pruned, images: Tensor, tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")  # what torch's exporter writes ONNX with
    path = tmp_path / "small.onnx"
    try:
        write_onnx(pruned.model, images[:2], path)
    except torch.onnx.OnnxExporterError:  # torch 2.9 and ViT: only if it cannot write the dense network either
        with pytest.raises(torch.onnx.OnnxExporterError):
            write_onnx(build(request.node.callspec.params["pruned"]), images[:2], path)
        pytest.skip(f"torch {torch.__version__} cannot write the dense network as ONNX with a free batch size")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert_equal(torch.from_numpy(found), pruned, images)
