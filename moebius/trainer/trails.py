"""Where the tokens of some rows went: how many passes and experts each of them got."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.model.decoder import Decoder
from moebius.model.ledger import Ledger
from moebius.trainer.metrics import routers_of

ROWS = 4
"""of a step that are shown, or as many as the first process has"""
SQUARES = ("⬜", "🟦", "🟩", "🟨", "🟧", "🟥")
"""none to most"""
COLOURS = ("#f7f7f7", "#c6dbef", "#6baed6", "#2171b5", "#08306b")
"""backgrounds, none to most"""
PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/2 monospace; max-width: 100ch; margin: 2em auto; }}
h2 {{ font: bold 15px sans-serif; margin-top: 2em; }}
p {{ white-space: pre-wrap; }}
</style>
<h1 style="font: bold 18px sans-serif">{title}</h1>
{body}
"""


@dataclass(frozen=True)
class Trail:
    """A count for each token of some rows."""

    name: str
    """as in `tokens/<name>`"""
    meaning: str
    count_BS: Tensor
    """int64"""

    @property
    def most(self) -> int:
        """The highest count."""
        return int(self.count_BS.max())


def trails(decoder: Decoder, ledger: Ledger, num_rows: int) -> list[Trail]:
    """Of the first rows whose decisions a ledger keeps: experts that compute, where there are
    routers over width, as chosen before capacities; and passes of routed loops, where there are
    such."""
    routers = routers_of(decoder)
    experts, passes = [], []
    for site, ids_BSK in ledger.routings.items():
        ids_BSK = ids_BSK[:num_rows].cpu()
        if site in routers:
            computing_BSK = (ids_BSK >= 0) & (ids_BSK < routers[site].pool.num_computing)
            experts.append(computing_BSK.sum(dim=2))
        elif site.module.startswith("depth."):
            passes.append((ids_BSK[..., 0] >= 0).long())
    found = []
    if experts:
        meaning = "chosen experts that compute, over all layers and passes"
        found.append(Trail("experts", meaning, torch.stack(experts).sum(dim=0)))
    if passes:
        found.append(Trail("passes", "passes of routed loops", torch.stack(passes).sum(dim=0)))
    return found


def class_of(text: str, before: str) -> str:
    """What kind of token a text is after another one: the beginning of a `word` or a further `part`
    of one, `digits`, `space`, or `other` signs."""
    if not text.strip():
        return "space"
    if any(character.isdigit() for character in text):
        return "digits"
    if any(character.isalpha() for character in text):
        return "part" if before[-1:].isalnum() and text[0].isalnum() else "word"
    return "other"


def means_by_class(trail: Trail, texts: Sequence[str]) -> dict[str, float]:
    """The mean count of the tokens of each class; `texts` are of all rows in order."""
    counts: dict[str, list[int]] = {}
    length = trail.count_BS.shape[1]
    for number, count in enumerate(trail.count_BS.flatten().tolist()):
        before = texts[number - 1] if number % length else ""
        counts.setdefault(class_of(texts[number], before), []).append(count)
    return {kind: sum(of_kind) / len(of_kind) for kind, of_kind in sorted(counts.items())}


def markdown(trail: Trail, texts: Sequence[str]) -> str:
    """The first row, a coloured square in front of each token."""
    most = max(trail.most, 1)
    width = -(-(most + 1) // len(SQUARES))  # counts that share a colour
    lows = range(0, most + 1, width)
    bounds = [f"{low} to {low + width - 1}" if width > 1 else str(low) for low in lows]
    legend = " · ".join(f"{square} {bound}" for square, bound in zip(SQUARES, bounds, strict=False))
    tokens = [
        f"{SQUARES[count // width]}`{visible(text)}`"
        for text, count in zip(texts, trail.count_BS[0].tolist(), strict=False)
    ]
    return f"{trail.meaning}: {legend}\n\n{' '.join(tokens)}"


def visible(text: str) -> str:
    """A token as a line of Markdown's code can have it."""
    for character, sign in (("\n", "⏎"), ("\r", "␍"), ("\t", "⇥"), ("`", "ˋ"), ("|", "¦")):
        text = text.replace(character, sign)
    return text.replace(" ", "␣") or "∅"


def page(title: str, found: Sequence[Trail], texts: Sequence[str]) -> str:
    """A page of HTML of all rows, coloured once for each trail."""
    parts = []
    for trail in found:
        most = max(trail.most, 1)
        parts.append(f"<h2>{trail.meaning}: {_legend(most)}</h2>")
        of_tokens = iter(texts)
        for counts in trail.count_BS.tolist():
            spans = (_span(next(of_tokens), count, most) for count in counts)
            parts.append(f"<p>{''.join(spans)}</p>")
    return PAGE.format(title=html.escape(title), body="\n".join(parts))


def _legend(most: int) -> str:
    shown = sorted({round(most * part / 4) for part in range(5)})
    return " ".join(_span(f" {count} ", count, most) for count in shown)


def _span(text: str, count: int, most: int) -> str:
    number = round(count / most * (len(COLOURS) - 1))
    colour = "#fff" if number > 2 else "#000"
    style = f"background:{COLOURS[number]};color:{colour}"
    return f'<span style="{style}" title="{count}">{html.escape(text)}</span>'
