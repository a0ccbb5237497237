"""Chat templates of model folders: found wherever they lie, rendered at run time, and cut at the visual tokens.

transformers renders them, in jinja2's sandbox and without torch; its processors' `apply_chat_template` is the source of
all token ids here.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common.errors import UserError

# In transformers' order: its processors prefer the first, its tokenizers the last two.
FILES = ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json")
BASE_MARK = "base.json"

# Characters that Unicode keeps out of texts. A control token that a person has typed stands between the first two.
OPEN, CLOSE, SAMPLE = "\ufdd0", "\ufdd1", "\ufdd2"


class Turn(NamedTuple):
    """How a template writes an assistant's turn behind the prompt.

    lead: text between the prompt and the answer. end: the token behind the answer that ends the turn. strips: whether
    white space at the ends of an answer is dropped.
    """

    lead: str
    end: str
    strips: bool


def find_template(folder: str | Path) -> tuple[str, str] | None:
    """Returns the name of the file with a folder's chat template and the template, None for a folder without one.

    A base folder whose base.json names no file has none: models were trained on it with their family's own prompt.
    Raises UserError for a file that cannot be read.
    """
    folder = Path(folder)
    mark = folder / BASE_MARK
    if mark.is_file() and not read_object(mark).get("chat_template"):
        return None
    for name in FILES:
        file = folder / name
        if not file.is_file():
            continue
        found = read_text(file) if file.suffix == ".jinja" else read_object(file).get("chat_template")
        if isinstance(found, list):  # named templates, as older tokenizers have them
            found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str) and found:
            return name, found
    return None


def read_text(file: Path) -> str:
    """The text of a file. Raises UserError when it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy it again") from None


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises UserError for other content."""
    try:
        value = json.loads(read_text(file))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: a JSON {type(value).__name__}, expected an object; copy it again")
    return value


def control_tokens(tokenizer: Any, template: str | None) -> list[str]:
    """Returns the added tokens of transformers' `tokenizer` that a person must not be able to type.

    With a template they are the special tokens and what the template writes, white space aside (Gemma adds its line
    breaks), without one all added tokens: old files add <im_start> as a common word.
    """
    added = tokenizer.added_tokens_decoder.values()
    written = [token for token in added if template is None or (token.content in template and token.content.strip())]
    return list(dict.fromkeys(token.content for token in (*written, *(token for token in added if token.special))))


# ---- rendering


def render(tokenizer: Any, question: str, answer: str | None, typed: bool, picture_token: str | None = None) -> str:
    """Renders one question, with its answer or up to the start of the answer. Raises UserError when the template fails.

    typed: whether messages hold lists of typed parts, the picture first, or strings. picture_token: the picture's place
    in a string; None: no picture.
    """

    def message(role: str, text: str, picture: bool) -> dict[str, Any]:
        if not typed:
            return {"role": role, "content": f"{picture_token}\n{text}" if picture else text}
        parts = [{"type": "image"}] if picture else []
        return {"role": role, "content": [*parts, {"type": "text", "text": text}]}

    chat = [message("user", question, picture_token is not None)]
    if answer is not None:
        chat.append(message("assistant", answer, False))
    options = {"chat_template": tokenizer.template, "add_generation_prompt": answer is None, "tokenize": False}
    try:
        return tokenizer.tokenizer.apply_chat_template(chat, **options)
    except Exception as error:  # a template may raise any exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{tokenizer.folder}: its chat template fails on a question ({reason}); use the files of these weights"
        ) from None


def answer_turn(tokenizer: Any) -> Turn:
    """Reads how the template writes an answer from the rendering of a sample.

    A template that ends a turn with no control token is completed by the tokenizer's end-of-text token, as the models'
    training does. Raises UserError when no rendering has the answer, or no token ends it.
    """
    prompt, whole, wide = "", "", ""
    for typed in (True, False):
        try:
            prompt, whole, wide = (render(tokenizer, "?", answer, typed) for answer in (None, SAMPLE, f" {SAMPLE} "))
        except UserError:
            if not typed:
                raise
        if SAMPLE in whole:
            break
    else:
        raise UserError(f"{tokenizer.folder}: its chat template writes no answers; use the files of these weights")
    begin, behind = whole.split(SAMPLE, 1)
    # Where the answered turn begins in other words than the prompt (OneVision's "assistant \n" and "assistant\n"), an
    # answer follows the prompt, as it does when the model answers.
    lead = begin.removeprefix(prompt) if begin.startswith(prompt) else ""
    found = tokenizer.controls.search(behind)
    if found is None and tokenizer.eos is None:
        raise UserError(
            f"{tokenizer.folder}: neither its chat template nor its tokenizer has a token that ends an answer; use the "
            "files of these weights"
        )
    end = tokenizer.eos if found is None else behind[: found.end()]
    return Turn(lead, end, strips=wide == whole)


@functools.lru_cache(maxsize=64)
def takes_parts(tokenizer: Any, picture_token: str) -> bool:
    """Returns whether the template takes lists of typed parts, or only strings. Raises UserError where it fits neither.

    It fits when it writes the picture's place once, and the question behind it.
    """
    found = []
    for typed in (True, False):
        try:
            text = render(tokenizer, SAMPLE, None, typed, picture_token)
        except UserError as error:
            found.append(str(error))
            continue
        head, *tail = text.split(picture_token)
        if len(tail) == 1 and SAMPLE in tail[0] and SAMPLE not in head:
            return typed
        wrong = f"no place for a picture ({picture_token})" if not tail else "no single place for the picture"
        wrong = "the question before the picture" if len(tail) == 1 and SAMPLE in head else wrong
        found.append(f"{tokenizer.folder}: its chat template writes {wrong}, expected the picture, then the question")
    raise UserError(found[0])


# ---- token ids


def mark(tokenizer: Any, text: str) -> str:
    """A person's text with its control tokens between markers, so that they are encoded as plain text."""
    clean = re.sub(f"[{OPEN}{CLOSE}{SAMPLE}]", "", text)
    return tokenizer.controls.sub(f"{OPEN}\\g<0>{CLOSE}", clean)


