"""course/build: the five lessons and the Markdown documents -> notebooks and pages in site/.

Why a site of plain files: it opens from a folder, from a memory stick and from GitHub Pages alike.
There is one page for each lesson (prose, code, output and figure where they belong), one for each
Markdown document, one for each file that these mention, and the interactive page. Formulas are
MathML, so nothing is fetched from elsewhere and nothing but the interactive page needs a script.

Run: pip install -r requirements.txt -r course/requirements.txt
     course/build                       (all lessons; 05 takes 3 minutes, the others 1 in all)
     course/build --execute 01 02 03    (the pages of the others then have no output)
"""

import argparse
import base64
import html
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path, PurePosixPath

try:
    import nbformat
    from pygments.formatters import HtmlFormatter

    from course.pages import mathfont, measured, notebooks, prose
    from course.pages.site import (
        HERE,
        INTERACTIVE,
        ROOT,
        Site,
        documents,
        page_of,
        relative,
        title_of,
    )
except ImportError as error:
    needed = "pip install -r course/requirements.txt"
    raise SystemExit(f"error: {error.name} is not installed; {needed}") from None
from rebased import LESSONS, files, lesson
from rebased.lesson import Refusal

NAMES = list(LESSONS.values())


# Lessons
def write_lesson(site, name, notebook, seconds):
    """The page, the source with line numbers and the notebook of one lesson.

    seconds: how long it ran; None if it was not run.
    """
    file = Path(f"{name}.py")
    download = f"notebooks/{name}.ipynb"
    site.write(download, nbformat.writes(notebooks.for_download(notebook, site.repository)) + "\n")
    write_source(site, file, PurePosixPath(f"{name}.py.html"))

    renderer = site.renderer(file)
    cells = []
    for number, cell in enumerate(notebook.cells):
        cells.append(cell_as_html(site, name, number, cell, renderer))
    sections = [(anchor, text) for level, anchor, text in renderer.headings if level == 2]
    before, after = neighbours(name)
    site.write_page(
        page_of(file),
        title_of_lesson(notebook),
        "lesson.html.j2",
        opening=cells[0],
        cells="".join(cells[1:]),
        sections=sections,
        name=name,
        before=before,
        after=after,
        colab=colab_address(site.repository, download),
        setup=notebooks.setup_lines(site.repository),
        seconds=seconds,
        rows=where_rows_came_from(notebook),
    )


def neighbours(name):
    """The lessons before and after one; None where there is none."""
    around = [None, *NAMES, None]
    place = around.index(name)
    return around[place - 1], around[place + 1]


def title_of_lesson(notebook):
    """The heading of the first cell."""
    return notebook.cells[0].source.partition("\n")[0].removeprefix("# ")


def cell_as_html(site, name, number, cell, renderer):
    """Prose, or code and below it what it printed and drew."""
    if cell.cell_type == "markdown":
        return f'<div class="prose">{prose.to_html(cell.source, renderer)}</div>\n'
    parts = [prose.code_block(cell.source)]
    for output in cell.outputs:
        if output.output_type == "stream":
            parts.append(prose.box("output", f"<pre>{html.escape(output.text.rstrip())}</pre>"))
        elif "image/png" in output.get("data", {}):
            parts.append(figure(site, f"figures/{name}_{number}.png", output))
    return "".join(parts)


def figure(site, place, output):
    """Write a figure beside the pages and show it, with its description for who cannot see it."""
    picture = base64.b64decode(output.data["image/png"])
    site.write(place, picture)
    width = int.from_bytes(picture[16:20], "big")  # a PNG file says so in its header
    height = int.from_bytes(picture[20:24], "big")
    alt = html.escape(output.metadata.get("image/png", {}).get("alt", ""))
    size = f'width="{width}" height="{height}" style="--ratio: {width / height:.2f}"'
    image = f'<img src="{place}" alt="{alt}" {size}>'
    return f'<a class="figure" href="{place}">{image}</a>\n'


