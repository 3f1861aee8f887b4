"""For every instruction of IFBench: arguments, a response made to follow it and one made to violate it."""

from random import Random

from tests.verifiers.making_ifevalg import WORDS, placed, prompt, sentence, spans, words
from verifiers.ifeval.word_lists import AFRICA, NORTHERN_CAPITALS

NAMES = ["Emma", "Liam", "Sophia", "Noah", "Zoe", "Grace", "Owen", "Stella"]


def word_range(rng):
    n = rng.randint(3, 8)
    bad = rng.choice([n - 2, n + 4])
    return {"min_words": n - 1, "max_words": n + 3}, " ".join(words(rng, n)), " ".join(words(rng, bad))


def different_words(rng):
    n = rng.randint(2, 8)
    few = words(rng, n - 1)
    return {"N": n}, ", ".join(words(rng, n)), " ".join([*few, few[0].upper(), f"{few[0]}!", "-"])


def conjunctions(rng):
    n = rng.randint(2, 5)
    some = rng.sample(["and", "but", "for", "nor", "or", "so", "yet"], n)
    return {"small_n": n}, " river ".join(some), " river ".join([*some[1:], some[1].upper(), f"{some[1]},"])


def names(rng):
    n = rng.randint(1, 5)
    some = rng.sample(NAMES, n)
    return {"N": n}, " met ".join(some), " met ".join(["Nobody", *some[1:], *some[1:2], "Emmanuel"])


def numbers(rng):
    n = rng.randint(1, 6)
    some = [rng.choice(["7", "3.14", "1,000", "10:30", "1/2"]) for _ in range(n)]
    return (
        {"N": n},
        " and ".join(some) + " in all",
        rng.choice([" and ".join([*some, "5-6"]), "none " + " ".join(some[1:])]),
    )


def pronouns(rng):
    n = rng.randint(2, 6)
    some = [rng.choice(["I'm", "she/her", "it", "They", "this"]) for _ in range(n)]
    few = [rng.choice(["me", "it", "them"]) for _ in range(n - 1)]
    return {"N": n}, " river ".join(some), " items ".join([*few, "hers" * 2])


def marks(rng):
    text = " ".join(words(rng, 3)) + "; " + "a: b, c. d! e? f?!"
    return {}, text, text.replace(rng.choice([";", ":", ",", ".", "?!", "! "]), " ")


def keyword_counts(rng):
    five = words(rng, 5)
    counted = [word for word, n in zip(five, (1, 2, 3, 5, 7), strict=True) for _ in range(n)]
    rng.shuffle(counted)
    bad = [*counted, rng.choice(five)] if rng.random() < 0.5 else counted[1:]
    return {f"keyword{i}": w for i, w in enumerate(five, 1)}, " ".join(counted) + f" {five[0]}s", " ".join(bad)


def japanese(rng):
    n = rng.randint(1, 4)
    text = [("水" if (i + 1) % n == 0 else WORDS[i]) for i in range(3 * n)]
    bad = list(text)
    bad[n * rng.randint(1, 3) - 1] = "water"
    return {"N": n}, " ".join(text), " ".join(bad)


