#!/usr/bin/env python3
"""Draws the pictures of the README from what is kept: side-by-side.json and cast.txt. `draw.py --check` writes nothing and fails
where a picture is not what would be drawn. Needs nothing but Python."""

import html
import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FONT = "ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def figure(value):
    """Two digits that say something."""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def side_by_side(measured):
    """Bars of tokens a second, on a logarithmic scale, because they span two orders of magnitude."""
    rows = sorted(measured["rows"], key=lambda row: -row["ms"])
    width, label, top, step = 840, 330, 66, 30
    height = top + step * len(rows) + 42
    least, most = 0.1, 20.0
    right = width - 150

    def x(rate):
        return label + (right - label) * math.log(rate / least) / math.log(most / least)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="{FONT}" role="img">',
        "<title>Tokens a second of a model of 7 billion weights on two cores, flashlm beside llama.cpp</title>",
        "<style>.t{fill:#1f2328}.s{fill:#59636e}.g{stroke:#d1d9e0}.a{fill:#0b6e4f}.b{fill:#9aa4af}"
        "@media (prefers-color-scheme:dark){.t{fill:#f0f6fc}.s{fill:#9198a1}.g{stroke:#3d444d}.a{fill:#3fb68b}.b{fill:#656c76}}"
        "</style>",
        '<text class="t" x="0" y="20" font-size="17" font-weight="600">A model of 7 billion weights, 13 GB in 16 bits, '
        "on two cores</text>",
        '<text class="s" x="0" y="42" font-size="13">tokens a second, logarithmic; memory of the whole process</text>',
    ]
    for tick in (0.1, 0.3, 1, 3, 10):
        out.append(
            f'<line class="g" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top - 8}" y2="{height - 30}"/>'
            f'<text class="s" x="{x(tick):.1f}" y="{height - 14}" font-size="12" text-anchor="middle">{tick:g}</text>'
        )
    for at, row in enumerate(rows):
        y = top + step * at
        rate = 1000 / row["ms"]
        ours = row["system"] == "flashlm"
        weight = ' font-weight="600"' if row.get("headline") else ""
        name = html.escape(f'{row["system"]}: {row["weights"]}')
        out.append(
            f'<text class="t" x="{label - 10}" y="{y + 15}" font-size="13" text-anchor="end"{weight}>{name}</text>'
            f'<rect class="{"a" if ours else "b"}" x="{label}" y="{y + 2}" width="{x(rate) - label:.1f}" height="18" rx="2"/>'
            f'<text class="t" x="{x(rate) + 8:.1f}" y="{y + 15}" font-size="13"{weight}>{figure(rate)}'
            f'<tspan class="s" font-weight="400"> in {row["memory_gb"]:g} GB</tspan></text>'
        )
    return "\n".join(out) + "\n</svg>\n"


def cast(text):
    """A terminal: lines that begin with `$ ` were typed, and lines come one after the other."""
    lines = text.rstrip("\n").split("\n")
    columns = max(80, max(map(len, lines)))
    size, line = 13, 18
    width, height = int(columns * size * 0.602) + 36, line * len(lines) + 52
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="{MONO}" font-size="{size}" role="img">',
        "<title>flashlm in a terminal</title>",
        "<style>.l{fill:#d6dde4;animation:in .2s both}.c{fill:#7ee2b8;font-weight:600}"
        "@keyframes in{from{opacity:0}to{opacity:1}}"
        "@media (prefers-reduced-motion:reduce){.l{animation:none}}</style>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#15191e"/>',
        "".join(f'<circle cx="{20 + 18 * at}" cy="18" r="5" fill="#3a424c"/>' for at in range(3)),
    ]
    delay = 0.0
    for at, words in enumerate(lines):
        typed = words.startswith("$ ")
        delay += 0.9 if typed else 0.12
        kind = "l c" if typed else "l"
        out.append(
            f'<text class="{kind}" style="animation-delay:{delay:.2f}s" x="18" y="{46 + line * at}" '
            f'xml:space="preserve">{html.escape(words)}</text>'
        )
    return "\n".join(out) + "\n</svg>\n"


def main():
    measured = json.loads((HERE.parent / "measurements/side-by-side.json").read_text())
    drawn = {
        "side-by-side.svg": side_by_side(measured),
        "cast.svg": cast((HERE / "cast.txt").read_text()),
    }
    if "--check" in sys.argv[1:]:
        stale = [name for name, text in drawn.items() if (HERE / name).read_text() != text]
        if stale:
            sys.exit(f"{', '.join(stale)}: not what docs/images/draw.py draws; run it")
        return
    for name, text in drawn.items():
        (HERE / name).write_text(text)


main()
