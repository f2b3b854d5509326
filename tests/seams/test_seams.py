"""Layers on slots: any order of coming and going, and nothing left behind."""

from __future__ import annotations

import asyncio
import functools
import itertools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_autotune.errors import SeamError
from grpo_autotune.seams.layers import INNER, OUTER, AttributeSlot, ClassSlot, ItemSlot, is_async, wrap
from grpo_autotune.seams.table import TABLE, find, slot_of


class Thing:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def work(self, value: int) -> int:
        self.calls.append("work")
        return value + 1

    def __call__(self, value: int) -> int:
        return value * 10


def tracing(name: str, seen: list[str]):
    def layer(call_next, /, *args, **kwargs):
        seen.append(name)
        return call_next(*args, **kwargs)

    return layer


def test_a_layer_wraps_one_instance_and_leaves_nothing_behind():
    thing, other, seen = Thing(), Thing(), []
    handle = wrap(AttributeSlot(thing, "work"), tracing("probe", seen))
    assert (thing.work(1), other.work(1)) == (2, 2)
    assert seen == ["probe"]
    handle.remove()
    handle.remove()
    assert "work" not in vars(thing)
    assert thing.work.__func__ is Thing.work


def test_order_decides_nesting_whoever_came_first():
    for names in itertools.permutations([("outer", OUTER), ("inner", INNER), ("middle", 5)]):
        thing, seen = Thing(), []
        for name, order in names:
            wrap(AttributeSlot(thing, "work"), tracing(name, seen), order)
        thing.work(1)
        assert seen == ["outer", "middle", "inner"]


@given(st.permutations(range(4)))
def test_removal_in_any_order_restores_the_instance(order: list[int]):
    thing, seen = Thing(), []
    handles = [wrap(AttributeSlot(thing, "work"), tracing(str(i), seen), i) for i in range(4)]
    for done, index in enumerate(order):
        handles[index].remove()
        seen.clear()
        assert thing.work(3) == 4
        assert len(seen) == 3 - done
    assert "work" not in vars(thing)


def test_an_attribute_that_the_instance_had_itself_comes_back():
    thing = Thing()
    thing.work = own = lambda value: value - 1  # type: ignore[method-assign]
    handle = wrap(AttributeSlot(thing, "work"), tracing("probe", []))
    assert thing.work(1) == 0
    handle.remove()
    assert thing.work is own


def test_a_foreign_patch_on_top_survives_our_leaving():
    thing, seen = Thing(), []
    handle = wrap(AttributeSlot(thing, "work"), tracing("probe", seen))
    ours = thing.work
    thing.work = lambda value: ours(value) + 100  # type: ignore[method-assign]
    handle.remove()
    assert thing.work(1) == 102
    assert seen == []


def test_a_foreign_patch_that_bears_our_marks_is_not_taken_for_ours():
    """`functools.wraps` copies what a function carries."""
    thing, seen = Thing(), []
    handle = wrap(AttributeSlot(thing, "work"), tracing("inside", seen))
    ours = thing.work
    thing.work = functools.wraps(ours)(lambda value: ours(value) + 100)  # type: ignore[method-assign]
    foreign = thing.work
    around = wrap(AttributeSlot(thing, "work"), tracing("around", seen))
    assert thing.work(1) == 102 and seen == ["around", "inside"]
    around.remove()
    handle.remove()
    assert thing.work is foreign and thing.work(1) == 102


def test_a_dunder_is_wrapped_on_a_one_off_subclass_of_the_same_name():
    thing, other, seen = Thing(), Thing(), []
    call = wrap(ClassSlot(thing, "__call__"), tracing("call", seen))
    work = wrap(ClassSlot(thing, "work"), tracing("work", seen))
    assert (thing(2), other(2), thing.work(1)) == (20, 20, 2)
    assert seen == ["call", "work"]
    assert type(thing).__name__ == "Thing" and isinstance(thing, Thing)
    assert set(vars(thing)) == {"calls"}, "instance attributes would be written into a processor's JSON"
    call.remove()
    assert thing(2) == 20 and type(thing) is not Thing
    work.remove()
    assert type(thing) is Thing


def test_an_async_function_in_a_list_stays_async():
    async def reward(value: int) -> int:
        await asyncio.sleep(0)
        return value

    async def layer(call_next, /, *args, **kwargs):
        return 1 + await call_next(*args, **kwargs)

    functions = [reward]
    handle = wrap(ItemSlot(functions, 0), layer)
    assert is_async(functions[0]) and functions[0].__name__ == "reward"
    assert asyncio.run(functions[0](1)) == 2
    handle.remove()
    assert functions == [reward]


def test_a_missing_seam_is_one_line_with_stage_method_and_versions():
    trainer = types.SimpleNamespace(accelerator=types.SimpleNamespace())
    with pytest.raises(SeamError) as caught:
        slot_of(trainer, find("backward"))
    line = str(caught.value)
    assert "backward" in line and "SimpleNamespace.backward" in line
    assert "TRL 1.12 to 1.16" in line and "\n" not in line


def test_keys_of_the_table_are_unique():
    assert len({row.key for row in TABLE}) == len(TABLE)


def test_a_layer_on_what_outlives_its_owner_keeps_it_not_alive() -> None:
    class Adds:
        def layer(self, call_next: Callable[..., Any], /, number: int) -> int:
            return int(call_next(number)) + 1

    place, adds = types.SimpleNamespace(double=lambda number: 2 * number), Adds()
    alive, handle = weakref.ref(adds), wrap(AttributeSlot(place, "double"), adds.layer, weakly=True)
    assert place.double(3) == 7
    del adds
    assert alive() is None and place.double(3) == 6
    handle.remove()
    assert not hasattr(place.double, "__grpo_autotune_point__")
