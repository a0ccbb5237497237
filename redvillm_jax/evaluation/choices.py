"""Reads the option that a free-text prediction chooses, by rules. An unclear prediction gives None, never a guess."""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from redvillm_jax.evaluation.short_answers import words

YES_NO = {"yes": ("yes", "是", "对", "有", "会"), "no": ("no", "不", "否", "没")}

_SHORT = ("none", *YES_NO["yes"], *YES_NO["no"])  # options that are no part of a longer text

# While a text is read, one character replaces each label and each option's text: see `_mark`.
_LABELS, _TEXTS = 0xA000, 0xA200  # Yi syllables, which are letters to a pattern and in no prediction
_L, _T, _M = "[\ua000-\ua1ff]", "[\ua200-\ua3ff]", "[\ua000-\ua3ff]"
_MARKS = ".,;:!?。；：！？"
_KIND = r"(?i:(?:the +)?(?:option|choice|caption|sentence|statement)\b|选项)[ :]*"

_NEGATION = re.compile(
    r"\b(?:not|no|none|never|neither|nor|without|cannot|wrong|incorrect|false|unlikely|least|except|than|instead"
    r"|anything but|eliminat\w+|exclud\w+|rul\w+ out)\b|n['’]t\b|[不没未错]|非(?!常)|无(?!疑)|排除|除了",
    re.IGNORECASE,
)
_UNDECIDED = re.compile(r"\b(?:while|although|though|initially|either|between|whether)\b|虽然|起初", re.IGNORECASE)
_CORRECTED = re.compile(r"\b(?:wait|actually|correction|sorry)\b|[.;!?] no,|更正|不对", re.IGNORECASE)

_FILLER = (
    r"(?i:(?:is|was|be|would|should|could|might|must|has|have|to|seems?|appears?|will|with|most|more|very|likely|just"
    r"|then|here|only|\w{2,12}ly|thus|so|hence|maybe|perhaps|therefore|and|but|the|an?|that|this|it|its|one|letter"
    r"|number|for|of|among|given|question|choices|options?|caption|sentence|statement|fits|best|i|we|['’]?[ds]|['’]m|['’]ll|give"
    r"|guess|think|say|believe|choice|clear)\b|[为是应该显然就选项我])"
)
_NOUN = (
    r"(?i:\b(?:answer|ans|choice|pick|selection|response|prediction|output|conclusion|guess|assistant|final"
    r"|(?:right|correct|best|selected|chosen) (?:option|caption|sentence|statement|one)|option(?= *(?:[:=]|is\b)))\b"
    r"|答案|回答|答(?=[:：])|正确选项|正确的|最合适的)"
)
_VERB = (
    r"(?i:\b(?:think|believe|choose|pick|select|say|guess|(?:go|going) with|opt for|conclude"
    r"|corresponds? to|match(?:es)?|(?:it|this|that)(?: is|['’]s| must be| has to be| could be| would be)|must be)\b"
    r"|选择?|[是为]|觉得|认为)"
)
_RIGHT = (
    r"(?i:[) ]*(?:选项|项)?(?:才?是|最|更|才)*(?:正确|对|合适|符合|准确|答案)"
    r"|\)?,? +(?:is|are|seems?|looks?|would be|must be)(?: (?:the|an?|to be|more|most|\w+ly))*"
    r" (?:correct|right|answer|best|better|likely|true|accurate|one|closest|match|it)\b"
    r"|: *(?:yes|correct|right|true)\b|\)? +(?:fits|matches|describes|is\W*$))"
)
_ANNOUNCED = re.compile(rf"{_NOUN}(?:\W{{0,4}}{_FILLER}){{0,12}}\W{{0,6}}({_M}+)")
_STATED = (
    re.compile(rf"{_VERB}(?:\W{{0,4}}{_FILLER}){{0,12}}\W{{0,6}}({_M}+)"),
    re.compile(rf"({_M}+){_RIGHT}"),
    re.compile(
        rf"^\W{{0,6}}(?:\d+[.)]\s*)?(?:{_FILLER}\W{{0,4}}){{0,12}}(?:{_KIND})?\W{{0,6}}({_M}+)"
        r"\W{0,6}(?:选项|项|(?i:definitely|i (?:think|guess|believe)))?\W{0,6}$"
    ),
)
_NAMED = re.compile(rf"(?:{_KIND}|\bonly |\()({_L}+)")

