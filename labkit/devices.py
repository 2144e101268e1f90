"""The catalogue of accelerators: what vendors print, dense and sparse kept apart, each figure with its source.

Idea and names: the roofline model (Williams, Waterman and Patterson 2009); a peak is checked as units x FMA per clock
x 2 x clock. It does not measure or guess: an unknown figure is absent, an unknown device None. Read in November 2026.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

MiB = 2**20
EVIDENCE = {
    "vendor": "read in the vendor's own words",
    "derived": "recomputed from units and clocks, and equal to the vendor's figure within 1 % (2 % for the L40S)",
    "secondary": "quoted by independent sources that name the vendor's document",
    "measured": "reported or measured on such a device",
    "unverified": "not confirmed",
}


@dataclass(frozen=True)
class Silicon:
    """What a peak is recomputed from: units (SM, CU), boost clock in Hz, multiply-adds per clock and unit by dtype."""

    units: int
    clock: float
    fma: Mapping[str, int]
    matrix_clock: float | None = None  # where the tensor cores boost lower than the vector units

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s: units x FMA x 2 x clock."""
        clock = self.clock if dtype == "fp32" else self.matrix_clock or self.clock
        return self.units * self.fma[dtype] * 2 * clock


@dataclass(frozen=True)
class Device:
    """One accelerator as a whole chip, or one module where a module is what is sold.

    `flops` maps fp32, tf32, bf16, fp16, fp8, int8, fp4 to the dense peak in FLOP/s (OP/s for int8), a multiply-add
    being 2, 16-bit products accumulated in fp32 as torch does; `sparse` holds the 2:4 peaks. `bandwidth` is in
    decimal B/s. `memory` is the vendor's GB taken as 1e9 B (a driver that counts in GiB reports up to 7 % more); where
    several sizes share a name it is the largest, and `memory_up_to` is true. `l2` is in bytes, MiB-based; `tdp` in W.
    `source` is the vendor's document; `evidence_of(figure)` says how a figure is known.
    """

    name: str
    pattern: str  # the whole of torch.cuda.get_device_name(), as a regular expression
    year: int  # announced
    flops: Mapping[str, float]
    bandwidth: float
    memory: float
    source: str
    evidence: str = "derived"  # how the peaks are known
    sparse: Mapping[str, float] = field(default_factory=dict)
    l2: float | None = None
    tdp: float | None = None
    silicon: Silicon | None = None
    marked: Mapping[str, str] = field(default_factory=dict)  # figures known otherwise than the row
    memory_up_to: bool = False
    shared_name: bool = False  # other products report the same name: the memory size has to decide

    def ridge(self, dtype: str) -> float:
        """The arithmetic intensity in FLOP/B above which dense work of this type is compute-bound."""
        return self.flops[dtype] / self.bandwidth

    def evidence_of(self, figure: str) -> str:
        """How a figure ("bandwidth", "memory", "l2", "tdp" or a dtype of `flops`) is known: a key of EVIDENCE.

        Peaks can be recomputed, capacities cannot: in a derived row they come from sources that quote the vendor.
        """
        inherited = "secondary" if self.evidence == "derived" and figure not in self.flops else self.evidence
        return self.marked.get(figure, inherited)


def _tera(**peaks: float) -> dict[str, float]:
    return {key: value * 1e12 for key, value in peaks.items()}


def _twice(flops: Mapping[str, float]) -> dict[str, float]:
    """2:4 peaks: twice the dense rate on every matrix type; vector fp32 has none."""
    return {key: 2 * value for key, value in flops.items() if key != "fp32"}


