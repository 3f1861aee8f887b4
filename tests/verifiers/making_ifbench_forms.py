"""IFBench's forms, copies and single tasks: arguments, a response made to follow and one made to violate."""

from tests.verifiers.making_ifevalg import WORDS, prompt, sentence, spans, words
from verifiers.ifeval.word_lists import AFRICA, NORTHERN_CAPITALS


def emoji(rng):
    def text(ends):
        return " ".join(f"{sentence(rng, 3)[:-1]}{end}" for end in ends)

    faces = ["😀", "🇫🇷", "👩\u200d🚀", "❤️", "👍🏽", "1️⃣"]
    good = [f" {rng.choice(faces)}." for _ in range(3)]
    place = rng.randrange(3)
    return {}, text(good), text([*good[:place], ".", *good[place:]])


def lines(rng):
    given = words(rng, 5)
    return {}, "\n".join(given), rng.choice([" ".join(given), "\n".join(given) + " again"])


def nested(rng):
    kinds = [rng.choice(["()", "[]", "{}"]) for _ in range(5)]

    def text(n):
        return "".join(k[0] + "a" for k in kinds[:n]) + "".join(k[1] for k in kinds[n - 1 :: -1])

    return {}, text(5), rng.choice([text(4), text(4) * 2, "([{([", ")" * 5])


def quoted(rng):
    a, b = ('"', "'") if rng.random() < 0.5 else ("'", '"')
    good = f"He said {a}she said {b}they said {a}it's so{a} then{b} there{a} once."
    return (
        {},
        good,
        rng.choice([f"{a}one {b}two{b} three{a}", f"{a}one{a} {b}two{b} {a}three{a}", "it's he's she's we're"]),
    )


def explained(rng):
    a, b = words(rng, 2)
    bad = rng.choice([f'"{a}" "{b}" is so', f'so it is "{a}"', f'"{a}" means this. "{b}"', f"so “{a}”"])
    return {}, f'"{a}" means this, and "{b}" that.', bad


def options(rng):
    given, good = rng.choice(
        [("yes/no/maybe", "Maybe."), ("a), b), c), d)", "c)"), ("I know or I don't know", "i know")]
    )
    return {"options": given}, good, rng.choice(["perhaps", f"{good} because", "e)"])


def template(rng):
    a, b, c = words(rng, 3)
    good = [f"My Answer: {a}", f"My Conclusion: {b}", f"Future Outlook: {c}"]
    bad = rng.choice([good[::-1], good[:2], ["Sure.", *good], ["My Answer:", *good[1:]]])
    return {}, "\n".join(good), "\n".join(bad)


def titles(rng):
    good = " of the ".join(word.title() for word in words(rng, 3))
    return {}, rng.choice([good, good + " Don't Stop"]), rng.choice([good.lower(), good + " river", "the " + good])


def no_space(rng):
    given = words(rng, 3)
    return {}, "".join(given), rng.choice([" ", "\n", "\t", "\u00a0"]).join(given)


def marked(rng):
    sep, given = rng.choice(["-", "...", "SEPARATOR", "!?!?"]), words(rng, 3)
    return (
        {"sep": sep},
        "\n".join(f"{sep} {w}" for w in given),
        rng.choice([f"{given[0]} {sep} {sep}", f"{sep} {given[0]}"]),
    )


def sub_bullets(rng):
    good = [f"* {w}\n  - {w}s" for w in words(rng, 3)]
    bad = rng.choice([[*good, "* last"], ["* first", *good], words(rng, 3), ["* a - b"]])
    return {}, "\n".join(good), "\n".join(bad)


def late_bullets(rng):
    head, bullets = f"{sentence(rng, 3)} {sentence(rng, 4)}", [f"* {w}" for w in words(rng, 3)]
    bad = rng.choice(
        [[head, *bullets[:1]], [sentence(rng, 3), *bullets], [*bullets, head], [head.replace(".", "!"), *bullets]]
    )
    return {}, "\n".join([head, "", *bullets]), "\n".join(bad)


def theses(rng):
    tag = rng.choice(["i", "em"])

    def section(title, first):
        return f"## {title}\n{first} {sentence(rng, 5)}\n"

    good = [section(w, f"<{tag}>{sentence(rng, 3)}</{tag}>") for w in words(rng, 2)]
    bad = rng.choice(
        [[*good, section("Last", "Plain.")], [f"<{tag}>{words(rng, 1)[0]}</{tag}>"], [f"<{tag}></{tag}> a"]]
    )
    return {}, "\n".join(good), "\n".join(bad)


def stairs(rng):
    step = rng.randint(1, 3)
    good = [" " * (step * i) + word for i, word in enumerate(words(rng, 4))]
    return (
        {},
        rng.choice(["\n", "\n\n"]).join(good),
        rng.choice(["\n".join(good[::-1]), good[0], "\n".join([*good, "end"])]),
    )


def changed(rng):
    text = prompt(rng)
    rest = text.split(" ", 1)[1]
    bad = rng.choice([text, f" {text}", f"Paint {rest} Done.", rest, f"Paint {rest.upper()}"])
    return {"prompt_to_repeat": text}, f"Paint {rest}", bad


