"""No response hangs, raises, executes or grows: 200 hostile ones a family, written by hand and generated.

`hostile` is shared with benchmarks/verifiers.py, which times them; here only the outcome counts, not the clock.
"""

import ast
import random
from pathlib import Path

import pytest

import verifiers
from tests.verifiers.arguments_of import NEW
from verifiers import Verdict, verify

FAMILIES = verifiers.VERIFIERS
CANARY = "verifier-canary-was-executed"
PAYLOADS = [
    f"__import__('os').system('touch {CANARY}')",
    f"open('{CANARY}', 'w')",
    f"exec(\"open('{CANARY}','w')\")",
    f"(lambda: open('{CANARY}', 'w'))()",
    f"[c for c in ().__class__.__base__.__subclasses__()][0] or open('{CANARY}','w')",
    f"!!python/object/apply:os.system ['touch {CANARY}']",
    "cposix\nsystem\n(S'touch " + CANARY + "'\ntR.",
    f"$(touch {CANARY})",
    f"`touch {CANARY}`",
    f"{{{{ open('{CANARY}','w') }}}}",
]
BOMBS = [
    "10**10**10", "10^{10^{10}}", "9^{9^{9^{9}}}", "999999999!", "100000!", "((9!)!)!", "1e999999999", "1" * 5000,
    "0." + "3" * 5000, "\\binom{10^9}{10^8}", "\\sqrt[1000000]{2}", "2^{0.5^{-100}}", "(x+1)^{10^6}",
    "e^{e^{e^{e^{10}}}}", "\\sin(10^{400})", "\\gcd(10^{300},7)", "\\lfloor e^{e^{9}} \\rfloor", "\\frac{1}{0}",
    "0^{-1}", "\\log 0", "\\tan(\\pi/2)", "i^{i^i}", "1/3/0", "+".join(["1"] * 300), "-" * 300 + "1",
    "x^" * 200 + "2", "x^{" * 200 + "2" + "}" * 200, "x_" * 200 + "1", "!" * 300, "5" + "!" * 50, "\\pm" * 100 + "1",
    "\\sqrt" * 200 + "2", "\\frac" * 200 + "12", "|" * 300 + "x" + "|" * 300, "\\{" * 200,
    "(" * 3000 + "1" + ")" * 3000, "[" * 3000, "{" * 3000 + "}" * 3000, "\\begin{pmatrix}" * 100,
    "\\begin{pmatrix}" + "1&" * 300 + "1\\end{pmatrix}",
    "\\begin{pmatrix}" + "\\\\".join(["&".join(["\\sqrt{2}"] * 8)] * 8) + "\\end{pmatrix}",
    ",".join(map(str, range(400))), "\\{" + ",".join(f"\\sqrt{{{i}}}" for i in range(90)) + "\\}",
    "\\cup".join(["[0,1)"] * 100), "<".join(["x"] * 300), "\\sin(" * 29 + "x" + ")" * 29, "\\sin" * 100 + "x",
    "\\sin a(" * 100, "f(" * 100, "x=" * 300 + "1", "a:b" * 200, "1_{" * 100, "\\text{" * 300, "\\log_" * 100 + "2",
    "\\overline{" * 100, "1,000," * 300, "1 1/2 " * 200, "\\sqrt[" * 100 + "2" + "]" * 100, "^" * 500, "_" * 500,
    "&" * 500,
]  # fmt: skip
WRAPPERS = [
    "{}",
    "\\boxed{{{}}}",
    "Final Answer: The final answer is ${}$. I hope it is correct.",
    "The answer is ${}$.",
    "#### {}",
    "\\[{}\\]",
]
REPEATED = [
    "\\boxed{", "\\boxed ", "\\fbox{", "$", "$$", "\\(", "\\[", "<think>", "</think>", "<|assistant|>\n",
    "<|im_end|>", "{", "}", "[", "]", "<<", ">>", "*", "**", "***", "* * *", "******", "-", "\n", "\n\n", " \n",
    "\n*", "\n- ", "\t", " ", "\x0b", "\x00", "\ud800", "\u200b", "\u202e", "e\u0301", "a", "A", "a ", "A. ", "Mr. ",
    "U.S. ", "a!", "?", ".", ". ", "...", ",", "a,", "1", "1,", "1,1", "1.", "1.1.", "-1", "1/", "1 ", "٣", "４", "²",
    "#### ", "#### 1\n", "answer is ", "Answer:\n", "Final Answer: The final answer is ", " I hope it is correct.",
    "A: ", "\nA:", "'", "\"", "n't ", "CAN'T ", "http://a.b/", "a@b.", "@", "a" * 64 + "@", "P.S.", "p.p.s ",
    "Section 1", "[name] ", "[", "{\"a\":", "[[", "null,", "\\text{", "\\frac", "=", "\\left", "你", "あ", "ह", "👍",
    "ß", "İ", "ﬁ", "K", "ſ", "\U000e0001", "\u2028", "\\overline{", "\\\\", "\\", "%", "^\\circ", "|",
    "answer is 1 or ",
]  # fmt: skip


