"""Which option a free-text prediction chooses, by rules that never guess: what they cannot tell is None."""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from redvillm_jax.evaluation.short_answers import tokens, words

YES_NO = {"yes": ("yes", "是", "对", "有", "会"), "no": ("no", "不", "否", "没")}
_NEGATION = re.compile(r"\b(?:not|no|none|never|neither|nor|without|cannot)\b|n['’]t\b|[不没非无]", re.IGNORECASE)
_KIND = r"(?i:(?:option|choice|caption|sentence|statement|letter|选项) *:? *)"
_MARKS = ".,;:!?。；：！？"


class Option(NamedTuple):
    """ "Option 2: He sits." has the label "Option 2", the name "2" and the text "He sits."."""

    label: str
    name: str
    text: str


def option(choice: str) -> Option:
    """Reads one of a row's "choices": "A. cat", "(A) cat", "Sentence B: …"; one without a label is its own."""
    found = re.fullmatch(r"\(?([^.:)]{1,20})[.:)](?:\s+(.*))?", choice.strip(), re.DOTALL)
    if found is None:
        return Option(choice, "", choice)
    last = found[1].split()[-1] if found[1].strip() else ""
    return Option(found[1], last if re.fullmatch(r"[A-Za-z]|\d{1,2}", last) else "", found[2] or "")


def chosen(prediction: str, choices: Sequence[str]) -> str | None:
    """Returns the label of the option that a prediction chooses, None if it names none or more than one.

    The first rule that finds something decides, and finds nothing if that is more than one option:
    the whole, or its beginning up to a punctuation mark, is an option's text; it is a label (b, (B), Option 2);
    an answer is announced ("The answer is B", 答案是B); a line begins with a label ("B.", "(B) the dog"); an option is
    named ("option B"); a letter is stated ("I think it is B", "B is right"); one option's text stands in it, and no
    negation.
    """
    options = [option(choice) for choice in choices]
    text = _plain(prediction)
    begins = [o for o in options if (own := _plain(o.text).rstrip(_MARKS)) and _begins(text, own)]
    if begins:
        return max(begins, key=lambda o: len(o.text)).label  # of equal options the first, which is the answer then
    named = {o.name.lower(): o.label for o in options if o.name}
    if whole := re.fullmatch(rf"{_KIND}?\(?([a-z]|\d+)[){_MARKS}]*", text, re.I):
        return named.get(whole[1].lower())
    for rule in _rules("|".join(re.escape(name.upper()) for name in named)) if named else ():
        if found := {name for match in re.finditer(rule, text, re.MULTILINE) for name in match.groups() if name}:
            return named[found.pop().lower()] if len(found) == 1 else None
    said = f" {' '.join(tokens(text))} "
    texts = {o.label: tokens(o.text) for o in options}
    inside = {label: tuple(own) for label, own in texts.items() if own and f" {' '.join(own)} " in said}
    longest = [label for label, words in inside.items() if not any(set(words) < set(w) for w in inside.values())]
    if len({inside[label] for label in longest}) == 1 and not _NEGATION.search(text):
        return longest[0]
    return None


def yes_or_no(text: str) -> str | None:
    """Returns "yes" or "no", as the text begins, or if it has the word for one of them only; None otherwise."""
    said = words(text)
    for answer, forms in YES_NO.items():
        if said and said[0] in forms:
            return answer
    return {(True, False): "yes", (False, True): "no"}.get(("yes" in said, "no" in said))


def _rules(name: str) -> list[str]:
    """Patterns whose groups are labels' names, the strictest first. `name` is a pattern for one."""
    # The English word A is no label: not in "A cat", but in "A is right". Of "B or C" both are found.
    label = rf"\(?({name})(?![\w'’-])(?! +(?!(?:is|was|because|since|would|seems|as|or|and)\b)[a-z])"
    label += rf"(?:\)? *(?:,|/|&|or\b|and\b|或|和)? *{_KIND}?\(?({name})(?![\w'’-])(?! +[a-z]))?"
    verbs = "is|it['’]s|be|think|choose|pick|select|say|guess"
    return [
        rf"(?:(?i:\banswer)|答案|应选|选择|选)(?i: +(?:is|would be|should be|must be)|是|为)? *:? *{_KIND}?{label}",
        rf"^ *{_KIND}?(?=\({name}\)|{name}(?:[.:)](?!\w)| *$| +[-–—] )){label}",
        rf"{_KIND}{label}",
        rf"(?:(?i:\b(?:{verbs})) +|\B(?=\({name}\))|^(?={name} +(?:is|was|because|since|would|seems)\b)){label}",
    ]


def _begins(text: str, option: str) -> bool:
    """Whether a text is an option, or begins with it up to a punctuation mark."""
    return re.match(rf"{re.escape(option)}(?:[{_MARKS}](?!\d)|\n|$)", text, re.IGNORECASE) is not None


def _plain(text: str) -> str:
    """A text in common characters, without quotation marks and emphasis."""
    return unicodedata.normalize("NFKC", re.sub(r"[*\"“”`]", "", text)).strip()
