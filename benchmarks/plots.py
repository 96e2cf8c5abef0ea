"""Plots of raw results, each as SVG and PNG for light and for dark pages. Needs matplotlib (`agentstate[bench]`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: E402

from agentstate.benchmarks.study import SHARES  # noqa: E402

Rows = Sequence[dict[str, Any]]

LABELS = {
    "recompute": "recomputed",
    "memory_hit": "memory hit (the floor)",
    "restore_cold": "restored, cold",
    "restore_host_prefetch": "restored after host prefetch",
    "restore_device_prefetch": "restored after device prefetch",
    "api_resume": "resumed over the API",
}
"""The names of variants; any other is a peer's."""
PEERS = {
    "sglang": "SGLang's radix cache",
    "file_linker": "file linker",
    "hicache": "HiCache",
    "lmcache": "LMCache",
}
_AFTER_RESTART = {
    "restore_first_after_restart": "restored, the first request after a restart",
    "memory_hit_after_restart": "memory hit after that restart",
}
_OF_PEERS = {
    "recompute": "recomputed",
    "memory_hit": "memory hit",
    "warm": "warm",
    "cold": "cold",
    "restart": "first after a restart, warm",
    "restart_cold": "first after a restart, cold",
    "flush": "recomputed after a flush",
}

# Distinct for the colour-blind and with enough contrast on white and on black (Okabe and Ito's, without its yellow).
_COLOURS = ("#D55E00", "#009E73", "#0072B2", "#56B4E9", "#CC79A7", "#E69F00", "#8C6BB1", "#7F7F7F", "#A6761D")
_MARKERS = "os^vDPX*p"
_THEMES = {"light": ("#1f2328", "#d0d7de"), "dark": ("#e6edf3", "#3d444d")}


def label(variant: str) -> str:
    if (known := LABELS.get(variant) or _AFTER_RESTART.get(variant)) is not None:
        return known
    if variant == "sglang_restart":  # nothing is restored
        return f"{PEERS['sglang']}: recomputed after a restart"
    for ending in sorted(_OF_PEERS, key=len, reverse=True):
        if variant.endswith(f"_{ending}"):
            peer = variant.removesuffix(f"_{ending}")
            return f"{PEERS.get(peer, peer)}: {_OF_PEERS[ending]}"
    return PEERS.get(variant, variant)


def ttft(rows: Rows, model: str, directory: Path, name: str) -> None:
    """Time to first token against context, both logarithmic; the memory hit, which is the floor, is dashed."""

    def draw(axes: Axes) -> None:
        for index, (variant, points) in enumerate(_series(rows, "ttft_s")):
            style = "--" if variant == "memory_hit" else "-"
            axes.plot(*points, style, label=label(variant), **_look(index))
        axes.set_yscale("log")
        axes.set_ylabel("time to first token, s")
        _contexts(axes, rows)

    _save(draw, f"{model}: time to first token", directory, name)


def ratio(rows: Rows, model: str, directory: Path, name: str) -> None:
    """How many times sooner than recomputing each variant answers, against context."""
    recomputed = {row["tokens"]: row["ttft_s"] for row in rows if row["variant"] == "recompute"}
    compared = [
        {**row, "ratio": recomputed[row["tokens"]] / row["ttft_s"]}
        for row in rows
        if row["variant"] != "recompute" and row["tokens"] in recomputed
    ]

    def draw(axes: Axes) -> None:
        for index, (variant, points) in enumerate(_series(compared, "ratio")):
            axes.plot(*points, "--" if variant == "memory_hit" else "-", label=label(variant), **_look(index + 1))
        axes.set_yscale("log")
        axes.set_ylabel("recomputed ÷ this")
        _contexts(axes, rows)

    _save(draw, f"{model}: how many times sooner", directory, name)


def bandwidth(rows: Rows, model: str, directory: Path, name: str) -> None:
    """The share of the device's direct-read limit that each restore reached, against context."""

    def draw(axes: Axes) -> None:
        for index, (variant, points) in enumerate(_series(rows, "device_share")):
            axes.plot(*points, "-", label=label(variant), **_look(index))
        axes.axhline(1.0, linestyle=":", color="#7F7F7F")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("share of the device's direct-read limit")
        _contexts(axes, rows)

    _save(draw, f"{model}: bandwidth", directory, name)


def distribution(rows: Rows, title: str, directory: Path, name: str) -> None:
    """The share of a replay's requests that had their first token within a time, a line a variant."""

    def draw(axes: Axes) -> None:
        for index, row in enumerate(rows):
            colour = _COLOURS[index % len(_COLOURS)]
            axes.plot(row["ttft_quantiles_s"], SHARES, label=label(row["variant"]), color=colour, linewidth=1.8)
        axes.set_xscale("log")
        axes.set_xlabel("time to first token, s")
        axes.set_ylabel("share of requests")
        axes.set_ylim(0, 1)

    _save(draw, title, directory, name)


def _series(rows: Rows, figure: str) -> Iterator[tuple[str, tuple[list[float], list[float]]]]:
    """Each variant that has the figure, with its contexts and values by context."""
    for variant in dict.fromkeys(row["variant"] for row in rows):
        points = sorted((r["tokens"], r[figure]) for r in rows if r["variant"] == variant and r.get(figure) is not None)
        if points:
            yield variant, ([tokens for tokens, _ in points], [value for _, value in points])


def _look(index: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 5,
        "linewidth": 1.8,
    }


def _contexts(axes: Axes, rows: Rows) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("context, tokens")
    axes.set_xticks(sorted({row["tokens"] for row in rows}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _save(draw: Callable[[Axes], None], title: str, directory: Path, name: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for theme in _THEMES:
        with _theme(theme):
            figure, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
            draw(axes)
            axes.set_title(title, fontsize=11)
            axes.grid(True, which="major", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(fontsize=8, frameon=False)
            # Without a date, equal results give equal files.
            figure.savefig(directory / f"{name}-{theme}.svg", transparent=True, metadata={"Date": None})
            figure.savefig(directory / f"{name}-{theme}.png", transparent=True, dpi=144)
            pyplot.close(figure)


@contextmanager
def _theme(theme: str) -> Iterator[None]:
    text, grid = _THEMES[theme]
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {name: text for name in names}
    with pyplot.rc_context({**settings, "grid.color": grid, "font.size": 9.5, "svg.hashsalt": "agentstate"}):
        yield
