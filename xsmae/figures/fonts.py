"""Draws text of any script: finds fonts for it, and shows codes if there is none.

matplotlib draws each character in the first font of a list that has it. If none has it,
matplotlib draws an empty box and warns. Its own font, DejaVu Sans, has no Chinese,
Japanese, Korean or Devanagari.
"""

from __future__ import annotations

import functools

from matplotlib.font_manager import fontManager, get_font

BASE = "DejaVu Sans"  # comes with matplotlib


def drawable(text: str) -> str:
    """The text, with codes such as `\\u68ee` for characters in no installed font."""
    fonts = families(text)
    return "".join(
        c
        if c == "\n" or any(ord(c) in _characters(font) for font in fonts)
        else c.encode("unicode_escape").decode()
        for c in text
    )


def families(text: str) -> list[str]:
    """The font families that draw the text, `BASE` first."""
    missing = {c for c in text if ord(c) not in _characters(BASE)}
    return [BASE, *_others(frozenset(missing - {"\n"}))]


@functools.lru_cache(maxsize=1024)
def _others(missing: frozenset[str]) -> tuple[str, ...]:
    """Installed families, in order of name, that together have the characters."""
    left, found = {ord(c) for c in missing}, []
    for name in sorted({font.name for font in fontManager.ttflist}):
        if not left:
            break
        # Last Resort has only placeholders.
        if not name.startswith("Last Resort") and left & _characters(name):
            found.append(name)
            left -= _characters(name)
    return tuple(found)


@functools.cache
def _characters(family: str) -> frozenset[int]:
    """The code points that all regular fonts of a family have."""
    found = [
        _of_file(font.fname)
        for font in fontManager.ttflist
        if font.name == family
        and (font.style, font.weight) in (("normal", 400), ("normal", "regular"))
    ]
    return frozenset.intersection(*found) if found else frozenset()


def _of_file(path: str) -> frozenset[int]:
    try:
        return frozenset(get_font(path).get_charmap())
    except (RuntimeError, OSError):  # removed since matplotlib listed it, or damaged
        return frozenset()
