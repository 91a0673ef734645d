"""Line charts over time as inline SVG, without a library; colours come from the page's style sheet."""

import math
from html import escape

WIDTH, HEIGHT = 640, 200
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 10, 26  # margins
COLOURS = 8  # in the style sheet: classes s0 to s7
MAX_MARKERS = 60  # points of a curve; longer ones get none

Point = tuple[int, float]  # frame, value


def chart(name: str, curves: list[tuple[str, list[Point]]], frame_count: int) -> str:
    """A chart of one metric of several clips.

    Args:
        curves: the label of each clip and its points in order; values that are not finite leave a gap.
        frame_count: the length of the time axis.

    Returns:
        An `<svg>` element whose `data-left`, `data-width` and `data-frames` locate a frame on the axis.
    """
    low, high = _range([value for _, points in curves for _, value in points])
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    last = max(frame_count - 1, 1)

    def x(frame: int) -> float:
        return LEFT + inner_width * frame / last

    def y(value: float) -> float:
        return TOP + inner_height * (high - value) / (high - low)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)} over time"'
        f' data-left="{LEFT}" data-width="{inner_width}" data-frames="{frame_count}">'
    ]
    for value in _ticks(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y(value) + 4:.1f}">{value:.5g}</text>')
    for frame in sorted({0, last // 2, last} if frame_count > 1 else {0}):
        parts.append(f'<text class="tick middle" x="{x(frame):.1f}" y="{HEIGHT - 8}">{frame}</text>')
    for number, (label, points) in enumerate(curves):
        placed = [[(x(frame), y(value)) for frame, value in run] for run in _runs(points)]
        parts.append(_curve(label, placed, number))
    parts.append(f'<line class="now" x1="{LEFT}" x2="{LEFT}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>')
    return "".join(parts)


def _curve(label: str, runs: list[list[tuple[float, float]]], number: int) -> str:
    lines = "".join(
        f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in run)}"/>' for run in runs if len(run) > 1
    )
    marked = [point for run in runs for point in run if len(run) == 1 or sum(map(len, runs)) <= MAX_MARKERS]
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in marked)
    return f'<g class="curve s{number % COLOURS}"><title>{escape(label)}</title>{lines}{marks}</g>'


def _runs(points: list[Point]) -> list[list[Point]]:
    """The runs of finite values."""
    runs: list[list[Point]] = [[]]
    for frame, value in points:
        if math.isfinite(value):
            runs[-1].append((frame, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _range(values: list[float]) -> tuple[float, float]:
    """The range of the axis: all finite values, with a margin."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    margin = 0.06 * (high - low) or max(abs(high) * 0.01, 0.01)
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round values within the range."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
