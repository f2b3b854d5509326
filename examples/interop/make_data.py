"""Handwritten digits as verl's data: nested columns, images as bytes, and `<image>` where the picture belongs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from grpo_autotune.demo import digits_dataset

FOLDER = Path(__file__).parent


def verl_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the demo's data with verl's names."""
    picture = io.BytesIO()
    row["image"].save(picture, "PNG")
    question = row["prompt"][-1]["content"]
    return {
        "data_source": "digits",
        "prompt": [{"role": "user", "content": f"<image>{question}"}],
        "images": [{"bytes": picture.getvalue(), "path": None}],
        "reward_model": {"style": "rule", "ground_truth": str(row["answer"])},
    }


for split in ("train", "test"):
    rows = [verl_row(row) for row in digits_dataset(split, count=128)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), FOLDER / f"digits_{split}.parquet")
