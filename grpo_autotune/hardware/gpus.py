"""A table of GPUs: the vendor's figures, each row with its source.

Rates are dense (data sheets that print the rate with sparsity are halved) with float32 accumulation, which is what
training uses; GeForce cards reach half of their float16-accumulation rate this way. A system's total is divided by its
GPUs. H20: NVIDIA publishes no data sheet, and the named page gives both figures. GB10: the page gives 1 PFLOP/s in
4 bits with sparsity, of which an eighth is bfloat16 without.
"""

import re
from typing import NamedTuple

NVIDIA = "https://www.nvidia.com/en-us/data-center"
NVIDIA_PDF = "https://www.nvidia.com/content/dam/en-zz/Solutions"
IMAGES = "https://images.nvidia.com/aem-dam"
RTX_BLACKWELL = f"{IMAGES}/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
PRO_SERVER = f"{NVIDIA}/rtx-pro-6000-blackwell-server-edition/"
PRO_BLACKWELL = (
    f"{NVIDIA_PDF}/data-center/rtx-pro-6000-blackwell-workstation-edition/"
    "workstation-blackwell-rtx-pro-6000-workstation-edition-nvidia-us-3519208-web.pdf"
)
SPARK = "https://www.nvidia.com/en-us/products/workstations/dgx-spark/"
H100_PCIE = f"{NVIDIA_PDF}/gtcs22/data-center/h100/PB-11133-001_v01.pdf"
H20 = "https://willitrunai.com/es/gpus/h20-96gb"
ADA = f"{IMAGES}/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
RTX_ADA = f"{NVIDIA_PDF}/design-visualization/rtx-6000/proviz-print-rtx6000-datasheet-web-2504660.pdf"
AMPERE = f"{NVIDIA_PDF}/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
GA102 = f"{IMAGES}/en-zz/Solutions/geforce/ampere/pdf/NVIDIA-ampere-GA102-GPU-Architecture-Whitepaper-V1.pdf"
A10G = "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf"
TURING = f"{NVIDIA_PDF}/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf"
VOLTA = "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf"
AMD = "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets"


class GpuRow(NamedTuple):
    """One card."""

    name: str  # its name
    pattern: str  # regular expression found in the name that NVML reports
    matrix_flops_s: float  # dense bfloat16 operations per second; float16 where the card has no bfloat16
    bandwidth_bytes_s: float  # memory bandwidth, bytes per second
    bfloat16: bool  # whether its matrix units take bfloat16
    source: str  # the vendor's page, data sheet or white paper (H20: see above)


