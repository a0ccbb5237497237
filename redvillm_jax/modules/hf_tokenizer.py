"""A model folder's own tokenizer, as transformers reads it."""

import os
from pathlib import Path

from data_pipeline.common.errors import UserError


class HfTokenizer:
    """The folder's own tokenizer; strings that look like special tokens are plain text."""

    def __init__(self, folder: str | Path):
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it misses PyTorch, which no tokenizer needs
        from transformers import AutoTokenizer  # seconds to import, and only text needs it

        self.folder = folder
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
            added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
            self.tokenizer.add_tokens(added, special_tokens=True)  # where files add <im_start> as a common word
            self.decode(self.encode("What happens?"))  # settings of odd types show only in use
        except Exception as error:  # transformers raises many kinds for files that are missing or broken
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}: no tokenizer that can be read ({reason}); copy the model's own files") from None
        self.bos_id, self.eos_id = self.special("<s>"), self.special("</s>")
        self.stop_ids = (self.eos_id,)
        self.size = len(self.tokenizer)  # ids that text can become, special ones included

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without markers at its ends."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []

    def decode(self, token_ids: list[int], keep_special: bool = False) -> str:
        """The text of ids; special tokens are dropped, or spelled out with `keep_special`."""
        return self.tokenizer.decode(
            token_ids, skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False
        )

    def special(self, token: str) -> int:
        """The id of a special token such as "<im_start>"; a tokenizer without it is a UserError."""
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise UserError(f"{self.folder}: its tokenizer has no {token}; use the files that belong to these weights")
        return token_id
