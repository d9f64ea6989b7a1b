"""Timelines as pictures: of characters for a terminal, as SVG for a page."""

from __future__ import annotations

from collections.abc import Iterator

from moebius.parallel.ring.timeline import Event, Timeline

HUES = 10
"""micro-batches that can be told apart; then colours and digits begin again"""
ROW, GAP, LEFT, WIDTH = 28, 8, 48, 1152
"""pixels: height of a process, space between two, room for its name, length of the time"""


def characters(timeline: Timeline, width: int) -> Iterator[str]:
    """A line per process: digits are forward passes of a micro-batch, letters backward passes (`A`
    of micro-batch 0), dots waiting."""
    scale = width / timeline.makespan if timeline.makespan else 0.0
    for rank in range(timeline.num_ranks):
        line = ["."] * width
        for event in timeline.of(rank):
            digit = event.micro_batch % HUES
            letter = str(digit) if event.is_forward else chr(ord("A") + digit)
            for column in range(round(event.start * scale), round(event.end * scale)):
                line[column] = letter
        yield f"rank {rank} |{''.join(line)}|"


def svg(timeline: Timeline) -> str:
    """A bar per process. A colour is a micro-batch, pale are forward passes; homes have a frame."""
    scale = WIDTH / timeline.makespan if timeline.makespan else 0.0
    height = timeline.num_ranks * (ROW + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + GAP}" height="{height}" '
        'font-family="sans-serif" font-size="12">'
    ]
    for rank in range(timeline.num_ranks):
        top = GAP + rank * (ROW + GAP)
        parts.append(f'<text x="2" y="{top + 18}">rank {rank}</text>')
        parts.append(f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{ROW}" fill="#eeeeee"/>')
        parts += [_bar(timeline, event, top, scale) for event in timeline.of(rank)]
    return "\n".join((*parts, "</svg>", ""))


def _bar(timeline: Timeline, event: Event, top: int, scale: float) -> str:
    hue = 360 * (event.micro_batch % HUES) // HUES
    lightness = 78 if event.is_forward else 52
    is_home = timeline.ways[event.micro_batch][event.stop].is_home
    frame = ' stroke="black" stroke-width="0.8"' if is_home else ""
    left, width = LEFT + event.start * scale, (event.end - event.start) * scale
    return (
        f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{ROW}" '
        f'fill="hsl({hue},65%,{lightness}%)"{frame}/>'
    )
