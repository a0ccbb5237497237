"""Rules that find suspicious machine translations between English and Chinese."""

import re

from data_pipeline.text.numerals import changed_numbers

# Characters of the translation per character of the source; SLACK more or fewer are always fine, for short texts.
LENGTH_RATIO = {"zh": (0.15, 0.8), "en": (1.2, 7.0)}
SLACK = 10
# Chinese characters among all letters of the translation; a Chinese one says as much as three Latin ones.
CHINESE_SHARE = {"zh": (0.25, 1.0), "en": (0.0, 0.1)}

_CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_LATIN = re.compile(r"[A-Za-z]")
_ENGLISH_PHRASE = re.compile(r"\b[a-z]{2,}(?:,? [a-z]+){3,}")
_REFUSAL = re.compile(
    r"^\W*(?:i['’]?m (?:very )?sorry|i am (?:very )?sorry|sorry\b|my apologies|i apologi[sz]e|apologies\b"
    r"|i (?:cannot|can['’]?t|can not)\b|i['’]?m (?:unable|not able)|i am (?:unable|not able)|unfortunately, i"
    r"|as an ai\b|(?:很|非常)?抱歉|对不起|我(?:无法|不能|没有办法)|很遗憾)"
    r"|\bas an? (?:ai|artificial intelligence)\b|\bai (?:language )?model\b"
    r"|作为(?:一个|一名|一款)?\s*(?:ai|人工智能|大?语言模型)",
    re.IGNORECASE,
)
_REMARK = re.compile(r"\btranslat(?:e|es|ed|ion|ions|ing)\b|翻译|译文|译为", re.IGNORECASE)
_CONTROL = re.compile(
    r"<\|[^|<>]{1,40}\|>|<</?SYS>>|\[/?INST\]"
    r"|</?(?:s|pad|unk|img|image|imgpad|ref|box|quad|video|think|vid_start|vid_end|vid_patch|im_start|im_end|im_patch)>",
    re.IGNORECASE,
)
PHRASE_WORDS = 6  # so many consecutive words of the prompt count as an echo of it


def suspicions(source: str, translation: str, target: str, prompt: str) -> list[str]:
    """Returns the reasons why a person should look at a translation, [] for an inconspicuous one.

    target: "zh" (from English) or "en" (from Chinese). prompt: the instructions to the translator.
    """
    rules = (
        _length(source, translation, target),
        _untranslated(source, translation, target),
        _numbers(source, translation),
        _refused(source, translation),
        _echo(source, translation, prompt),
        _control_tokens(source, translation),
    )
    return [reason for reason in rules if reason]


def chinese_characters(text: str) -> int:
    """The number of Chinese characters in a text."""
    return len(_CHINESE.findall(text))


def _length(source: str, translation: str, target: str) -> str | None:
    low, high = LENGTH_RATIO[target]
    if low * len(source) - SLACK <= len(translation) <= high * len(source) + SLACK:
        return None
    return f"length: {len(translation)} characters for {len(source)}, expected {low:g} to {high:g} times as many"


def _untranslated(source: str, translation: str, target: str) -> str | None:
    if not re.search(r"[a-z]", source) and not _CHINESE.search(source):
        return None  # 42, 3D, BMX: the same in both languages
    chinese, latin = chinese_characters(translation), len(_LATIN.findall(translation))
    if chinese + latin == 0:
        return "untranslated: there are no letters"
    low, high = CHINESE_SHARE[target]
    if not low <= chinese / (chinese + latin) <= high:
        return f"untranslated: {chinese} Chinese characters and {latin} Latin letters"
    if target == "zh" and (phrase := _ENGLISH_PHRASE.search(translation)):
        return f"untranslated: {phrase[0]!r}"
    return None


def _numbers(source: str, translation: str) -> str | None:
    lost, added = changed_numbers(source, translation)
    if not lost and not added:
        return None
    return f"numbers changed: {', '.join([f'-{number}' for number in lost] + [f'+{number}' for number in added])}"


def _refused(source: str, translation: str) -> str | None:
    found = _REFUSAL.search(translation)
    return f"refused: {found[0]!r}" if found and not _REFUSAL.search(source) else None


def _echo(source: str, translation: str, prompt: str) -> str | None:
    words = prompt.split()
    phrases = (" ".join(words[i : i + PHRASE_WORDS]) for i in range(len(words) - PHRASE_WORDS + 1))
    echoed = next((phrase for phrase in phrases if phrase in translation and phrase not in source), None)
    if echoed is None and (remark := _REMARK.search(translation)) and not _REMARK.search(source):
        echoed = remark[0]
    return f"speaks of the task: {echoed!r}" if echoed else None


def _control_tokens(source: str, translation: str) -> str | None:
    before, after = (sorted(_CONTROL.findall(text)) for text in (source, translation))
    return f"control tokens: {after} for {before}" if before != after else None
