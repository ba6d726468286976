"""Inputs that nobody thought of: the right value or the documented error, never a silent wrong number.

hypothesis draws shapes, types, strides, magnitudes and bytes for the public functions of 01, 02 and 03 and for the
readers of text, and shrinks what fails to the smallest case. It is no requirement: without it (pip install hypothesis)
this file is skipped.

  python -m pytest tests/test_hypothesis.py              some dozen cases of each, always the same ones: 10 seconds
  python -m pytest -m slow tests/test_hypothesis.py      thousands of each, others every time: minutes

The last line says how many cases there were. Right means: as in float64, by the definition (`quadratic_attention`) or
by formulas written here. Inputs of the forms are positive where digits are compared: then no normaliser is near zero.
"""

import gzip
import io
import json
import math
import os
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rebased import EPS, kernels, pile_data, tokens
from rebased import linear_attention as la
from rebased import model as m
from rebased.lesson import Refusal

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", tempfile.gettempdir())
CASES = Counter()
QUICK = [pytest.param(20, id="quick"), pytest.param(500, marks=pytest.mark.slow, id="slow")]
FORMS = {
    "quadratic": la.quadratic_attention,
    "linear": la.linear_attention,
    "recurrent": la.recurrent_attention,
    "chunked": partial(la.chunked_attention, chunk_size=5),
    "attention": la.attention,
}
WITH_STATE = ("recurrent", "chunked", "attention")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def count_of_cases(request):
    yield
    manager = request.config.pluginmanager.get_plugin("capturemanager")
    with manager.global_and_fixture_disabled():
        print(f"\n{CASES.total():,} cases by hypothesis, of {len(CASES)} properties")


def drive(examples, **strategies):
    """Decorator: call a function with many draws, now."""
    quick = examples <= 100

    def run(function):
        @settings(max_examples=examples, derandomize=quick, database=None, deadline=None,
                  suppress_health_check=list(HealthCheck))
        @given(**strategies)
        def counted(**drawn):
            CASES[function.__name__] += 1
            function(**drawn)

        counted()

    return run


# Tensors as users have them
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every second": lambda x: torch.stack([x, torch.full_like(x, math.nan)], dim=3).flatten(2, 3)[:, :, ::2],
    "inside a larger one": lambda x: torch.nn.functional.pad(x, (2, 3), value=math.nan)[..., 2:-3],
    "from the end": lambda x: x.flip(-1).contiguous().flip(-1),
    "last first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
}
layouts = st.sampled_from(list(LAYOUTS))
names = st.sampled_from(list(kernels.KERNELS))
dtypes = st.sampled_from(DTYPES)
default_types = st.sampled_from(DTYPES[:2])
any_form = st.sampled_from(list(FORMS))
any_form_with_state = st.sampled_from(WITH_STATE)
seeds = st.integers(0, 2**31)
sizes = st.fixed_dictionaries({
    "B": st.integers(1, 3), "H": st.integers(1, 3), "T": st.integers(1, 40), "D": st.integers(1, 6),
    "Dv": st.integers(1, 5), "seed": seeds,
})


def positive(B, H, T, D, Dv, seed, dtype=torch.float64):
    """q, k from U(0.1, 1.1) and v from N(0, 1), rounded to a type and given back in float64 and in that type."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.rand(2, B, H, T, D, generator=generator, dtype=torch.float64) + 0.1
    v = torch.randn(B, H, T, Dv, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v)]


def error_of(found, expected):
    """‖found − expected‖ / ‖expected‖."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def allowed(dtype):
    """Relative error of an output in this type; sums are in float32 at least."""
    return 1e-9 if dtype == torch.float64 else max(1e-5, 2 * torch.finfo(dtype).eps)


