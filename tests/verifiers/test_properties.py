"""What is rendered is recognised, and nothing else is: numbers, fractions, tuples, sets, matrices in many spellings."""

from fractions import Fraction

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from verifiers import GroundTruthError, Verdict, check, verify
from verifiers.math.equal import equal

many = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

FRAMES = [
    "\\boxed{{{}}}",
    "so ${}$",
    "Final Answer: The final answer is ${}$. I hope it is correct.",
    "The answer is \\({}\\).",
    "{}",
]
integers = st.integers(-(10**9), 10**9)
fractions = st.builds(Fraction, st.integers(-10_000, 10_000), st.integers(1, 999))
decimals = st.builds(lambda n, k: Fraction(n, 10**k), st.integers(-(10**8), 10**8), st.integers(0, 6))
pick = st.sampled_from


def decimal_text(draw, x: Fraction) -> str:
    digits = 0
    while (x * 10**digits).denominator != 1:
        digits += 1
    whole, part = divmod(abs(x.numerator * 10**digits // x.denominator), 10**digits)
    text = (
        f"{whole:{draw(pick(['d', ',']))}}"
        + (f".{part:0{digits}d}" if digits else "")
        + draw(pick(["", ".0" if not digits else "0"]))
    )
    return ("-" if x < 0 else "") + text


@st.composite
def rendered(draw, x: Fraction) -> str:
    """A LaTeX spelling of a rational number."""
    sign, top, bottom = "-" if x < 0 else "", abs(x.numerator), x.denominator
    if bottom == 1:
        return draw(
            pick(
                [
                    f"{sign}{top}",
                    f"{sign}{top:,}".replace(",", "{,}"),
                    f"{sign} {top}",
                    f"{sign}\\frac{{{2 * top}}}{{2}}",
                    f"{{{sign}{top}}}",
                ]
            )
        )
    spellings = [f"{sign}\\frac{{{top}}}{{{bottom}}}", f"\\dfrac{{{sign}{top}}}{{{bottom}}}", f"{sign}{top}/{bottom}"]
    spellings += [
        f"{sign}\\tfrac{{{3 * top}}}{{{3 * bottom}}}",
        f"\\left({sign}\\frac{{{top}}}{{{bottom}}}\\right)",
        f"{sign}{top} \\div {bottom}",
    ]
    if top > bottom and x > 0:
        spellings.append(f"{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}")
    if top < 10 and bottom < 10:
        spellings.append(f"{sign}\\frac{top}{bottom}")
    return draw(pick(spellings))


@st.composite
def collection(draw, items: list, opening: str, closing: str, shuffle: bool = False) -> str:
    items = draw(st.permutations(items)) if shuffle else items
    left, right = draw(pick([("", ""), ("\\left", "\\right")]))
    comma = draw(pick([", ", ",\\ ", " , ", ",\\,"]))
    return left + opening + comma.join(draw(rendered(x)) for x in items) + right + closing


@st.composite
def matrix(draw, rows: list[list[Fraction]]) -> str:
    kind = draw(pick(["pmatrix", "bmatrix"]))
    body = draw(pick(["\\\\", " \\\\ ", "\\\\\n"])).join("&".join(draw(rendered(x)) for x in row) for row in rows)
    return f"\\begin{{{kind}}}{body}\\end{{{kind}}}"


@many
@given(st.data(), st.one_of(integers.map(Fraction), decimals))
def test_gsm8k_recognises_its_number(data, x):
    text = decimal_text(data.draw, x)
    frame = data.draw(
        pick(
            [
                "#### {}",
                "The answer is {}.",
                "it is ${} in all",
                "**{}**",
                "\\boxed{{{}}}",
                "so {} apples",
                "1 + 1, so {} %",
            ]
        )
    )
    assert verify(frame.format(text), decimal_text(data.draw, x), "gsm8k").score == 1


@many
@given(st.data(), decimals, decimals)
def test_gsm8k_refuses_another_number(data, x, y):
    assume(x != y)
    assert verify(f"#### {decimal_text(data.draw, x)}", decimal_text(data.draw, y), "gsm8k").score == 0


@many
@given(st.data(), st.one_of(integers.map(Fraction), fractions))
def test_math_recognises_its_number(data, x):
    assert verify(data.draw(pick(FRAMES)).format(data.draw(rendered(x))), data.draw(rendered(x)), "math").score == 1


@many
@given(st.data(), fractions, fractions)
def test_math_refuses_another_number(data, x, y):
    assume(x != y)
    assert verify(data.draw(pick(FRAMES)).format(data.draw(rendered(x))), data.draw(rendered(y)), "math").score == 0


@many
@given(st.data(), st.lists(fractions, min_size=2, max_size=5))
def test_tuples_by_place(data, xs):
    a, b = data.draw(collection(xs, "(", ")")), data.draw(collection(xs, "(", ")"))
    assert verify(f"\\boxed{{{a}}}", b, "math").score == 1
    other = xs[1:] + xs[:1]
    assert equal(data.draw(collection(other, "(", ")")), b) == (other == xs)
    assert not equal(data.draw(collection([*xs, xs[0]], "(", ")")), b)
    assert not equal(data.draw(collection(xs, "[", ")")), b)


@many
@given(st.data(), st.lists(fractions, min_size=1, max_size=5, unique=True), fractions)
def test_sets_in_any_order(data, xs, y):
    a, b = data.draw(collection(xs, "\\{", "\\}", True)), data.draw(collection(xs, "\\{", "\\}", True))
    assert verify(f"the set is ${a}$", b, "math").score == 1
    assume(y not in xs)
    assert not equal(data.draw(collection([y, *xs[1:]], "\\{", "\\}", True)), b)
    assert equal(data.draw(collection([*xs, xs[0]], "\\{", "\\}", True)), b)


@many
@given(st.data(), st.integers(1, 3), st.integers(1, 3), fractions)
def test_matrices_entry_by_entry(data, height, width, y):
    rows = data.draw(st.lists(st.lists(fractions, min_size=width, max_size=width), min_size=height, max_size=height))
    a, b = data.draw(matrix(rows)), data.draw(matrix(rows))
    assert verify(f"\\[\\boxed{{{a}}}\\]", b, "math").score == 1
    assume(rows[0][0] != y)
    assert not equal(data.draw(matrix([[y, *rows[0][1:]], *rows[1:]])), b)


@many
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=5), st.integers(-5, 5))
def test_polynomials_by_value(coefficients, shift):
    expanded = "+".join(f"{c}x^{{{n}}}" for n, c in enumerate(coefficients))
    nested = "0"
    for c in reversed(coefficients):
        nested = f"({nested})x+({c})"
    assert equal(nested, expanded) and equal(expanded, nested)
    assert equal(f"{nested}+{shift}", expanded) == (shift == 0)


