"""Work that is done once in a run, at the first use of something, and is no part of what a step takes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

Context = Callable[[], AbstractContextManager[None]]

_watchers: list[Context] = []


def watch_first_use(context: Context) -> Callable[[], None]:
    """Have a context around all such work from now on, until the answer is called; that may be twice."""
    _watchers.append(context)
    return lambda: _watchers.remove(context) if context in _watchers else None


@contextmanager
def first_use() -> Iterator[None]:
    """A context around such work."""
    with ExitStack() as stack:
        for context in tuple(_watchers):  # a trainer that is freed meanwhile takes its own out
            stack.enter_context(context())
        yield
