"""The YAML of an imported configuration: what is read back is what was written, whatever the comments say."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from grpo_autotune.config.yaml_text import parse_yaml, write_yaml
from grpo_autotune.interop.translation import nested
from grpo_autotune.interop.writing.yaml_text import WIDTH, commented, yaml_text
from grpo_autotune.records.imported import Imported

WORDS = st.text(min_size=1, max_size=80).filter(lambda text: text.isprintable())
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.floats(allow_nan=False), st.text())
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=3), st.lists(st.dictionaries(WORDS, SCALARS, min_size=1), max_size=2)
)
TREES = st.dictionaries(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), VALUES, min_size=1, max_size=6)


@given(st.dictionaries(st.sampled_from(["model", "data", "grpo"]), TREES, min_size=1), st.data())
def test_comments_leave_the_values_alone(tree: dict[str, Any], data: Any) -> None:
    paths = [*tree, *(f"{section}.{key}" for section, values in tree.items() for key in values)]
    comments = data.draw(st.dictionaries(st.sampled_from(paths), st.text(min_size=1)))
    text = commented(write_yaml(tree), comments)
    assert parse_yaml(text, "here") == tree
    assert text.count("#") >= sum(bool(comment.strip()) for comment in comments.values())


def imported(config: dict[str, Any]) -> Imported:
    return Imported(
        file="run.sh", source="verl", version="2026", version_from="assumed", world_size=8, numbers={"D": 8},
        steps_per_rollout=4.0, rows=[], warnings=[], config=config,
    )  # fmt: skip


def test_sections_stand_in_their_order_and_comments_behind_their_keys() -> None:
    values = {"grpo.beta": 0.04, "grpo.loss_type": "dapo", "model.name_or_path": "m", "rewards": [{"name": "format"}]}
    comments = {"grpo.beta": "k3", "grpo.loss_type": "word " * 40, "rewards": "choose"}
    text = yaml_text(imported(nested(values)), comments)
    lines = text.splitlines()
    assert [line.partition(":")[0] for line in lines if line[0].isalpha()] == ["model", "rewards", "grpo"]
    assert lines[0].startswith("# By grpo-autotune import, from run.sh, verl 2026 (assumed).")
    assert "  beta: 0.04  # k3" in lines and "rewards:  # choose" in lines
    extra = {f"vllm.{name}": 1 for name in ("z", "b", "y", "a", "max_num_seqs")}
    section = yaml_text(imported(nested(extra)), {}).splitlines()[-5:]
    assert section == ["  max_num_seqs: 1", "  z: 1", "  b: 1", "  y: 1", "  a: 1"]
    at = lines.index("  loss_type: dapo")
    assert lines[at - 1].startswith("  # word") and max(map(len, lines)) <= WIDTH