_SPLIT = re.compile(
    r"(?<=[;!?\n。；！？])|(?<=[,，])(?! *(?:is|are|was|were|can|还是)\b)|(?<=\.)(?=\s|$)"
    r"|(?i:(?=(?<!anything )\b(?:but|so|therefore|thus|hence|because|since|however|rather than|instead of|than|while"
    r"|although|as)\b))"
    r"|(?=而|所以|因此|但|故|因为|不是|不选|并非)"
    rf"|(?=\b(?i:not)\s+(?:{_KIND})?\(?{_M})|(?=\b(?i:and) (?:not\b|(?:{_KIND})?{_M}+\)? (?:is|was|are)\b))"
    rf"|(?<={_M}[.:)\]、])(?!\s*(?i:no|yes|wrong|incorrect|false|correct|right|true)\b)(?=\s*\w)"
    rf"|(?<={_M} [-–—=] )(?!(?i:no|yes|wrong|incorrect|false|correct|right|true)\b)"
)
_OR = (
    r"(?:(?:[.,;]\s*)?(?i:\b(?:or|and|nor|to|vs)\b)\.?|[/&+、]|或者?|和|与|还是)\s*"
    r"(?:(?i:also|maybe|possibly|perhaps)\s+)?"
)
_SEVERAL = (
    re.compile(rf"({_M})[\s)\]]*,?\s*{_OR}(?:{_KIND})?[(\[]?(?={_M})"),
    re.compile(rf"({_L})[)\]]?\s*[(\[]?(?={_L})"),
    re.compile(rf"({_M})\)?, *\(?(?={_M}+\)?\s*(?:$|[.;!?)\]}}\n]|(?:are|were|and|or)\b|,\s*\(?{_M}))"),
)


class Option(NamedTuple):
    """ "Option 2: He sits." has the label "Option 2", the name "2" and the text "He sits."."""

    label: str
    name: str
    text: str


def option(choice: str) -> Option:
    """Reads one of an answer's "choices": "A. cat", "(A) cat", "Sentence B: …". A text without a label is its own."""
    found = re.fullmatch(r"\(?([^.:)]{1,20})[.:)](?:\s+(.*))?", choice.strip(), re.DOTALL)
    if found is None:
        return Option(choice, "", choice)
    last = found[1].split()[-1] if found[1].strip() else ""
    return Option(found[1], last if re.fullmatch(r"[A-Za-z]|\d{1,2}", last) else "", found[2] or "")


def chosen(prediction: str, choices: Sequence[str]) -> str | None:
    """Returns the label of the option that a prediction chooses, None when it names no option or several.

    Thoughts before the answer are skipped; a marked answer (\\boxed{B}, <answer>B</answer>) stands for the whole. The
    text is read clause by clause, and an option's text counts as its label does. Options in a clause with a negation
    are denied. Among the other clauses, the first of these rules that finds an option decides: options that are
    announced ("The answer is B", 答案是B), stated or alone ("I think it is B", "B is right", "B. …"), named
    ("option B", "(B)"), and texts within a sentence. Nothing is chosen when the rule finds several options, an option
    that another clause denies, or a label beside another option's text.
    """
    options = [option(choice) for choice in choices]
    text = _answer(prediction)
    for one in options:
        if (own := _plain(one.text).strip(_MARKS)) and own.lower() == text.strip(_MARKS).lower():
            return one.label if own.upper() not in {o.name.upper() for o in options if o.name != one.name} else None
    text = _mark(text, options)
    if _contradicts(text):
        return None
    tiers, denied = _read(text)
    if _CORRECTED.search(text):
        tiers = [set().union(*tiers[:3]), tiers[3]]
    found = next((tier for tier in tiers if tier), set())
    if len(found) == 1 and not found & denied:
        return options[found.pop()].label
    return None


def yes_or_no(text: str) -> str | None:
    """Returns "yes" or "no" when the text begins with it, or has only one of the two; None otherwise.

    A "no" before another word ("there is no way to tell") does not count.
    """
    said = words(text)
    for answer, forms in YES_NO.items():
        if said and said[0] in forms:
            return answer
    found = set(re.findall(r"\byes\b|\bno\b(?=\W*(?:[.,;:!?\n]|or\b|$))", text.lower()))
    return found.pop() if len(found) == 1 else None


def _answer(prediction: str) -> str:
    """A prediction without its thoughts, or the marked answer alone when there is one."""
    text = re.split(r"</think(?:ing)?>", prediction)[-1]
    text = re.sub(r"<think(?:ing)?>.*", "", text, flags=re.DOTALL)  # thoughts that do not end
    text = re.sub(r"\\(?:text|textbf|mathbf|mathrm) *\{([^{}]*)\}", r"\1", text)
    marked = re.findall(r"\\boxed *\{([^{}]*)\}|<ans(?:wer)?>(.*?)</ans(?:wer)?>", text, re.DOTALL)
    parts = {_plain("".join(pair)) for pair in marked}
    return _plain("; ".join(sorted(parts)) if parts else text)


def _plain(text: str) -> str:
    """A text in common characters, without quotation marks, emphasis and tags."""
    text = re.sub("[\ua000-\ua4cf]", "", unicodedata.normalize("NFKC", text))
    text = re.sub(r"n['’]t\b", " not", text)
    text = re.sub(r"[*\"“”‘`$#•]|</?[a-z]\w*>|<\|\w+\|>|\\[()\[\]]|(?<!\w)['’]|['’](?!\w)", "", text)
    return re.sub(r"[【】_]", " ", text).strip()