def encode(tokenizer: Any, text: str, *, behind: bool) -> list[int]:
    """Returns the ids of rendered text: control tokens of the template by their ids, marked ones as plain text.

    behind: whether `text` follows other text; otherwise it begins a prompt, with the tokenizer's own first token where
    the template does not write it.
    """
    marked = re.compile(f"{OPEN}({tokenizer.controls.pattern}){CLOSE}|[{OPEN}{CLOSE}]")
    ids: list[int] = []
    for i, piece in enumerate(marked.split(text)):  # plain pieces have odd numbers, and are None for a lone marker
        if i == 0 and not behind:
            ids += tokenizer.encode_start(piece)
        elif piece:
            ids += tokenizer.encode_behind(piece, plain=i % 2 == 1)
    return ids


def chat_prompt(
    tokenizer: Any,
    question: str,
    answer: str | None,
    *,
    picture_token: str,
    visual_token: str | None = None,
    opening: str = "",
    closing: str = "",
) -> tuple[list[tuple[int, bool]], list[tuple[int, bool]]]:
    """Returns the tokens before and behind the visual tokens in the form of the contract's `prompt`.

    The ids are those of transformers' `apply_chat_template` with a picture. The second part ends at the start of the
    answer, or with the answer and the token that ends its turn, which are supervised; it begins with the same tokens in
    both cases. Special tokens in the question and the answer are read as plain text.

    tokenizer: an HfTokenizer. picture_token: what the template writes for a picture. visual_token: the token that
    transformers repeats in its place, by default the same; opening, closing: the text that it puts around them. Raises
    UserError for a folder without a template and for a template that fails, has no picture, or has it too late.
    """
    if tokenizer.template is None:
        raise UserError(f"{tokenizer.folder}: no chat template in {', '.join(FILES)}; copy the model's own files")
    for token in re.findall(r"<[^<>]+>", opening + closing):
        tokenizer.special(token)
    slot = visual_token or picture_token
    slot_id = tokenizer.slot_id(slot)
    text = render(tokenizer, mark(tokenizer, question), None, takes_parts(tokenizer, picture_token), picture_token)
    place = re.search(f"(?<!{OPEN}){re.escape(picture_token)}", text)
    ids = encode(tokenizer, f"{text[: place.start()]}{opening}{slot}{closing}{text[place.end() :]}", behind=False)
    cut = ids.index(slot_id)
    reply = []
    if answer is not None:
        turn = tokenizer.turn
        words = mark(tokenizer, answer.strip() if turn.strips else answer)
        reply = encode(tokenizer, f"{turn.lead}{words}{turn.end}", behind=True)
    return [(i, False) for i in ids[:cut]], [(i, False) for i in ids[cut + 1 :]] + [(i, True) for i in reply]
