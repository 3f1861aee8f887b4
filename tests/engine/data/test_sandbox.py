"""Chat templates: the library's text of every conversation, and a bound that no template passes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.faultdrill.hostile import TEMPLATES
from engine.data import meter, sandbox
from engine.data.meter import Spent
from engine.data.template import renderer
from tests.engine.data import test_chat, test_templates

CONVERSATION = {"messages": [{"role": "user", "content": "hello"}], "tools": None, "add_generation_prompt": False}
SQUARE = "{% set x = 'x' * 99999 %}"


def grown(step: str, start: str = "'x'", times: int = 60) -> str:
    """A text, a list or a number that becomes larger in every turn of a loop."""
    body = step if "{%" in step else f"{{% set ns.x = {step} %}}"
    return f"{{% set ns = namespace(x={start}) %}}{{% for i in range({times}) %}}{body}{{% endfor %}}"


MORE = {  # beside the drill's, each of another operation
    "a text by itself": grown("ns.x + ns.x"),
    "a set block": grown("{% set y %}{{ ns.x ~ ns.x }}{% endset %}{% set ns.x = y %}"),
    "a block's text": grown("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "a filter's join": grown("[ns.x, ns.x] | join"),
    "a method's join": SQUARE + "{{ x.join(x) }}",
    "a filter's replacement": SQUARE + "{{ x | replace('x', x) }}",
    "tables": SQUARE + "{{ x.translate({120: x}) }}",
    "tabs": "{{ '\t'.expandtabs(10 ** 10) }}",
    "zeros": "{{ '1'.zfill(10 ** 10) }}",
    "a centre": "{{ 'x' | center(10 ** 10) }}",
    "a filtered block": "{% filter center(10000000000) %}x{% endfilter %}",
    "an indent": "{{ 'x\ny' | indent(10 ** 10) }}",
    "an indent of JSON": "{{ [[1]] | tojson(indent=10 ** 9) }}",
    "a list": "{{ [1] * 10 ** 9 }}",
    "a batch": "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "slices": "{{ [1] | slice(10 ** 9) | list }}",
    "a width in braces": "{{ '{:>1000000000}'.format(1) }}",
    "a width in a width": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "a width from a star": "{{ '%*d' % (10 ** 9, 1) }}",
    "a filter's format": "{{ '%1000000000d' | format(1) }}",
    "places that repeat": SQUARE + "{{ ('{0}' * 200).format(x) ~ ('{0}' * 200).format(x) }}",
    "a hash of a tree": grown("(ns.x, ns.x)", "(1,)") + "{{ {ns.x: 1} }}",
    "a key of a tree": grown("(ns.x, ns.x)", "(1,)", 90) + "{{ messages[0][ns.x] }}",
    "a depth": grown("(ns.x,)", "(1,)", 9999) + "{{ {ns.x: 1} }}",
    "a number by itself": grown("ns.x + ns.x", "1", 99999),
    "a number of digits": "{{ ('f' * 99999) | int(base=16) + 1 }}",
    "a number of bytes": "{{ (5).to_bytes(10 ** 9, 'big') }}",
    "digits": "{{ 5 | round(-10 ** 9) }}",
    "comparisons": SQUARE + "{% set y = 'x' * 99999 %}{% for i in range(99999) %}{{ x == y }}{% endfor %}",
    "searches": SQUARE + "{% for i in range(99999) %}{{ 'y' in x }}{% endfor %}",
    "slices of a text": SQUARE + "{% for i in range(99999) %}{{ x[1:] | length }}{% endfor %}",
    "sorts": "{% for i in range(99999) %}{{ range(99999) | sort | length }}{% endfor %}",
    "sums of lists": "{{ ([[1] * 100] * 9999) | sum(start=[]) | length }}",
    "a loop with a test": "{% for i in range(99999) %}{% for j in range(99999) if j > 99999 %}{% endfor %}{% endfor %}",
    "text in a loop": "{% for i in range(99999) %}" + "x" * 50_000 + "{% endfor %}",
    "a caller": "{% macro f(n) %}{{ caller(n) ~ caller(n) }}{% endmacro %}{% macro g(n) %}"
    "{% call(m) f(n) %}{{ g(m - 1) if m }}{% endcall %}{% endmacro %}{{ g(40) }}",
    "a cycle": "{% set c = cycler(1, 2) %}{% for i in range(99999) %}{{ c.next() ~ c.next() }}{% endfor %}",
    "pieces": "{% for i in range(99999) %}{% set x = ('a' * 999).split('a') %}{% endfor %}",
    "a namespace as text": "{% set ns = namespace(x=1) %}{% set ns.x = ns %}{{ ns }}",
    "a source": "x" * (sandbox.MAX_SOURCE + 1),
    "parts": "{{ a.b }}" * 7_000,
}


def units(source: str, conversation: dict) -> int:
    """What is left after a rendering that may fail."""
    with pytest.raises(Spent):
        sandbox.render(source, conversation)
    return sandbox.compiled(source)[1].left


@pytest.mark.parametrize("what", MORE)
def test_work_without_end_is_stopped(what):
    with pytest.raises(Spent) as raised:
        sandbox.render(MORE[what], CONVERSATION)
    assert len(str(raised.value)) < 120 and "\n" not in str(raised.value)


def test_where_it_stops_is_the_same_every_time():
    for what in ("a text by itself", "searches", "a caller", "sorts", "a hash of a tree"):
        assert units(MORE[what], CONVERSATION) == units(MORE[what], CONVERSATION) < 0


@pytest.mark.parametrize("product", ["'x' * 10 ** 6", "10 ** 6 * 'x'", "[1] * 10 ** 5"])
def test_a_product_is_paid_by_its_size(product):
    """Also where it is never written."""
    assert spent(f"{{% set x = {product} %}}") > 10**6 // meter.PER_UNIT


def spent(source: str) -> int:
    sandbox.render(source, CONVERSATION)
    values, characters = sandbox.extent(CONVERSATION)
    return sandbox.BASE + sandbox.PER_VALUE * values + characters - sandbox.compiled(source)[1].left


@pytest.mark.parametrize(
    "body",
    [
        "{% for i in range(TIMES) %}BODY{% endfor %}",
        "{% for i in range(TIMES) if i >= 0 %}BODY{% endfor %}",
        "{% for i in range(TIMES) | map('int') %}BODY{% endfor %}",
        "{% macro f() %}BODY{% endmacro %}{% for i in range(TIMES) %}{{ f() }}{% endfor %}",
    ],
)
def test_what_loops_and_macros_cost(body):
    """As many times as they are gone through, and more for a longer body: at least a unit for each of its parts."""
    source = body.replace("TIMES", "1000")
    short, long = (spent(source.replace("BODY", "{% set x = 1 %}" * parts)) for parts in (1, 51))
    assert spent(body.replace("TIMES", "1").replace("BODY", "{% set x = 1 %}")) + 2_000 < short < long - 50_000


def test_a_tree_within_itself_is_paid_at_every_visit():
    tree = [1]
    for _ in range(16):
        tree = [tree, tree]
    budget = meter.Meter()
    budget.left = 2**20
    assert budget.size(tree) >= 2**16 and budget.left <= 2**20 - 2**17


@pytest.mark.parametrize("text", ["'%9999d' % 1", "'%*d' % (9, 1)", "'{:>9999}'.format(1)", "'{:{}}'.format(1, 9)"])
def test_a_width_is_no_template_s_choice(text):
    with pytest.raises(Spent, match="of its own choice"):
        sandbox.render(f"{{{{ {text} }}}}", CONVERSATION)


@pytest.mark.parametrize("what", TEMPLATES)
def test_the_drills_templates_raise(what):
    with pytest.raises(Exception):  # noqa: B017 - the sandbox's, Jinja's or Python's own
        sandbox.render(TEMPLATES[what], CONVERSATION)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.x }}",
        "{{ ''['__class__'].x }}",
        "{{ (''|attr('__class__')).x }}",
        "{{ messages.__init__.x }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ dict.update(messages[0], {}) }}",
        "{{ namespace.__init__.x }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ '{0.__class__.x}'.format(1) }}",
        "{{ '{0.__class__}'.format_map({'0': 1}) }}",
        "{{ lipsum(9) }}",
        "{{ 'x' | urlize }}",
        "{{ [1] | random }}",
        "{% for x in [[]] recursive %}{{ loop([[]]) }}{% endfor %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{{ self._TemplateReference__context.x.y }}",
    ],
)
def test_what_leads_out_of_the_sandbox(source):
    with pytest.raises(Exception) as raised:
        sandbox.render(source, CONVERSATION)
    assert not isinstance(raised.value, Spent)


# --- the same text ----------------------------------------------------------------------------------------------------

CHATS = {
    **{f"a {name}": (test_templates, name) for name in test_templates.STYLES},
    **{f"b {n}": (test_chat, n) for n in test_chat.STYLES},
}
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["<think>\na\n</think>\nb", " x ", "\n", "{{ 1 }}"]
)
call = st.fixed_dictionaries(
    {
        "function": st.fixed_dictionaries(
            {"name": words, "arguments": st.dictionaries(words, words | st.integers() | st.none())}
        )
    }
)


@st.composite
def messages(draw):
    found = []
    for _ in range(draw(st.integers(1, 5))):
        message = {"role": draw(st.sampled_from(["system", "user", "assistant", "tool"])), "content": draw(words)}
        if draw(st.integers(0, 4)) == 0:
            message |= {"tool_calls": draw(st.lists(call, max_size=2)), "name": None}
        found.append(message)
    return found


@pytest.mark.parametrize("style", CHATS)
def test_the_text_is_the_librarys(style):
    module, name = CHATS[style]
    chat = module.make(name)
    render = renderer(chat.tokenizer, chat.template, chat.template_with_tools)

    @settings(deadline=None, max_examples=25, database=None)
    @given(messages(), st.booleans(), st.none() | st.just([test_templates.TOOL]))
    def check(conversation, prompt, tools):
        def theirs():
            return chat.tokenizer.apply_chat_template(
                conversation, tools=tools, chat_template=chat.template, tokenize=False, add_generation_prompt=prompt
            )

        try:
            text = theirs()
        except Exception:
            with pytest.raises(Exception):  # noqa: B017 - what the template refuses, it refuses
                render(conversation, tools, prompt)
            return
        assert render(conversation, tools, prompt) == text

    check()


FEATURES = (
    "{%- for m in messages -%}{% if loop.index0 is even and not loop.last %}{% continue %}{% endif %}"
    "{{ loop.index }}{% generation %}{{ m['content'] | trim | upper }}{% endgeneration %}{% if loop.index > 3 %}"
    "{% break %}{% endif %}{%- endfor %}\n  {% set a, b = 1, [2, 3] %}\n{{ a + b[0] * 2 - 7 // 2 % 3 }} "
    "{{ b[::-1] }} {{ 'a' ~ 1 ~ none }}{{ {'k': [a, {'x': '<é>'}]} | tojson }}{{ [1, 2] | tojson(indent=2) }}"
    "{{ dict(a=1).items() | list }}{{ 'x=%s' % a }}{{ '%s-%s' | format(1, 'y') }}{{ '{} {k}'.format(1, k=2) }}"
    "{{ messages | map(attribute='role') | unique | join(',') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'a b  c'.split() }}"
    "{{ 'aXbX'.split('X') }}{{ ('abc' | list)[1] }}{{ 'Ab' | lower ~ ('x' | title) }}{{ 7 is divisibleby(7) }}"
    "{{ 'a' in 'cab' }}{{ 2 ** 10 }}{% macro m(x, y=2) %}[{{ x }}{{ y }}{{ caller() if caller else '' }}]"
    "{% endmacro %}{{ m(1) }}{% call m(3) %}c{% endcall %}{% filter upper %}up{% endfilter %}{% set t %}in "
    "{{ a }}{% endset %}{{ t }}{{ undefined_thing }}{{ 'é' | length }}{{ 3.5 | round | int }}{{ -a }}{{ not a }}"
    "{{ [3, 1, 2] | sort }}{{ {'b': 1, 'a': 2} | dictsort }}{{ 'a\nb' | indent(2) }}"
    "{{ messages[0].get('role', 'x') }}{{ namespace(x=1).x }}{{ range(3) | list }}{{ 'ab' | replace('a', 'c') }}"
    "{{ 'x' | default('y') }}{{ 1 if a else 2 }}{{ (1, 2) }}{{ true }}{{ 'abc'[1:] }}"
    "{{ [1, 2, 3] | batch(2) | list }}{{ [4, 5] | sum }}{{ 'x'.center(5) }}{{ tools is none }}"
    "{{ documents is defined }}{{ 'A-b' | safe }}{{ '<' | e }}{{ [1, 2] | max }}{{ 'a' < 'b' < 'c' }}"
)


def test_what_templates_use_is_as_in_the_library():
    chat = test_templates.make("another end for the last turn")
    conversation = [{"role": r, "content": f" {r} é "} for r in ("system", "user", "assistant", "user", "assistant")]
    theirs = chat.tokenizer.apply_chat_template(conversation, chat_template=FEATURES, tokenize=False)
    assert renderer(chat.tokenizer, FEATURES, FEATURES)(conversation) == theirs


# --- room for what is real --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", test_templates.STYLES)
def test_a_long_conversation_takes_a_small_part(style):
    """Of a thousand turns, and of a turn of a megabyte: at most a fiftieth of what they may take."""
    chat = test_templates.make(style)
    render = renderer(chat.tokenizer, chat.template, chat.template_with_tools)
    turns = [{"role": role, "content": "What?" * 9} for role in ("user", "assistant")]
    for conversation in (turns * 500, [turns[0] | {"content": "x " * 2**19}, turns[1]]):
        render(conversation)
        values, characters = sandbox.extent({"messages": conversation})
        allowed = sandbox.BASE + sandbox.PER_VALUE * values + characters
        assert allowed - sandbox.compiled(chat.template)[1].left < allowed / (50 if len(conversation) > 2 else 4)


def test_a_loop_in_a_loop_over_messages_has_room():
    inner = "{% for n in messages %}{% if n.role == 'x' %}{{ n.content }}{% endif %}{% endfor %}"
    source = "{% for m in messages %}" + inner + "{% endfor %}"
    assert sandbox.render(source, {"messages": CONVERSATION["messages"] * 600}) == ""


@settings(deadline=None, max_examples=60, database=None)
@given(st.data())
def test_a_program_of_any_steps_ends(data):
    """Loops within loops over what doubles, by any of these operations: a text within the bound, or an error."""
    steps = ["ns.x ~ ns.x", "ns.x + ns.x", "ns.x * 9", "[ns.x, ns.x]", "(ns.x, ns.x)", "ns.x | string", "ns.x | list"]
    steps += [
        "ns.x | tojson",
        "'%s%s' % (ns.x, ns.x)",
        "ns.x | join(ns.x | string)",
        "{'a': ns.x, 'b': ns.x}",
        "ns.x | length",
    ]
    steps += [
        "(ns.x | string).replace('x', 'xyz')",
        "(ns.x | string).split('x')",
        "ns.x | upper",
        "ns.x[1:]",
        "ns.x == ns.x",
    ]
    body = "".join(
        f"{{% set ns.x = {step} %}}" for step in data.draw(st.lists(st.sampled_from(steps), min_size=1, max_size=4))
    )
    for _ in range(data.draw(st.integers(1, 3))):
        body = f"{{% for i in range({data.draw(st.sampled_from([2, 50, 99999]))}) %}}{body}{{% endfor %}}"
    source = f"{{% set ns = namespace(x={data.draw(st.sampled_from(['1', repr('x'), '[1]']))}) %}}{body}{{{{ ns.x }}}}"
    try:
        text = sandbox.render(source, CONVERSATION)
    except Exception:
        return
    assert len(text) <= meter.PER_UNIT * sandbox.BASE * 2
