"""Structured pruning of whole models, labkit beside Torch-Pruning, each in fresh processes on one thread.

    python benchmarks/channels.py                              the models that Torch-Pruning's own numbers are known for
    python benchmarks/channels.py --models swin_t --limit 90   with seconds after which a process is ended
    python benchmarks/channels.py --zoo                        which architectures of timm and transformers are pruned

Half of the channels of every group, L2, random weights, 224 x 224, batch 1. A process builds the model, then times one
call from the model to the pruned one, imports left out. Another process has pruned two layers before, so that what the
first use of torch costs is not laid at the model's door, and reports the largest memory from then on, the dense model's
own included, over the bytes of the dense model. labkit's equality check is a column by itself: Torch-Pruning has none.
Without Torch-Pruning installed its columns are empty.

The zoo: of timm a small model of each module on the smallest image that it takes, of transformers small models by
config. Scales, biases and statistics are random, so that no branch is scaled to nothing. A row says how long one call
of `prune` took, proof included, what is left of the parameters at half of the channels, how many groups stay whole,
over how many pruned statistics, and whether the saved model is loaded as it was; or why nothing was pruned.
"""

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
import torchvision
from torch import Tensor, nn

MODELS = (
    *("resnet18", "resnet50", "mobilenet_v2", "densenet121", "vgg16_bn", "googlenet", "efficientnet_b0"),
    *("convnext_tiny", "regnet_x_400mf", "mnasnet1_0", "vit_b_16", "swin_t", "shufflenet_v2_x1_0"),
)


def labkit(model: nn.Module, x: Tensor) -> dict[str, float]:
    from labkit.pruning import channels

    start = time.perf_counter()
    plan = channels.plan(model, x, ratio=0.5, criterion="l2", scope="layer")
    small = channels.apply(model, plan, x, check=False).model
    seconds = time.perf_counter() - start
    peak, left = memory(), size(small)
    del small
    channels.apply(model, plan, x)
    check = time.perf_counter() - start - seconds
    return {"seconds": seconds, "check": check, "left": left, "memory": peak, "memory_checked": memory()}


def torch_pruning(model: nn.Module, x: Tensor) -> dict[str, float]:
    """As its README has it: the classifier ignored; for ViT also what its example script adds."""
    import torch_pruning as tp

    start = time.perf_counter()
    options = {"ignored_layers": [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]}
    heads = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    if heads:
        options["num_heads"] = {m: m.num_heads for m in heads}
        options["out_channel_groups"] = {m: m.num_heads for m in heads}
    importance = tp.importance.MagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(model, x, importance=importance, pruning_ratio=0.5, **options)
    pruner.step()
    if heads:
        model.hidden_dim = model.conv_proj.out_channels
    seconds = time.perf_counter() - start
    peak = memory()
    with torch.no_grad():
        model(x)
    return {"seconds": seconds, "left": size(model), "memory": peak}


TOOLS: dict[str, Callable[[nn.Module, Tensor], dict[str, float]]] = {"labkit": labkit, "torch_pruning": torch_pruning}


# --- the zoo ----------------------------------------------------------------------------------------------------------

