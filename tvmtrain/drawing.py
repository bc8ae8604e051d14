"""Live bytes over a training step as a picture: SVG, PNG or whatever else matplotlib writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvmtrain.costs import Memory
from tvmtrain.errors import InputError, MissingPackageError, StorageError

# Kind of ``costs.Timeline``, from the bottom up: its name in the legend and its colour (Okabe and Ito's, for all eyes).
KINDS = {
    "features": ("saved features", "#0072b2"),
    "masks": ("saved masks", "#56b4e9"),
    "gradients": ("gradients of weights", "#d55e00"),
    "temporary": ("temporary", "#e69f00"),
    "workspace": ("workspace", "#009e73"),
    "results": ("results", "#cc79a7"),
    "allocated": ("beside the arena: workspace that a kernel allocates, at most", "#cccccc"),
}


@dataclass(frozen=True)
class Panel:
    """One artifact's training step and its name."""

    name: str
    memory: Memory


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Write the picture of ``panels``, side by side on one scale; the suffix of ``path`` says the format (.svg, .png, .pdf).

    Raises ``MissingPackageError`` without matplotlib, ``InputError`` for a suffix that it does not know, ``StorageError``.
    """
    figure_type, settings = _matplotlib()
    with settings({"svg.fonttype": "none", "svg.hashsalt": "tvmtrain", "font.size": 9}):
        figure = figure_type(figsize=(1.5 + 5.5 * len(panels), 4.6), layout="constrained")
        if path.suffix[1:].lower() not in (known := figure.canvas.get_supported_filetypes()):
            raise InputError(
                f"{path}: got the suffix {path.suffix!r}, wanted one of {', '.join(f'.{s}' for s in sorted(known))}"
            )
        _fill(figure, panels)
        try:
            # A date would make every file another one.
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error


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
    drawn: dict[str, Any] = {}
    for ax, panel in zip(axes, panels, strict=True):
        drawn |= _stack(ax, panel)
    axes[0].set_ylabel("live bytes (KB)")
    axes[0].set_ylim(0, 1.12 * max(_top(panel) for panel in panels))
    shown = {label: drawn[label] for label, _ in KINDS.values() if label in drawn}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(4, len(shown)), frameon=False)


def _top(panel: Panel) -> float:
    """The highest thing in a panel, in KB."""
    step, line = panel.memory.entries["train_step"], panel.memory.timeline
    totals = (sum(kinds) for kinds in zip(*line.kinds.values(), strict=True))
    return max(step.arena, *totals) / 1024


def _stack(ax: Any, panel: Panel) -> dict[str, Any]:
    """The bands of one panel and its marks; what the legend needs, by label."""
    step, line = panel.memory.entries["train_step"], panel.memory.timeline
    count = len(line.features)
    steps = range(count + 1)  # a kernel lasts from its number to the next
    kinds = [kind for kind in KINDS if any(line.kinds[kind])]
    series = [[value / 1024 for value in (*line.kinds[kind], line.kinds[kind][-1])] for kind in kinds]
    colours = [KINDS[kind][1] for kind in kinds]
    bands = ax.stackplot(steps, series, step="post", colors=colours, linewidth=0)
    ax.axhline(step.arena / 1024, color="black", linewidth=1)
    ax.annotate(
        f"arena {step.arena / 1024:,.0f} KB", (count, step.arena / 1024), (0, 3), textcoords="offset points", ha="right"
    )
    ax.axvline(line.loss, color="black", linewidth=1, linestyle="--")
    ax.set_xlim(0, count)
    ax.set_xlabel("kernel of the step")
    ax.set_title(f"{panel.name}: train_step, peak {max(line.arena) / 1024:,.0f} KB")
    return {KINDS[kind][0]: band for kind, band in zip(kinds, bands, strict=True)}
