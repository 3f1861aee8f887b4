"""For every instruction that IFEvalG adds: arguments, a response made to follow it and one made to violate it."""

from random import Random

WORDS = tuple(
    str.split(
        "river stone bread cloud lamp garden window tiger morning paper silver ocean kettle violin harbour meadow"
    )
)


def words(rng: Random, n: int) -> list[str]:
    return rng.sample(WORDS, n)


def sentence(rng: Random, n: int) -> str:
    return " ".join(words(rng, n)).capitalize() + "."


def prompt(rng: Random) -> str:
    return f"Describe the {' and the '.join(words(rng, 3))}."


def copies(rng):
    text = prompt(rng)
    return {"prompt_to_repeat": text}, f" {text}\n", rng.choice([text.upper(), text[:-1], f"Sure: {text}", text * 2])


def several_copies(rng):
    text, n = prompt(rng), rng.randint(2, 4)
    good, other = [text] * n, rng.choice([[text] * (n + 1), [text] * (n - 1), [text] * (n - 1) + [text + " no"]])
    return {"prompt_to_repeat": text, "N": n}, "\n******\n".join(good), " ****** ".join(other)


def phrases(rng):
    phrase = words(rng, 5)
    others = [w for w in WORDS if w not in phrase]

    def changed(places):
        return " ".join(rng.choice(others) if i in places else w for i, w in enumerate(phrase))

    n = rng.randint(1, 3)
    good = [changed({rng.randint(1, 3)}) for _ in range(n)]
    bad = rng.choice([[*good, changed({2})], good[1:], [*good[1:], changed({1, 3})], [*good[1:], changed(())]])
    return {"phrase": " ".join(phrase), "small_n": n}, ". ".join(good), ", ".join(bad) or "none"


def spans(rng):
    text = prompt(rng)
    start = rng.randint(9, 12)
    end = rng.randint(start + 3, start + 12)
    arguments = {"prompt_to_repeat": text, "n_start": start, "n_end": end}
    return arguments, text[start : end + 1], text[start - 1 : end + 4]


def two_paragraphs(divider):
    def make(rng):
        parts = [sentence(rng, 4) for _ in range(rng.choice([1, 3]))]
        return {}, divider.join(sentence(rng, 4) for _ in range(2)), divider.join(parts)

    return make


def composition(rng):
    n, m = rng.randint(1, 3), rng.randint(2, 6)

    def text(paragraphs, sentences, length):
        return "\n\n* * *\n\n".join(
            " ".join(sentence(rng, length) for _ in range(sentences)) for _ in range(paragraphs)
        )

    bad = rng.choice([text(2, n, m), text(4, n, m), text(3, n + 1, m), text(3, n, m + 1)])
    return {"n_sent": n, "n_words": m}, text(3, n, m), bad


def joined(rng):
    sentences = [sentence(rng, 3) for _ in range(rng.randint(2, 4))]
    return {}, "-".join(sentences), rng.choice([" ", "\n", " - ", "- "]).join(sentences)


def bracketed(rng):
    given = [f"[{word}]" for word in words(rng, 5)]
    place = rng.randrange(5)
    bad = [word.strip("[]") if i == place else word for i, word in enumerate(given)]
    return {}, rng.choice([" ", ", "]).join(given), " ".join(bad)


def bigrams(rng):
    given = words(rng, 6)
    good = " ".join(f"<<{a} {b}>>" for a, b in zip(given[::2], given[1::2], strict=True))
    return (
        {},
        rng.choice([good, good + " end"]),
        rng.choice([" ".join(given), good.replace(">>", "", 1), f"x y {good}"]),
    )


def without(mark):
    def make(rng):
        text = " ".join(words(rng, 6))
        place = rng.randint(0, len(text))
        return {}, text, text[:place] + mark + text[place:]

    return make


def including(rng):
    word, *rest = words(rng, 6)
    return {"keyword": word}, " ".join([*rest, word.upper(), word]), " ".join(rest)


def times(rng):
    word, *rest = words(rng, 6)
    n = rng.randint(1, 4)
    text = [*rest, *[word] * n]
    rng.shuffle(text)
    arguments = {"keyword": word, "frequency": n, "relation": rng.choice(["at least", "less than"])}
    bad = rng.choice([[*text, word], text[text.index(word) + 1 :] or rest])
    return arguments, f"{' '.join(text)} {word}s", " ".join(bad)


def excluding(rng):
    word, *rest = words(rng, 6)
    place = rng.randint(0, 5)
    found = rng.choice([word, word.upper(), f"({word})", f"{word}."])
    return {"keyword": word}, f"{' '.join(rest)} un{word}", " ".join([*rest[:place], found, *rest[place:]])


