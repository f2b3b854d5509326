"""Reward functions of other frameworks, called by TRL: their files stay as they are.

TRL gives a reward the lists of a batch of B: `completions` (texts, or messages), `completion_ids`, and one for each
column. A style makes of them the arguments of one call for all, or of a call for each completion. What a plugin of
ms-swift imports of it is here where it is not installed: bases and registries, and names without a function.
"""

import asyncio
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from grpo_autotune.errors import ConfigError


class ORM:
    """Base of rewards, sync and async ones."""

    def __init__(self, args: Any = None, **kwargs: Any) -> None:
        self.args = args


ORMS: dict[str, Any] = {}  # rewards that plugins have registered, by name
KNOWN = {"ORM": ORM, "AsyncORM": ORM, "orms": ORMS, "get_logger": lambda *name, **how: logging.getLogger("swift")}


class _Absent(dict[Any, Any]):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        what = f"a plugin calls {type(self).__name__} of ms-swift, of which only the base of rewards is here"
        fix = "Install ms-swift, or put the reward into a file of its own."
        raise ConfigError(what, where="rewards", fix=fix)

    __call__ = __init__


class _Swift(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        absent: Any = type(name, (_Absent,), {})
        return KNOWN[name] if name in KNOWN else (absent if name[0].isupper() else absent.__new__(absent))


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "swift" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Swift(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return None


Batch = Mapping[str, Any]
Calls = tuple[bool, list[tuple[Any, ...]], list[dict[str, Any]]]  # one call for all? arguments by place; by name


class Called:
    """A function of the Python file `path` (from the folder of the file `beside`) or of ms-swift's registry, written
    for a `style` of `named.STYLES`, with further keyword `arguments`; a class of ms-swift has them in its `args`.
    ConfigError where there is no such file or function, or the file needs what is not installed."""

    def __init__(self, style: str, path: str, function: str, arguments: Mapping[str, Any], beside: str) -> None:
        file = Path(beside).absolute().parent / Path(path).expanduser()
        if style == "swift" and "swift" not in sys.modules and importlib.util.find_spec("swift") is None:
            sys.meta_path.append(_Finder())
        module = _imported(file)
        registered = getattr(module, "orms", ORMS) if style == "swift" else {}
        called: Any = registered.get(function) or getattr(module, function, None)
        if not callable(called):
            known = [*registered, *(name for name, value in vars(module).items() if inspect.isroutine(value))]
            raise ConfigError(f"{file} has no {function}", where=beside, fix=f"It has {', '.join(known)}.")
        self._arguments: Mapping[str, Any] = arguments
        if inspect.isclass(called):
            made: Any = called
            parameters = inspect.signature(made).parameters.values()
            takes = any(one.name == "args" or one.kind is one.VAR_KEYWORD for one in parameters)
            called = made(args=SimpleNamespace(**arguments)) if takes else made()
            self._arguments = {}
        self._function: Callable[..., Any] = called
        self._calls: Callable[[Batch, list[str]], Calls] = getattr(self, f"_{style.partition('_')[0]}")
        self._sequential = style == "easyr1_each" or getattr(module, "REWARD_TYPE", "batch") == "sequential"
        self._parameters = inspect.signature(called).parameters
        self.is_async = any(map(inspect.iscoroutinefunction, (called, type(called).__call__)))

    def __call__(self, **batch: Any) -> list[float | None]:
        whole, args, keys = self._calls(batch, list(map(text_of, batch["completions"])))
        results = [self._function(*one, **more, **self._arguments) for one, more in zip(args, keys, strict=True)]
        return list(map(_number, results[0] if whole else results))

    async def awaited(self, **batch: Any) -> list[float | None]:
        """The same of an async function, its calls side by side."""
        whole, args, keys = self._calls(batch, list(map(text_of, batch["completions"])))
        calls = (self._function(*one, **more, **self._arguments) for one, more in zip(args, keys, strict=True))
        results = await asyncio.gather(*calls)
        return list(map(_number, results[0] if whole else results))

    def _verl(self, batch: Batch, texts: list[str]) -> Calls:
        columns = {name: batch[name] for name in ("data_source", "ground_truth")}
        extras = batch.get("extra_info") or [None] * len(texts)
        given = [{**(extra or {}), "num_turns": None, "rollout_reward_scores": {}} for extra in extras]
        columns |= {"solution_str": texts, "extra_info": given}
        if "solution_strs" in self._parameters:
            return True, [()], [{f"{name}s": list(values) for name, values in columns.items()}]
        takes_all = any(one.kind is one.VAR_KEYWORD for one in self._parameters.values())
        taken = [name for name in columns if takes_all or name in self._parameters]
        args = [(text,) if "predict_str" in self._parameters else () for text in texts]  # a built-in one's name for it
        return False, args, [{name: columns[name][row] for name in taken} for row in range(len(texts))]

    def _easyr1(self, batch: Batch, texts: list[str]) -> Calls:
        open_ones = (one for one in self._parameters.values() if one.default is one.empty)
        needed = [one.name for one in open_ones if one.kind < one.VAR_POSITIONAL and one.name not in self._arguments]
        truths = list(batch["ground_truth"])
        if len(needed) > 1:  # before June 2025: texts and references
            whole = needed[0].endswith("s")
            args: list[tuple[Any, ...]] = [(texts, truths)] if whole else list(zip(texts, truths, strict=True))
        else:
            rows = zip(texts, map(len, batch["completion_ids"]), truths, strict=True)
            dicts = [{"response": text, "response_length": n, "ground_truth": truth} for text, n, truth in rows]
            whole = not self._sequential
            args = [(dicts,)] if whole else [(one,) for one in dicts]
        return whole, args, [{} for _ in args]

    def _swift(self, batch: Batch, texts: list[str]) -> Calls:
        others = {name: values for name, values in batch.items() if name != "completions"}
        return True, [(texts,)], [{**others, "response_token_ids": batch["completion_ids"]}]


def text_of(completion: Any) -> str:
    """A completion as text: plain, or of the assistant's last message."""
    turns = [{"content": completion}] if isinstance(completion, str) else completion
    contents = [turn.get("content") for turn in turns if turn.get("role", "assistant") == "assistant"]
    parts = contents[-1] if contents else ""
    return parts if isinstance(parts, str) else "".join(part.get("text", "") for part in parts or ())


def _number(result: Any) -> float | None:
    if isinstance(result, Mapping):
        result = result["score"] if "score" in result else result["overall"]
    result = result[0] if isinstance(result, list | tuple) else result
    return None if result is None else float(result)


def _imported(file: Path) -> ModuleType:
    """The module of a file, under a name of its own: such files are called `math.py`."""
    name = f"rewards_of_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ConfigError(f"there is no Python file {file}", where="rewards", fix="Correct the path in the adapter.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path += [str(file.parent)] if str(file.parent) not in sys.path else []
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ConfigError(f"{file} cannot be imported: {error}", where="rewards", fix="Install it.") from error
    return module
