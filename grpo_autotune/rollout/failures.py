"""The failure of an engine to start: recognised by the type of the exception, or by the vLLM function that raised it.

vLLM raises a plain `ValueError` where its share of memory is too small or not free, and an `AssertionError` where
others change it meanwhile. The check is known by the
innermost frame of the traceback; the message is read only for the figures it carries, never to find out what happened.
What vLLM's own configuration classes refuse is a pydantic `ValidationError` with vLLM in its traceback.
"""

import math
import os
import re
import sys
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from pydantic import ValidationError

from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware.out_of_memory import causes, is_out_of_memory
from grpo_autotune.records.trial import Status
from grpo_autotune.units import GIB

STEP = 0.05
"""Of the shares of memory that are suggested."""

CPU_SPACE = "VLLM_CPU_KVCACHE_SPACE"
"""Environment variable: GiB of keys and values on the CPU; with it `gpu_memory_utilization` sizes nothing."""

SHARE = "vllm.gpu_memory_utilization"
LENGTH = "vllm.max_model_len"
NUMBER = r"(-?[\d,]*\.?\d+)"


class EngineFailure(NamedTuple):
    """The failure of an engine to start."""

    status: Status  # `oom`: memory; `invalid`: vLLM refuses a setting; `crashed`: neither's fault
    what: str  # one sentence with the figures
    where: str  # key path it concerns most
    fix: str  # the nearest settings that vLLM would take
    needed_bytes: int | None = None  # memory that it asked for, where vLLM says so
    available_bytes: int | None = None  # memory that there was for it
    longest: int | None = None  # the largest `max_model_len` that fits
    too_large: bool = False  # True where a smaller share of memory is a remedy

    @property
    def overshoot_bytes(self) -> int | None:
        """Memory that it asked for beyond what there was; None where vLLM does not say both, or had enough."""
        if self.needed_bytes is None or self.available_bytes is None:
            return None
        return max(0, self.needed_bytes - self.available_bytes) or None

    def error(self) -> ConfigError:
        """As one line for a user."""
        return ConfigError(self.what, where=self.where, fix=self.fix)


def engine_failure(error: BaseException) -> EngineFailure | None:
    """Classify an exception from building or starting an engine, by it or the errors that it was raised from; None for
    one that is no failure of an engine."""
    for cause in causes(error):
        names = frames(cause)
        checked = isinstance(cause, ValueError | AssertionError)
        if checked and names and (read := check_at(*names[-1])) is not None:
            return read(str(cause))
        if not any(module.startswith("vllm.") for module, _ in names):
            continue
        if isinstance(cause, ValidationError):
            return _refused(cause)
        if is_out_of_memory(cause):
            return device_failure(str(cause))
    return None


def frames(error: BaseException) -> list[tuple[str, str]]:
    """Module and function of every frame of the traceback, the raising one last."""
    names, at = [], error.__traceback__
    while isinstance(at, TracebackType):
        names.append((str(at.tb_frame.f_globals.get("__name__")), at.tb_frame.f_code.co_name))
        at = at.tb_next
    return names


def _keys_and_values(text: str) -> EngineFailure:
    """`_check_enough_kv_cache_memory`: what is left of the engine's share does not hold one request."""
    needed = _gib(re.search(rf"\({NUMBER} GiB KV", text))
    available = _gib(re.search(rf"KV cache memory \({NUMBER} GiB", text)) or 0
    length = re.search(r"estimated maximum model length is (\d+)", text)
    longest = int(length[1]) if length else None
    if needed is None:
        fix = _or(_more_space(None), "Set vllm.max_num_batched_tokens lower: weights and activations took the share")
        what = "weights and activations fill the engine's share of memory: nothing is left for keys and values"
        return EngineFailure("oom", what, SHARE, fix, None, available)
    what = (
        f"one request of full length needs {_words(needed)} of keys and values, and the engine's share of memory has "
        f"{_words(available)} for them"
    )
    fix = _or(f"Set {LENGTH} to {longest} or less" if longest else "", _more_space(needed - available))
    return EngineFailure("oom", what, LENGTH if longest else SHARE, fix, needed, available, longest)


def _share_of_gpu(text: str) -> EngineFailure:
    """`request_memory`, and the CPU worker's own check: less memory is free than the share asks for."""
    free = re.search(rf"\({NUMBER}/{NUMBER} GiB\)", text)
    asked = re.search(rf"utilization \({NUMBER}, {NUMBER} GiB\)", text)
    if free is None or asked is None:
        fix = "Set it lower, or end what else holds memory"
        return EngineFailure("oom", _first(text), SHARE, fix, too_large=True)
    available, total = _bytes(free[1]), _bytes(free[2])
    share = largest_share(available, total)
    fix = f"Set it to {share} or less" if share else "Nothing is free"
    what = f"{asked[1]} of memory is {_words(_bytes(asked[2]))}, and {_words(available)} of {_words(total)} is free"
    fix = f"{fix}, or end what else holds memory"
    return EngineFailure("oom", what, SHARE, fix, _bytes(asked[2]), available, too_large=True)


