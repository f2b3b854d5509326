"""The table of evaluations as lines of fixed columns, so that a row printed as it happens stands below those before."""

from collections.abc import Callable, Sequence

from grpo_autotune.records.evaluations import Evaluation
from grpo_autotune.units import percent, seconds

GAP = 2
HEADER_EVERY = 20
"""Rows after which the header is printed again."""


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _reward(row: Evaluation) -> str:
    half = "" if row.eval_reward_ci is None else f" ±{row.eval_reward_ci:.4f}"
    return _number(row.eval_reward) + half


def _weights(row: Evaluation) -> str:
    return "/".join(f"{beta:.3g}" for beta in row.beta.values())


COLUMNS: dict[str, tuple[int, int, Callable[[Evaluation], str]]] = {
    "epoch": (6, 3, lambda row: _short(row.epoch)),
    "step": (5, 0, lambda row: str(row.step)),
    "set": (10, 1, lambda row: row.held_out),
    "loss": (8, 7, lambda row: _number(row.loss)),
    "val loss": (8, 6, lambda row: _number(row.eval_loss)),
    "ppo loss": (8, 12, lambda row: _number(row.eval_ppo_loss)),
    "KL": (7, 8, lambda row: _number(row.eval_kl)),
    "adv std": (7, 10, lambda row: _short(row.adv_std)),
    "adv max": (7, 17, lambda row: _short(row.adv_max)),
    "val std": (7, 18, lambda row: _short(row.eval_adv_std)),
    "val max": (7, 19, lambda row: _short(row.eval_adv_max)),
    "beta": (6, 15, _weights),
    "reward": (7, 9, lambda row: _number(row.reward)),
    "held-out reward": (15, 2, _reward),
    "branches": (16, 11, lambda row: ", ".join(f"{name} {value:.2f}" for name, value in row.branches.items())),
    "entropy": (7, 16, lambda row: _number(row.eval_entropy)),
    "tokens": (6, 13, lambda row: "" if row.eval_length is None else f"{row.eval_length:.1f}"),
    "cut": (5, 14, lambda row: "" if row.eval_truncated is None else percent(row.eval_truncated)),
    "took": (7, 20, lambda row: "" if row.seconds is None else seconds(row.seconds)),
    "kept": (4, 5, lambda row: "yes" if row.kept else ""),
    "best": (4, 4, lambda row: "*" if row.best else ""),
}
"""Title -> columns of text, place in the order in which columns are left out (the highest first), and a row's cell."""

LEGEND = (
    "val: held out; ppo loss: without the KL term; adv: advantages of training since the row before; ±: 95 % interval "
    "over prompts; tokens: of a completion; cut: share of truncated ones"
)


def fitting(rows: Sequence[Evaluation], width: int) -> list[str]:
    """The titles that fit into `width` columns of text, those apart that no row has anything for."""
    shown = [title for title, (_, _, cell) in COLUMNS.items() if any(cell(row) for row in rows)]
    while sum(COLUMNS[title][0] + GAP for title in shown) - GAP > width and len(shown) > 1:
        shown.remove(max(shown, key=lambda title: COLUMNS[title][1]))
    return shown


def header(titles: Sequence[str]) -> str:
    """The line above the rows."""
    return (" " * GAP).join(title.rjust(COLUMNS[title][0]) for title in titles)


def line(row: Evaluation, titles: Sequence[str]) -> str:
    """A row as a line; a cell that is too long moves what follows."""
    return (" " * GAP).join(COLUMNS[title][2](row).rjust(COLUMNS[title][0]) for title in titles).rstrip()


def table_lines(rows: Sequence[Evaluation], width: int) -> list[str]:
    """The whole table, and what did not fit into `width` columns."""
    titles = fitting(rows, width)
    left_out = [title for title in fitting(rows, 10**6) if title not in titles]
    more = [f"left out for width: {', '.join(left_out)} (--json has them)"] if left_out else []
    return [header(titles), *(line(row, titles) for row in rows), *more] if rows else []


class RowPrinter:
    """Prints rows one by one, with a header now and then."""

    def __init__(self, say: Callable[[str], None], width: int) -> None:
        self.say, self._width, self._titles, self._rows = say, width, list[str](), 0

    def print(self, row: Evaluation) -> None:
        """Print a row, below a header where that is due or another column has come."""
        titles = fitting([row.model_copy(update={"best": True})], self._width)  # with room for the sign
        if self._rows % HEADER_EVERY == 0 or not {*titles} <= {*self._titles}:
            self._titles = titles
            self.say(header(self._titles))
        self.say(line(row, self._titles))
        self._rows += 1
