"""The exercises and documents of course/: red as handed out, green when solved, red for a clever nothing.

Every answer that only looks right ("fake") is a solution whose named part is replaced; its check must fail, and say
what is wrong. The documents: links and sections exist, minutes add up, the primer's numbers are those of its equations.
"""

import ast
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COURSE = ROOT / "course"
EXERCISES = sorted((COURSE / "exercises").glob("*.py"))
SOLUTIONS = sorted((COURSE / "solutions").glob("*.py"))
NAMES = [f"{lesson}{letter}" for lesson in "12345" for letter in "abc"]


def checked(folder, report, *options):
    """What the checks say of the answers in a folder, {"2b": None if passed, else its message}, and what is printed.

    report: where pytest may write its XML.
    """
    command = [sys.executable, "-m", "pytest", "course", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["--answers", str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problems = [part.text for part in case if part.tag in ("failure", "error")]
        found[case.get("name").split("_")[1]] = problems[0] if problems else None
    return found, done.stdout


# Fakes: (what somebody might try, code behind the solution, a part of what the check says)
FAKES = {
    "1a": [
        (
            "the features of the lesson, without a floor",
            "def features(x):\n    from rebased import kernels\n    return kernels.square_features(x)",
            "should be 1 + (q·k)²",
        ),
        ("the weight in place of the number", "def half_way(floor, right):\n    return right", "not half"),
    ],
    "1b": [
        ("the kernel of the lesson", "SquaredCosineKernel = lambda dim: kernels.KERNELS['x2'](dim)", "cos²(q, k)"),
        ("no floor, so no share", "def random_share(T, D):\n    return 0.0", "200,000 random directions"),
    ],
    "1c": [
        ("the kernel of the lesson", "QuarticKernel = kernels.KERNELS['rebased']", "should be s⁴"),
        (
            "pairs of pairs",
            "def twice(self, x):\n"
            "    f = kernels.symmetric_products\n"
            "    return self.add_floor(f(f(x)) / x.shape[-1])\n"
            "QuarticKernel.features = twice",
            "with 55 features",
        ),
        (
            "ReBased's share",
            "def compare(T):\n"
            "    share = kernels.irrelevant_share(kernels.ReBasedKernel(16).scores, T, 0.05)\n"
            "    return {'Based': (153, 0.9968), 'ReBased': (136, share), 'quartic': (3876, share)}",
            "the share of quartic",
        ),
    ],
    "2a": [
        ("what 02 warns of", "def exclusive_prefix(x):\n    return x.cumsum(0) - x", "was something subtracted?"),
        ("the inclusive sum", "def exclusive_prefix(x):\n    return x.cumsum(0)", "exclusive_prefix"),
        ("harmless numbers", "def counterexample():\n    return torch.ones(8)", "not by 50 %"),
    ],
    "2b": [
        (
            "only dq, from the lesson",
            "def gradients(q, k, v, do, with_delta=True):\n"
            "    from rebased import linear_attention\n"
            "    dq = linear_attention.gradient_of_q(q, k, v, do, with_delta)\n"
            "    return dq, torch.zeros_like(k), torch.zeros_like(v)",
            "with δ: dk",
        ),
        (
            "δ always",
            "given = gradients\ndef gradients(q, k, v, do, with_delta=True):\n    return given(q, k, v, do, True)",
            "without δ: dq",
        ),
        ("a guess", "def broken_without_delta(q, k, v, do):\n    return {'q', 'k', 'v'}", "compare your two sets"),
        ("looked up", "def broken_without_delta(q, k, v, do):\n    return {'q', 'k'}", "nothing is broken"),
    ],
    "2c": [
        (
            "the lesson's forms, which do not decay",
            "def decayed_quadratic(q, k, v, kernel, decay):\n"
            "    return linear_attention.quadratic_attention(q, k, v, kernel)",
            "decayed_quadratic with decay 0.8",
        ),
        (
            "the new token decays, not the state",
            "def decayed_recurrent(q, k, v, kernel, decay, state=None):\n"
            "    return linear_attention.recurrent_attention(q, k, v * decay, kernel, state, return_state=True)",
            "decayed_recurrent with decay",
        ),
        (
            "no state",
            "given = decayed_recurrent\n"
            "def decayed_recurrent(q, k, v, kernel, decay, state=None):\n    return given(q, k, v, kernel, decay)",
            "cut at 6",
        ),
        (
            "the right key does not fade",
            "given = share_on_filler\ndef share_on_filler(floor, right, decay, T):\n"
            "    return given(floor, right / decay**T, decay, T)",
            "share_on_filler(0.5, 13, 0.99, 300)",
        ),
    ],
    "3a": [
        (
            "softmax of a constant size",
            "given = state_numbers\ndef state_numbers(mixer, T, *sizes):\n    return given(mixer, 1, *sizes)",
            "the layer of 03 holds",
        ),
        (
            "D in place of P",
            "def state_numbers(mixer, T, d_model, heads, D=16):\n"
            "    kernel = heads * D * (d_model // heads + 1)\n"
            "    return {'short_conv': 2 * d_model, 'attention': 2 * T * d_model}.get(mixer, kernel)",
            "the layer of 03 holds",
        ),
        ("one answer", "def crossover(kernel, d_model, heads, feature_dim=16):\n    return 70", "crossover('based'"),
    ],
    "3b": [
        (
            "every sequence whole",
            "@torch.no_grad()\ndef score(model, prompt, answers):\n"
            "    scores = []\n"
            "    for answer in answers:\n"
            "        logits = model(torch.cat([prompt[0], answer]).unsqueeze(0))[0, prompt.shape[1] - 1 : -1]\n"
            "        scores.append(logits.log_softmax(-1)[torch.arange(len(answer)), answer].sum().item())\n"
            "    return scores",
            "read the prompt once",
        ),
        (
            "only the first token",
            "given = score\ndef score(model, prompt, answers):\n"
            "    return given(model, prompt, [answer[:1] for answer in answers])",
            "ln p of four answers",
        ),
        ("zeros", "def score(model, prompt, answers):\n    return [0.0] * 4", "ln p of four answers"),
    ],
    "3c": [
        (
            "a sum, not a correction",
            "def delta_recurrent(q, k, v, b, S=None):\n"
            "    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)\n"
            "    S0 = 0 if S is None else S.unsqueeze(2)\n"
            "    S = S0 + torch.einsum('bhtd,bhte,bht->bhtde', k, v, b).cumsum(2)\n"
            "    return torch.einsum('bhtd,bhtde->bhte', q, S), S[:, :, -1]",
            "o of one head",
        ),
        (
            "a layer of the lesson",
            "class DeltaMixer(models.KernelAttention):\n"
            "    def __init__(self, config):\n        super().__init__(config, 'rebased')",
            "should call delta_recurrent",
        ),
        (
            "a mixer without a state",
            "class Given(DeltaMixer):\n"
            "    def forward(self, x, state=None, return_state=False):\n"
            "        return super().forward(x, None, return_state)\n"
            "DeltaMixer = Given\n",
            "token by token",
        ),
    ],
    "4a": [
        ("the filler of the lesson", "def fill(inputs, *others):\n    return inputs.clone()", "filler from 0"),
        (
            "one other constant",
            "def fill(inputs, labels, num_pairs, vocab_size, generator):\n"
            "    return torch.where(is_filler(labels, num_pairs), 255, inputs)",
            "different tokens",
        ),
        ("not made safe", "fill_safely = fill", "leaves"),
        (
            "queries counted as well",
            "def false_keys(inputs, labels, num_pairs):\n"
            "    return is_a_key(inputs, num_pairs)[:, 2 * num_pairs :].sum(1)",
            "false keys, yours",
        ),
        (
            "values only",
            "def fill_safely(inputs, labels, num_pairs, vocab_size, generator):\n"
            "    values = torch.randint(128, vocab_size, inputs.shape, generator=generator)\n"
            "    return torch.where(is_filler(labels, num_pairs), values, inputs)",
            "all but the keys may occur",
        ),
    ],
    "4b": [
        ("the lesson's run", "def my_run():\n    return train_mqar.SMALL", "choose your own"),
        (
            "a kernel without a floor",
            "def my_run():\n    return replace(train_mqar.SMALL, seed=1, mixer='rebased')",
            "has no floor",
        ),
        ("not trained", "def my_run():\n    return replace(train_mqar.SMALL, seed=1, steps=5)", "train longer"),
        (
            "the same model for every dose",
            "def dose(trained, run, floors, length):\n"
            "    found = train_mqar.test_at(trained, run, length, 'uniform')\n"
            "    return [(floor, found['accuracy'], found['filler']) for floor in floors]",
            "floor 0.1",
        ),
        (
            "the floor is left at 0",
            "given = dose\ndef dose(trained, run, floors, length):\n"
            "    rows = given(trained, run, floors, length)\n"
            "    train_mqar.kernel_of(trained).floor = 0.0\n    return rows",
            "came back with the floor 0.0",
        ),
    ],
    "4c": [
        (
            "softmax of nothing: the key itself is always found",
            "def recall(kernel, num_pairs, value_dim, seed=0):\n    return 1.0 - seed * 1e-9",
            "where every key meets every key",
        ),
        (
            "the kernel is not used",
            "given = recall\ndef recall(kernel, *others):\n    return given(kernels.KERNELS['rebased'](8), *others)",
            "recall of elu",
        ),
        (
            "a table by heart",
            "def table(value_dim=32):\n"
            "    return {(name, D): D * D // 2 for name in ('elu', 'based', 'rebased') for D in (4, 8, 16)}",
            "table: elu at D = ",
        ),
    ],
    "5a": [
        (
            "perplexities averaged",
            "def ar_share(all_tokens, ar, others):\n    return (others - all_tokens) / (others - ar)",
            "ar_share finds",
        ),
        (
            "nats",
            "def bits_per_byte(perplexity, tokens_per_byte):\n    return math.log(perplexity) * tokens_per_byte",
            "bits per byte, you",
        ),
    ],
    "5b": [
        (
            "the lesson's mask",
            "def far_recall_mask(context, distance):\n"
            "    from rebased import train_pile\n    return train_pile.recall_mask(context, 'bigram')",
            "distance 2",
        ),
        (
            "the first occurrence",
            "def far_recall_mask(context, distance):\n"
            "    first, mask = {}, np.zeros(len(context), dtype=bool)\n"
            "    for t in range(1, len(context)):\n"
            "        pair = tuple(context[t - 1 : t + 1].tolist())\n"
            "        mask[t] = pair in first and t - first[pair] >= distance\n"
            "        first.setdefault(pair, t)\n"
            "    return mask",
            "wrong first at token",
        ),
    ],
    "5c": [
        ("no opinion", "def predict(context):\n    return np.full(256, 1 / 256)", "counting bytes needs"),
        (
            "counting",
            "def predict(context):\n"
            "    counts = np.bincount(np.frombuffer(context, dtype=np.uint8), minlength=256)\n"
            "    return (counts + 0.01) / (len(context) + 2.56)",
            "look-ups should save",
        ),
        (
            "a short memory",
            "given = predict\ndef predict(context):\n    return given(context[-300:])",
            "seen a second time",
        ),
        ("too sure", "given = predict\ndef predict(context):\n    return 2 * given(context)", "need above 0 and 1"),
    ],
}
ROUNDS = max(len(fakes) for fakes in FAKES.values())


def test_three_exercises_a_lesson_and_a_solution_for_each():
    assert [path.name.split("_")[0] for path in EXERCISES] == NAMES
    assert [path.name for path in SOLUTIONS] == [path.name for path in EXERCISES]
    assert list(FAKES) == NAMES


def test_the_repositorys_own_tests_leave_them_alone():
    """They are red as handed out: `python -m pytest` without a folder takes tests/ only."""
    assert re.search(r'^testpaths = \["tests"\]$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)


def test_as_handed_out_every_check_fails_and_says_what_to_write(tmp_path):
    found, printed = checked(COURSE / "exercises", tmp_path / "report.xml")
    assert list(found) == NAMES
    for name, message in found.items():
        assert message and "is yours to write" in message, f"{name}: {message}"
        assert len(message.splitlines()) <= 2, f"{name}: {message}"
    assert "Traceback" not in printed and "conftest.py" not in printed


@pytest.mark.slow
def test_every_check_passes_with_its_solution(tmp_path):
    found, printed = checked(COURSE / "solutions", tmp_path / "report.xml")
    assert found == dict.fromkeys(NAMES), printed


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(ROUNDS))
def test_no_check_is_passed_by_a_fake(turn, tmp_path):
    expected = {}
    for solution in SOLUTIONS:
        name = solution.name.split("_")[0]
        if turn < len(FAKES[name]):
            _, code, expected[name] = FAKES[name][turn]
            text = solution.read_text(encoding="utf-8")
            (tmp_path / solution.name).write_text(f"{text}\n\n{code}\n", encoding="utf-8")
    found, _ = checked(tmp_path, tmp_path / "report.xml", "-k", " or ".join(expected))
    assert found.keys() == expected.keys()
    for name, part in expected.items():
        fake = FAKES[name][turn][0]
        assert found[name], f"{name} is passed by: {fake}"
        assert part in found[name], f"{name}, {fake}: {found[name]}"


def test_a_mistake_is_shown_where_it_is(tmp_path):
    """Not a traceback from the depths: the line of the answer and what Python says of it."""
    broken = {"1a": "def features(x):\n    return x @ x", "2a": "def exclusive_prefix(x)\n    return x"}
    for name, code in broken.items():
        (tmp_path / f"{name}_answer.py").write_text(code, encoding="utf-8")
    found, _ = checked(tmp_path, tmp_path / "report.xml", "-k", "1a or 2a or 3a")
    assert list(found) == ["1a", "2a", "3a"]
    assert "1a_answer.py, line 2: return x @ x\nRuntimeError" in found["1a"]
    assert "2a_answer.py, line 1: def exclusive_prefix(x)\nSyntaxError" in found["2a"]
    assert "should hold one file 3a_*.py" in found["3a"]


CHECKS = sorted((COURSE / "checks").glob("*.py"))
FILES = [*EXERCISES, *SOLUTIONS, *CHECKS, COURSE / "answers.py", COURSE / "conftest.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_fit_a_projector(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert not [line for line in text.splitlines() if len(line) > 100]
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if node.end_lineno - node.lineno + 1 > 30]


@pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.name)
def test_an_exercise_says_what_where_and_how(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    for part in ("Connects to ", "Write\n", "Hint", f"Check: python -m pytest course -k {path.name[:2]}"):
        assert part in docstring, f"{path.name}: no {part!r}"


# Documents
PAGES = {
    path.name if path.parent == ROOT else f"{path.parent.name}/{path.name}": path
    for path in (
        *(COURSE / f"{name}.md" for name in ("README", "plan", "primer", "glossary", "family")),
        ROOT / "CONTRIBUTING.md",
        ROOT / "ERRATA.md",
        ROOT / "results" / "LOG.md",
    )
}


def sections(lesson):
    """The headings of a lesson: sections("02") -> {"1. Quadratic: the definition", ...}."""
    (path,) = ROOT.glob(f"{lesson}_*.py")
    return set(re.findall(r"^# ## (.+)$", path.read_text(encoding="utf-8"), re.M))


def named_sections(text):
    """What a text refers to, as 02, "A" and "B", or 02_linear_attention.py, "A": [("02", "A"), ("02", "B")]."""
    text = re.sub(r"\s+", " ", text)
    lesson = r"\b(0[1-5])(?:_\w+\.py)?(?:\]\([^)]*\))?,"
    found = []
    for number, quoted in re.findall(lesson + r'((?:(?:,| and)? ?"[^"]+")+)', text):
        found += [(number, title) for title in re.findall(r'"([^"]+)"', quoted)]
    return found


@pytest.mark.parametrize("path", [*PAGES.values(), *EXERCISES], ids=lambda path: path.name)
def test_sections_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    for lesson, title in named_sections(text):
        assert title in sections(lesson), f"{path.name}: {lesson} has no section {title!r}"
    if path in EXERCISES:
        assert path.name[0] in {lesson[1] for lesson, _ in named_sections(text)}, "its own lesson is not named"


def test_a_section_that_is_not_there_is_noticed():
    text = 'see 02, "What each\n  form costs" and "Nowhere"; [01_kernels.py](../01_kernels.py), "The picture"'
    expected = [("02", "What each form costs"), ("02", "Nowhere"), ("01", "The picture")]
    assert named_sections(text) == expected and "Nowhere" not in sections("02")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = PAGES[page]
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    for target in targets:
        assert target.startswith("https://") or (path.parent / target).exists(), f"{page} links to {target}"


def test_every_session_has_fifty_minutes():
    text = PAGES["course/plan.md"].read_text(encoding="utf-8")
    plan = text.split("\n## Session ")[1:]
    assert len(plan) == 5
    for number, session in enumerate(plan, start=1):
        minutes = [int(minutes) for minutes in re.findall(r"^\| (\d+) \|", session, re.M)]
        assert sum(minutes) == 50, f"session {number}: {sum(minutes)} minutes"
        exercises = set(re.findall(r"course --answers mine -k (\w+)", session))
        assert exercises and {name[0] for name in exercises} == {str(number)}
        for letter in "abc":  # in class or at home, none is forgotten
            assert f"{number}{letter}" in text
        assert len(re.findall(r"^\| .*\?.* \| ", session, re.M)) >= 5, f"session {number}: few questions"


def test_the_commands_of_the_plan_name_files_that_exist():
    for page in ("course/plan.md", "course/README.md", "CONTRIBUTING.md"):
        text = PAGES[page].read_text(encoding="utf-8")
        for name in re.findall(r"python (\S+\.py)", text):
            assert (ROOT / name).exists(), f"{page}: {name}"


TOKENS = [((1, 0), 10), ((0, 1), 20), ((1, 1), 30), ((1, -1), 40)]
QUERY = (1, 2)


def features(x):
    return (x[0] ** 2, math.sqrt(2) * x[0] * x[1], x[1] ** 2)


def plus(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))


def times(a, number):
    return tuple(x * number for x in a)


def written(number):
    """As in the primer: whole numbers without a point, others with two digits."""
    return f"{number:.0f}" if abs(number - round(number)) < 1e-9 else f"{number:.2f}"


def triple(x):
    return "(" + ", ".join(written(number) for number in x) + ")"


def primer_rows():
    """Every table row of the primer, computed: the cells as text."""
    similarities = (lambda s: math.exp(s), lambda s: 1 + s + s * s / 2, lambda s: s * s)
    digits = ("{:.3f}", "{:.1f}", "{:.0f}")
    products = [key[0] * QUERY[0] + key[1] * QUERY[1] for key, _ in TOKENS]
    columns = [[f(s) for s in products] for f in similarities]
    for i, (key, value) in enumerate(TOKENS):
        cells = [form.format(column[i]) for form, column in zip(digits, columns, strict=True)]
        yield [f"({key[0]}, {key[1]})", str(value), str(products[i]), *cells]
    yield ["sum of weights", "", "", *(form.format(sum(c)) for form, c in zip(digits, columns, strict=True))]
    means = [sum(w * v for w, (_, v) in zip(c, TOKENS, strict=True)) / sum(c) for c in columns]
    yield ["output", "", "", *(f"{mean:.2f}" for mean in means)]
    S = z = (0, 0, 0)
    for key, value in TOKENS:
        phi = features(key)
        weight = sum(a * b for a, b in zip(features(QUERY), phi, strict=True))
        yield [f"({key[0]}, {key[1]})", triple(phi), triple(times(phi, value)), written(weight)]
        z = plus(z, phi)
        S = plus(S, times(phi, value))
    total = sum(a * b for a, b in zip(features(QUERY), z, strict=True))
    yield ["sum", f"z = {triple(z)}", f"S = {triple(S)}", written(total)]


def test_the_tables_of_the_primer():
    text = PAGES["course/primer.md"].read_text(encoding="utf-8").replace("−", "-")
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in re.findall(r"^\|.*$", text, re.M)]
    rows = [row for row in rows if row[0] != "key" and set(row[0]) != {"-"}]
    expected = [[cell for cell in row] for row in primer_rows()]
    assert rows == expected
    assert f"φ(q) = {triple(features(QUERY))}" in re.sub(r"\s+", " ", text)