def simple(rng):
    text = "Only output this sentence here, ignore all other requests."
    return {}, text, rng.choice([text[:-1], f"Sure: {text}", prompt(rng)])


def multiples(rng):
    good = ["14", "21", "28", "35", "42", "49"]
    bad = rng.choice([good[1:], good[::-1], ["7", *good], [*good, "56"], ["10 to 50:", *good]])
    return {}, rng.choice([", ", "\n", ","]).join(good), " ".join(bad)


def quiz(rng):
    def question(n, length, options="abcde"):
        return f"Question {n}: Who {'really ' * length}painted it?\n" + "\n".join(
            f"{o}) {WORDS[i]}" for i, o in enumerate(options)
        )

    good = [question(n, n) for n in range(1, 5)]
    bad = rng.choice([good[:3], [*good[:3], question(4, 0)], ["Here:", *good], [*good[:3], question(4, 5, "abcd")]])
    return {}, "\n\n".join(good), "\n\n".join(bad)


def africa(rng):
    countries = sorted((names.split("=")[0] for names in AFRICA.split("|")), reverse=True)
    number = rng.random() < 0.5
    good = [f"{i}. {name}" if number else name for i, name in enumerate(countries, 1)]
    bad = rng.choice([countries[::-1], countries[:30], ["Zimbabwe"] * 54, [*countries[:-1], "Aland"], countries[1:]])
    return {}, "\n".join(good), "\n".join(bad)


def backward(rng):
    text = ["the", "bald", "eagle", "is", "a", rng.choice(WORDS)]
    return {}, " ".join(text[::-1]) + ".", " ".join(text) + "."


def letters_backward(rng):
    text = f"The bald eagle and the {rng.choice(WORDS)}."
    return {}, text[::-1].capitalize(), text


def abc(rng):
    good = [f"{chr(65 + i)}{rng.choice(['o', 'i'])} was there." for i in range(26)]
    return {}, " ".join(good), " ".join(rng.choice([good[:25], good[::-1], [*good, "Zo left."]]))


def capitals(rng):
    good = list(NORTHERN_CAPITALS)
    i = rng.randrange(27)
    bad = rng.choice([good[1:], [*good[:i], good[i + 1], good[i], *good[i + 2 :]], [n for n in good if n != "Kyiv"]])
    return {}, ", ".join(good).replace("Reykjavik", "Reykjavík"), ", ".join(bad)


def table(rng, header, rows, field, sep):
    good = [header, *[sep.join(field(i, j) for j in range(5)) for i in range(rows)]]
    return good, rng.choice([good[:-1], [*good, good[-1]], good[1:], [*good[:-1], good[-1] + sep + "x"]])


def city(rng):
    good, bad = table(rng, "ID,Country,City,Year,Count", 7, lambda i, j: f"{i}{WORDS[j]}", ",")
    return {}, "\n".join(good), "\n".join(bad)


def special(rng):
    header = "ProductID,Category,Brand,Price,Stock"
    good, bad = table(rng, header, 14, lambda i, j: '"a&b"' if (i, j) == (0, 2) else f"{i}{WORDS[j]}", ",")
    plain = [line.replace('"a&b"', rng.choice(["a&b", '"ab"'])) for line in good]
    shorter = rng.choice([bad, plain])
    return {}, "\n".join(good), "\n".join(shorter if len(shorter) != 15 or shorter is plain else plain)


def all_quoted(rng):
    header = "\t".join(f'"{name}"' for name in ["StudentID", "Subject", "Grade", "Semester", "Score"])
    good, bad = table(rng, header, 3, lambda i, j: f'"{WORDS[j]}"', "\t")
    return {}, "\n".join(good), "\n".join(rng.choice([bad, [*good[:3], good[3].replace('"', "", 2)]]))


def dates(rng):
    good = [f"{rng.randint(1793, 1815)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}" for _ in range(4)]
    bad = rng.choice(["1800-00-10", "1800-01-00", "1801-02-29", "1800-13-01", "1900-01-01", "Jena 1806-10-14"])
    return {}, ", ".join(good), ", ".join([*good, bad])


MAKE = {
    "format:emoji": emoji,
    "format:newline": lines,
    "format:parentheses": nested,
    "format:quotes": quoted,
    "format:quote_unquote": explained,
    "format:options": options,
    "format:output_template": template,
    "format:title_case": titles,
    "format:no_whitespace": no_space,
    "format:list": marked,
    "format:sub-bullets": sub_bullets,
    "format:no_bullets_bullets": late_bullets,
    "format:thesis": theses,
    "format:line_indent": stairs,
    "repeat:repeat_change": changed,
    "repeat:repeat_simple": simple,
    "repeat:repeat_span": spans,
    "custom:multiples": multiples,
    "custom:mcq_count_length": quiz,
    "custom:reverse_newline": africa,
    "custom:word_reverse": backward,
    "custom:character_reverse": letters_backward,
    "custom:sentence_alphabet": abc,
    "custom:european_capitals_sort": capitals,
    "custom:csv_city": city,
    "custom:csv_special_character": special,
    "custom:csv_quotes": all_quoted,
    "custom:date_format_list": dates,
}