def placed(rng):
    n, m = rng.randint(1, 4), rng.randint(1, 5)
    sentences = [words(rng, 5) for _ in range(4)]
    word = "zebra"
    sentences[n - 1][m - 1] = word
    good = " ".join(" ".join(s).capitalize() + "." for s in sentences)
    sentences[n - 1] = words(rng, 5)
    sentences[n % 4][m % 5] = word
    return {"keyword": word, "n": n, "m": m}, good, " ".join(" ".join(s).capitalize() + "." for s in sentences)


def palindromes(rng):
    half = "".join(rng.sample("abcdefg", 3))
    word = rng.choice([half + half[::-1], half + half[1::-1]])
    text = words(rng, 4)
    return {}, " ".join([*text, rng.choice([word, word.capitalize() + "."])]), " ".join([*text, "a", "-", half])


def framed(rng):
    word, *rest = words(rng, 5)
    bad = rng.choice([" ".join(rest), " ".join([word, *rest]), " ".join([word, *rest, word]) + "."])
    return {}, " ".join([word.capitalize(), *rest, word]), bad


def apart(rng):
    letters = rng.sample("acegikmoqsuwy", 6)
    good = [letter + "o" for letter in letters]
    place, letter = rng.randint(1, 6), rng.choice("bdfhjlnp")
    bad = [*good[:place], f'"{letter}a', chr(ord(letter) + 1) + "e", *good[place:]]
    return {}, " ".join(good), " ".join(bad)


def at_the_ends(first, every):
    def make(rng):
        word, *others = words(rng, 8)

        def line(wanted):
            rest = rng.sample(others, 3)
            return f"{wanted.capitalize()}, {' '.join(rest)}." if first else f"{' '.join(rest).capitalize()} {wanted}."

        lines = [line(word) for _ in range(3)]
        place = rng.randrange(3) if every else 0 if first else 2
        bad = [line(others[0] if i == place else word) for i in range(3)]
        return {"first_word" if first else "last_word": word}, " ".join(lines), " ".join(bad)

    return make


def few_lowercase(rng):
    n = rng.randint(0, 5)
    capitals = [word.upper() for word in words(rng, 4)]
    return {"N": n}, " ".join([*capitals, *words(rng, n)]), " ".join([*capitals, *words(rng, n + 1)])


def letters(rng):
    n, at_least = rng.randint(2, 20), rng.random() < 0.5
    enough, few = "3 " + "é" * n + ".", "4 " + "a b " * ((n - 1) // 2)
    arguments = {"N": n, "relation": "at least" if at_least else "less than"}
    return arguments, *((enough, few) if at_least else (few, enough))


def one_letter(rng):
    n = rng.randint(1, 6)
    arguments = {"letter": "x", "let_frequency": n, "let_relation": "at least"}
    return arguments, "xX" * n, "x" * (n - 1) + " other"


def unique(rng):
    given = words(rng, 6)
    return {}, ", ".join(given) + ".", " ".join([*given, rng.choice(given).upper()])


def once_and_twice(rng):
    one, two, *rest = words(rng, 6)
    bad = rng.choice([[one, two], [one, one, two, two], [two, two], [one, two, two, two]])
    return {"keyword1": one, "keyword2": two}, " ".join([*rest, two, one, two, one + "s"]), " ".join([*rest, *bad])


MAKE = {
    "copy:copy": copies,
    "copy:copying_simple": copies,
    "copy:copying_multiple": several_copies,
    "copy:repeat_phrase": phrases,
    "new:copy_span_idx": spans,
    "paragraphs:paragraphs": two_paragraphs("\n***\n"),
    "paragraphs:paragraphs2": two_paragraphs("\n\n"),
    "count:counting_composition": composition,
    "detectable_format:sentence_hyphens": joined,
    "detectable_format:square_brackets": bracketed,
    "detectable_format:bigram_wrapping": bigrams,
    "punctuation:punctuation_dot": without("."),
    "punctuation:punctuation_exclamation": without("!"),
    "keywords:word_once": including,
    "keywords:word_count_different_numbers": times,
    "keywords:exclude_word_harder": excluding,
    "keywords:keyword_specific_position": placed,
    "keywords:palindrome": palindromes,
    "keywords:start_end": framed,
    "keywords:no_adjacent_consecutive": apart,
    "first_word:first_word_sent": at_the_ends(True, True),
    "first_word:first_word_answer": at_the_ends(True, False),
    "last_word:last_word_sent": at_the_ends(False, True),
    "last_word:last_word_answer": at_the_ends(False, False),
    "count:lowercase_counting": few_lowercase,
    "count:count_unique": unique,
    "count:count_increment_word": once_and_twice,
    "letters:letter_counting": letters,
    "letters:letter_counting2": one_letter,
}
