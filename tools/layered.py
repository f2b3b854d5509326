"""A drawing of boxes on floors with arrows from upper to lower ones, as SVG, after Sugiyama's method.

An arrow that passes a floor gets a place on it as a box does; the places of a floor are ordered by the mean position
of their neighbours (the barycentre), floor by floor, up and down, and the order with the fewest crossings is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import combinations, pairwise

BOX_HEIGHT, GAP, FLOOR = 30, 26, 66
LETTER = 8.2
"""Width of a letter of the boxes' type."""
PASSAGE = 10
"""Width of the place of an arrow that passes a floor."""
SWEEPS = 24

Node = str | tuple[str, str, int]
"""A box by its name, or a passage: the arrow's two ends and the floor that it passes."""
Link = tuple[Node, Node]


def draw(floors: Sequence[Sequence[str]], arrows: set[tuple[str, str]], titles: Mapping[str, str]) -> str:
    """The drawing.

    Args:
        floors: Names of the boxes, the ground floor first.
        arrows: Pairs of names, from an upper floor to a lower one.
        titles: A sentence for each name, shown where a pointer rests on the box.
    """
    rows, links = _with_passages(floors, arrows)
    rows = _untangled(rows, links)
    width = max(_width_of(row) for row in rows) + 2 * GAP
    places = _places(rows, links, width)
    height = FLOOR * (len(rows) - 1) + BOX_HEIGHT + 2 * GAP
    paths = [_arrow(arrow, floors, places) for arrow in sorted(arrows)]
    boxes = [_box(name, *places[name], titles.get(name, "")) for floor in floors for name in floor]
    return "\n".join([_head(width, height), *paths, *boxes, "</svg>", ""])


def _with_passages(
    floors: Sequence[Sequence[str]], arrows: set[tuple[str, str]]
) -> tuple[list[list[Node]], list[Link]]:
    level = {name: number for number, floor in enumerate(floors) for name in floor}
    rows: list[list[Node]] = [list(floor) for floor in floors]
    links: list[Link] = []
    for upper, lower in sorted(arrows):
        passages: list[Node] = [(upper, lower, number) for number in range(level[upper] - 1, level[lower], -1)]
        for number, passage in zip(range(level[upper] - 1, level[lower], -1), passages, strict=True):
            rows[number].append(passage)
        links += pairwise([upper, *passages, lower])
    return rows, links


def _untangled(rows: list[list[Node]], links: list[Link]) -> list[list[Node]]:
    """The rows in the order with the fewest crossings that the sweeps meet."""
    best, fewest = rows, _crossings(rows, links)
    rows = [list(row) for row in rows]
    for sweep in range(SWEEPS):
        downward = sweep % 2 == 0
        numbers = range(len(rows) - 2, -1, -1) if downward else range(1, len(rows))
        for number in numbers:
            position = _positions(rows[number + 1 if downward else number - 1])
            neighbours: dict[Node, list[float]] = {node: [] for node in rows[number]}
            for upper, lower in links:
                node, other = (lower, upper) if downward else (upper, lower)
                if node in neighbours and other in position:
                    neighbours[node].append(position[other])
            here = _positions(rows[number])
            rows[number].sort(key=lambda node: _mean(neighbours[node], here[node]))
        crossings = _crossings(rows, links)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _crossings(rows: list[list[Node]], links: list[Link]) -> int:
    position = {node: place for row in rows for node, place in _positions(row).items()}
    level = {node: number for number, row in enumerate(rows) for node in row}
    return sum(
        (position[a] - position[c]) * (position[b] - position[d]) < 0
        for (a, b), (c, d) in combinations(links, 2)
        if level[a] == level[c]
    )


def _positions(row: Sequence[Node]) -> dict[Node, float]:
    return {node: (index + 0.5) / len(row) for index, node in enumerate(row)}


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _size(node: Node) -> float:
    return len(node) * LETTER + 24 if isinstance(node, str) else PASSAGE