# 01
@pytest.mark.parametrize("examples", QUICK)
def test_features_are_scores_and_scores_are_the_formula(examples):
    """Any leading shape, size, floor and layout; float64."""

    @drive(examples, name=names, lead=st.lists(st.integers(1, 3), min_size=2, max_size=2), N=st.integers(1, 5),
           T=st.integers(1, 7), D=st.integers(1, 9), floor=st.floats(0, 10), layout=layouts, seed=seeds)
    def features(name, lead, N, T, D, floor, layout, seed):
        torch.manual_seed(seed)
        kernel = kernels.KERNELS[name](D)
        kernel.floor = floor
        q = LAYOUTS[layout](torch.randn(*lead, N, D, dtype=torch.float64))
        k = LAYOUTS[layout](torch.randn(*lead, T, D, dtype=torch.float64))
        scores = kernel.scores(q, k)
        phi = kernel.features(q) @ kernel.features(k).mT
        assert scores.shape == (*lead, N, T) and kernel.num_features == kernel.features(q).shape[-1]
        torch.testing.assert_close(phi, scores, rtol=1e-9, atol=1e-9)
        s = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) / math.sqrt(D)
        if name.startswith("based"):
            expected = (1 + s) ** 2 / 2
        elif name.startswith("elementwise"):
            expected = (q.square().unsqueeze(-2) * k.square().unsqueeze(-3)).sum(-1)
        elif name == "elu":
            positive_part = [torch.where(x > 0, x + 1, x.clamp(max=0).exp()) for x in (q, k)]
            expected = positive_part[0] @ positive_part[1].mT
        else:
            expected = s**2
        torch.testing.assert_close(scores, expected + floor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("examples", QUICK)
def test_prepare_is_the_formula(examples):
    """γ·norm(x) + β with the steps of the kernel, in every type, also of one number and of magnitude 1e±30."""

    @drive(examples, name=names, heads=st.integers(1, 3), D=st.integers(1, 6), T=st.integers(1, 5),
           scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e3, 1e15]), dtype=default_types, layout=layouts,
           seed=seeds)
    def prepare(name, heads, D, T, scale, dtype, layout, seed):
        torch.manual_seed(seed)
        kernel = kernels.KERNELS[name](D, heads=heads).to(dtype)
        for parameter in kernel.parameters():
            torch.nn.init.normal_(parameter)
        x = scale * torch.randn(2, T, heads * D, dtype=dtype)
        view = LAYOUTS[layout](x.unsqueeze(1)).squeeze(1)
        before = view.clone()
        learned = dict(kernel.named_parameters())
        for prepared, side in zip(kernel.prepare(view, view), "qk", strict=True):
            y = x.double()
            if kernel_normalises(kernel):
                y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
            for one in (f"gamma_{side}", f"norm_{side}.weight"):
                y = y * learned.get(one, torch.ones(1)).double()
            for one in (f"beta_{side}", f"norm_{side}.bias"):
                y = y + learned.get(one, torch.zeros(1)).double()
            assert prepared.shape == x.shape and prepared.dtype == dtype
            torch.testing.assert_close(prepared.double(), y, rtol=1e-3, atol=1e-3)
        assert torch.equal(view, before)


def kernel_normalises(kernel):
    """Whether `prepare` of this kernel has a norm."""
    return getattr(kernel, "norm", False) or isinstance(getattr(kernel, "norm_q", None), torch.nn.LayerNorm)


ODD = st.one_of(
    st.none(), st.text(max_size=3), st.integers(), st.lists(st.floats(), max_size=3),
    st.sampled_from([torch.int64, torch.bool, torch.complex64]).map(lambda dtype: torch.ones(2, 2, 3, 4, dtype=dtype)),
)


@pytest.mark.parametrize("examples", QUICK)
def test_what_is_no_float_tensor_is_a_type_error(examples):
    @drive(examples, odd=ODD, place=st.integers(0, 2), name=names, form=any_form)
    def types(odd, place, name, form):
        inputs = [torch.ones(2, 2, 3, 4) for _ in range(3)]
        inputs[place] = odd
        kernel = kernels.KERNELS[name](4, heads=2)
        with pytest.raises(TypeError, match="floating-point"):
            FORMS[form](*inputs, kernel)
        with pytest.raises(TypeError, match="floating-point"):
            kernel.features(odd)