def nested(opening: str, inside: str, closing: str, depth: int) -> str:
    return opening * depth + inside + closing * depth


A_THOUSAND = ",".join(map(str, range(1000)))
TAGGED = [
    f"<answer>{text}</answer>"
    for text in (
        "",
        " ",
        "\u200b",
        "a",
        "the",
        "a an the " * 200,
        "A" * 2000,
        "." * 2000,
        "-5" * 1000,
        "e\u0301" * 900,
        "1,000" * 400,
        "+" * 2000,
        "a+" * 1000,
        "x" * 100_000,
        "<answer>" * 3000,
        "</answer>" * 3000,
    )
]
OF_FAMILY = {
    "string_matcher": [*TAGGED, "<answer>" * 20_000, "</answer>" * 20_000, "<answer>a" * 20_000 + "</answer>"],
    "string_f1": [*TAGGED, "Paris " * 40_000, "a " * 1000, ". " * 1000, "Paris" * 400],
    "multiple_choice": [
        "\\boxed{" * 3000,
        "\\boxed{B" * 3000,
        "Answer: " * 500,
        "Answer: A or " * 300,
        "the answer is " * 300,
        "(A)" * 1300,
        "A) " * 1300,
        "A.\n" * 1300,
        "**A**" * 800,
        "\\text{" * 500,
        "\\text{A}" * 500,
        "A, " * 1300,
        "answer is the option choice letter " * 100,
        "Answer: " + "is the " * 40,
        "Answer: B" + " or" * 90,
        "A or B\n" * 600,
        "Answer: B " + "or C " * 55,
        "<answer>" * 500 + "B",
        "Answer:\n" * 500,
        "$A$" * 1300,
        "Answer: " + "((" * 140,
    ],
    "format": [
        "<think>" * 20_000,
        "</think>" * 20_000,
        "<think></think>" * 10_000,
        "<think>a</think><answer></answer>",
        "<think>" + "a" * 200_000 + "</think><answer>" + " " * 40_000 + "</answer>",
        "<answer>a</answer><think>b</think>",
        "<think><answer></think></answer>",
        "<think>\u200b</think><answer>\u200b</answer>",
    ],
    "json_schema": [
        nested("[", "1", "]", 8000),
        nested("[", "1", "]", 60),
        nested('{"a":', "1", "}", 2500),
        "[" * 16_000,
        nested('{"a":', "1", "}", 60),
        "1" * 16_000,
        "1e400",
        "NaN",
        "-Infinity",
        '{"a":1,"a":1}',
        '{"a"' * 3000,
        "{" + ",".join(f'"{i}":1' for i in range(1500)) + "}",
        '{"list":[' + '"a",' * 3000 + '"b"]}',
        "{" + ",".join(f'"{i}":1' for i in range(1500)) + ',"0":1}',
        f"[{A_THOUSAND}]",
        f'{{"list":[{A_THOUSAND}]}}',
        '{"name":"' + "a" * 16_000 + '"}',
        '{"name":"' + "ab" * 400 + '"}',
        '{"list":[' + "[]," * 4000 + "[]]}",
        "```json\n[1]\n```",
        '{"name":"' + "\\u0041" * 2000 + '"}',
        '{"list":[' + "1.5e300," * 1500 + "1]}",
        '{"tree":' + nested('{"next":', "null", "}", 60) + "}",
        '"' + "\\" * 9000,
        "```\n" * 3000,
    ],
}


