"""One wrapper per seam, holding an ordered list of layers, so that whoever needs a seam can come and go in any order.

A *slot* is a place that holds a callable: an attribute of an object, class or module, an item of a list, or a method
that Python looks up on the class (a processor's `__call__`). The first layer put on a slot installs the wrapper; when
the last one leaves, the slot is as it was before.
"""

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, Protocol

OUTERMOST = -10
"""Around the probe: for calls that do no work and that it should not count."""
OUTER = 0
INNER = 10
_MARK = "__grpo_autotune_point__"
_ABSENT = object()

Next = Callable[..., Any]
"""What a layer calls: the layer below it, or the wrapped function."""


def is_async(function: Callable[..., Any]) -> bool:
    """True if calling `function` returns a coroutine: partials and callable instances too, as TRL decides it."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class Layer(Protocol):
    """Called in place of the wrapped function, with what is to be called next (the layer below, or the original)."""

    def __call__(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any: ...


class Slot(Protocol):
    """A place for a wrapper, which can be restored; `original` is what stands below all layers."""

    def get(self) -> Callable[..., Any]: ...
    def original(self) -> Callable[..., Any]: ...
    def put(self, wrapper: Callable[..., Any]) -> None: ...
    def restore(self) -> None: ...


class AttributeSlot:
    """An attribute of an instance, a class or a module; one that was inherited is deleted again, not copied."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.before = vars(owner).get(name, _ABSENT)

    def get(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(self.owner, self.name)
        return function

    def original(self) -> Callable[..., Any]:
        return _method(type(self.owner), self) if self.before is _ABSENT else self.get()

    def put(self, wrapper: Callable[..., Any]) -> None:
        setattr(self.owner, self.name, wrapper)

    def restore(self) -> None:
        if self.before is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


class ItemSlot:
    """An item of a list or mapping, such as one reward function of `trainer.reward_funcs`."""

    def __init__(self, owner: Any, index: int | str) -> None:
        self.owner, self.index = owner, index
        self.before = owner[index]

    def get(self) -> Callable[..., Any]:
        function: Callable[..., Any] = self.owner[self.index]
        return function

    original = get

    def put(self, wrapper: Callable[..., Any]) -> None:
        self.owner[self.index] = wrapper

    def restore(self) -> None:
        self.owner[self.index] = self.before


class ClassSlot(AttributeSlot):
    """A method of one object, replaced on a one-off subclass of its class: for dunders, which Python looks up on the
    class, and for objects that write their instance attributes to disk (processors, image processors). The subclass
    keeps the name, so that saved files name the real class."""

    def original(self) -> Callable[..., Any]:
        cls = type(self.owner)
        return _method(vars(cls).get("_seam_base", cls), self)

    def put(self, wrapper: Callable[..., Any]) -> None:
        cls = type(self.owner)
        if "_seam_base" not in vars(cls):
            kept = {"_seam_base": cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
            cls = types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update(kept))
            self.owner.__class__ = cls
        setattr(cls, self.name, staticmethod(wrapper))

    def restore(self) -> None:
        cls = type(self.owner)
        delattr(cls, self.name)
        if not any(hasattr(getattr(cls, name), _MARK) for name in vars(cls)):
            self.owner.__class__ = vars(cls)["_seam_base"]


def _method(cls: type, slot: AttributeSlot) -> Callable[..., Any]:
    """A method as the class has it when it is called: somebody may patch the class after us."""
    if not inspect.isfunction(getattr(cls, slot.name, None)):
        return slot.get()
    return lambda *args, **kwargs: getattr(cls, slot.name)(slot.owner, *args, **kwargs)


class Point:
    """The wrapper of one slot and its layers, outermost first."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.original = slot.original()
        self.layers: list[tuple[int, Layer]] = []
        self.call: Callable[..., Any] = self.original
        self.wrapper = self._wrapper(slot.get())
        setattr(self.wrapper, _MARK, self)
        slot.put(self.wrapper)

    def arrange(self, layers: list[tuple[int, Layer]]) -> None:
        """Take `layers`, outermost first, in place of those there are."""
        self.layers, self.call = layers, self.original
        for _, layer in reversed(layers):
            self.call = functools.partial(layer, self.call)

    def _wrapper(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if is_async(function):

            @functools.wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                return await self.call(*args, **kwargs)

            return awaited

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            return self.call(*args, **kwargs)

        return called

    def remove(self, layer: Layer) -> None:
        self.arrange([entry for entry in self.layers if entry[1] is not layer])
        if not self.layers and _point_in(self.slot) is self:
            self.slot.restore()


class Handle:
    """A layer that was put on; `remove()` takes it out again and may be called twice."""

    def __init__(self, point: Point, layer: Layer) -> None:
        self._point: Point | None = point
        self._layer = layer

    @property
    def shared(self) -> bool:
        """True for a layer on a module or a class, which outlive every trainer."""
        return self._point is not None and isinstance(getattr(self._point.slot, "owner", None), type | types.ModuleType)

    def remove(self) -> None:
        if self._point is not None:
            self._point.remove(self._layer)
            self._point = None


def take_off(handles: list[Any]) -> None:
    """Remove layers, or hooks of torch, the last one first, and forget them."""
    while handles:
        handles.pop().remove()


def wrap(slot: Slot, layer: Layer, order: int = OUTER, *, weakly: bool = False) -> Handle:
    """Put `layer` on `slot`: lower `order` is further out, and of equal orders the newer is further out. `weakly`, for
    a place that may outlive it, keeps no object alive whose method the layer is."""
    layer = _while_alive(weakref.WeakMethod(layer)) if weakly and inspect.ismethod(layer) else layer
    point = _point_in(slot)
    if point is None or not _same_place(point.slot, slot):
        point = Point(slot)
    index = next((i for i, (other, _) in enumerate(point.layers) if other >= order), len(point.layers))
    point.arrange([*point.layers[:index], (order, layer), *point.layers[index:]])
    return Handle(point, layer)


def _while_alive(method: Callable[[], Any]) -> Layer:
    def called(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        return call_next(*args, **kwargs) if (layer := method()) is None else layer(call_next, *args, **kwargs)

    return called


def _point_in(slot: Slot) -> Point | None:
    """The point whose wrapper the slot holds; somebody's `functools.wraps` copies the mark to a function around it."""
    function = slot.get()
    point = getattr(function, _MARK, None)
    return point if isinstance(point, Point) and point.wrapper is function else None


def _same_place(a: Slot, b: Slot) -> bool:
    if type(a) is not type(b):
        return False
    at = [getattr(slot, "name", getattr(slot, "index", None)) for slot in (a, b)]
    return getattr(a, "owner", None) is getattr(b, "owner", None) and at[0] == at[1]
