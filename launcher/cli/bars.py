"""Bars of blocks on a scale, for tables of text; of plain ASCII where the terminal has nothing else. No colour, no cursor movement."""

from __future__ import annotations

EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(value: float, limit: float, full: float, width: int, *, blocks: bool) -> str:
    """``value`` as a bar of ``width`` cells that stand for ``full``; dots up to ``limit``, lighter cells beyond it.

    Anything above zero is visible. ``blocks``: whether the terminal can draw them.
    """
    assert full > 0 and value >= 0 and limit >= 0
    end = min(round(value / full * width * 8), width * 8)
    if value > 0:
        end = max(end, 1)
    border = round(min(limit, full) / full * width)
    # What fits must not look too long, nor what is a little too much as if it fitted.
    end = min(end, border * 8) if value <= limit else max(end, border * 8 + 1)
    return "".join(_cell(end - 8 * cell, cell < border, blocks) for cell in range(width))


def _cell(eighths: int, inside: bool, blocks: bool) -> str:
    """One cell, of which so many eighths are filled (any number, cut to 0…8)."""
    if eighths <= 0:
        return ("·" if blocks else ".") if inside else " "
    if not inside:
        return "▒" if blocks else "!"
    if not blocks:
        return "#"
    return "█" if eighths >= 8 else EIGHTHS[eighths]