def _space_on_cpu(text: str) -> EngineFailure:
    """`CPUWorker.determine_available_memory`: keys and values do not fit into what is free, or the share is used up."""
    free = re.search(rf"\({NUMBER}/{NUMBER} GiB\)", text)
    asked = re.search(rf"for kv \({NUMBER} GiB\)", text)
    share = re.search(rf"for kv \({NUMBER}/{NUMBER} GiB\)", text)
    if free is not None and asked is not None:
        needed, available = _bytes(asked[1]), _bytes(free[1])
        what = f"{_words(needed)} is asked for keys and values, and {_words(available)} is free"
        return EngineFailure("oom", what, CPU_SPACE, f"Set it to {available // GIB} or less", needed, available)
    if free is None or share is None:
        return EngineFailure("oom", _first(text), SHARE, "Set it lower, or end what else holds memory")
    left, whole, total = _bytes(share[1]), _bytes(share[2]), _bytes(free[2])
    if left > 0:
        what = f"{_words(left)} is left of the engine's share for keys and values, and {_words(_bytes(free[1]))} free"
        return EngineFailure("oom", what, SHARE, "Set it lower, or end what else holds memory", left, _bytes(free[1]))
    what = f"this process holds {_words(whole - left)} already, and the engine's share of memory is {_words(whole)}"
    least = round((math.floor((whole - left) / total / STEP) + 1) * STEP, 2)  # on the grid, and more than it holds
    return EngineFailure("oom", what, SHARE, f"Set it to {least} or more", whole - left, whole)


def _refused(error: ValidationError) -> EngineFailure:
    """A value that a class of `vllm.config` refuses: pydantic names the key, and vLLM's own sentence is the message."""
    first = error.errors()[0]
    sentence = _first(str(first["msg"]).removeprefix("Value error, "))
    named = re.search(r"\b[a-z]+(?:_[a-z]+)+\b", sentence)  # the first name that is written as a key
    key = ".".join(str(part) for part in first["loc"]) or (named[0] if named else "")
    return EngineFailure("invalid", f"vLLM refuses it: {sentence}", f"vllm.{key}" if key else "vllm", "")


def device_failure(text: str) -> EngineFailure:
    """The device's memory ran out inside vLLM, past its own checks."""
    what = f"the engine ran out of memory: {_first(text)}"
    fix = f"Set {SHARE}, vllm.max_num_seqs or vllm.max_num_batched_tokens lower, or vllm.enable_sleep_mode to true"
    return EngineFailure("oom", what, SHARE, fix, too_large=True)


def _changed_meanwhile(text: str) -> EngineFailure:
    """`Worker.determine_available_memory`: somebody gave memory back while vLLM measured what is free."""
    what = "more memory of the GPU was free after vLLM's measurement than before: another process gave some back"
    return EngineFailure("crashed", what, SHARE, "Try again while nothing else starts or ends on this GPU")


CHECKS: dict[tuple[str, str], Callable[[str], EngineFailure]] = {
    ("vllm.v1.core.kv_cache_utils", "_check_enough_kv_cache_memory"): _keys_and_values,
    ("vllm.v1.worker.utils", "request_memory"): _share_of_gpu,
    ("vllm.v1.worker.gpu_worker", "determine_available_memory"): _changed_meanwhile,
    ("vllm.v1.worker.cpu_worker", "__init__"): _share_of_gpu,
    ("vllm.v1.worker.cpu_worker", "determine_available_memory"): _space_on_cpu,
}
"""(module, function) whose `ValueError` or `AssertionError` is about memory in vLLM 0.31 -> what reads its figures."""


def check_at(module: str, function: str) -> Callable[[str], EngineFailure] | None:
    """The reader of the check that a function makes, None where it makes none; its module may begin above the package,
    as a path in a log does."""
    return next((read for at, read in CHECKS.items() if at[1] == function and f".{module}".endswith(f".{at[0]}")), None)


def largest_share(available: int, total: int) -> float:
    """The largest share of `total` within what is available, on the grid of `STEP`, finer where that is nothing."""
    share = available / total
    return round(math.floor(share / STEP) * STEP, 2) or math.floor(share * 100) / 100


def _more_space(missing: int | None) -> str:
    """Advice to give keys and values more memory, by what decides their size here."""
    if os.environ.get(CPU_SPACE):
        more = f" by {math.ceil(missing / GIB)}" if missing else ""
        return f"raise the environment variable {CPU_SPACE} (GiB){more}"
    platforms = sys.modules.get("vllm.platforms")  # the device's memory as vLLM counts it
    total = int(platforms.current_platform.get_device_total_memory()) if platforms is not None else None
    more = f" by {math.ceil(missing / total / STEP) * STEP:.2f}" if missing and total else ""
    return f"raise {SHARE}{more}"


def _or(*ways: str) -> str:
    joined = ", or ".join(way for way in ways if way)
    return joined[:1].upper() + joined[1:]


def _first(text: str) -> str:
    """The first sentence or two of a message, without links and advice that vLLM adds."""
    return " ".join(text.split())[:300].split(" See http")[0].split(" For further information")[0]


def _gib(match: re.Match[str] | None) -> int | None:
    return None if match is None else _bytes(match[1])


def _bytes(gib: str) -> int:
    return round(float(gib.replace(",", "")) * GIB)


def _words(count: int) -> str:
    return f"{count / GIB:.2f} GiB"
