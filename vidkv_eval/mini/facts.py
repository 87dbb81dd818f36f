"""Facts in a sentence: the closed set of words that carry them, and the share of a reference's facts found in an answer."""

import re

from vidkv_eval.mini.scenes import COLOURS, COLUMNS, COUNTS, MOTIONS, ROWS, SHAPES

KIND = {
    word: kind
    for kind, words in {
        "colour": COLOURS,
        "shape": SHAPES,
        "motion": MOTIONS,
        "row": ROWS,
        "column": COLUMNS,
        "count": COUNTS.values(),
    }.items()
    for word in words
}


def fact_words(sentence: str) -> list[str]:
    """The words of a sentence that carry facts, in order, lower case."""
    return [word for word in re.findall(r"[a-z]+", sentence.lower()) if word in KIND]


def fact_share(question: str, reference: str, answer: str) -> float | None:
    """Share of the reference's facts that the answer states at the same place.

    The i-th colour of the answer is compared with the i-th colour of the reference, and so for every kind of fact. Facts
    that the reference only repeats from the question earn nothing.

    Returns:
        0 to 1, or None if the reference holds no fact that the question does not give away.
    """
    given = fact_words(question)
    stated: dict[str, list[str]] = {}
    for word in fact_words(answer):
        stated.setdefault(KIND[word], []).append(word)
    seen: dict[str, int] = {}
    hits = total = 0
    for word in fact_words(reference):
        kind = KIND[word]
        place = seen.get(kind, 0)
        seen[kind] = place + 1
        if word in given:
            given.remove(word)
            continue
        total += 1
        hits += stated.get(kind, [])[place : place + 1] == [word]
    return hits / total if total else None