def _width_of(row: Sequence[Node]) -> float:
    return sum(map(_size, row)) + GAP * (len(row) - 1)


def _places(rows: list[list[Node]], links: list[Link], width: float) -> dict[Node, tuple[float, float]]:
    """Centres: each row begins in the middle of the page and is then drawn towards its neighbours."""
    centre: dict[Node, float] = {}
    for row in rows:
        left = (width - _width_of(row)) / 2
        for node in row:
            centre[node] = left + _size(node) / 2
            left += _size(node) + GAP
    for _ in range(60):
        for row in rows:
            wanted = {
                node: _mean([centre[b if a == node else a] for a, b in links if node in (a, b)], centre[node])
                for node in row
            }
            _move(row, wanted, centre, width)
    bottom = FLOOR * (len(rows) - 1) + GAP + BOX_HEIGHT / 2
    return {node: (centre[node], bottom - FLOOR * number) for number, row in enumerate(rows) for node in row}


def _move(row: Sequence[Node], wanted: Mapping[Node, float], centre: dict[Node, float], width: float) -> None:
    """Move each node towards where it is wanted, as far as its neighbours in the row leave room."""
    for index, node in enumerate(row):
        half = _size(node) / 2
        low, high = GAP + half, width - GAP - half
        if index > 0:
            low = centre[row[index - 1]] + _size(row[index - 1]) / 2 + GAP + half
        if index + 1 < len(row):
            high = centre[row[index + 1]] - _size(row[index + 1]) / 2 - GAP - half
        centre[node] = min(max(wanted[node], low), max(low, high))


def _arrow(arrow: tuple[str, str], floors: Sequence[Sequence[str]], places: Mapping[Node, tuple[float, float]]) -> str:
    """A line of vertical and curved pieces from the bottom of one box to the top of another, through its passages."""
    upper, lower = arrow
    level = {name: number for number, floor in enumerate(floors) for name in floor}
    passages = [places[upper, lower, number] for number in range(level[upper] - 1, level[lower], -1)]
    half = BOX_HEIGHT / 2
    x, y = places[upper][0], places[upper][1] + half
    pieces = [f"M{x:.0f} {y:.0f}"]
    for px, py in passages:
        middle = (y + py - half) / 2
        pieces.append(f"C{x:.0f} {middle:.0f} {px:.0f} {middle:.0f} {px:.0f} {py - half:.0f} V{py + half:.0f}")
        x, y = px, py + half
    px, py = places[lower][0], places[lower][1] - half - 4
    middle = (y + py) / 2
    pieces.append(f"C{x:.0f} {middle:.0f} {px:.0f} {middle:.0f} {px:.0f} {py:.0f}")
    return f'<path d="{" ".join(pieces)}" marker-end="url(#tip)"><title>{upper} imports {lower}</title></path>'


def _box(name: str, x: float, y: float, title: str) -> str:
    width = _size(name)
    return (
        f'<g><title>{escape(title)}</title><rect x="{x - width / 2:.0f}" y="{y - BOX_HEIGHT / 2:.0f}" '
        f'width="{width:.0f}" height="{BOX_HEIGHT}" rx="5"/>'
        f'<text x="{x:.0f}" y="{y + 4.5:.0f}">{name}</text></g>'
    )


def _head(width: float, height: float) -> str:
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}">
<style>
.page {{ fill: #ffffff }}
path {{ fill: none; stroke: #7a8794; stroke-width: 1.3 }}
rect {{ fill: #e8f0f8; stroke: #3c6491 }}
text {{ font: 600 13px ui-monospace, "DejaVu Sans Mono", Menlo, monospace; fill: #17263a; text-anchor: middle }}
#tip path {{ fill: #7a8794; stroke: none }}
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 L8 4 L0 8 z"/></marker></defs>
<rect class="page" width="100%" height="100%" style="fill: #ffffff; stroke: none"/>"""
