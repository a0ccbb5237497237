"""Makes token rows of instructions: tokenizes and checks the prompts, plans the rows of every epoch, shows rows."""

import dataclasses
import functools
import hashlib
import itertools
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipeline.common.errors import UserError
from data_pipeline.packing import Prefix, Question, Row, RowBounds, Step, fill_row, plan_epoch, row_bounds
from data_pipeline.store import VideoStore
from redvillm_jax.bases.contract import Family
from redvillm_jax.model.base_folder import Base
from redvillm_jax.model.places import VideoPlaces

PACKED_ROW = 2048  # slots of a packed row, or more if a question needs them
SHORT_ROW, LONG_ROW = 8, 128  # the slots of a row are a multiple of this; the TPU kernel needs 128 for long rows


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """The config fields that decide the rows of a run; `configs/common.py` explains each."""

    language: str
    labels: str
    pack: bool
    row_length: int
    batch_questions: int
    num_epochs: int
    seed: int


def row_settings(config: Mapping[str, Any]) -> RowSettings:
    """Reads the settings of rows from a checked config."""
    return RowSettings(**{field.name: config[field.name] for field in dataclasses.fields(RowSettings)})


def make_prefix(before: Sequence[tuple[int, bool]], placed: Sequence[tuple[int, int]]) -> Prefix:
    """Joins the tokens before a video, (token id, supervised), and its part of the prompt (`VideoPlaces.place`)."""
    return Prefix(
        ids=np.array([token for token, _ in (*before, *placed)], np.int32),
        video_tokens=np.array([-1] * len(before) + [slot for _, slot in placed], np.int32),
        supervised=np.array([flag for _, flag in before] + [False] * len(placed), bool),
    )


class RowPlan(NamedTuple):
    """The rows of all steps of a run.

    instructions: of the store, in the wanted language. prefixes: by the index of a video in the store. questions: their
    tokens, by the index of the instruction. row_fn(row): the arrays of a row. bounds, slots_per_row: static sizes.
    fingerprint(num_epochs): 64 hexadecimal digits of this plan for any number of epochs.
    """

    instructions: list[dict[str, Any]]
    prefixes: Sequence[Prefix]
    questions: Sequence[Question]
    steps: list[Step]
    row_fn: Callable[[Row], dict[str, np.ndarray]]
    bounds: RowBounds
    slots_per_row: int
    fingerprint: Callable[[int], str]


def plan_rows(settings: RowSettings, base: Base, store: VideoStore, tokenizer: Any, places: VideoPlaces) -> RowPlan:
    """Tokenizes a store's instructions in the wanted language and plans the rows of every epoch.

    Raises UserError for instructions that cannot be trained on.
    """
    instructions = in_language(store, settings.language)
    before, questions = tokenize(base.module, tokenizer, base.config, instructions, labels=settings.labels)

    @functools.cache
    def prefix(num_frames: int, seconds: tuple[float, ...] | None) -> Prefix:
        return make_prefix(before, places.place(num_frames, seconds, tokenizer.encode))

    times = [tuple(store.seconds(i)) if places.has_text else None for i in range(len(store.videos))]
    prefixes = [prefix(video["num_frames"], at) for video, at in zip(store.videos, times, strict=True)]
    index = {v["video"]: i for i, v in enumerate(store.videos)}
    videos = np.array([index[instruction["video"]] for instruction in instructions])
    prefix_lengths = np.array([len(p.ids) for p in prefixes])
    lengths = np.array([len(q.ids) for q in questions])
    longest = int((prefix_lengths[videos] + lengths).max())
    if longest > base.config.max_position_embeddings:
        raise UserError(
            f"the longest question takes {longest} tokens with its video, the base knows "
            f"{base.config.max_position_embeddings} positions: use fewer frames or fewer tokens of each, or drop it"
        )

    @functools.cache
    def epoch_steps(epoch: int) -> list[Step]:
        return plan_epoch(
            videos,
            prefix_lengths,
            lengths,
            row_length=settings.row_length or (max(longest, PACKED_ROW) if settings.pack else longest),
            batch_questions=settings.batch_questions,
            pack=settings.pack,
            seed=settings.seed,
            epoch=epoch,
        )

    def all_steps(num_epochs: int) -> list[Step]:
        return list(itertools.chain.from_iterable(map(epoch_steps, range(num_epochs))))

    def fingerprint(num_epochs: int) -> str:
        texts = [tuple(instruction[field] for field in ("id", "question", "answer")) for instruction in instructions]
        files = [(video["video"], video["sha256"], video["num_frames"]) for video in store.videos]
        return digest((all_steps(num_epochs), texts, files))

    steps = all_steps(settings.num_epochs)
    return lay_out(steps, prefixes, questions, instructions, places.most, fingerprint)


