"""The font of the formulas: STIX Two Math, cut down to the characters that the pages use.

Why: a font for mathematics has a table that says where subscripts stand and how roots grow. Without
one (Android has none) a browser guesses, and the subscripts of one line stand at two heights. The
whole font is 1.5 MB; cut down it is less than 100 kB. It comes with the package ziamath, under the
SIL Open Font License 1.1 (copyright 2001-2020 The STIX Fonts Project Authors).
"""

import html
import io
import re
from importlib import resources

from fontTools import subset
from fontTools.ttLib import TTFont

ITALIC_LATIN = range(0x1D434, 0x1D468)  # a browser writes a variable x with these
ITALIC_GREEK = range(0x1D6FC, 0x1D71C)
ALWAYS = {0x210E, 0x221A, *range(0x20, 0x7F), *ITALIC_LATIN, *ITALIC_GREEK}  # ℎ, √, ASCII


def characters_of(page):
    """The code points in the formulas of a page."""
    found = set()
    for formula in re.findall(r"<math.*?</math>", page, re.DOTALL):
        text = html.unescape(re.sub(r"<[^>]+>", "", formula))
        found.update(ord(character) for character in text)
    return found


def small_font(characters):
    """The font with these characters alone, as the bytes of a .woff file."""
    whole = resources.files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"
    options = subset.Options(layout_features=["*"])  # its small letters for subscripts, too
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=ALWAYS | characters)
    with whole.open("rb") as file:
        font = TTFont(file)
        subsetter.subset(font)
        font.flavor = "woff"
        written = io.BytesIO()
        font.save(written)
    return written.getvalue()
