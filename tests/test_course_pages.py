"""The course's pages and notebooks: nothing of a lesson is lost, every link leads somewhere.

Needs course/requirements.txt; skipped without it. The slow tests run lessons, and look at the pages
in a browser at the width of a phone and of a desktop: for these also `pip install playwright` and
a Chromium (`apt-get install chromium`).
"""

import functools
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean

import pytest
import torch

from rebased import kernels, lesson

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
for needed in ("nbconvert", "latex2mathml", "ziamath"):
    pytest.importorskip(needed)
from course.pages import build, mathfont, measured, notebooks, prose, site  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NAMES = build.NAMES
WIDTHS = {"phone": (390, 844), "desktop": (1440, 900)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The site without a run of any lesson."""
    out = tmp_path_factory.mktemp("pages") / "site"
    made = build.main(["--execute", "--output", str(out), "--repository", "somebody/rebased"])
    assert made.dangling == [], "links of the Markdown documents"
    return out


class Page(HTMLParser):
    """A page taken apart: its tags, its text, and the text of its code."""

    def __init__(self, path):
        super().__init__()
        self.tags = []
        self.text = ""
        self.quiet = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style", "math", "pre", "code"):
            self.quiet.append(tag)

    def handle_endtag(self, tag):
        if self.quiet and self.quiet[-1] == tag:
            self.quiet.pop()

    def handle_data(self, data):
        if not self.quiet:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@functools.cache
def parsed(path):
    return Page(path)


def visible_text(path):
    """All text of a page, code and formulas too."""
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", path.read_text(encoding="utf-8"), flags=re.S)
    return html.unescape(re.sub(r"<[^>]+>", "", text))


# Nothing is lost
@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_all_cells_of_its_lesson_in_order(pages, name):
    text = visible_text(pages / f"{name}.html")
    at = 0
    for cell in jupytext.read(ROOT / f"{name}.py").cells[1:]:
        if cell.cell_type == "code":
            found = text.find(cell.source.strip(), at)
        else:
            heading = re.search(r"^## (.+)$", cell.source, re.M)
            found = text.find(heading[1].replace("`", ""), at) if heading else at
        assert found >= 0, cell.source[:60]
        at = found


@pytest.mark.parametrize("name", NAMES)
def test_every_word_of_the_docstring_is_on_the_page(pages, name):
    """In the Markdown cell that replaces it, too: neither loses a word or an equation's column."""
    docstring = jupytext.read(ROOT / f"{name}.py").cells[0].source.strip('"')
    plain = re.sub(r"^ *\d\. ", "", docstring, flags=re.M)  # HTML numbers its lists by itself
    words = Counter(plain.replace("`", "").replace(":", " ").split())
    text = visible_text(pages / f"{name}.html")
    shown = Counter(text.replace("`", "").replace(":", " ").split())
    assert not words - shown
    cell = notebooks.read_lesson(ROOT / f"{name}.py").cells[0].source
    for line in docstring.splitlines():
        if re.search(r"\S  +\[.*\]$", line):  # an equation and, in a column, where it comes from
            assert line.strip() in cell


def test_formulas_are_mathml_and_their_font_has_every_sign(pages):
    pictured = set()
    for name in NAMES:
        source = "\n".join(
            cell.source for cell in jupytext.read(ROOT / f"{name}.py").cells
            if cell.cell_type == "markdown"
        )  # fmt: skip
        source = re.sub(r"```.*?```|`[^`]*`", "", source, flags=re.S)
        formulas = re.findall(r"\$\$.+?\$\$|\$.+?\$", source, re.S)
        text = (pages / f"{name}.html").read_text(encoding="utf-8")
        assert text.count("<math") == len(formulas), name
        assert "merror" not in text
        assert not re.search(r"\$\$|\\frac|\\sum|\\varphi", parsed(pages / f"{name}.html").text)
        pictured |= mathfont.characters_of(text)
    from fontTools.ttLib import TTFont

    font = TTFont(pages / "math.woff")
    spaces = {0xA0, 0x200B, 0x2061, 0x2062}
    assert pictured - spaces <= set(font.getBestCmap()) and "MATH" in font
    assert (pages / "math.woff").stat().st_size < 200_000


def test_a_word_in_a_formula_is_one_name():
    assert "<mi>sim</mi>" in prose.formula(r"\mathrm{sim}(q, k)", display=False)


# Links
def test_every_link_leads_somewhere(pages):
    """Pages, files, and the sections within them; nothing is fetched from elsewhere."""
    texts = {path: path.read_text(encoding="utf-8") for path in pages.rglob("*.html")}
    sections = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in texts.items()}
    checked = 0
    for path, text in texts.items():
        for tag, target in re.findall(r'<(\w+)\b[^>]*?\s(?:href|src)="([^"]*)"', text):
            if re.match(r"(https?|data):", target):
                assert tag == "a" or target.startswith("data:"), target
                continue
            file, _, section = html.unescape(target).partition("#")
            place = Path(os.path.normpath(path.parent / file)) if file else path
            assert place.is_file(), f"{path.relative_to(pages)} links to {target}"
            if section and place in texts:
                assert section in sections[place], f"{path.relative_to(pages)}: {target}"
            checked += 1
    assert checked > 500