def lay_out(
    steps: list[Step],
    prefixes: Sequence[Prefix],
    questions: Sequence[Question],
    instructions: list[dict[str, Any]],
    tokens_per_video: int,
    fingerprint: Callable[[int], str],
) -> RowPlan:
    """Returns the plan of rows for these steps."""
    bounds = row_bounds(steps, prefixes, questions)
    slots_per_row = pad_row(bounds.slots_per_row)
    row_fn = functools.partial(
        fill_row,
        prefixes=prefixes,
        questions=questions,
        row_length=slots_per_row,
        max_groups=bounds.groups_per_row,
        max_targets=bounds.targets_per_row,
        tokens_per_video=tokens_per_video,
    )
    return RowPlan(instructions, prefixes, questions, steps, row_fn, bounds, slots_per_row, fingerprint)


def supervised_tokens(plan: RowPlan) -> list[int]:
    """Counts the supervised tokens of each step, over which its loss is the mean.

    Supervised tokens before a video count once for each of its questions.
    """
    prefixes = [int(prefix.supervised[1:].sum()) for prefix in plan.prefixes]
    questions = [int(question.supervised.sum()) for question in plan.questions]
    return [
        sum(len(asked) * prefixes[video] + sum(questions[q] for q in asked) for row in step for video, asked in row)
        for step in plan.steps
    ]


def digest(identity: Any) -> str:
    """Returns 64 hexadecimal digits of all that a plan depends on."""
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def in_language(store: VideoStore, language: str) -> list[dict[str, Any]]:
    """Returns the store's instructions in a language, "" for all. Raises UserError if there are none."""
    chosen = [instruction for instruction in store.instructions if language in ("", instruction["language"])]
    if not chosen:
        counts = Counter(instruction["language"] for instruction in store.instructions)
        found = ", ".join(f"{count} in {name!r}" for name, count in counts.items())
        raise UserError(
            f"{store.path}: has no question in config.language={language!r}, it has {found}; choose one of these, "
            "or prepare a store with other questions"
        )
    return chosen


def pad_row(slots: int) -> int:
    """Returns the number of slots for rows of at most `slots` tokens."""
    multiple = SHORT_ROW if slots < 8 * LONG_ROW else LONG_ROW
    return -(-slots // multiple) * multiple


def tokenize(
    base: Family, tokenizer: Any, config: Any, instructions: Sequence[Mapping[str, Any]], *, labels: str
) -> tuple[list[tuple[int, bool]], list[Question]]:
    """Tokenizes every instruction with the base's own chat template.

    Returns the tokens before every video, (token id, supervised), and one Question per instruction. Raises UserError
    when a text changes by encoding and decoding, an id is beyond the embedding, or an answer has no token.
    """
    before: list[tuple[int, bool]] = []
    questions = []
    for instruction in tqdm(instructions, desc="tokenise", unit="question", delay=3, dynamic_ncols=True):
        name, question, answer = instruction["id"], instruction["question"], instruction["answer"]
        for text in (question, answer):
            check_round_trip(tokenizer, text, name)
        before, after = base.prompt(tokenizer, config, question, answer, labels=labels)
        ids, supervised = zip(*after, strict=True)
        largest = max(token for token, _ in (*before, *after))
        if largest >= config.vocab_size:
            raise UserError(
                f"question {name!r}: token id {largest} is beyond the base's {config.vocab_size} embeddings; "
                "the tokenizer files do not belong to these weights"
            )
        if not tokenizer.encode(answer):
            raise UserError(f"question {name!r}: the answer has no token to learn; give it a text or remove it")
        questions.append(Question(ids=np.array(ids, np.int32), supervised=np.array(supervised, bool)))
    return before, questions


def check_round_trip(tokenizer: Any, text: str, where: str) -> None:
    """Raises UserError unless decode(encode(text)) is the text, except for NFC and white space at its ends."""
    back = tokenizer.decode(tokenizer.encode(text))
    if unicodedata.normalize("NFC", back).strip() != unicodedata.normalize("NFC", text).strip():
        raise UserError(
            f"question {where!r}: the tokenizer turns {text!r} into {back!r}; "
            "training on it would teach other words: use the base's own tokenizer files, or mend the text"
        )


def show_rows(tokenizer: Any, batch: Mapping[str, np.ndarray], count: int) -> str:
    """Formats the first `count` rows of a batch: visual tokens as their number, supervised text between ⟦ and ⟧."""
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
