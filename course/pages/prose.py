"""Markdown -> HTML: formulas as MathML, links to pages of this site, wide things in boxes.

Why MathML: browsers draw it without a script, a font or a network, and a screen reader speaks it.
The Markdown is read by nbconvert's reader, the one that notebooks have. `course/build` calls this.
"""

import html
import re

from latex2mathml.converter import convert as latex_to_mathml
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_by_name, get_lexer_for_filename
from pygments.util import ClassNotFound

def box(name, content):
    """What may be wider than a phone scrolls in a box, and the text stays where it is."""
    return f'<div class="{name}">{content}</div>\n'


def code_block(code, language="python"):
    """Code in colours, in a box."""
    try:
        lexer = get_lexer_by_name(language or "text")
    except ClassNotFound:
        lexer = TextLexer()
    formatter = HtmlFormatter(nowrap=True)
    return box("code", f"<pre><code>{highlight(code, lexer, formatter)}</code></pre>")


def numbered_lines(code, name):
    """A whole file in colours; every line has a number, and an address: #line-12."""
    try:
        lexer = get_lexer_for_filename(name)
    except ClassNotFound:
        lexer = get_lexer_by_name("bash") if code.startswith("#!") else TextLexer()
    formatter = HtmlFormatter(linenos="table", lineanchors="line", anchorlinenos=True)
    return box("source", highlight(code, lexer, formatter))


def formula(latex, display):
    """LaTeX -> MathML. A word in upright letters is one name, not a product of its letters."""
    mathml = latex_to_mathml(latex.strip(), display="block" if display else "inline")
    letters = r'<mrow>((?:<mi mathvariant="normal">\w</mi>)+)</mrow>'
    return re.sub(letters, lambda word: f"<mi>{re.sub('<[^>]+>', '', word[1])}</mi>", mathml)


def has_sentences(table):
    """Whether a cell of a table is longer than a phone is wide: then its rows are stacked there."""
    cells = re.findall(r"<td[^>]*>(.*?)</td>", table, re.DOTALL)
    return any(len(re.sub(r"<[^>]+>", "", cell)) > 40 for cell in cells)


def labelled(table):
    """A table in which every cell knows the head of its column, for where rows are stacked."""
    heads = [re.sub(r"<[^>]+>", "", head) for head in re.findall(r"<th\b[^>]*>(.*?)</th>", table)]

    def label_row(row):
        names = iter(heads)
        return re.sub(r"<td\b", lambda _: f'<td data-head="{next(names, "")}"', row[0])

    return re.sub(r"<tr>.*?</tr>", label_row, table, flags=re.DOTALL)


def slug(heading, taken):
    """A heading's name in an address, as GitHub makes it; with a number where it is taken."""
    text = re.sub(r"<[^>]+>", "", heading).strip().lower()
    name = re.sub(r"[^\w\- ]", "", html.unescape(text)).replace(" ", "-")
    number = taken[name] = taken.get(name, -1) + 1
    return f"{name}-{number}" if number else name


class Renderer(IPythonRenderer):
    """Markdown of one page -> HTML. `headings` are then its sections: [(level, name, text)].

    address(target): the place on this site of a link's target, which is a path or an URL; None if
    it leads nowhere. `mentioned(text)`: the same for code that may be the name of a file.
    """

    def __init__(self, address, mentioned=lambda text: None):
        super().__init__(escape=False)
        self.address = address
        self.mentioned = mentioned
        self.headings = []
        self.taken = {}

    def heading(self, text, level, **attrs):
        name = slug(text, self.taken)
        self.headings.append((level, name, re.sub(r"</?a\b[^>]*>", "", text)))
        sign = f'<a class="anchor" href="#{name}" aria-label="address of this section">#</a>'
        return f'<h{level} id="{name}">{text} {sign if level > 1 else ""}</h{level}>\n'

    def block_math(self, body):
        return box("formula", formula(body, display=True))

    def inline_math(self, body):
        return formula(body, display=False)

    def block_code(self, code, info=None):
        return code_block(code, (info or "text").split()[0])

    def codespan(self, text):
        shown = f"<code>{html.escape(html.unescape(text))}</code>"
        place = self.mentioned(text)
        return f'<a href="{place}">{shown}</a>' if place else shown

    def link(self, text, url, title=None):
        place = self.address(url)
        text = re.sub(r"</?a\b[^>]*>", "", text)  # of a file that is mentioned in the link's text
        return f'<a href="{html.escape(place)}">{text}</a>' if place else text

    def image(self, text, url, title=None):
        place = html.escape(self.address(url) or url)
        picture = f'<img src="{place}" alt="{html.escape(text)}" loading="lazy">'
        return f'<a class="figure" href="{place}">{picture}</a>'

    def table(self, text):
        name = "table sentences" if has_sentences(text) else "table"
        return box(name, f"<table>{labelled(text)}</table>")

    def paragraph(self, text):
        whole = text.strip()
        return f"{whole}\n" if whole.startswith('<div class="formula"') else f"<p>{text}</p>\n"


def to_html(markdown, renderer):
    """Markdown -> HTML."""
    return MarkdownWithMath(renderer=renderer).render(markdown)