def test_a_link_that_leads_nowhere_is_told_and_not_made(tmp_path):
    made = site.Site(tmp_path, "")
    renderer = made.renderer(Path("README.md"))
    text = prose.to_html("[a](no/such/file.md), [b](LICENSE), [c](../outside)", renderer)
    assert text.count("<a ") == 1 and 'href="LICENSE.html"' in text
    assert len(made.dangling) == 2


def test_lessons_follow_each_other(pages):
    for before, after in zip(NAMES, NAMES[1:], strict=False):
        forward = parsed(pages / f"{before}.html").all("a")
        assert [a["href"] for a in forward if a.get("rel") == "next"] == [f"{after}.html"]
        back = parsed(pages / f"{after}.html").all("a")
        assert [a["href"] for a in back if a.get("rel") == "prev"] == [f"{before}.html"]


def test_every_page_is_found_from_the_first_one(pages):
    reached, waiting = set(), [pages / "index.html"]
    while waiting:
        path = waiting.pop()
        if path in reached or path.suffix != ".html":
            continue
        reached.add(path)
        for link in parsed(path).all("a"):
            target = link.get("href", "").partition("#")[0]
            if target and not target.startswith("http"):
                waiting.append(Path(os.path.normpath(path.parent / target)))
    assert reached == set(pages.rglob("*.html"))


def test_names_of_sections_are_those_of_github():
    taken = {}
    assert prose.slug("What it does <em>not</em> say: `a_b`", taken) == "what-it-does-not-say-a_b"
    assert prose.slug("What it does not say: a_b", taken) == "what-it-does-not-say-a_b-1"


def test_documents_that_are_missing_are_left_out(monkeypatch):
    monkeypatch.setattr(site, "DOCUMENTS", ["course/nowhere.md", "README.md", "*.md"])
    assert site.documents()[0] == Path("README.md")
    assert Path("course/nowhere.md") not in site.documents()


def test_pictures_are_described(pages):
    pictures = [image for path in pages.rglob("*.html") for image in parsed(path).all("img")]
    assert pictures and all(len(image["alt"]) > 20 for image in pictures)


# Notebooks
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_holds_the_lesson_and_the_two_lines(pages, name):
    path = pages / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    first, docstring, *cells = notebook.cells
    lines = first.source.splitlines()[-2:]
    assert [line.strip() for line in lines] == [
        "!git clone --quiet --depth 1 https://github.com/somebody/rebased lessons",
        "%cd lessons",
    ]
    assert docstring.cell_type == "markdown" and docstring.source.startswith(f"# {name[:2]} ·")
    expected = jupytext.read(ROOT / f"{name}.py").cells[1:]
    assert [cell.source for cell in cells] == [cell.source for cell in expected]
    page = (pages / f"{name}.html").read_text(encoding="utf-8")
    colab = "https://colab.research.google.com/github/somebody/rebased/blob/gh-pages"
    assert f"{colab}/notebooks/{name}.ipynb" in page and f'href="notebooks/{name}.ipynb"' in page