_FAMILIES = """bert roberta distilbert albert electra mpnet deberta deberta-v2 convbert squeezebert
modernbert gpt2 gptj gpt_neox opt bloom mpt falcon llama mistral qwen2 qwen3 gemma gemma2 phi phi3 stablelm
starcoder2 persimmon olmo2 cohere glm nemotron granite bitnet xglm gpt_bigcode codegen biogpt mixtral qwen3_moe olmoe
deepseek_v3 t5 bart mbart pegasus marian m2m_100 blenderbot vit deit beit dinov2 swin convnext segformer pvt resnet
regnet poolformer wav2vec2 hubert whisper moonshine"""
FAMILIES = _FAMILIES.split()
_TIMM = """halonet_h1 gernet_s cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext cpubone_nano
crossvit_tiny_240 csatv2 cs3darknet_m cspnext_tiny davit_tiny deit_tiny_patch16_224 densenet121 dla46x_c dpn48b
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 tinynet_d efficientvim_m1 efficientvit_b0 efficientvit_m0
eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hardcorenas_b hgnetv2_b0
hiera_tiny_224 sam2_hiera_tiny hrnet_w18_ssld iformer_t inception_next_atto inception_v3 lcnetv2_small levit_128s
lowformer_b0 test_mambaout test_coatnet caformer_s18 gmlp_ti16_224 lcnet_035 mobilevit_xxs mvitv2_tiny nest_tiny
nextvit_small pit_ti_224 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d resnet10t
resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224
tresnet_m twins_svt_small visformer_tiny test_vit vit_small_r26_s32_224 test_vit_relpos vitamin_small_224
volo_d1_224 ese_vovnet19b_slim legacy_xception xception41p xcit_nano_12_p8_224"""
TIMM = _TIMM.split()  # a small model of each module
_SIZES = {  # what configs call them; no two that stand in one module are equal
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_key_value_heads num_kv_heads",
    4: "num_local_experts n_routed_experts num_experts rotary_dim",
    6: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads",
    8: "head_dim d_kv patch_size",
    32: "image_size moe_intermediate_size",
    40: "intermediate_size ffn_dim d_ff n_inner hidden_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size",
    48: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim",
    61: "vocab_size",
    64: "max_position_embeddings n_positions",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2}


def zoo() -> list[str]:
    """timm/<model> and transformers/<type>, of what is installed."""
    libraries = {"timm": TIMM, "transformers": FAMILIES}
    return [f"{library}/{name}" for library, names in libraries.items() if find_spec(library) for name in names]


def build(name: str) -> tuple[nn.Module, tuple, dict]:
    """(model, args, kwargs) of torchvision, or of the zoo, then with random vectors."""
    library, _, name = name.rpartition("/")
    if library == "timm":
        import timm

        model = timm.create_model(name).eval()
        config = model.default_cfg
        side = max(96, (config.get("min_input_size") or (0, 0))[-1])
        channels, fixed = config["input_size"][0], config["input_size"][-1]
        example = ((torch.randn(1, channels, *[fixed if config.get("fixed_input_size") else side] * 2),), {})
    elif library == "transformers":
        import transformers

        from labkit.pruning import anatomy

        kind = transformers.CONFIG_MAPPING[name]
        usual = kind()
        model = transformers.AutoModel.from_config(
            kind(**{key: value for key, value in SMALL.items() if type(getattr(usual, key, None)) is int})
        ).eval()
        example = ((), anatomy.example(model))
    else:
        return torchvision.models.get_model(name, weights=None).eval(), (torch.randn(1, 3, 224, 224),), {}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for label, x in [*model.named_parameters(), *model.named_buffers()]:
            if x.is_floating_point() and x.dim() == 1 and (isinstance(x, nn.Parameter) or "running" in label):
                spread = torch.rand(x.shape, generator=generator)
                x.copy_(spread + 0.5 if label.endswith(("var", "weight")) else spread - 0.5)
    return model, *example


