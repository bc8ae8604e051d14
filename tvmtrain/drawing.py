"""Live bytes over a training step, and its kernels under a roofline, as pictures: SVG, PNG or PDF, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvmtrain.costs import EntryMemory, Timeline
from tvmtrain.errors import InputError, MissingPackageError

FORMATS = ("svg", "png", "pdf")
# Kind of ``costs.Timeline``, from the bottom up: its name in the legend and its colour (Okabe and Ito's, for all eyes).
KINDS = {
    "features": ("saved features", "#0072b2"),
    "masks": ("saved masks", "#56b4e9"),
    "gradients": ("gradients and updates of weights", "#d55e00"),
    "temporary": ("activations and temporary values", "#e69f00"),
    "workspace": ("workspace in the arena", "#009e73"),
    "results": ("results", "#cc79a7"),
    "allocated": ("beside the arena, each core", "#c4c4c4"),
}
# A kind that is nowhere higher than this share of the picture cannot be seen, and is not in the legend.
VISIBLE = 0.002
STYLE = {
    # Text stays text, and the same step gives the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "tvmtrain",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Panel:
    """A training step by the name that its title says."""

    name: str
    memory: EntryMemory
    timeline: Timeline


def picture(panels: Sequence[Panel], kind: str) -> bytes:
    """A file of ``kind``, one of ``FORMATS``, with ``panels`` side by side on one scale.

    Raises ``MissingPackageError`` without matplotlib, and ``InputError`` for another kind.
    """
    return _drawn(kind, (2.2 + 5.4 * len(panels), 5), lambda figure: _fill(figure, panels))


def kind_of(path: Path) -> str:
    """Which of ``FORMATS`` the suffix of ``path`` names. Raises ``InputError`` for another."""
    if (suffix := path.suffix.lower().lstrip(".")) not in FORMATS:
        raise InputError(f"{path}: got the suffix {path.suffix!r}, wanted .{', .'.join(FORMATS)}")
    return suffix


def _drawn(kind: str, size: tuple[float, float], fill: Callable[[Any], None]) -> bytes:
    """A file of ``kind`` with a figure of ``size``, in inches, that ``fill`` draws on."""
    if kind not in FORMATS:
        raise InputError(f"got the format {kind!r}, wanted one of {', '.join(FORMATS)}")
    figure_type, settings = _matplotlib()
    data = io.BytesIO()
    with settings(STYLE):
        figure = figure_type(figsize=size, layout="constrained")
        fill(figure)
        # A date would make every file another one.
        figure.savefig(data, format=kind, dpi=150, metadata={"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind))
    return data.getvalue()


def _matplotlib() -> tuple[Any, Any]:
    """``Figure``, which needs no display, and ``rc_context``."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("a plot needs matplotlib: pip install 'tvmtrain[plot]'") from error
    return Figure, rc_context


def _fill(figure: Any, panels: Sequence[Panel]) -> None:
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    top = 1.15 * max(_highest(panel) for panel in panels)
    drawn: dict[str, Any] = {}
    for ax, panel in zip(axes, panels, strict=True):
        drawn |= _bands(ax, panel.timeline, VISIBLE * top)
        _marks(ax, panel, top)
    axes[0].set_ylabel("alive (KB)")
    axes[0].set_ylim(0, top)
    axes[0].yaxis.set_major_formatter("{x:,.0f}")
    shown = {name: drawn[name] for name, _ in KINDS.values() if name in drawn}
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=min(3 * len(panels), len(shown)), frameon=False
    )


def _highest(panel: Panel) -> float:
    """KB."""
    return max(panel.memory.arena, *_totals(panel.timeline)) / 1024


def _totals(line: Timeline) -> list[int]:
    """Bytes of all kinds together, kernel by kernel."""
    return [sum(kinds) for kinds in zip(*line.kinds.values(), strict=True)]