@pytest.mark.parametrize("examples", QUICK)
def test_shapes_that_do_not_fit_are_a_value_error_in_a_line_or_two(examples):
    """Whatever the shapes: all forms give (B, H, T, Dv), or all refuse; empty tensors and scalars are refused."""
    shapes = st.lists(st.integers(0, 3), min_size=0, max_size=5)

    @drive(3 * examples, q=shapes, k=shapes, v=shapes, alike=st.booleans(), name=names, form=any_form)
    def refuse(q, k, v, alike, name, form):
        if alike:  # else nearly nothing would fit
            k = q
            v = q[:-1] + v[-1:]
        kernel = kernels.KERNELS[name](2)
        inputs = [torch.ones(shape) for shape in (q, k, v)]
        fits = len(q) == len(k) == len(v) == 4 and q == k and q[:3] == v[:3] and q[3] == 2 and 0 not in (*q, *v)
        if fits:
            assert FORMS[form](*inputs, kernel).shape == (*q[:3], v[3])
            return
        with pytest.raises(ValueError) as error:
            FORMS[form](*inputs, kernel)
        assert len(str(error.value).splitlines()) <= 2


# 02
@pytest.mark.parametrize("examples", QUICK)
def test_every_form_is_the_definition(examples):
    """Mixed types, any layout, under autocast or inference mode, with another default type: o in the type of v, within
    its digits; inputs stay as they are."""

    @drive(3 * examples, sizes=sizes, types=st.tuples(dtypes, dtypes, dtypes),
           arranged=st.tuples(layouts, layouts, layouts), name=names, form=any_form, autocast=st.booleans(),
           inference=st.booleans(), default=default_types)
    def forms(sizes, types, arranged, name, form, autocast, inference, default):
        kernel = kernels.KERNELS[name](sizes["D"])
        rounded = [x.to(dtype) for x, dtype in zip(positive(**sizes), types, strict=True)]
        inputs = [LAYOUTS[layout](x) for x, layout in zip(rounded, arranged, strict=True)]
        expected = la.quadratic_attention(*(x.double() for x in rounded), kernel)
        torch.set_default_dtype(default)
        try:
            with torch.inference_mode(inference), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                o = FORMS[form](*inputs, kernel)
        finally:
            torch.set_default_dtype(torch.float32)
        assert o.dtype == types[2] and o.shape == expected.shape
        # Sums are in float64 only if an input is.
        sums = torch.float64 if torch.float64 in types else torch.float32
        assert error_of(o, expected) < max(allowed(types[2]), allowed(sums))
        assert all(torch.equal(x, before) for x, before in zip(inputs, rounded, strict=True))


@pytest.mark.parametrize("examples", QUICK)
def test_gradients_of_every_form_are_those_of_the_definition(examples):
    """Through the output and the final state; of expanded inputs, too: one key for all heads."""

    @drive(examples, sizes=sizes, name=names, form=any_form_with_state, expanded=st.booleans(),
           cut=st.integers(0, 40))
    def gradients(sizes, name, form, expanded, cut):
        kernel = kernels.KERNELS[name](sizes["D"])
        q, k, v = positive(**sizes)
        if expanded:
            k = k[:, :1]
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        q, k, v = leaves[0], leaves[1].expand_as(q), leaves[2]
        cut = min(cut, sizes["T"] - 1)
        first, state = [], None
        if cut:
            first, state = FORMS[form](q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], kernel, return_state=True)
            first = [first]
        second, final = FORMS[form](q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], kernel, state, return_state=True)
        o = torch.cat([*first, second], dim=2)
        phi = kernel.features(k)
        expected = [la.quadratic_attention(q, k, v, kernel), phi.mT @ v, phi.sum(2)]
        for found, right in zip([o, *final], expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)
        found = torch.autograd.grad(sum(x.sin().sum() for x in (o, *final)), leaves)
        right = torch.autograd.grad(sum(x.sin().sum() for x in expected), leaves)
        for one, other in zip(found, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("examples", QUICK)
def test_steps_after_any_form_go_on(examples):
    """A state of any form, float32 or float64, and then token by token, in any type."""

    @drive(examples, sizes=sizes, name=names, form=any_form_with_state, cut=st.integers(1, 40), dtype=dtypes)
    def steps(sizes, name, form, cut, dtype):
        kernel = kernels.KERNELS[name](sizes["D"])
        q, k, v = positive(**sizes, dtype=dtype)
        cut = min(cut, sizes["T"])
        _, state = FORMS[form](q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], kernel, return_state=True)
        kept = [x.clone() for x in state]
        assert state.S.dtype == state.z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = la.quadratic_attention(q.double(), k.double(), v.double(), kernel)
        first = state
        for t in range(cut, sizes["T"]):
            o, state = la.recurrent_step(q[:, :, t], k[:, :, t], v[:, :, t], kernel, state)
            assert o.dtype == dtype and error_of(o, expected[:, :, t]) < allowed(dtype)
        assert all(torch.equal(x, before) for x, before in zip(first, kept, strict=True))