_A100 = _tera(fp32=19.5, tf32=156, bf16=312, fp16=312, int8=624)
_A100_FMA = {"fp32": 64, "tf32": 512, "bf16": 1024, "fp16": 1024, "int8": 2048}
_GA102 = _tera(fp32=35.6, tf32=35.6, bf16=71, fp16=71, int8=284)
_AD102 = _tera(fp32=82.6, tf32=82.6, bf16=165.2, fp16=165.2, fp8=330.3, int8=660.6)
_L4 = _tera(fp32=30.3, tf32=60.6, bf16=121, fp16=121, fp8=242.5, int8=242.5)
_L40S = _tera(fp32=91.6, tf32=183, bf16=362.05, fp16=362.05, fp8=733, int8=733)
_ADA_FMA = {"fp32": 128, "tf32": 256, "bf16": 512, "fp16": 512, "fp8": 1024, "int8": 1024}
_H100 = _tera(fp32=66.9, tf32=494.7, bf16=989.4, fp16=989.4, fp8=1979, int8=1979)
_H100_PCIE = _tera(fp32=51.2, tf32=378, bf16=756, fp16=756, fp8=1513, int8=1513)
_HOPPER_FMA = {"fp32": 128, "tf32": 1024, "bf16": 2048, "fp16": 2048, "fp8": 4096, "int8": 4096}
_B200 = _tera(fp32=80, tf32=1125, bf16=2250, fp16=2250, fp8=4500, int8=4500, fp4=9000)
_MI300X = _tera(fp32=163.4, tf32=653.7, bf16=1307.4, fp16=1307.4, fp8=2614.9, int8=2614.9)
_CDNA3_FMA = {"fp32": 128, "tf32": 512, "bf16": 1024, "fp16": 1024, "fp8": 2048, "int8": 2048}