def test_the_sums_of_the_primer():
    """Each line with an equals sign in its blocks: both sides, as far as they are rounded."""
    text = PAGES["course/primer.md"].read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"^```text\n(.*?)^```$", text, re.M | re.S))
    checked = 0
    for line in blocks.splitlines():
        sides = re.sub(r"^(softmax|Based|square|num|den|o)( of token 4| +φ\(q\)·[Sz] =)?", "", line).split("=")
        if len(sides) == 2 and re.fullmatch(r"[\d.()·+/ −]+", sides[0]):
            left, right = (eval(side.replace("·", "*").replace("−", "-")) for side in sides)
            assert abs(left - right) < 0.006, line
            checked += 1
    assert checked == 8


def test_the_states_and_the_scan_of_the_primer():
    text = PAGES["course/primer.md"].read_text(encoding="utf-8").replace("−", "-")
    S = z = (0, 0, 0)
    last = []
    for number, (key, value) in enumerate(TOKENS, start=1):
        z = plus(z, features(key))
        S = plus(S, times(features(key), value))
        last.append(round(z[2]))
        assert re.search(rf"^  {number}  +{re.escape(triple(z))} +{re.escape(triple(S))}  ", text, re.M)
        if number == 2:
            assert f"z = {triple(z)}, S = {triple(S)}" in text
    start = [key[1] ** 2 for key, _ in TOKENS]
    once = [start[0], *(a + b for a, b in zip(start, start[1:], strict=False))]
    assert [*once[:2], *(a + b for a, b in zip(once, once[2:], strict=False))] == last
    rounds = {"start": start, r"\+ 1 place before": once, r"\+ 2 before": last, "shifted by one": [0, *last[:3]]}
    for name, numbers in rounds.items():
        assert re.search(rf"^{name} +" + " +".join(map(str, numbers)) + r"\b", text, re.M), name


