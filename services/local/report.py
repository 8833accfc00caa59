"""What the demo shows: the live panel, the line where there is no terminal, summary and plot."""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from services.console.observe import Snapshot
from services.local.asker import Asked
from services.local.prober import Probed

# Metric prefix in the manifests -> the name people read.
ROWS = {
    "student": "student",
    "teacher": "teacher, refreshed",
    "stale_teacher": "teacher, stale first one",
    "frozen_student": "student, frozen at the start",
    "popularity": "popularity",
}
PLOTTED = ("student", "teacher", "stale_teacher")
SMOOTHED_EVENTS = 5_000


@dataclass
class Record:
    """Everything the demo has seen, in order."""

    first_answer_s: float | None = None
    newest: Snapshot | None = None
    asked: Asked | None = None
    probed: Probed | None = None
    sent: int = 0
    total: int = 0
    sent_per_s: float = 0.0
    gates: dict[int, str] = field(default_factory=dict)  # student version -> the gate's word
    served: list[int] = field(default_factory=list)
    teachers: list[int] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)  # one manifest's metrics each
    _clock: list[tuple[int, int]] = field(default_factory=list)

    def add(self, snapshot: Snapshot, *, sent: int, total: int, asked: Asked) -> None:
        self._clock = [*self._clock[-9:], (snapshot.at_ms, sent)]
        elapsed_ms = self._clock[-1][0] - self._clock[0][0]
        if elapsed_ms:
            self.sent_per_s = (sent - self._clock[0][1]) / elapsed_ms * 1000
        self.newest, self.sent, self.total, self.asked = snapshot, sent, total, asked
        published = snapshot.student_published
        if published is not None and published not in self.gates:
            self.gates[published] = snapshot.last_gate or ""
            self.curve.append(snapshot.metrics)
        for seen, version in (
            (self.served, snapshot.student_version),
            (self.teachers, snapshot.teacher_version),
        ):
            if version is not None and version not in seen:
                seen.append(version)


def panel(record: Record) -> RenderableType:
    """The live view: what comes in, how fresh it is, how good the models are."""
    now, asked = record.newest, record.asked
    if now is None or asked is None:
        return Panel("waiting for the first event")
    left_s = (record.total - record.sent) / record.sent_per_s if record.sent_per_s else None
    flow = Table.grid(padding=(0, 2))
    flow.add_row(
        "progress", ProgressBar(total=max(record.total, 1), completed=record.sent, width=60)
    )
    for name, value in (
        ("events", f"{record.sent:,} of {record.total:,}, {record.sent_per_s:,.0f}/s"),
        ("left", "-" if left_s is None else f"{left_s / 60:,.1f} min"),
        ("not in features yet", f"{_n(now.feature_lag_events)} events"),
        ("not learned yet", f"{_n(now.learning_lag_events)} events"),
        ("feature freshness", _ms(now.feature_freshness_p50_ms, now.feature_freshness_p99_ms)),
        ("weight freshness", _s(now.weight_freshness_p50_s)),
        ("answers", f"{asked.answers:,}, {asked.failures} failed"),
        ("answer time", _ms(asked.p50_ms, asked.p99_ms)),
        ("teacher", f"version {_n(now.teacher_version)}"),
        ("student", f"version {_n(now.student_version)} of {_n(now.student_published)} published"),
        ("gate", now.last_gate or "-"),
    ):
        flow.add_row(name, value)
    return Panel(Group(flow, quality_table(now.metrics)), title="Reflux, learning live")


def line(record: Record) -> str:
    """The same in one line, for logs."""
    now, asked = record.newest, record.asked
    if now is None or asked is None:
        return "waiting for the first event"
    quality = ", ".join(
        f"{ROWS[row]} {now.metrics[f'stream.{row}.ndcg@10']:.4f}"
        for row in PLOTTED
        if now.metrics.get(f"stream.{row}.ndcg@10") is not None
    )
    return (
        f"{record.sent:,} events, {record.sent_per_s:,.0f}/s, "
        f"lag {_n(now.feature_lag_events)}/{_n(now.learning_lag_events)}, "
        f"teacher {_n(now.teacher_version)}, student {_n(now.student_version)}, "
        f"NDCG@10: {quality or '-'}; features {_ms(now.feature_freshness_p50_ms, None)}, "
        f"weights {_s(now.weight_freshness_p50_s)}, "
        f"{asked.answers:,} answers, {_ms(asked.p50_ms, asked.p99_ms)}"
    )


