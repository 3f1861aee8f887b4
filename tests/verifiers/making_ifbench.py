"""IFBench's instructions about words and sentences: arguments, a response made to follow and one made to violate."""

from itertools import pairwise

from tests.verifiers.making_ifevalg import WORDS, placed, sentence, words

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
    good = [f"{a.capitalize()} is the {b}." for a, b in pairwise(given)]
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
}