@pytest.mark.parametrize("examples", QUICK)
def test_what_is_no_number_stays_in_its_sequence_and_head(examples):
    """NaN or an infinity in q, k or v of one head: outputs, states and gradients of all others, bit for bit."""

    @drive(2 * examples, sizes=sizes, name=names, form=any_form, bad=st.sampled_from([math.nan, math.inf, -math.inf]),
           spoilt=st.integers(0, 2), where=st.tuples(*[st.integers(0, 39)] * 4), dtype=default_types)
    def bystanders(sizes, name, form, bad, spoilt, where, dtype):
        kernel = kernels.KERNELS[name](sizes["D"])
        clean = positive(**sizes, dtype=dtype)
        broken = [x.clone() for x in clean]
        place = tuple(i % n for i, n in zip(where, broken[spoilt].shape, strict=True))
        broken[spoilt][place] = bad
        others = torch.ones(sizes["B"], sizes["H"], dtype=torch.bool)
        others[place[:2]] = False
        results = []
        for inputs in (clean, broken):
            leaves = [x.requires_grad_() for x in inputs]
            options = {"return_state": True} if form in WITH_STATE else {}
            found = FORMS[form](*leaves, kernel, **options)
            o, state = found if options else (found, ())
            gradients = torch.autograd.grad(o.sin().sum(), leaves)
            results.append([x[others] for x in (o, *state, *gradients)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("examples", QUICK)
def test_magnitudes_of_1e30_are_right_or_no_numbers(examples):
    """float32 holds 1e±38, and a square of 1e±30 is beyond: the value of float64, or NaN or infinity; never a number
    that is wrong. Values of that size are averaged as any.

    One exception is known: where the weights add up to infinity and the values are so small that num does not, o is
    0. It is never larger than the values.
    """

    @drive(2 * examples, sizes=sizes,
           name=st.sampled_from(["based", "based_no_floor", "x2", "x2_floor", "elu", "elementwise"]), form=any_form,
           powers=st.tuples(*[st.sampled_from([-30, 0, 30])] * 3))
    def magnitudes(sizes, name, form, powers):
        kernel = kernels.KERNELS[name](sizes["D"])
        inputs = [x.float() * 10.0**power for x, power in zip(positive(**sizes), powers, strict=True)]
        found = FORMS[form](*inputs, kernel).double()
        expected = la.quadratic_attention(*(x.double() for x in inputs), kernel)
        den = kernel.scores(*(x.double() for x in inputs[:2])).tril().sum(-1, keepdim=True)
        numbers = found.isfinite() & expected.isfinite()
        largest = inputs[2].double().abs().max()
        assert ((found - expected).abs()[numbers & (den < 1e38)] <= 1e-4 * largest).all()
        assert (found.abs()[numbers] <= 1.0001 * largest).all()
        if powers[0] == powers[1] == 0:
            assert numbers.all()


@pytest.mark.parametrize("examples", QUICK)
def test_a_state_that_does_not_fit_is_refused(examples):
    shapes = st.lists(st.integers(0, 4), min_size=0, max_size=4).map(torch.zeros)
    pairs = st.tuples(shapes, shapes)

    @drive(examples, form=any_form_with_state, name=names, state=st.one_of(
        pairs, pairs.map(lambda pair: la.State(*pair)), st.integers(1, 9), st.text(min_size=1), pairs.map(list)))
    def states(form, name, state):
        kernel = kernels.KERNELS[name](2)
        inputs = [torch.ones(1, 2, 3, 2) for _ in range(3)]
        with pytest.raises((ValueError, TypeError), match="state must be") as error:
            FORMS[form](*inputs, kernel, state)
        assert isinstance(error.value, ValueError if isinstance(state, la.State) else TypeError)


# 03
mixers = st.sampled_from(["attention", "conv_attention", *kernels.KERNELS])


@pytest.mark.parametrize("examples", QUICK)
def test_models_say_the_same_in_every_way(examples):
    """All places at once, a prompt in any two parts, token by token, a few places only; whatever the default type."""

    @drive(examples, mixer=mixers, heads=st.integers(1, 3), width=st.integers(1, 4), mlp=st.integers(0, 5),
           positions=st.booleans(), norm=st.sampled_from(["layer", "rms"]), T=st.integers(2, 12),
           cut=st.integers(1, 11), below=st.sampled_from(["short_conv", "gated_conv"]), seed=seeds,
           default=default_types)
    def ways(mixer, heads, width, mlp, positions, norm, T, cut, below, seed, default):
        torch.manual_seed(seed)
        layers = (below, *m.two_layers(mixer)[1:])
        config = m.ModelConfig(layers, 9, heads * width, heads, 2, T * positions, norm, mlp, init="wide")
        torch.set_default_dtype(default)
        try:
            language_model = m.LanguageModel(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        assert {p.dtype for p in language_model.parameters()} == {default}
        language_model = language_model.double()
        text = torch.randint(9, (2, T))
        with torch.no_grad():
            whole = language_model(text)
            cut = min(cut, T - 1)
            first, states = language_model.prefill(text[:, :cut])
            second, after = language_model.prefill(text[:, cut:], states)
            stepped = []
            for t in range(cut, T):
                logits, states = language_model.step(text[:, t], states)
                stepped.append(logits)
            places = torch.randint(T, (2, 3))
            few = language_model.logits_at(text, places)
        close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
        close(first, whole[:, cut - 1])
        close(second, whole[:, -1])
        close(torch.stack(stepped, dim=1), whole[:, cut:])
        close(few, torch.stack([whole[b, places[b]] for b in range(2)]))
        assert after.length == states.length == T


@pytest.mark.parametrize("examples", QUICK)
def test_tokens_that_cannot_be_are_a_value_error(examples):
    language_model = m.small_model("rebased")
    shapes = st.lists(st.integers(0, 3), min_size=0, max_size=3)

    @drive(examples, shape=shapes, low=st.integers(-3, 25),
           dtype=st.sampled_from([torch.int64, torch.int32, torch.float32]))
    def refuse_tokens(shape, low, dtype):
        text = torch.full(shape, low, dtype=dtype)
        if dtype == torch.int64 and len(shape) == 2 and 0 not in shape and 0 <= low < 20:
            assert language_model(text).shape == (*shape, 20)
            return
        for call in (language_model, language_model.prefill, language_model.embed):
            with pytest.raises(ValueError, match="tokens must"):
                call(text)


@pytest.mark.parametrize("examples", QUICK)
def test_probabilities_are_the_formula(examples):
    """exp(logit / temperature) of the k largest, divided by their sum; logits of any size."""

    @drive(examples, logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9),
           temperature=st.floats(0.01, 100), top_k=st.one_of(st.none(), st.integers(1, 12)))
    def probabilities(logits, temperature, top_k):
        found = m.token_probabilities(torch.tensor([logits], dtype=torch.float64), temperature, top_k)[0].tolist()
        kept = sorted(logits, reverse=True)[: top_k or len(logits)]
        weights = [math.exp((x - kept[0]) / temperature) for x in kept]
        total = sum(weights)
        largest = sorted(found, reverse=True)[: len(kept)]
        assert largest == pytest.approx([weight / total for weight in weights], rel=1e-6, abs=1e-12)
        assert sum(p > 0 for p in found) <= len(kept) and sum(found) == pytest.approx(1)


@pytest.mark.parametrize("examples", QUICK)
def test_the_convolution_is_conv1d(examples):
    @drive(examples, B=st.integers(1, 3), T=st.integers(1, 9), d=st.integers(1, 5), bias=st.booleans(),
           cut=st.integers(0, 9), layout=layouts, seed=seeds)
    def convolution(B, T, d, bias, cut, layout, seed):
        torch.manual_seed(seed)
        conv = torch.nn.Conv1d(d, d, 3, groups=d, bias=bias).double()
        x = torch.randn(B, T, d, dtype=torch.float64)
        u = LAYOUTS[layout](x.unsqueeze(1)).squeeze(1)
        expected = conv(torch.nn.functional.pad(x.mT, (2, 0))).mT
        cut = min(cut, T)
        first, last = m.causal_conv3(u[:, :cut], conv.weight, conv.bias)
        second, last = m.causal_conv3(u[:, cut:], conv.weight, conv.bias, last)
        torch.testing.assert_close(torch.cat([first, second], dim=1), expected)
        assert torch.equal(last, torch.cat([x.new_zeros(B, 2, d), x], dim=1)[:, -2:])


# Readers of text
kinds = st.sampled_from(["jsonl", "jsonl.gz", "jsonl.zst"])
texts = st.text(st.characters(codec="utf-8"), max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("pile_set_name") | texts, inner, max_size=3),
    max_leaves=6,
)
fields = {"text": texts | json_values, "contents": texts | json_values, "meta": json_values, "metadata": json_values}
documents = st.fixed_dictionaries({}, optional=fields)


@pytest.mark.parametrize("examples", QUICK)
def test_any_line_is_a_document_or_a_reason(examples):
    """Bytes of any kind: parse gives text and subset, both text, or a ValueError of one line."""
    some_lines = st.one_of(st.binary(max_size=60), documents.map(lambda x: json.dumps(x).encode()),
                           documents.map(lambda x: json.dumps(x, ensure_ascii=False).encode("utf-8", "surrogatepass")),
                           st.integers(1, 5000).map(lambda n: b"[" * n), st.none(),
                           st.text(max_size=9).map(lambda t: json.dumps({"text": t}).encode()))

    @drive(10 * examples, line=some_lines)
    def parse(line):
        try:
            text, subset = pile_data.parse(line)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1 and not isinstance(error, json.JSONDecodeError)
            return
        item = json.loads(line.decode("utf-8-sig"))
        assert text == (item["text"] if "text" in item else item["contents"]) and text
        assert subset and isinstance(subset, str)
        text.encode("utf-8")


@pytest.mark.parametrize("examples", QUICK)
def test_lines_do_not_depend_on_where_the_pieces_end(examples):
    """As bytes.split has them, numbered from 1; what is over the limit is None; the end of a file is no line."""

    few = st.lists(st.sampled_from([b"\n", b"a", b"bc\n", b"", b"\r", b"\x00" * 5]), max_size=6)

    @drive(5 * examples, parts=st.lists(few.map(b"".join), max_size=8), limit=st.integers(1, 20))
    def lines(parts, limit):
        longest = pile_data.LONGEST_LINE
        pile_data.LONGEST_LINE = limit
        try:
            found = list(pile_data.lines(iter(parts)))
        finally:
            pile_data.LONGEST_LINE = longest
        expected = b"".join(parts).split(b"\n")
        if not expected[-1]:
            expected.pop()
        assert found == [(i, line if len(line) <= limit else None) for i, line in enumerate(expected, 1)]


def compressed(data, kind):
    if kind == "jsonl.gz":
        return gzip.compress(data, 1)
    if kind == "jsonl.zst":
        return pytest.importorskip("zstandard").ZstdCompressor(level=1).compress(data)
    return data


@pytest.mark.parametrize("examples", QUICK)
def test_documents_that_are_written_are_read(examples, tmp_path):
    """In one file or several, in every layout; broken lines between them cost nothing but themselves."""

    @drive(examples, rows=st.lists(texts.filter(bool), min_size=1, max_size=6), kind=kinds,
           noise=st.lists(st.binary(max_size=9).filter(lambda b: b"\n" not in b), max_size=6), members=st.booleans())
    def read(rows, kind, noise, members):
        written = []
        for i, text in enumerate(rows):
            written.append(json.dumps({"text": text, "meta": {"pile_set_name": f"s{i}"}}).encode() + b"\n")
            written += [line + b"\n" for line in noise[i : i + 1]]
        path = tmp_path / f"a.{kind}"
        if members:  # several gzip members, or zstd frames, or nothing special
            path.write_bytes(b"".join(compressed(line, kind) for line in written))
        else:
            path.write_bytes(compressed(b"".join(written), kind))
        with tempfile.TemporaryFile("w") as quiet, pytest.MonkeyPatch.context() as patch:
            patch.setattr(pile_data.sys, "stderr", quiet)
            found = list(pile_data.read_documents([path]))
        path.unlink()
        assert [text for text, _ in found if text in rows] == [text for text, _ in found] == rows
        assert [subset for _, subset in found] == [f"s{i}" for i in range(len(rows))]


@pytest.mark.parametrize("examples", QUICK)
def test_a_damaged_file_gives_a_beginning(examples, tmp_path):
    """Cut anywhere, or with bytes exchanged: documents from the beginning in their order, no error but a Refusal."""

    @drive(2 * examples, rows=st.lists(texts.filter(bool), min_size=1, max_size=6), kind=kinds,
           cut=st.integers(0, 300), at=st.integers(0, 300), byte=st.integers(0, 255), truncate=st.booleans())
    def damaged(rows, kind, cut, at, byte, truncate):
        data = bytearray(compressed(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in rows), kind))
        if truncate:
            data = data[: cut % len(data)]
        else:
            data[at % len(data)] = byte
        path = tmp_path / f"a.{kind}"
        path.write_bytes(data)
        problems = pile_data.Problems()
        with tempfile.TemporaryFile("w") as quiet, pytest.MonkeyPatch.context() as patch:
            patch.setattr(pile_data.sys, "stderr", quiet)
            found = [text for text, _ in pile_data.read_documents([path], problems)]
        if truncate:
            assert found == rows[: len(found)]
        elif kind == "jsonl":
            assert sum(a not in rows for a in found) <= 1 and len(found) >= len(rows) - 2
        assert found or problems.counts


