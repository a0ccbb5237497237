"""Questions as token rows: the prompt of each video and question, checked, counted and shown."""

import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipeline.errors import UserError
from data_pipeline.packing import Prefix, Question


def make_prefix(before: Sequence[tuple[int, bool]], slots: Sequence[int]) -> Prefix:
    """The tokens before the video, then the video's token slots."""
    ids = [token for token, _ in before] + [0] * len(slots)
    return Prefix(
        ids=np.array(ids, np.int32),
        video_tokens=np.array([-1] * len(before) + list(slots), np.int32),
        supervised=np.array([flag for _, flag in before] + [False] * len(slots), bool),
    )


def tokenize(
    base: ModuleType, tokenizer: Any, config: Any, instructions: Sequence[Mapping[str, Any]], *, labels: str
) -> tuple[list[tuple[int, bool]], list[Question]]:
    """Tokenises every instruction with the base's own chat template.

    Returns what stands before every video, and one Question per instruction. Raises UserError when a text does
    not survive encoding and decoding, an id is beyond the embedding, or an answer has no supervised token.
    """
    before: list[tuple[int, bool]] = []
    questions = []
    for row in tqdm(instructions, desc="tokenise", unit="question", delay=3, dynamic_ncols=True):
        for text in (row["question"], row["answer"]):
            check_round_trip(tokenizer, text, row["id"])
        before, after = base.prompt(tokenizer, config, row["question"], row["answer"], labels=labels)
        ids, supervised = zip(*after, strict=True)
        if max(ids) >= config.vocab_size or min(ids) < 0:
            raise UserError(
                f"question {row['id']!r}: token id {max(ids)} is beyond the base's {config.vocab_size} embeddings; "
                "the tokenizer files do not belong to these weights"
            )
        if not tokenizer.encode(row["answer"]):
            raise UserError(f"question {row['id']!r}: the answer has no token to learn; give it a text or remove it")
        questions.append(Question(ids=np.array(ids, np.int32), supervised=np.array(supervised, bool)))
    return before, questions


def check_round_trip(tokenizer: Any, text: str, where: str) -> None:
    """Raises UserError unless decode(encode(text)) is the text, up to NFC and white space at its ends."""
    back = tokenizer.decode(tokenizer.encode(text))
    if unicodedata.normalize("NFC", back).strip() != unicodedata.normalize("NFC", text).strip():
        raise UserError(
            f"question {where!r}: the tokenizer turns {text!r} into {back!r}; "
            "training on it would teach other words: use the base's own tokenizer files, or mend the text"
        )


def show_rows(tokenizer: Any, batch: Mapping[str, np.ndarray], count: int) -> str:
    """The first `count` rows of a batch as text: visual tokens counted, supervised tokens between ⟦ and ⟧."""
    blocks = []
    for r in range(min(count, len(batch["token_ids"]))):
        length = int((batch["group_ids"][r] > 0).sum())
        targets = set((batch["target_slots"][r][batch["target_weights"][r] > 0] + 1).tolist())
        kinds = ["visual" if batch["video_tokens"][r, s] >= 0 else s in targets for s in range(length)]
        text = ""
        for kind, run in itertools.groupby(range(length), key=kinds.__getitem__):
            run = list(run)
            words = tokenizer.decode(batch["token_ids"][r, run].tolist(), keep_special=True)
            text += f"[{len(run)} visual tokens]" if kind == "visual" else f"⟦{words}⟧" if kind else words
        blocks.append(f"row {r}: {length} tokens, {len(targets)} of them supervised\n{text}\n")
    return "\n".join(blocks)