_ROWS = (
    Device(
        name="V100 SXM2",
        pattern=r"Tesla V100-SXM2-(16|32)GB",
        year=2017,
        flops=_tera(fp32=15.7, fp16=125, int8=62),
        bandwidth=900e9,
        memory=32e9,
        memory_up_to=True,
        l2=6 * MiB,
        tdp=300,
        silicon=Silicon(80, 1.53e9, {"fp32": 64, "fp16": 512}),
        marked={"int8": "unverified", "bandwidth": "derived"},
        source="NVIDIA V100 datasheet, volta-v100-datasheet r5; int8 is DP4A, the tensor cores have none",
    ),
    Device(
        name="T4",
        pattern=r"Tesla T4",
        year=2018,
        flops=_tera(fp32=8.1, fp16=65, int8=130),
        bandwidth=320e9,
        memory=16e9,
        l2=4 * MiB,
        tdp=70,
        silicon=Silicon(40, 1.59e9, {"fp32": 64, "fp16": 512, "int8": 1024}),
        marked={"bandwidth": "derived"},
        source="NVIDIA T4 datasheet, t4-tensor-core-datasheet-951643; 320 GB/s is 10 Gb/s x 256 bit (some pages: 300)",
    ),
    Device(
        name="A100 40GB SXM",
        pattern=r"(NVIDIA )?A100-SXM4-40GB",
        year=2020,
        flops=_A100,
        sparse=_twice(_A100),
        bandwidth=1555e9,
        memory=40e9,
        l2=40 * MiB,
        tdp=400,
        silicon=Silicon(108, 1.41e9, _A100_FMA),
        marked={"l2": "measured", "bandwidth": "derived"},
        source="NVIDIA A100 datasheet, nvidia-a100-datasheet-1758950-r4; L2 as the driver reports it",
    ),
    Device(
        name="A100 80GB SXM",
        pattern=r"(NVIDIA )?A100-SXM4-80GB",
        year=2020,
        flops=_A100,
        sparse=_twice(_A100),
        bandwidth=2039e9,
        memory=80e9,
        l2=40 * MiB,
        tdp=400,
        silicon=Silicon(108, 1.41e9, _A100_FMA),
        marked={"l2": "measured"},
        source="NVIDIA A100 datasheet, nvidia-a100-datasheet-1758950-r4; L2 as the driver reports it",
    ),
    Device(
        name="A10G",
        pattern=r"(NVIDIA )?A10G",
        year=2021,
        flops=_tera(fp32=35, tf32=35, bf16=70, fp16=70),
        bandwidth=600e9,
        memory=24e9,
        l2=6 * MiB,
        silicon=Silicon(80, 1.71e9, {"fp32": 128, "tf32": 128, "bf16": 256, "fp16": 256}),
        evidence="unverified",
        source="no public datasheet: GA102 at 80 SM and half tensor rate, as AWS EC2 G5 reports it; not the A10",
    ),
    Device(
        name="RTX 3090",
        pattern=r"(NVIDIA )?GeForce RTX 3090",
        year=2020,
        flops=_GA102,
        sparse=_twice(_GA102),
        bandwidth=936e9,
        memory=24e9,
        l2=6 * MiB,
        tdp=350,
        silicon=Silicon(82, 1.695e9, {"fp32": 128, "tf32": 128, "bf16": 256, "fp16": 256, "int8": 1024}),
        marked={"bandwidth": "derived"},
        source="NVIDIA Ampere GA102 whitepaper v2, 16-bit with fp32 accumulation",
    ),
    Device(
        name="RTX 4090",
        pattern=r"NVIDIA GeForce RTX 4090",
        year=2022,
        flops=_AD102,
        sparse=_twice(_AD102),
        bandwidth=1008e9,
        memory=24e9,
        l2=72 * MiB,
        tdp=450,
        silicon=Silicon(128, 2.52e9, {"fp32": 128, "tf32": 128, "bf16": 256, "fp16": 256, "fp8": 512, "int8": 1024}),
        marked={"bandwidth": "derived"},
        source="NVIDIA Ada whitepaper v2, 16- and 8-bit floats with fp32 accumulation",
    ),
    Device(
        name="L4",
        pattern=r"NVIDIA L4",
        year=2023,
        flops=_L4,
        sparse=_twice(_L4),
        bandwidth=300e9,
        memory=24e9,
        l2=48 * MiB,
        tdp=72,
        silicon=Silicon(58, 2.04e9, _ADA_FMA),
        marked={"bandwidth": "derived"},
        source="NVIDIA L4 datasheet, l4-tensor-datasheet, whose headline figures are the sparse ones",
    ),
    Device(
        name="L40S",
        pattern=r"NVIDIA L40S",
        year=2023,
        flops=_L40S,
        sparse=_twice(_L40S),
        bandwidth=864e9,
        memory=48e9,
        l2=96 * MiB,
        tdp=350,
        silicon=Silicon(142, 2.52e9, _ADA_FMA),
        marked={"l2": "unverified", "bandwidth": "derived"},
        source="NVIDIA L40S datasheet, l40s-datasheet; it prints 362.05 for 16 bit where its units give 366.4",
    ),
    Device(
        name="H100 PCIe",
        pattern=r"NVIDIA H100 PCIe",
        year=2022,
        flops=_H100_PCIE,
        sparse=_twice(_H100_PCIE),
        bandwidth=2039e9,
        memory=80e9,
        l2=50 * MiB,
        tdp=350,
        silicon=Silicon(114, 1.755e9, _HOPPER_FMA, 1.62e9),
        marked={"bandwidth": "unverified", "tdp": "vendor"},
        source="NVIDIA H100 PCIe product brief PB-11133-001: 350 W, more than 2000 GB/s",
    ),
    Device(
        name="H100 SXM",
        pattern=r"NVIDIA H100 80GB HBM3",
        year=2022,
        flops=_H100,
        sparse=_twice(_H100),
        bandwidth=3350e9,
        memory=80e9,
        l2=50 * MiB,
        tdp=700,
        silicon=Silicon(132, 1.98e9, _HOPPER_FMA, 1.83e9),
        marked={"l2": "measured"},
        source="NVIDIA H100 page, nvidia.com/data-center/h100, whose headline figures are the sparse ones",
    ),
    Device(
        name="H200 SXM",
        pattern=r"NVIDIA H200",
        year=2023,
        flops=_H100,
        sparse=_twice(_H100),
        bandwidth=4800e9,
        memory=141e9,
        l2=60 * MiB,
        tdp=700,
        silicon=Silicon(132, 1.98e9, _HOPPER_FMA, 1.83e9),
        marked={"tdp": "vendor", "l2": "measured"},
        source="NVIDIA H200 datasheet, h200-datasheet-3002446; power from the MLPerf Inference v4.1 system description",
    ),
    Device(
        name="B200 SXM",
        pattern=r"NVIDIA B200",
        year=2024,
        flops=_B200,
        sparse=_twice(_B200),
        bandwidth=8000e9,
        memory=180e9,
        l2=126 * MiB,
        tdp=1000,
        evidence="secondary",
        marked={"memory": "vendor", "tdp": "vendor"},
        source="NVIDIA Blackwell datasheet 3384703; memory and power from the MLPerf Inference v6.0 system description",
    ),
    Device(
        name="MI300X",
        pattern=r"AMD Instinct MI300X( OAM)?",
        year=2023,
        flops=_MI300X,
        sparse=_twice(_MI300X),
        bandwidth=5300e9,
        memory=192e9,
        l2=32 * MiB,
        tdp=750,
        silicon=Silicon(304, 2.1e9, _CDNA3_FMA),
        marked={"memory": "vendor", "tdp": "vendor"},
        source="AMD Instinct MI300X data sheet; MLPerf Inference v4.1 system description; 256 MB cache behind L2",
    ),
    Device(
        name="MI325X",
        pattern=r"AMD Instinct MI325X( OAM)?",
        year=2024,
        flops=_MI300X,
        sparse=_twice(_MI300X),
        bandwidth=6000e9,
        memory=256e9,
        l2=32 * MiB,
        tdp=1000,
        silicon=Silicon(304, 2.1e9, _CDNA3_FMA),
        source="AMD Instinct MI325X product page; 256 MB cache behind L2",
    ),
    Device(
        name="Jetson AGX Orin 64GB",
        pattern=r"Orin|(NVIDIA )?Jetson AGX Orin",
        year=2022,
        flops=_tera(fp32=5.3, fp16=42.5, int8=85),
        sparse=_tera(int8=170),
        bandwidth=204.8e9,
        memory=64e9,
        shared_name=True,
        l2=4 * MiB,
        tdp=60,
        silicon=Silicon(16, 1.3e9, {"fp32": 128, "fp16": 1024, "int8": 2048}),
        marked={"bandwidth": "derived"},
        source="NVIDIA Jetson AGX Orin technical brief, GPU only: the headline 275 is sparse int8, GPU 170 + DLA 105",
    ),
    Device(
        name="TPU v5e",
        pattern=r"TPU v5 ?(e|lite)",
        year=2023,
        flops=_tera(bf16=197, int8=393),
        bandwidth=819e9,
        memory=16e9,
        evidence="vendor",
        source="Google Cloud documentation, docs.cloud.google.com/tpu/docs/v5e",
    ),
    Device(
        name="TPU v5p",
        pattern=r"TPU v5p?",
        year=2023,
        flops=_tera(bf16=459, int8=918),
        bandwidth=2765e9,
        memory=95e9,
        evidence="vendor",
        marked={"int8": "secondary"},
        source="Google Cloud documentation, docs.cloud.google.com/tpu/docs/v5p",
    ),
    Device(
        name="TPU v6e",
        pattern=r"TPU v6 ?(e|lite)",
        year=2024,
        flops=_tera(bf16=918, fp8=918, int8=1836),
        bandwidth=1638e9,
        memory=32e9,
        evidence="vendor",
        marked={"fp8": "secondary"},
        source="Google Cloud documentation, docs.cloud.google.com/tpu/docs/v6e",
    ),
    Device(
        name="Apple M1 Max",
        pattern=r"Apple M1 Max",
        year=2021,
        flops=_tera(fp32=10.4, bf16=10.4, fp16=10.4),
        bandwidth=400e9,
        memory=64e9,
        memory_up_to=True,
        evidence="secondary",
        source="Apple M1 Max announcement as quoted in the press, 32-core GPU only, memory shared",
    ),
    Device(
        name="Apple M4 Max",
        pattern=r"Apple M4 Max",
        year=2024,
        flops=_tera(fp32=17.2, bf16=17.2, fp16=17.2),
        bandwidth=546e9,
        memory=128e9,
        memory_up_to=True,
        evidence="unverified",
        marked={"bandwidth": "secondary"},
        source="Apple M4 Max announcement as quoted in the press; FLOP/s scaled from cores, Apple prints none since M3",
    ),
)

DEVICES: dict[str, Device] = {row.name: row for row in _ROWS}


def lookup(name: str, memory_bytes: float | None = None) -> Device | None:
    """The device that calls itself `name` (torch.cuda.get_device_name, or a catalogue name), or None.

    `memory_bytes` is what the driver reports; a size that does not belong to the device (a slice of a card, another
    product under the same name) gives None as well: never a default.
    """
    for device in DEVICES.values():
        if name == device.name or re.fullmatch(device.pattern, name.strip()):
            known = name == device.name or not device.shared_name
            return device if _size_fits(device, memory_bytes, known) else None
    return None


def _size_fits(device: Device, memory_bytes: float | None, name_is_enough: bool) -> bool:
    if memory_bytes is None:
        return name_is_enough
    smallest = 0.0 if device.memory_up_to else 0.85 * device.memory
    return smallest <= memory_bytes <= 1.15 * device.memory
