"""Training curves: the figures of each optimizer step, drawn as SVG and PNG."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_POINTS = 300
"""Points drawn of a curve; more would only make the report large."""
_SMOOTHING = 0.04
"""Weight of a new point in the moving average."""
_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 32


@dataclass(frozen=True, slots=True)
class Curve:
    """One figure over the optimizer steps of a stage."""

    steps: list[int]
    values: list[float]

    def thinned(self) -> Curve:
        """At most `_POINTS` points: means of neighbours."""
        size = -(-len(self.steps) // _POINTS)
        groups = range(0, len(self.steps), size or 1)
        return Curve(
            [self.steps[min(start + size, len(self.steps)) - 1] for start in groups],
            [_mean(self.values[start : start + size]) for start in groups],
        )

    def smoothed(self) -> Curve:
        """The exponential moving average, corrected for its start."""
        average, weight, values = 0.0, 0.0, []
        for value in self.values:
            average += _SMOOTHING * (value - average)
            weight += _SMOOTHING * (1 - weight)
            values.append(average / weight)
        return Curve(self.steps, values)


def curve(rows: Iterable[dict[str, float]], figure: str) -> Curve:
    """One figure of the rows that have it."""
    points = [(int(row["step"]), float(row[figure])) for row in rows if figure in row]
    return Curve([step for step, _ in points], [value for _, value in points])


def mean(rows: Iterable[dict[str, float]], figure: str) -> float | None:
    """The mean of one figure; None where no row has it."""
    values = [float(row[figure]) for row in rows if figure in row]
    return _mean(values) if values else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def svg(line: Curve, title: str) -> str:
    """A line chart that takes its colours from the page; empty text for an empty curve."""
    if not line.steps:
        return ""
    raw, smooth = line.thinned(), line.smoothed().thinned()
    low, high = min(raw.values), max(raw.values)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    first, last = raw.steps[0], max(raw.steps[-1], raw.steps[0] + 1)

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (step - first) / (last - first)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    def points(of: Curve) -> str:
        pairs = zip(of.steps, of.values, strict=True)
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in pairs)

    ticks = [low + (high - low) * part / 4 for part in range(5)]
    grid = "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}" class="grid"/>'
        f'<text x="{_LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t:.3g}</text>'
        for t in ticks
    )
    base = _HEIGHT - 10
    steps = (
        f'<text x="{_LEFT}" y="{base}">{first}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{base}" text-anchor="end">step {raw.steps[-1]}</text>'
    )
    name = html.escape(title, quote=True)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}"><title>{name}</title>'
        f'{grid}{steps}<polyline class="raw" points="{points(raw)}"/>'
        f'<polyline class="smooth" points="{points(smooth)}"/></svg>'
    )


def png(line: Curve, title: str, figure: str) -> bytes:
    """The chart as a PNG, for trackers that show pictures."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chart = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = chart.subplots()
    axes.plot(line.steps, line.values, color="#b9cbe8", linewidth=0.8)
    axes.plot(line.steps, line.smoothed().values, color="#2457a6", linewidth=1.8)
    axes.set(title=title, xlabel="optimizer step", ylabel=figure)
    axes.grid(alpha=0.25)
    sink = io.BytesIO()
    FigureCanvasAgg(chart).print_png(sink)
    return sink.getvalue()