def test_outputs_are_tidied():
    """What was printed in pieces is one output; progress bars of stderr are left out."""
    stream = nbformat.v4.new_output
    cell = nbformat.v4.new_code_cell("x")
    cell.outputs = [
        stream("stream", name="stdout", text="a\n"),
        stream("stream", name="stderr", text="50%|█████"),
        stream("stream", name="stdout", text="b\n"),
        stream("display_data", data={"image/png": ""}),
        stream("stream", name="stdout", text="c\n"),
    ]
    notebooks.tidy_outputs(nbformat.v4.new_notebook(cells=[cell]))
    assert [output.get("text") for output in cell.outputs] == ["a\nb\n", None, "c\n"]


@pytest.mark.slow
def test_04_finds_the_rows_of_results_unless_it_is_to_train_again(tmp_path):
    source = "from pathlib import Path\nprint(Path('runs/mqar.jsonl').exists())"
    for train_again in (False, True):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        folder = tmp_path / str(train_again)
        notebooks.run_lesson("04_train_mqar", notebook, folder, train_again)
        assert notebook.cells[0].outputs[0].text == f"{not train_again}\n"


@pytest.mark.slow
def test_a_cell_that_fails_is_told_in_one_line(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(lesson.Refusal, match=r"^02_x.py: a cell fails: ZeroDivisionError: .*$"):
        notebooks.run_lesson("02_x", notebook, tmp_path)


def test_the_page_says_which_rows_were_there_already():
    cell = nbformat.v4.new_code_cell("x")
    text = "runs/mqar.jsonl: 15 of 15 runs are there already and are not repeated\n"
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    sentence = build.where_rows_came_from(nbformat.v4.new_notebook(cells=[cell]))
    row = json.loads((ROOT / "results" / "mqar.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert sentence.startswith("15 of 15 runs") and row["commit"] in sentence
    assert build.where_rows_came_from(nbformat.v4.new_notebook()) == ""


# The command
def test_a_folder_that_is_no_site_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(lesson.Refusal, match="give another --output"):
        build.main(["--execute", "--output", str(tmp_path)])
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_what_is_not_installed_is_named_in_one_line():
    code = "import sys; sys.modules['nbformat'] = None; import course.pages.build"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: nbformat is not installed; pip install -r course/req")


def test_the_workflow_writes_only_where_it_must():
    """Read from the text: the tests need no YAML reader."""
    text = (ROOT / ".github" / "workflows" / "pages.yml").read_text(encoding="utf-8")
    assert "\npermissions: {}\n" in text
    building, publishing = text.split("\n  publish:\n")
    assert "write" not in building.split("\njobs:\n")[1] and "course/build" not in publishing
    for action in re.findall(r"uses: (\S+)", text):
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), f"{action} is not pinned to a commit"


# The interactive page
def test_the_page_holds_what_the_rows_say(pages):
    text = (pages / "course" / "interactive.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="measured"[^>]*>(.*?)</script>', text, re.S)[1])
    rows = [json.loads(line) for line in (ROOT / "results" / "mqar.jsonl").open(encoding="utf-8")]
    titles = {"conv_attention": "softmax", "rebased": "ReBased", "based": "Based"}
    for mixer, title in titles.items():
        mine = [row for row in rows if row["mixer"] == mixer]
        for cell in rows[0]["cells"]:
            for measure in ("accuracy", "filler"):
                expected = [row["cells"][cell][measure] for row in mine]
                assert data["lines"][title][cell][measure] == pytest.approx(expected, abs=1e-4)
                if mixer == "based":
                    expected = [row["cells_without_floor"][cell][measure] for row in mine]
                    found = data["lines"]["Based, floor 0"][cell][measure]
                    assert found == pytest.approx(expected, abs=1e-4)


def test_other_floors_are_shown_where_there_are_rows(tmp_path):
    shutil.copy(ROOT / "results" / "mqar.jsonl", tmp_path)
    assert measured.measured(tmp_path)["doses"] is None
    rows = []
    for seed, accuracy in ((0, 0.4), (1, 0.6)):
        for part, floor in (("dose", 0.5), ("dose", 0.0), ("learned", 0.5)):
            cells = {"8192 uniform": {"accuracy": accuracy + (floor == 0), "filler": 0.25}}
            row = dict(part=part, role="report", kernel="based", floor=floor, seed=seed)
            row["cells"] = cells
            if floor:
                row["cells_without_floor"] = {"8192 uniform": {"accuracy": 0.9, "filler": 0.1}}
            rows.append(json.dumps(row) + "\n")
    (tmp_path / "floor.jsonl").write_text("".join(rows), encoding="utf-8")
    without, half = measured.measured(tmp_path)["doses"]["based"]
    assert (without["floor"], without["seeds"], half["floor"], half["seeds"]) == (0.0, 2, 0.5, 2)
    assert half["cells"]["8192 uniform"] == {"accuracy": 0.5, "accuracy_at_0": 0.9, "filler": 0.25}
    assert without["cells"]["8192 uniform"]["accuracy_at_0"] == 1.5


def test_every_control_has_a_label_and_the_result_is_spoken(pages):
    page = parsed(pages / "course" / "interactive.html")
    labelled = {label["for"] for label in page.all("label") if "for" in label}
    sliders = {control["id"] for control in page.all("input") if control["type"] == "range"}
    assert sliders == labelled == {"floor", "gamma", "beta", "length"}
    assert [output.get("aria-live") for output in page.all("output")].count("polite") == 1


def test_the_page_as_it_lies_in_the_repository_says_that_it_has_no_numbers():
    text = (ROOT / "course" / "interactive.html").read_text(encoding="utf-8")
    assert re.search(r'id="measured" type="application/json">\s*null\s*</script>', text)
    assert not re.search(r'(src|href)="(?!data:|#)', text), "one plain file"


# In a browser
@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if not program:
        pytest.skip("no Chromium (apt-get install chromium)")
    alone = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    alone += ["--no-first-run", "--disable-component-update", "--disable-sync"]
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=alone)
        yield opened
        opened.close()


class Visit:
    """A page in the browser, and what it said to the console and asked of the network."""

    def __init__(self, browser, path, width="desktop", scheme="light"):
        size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
        self.context = browser.new_context(viewport=size, color_scheme=scheme)
        self.page = self.context.new_page()
        self.complaints = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self.note_request)
        self.go(path)

    def go(self, path):
        self.page.goto(path.resolve().as_uri())

    def note_request(self, request):
        if not request.url.startswith(("file:", "data:")):
            self.complaints.append(f"asked for {request.url}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def text(self, selector):
        return self.page.locator(selector).inner_text()

    def ask(self, script, argument=None):
        return self.page.evaluate(script, argument)


PROSE_THAT_STICKS_OUT = """() => {
  const wide = document.documentElement.clientWidth;
  const boxed = ".code, .output, .source, .table, .formula, .figure, figure svg, .skip";
  const found = [];
  if (document.documentElement.scrollWidth > wide) found.push("the whole page");
  for (const element of document.querySelectorAll("main *, nav *, footer *")) {
    if (element.closest(boxed) || element.closest("math")) continue;
    const right = element.getBoundingClientRect().right;
    if (right > wide + 1) found.push(element.outerHTML.slice(0, 90));
  }
  return found;
}"""
PICTURES = """() => Array.from(document.images, (image) => {
  image.loading = "eager";
  return image.decode().then(() => [image.alt.length, image.naturalWidth, image.clientWidth]);
}).reduce((all, one) => all.then((list) => one.then((x) => [...list, x])), Promise.resolve([]))"""


def look_at(visit):
    """What every page must be like."""
    assert visit.ask(PROSE_THAT_STICKS_OUT) == []
    for description, pixels, shown in visit.ask(PICTURES):
        assert description > 20 and pixels > 300 and shown > 200
    assert visit.ask("document.querySelectorAll('h1').length") == 1
    assert visit.complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_loads_and_fits(pages, browser, width):
    with Visit(browser, pages / "index.html", width) as visit:
        for path in sorted(pages.rglob("*.html")):
            visit.go(path)
            try:
                look_at(visit)
            except AssertionError as error:
                raise AssertionError(f"{path.relative_to(pages)}: {error}") from None


@pytest.fixture(scope="module")
def run_pages(tmp_path_factory):
    """The site with the first three lessons run."""
    out = tmp_path_factory.mktemp("run") / "site"
    build.main(["--execute", "01", "02", "03", "--output", str(out)])
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name, figures", [(NAMES[0], 1), (NAMES[1], 1), (NAMES[2], 0)])
def test_outputs_stand_under_their_code(run_pages, name, figures):
    text = (run_pages / f"{name}.html").read_text(encoding="utf-8")
    blocks = re.findall(r'<div class="(code|output)">(.*?)</div>|(<a class="figure")', text, re.S)
    kinds = [kind or "figure" for kind, _, figure in blocks]
    shows = [i for i, block in enumerate(blocks) if "__main__" in block[1] and kinds[i] == "code"]
    talking = [i for i in shows if kinds[i + 1 : i + 2] in (["output"], ["figure"])]
    assert len(shows) >= 5 and len(talking) >= 0.7 * len(shows)
    assert kinds.count("figure") == figures
    assert re.search(r"checks: [1-9]\d* passed, 0 failed", visible_text(run_pages / f"{name}.html"))
    assert "without running the lesson" not in text and "%|" not in text


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_lessons_with_their_outputs_fit(run_pages, browser, width):
    for name in NAMES[:3]:
        with Visit(browser, run_pages / f"{name}.html", width, scheme="dark") as visit:
            look_at(visit)
            rows = visit.ask("document.querySelectorAll('.output').length")
            assert rows >= 5


def python_share(gamma, beta, floor, T):
    """irrelevant_share of 01 for the parabola of the page."""

    def scores(q, k):
        return (gamma * kernels.scaled_dot(q, k) + beta).square() + floor

    return kernels.irrelevant_share(scores, T)


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_at_a_floor_of_a_half_the_share_is_what_01_prints(pages, browser, width, capsys):
    kernels.show_what_a_floor_costs()
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if line.startswith("Based  ")]
    at_8192 = row.split()[-2]
    with Visit(browser, pages / "course" / "interactive.html", width) as visit:
        assert visit.text("#floor-value") == "0.50" and visit.text("#length-value") == "8,192"
        assert visit.text("#share-value") == at_8192
        assert at_8192 == f"{kernels.irrelevant_share(kernels.SHOWN['Based'], 8192):.3f}"
        visit.page.get_by_role("button", name="the same + ½").click()
        expected = kernels.irrelevant_share(kernels.SHOWN["ReBased + ½"], 8192)
        assert visit.text("#share-value") == f"{expected:.3f}"
        assert visit.complaints == []


@pytest.mark.slow
def test_the_formulas_of_the_page_are_those_of_01(pages, browser):
    with Visit(browser, pages / "course" / "interactive.html") as visit:
        for gamma, beta, floor in ((1, 0, 0.5), (0.5, 0.25, 0.1), (2, 3, 0.03), (0.3, 2, 0.0)):
            for T in (16, 1024, 131_072):
                kernel = dict(gamma=gamma, beta=beta, floor=floor)
                found = visit.ask("([k, T]) => irrelevantShare(k, T)", [kernel, T])
                expected = python_share(gamma, beta, floor, T)
                assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
        for T, W, floor in ((128, 283, 0.5), (8192, 13, 0.5), (8192, 283, 0.01), (64, 1e6, 0.1)):
            found = visit.ask("([T, W, f]) => shareAnywhere(T, W, f)", [T, W, floor])
            assert found == pytest.approx(kernels.share_anywhere(T, W, floor), rel=1e-6, abs=1e-9)
        scattered = visit.ask("irrelevantShare({gamma: 1, beta: 0, floor: 0}, 8192, 0.05)")
        noise = kernels.irrelevant_share(kernels.SHOWN["ReBased"], 8192, scatter=0.05)
        assert scattered == pytest.approx(noise, rel=0.03)  # a mean beside one draw of 8,192 keys


@pytest.mark.slow
def test_the_page_is_worked_by_keyboard(pages, browser):
    """Tab reaches every control; arrows move a slider; the spoken text follows."""
    with Visit(browser, pages / "course" / "interactive.html", "phone") as visit:
        reached = []
        for _ in range(40):
            visit.page.keyboard.press("Tab")
            reached.append(visit.ask("document.activeElement.id || document.activeElement.tagName"))
        sliders = ["floor", "gamma", "beta", "length"]
        assert [name for name in reached if name in sliders][:4] == sliders
        assert reached.count("BUTTON") >= 4 and "INPUT" in reached
        visit.page.locator("#length").focus()
        visit.page.keyboard.press("ArrowLeft")
        expected = kernels.irrelevant_share(kernels.SHOWN["Based"], 4096)
        assert f"T = 4,096 the irrelevant tokens take {expected:.3f}" in visit.text("#reading")
        assert visit.page.get_attribute("#length", "aria-valuetext") == "4,096 tokens"
        visit.page.locator("#floor").focus()
        visit.page.keyboard.press("Home")
        assert visit.text("#floor-value") == "0.00" and visit.text("#share-value") == "0.000"
        outline = visit.ask("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" and visit.complaints == []


@pytest.mark.slow
def test_the_measured_numbers_are_shown(pages, browser):
    rows = [json.loads(line) for line in (ROOT / "results" / "mqar.jsonl").open(encoding="utf-8")]
    with Visit(browser, pages / "course" / "interactive.html") as visit:
        for T, how in ((8192, "uniform"), (2048, "uniform"), (2048, "official")):
            visit.ask("value => { const s = document.getElementById('length'); s.value = value; "
                      "s.dispatchEvent(new Event('input')); }", T.bit_length() - 1)  # fmt: skip
            visit.page.locator(f"input[value={how}]").check()
            accuracy = mean(
                row["cells"][f"{T} {how}"]["accuracy"] for row in rows if row["mixer"] == "based"
            )
            shown = visit.page.locator("#measured-rows tr", has_text="Based").nth(1).inner_text()
            assert shown.split()[:2] == ["Based", f"{accuracy:.3f}"]
        assert visit.complaints == []


@pytest.mark.slow
def test_light_and_dark_can_both_be_read(pages, browser):
    """Text against the page: a contrast of at least 7 to 1 for text, 4.5 for what is quieter."""

    def brightness(colour):
        parts = torch.tensor([int(part) / 255 for part in re.findall(r"\d+", colour)[:3]])
        linear = torch.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return (linear @ torch.tensor([0.2126, 0.7152, 0.0722])).item()

    for file in ("index.html", "01_kernels.html", "course/interactive.html"):
        backgrounds = set()
        for scheme in ("light", "dark"):
            with Visit(browser, pages / file, scheme=scheme) as visit:
                behind = visit.ask("getComputedStyle(document.body).backgroundColor")
                backgrounds.add(behind)
                for selector, least in (("body", 7), ("main a", 4.5), ("footer, figcaption", 4.5)):
                    script = "s => Array.from(document.querySelectorAll(s), getComputedStyle)"
                    script += ".map((style) => style.color)"
                    for colour in set(visit.ask(script, selector)):
                        levels = sorted([brightness(behind), brightness(colour)])
                        assert (levels[1] + 0.05) / (levels[0] + 0.05) >= least, (file, selector)
        assert len(backgrounds) == 2, f"{file} looks the same in light and dark"


@pytest.mark.slow
def test_the_two_lines_bring_a_notebook_to_life_elsewhere(pages, tmp_path):
    """In an empty folder, as on Colab; the repository comes from the disk instead of GitHub."""
    from nbclient import NotebookClient

    notebook = nbformat.read(pages / "notebooks" / f"{NAMES[0]}.ipynb", as_version=4)
    address = "https://github.com/somebody/rebased"
    assert address in notebook.cells[0].source
    notebook.cells[0].source = notebook.cells[0].source.replace(address, ROOT.as_uri())
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    assert (tmp_path / "lessons" / "rebased").is_dir()
    assert "checks: " in notebook.cells[-1].outputs[-1].text