def hostile(family: str, count: int = 200, seed: int = 0) -> list[str]:
    """`count` responses for a family: payloads and bombs in every wrapping, long repetitions, and random mixtures."""
    rng = random.Random(f"{seed} {family}")
    cases = ["", " ", "\x00", "\ud800\udfff", "a" * 10_000_000, "1" * 10_000_000, " " * 10_000_000, "$" * 10_000_000]
    cases += PAYLOADS + [rng.choice(WRAPPERS).format(text) for text in PAYLOADS]
    own = OF_FAMILY.get(family, [])
    cases += own + [text[:-1] for text in own]
    cases += [rng.choice(WRAPPERS).format(text) for text in rng.sample(BOMBS, 55)]
    cases += [text * (rng.choice((3000, 20_000, 200_000)) // len(text)) for text in rng.sample(REPEATED, 60)]
    while len(cases) < count:
        pieces = rng.choices(REPEATED + BOMBS[:20] + [text[:40] for text in own], k=rng.randint(2, 6))
        cases.append("".join(piece * rng.randint(1, max(1, 4000 // len(piece))) for piece in pieces)[:60_000])
    return cases[:count]


def truths(family: str) -> list:
    """Ground truths of the family that send a response through all of its code."""
    if family == "gsm8k":
        return ["42"]
    if family == "math":
        return ["\\frac{1}{2}", "x^2+\\sqrt{3}", "(1,\\pi]", "\\{1,2,3\\}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"]
    if family in OF_LABELS:
        return OF_LABELS[family]
    if family == "ifeval_old":
        names = {
            "verify_keywords": {"keyword_list": ["a"]},
            "verify_keyword_frequency": {"word": "a", "N": 3},
            "validate_forbidden_words": {"forbidden_words": ["a", "$5"]},
            "verify_letter_frequency": {"letter": "a", "N": 2},
            "verify_paragraph_count": {"N": 2},
            "validate_word_constraint": {"N": 5, "quantifier": "around"},
            "verify_sentence_constraint": {"N": 5, "quantifier": "at least"},
            "validate_paragraphs": {"N": 2, "first_word": "a", "i": 1},
            "verify_postscript": {"postscript_marker": "P.S."},
            "validate_placeholders": {"N": 2},
            "verify_bullet_points": {"N": 2},
            "validate_title": {},
            "validate_choice": {"options": ["a", "b"]},
            "validate_highlighted_sections": {"N": 2},
            "validate_sections": {"N": 2, "section_splitter": "a"},
            "validate_json_format": {},
            "validate_repeat_prompt": {"original_prompt": "a"},
            "validate_two_responses": {},
            "validate_uppercase": {},
            "validate_lowercase": {},
            "validate_frequency_capital_words": {"N": 2, "quantifier": "at most"},
            "validate_end": {"end_phrase": "a"},
            "validate_quotation": {},
            "validate_no_commas": {},
        }
        return [{"func_name": name, **arguments} for name, arguments in names.items()]
    return [{"instruction_id": [name], "kwargs": [arguments]} for name, arguments in (INSTRUCTIONS | NEW).items()]


OPTIONS = {"answer": "B", "options": ["Rome", "Paris", "Oslo", "a dog"]}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^(a|b|ab)*c$", "minLength": 1},
        "list": {"type": "array", "items": {"anyOf": [{"type": "integer", "multipleOf": 0.1}, {"type": "string"}]}},
        "tree": {"$ref": "#/$defs/node"},
    },
    "patternProperties": {"^x-[a-z]+$": {"enum": [1, "a", None, [1], {"a": 1}]}},
    "additionalProperties": {"$ref": "#/$defs/node"},
    "$defs": {
        "node": {"oneOf": [{"type": "null"}, {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}]}
    },
}
OF_LABELS = {
    "string_matcher": ["Paris", ["A", "the", "3.14"], "42"],
    "string_f1": ["the capital of France is Paris", ["a", "1,000"]],
    "multiple_choice": ["B", OPTIONS],
    "format": [{}, {"tags": ["think"]}, {"opened": True}, {"tags": ["a", "think", "answer"]}],
    "json_schema": [
        {},
        {"uniqueItems": True, "contains": {"const": 999}},
        SCHEMA,
        {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
    ],
}
INSTRUCTIONS = {
    "keywords:existence": {"keywords": ["a", "(x"]},
    "keywords:frequency": {"keyword": "a", "frequency": 2, "relation": "at least"},
    "keywords:forbidden_words": {"forbidden_words": ["a", "*"]},
    "keywords:letter_frequency": {"letter": "a", "let_frequency": 2, "let_relation": "less than"},
    "length_constraints:number_sentences": {"num_sentences": 3, "relation": "at least"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "length_constraints:number_words": {"num_words": 3, "relation": "less than"},
    "length_constraints:nth_paragraph_first_word": {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "a"},
    "detectable_content:number_placeholders": {"num_placeholders": 2},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:number_bullet_lists": {"num_bullets": 2},
    "detectable_format:constrained_response": {},
    "detectable_format:number_highlighted_sections": {"num_highlights": 2},
    "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": 2},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "combination:two_responses": {},
    "combination:repeat_prompt": {"prompt_to_repeat": "a"},
    "startend:end_checker": {"end_phrase": "a"},
    "startend:quotation": {},
    "change_case:capital_word_frequency": {"capital_frequency": 2, "capital_relation": "at least"},
    "punctuation:no_comma": {},
}
WITH_LANGUAGE = {
    "language:response_language": {"language": "en"},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
}


@pytest.mark.parametrize("mode", ["default", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_hostile_response_returns_a_verdict_and_runs_nothing(family, mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    all_truths = truths(family)
    for i, response in enumerate(hostile(family)):
        for truth in all_truths if len(response) < 5000 else [all_truths[(i + k) % len(all_truths)] for k in range(3)]:
            verdict = verify(response, truth, family, mode)
            assert isinstance(verdict, Verdict) and 0 <= verdict.score <= 1
            assert verdict.status == "ok" or mode == "reference"  # a regex keyword without a bound is an error there
            assert verdict.score == 0 or response.strip() or mode == "reference"
    assert not list(tmp_path.iterdir())


def test_language_detection_is_total_and_repeatable():
    pytest.importorskip("langdetect")
    truth = {"instruction_id": list(WITH_LANGUAGE), "kwargs": list(WITH_LANGUAGE.values())}
    for response in hostile("language", 60, seed=1):
        first = verify(response, truth, "ifeval")
        assert first.status == "ok"
        assert verify(response[::-1], truth, "ifeval").status == "ok"
        assert verify(response, truth, "ifeval") == first


@pytest.mark.parametrize("family", FAMILIES)
def test_hostile_ground_truths_are_errors_not_exceptions(family):
    bad = [
        None,
        5.5,
        [],
        {},
        "",
        "{",
        "[" * 100_000,
        "{'a': " * 1000,
        {"func_name": None},
        {"func_name": "validate_no_comma"},
        b"x",
        object(),
    ]
    bad += [
        {"instruction_id": ["no:such"], "kwargs": [{}]},
        {"instruction_id": ["punctuation:no_comma"], "kwargs": []},
        "\ud800",
        "x" * 2_000_000,
    ]
    for truth in bad:
        verdict = verify("the answer is 42", truth, family)
        assert isinstance(verdict, Verdict)
        with_check = None
        try:
            verifiers.check(family, truth)
        except ValueError as problem:
            with_check = str(problem)
            assert "\n" not in with_check and len(with_check) < 400
        assert (with_check is not None) == (verdict.status == "error")


@pytest.mark.parametrize(
    "response",
    ["", " ", "\n\n", "\t", "\u200b", "\ufeff", "<|endoftext|>", "<|im_end|>\n", "</s>", "<think>\n</think>"],
)
def test_an_empty_response_is_never_rewarded(response):
    for family in FAMILIES:
        for truth in truths(family):
            assert verify(response, truth, family).score == 0
            assert verify(response, truth, family, loose=True).score == 0


def test_chat_markers_do_not_move_the_window():
    assert verify("wrong: 41<|assistant|>\n42<|im_end|>", "42", "gsm8k").score == 1  # the last number, as without them
    assert verify("\\boxed{41}\n<|user|>\nthe answer is right<|assistant|>", "42", "math").score == 0


def test_too_long_is_said():
    verdict = verify("a" * 300_000, "x", "math")
    assert verdict.score == 0 and "too long" in verdict.reason
    assert verify("a " * 200_000 + "42", "42", "gsm8k").score == 1  # the last-number rules read the end


PACKAGE = Path(verifiers.__file__).parent
FORBIDDEN = {"eval", "exec", "compile", "sympify", "parse_expr", "parse_latex", "__import__", "system", "popen"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_source_cannot_execute_text(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = node.id if isinstance(node, ast.Name) else node.attr
            receiver = node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""
            assert name not in FORBIDDEN or (name == "compile" and receiver == "re"), (
                f"{path.name}:{node.lineno} {name}"
            )
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {name.split(".")[0] for name in names} & {
                "torch",
                "transformers",
                "numpy",
                "engine",
                "launch",
                "rollout",
            }