@pytest.mark.parametrize("examples", QUICK)
def test_bytes_come_back(examples):
    """Of any text but its zero bytes; tokens stand for as many bytes as there are."""

    @drive(5 * examples, text=texts, share=st.floats(0.001, 0.999))
    def come_back(text, share):
        vocabulary = tokens.Bytes()
        ids, num_bytes, zeros = vocabulary.encode(text)
        assert vocabulary.decode(ids.tolist()) == text.replace("\0", "")
        assert num_bytes == len(ids) == len(text.encode()) - zeros and zeros == text.count("\0")
        assert vocabulary.separator not in ids
        assert tokens.is_validation(text, share) == tokens.is_validation(text, share)
        assert not tokens.is_validation(text, share / 2) or tokens.is_validation(text, share)


@pytest.mark.parametrize("examples", QUICK)
def test_tokens_on_disk_are_the_documents(examples, monkeypatch):
    """Every document once, in its part, with its bytes and its subset; or the refusal of a file without documents."""
    monkeypatch.setattr("sys.stderr", io.StringIO())

    @drive(examples // 3, rows=st.lists(st.tuples(texts, st.sampled_from("ABC")), min_size=0, max_size=9))
    def stored(rows):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.jsonl"
            path.write_bytes(b"".join(json.dumps({"text": text, "meta": {"pile_set_name": name}}).encode() + b"\n"
                                      for text, name in rows))
            kept = [(text, name) for text, name in rows if text]
            if not kept:
                with pytest.raises(Refusal, match="not one document"):
                    tokens.load_data([path], tokens.Bytes(), 0.5, Path(folder) / "t")
                return
            data = tokens.load_data([path], tokens.Bytes(), 0.5, Path(folder) / "t")
            valid = [(text, name) for text, name in kept if tokens.is_validation(text, 0.5)]
            train = [text for text, _ in kept if not tokens.is_validation(text, 0.5)]
            stream = b"".join(text.replace("\0", "").encode() + b"\0" for text in train)
            assert data.train[:].tobytes() == stream
            assert len(data.valid_docs) == len(valid)
            for (start, n, num_bytes, subset), (text, name) in zip(data.valid_docs.tolist(), valid, strict=True):
                expected = text.replace("\0", "").encode()
                assert data.valid[start : start + n].tobytes() == expected and num_bytes == len(expected)
                assert data.manifest["names"][subset] == name
            del data


def test_epsilon_is_the_documented_one():
    """What 01 promises beside 0/0: a row of weights that are all 0 gives 0, not NaN, in every form."""
    q = torch.zeros(1, 1, 3, 2)
    v = torch.ones(1, 1, 3, 2)
    for form in FORMS.values():
        assert torch.equal(form(q, q, v, kernels.KERNELS["x2"](2)), torch.zeros_like(v))
    assert 0 < EPS < 1e-9
