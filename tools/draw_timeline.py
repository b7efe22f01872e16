"""Draw the memory of one training step over time, for several rewrites of one network, as SVG.

    python tools/draw_timeline.py docs/results/memory-timeline.svg

The network is MONAI's DynUNet at nnU-Net's widths on one volume of 96x96x96; the figures are
estimates on fake tensors, which agree with the tracker on real ones to the byte.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from monai.networks.nets import DynUNet

from pocketize import measure, rewrite
from pocketize.memory import MemoryProfile

#: Label, passes, colour.
ROWS = (
    ("untouched", (), "#8a8a8a"),
    ("recompute, keep=conv", ("recompute:keep=conv",), "#1f77b4"),
    ("recompute, keep=block", ("recompute:keep=block",), "#2ca02c"),
    ("recompute, keep=level, and amp", ("recompute:keep=level", "amp"), "#d62728"),
)
#: Where on the axis each phase begins, in forwards; a backward takes about twice as long.
PHASES = {"forward": (0.0, 1.0), "backward": (1.0, 3.0), "optimizer": (3.0, 3.2)}
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 360, 60, 40, 20


def points(profile: MemoryProfile) -> list[tuple[float, float]]:
    """The timeline as (forwards, MiB)."""
    by_phase: dict[str, list[int]] = {phase: [] for phase in PHASES}
    for label, live in profile.timeline:
        phase = label.split()[0] if label.split() else ""
        if phase in by_phase:
            by_phase[phase].append(live)
    found = []
    for phase, (start, end) in PHASES.items():
        lives = by_phase[phase]
        found += [
            (start + (end - start) * (i + 0.5) / len(lives), live / 2**20)
            for i, live in enumerate(lives)
        ]
    return found


def draw(profiles: list[tuple[str, str, MemoryProfile]]) -> str:
    """The picture."""
    most = max(profile.peak for _, _, profile in profiles) / 2**20
    last = PHASES["optimizer"][1]

    def place(x: float, y: float) -> str:
        return (
            f"{LEFT + x / last * (WIDTH - LEFT - 10):.1f},"
            f"{HEIGHT - BOTTOM - y / most * (HEIGHT - BOTTOM - TOP):.1f}"
        )

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for mark in range(0, int(most) + 1, 500):
        x, y = place(0, mark).split(",")
        lines.append(f'<line x1="{x}" x2="{WIDTH - 10}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y}" text-anchor="end" dy="4">{mark}</text>')
    lines.append('<text x="14" y="14">MiB</text>')
    for phase, (start, _) in PHASES.items():
        x, y = place(start, 0).split(",")
        lines.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{y}" stroke="#bbb"/>')
        shown = "" if phase == "optimizer" else phase
        lines.append(f'<text x="{x}" y="{HEIGHT - 22}" dx="4">{shown}</text>')
    for index, (label, colour, profile) in enumerate(profiles):
        path = " ".join(place(x, y) for x, y in points(profile))
        lines.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        text = f"{label}: {profile.peak / 2**20:.0f} MiB"
        lines.append(
            f'<text x="{WIDTH - 280}" y="{TOP + 14 + 16 * index}" fill="{colour}">{text}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, help="the SVG to write")
    path = parser.parse_args().path
    torch.manual_seed(0)
    filters = (32, 64, 128, 256)
    model = DynUNet(3, 1, 2, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=filters)
    x = torch.zeros(1, 1, 96, 96, 96)
    profiles = []
    for label, passes, colour in ROWS:
        made = rewrite(model, *passes, inputs=x) if passes else model
        profiles.append((label, colour, measure(made, x, estimate=True)))
    path.write_text(draw(profiles), encoding="utf-8")


if __name__ == "__main__":
    main()