def _mark(text: str, options: Sequence[Option]) -> str:
    """The text with one character for every option's text and label: `_TEXTS` or `_LABELS` plus the option's number.

    Listed options ("A, B or C") then stand beside each other, and a label with its own text becomes the label.
    """
    names = [o.name.upper() for o in options]
    if not any(name.isdigit() for name in names):
        text = re.sub(rf"{_KIND}\d+", "#", text)  # "Option 3" does not mean the text "3"
    patterns = [_text_pattern(o.text) for o in options]
    for i in sorted(range(len(options)), key=lambda i: -len(options[i].text)):
        if patterns[i] is not None and patterns.index(patterns[i]) == i:
            text = re.sub(patterns[i], chr(_TEXTS + i), text, flags=re.IGNORECASE)
    for i, name in enumerate(names):
        if name:
            text = _mark_label(text, name, chr(_LABELS + i))
    for i in range(len(options)):
        label, own = chr(_LABELS + i), chr(_TEXTS + i)
        text = re.sub(rf"{label}[^\w\n]{{1,4}}{own}", label, text)
        text = re.sub(rf"{own}\s*[(,:-]\s*(?:{_KIND})?{label}", label, text)
    for pattern in _SEVERAL:
        text = pattern.sub(r"\1", text)
    return re.sub(f"{_M}{{2,}}", lambda row: "".join(sorted(set(row[0]))), text)


def _mark_label(text: str, name: str, mark: str) -> str:
    """Marks a label's name: a capital or number by itself, a small letter only when nothing else can be meant."""
    if name.isalpha():
        small, end = name.lower(), r"(?=\s*(?:[.,;!)\]}\n]|$))"
        for pattern in (
            rf"([(\[]){small}(?=[)\]])",
            rf"(^){small}(?=\s*(?:[.):\]]|,(?! *[a-z]\b)|$)| +{_T}|{_RIGHT})",
            rf"((?:{_KIND}|[是选]|\bletter )){small}(?:{end}|(?= *(?:is\b|[:\ua200-\ua3ff])))",
            rf"((?:{_NOUN}|{_VERB})(?:\W{{1,4}}{_FILLER}){{0,12}}\W{{1,6}}){small}(?:{end}|(?={_RIGHT}))",
        ):
            text = re.sub(pattern, rf"\g<1>{name}", text)
    # The English word A is no label, nor is I: not in "A cat", but in "A is right".
    follow = "is|because|or|and" + "|was|since|as|to|fits|matches|describes|seems|but|not|rather|instead" * (
        name != "I"
    )
    alone = rf"(?<![A-Za-z0-9'’+-])(?<![A-Za-z]\.)(?<!\d[.,:]){name}(?![A-Za-z0-9'’+-]|[.,:]\d)"
    return re.sub(rf"{alone}(?! +(?!(?:{follow})\b)[a-z])", mark, text)


def _text_pattern(text: str) -> str | None:
    """A pattern for an option's text with any punctuation and first article; None for a text without a word."""
    own = re.sub(r"^(?:an?|the) +", "", _plain(text), flags=re.IGNORECASE)
    parts = [re.escape(part) for part in re.findall(r"\w+(?:[.:]\d+)*", own)]
    if not parts:
        return None
    body = r"[^\w\n]+".join(parts)
    if own.rstrip(_MARKS).lower() in _SHORT or re.fullmatch("[A-Za-z]", own):
        return rf"(?:^|(?<=answer is )|(?<=answer: )|(?<=答案是)){body}(?=\s*(?:[{_MARKS}(]|$))"
    before = r"(?<![A-Za-z0-9.:/-])" if own[0].isdigit() else r"(?<![A-Za-z0-9])" if own[0].isascii() else ""
    after = r"(?![A-Za-z0-9]|[.,:/-]\d)" if own.rstrip(_MARKS)[-1:].isascii() else ""
    return rf"(?:(?<![A-Za-z])(?:an?|the) +)?{before}{body}{after}"


def _contradicts(text: str) -> bool:
    """Whether a label stands beside another option's text. (A label with its own text is marked as the label.)"""
    end = r"(?=\s*(?:[.,;!)]|\n|$))"
    return bool(
        re.search(rf"{_L}(?:[.:,)\]-]+ *| +){_T}{end}", text) or re.search(rf"{_T} *[(,] *(?:{_KIND})?{_L}{end}", text)
    )


def _read(text: str) -> tuple[list[set[int]], set[int]]:
    """The options that a marked text announces, states, names and contains as text; and the options that it denies."""
    announced, stated, named, texts, denied = set(), set(), set(), set(), set()
    clauses = [clause for clause in _SPLIT.split(text) if clause.strip()]
    for clause in clauses:
        if _NEGATION.search(clause):
            denied |= _options(clause)
        elif not (_UNDECIDED.search(clause) or (clause.rstrip().endswith("?") and len(clauses) > 1)):
            announced |= _options("".join(_ANNOUNCED.findall(clause)))
            stated |= {option for pattern in _STATED for found in pattern.findall(clause) for option in _options(found)}
            named |= _options("".join(_NAMED.findall(clause)))
            texts |= _options("".join(re.findall(_T, clause)))
    return [announced, stated, named, texts], denied


def _options(text: str) -> set[int]:
    """The numbers of the options that are marked in a text."""
    return {ord(c) - (_TEXTS if ord(c) >= _TEXTS else _LABELS) for c in re.findall(_M, text)}