def _bands(ax: Any, line: Timeline, visible: float) -> dict[str, Any]:
    """Bytes by kind, one on the other; those that can be seen, by name."""
    # A kernel lasts from its number to the next.
    series = {kind: [value / 1024 for value in (*line.kinds[kind], line.kinds[kind][-1])] for kind in KINDS}
    colours = [colour for _, colour in KINDS.values()]
    bands = ax.stackplot(range(len(line.features) + 1), series.values(), step="post", colors=colours, linewidth=0)
    return {KINDS[kind][0]: band for kind, band in zip(KINDS, bands, strict=True) if max(series[kind]) > visible}


def _marks(ax: Any, panel: Panel, top: float) -> None:
    """The arena's size, the kernel that makes the loss, and words."""
    line, arena, count = panel.timeline, panel.memory.arena / 1024, len(panel.timeline.features)
    ax.axhline(arena, color="black", linewidth=1)
    ax.annotate(f"arena {arena:,.0f} KB", (count, arena), (0, 3), textcoords="offset points", ha="right")
    ax.axvline(line.loss + 0.5, color="black", linewidth=1, linestyle=(0, (4, 3)))
    for words, side, place in (("forward ", "right", -2), (" loss, then backward", "left", 2)):
        ax.annotate(words, (line.loss + 0.5, top), (place, -2), textcoords="offset points", ha=side, va="top")
    ax.set_xlim(0, count)
    ax.set_xlabel("kernel of the step")
    beside = f", {max(_totals(line)) / 1024:,.0f} KB with what lies beside" if max(line.allocated) else ""
    ax.set_title(f"{panel.name}\ntrain_step: peak {max(line.arena) / 1024:,.0f} KB in the arena{beside}", fontsize="medium")


# The roofline.

NAMED = 8  # kernels whose names are listed, those that take longest


@dataclass(frozen=True)
class Point:
    """A kernel: operations per byte, GFLOP/s, and microseconds of a step, which its area shows."""

    name: str
    intensity: float
    rate: float
    us: float


def roofline(points: Sequence[Point], peak: float, bandwidth: float, title: str, kind: str) -> bytes:
    """A file of ``kind`` with ``points`` under a ceiling of ``peak`` GFLOP/s and ``bandwidth`` GB/s.

    Raises ``MissingPackageError`` without matplotlib, and ``InputError`` for another kind.
    """
    return _drawn(kind, (9, 5.5), lambda figure: _roofline(figure.subplots(), points, peak, bandwidth, title))


def _roofline(ax: Any, points: Sequence[Point], peak: float, bandwidth: float, title: str) -> None:
    ridge = peak / bandwidth
    intensities = [point.intensity for point in points]
    low, high = min([ridge / 100, *intensities]) / 2, max([ridge * 10, *intensities]) * 2
    ax.plot([low, ridge, high], [low * bandwidth, peak, peak], color="black", linewidth=1)
    ax.annotate(f"{peak:,.0f} GFLOP/s", (high, peak), (0, 3), textcoords="offset points", ha="right")
    ax.annotate(f"{bandwidth:,.1f} GB/s", (ridge / 40, ridge / 40 * bandwidth), (-9, 0), textcoords="offset points", ha="right")
    total = sum(point.us for point in points) or 1.0
    sizes = [4 + 2000 * point.us / total for point in points]
    ax.scatter(intensities, [point.rate for point in points], sizes, color=KINDS["features"][1], alpha=0.6, linewidths=0)
    slowest = sorted(points, key=lambda point: -point.us)[:NAMED]
    for number, point in enumerate(slowest, 1):
        ax.annotate(str(number), (point.intensity, point.rate), fontsize="x-small", ha="center", va="center")
    listed = "\n".join(f"{number}  {point.us:,.0f} us  {point.name[:60]}" for number, point in enumerate(slowest, 1))
    ax.annotate(listed, (1, 0), (-4, 4), "axes fraction", "offset points", fontsize="x-small", ha="right", va="bottom")
    ax.set(xscale="log", yscale="log", xlim=(low, high), xlabel="operations per byte", ylabel="GFLOP/s")
    ax.set_title(f"{title}\narea: time in a step", fontsize="medium")
