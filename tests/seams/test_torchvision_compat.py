"""`ensure_torchvision` in fresh processes, beside real, broken, absent and stand-in torchvision packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BROKEN = """
import torch
from torchvision import extension, _meta_registrations
__version__ = "0.0"
"""
BROKEN_META = """
import torch
import torchvision.extension
assert torchvision.extension.has_ops() is False

@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold):
    return dets.new_empty(0)

@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, iou_threshold):
    return dets.new_empty(0)
"""


def run_python(code: str, path: Path | None = None) -> list[str]:
    """Run `code` in a new interpreter, with `path` in front of its modules; its printed lines."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    if path is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(path), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def stand_in(folder: Path, files: dict[str, str]) -> Path:
    """A package `torchvision` made of `files`, to be put in front of the installed one."""
    package = folder / "torchvision"
    package.mkdir()
    for name, text in files.items():
        (package / name).write_text(text)
    return folder


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A package that fails as torchvision does when its C library cannot load."""
    extension = "def has_ops():\n    return False\n"
    return stand_in(tmp_path, {"__init__.py": BROKEN, "extension.py": extension, "_meta_registrations.py": BROKEN_META})


def test_installed_torchvision_imports_and_images_are_processed() -> None:
    lines = run_python(
        "from grpo_autotune.seams.torchvision_compat import ensure_torchvision as e\n"
        "first, second = e(), e()\n"
        "assert first == second\n"
        "from transformers import Qwen2VLImageProcessor\n"
        "from PIL import Image\n"
        "inputs = Qwen2VLImageProcessor()(images=[Image.new('RGB', (56, 56))], return_tensors='pt')\n"
        "print(inputs['image_grid_thw'].tolist())"
    )
    assert lines == ["[[1, 4, 4]]"]


def test_broken_torchvision_is_mended_and_told(broken: Path) -> None:
    lines = run_python(
        "from grpo_autotune.seams.torchvision_compat import ensure_torchvision as e\n"
        "print(e())\nimport torchvision\nprint(torchvision.__version__)",
        broken,
    )
    assert "operator torchvision::nms does not exist" in lines[0] and "install the torchvision build" in lines[0]
    assert lines[1] == "0.0"


def test_broken_siblings_are_hidden_and_whole_ones_kept(broken: Path) -> None:
    for name, text in {"torchaudio": "raise OSError('Could not load this library')\n", "torchcodec": "x = 1\n"}.items():
        (broken / name).mkdir()
        (broken / name / "__init__.py").write_text(text)
    lines = run_python(
        "from grpo_autotune.seams.torchvision_compat import ensure_torchvision as e\n"
        "print(e())\nfrom importlib.util import find_spec\nprint(find_spec('torchaudio'))\n"
        "import torchcodec\nprint(torchcodec.x)\nprint('torchaudio' in e())",
        broken,
    )
    assert "hid torchaudio (" in lines[0]
    assert lines[1:] == ["None", "1", "True"]


def test_schemas_survive_collection_and_calls_repeat(broken: Path) -> None:
    lines = run_python(
        "import gc\nfrom grpo_autotune.seams.torchvision_compat import ensure_torchvision as e\n"
        "first = e()\ngc.collect()\nprint(first == e())\n"
        "import torch\nprint(torch.ops.torchvision.nms.default)\n"
        "try:\n    torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)\n"
        "except NotImplementedError:\n    print('no kernel')",
        broken,
    )
    assert lines == ["True", "torchvision.nms.default", "no kernel"]


def test_mended_after_an_import_that_failed_twice(broken: Path) -> None:
    lines = run_python(
        "for _ in range(2):\n    try:\n        import torchvision\n"
        "    except (RuntimeError, AttributeError) as error:\n        print(type(error).__name__)\n"
        "from grpo_autotune.seams.torchvision_compat import ensure_torchvision as e\n"
        "e()\nimport torchvision.extension\nprint(torchvision.extension.has_ops())",
        broken,
    )
    assert lines == ["RuntimeError", "AttributeError", "False"]


def test_whole_torchvision_is_left_alone(tmp_path: Path) -> None:
    stand_in(tmp_path, {"__init__.py": "__version__ = '9.9'\n"})
    lines = run_python(
        "from grpo_autotune.seams import torchvision_compat\n"
        "print(torchvision_compat.ensure_torchvision())\nprint(torchvision_compat._kept, torchvision_compat._hidden)",
        tmp_path,
    )
    assert lines == ["None", "[] []"]


def test_other_failures_are_told_and_nothing_is_declared(tmp_path: Path) -> None:
    stand_in(tmp_path, {"__init__.py": "raise RuntimeError('Detected different CUDA major versions')\n"})
    lines = run_python(
        "from grpo_autotune.seams import torchvision_compat\n"
        "print(torchvision_compat.ensure_torchvision())\nprint(torchvision_compat._kept, torchvision_compat._hidden)",
        tmp_path,
    )
    assert "Detected different CUDA major versions" in lines[0] and "install the torchvision build" in lines[0]
    assert lines[1] == "[] []"


def test_absent_torchvision_is_no_finding() -> None:
    lines = run_python(
        "import sys\nsys.modules['torchvision'] = None\n"
        "from grpo_autotune.seams.torchvision_compat import ensure_torchvision as e\nprint(e())"
    )
    assert lines == ["None"]


def test_a_finding_is_told_once_with_a_fresh_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_autotune.seams.torchvision_compat import tell_once

    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    tell_once("a build for another torch", said.append)
    tell_once("a build for another torch", said.append)
    assert said == ["note: a build for another torch"]


def test_a_cache_folder_that_cannot_be_made_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_autotune.seams.torchvision_compat import tell_once

    (tmp_path / "file").touch()
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path / "file" / "cache"))
    said: list[str] = []
    tell_once("a build for another torch", said.append)
    assert said == ["note: a build for another torch"]
