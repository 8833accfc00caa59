"""A table as Markdown and Parquet, and its plot."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.evaluate.results import Bootstrap, Outcome
from services.core.metrics import gains_at

PLOTTED_PARTS = 25

Line = Mapping[str, Any]  # column -> value; a pair of numbers is an interval


def quality_lines(outcomes: Mapping[str, Outcome], bootstrap: Bootstrap) -> list[Line]:
    """One line a row: metrics, the interval of what the bootstrap is of, costs."""
    return [
        {
            "row": name,
            **outcome.metrics(),
            "interval": bootstrap.interval(itemgetter(name)),
            **vars(outcome.cost),
        }
        for name, outcome in outcomes.items()
    ]


def write(lines: Sequence[Line], path: Path, *, title: str, command: str) -> str:
    """`path`.md and `path`.parquet; the Markdown."""
    columns = list(dict.fromkeys(column for line in lines for column in line))
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    body = [
        "| " + " | ".join(_shown(line.get(column), column) for column in columns) + " |"
        for line in lines
    ]
    text = "\n".join([f"## {title}", "", f"    {command}", "", *head, *body, ""])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text)
    pq.write_table(
        pa.Table.from_pylist([dict(line) for line in lines]), path.with_suffix(".parquet")
    )
    return text


def plot_bars(lines: Sequence[Line], path: Path, *, metric: str, title: str) -> None:
    """The rows' `metric` as bars with their `interval`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.4 * len(lines) + 1), layout="constrained")
    axes = figure.subplots()
    for at, line in enumerate(reversed(lines)):
        low, high = line["interval"]
        value = line[metric]
        beside = [[max(0.0, value - low)], [max(0.0, high - value)]]  # of one user: rounding
        axes.barh(at, value, xerr=beside, color="tab:blue", alpha=0.8)
    axes.set_yticks(range(len(lines)), [line["row"] for line in reversed(lines)])
    axes.set_xlabel(metric)
    axes.set_title(title)
    figure.savefig(path, dpi=120)


def plot_over(outcomes: Mapping[str, Outcome], path: Path, *, title: str) -> None:
    """NDCG@10 along the stream, each point the mean of an equal part of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name, outcome in outcomes.items():
        pieces = np.array_split(gains_at(outcome.rank_N, 10), PLOTTED_PARTS)
        ends = np.cumsum([len(piece) for piece in pieces])
        axes.plot(ends, [piece.mean() for piece in pieces], label=name)
    axes.set_xlabel("events of the second half")
    axes.set_ylabel("ndcg@10")
    axes.set_title(title)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


def _shown(value: Any, column: str) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, tuple | list):
        return " .. ".join(_shown(part, column) for part in value)
    if isinstance(value, float):
        return f"{value:.1f}" if column.endswith(("_s", "_mb")) else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