def where_rows_came_from(notebook):
    """A sentence on the runs that this build did not repeat; "" where there are none."""
    printed = ""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            printed += output.get("text", "")
    found = re.search(r"(\d+ of \d+) runs are there already", printed)
    if not found:
        return ""
    rows = files.read_rows(ROOT / "results" / "mqar.jsonl", fields=["commit", "date", "hardware"])
    made = sorted({f"{row['date']}, commit {row['commit']}, {row['hardware']}" for row in rows})
    where = f"results/mqar.jsonl ({'; '.join(made)})"
    return f"{found[1]} runs of the experiment were not repeated: their rows are those of {where}"


def colab_address(repository, download):
    """Where Colab opens a notebook: from the branch that the pages are published on."""
    if not repository:
        return ""
    return f"https://colab.research.google.com/github/{repository}/blob/gh-pages/{download}"


# Documents, files and folders
def write_document(site, document):
    """The page of a Markdown document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    body = prose.to_html(text, site.renderer(document))
    site.write_page(page_of(document), title_of(document), body=f'<div class="prose">{body}</div>')


def write_source(site, file, page):
    """The page of a text file, with numbered lines."""
    text = (ROOT / file).read_text(encoding="utf-8")
    body = f"<h1>{file.as_posix()}</h1>\n{prose.numbered_lines(text, file.name)}"
    site.write_page(page, file.as_posix(), body=body)


def write_folder(site, folder):
    """The page of a folder: what lies in it."""
    items = []
    for path in sorted((ROOT / folder).iterdir()):
        if path.name.startswith((".", "__")):
            continue
        file = path.relative_to(ROOT)
        place = relative(site.want(file), page_of(folder))
        items.append(f'<li><a href="{place}">{path.name}</a></li>')
    body = f"<h1>{folder.as_posix()}/</h1>\n<ul>\n" + "\n".join(items) + "\n</ul>"
    site.write_page(page_of(folder), folder.as_posix(), body=body)


def write_waiting(site):
    """A page for every file that is linked to or mentioned, until none waits any longer."""
    while site.waiting:
        source = site.waiting.pop()
        page = page_of(source)
        if source.stem in NAMES and source.suffix == ".py":
            continue  # a lesson has its page
        if (ROOT / source).is_dir():
            write_folder(site, source)
        elif source == INTERACTIVE:
            write_interactive(site)
        elif source.suffix == ".md":
            write_document(site, source)
        elif page.suffix == ".html" and source.suffix != ".html":
            write_source(site, source, page)
        else:
            site.write(page, (ROOT / source).read_bytes())


def write_home(site, about):
    """index.html: what this is, and everything there is. about: {lesson: (title, aim)}."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    opening = readme.partition("```")[0]  # up to the first command: what it is, and the figure
    body = prose.to_html(opening, site.renderer(Path("README.md")))
    listed = [(str(site.want(document)), title_of(document)) for document in documents()]
    site.write_page(
        PurePosixPath("index.html"),
        "ReBased, lesson by lesson",
        "home.html.j2",
        opening=body,
        lessons=about,
        documents=listed,
        interactive=str(page_of(INTERACTIVE)),
    )


# The interactive page
def write_interactive(site):
    """The page as it stands in course/, with the measured numbers and the menu put into it."""
    text = (ROOT / INTERACTIVE).read_text(encoding="utf-8")
    page = page_of(INTERACTIVE)
    data = json.dumps(measured.measured(), ensure_ascii=False).replace("<", "\\u003c")
    beginning = '<script id="measured" type="application/json">'
    before, _, after = text.partition(beginning)
    text = f"{before}{beginning}{data}{after.lstrip().removeprefix('null').lstrip()}"
    site.write(page, text.replace("<!-- menu -->", site.menu(page)))


# The whole
def github_repository():
    """"owner/name" on GitHub, as the workflow or the remote `origin` says; "" if neither does."""
    if "GITHUB_REPOSITORY" in os.environ:
        return os.environ["GITHUB_REPOSITORY"]
    git = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
    try:
        address = subprocess.run(git, capture_output=True, text=True).stdout
    except OSError:
        return ""
    found = re.search(r"github\.com[/:]([\w.-]+/[\w.-]+?)(\.git)?\s*$", address)
    return found[1] if found else ""


def emptied(out):
    """The folder of the site, empty. A folder that is no site is left alone: Refusal."""
    if out.exists():
        if any(out.iterdir()) and not (out / ".nojekyll").exists():
            raise Refusal(f"{out} holds something else than a site; give another --output")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / ".nojekyll").touch()  # GitHub Pages then serves every file as it is
    return out


def write_font(site):
    """The font of the formulas, with the characters of all pages."""
    characters = set()
    for page in site.out.rglob("*.html"):
        characters |= mathfont.characters_of(page.read_text(encoding="utf-8"))
    site.write("math.woff", mathfont.small_font(characters))


def write_style(site):
    """One style sheet: ours, and the colours of code in light and in dark."""
    style = (HERE / "style.css").read_text(encoding="utf-8")
    light = HtmlFormatter(style="default").get_style_defs([".code", ".source"])
    dark = HtmlFormatter(style="github-dark").get_style_defs([".code", ".source"])
    colours = f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
    site.write("style.css", colours + style)


def build(options):
    """Write the whole site."""
    site = Site(emptied(options.output), options.repository)
    about = {}
    for name in NAMES:
        notebook = notebooks.read_lesson(ROOT / f"{name}.py")
        seconds = None
        if name[:2] in options.execute:
            with tempfile.TemporaryDirectory() as folder:
                seconds = notebooks.run_lesson(name, notebook, Path(folder), options.train_again)
            print(f"{name}: ran for {seconds:.0f} s", flush=True)
        write_lesson(site, name, notebook, seconds)
        about[name] = (title_of_lesson(notebook), notebooks.aim_of(notebook))
    write_home(site, about)
    site.want(INTERACTIVE)
    write_style(site)
    write_waiting(site)
    write_font(site)
    for sentence in site.dangling:
        print(f"a link leads nowhere: {sentence}")
    return site


def report(out, start):
    """How much was made, in how long."""
    sizes = {path: path.stat().st_size for path in out.rglob("*") if path.is_file()}
    for name in NAMES:
        page = sizes[out / f"{name}.html"] / 1000
        notebook = sizes[out / "notebooks" / f"{name}.ipynb"] / 1000
        print(f"{name}: page {page:.0f} kB, notebook {notebook:.0f} kB")
    pages = sum(path.suffix == ".html" for path in sizes)
    minutes = (time.perf_counter() - start) / 60
    print(f"{out}: {pages} pages, {sum(sizes.values()) / 1e6:.1f} MB, {minutes:.1f} minutes")
    print(f"open {out / 'index.html'}")


def parse_options(argv=None):
    """What to run and where to write."""
    numbers = [name[:2] for name in NAMES]
    parser = argparse.ArgumentParser(prog="course/build", description="notebooks and pages")
    add = parser.add_argument
    add("--execute", nargs="*", choices=numbers, default=numbers, metavar="NUMBER",
        help="the lessons to run (default: all)")  # fmt: skip
    add("--train-again", action="store_true",
        help="let 04 train all its models, though results/mqar.jsonl has their rows")  # fmt: skip
    add("--output", type=Path, default=ROOT / "site", help="(default: site/)")
    add("--repository", default=github_repository(), metavar="OWNER/NAME",
        help="on GitHub, for Colab (default: what `origin` says)")  # fmt: skip
    return parser.parse_args(argv)


def main(argv=None):
    """Build, report, and return the site."""
    start = time.perf_counter()
    options = parse_options(argv)
    site = build(options)
    report(site.out, start)
    return site


if __name__ == "__main__":
    lesson.obey(main, "nothing is kept of an interrupted build; start it again")
