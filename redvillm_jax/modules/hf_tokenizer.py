"""Reads a model folder's own tokenizer through transformers."""

import os
from pathlib import Path

from data_pipeline.common.errors import UserError


class HfTokenizer:
    """The folder's own tokenizer; special tokens in a text are read as plain text."""

    def __init__(self, folder: str | Path):
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about PyTorch, which no tokenizer needs
        from transformers import AutoTokenizer  # takes seconds to import, and only text needs it

        self.folder = folder
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
            added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
            self.tokenizer.add_tokens(added, special_tokens=True)  # some files add <im_start> as a common word
            self.decode(self.encode("What happens?"))  # settings of wrong types fail only in use
        except Exception as error:  # transformers raises many kinds for missing or broken files
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}: no tokenizer that can be read ({reason}); copy the model's own files") from None
        self.bos_id, self.eos_id = self.special("<s>"), self.special("</s>")
        self.stop_ids = (self.eos_id,)
        self.size = len(self.tokenizer)  # the number of ids, special tokens included

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without markers at its ends."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []

    def decode(self, token_ids: list[int], keep_special: bool = False) -> str:
        """Returns the text of ids, without special tokens, or with them spelled out (`keep_special`)."""
        return self.tokenizer.decode(
            token_ids, skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False
        )

    def special(self, token: str) -> int:
        """Returns the id of a special token such as "<im_start>". Raises UserError if the tokenizer lacks it."""
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise UserError(f"{self.folder}: its tokenizer has no {token}; use the files that belong to these weights")
        return token_id
