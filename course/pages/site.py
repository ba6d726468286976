"""The site as a whole: which file has which page, where links lead, the frame around every page.

Why links are followed: a document says "see rebased/scan.py", and who reads it on a phone wants to
see it. So a file of the repository gets a page as soon as another page links to it or names it, and
all links work from a folder on a disk, without a server and without the repository's address.
"""

import os
import re
from datetime import date
from pathlib import Path, PurePosixPath

import jinja2

from course.pages import prose
from rebased import LESSONS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INTERACTIVE = Path("course/interactive.html")
DOCUMENTS = [  # in the order of the menu; those that are there, and whatever else course/ has
    "course/README.md",
    "course/plan.md",
    "course/primer.md",
    "course/glossary.md",
    "course/family.md",
    "course/exercises/*.md",
    "course/*.md",
    "README.md",
    "results/*.md",
    "CONTRIBUTING.md",
    "ERRATA.md",
]
SHOWN_AS_TEXT = {".py", ".sh", ".txt", ".toml", ".yml", ".yaml", ""}


def page_of(source):
    """The page of a file or folder of the repository; both are relative paths."""
    path = PurePosixPath(source.as_posix())
    if (ROOT / source).is_dir():
        return path / "index.html"
    if path.stem in LESSONS.values() or path.suffix == ".md":
        return path.with_suffix(".html")
    if path.suffix in SHOWN_AS_TEXT:
        return path.with_name(path.name + ".html")
    return path  # a picture, rows of results: as it is


def relative(target, page):
    """The address of one page as another one writes it."""
    return os.path.relpath(target, page.parent).replace(os.sep, "/")


def documents():
    """The Markdown documents that are there, each once, in the order of the menu."""
    found = {}
    for pattern in DOCUMENTS:
        for file in sorted(ROOT.glob(pattern)):
            found[file.relative_to(ROOT)] = None
    return list(found)


def title_of(document):
    """The first heading of a Markdown document; its name if it has none."""
    first = re.search(r"^# +(.+)$", (ROOT / document).read_text(encoding="utf-8"), re.M)
    return first[1].replace("`", "").strip() if first else document.name


def menu_items():
    """[(what is shown, page, what it is)] for the line above every page."""
    items = []
    for name in LESSONS.values():
        items.append((name[:2], f"{name}.html", name[3:].replace("_", " ")))
    items.append(("Interactive", str(page_of(INTERACTIVE)), "move the floor, γ and β"))
    for document in documents():
        if document.parts[0] == "course":
            name = document.parent.name if document.stem == "README" else document.stem
            items.append((name.capitalize(), str(page_of(document)), title_of(document)))
    return items


class Site:
    """A folder that is being filled, and the files that still wait for their page."""

    def __init__(self, out, repository):
        self.out = out
        self.repository = repository  # "owner/name" on GitHub; "" if it is not known
        self.waiting = []
        self.seen = set()
        self.dangling = []
        loader = jinja2.FileSystemLoader(HERE)
        self.templates = jinja2.Environment(
            loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
        )

    def want(self, source):
        """See to it that a file of the repository gets its page, and return the page's place."""
        if source not in self.seen:
            self.seen.add(source)
            self.waiting.append(source)
        return page_of(source)

    def address(self, source, target):
        """Where the link `target` in the file `source` leads on this site; None if nowhere."""
        if re.match(r"[a-z]+:|#", target):
            return target
        path, _, section = target.partition("#")
        file = Path(os.path.normpath((ROOT / source).parent / path))
        if not (file.is_relative_to(ROOT) and file.exists()):
            self.dangling.append(f"{source} links to {target}")
            return None
        place = relative(self.want(file.relative_to(ROOT)), page_of(source))
        return f"{place}#{section}" if section else place

    def mentioned(self, source, text):
        """The page of a file that is named, from the repository's root or from the same folder."""
        if re.fullmatch(r"\w[\w./-]*\.(py|md|sh|txt|jsonl)", text):
            for file in (Path(text), source.parent / text):
                if (ROOT / file).is_file():
                    return relative(self.want(file), page_of(source))
        return None

    def renderer(self, source):
        """What reads the Markdown of a file."""

        def address(target):
            return self.address(source, target)

        def mentioned(text):
            return self.mentioned(source, text)

        return prose.Renderer(address, mentioned)

    def write(self, page, content):
        """Write a file of the site: text or bytes."""
        path = self.out / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def menu(self, page):
        """The line of links above a page."""
        template = self.templates.get_template("menu.html.j2")
        root = relative(PurePosixPath("."), page)
        return template.render(root=root, page=str(page), items=menu_items())

    def write_page(self, page, title, template="page.html.j2", **parts):
        """Write a page in the site's frame."""
        root = relative(PurePosixPath("."), page)
        frame = {"title": title, "root": root, "menu": self.menu(page)}
        text = self.templates.get_template(template).render(
            frame, built=date.today().isoformat(), **parts
        )
        self.write(page, text)