def test_the_log_has_the_numbers_of_the_tables():
    """Every mean ± deviation stands in results/README.md, but for the table whose rows are no longer kept."""
    log = re.sub(r"\s+", " ", PAGES["results/LOG.md"].read_text(encoding="utf-8").split("## 2026-11-22")[0])
    tables = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    pairs = re.findall(r"(\.\d{3}) ± (\.\d{3})", log)
    assert len(pairs) >= 8
    for mean, deviation in pairs:
        assert f"0{mean} ± 0{deviation}" in tables, f"{mean} ± {deviation}"


def test_a_kernel_of_an_exercise_is_one_class_and_one_line(monkeypatch):
    """What CONTRIBUTING.md says of a new kernel, with the squared cosine of 1b."""
    from course.answers import Answer
    from rebased import kernels, linear_attention

    (solution,) = (COURSE / "solutions").glob("1b_*.py")
    monkeypatch.setitem(kernels.KERNELS, "squared_cosine", Answer("1b", solution).get("SquaredCosineKernel"))
    for name in list(kernels.KERNELS):
        if name != "squared_cosine":
            monkeypatch.delitem(kernels.KERNELS, name)
    kernels.check_features_equal_scores()
    linear_attention.check_forms_agree()
    linear_attention.check_first_row_is_v0()