def survey(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, float | str]:
    """A row of the zoo."""
    from labkit.errors import LabError
    from labkit.pruning import channels, surgery
    from labkit.pruning.coupling.tracing import outputs

    start = time.perf_counter()
    try:
        pruned = channels.prune(model, args, kwargs, ratio=0.5, scope="layer")
    except LabError as error:
        return {"seconds": time.perf_counter() - start, "refused": str(error)}
    seconds, whole = time.perf_counter() - start, sum(not row.removed for row in pruned.plan.units)
    with tempfile.TemporaryDirectory() as folder:
        surgery.save(pruned.model, [pruned.plan], Path(folder) / "model")
        again = surgery.load(model, Path(folder) / "model")
    same = []
    for net in (pruned.model, again):
        torch.manual_seed(0)  # a pass may draw numbers
        with torch.no_grad():
            same.append(outputs(net(*args, **kwargs)))
    loaded = all(torch.equal(a, b) for a, b in zip(*same, strict=True))
    restricted, left = len(pruned.report.restricted), size(pruned.model) / size(model)
    return {"seconds": seconds, "left": left, "whole": whole, "restricted": restricted, "loaded": loaded}


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def memory() -> float:
    """The largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def one(tool: str, name: str, warm: bool) -> None:
    """In a process of its own: prints the result as JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if tool == "zoo":
        print(json.dumps(survey(*build(name))))
        return
    importlib.import_module("labkit.pruning.channels" if tool == "labkit" else "torch_pruning")
    if warm:
        TOOLS[tool](nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), torch.randn(1, 3, 8, 8))
    before = psutil.Process().memory_info().rss
    model, args, _ = build(name)
    dense, bytes_ = size(model), sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    result = TOOLS[tool](model, *args)
    shares = {key: (result.pop(key) - before) / bytes_ for key in list(result) if key.startswith("memory")}
    print(json.dumps({**result, **shares, "left": result["left"] / dense}))


def process(tool: str, name: str, limit: float, warm: bool) -> dict[str, float] | str:
    """What `one` prints, or what went wrong."""
    command = [sys.executable, __file__, "--one", tool, name, "warm" if warm else "cold"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"> {limit:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["ended"])[-1][:60]
    return json.loads(done.stdout.splitlines()[-1])


def measured(tools: list[str], name: str, repeats: int, limit: float) -> dict[str, dict[str, float] | str]:
    """By tool: medians of the seconds over fresh processes, the tools in turn; memory of a warm one."""
    found: dict[str, list] = {tool: [] for tool in tools}
    for _ in range(repeats):
        for tool in tools:
            if not any(isinstance(row, str) for row in found[tool]):
                found[tool].append(process(tool, name, limit, warm=False))
    rows: dict[str, dict[str, float] | str] = {}
    for tool, results in found.items():
        last = results[-1] if isinstance(results[-1], str) else process(tool, name, limit, warm=True)
        seconds = {key: statistics.median(row[key] for row in results) for key in ("seconds", "check") if key in last}
        rows[tool] = last if isinstance(last, str) else last | seconds
    return rows


def cells(result: dict[str, float] | str) -> str:
    if isinstance(result, str):
        return f"{result:30}"
    return f"{result['seconds']:6.2f} s {result['memory']:5.1f}x {result['left']:7.1%} left "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--zoo", action="store_true", help="a row for each architecture of timm and transformers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=90, help="seconds for a process")
    parser.add_argument("--one", nargs=3, metavar=("TOOL", "MODEL", "STATE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        tool, name, state = options.one
        one(tool, name, warm=state == "warm")
        return
    if options.zoo:
        for name in zoo() if options.models is MODELS else options.models:
            row = process("zoo", name, options.limit, warm=False)
            if isinstance(row, str):
                print(f"{name:44} {row}", flush=True)
                continue
            text = row.get("refused") or (
                f"{row['left']:6.1%} left, {row['whole']} groups whole, {row['restricted']} statistics, "
                f"{'loaded as saved' if row['loaded'] else 'NOT loaded as saved'}"
            )
            print(f"{name:44} {row['seconds']:6.2f} s  {text}", flush=True)
        return
    tools = [tool for tool in TOOLS if find_spec(tool)]
    print(f"torch {torch.__version__}, 1 thread, median of {options.repeats} processes; memory: peak / dense model")
    print(f"{'model':20} {'labkit':30} {'its check':>16}  {'Torch-Pruning' if len(tools) > 1 else ''}")
    for name in options.models:
        rows = measured(tools, name, options.repeats, options.limit)
        ours = rows["labkit"]
        check = f"{ours['check']:6.2f} s {ours['memory_checked']:5.1f}x" if isinstance(ours, dict) else ""
        other = cells(rows["torch_pruning"]) if "torch_pruning" in rows else ""
        print(f"{name:20} {cells(ours)} {check:>16}  {other}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
