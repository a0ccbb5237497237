"""The numbers in an English or Chinese text, in digits and in words."""

import re
import unicodedata
from decimal import Decimal

ENGLISH = {
    word: value
    for value, words in {
        0: "zero none",
        1: "one a an first once single january",
        2: "two second twice pair couple both double february",
        3: "three third thrice triple march",
        4: "four fourth april",
        5: "five fifth may",
        6: "six sixth june",
        7: "seven seventh july",
        8: "eight eighth august",
        9: "nine ninth september",
        10: "ten tenth october",
        11: "eleven eleventh november",
        12: "twelve twelfth dozen december",
        **{13 + i: f"{stem}teen {stem}teenth" for i, stem in enumerate("thir four fif six seven eigh nine".split())},
        **{20 + 10 * i: f"{stem}ty {stem}tieth {stem}ties" for i, stem in enumerate("twen thir for fif six".split())},
        **{70 + 10 * i: f"{stem}ty {stem}tieth {stem}ties" for i, stem in enumerate("seven eigh nine".split())},
    }.items()
    for word in words.split()
}
ENGLISH_UNITS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
CHINESE = {digit: value % 10 for value, digit in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
CHINESE_UNITS = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}

_HAN = f"[{''.join((*CHINESE, *CHINESE_UNITS))}]+"
_DIGITS = re.compile(rf"(\d+(?:\.\d+)?)\s*([{''.join(CHINESE_UNITS)}]+|(?:{'|'.join(ENGLISH_UNITS)})\b)?")
_DECADE = re.compile(rf"(\d+|{_HAN})世[纪紀](\d+|{_HAN})年代")


def written(text: str) -> set[Decimal]:
    """The numbers in a text's digits: full-width digits, 1,000, 2.50, 3万, 5 million, 20世纪90年代 (1990)."""
    text = _DECADE.sub(_decade, unicodedata.normalize("NFKC", text))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    numbers = set()
    for digits, unit in _DIGITS.findall(text.lower()):
        scale = ENGLISH_UNITS[unit] if unit in ENGLISH_UNITS else _han(unit) if unit else 1
        numbers.add(Decimal(digits) * scale)
    return numbers


def spelled(text: str) -> set[Decimal]:
    """The numbers that a text's words may mean: cardinals, ordinals, months, "twice", "a", 两, 半, 二十一."""
    numbers = {Decimal(value) for run in re.findall(_HAN, text) for value in (_han(run), *map(_han, run))}
    run: list[str] = []
    for word in [*re.findall(r"[a-z]+", text.lower()), "."]:
        if word in ENGLISH or word in ENGLISH_UNITS:
            run.append(word)
        elif run and word != "and":
            numbers |= {Decimal(_english([word])) for word in run} | {Decimal(_english(run))}
            run = []
    if re.search(r"半|\bhalf\b", text.lower()):
        numbers |= {Decimal("0.5"), Decimal(30)}
    return numbers


def changed_numbers(source: str, translation: str) -> tuple[list[str], list[str]]:
    """The numbers in digits that only one of two texts has, in digits or in words: (lost, added), sorted.

    Words are never compared with words: "one of them" and 一个 mean no number.
    """
    lost = written(source) - written(translation) - spelled(translation)
    added = written(translation) - written(source) - spelled(source)
    return tuple([f"{number.normalize():f}" for number in sorted(numbers)] for numbers in (lost, added))


def _decade(match: re.Match) -> str:
    century, years = (int(text) if text.isdigit() else _han(text) for text in match.groups())
    return f"{(century - 1) * 100 + years}年代"


def _han(run: str) -> int:
    """The value of Chinese numerals: 二十一, 三千五百, 二〇二四."""
    if not any(char in CHINESE_UNITS for char in run):
        return int("".join(str(CHINESE[char]) for char in run))
    total = section = digit = 0
    for char in run:
        unit = CHINESE_UNITS.get(char)
        if unit is None:
            digit = CHINESE[char]
        elif unit < 10**4:
            section, digit = section + (digit or 1) * unit, 0
        else:
            total, section, digit = (total + section + digit or 1) * unit, 0, 0
    return total + section + digit


def _english(words: list[str]) -> int:
    """The value of consecutive number words: two hundred and five, twenty-one thousand."""
    total = section = 0
    for word in words:
        unit = ENGLISH_UNITS.get(word)
        if unit is None:
            section += ENGLISH[word]
        elif unit == 100:
            section = (section or 1) * unit
        else:
            total, section = total + (section or 1) * unit, 0
    return total + section