CARDS = (
    GpuRow("GB300", r"\bGB300\b", 2500e12, 8.0e12, True, f"{NVIDIA}/gb300-nvl72/"),
    GpuRow("GB200", r"\bGB200\b", 2500e12, 8.0e12, True, f"{NVIDIA}/gb200-nvl72/"),
    GpuRow("GH200 144GB", r"\bGH200 144G", 989.5e12, 4.9e12, True, f"{NVIDIA}/grace-hopper-superchip/"),
    GpuRow("GH200 96GB", r"\bGH200\b", 989.5e12, 4.0e12, True, f"{NVIDIA}/grace-hopper-superchip/"),
    GpuRow("GB10", r"\bGB10\b", 125e12, 273e9, True, SPARK),
    GpuRow("B300", r"\bB300\b", 2250e12, 8.0e12, True, f"{NVIDIA}/hgx/"),
    GpuRow("B200", r"\bB200\b", 2250e12, 8.0e12, True, f"{NVIDIA}/dgx-b200/"),
    GpuRow("H200 NVL", r"\bH200 NVL\b", 835.5e12, 4.8e12, True, f"{NVIDIA}/h200/"),
    GpuRow("H200 SXM", r"\bH200\b", 989.5e12, 4.8e12, True, f"{NVIDIA}/h200/"),
    GpuRow("H100 NVL", r"\bH100 NVL\b", 835.5e12, 3.9e12, True, f"{NVIDIA}/h100/"),
    GpuRow("H100 PCIe", r"\bH100 PCIe\b", 756.5e12, 2.0e12, True, H100_PCIE),
    GpuRow("H100 SXM", r"\bH100\b", 989.5e12, 3.35e12, True, f"{NVIDIA}/h100/"),
    GpuRow("H20", r"\bH20\b(?!-3e)", 148e12, 4.0e12, True, H20),
    GpuRow("A100 80GB PCIe", r"\bA100 80GB PCIe\b", 312e12, 1.935e12, True, AMPERE),
    GpuRow("A100 80GB SXM", r"\bA100.*80GB\b", 312e12, 2.039e12, True, AMPERE),
    GpuRow("A100 40GB", r"\bA100\b", 312e12, 1.555e12, True, AMPERE),
    GpuRow("L40S", r"\bL40S\b", 362.05e12, 864e9, True, f"{NVIDIA}/l40s/"),
    GpuRow("L40", r"\bL40\b", 181.05e12, 864e9, True, f"{NVIDIA}/l40/"),
    GpuRow("L4", r"\bL4\b", 121e12, 300e9, True, f"{NVIDIA}/l4/"),
    GpuRow("A40", r"\bA40\b", 149.7e12, 696e9, True, f"{NVIDIA}/a40/"),
    GpuRow("A10G", r"\bA10G\b", 70e12, 600e9, True, A10G),
    GpuRow("A10", r"\bA10\b", 125e12, 600e9, True, f"{NVIDIA_PDF}/Data-Center/a10/pdf/a10-datasheet.pdf"),
    GpuRow("RTX PRO 6000 Blackwell Server", r"\bRTX PRO 6000 Blackwell Server\b", 500e12, 1.597e12, True, PRO_SERVER),
    GpuRow("RTX PRO 6000 Blackwell", r"\bRTX PRO 6000\b(?!.*Max-Q)", 500e12, 1.792e12, True, PRO_BLACKWELL),
    GpuRow("RTX 6000 Ada", r"\bRTX 6000 Ada\b", 364.25e12, 960e9, True, RTX_ADA),
    GpuRow("RTX A6000", r"\bRTX A6000\b", 154.8e12, 768e9, True, GA102),
    GpuRow("GeForce RTX 5090", r"\bRTX 5090\b(?! (?:D|Laptop))", 209.5e12, 1.792e12, True, RTX_BLACKWELL),
    GpuRow("GeForce RTX 4090", r"\bRTX 4090\b(?! (?:D|Laptop))", 165.2e12, 1.008e12, True, ADA),
    GpuRow("GeForce RTX 3090", r"\bRTX 3090\b(?! Ti)", 71e12, 936e9, True, GA102),
    GpuRow("V100 SXM2", r"\bV100-SXM2\b", 125e12, 900e9, False, VOLTA),
    GpuRow("V100 PCIe", r"\bV100-PCIE\b", 112e12, 900e9, False, VOLTA),
    GpuRow("T4", r"\bT4\b", 65e12, 300e9, False, TURING),
    GpuRow("MI300X", r"\bMI300X\b", 1307.4e12, 5.3e12, True, f"{AMD}/amd-instinct-mi300x-data-sheet.pdf"),
)
"""Longer names first: the first row whose pattern matches counts."""

EXPORTED = (("H100", "H800"), ("A100", "A800"))
"""A card, and the one sold in China in its place: its chip and memory with slower NVLink
(https://aiwiki.ai/wiki/nvidia_a800)."""

GPUS = CARDS + tuple(
    row._replace(name=row.name.replace(card, sold), pattern=row.pattern.replace(card, sold))
    for card, sold in EXPORTED
    for row in CARDS
    if row.name.startswith(card)
)


def find_gpu(name: str) -> GpuRow | None:
    """The row of a card by the name its driver reports; None for one that is not in the table, and for a part of one
    (MIG), whose rates are a share that the name does not tell."""
    return next((row for row in GPUS if re.search(row.pattern, name) and not re.search(r"\bMIG\b", name)), None)