def quality_table(metrics: dict[str, float]) -> Table:
    """Prequential quality: over the whole stream so far, and over the newest window."""
    table = Table(
        "predict, then learn",
        "NDCG@10",
        "HR@10",
        "NDCG@10 now",
        "HR@10 now",
        box=None,
        padding=(0, 2),
    )
    for row, name in ROWS.items():
        values = [
            metrics.get(f"{span}.{row}.{metric}")
            for span in ("stream", "window")
            for metric in ("ndcg@10", "hr@10")
        ]
        table.add_row(name, *("-" if value is None else f"{value:.4f}" for value in values))
    return table


def summarize(console: Console, record: Record, *, home: Path) -> None:
    """Print the summary table, and write the plot beside the demo's state."""
    now, asked = record.newest, record.asked
    if now is None or asked is None:
        console.print("stopped before any live event was sent")
        return
    table = Table(show_header=False, title="Summary", title_justify="left", box=None)
    for name, value in (
        ("first answer of a distilled student", f"{record.first_answer_s or 0:.0f} s after start"),
        ("live events through the gateway", f"{record.sent:,}"),
        ("events scored, then learned", f"{now.metrics.get('stream.events', 0):,.0f}"),
        ("teacher versions used", _n(len(record.teachers))),
        ("student versions seen published", _n(len(record.gates))),
        ("student versions seen serving", _n(len(record.served))),
        ("feature freshness", _ms(now.feature_freshness_p50_ms, now.feature_freshness_p99_ms)),
        ("weight freshness", _s(now.weight_freshness_p50_s, now.weight_freshness_p99_s)),
        ("answers", f"{asked.answers:,}, {asked.failures} failed, {asked.degraded} degraded"),
        ("answer time over HTTP", _ms(asked.p50_ms, asked.p99_ms)),
        ("live hit rate of what was shown", _share(now.metrics.get("live.hit@10"))),
    ):
        table.add_row(name, value)
    if probed := record.probed:
        seen = f"{_ms(probed.p50_ms, probed.p99_ms)}; {probed.events:,} seen, {probed.lost} lost"
        table.add_row("event posted -> in the next answer", seen)
    console.print(table)
    console.print(quality_table(now.metrics))
    if len(record.curve) > 1:
        console.print(f"quality over the stream: {plot(record, home / 'quality.png')}")


def plot(record: Record, path: Path) -> Path:
    """Moving NDCG@10 over the stream, weighted by each window's events."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for row in PLOTTED:
        xs, ys = smooth(record.curve, f"window.{row}.ndcg@10")
        axes.plot(xs, ys, label=ROWS[row])
    axes.set_xlabel("live events learned")
    axes.set_ylabel(f"prequential NDCG@10, moving over {SMOOTHED_EVENTS:,} events")
    axes.set_title("Quality over the stream")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def smooth(curve: list[dict[str, float]], metric: str) -> tuple[list[float], list[float]]:
    """Exponential mean over about `SMOOTHED_EVENTS` events; windows without the metric skipped."""
    xs: list[float] = []
    ys: list[float] = []
    total = weight = 0.0
    for point in curve:
        value, events = point.get(metric), point.get("window.events") or 0.0
        if value is None or not events:
            continue
        keep = max(1.0 - events / SMOOTHED_EVENTS, 0.0)
        total = keep * total + value * events
        weight = keep * weight + events
        xs.append(point["stream.events"])
        ys.append(total / weight)
    return xs, ys


def _n(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _s(p50: float | None, p99: float | None = None) -> str:
    shown = [f"{name} {value:.1f} s" for name, value in (("p50", p50), ("p99", p99)) if value]
    return ", ".join(shown) or "-"


def _ms(p50: float | None, p99: float | None) -> str:
    shown = [f"{name} {value:.0f} ms" for name, value in (("p50", p50), ("p99", p99)) if value]
    return ", ".join(shown) or "-"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