def stop_words(rng):
    percent = rng.choice([20, 40, 60])
    good = ["the"] * (percent // 10) + words(rng, 10 - percent // 10)
    bad = ["the", "of"] * (percent // 20 + 1) + words(rng, 8 - 2 * (percent // 20))
    return {"percentage": percent}, " ".join(good), " ".join(bad)


def kinds(rng, statements, questions, exclamations=0):
    ends = "." * statements + "?" * questions + "!" * exclamations
    return " ".join(sentence(rng, 3)[:-1] + end for end in rng.sample(ends, len(ends)))


def two_to_one(rng):
    n = rng.randint(1, 3)
    return {}, kinds(rng, 2 * n, n), rng.choice([kinds(rng, 2 * n + 1, n), kinds(rng, 0, 2), kinds(rng, 0, 0, 2)])


def balanced(rng):
    n = rng.randint(1, 3)
    return {}, kinds(rng, n, n, n), rng.choice([kinds(rng, n + 1, n, n), kinds(rng, n, n), sentence(rng, 2)[:-1]])


def same_lengths(rng):
    a, b, c = (("".join(part) + ".").capitalize() for part in ("abc de", "fgh ij", "klm no"))
    bad = rng.choice([f"{a} {b} {c[:-1]}p.", f"{a} {b}", f"{a} {a} {c}"])
    return {}, f"{a} {b} {c}", bad


def overlaps(rng):
    text, other = "the river runs", "XYZ QVW JKL"
    share = 100 * 12 / (len(text) + 1 + len(other) - 2)  # 12 of the trigrams are the text's
    return {"reference_text": text, "percentage": round(share)}, f"{text} {other}", rng.choice([text, other])


def alphabet(rng):
    start, n = rng.randrange(26), rng.randint(2, 30)
    letters = [chr(97 + (start + i) % 26) for i in range(n)]
    bad = [*letters, letters[-1]] if rng.random() < 0.5 else [*letters, "3rd"]
    return {}, ", ".join(letter + "o" for letter in letters), " ".join(letter + "o" for letter in bad)


def vowels(rng):
    three, fourth = rng.choice([("aeo", "u"), ("aiu", "e"), ("eo", "iu")])
    good = " ".join("b" + rng.choice(three) + "t" for _ in range(8))
    return {}, good, rng.choice([good.replace(" ", "\n", 1), " ".join(f"b{v}t" for v in three + fourth), "!?"])


def clusters(rng):
    good = rng.sample(["strong", "plants", "grow", "black", "trees"], 4)
    place = rng.randint(0, 4)
    return {}, " - ".join(good), " ".join([*good[:place], "a", *good[place:]])


def ten_palindromes(rng):
    some = [f"{a}{b}c{b}{a}" for a, b in (rng.sample("abdefg", 2) for _ in range(10))]
    return {}, " x ".join(some).title(), " x ".join([*some[1:], rng.choice(["12321", "abcde", "noon"])])


def prime_lengths(rng):
    good = rng.sample(["to", "sea", "river", "morning", "it's"], 4)
    return {}, " ".join(good), " ".join([*good, rng.choice(["a", "lamp", "garden", "don't"])])


def few_repeats(rng):
    n = rng.randint(1, 4)
    word, *rest = words(rng, 4)
    return {"small_n": n}, " ".join([*[word] * n, *rest]), " ".join([*[word] * n, *rest, word.upper() + "."])


def initials(rng):
    good = [letter + "o" for letter in rng.sample("abcdefgh", 6)]
    place = rng.randrange(6)
    return {}, " ".join(good), " ".join([*good[: place + 1], f"({good[place][0].upper()}x)", *good[place + 1 :]])


ODD, EVEN = ["cat", "banana", "stone", "dog"], ["river", "happy", "window", "garden"]


def syllables(rng):
    good = [rng.choice(ODD if i % 2 else EVEN) for i in range(6)]
    return {}, " ".join(good) + ".", " ".join([*good, rng.choice(ODD)])


def second_words(rng):
    word, *rest = words(rng, 5)
    good = [rest[0], word, rest[1], word, rest[2]]
    bad = rng.choice([[rest[0], word, rest[1], rest[2]], [rest[0], rest[1], word, rest[2]], [word, *rest]])
    return {"keyword": word}, " ".join(good).capitalize() + "!", " ".join(bad) + "."


def chain(rng):
    given = words(rng, 6)
    good = [f"{a.capitalize()} is the {b}." for a, b in zip(given, given[1:], strict=False)]
    place = rng.randint(1, 3)
    return {}, " ".join(good), " ".join(good[:place] + good[place + 1 :])


def framed_paragraphs(rng):
    good = [f"{word.capitalize()}, {words(rng, 1)[0]} {word}." for word in words(rng, 3)]
    return {}, "\n".join(good), "\n".join([*good, "One two."])


def runs(rng):
    good = ["The cat can.", "Big bold bears.", "My mad mice move.", "Six sad snakes sang songs."]
    return {}, " ".join(good[: rng.randint(2, 4)]), rng.choice([" ".join(good[1::-1]), "A box. Car dog."])


def keyword_sentence(rng):
    n = rng.randint(1, 3)
    sentences = ["The sky is blue.", "A dog ran off.", "We went home."]
    good = [*sentences[: n - 1], "There a zebra stood.", *sentences[n - 1 :]]
    bad = rng.choice([sentences, [*good[n:], *good[:n]], ["There zebras stood."] * 3])
    return {"word": "Zebra", "N": n}, " ".join(good), " ".join(bad)


def growing(rng):
    step = rng.randint(1, 3)
    good = [sentence(rng, 2 + step * i) for i in range(3)]
    bad = rng.choice([good[::-1], [*good, sentence(rng, 3)], [good[0], good[2]]])
    return {"small_n": step}, " ".join(good), " ".join(bad)


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
    bad = rng.choice([good[1:], good[:i] + [good[i + 1], good[i]] + good[i + 2 :], [n for n in good if n != "Kyiv"]])
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
    header = "\t".join(f'"{name}"' for name in "StudentID Subject Grade Semester Score".split())
    good, bad = table(rng, header, 3, lambda i, j: f'"{WORDS[j]}"', "\t")
    return {}, "\n".join(good), "\n".join(rng.choice([bad, [*good[:3], good[3].replace('"', "", 2)]]))


def dates(rng):
    good = [f"{rng.randint(1793, 1815)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}" for _ in range(4)]
    bad = rng.choice(["1800-00-10", "1800-01-00", "1801-02-29", "1800-13-01", "1900-01-01", "Jena 1806-10-14"])
    return {}, ", ".join(good), ", ".join([*good, bad])


MAKE = {
    "count:word_count_range": word_range,
    "count:unique_word_count": different_words,
    "count:conjunctions": conjunctions,
    "count:person_names": names,
    "count:numbers": numbers,
    "count:pronouns": pronouns,
    "count:punctuation": marks,
    "count:keywords_multiple": keyword_counts,
    "count:words_japanese": japanese,
    "ratio:stop_words": stop_words,
    "ratio:sentence_type": two_to_one,
    "ratio:sentence_balance": balanced,
    "ratio:sentence_words": same_lengths,
    "ratio:overlap": overlaps,
    "words:alphabet": alphabet,
    "words:vowel": vowels,
    "words:consonants": clusters,
    "words:palindrome": ten_palindromes,
    "words:prime_lengths": prime_lengths,
    "words:repeats": few_repeats,
    "words:no_consecutive": initials,
    "words:odd_even_syllables": syllables,
    "words:keywords_specific_position": placed,
    "words:words_position": second_words,
    "words:last_first": chain,
    "words:paragraph_last_first": framed_paragraphs,
    "sentence:alliteration_increment": runs,
    "sentence:keyword": keyword_sentence,
    "sentence:increment": growing,
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
