"""Reads a model folder's own tokenizer through transformers."""

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError
from redvillm_jax.modules.chat_template import FILES, Turn, answer_turn, control_tokens, find_template, read_object


class HfTokenizer:
    """The folder's own tokenizer and chat template; special tokens in a text are read as plain text.

    template: the folder's chat template, None: it has none. turn: how the template writes an answer. bos_id, eos_id:
    None where the tokenizer has no such token; without a template they are <s> and </s>. stop_ids: the tokens that end
    an answer, by generation_config.json, the tokenizer, and the template. size: the number of ids, special tokens
    included. Raises UserError for files that cannot be read and a tokenizer without a token that ends an answer.
    """

    def __init__(self, folder: str | Path):
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about PyTorch, which no tokenizer needs
        from transformers import AddedToken, AutoTokenizer  # takes seconds to import, and only text needs it

        self.folder = folder
        found = find_template(folder)
        self.template = found[1] if found else None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
            controls = control_tokens(self.tokenizer, self.template)
            known = {token.content: token for token in self.tokenizer.added_tokens_decoder.values()}
            common = [known[token] for token in controls if not known[token].special]
            self.tokenizer.add_tokens([as_special(AddedToken, token) for token in common])
            self.decode(self.encode("What happens?"))  # settings of wrong types fail only in use
        except Exception as error:  # transformers raises many kinds for missing or broken files
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}: no tokenizer that can be read ({reason}); copy the model's own files") from None
        self.controls = any_of(controls)
        self.size = len(self.tokenizer)
        self.bos_id, self.eos_id = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.eos = self.tokenizer.eos_token
        self.starts = [self.bos_id] if self.bos_id in self.tokenizer.encode("") else []
        self.turn: Turn | None = None
        if self.template is None:
            if not (self.knows("<s>") and self.knows("</s>")):
                places = ", ".join(FILES)
                wrong = f"no chat template in {places}, and no <s> and </s> for the prompt of the first LLaVA"
                raise UserError(f"{folder}: its tokenizer has {wrong}; copy the model's own files")
            self.bos_id, self.eos_id = self.special("<s>"), self.special("</s>")
        else:
            self.turn = answer_turn(self)
        self.stop_ids = self.find_stop_ids()

    def find_stop_ids(self) -> tuple[int, ...]:
        """Returns the ids of the tokens that end an answer."""
        file = Path(self.folder) / "generation_config.json"
        said = read_object(file).get("eos_token_id") if file.is_file() else None
        ids = [self.eos_id, *(said if isinstance(said, list) else [said])]
        if self.turn is not None:
            ids = [self.encode_behind(self.turn.end, plain=False)[-1], *ids]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without markers at its ends."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []

    def encode_start(self, text: str) -> list[int]:
        """Returns the ids of a template's text from its start, special tokens by their ids.

        The tokenizer's own first token comes before a text that does not begin with it.
        """
        written = self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token)
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
        return ids if written else self.starts + ids

    def encode_behind(self, text: str, *, plain: bool) -> list[int]:
        """Returns the ids of a text that follows another one. plain: whether special tokens are read as plain text.

        A line break goes before it and is removed again, because SentencePiece puts a blank before a text.
        """
        options = {"add_special_tokens": False, "split_special_tokens": plain}
        encode = functools.partial(self.tokenizer.encode, **options)
        newline, ids = encode("\n"), encode(f"\n{text}")
        return ids[len(newline) :] if ids[: len(newline)] == newline else encode(text)

    def decode(self, token_ids: list[int], keep_special: bool = False) -> str:
        """Returns the text of ids, without special tokens, or with them spelled out (`keep_special`)."""
        return self.tokenizer.decode(
            token_ids, skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False
        )

    def special(self, token: str) -> int:
        """Returns the id of a special token such as "<im_start>". Raises UserError if the tokenizer lacks it."""
        if not self.knows(token):
            raise UserError(f"{self.folder}: its tokenizer has no {token}; use the files that belong to these weights")
        return self.tokenizer.convert_tokens_to_ids(token)

    def knows(self, token: str) -> bool:
        """Returns whether a token such as "<image>" is in the vocabulary."""
        token_id, unknown = self.tokenizer.convert_tokens_to_ids(token), self.tokenizer.unk_token_id
        return token_id is not None and (token_id != unknown or token == self.tokenizer.unk_token)

    def slot_id(self, token: str) -> int:
        """Returns the id of the token that holds the visual tokens' place in a prompt.

        LLaVA's own code places pictures without such a token in the vocabulary; the tokenizer then gets one behind its
        last id, which no prompt has.
        """
        if not self.knows(token):
            self.tokenizer.add_tokens([token], special_tokens=True)
            self.controls = any_of([*control_tokens(self.tokenizer, self.template), token])
        return self.tokenizer.convert_tokens_to_ids(token)


def any_of(tokens: Sequence[str]) -> re.Pattern:
    """A regex that finds any of the tokens, a longer one before a token inside it."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def as_special(kind: type, token: Any) -> Any:
    """A special token like `token`, which transformers' files have as a common word; kind: its AddedToken."""
    flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip")}
    return kind(token.content, **flags, normalized=False, special=True)