@many
@given(st.integers(2, 200), st.integers(1, 20))
def test_roots(n, k):
    assert equal(f"\\sqrt{{{n * k * k}}}", f"{k}\\sqrt{{{n}}}") and equal(
        f"\\frac{{{n}}}{{\\sqrt{{{n}}}}}", f"\\sqrt{{{n}}}"
    )
    assert not equal(f"\\sqrt{{{n * k * k + 1}}}", f"{k}\\sqrt{{{n}}}")
    assert not equal(f"{(n * k * k) ** 0.5:.6f}1", f"{k}\\sqrt{{{n}}}")


@many
@given(fractions, fractions, st.sampled_from(["\\text{ or }", ", ", "\\text{ and }", "; "]))
def test_two_answers_are_not_one(x, y, between):
    assume(x != y)
    for both in (f"{x}{between}{y}", f"{y}{between}{x}"):
        assert verify(f"\\boxed{{{both}}}", str(x), "math").score == 0
    if x.denominator == 1 == y.denominator:
        assert verify(f"#### {x} or {y}", str(x), "gsm8k").score == 0


@many
@given(
    st.text(max_size=300),
    st.text(max_size=60),
    st.sampled_from(["gsm8k", "math", "ifeval", "ifeval_old"]),
    st.sampled_from(["default", "reference", "tulu3"]),
)
def test_any_text_gets_a_verdict(response, truth, family, mode):
    verdict = verify(response, truth, family, mode)
    assert isinstance(verdict, Verdict) and 0 <= verdict.score <= 1
    assert verdict == verify(response, truth, family, mode)
    verdict.reason.encode("utf-8")


latexish = st.lists(
    pick(
        [
            "\\frac",
            "{",
            "}",
            "(",
            ")",
            "[",
            "]",
            "1",
            "2",
            "x",
            "y",
            "^",
            "_",
            "+",
            "-",
            "=",
            ",",
            ".",
            "/",
            "\\sqrt",
            "\\pi",
            "|",
            "!",
            "\\text{a}",
            "\\cup",
            "\\pm",
            "<",
            "&",
            "\\\\",
            "$",
            "%",
            "\\{",
            "\\}",
            "sin",
            "e",
            "i",
        ]
    ),
    max_size=25,
)


@many
@given(latexish, latexish)
def test_any_latex_gets_the_same_verdict_both_ways(a, b):
    a, b = "".join(a), "".join(b)
    assert equal(a, b) == equal(b, a)
    verify(a, b, "math", "reference")


# --- ground truths ----------------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=True) | st.text(max_size=6)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
IDS = st.sampled_from(
    ["keywords:existence", "length_constraints:number_words", "language:response_language", "no:such"]
)
IFEVAL = st.fixed_dictionaries(
    {"instruction_id": st.lists(IDS | JSON, max_size=3) | IDS | JSON, "kwargs": st.lists(JSON, max_size=3) | JSON}
)
TULU = st.fixed_dictionaries(
    {"func_name": st.sampled_from(["validate_no_commas", "verify_paragraph_count"]) | JSON, "N": JSON}
)


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(["gsm8k", "math", "ifeval", "ifeval_old"]) | JSON,
    JSON | IFEVAL | TULU,
    st.sampled_from(["default", "reference", "tulu3"]),
)
def test_a_row_is_judged_or_refused_in_one_line(dataset, ground_truth, mode):
    """Whatever a file holds: a refusal names what was expected, a row that is let through gets a verdict."""
    try:
        check(dataset, ground_truth, mode)
    except GroundTruthError as problem:
        assert "\n" not in str(problem)
        return
    assert verify("a response", ground_truth, dataset, mode).status == "ok"
