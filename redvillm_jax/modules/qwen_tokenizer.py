"""The tokenizer of the first Qwen models: byte-level BPE in tiktoken's format."""

import base64
import unicodedata
from pathlib import Path

from data_pipeline.common.errors import UserError
from redvillm_jax.modules.config_fields import require

# Qwen's pre-split: like OpenAI's cl100k, but digits one at a time.
PATTERN = "|".join(
    (
        r"(?i:'(?:[stmd]|re|ve|ll))",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

SPECIAL_TOKENS = (  # their ids come after the ranks of the file
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{i}|>" for i in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)


class QwenTokenizer:
    """Byte-level BPE from the folder's qwen.tiktoken; special tokens in a text are read as plain text.

    Raises UserError when the file is missing or not in tiktoken's format.
    """

    def __init__(self, folder: str | Path):
        import tiktoken  # only text needs it

        file = Path(folder) / "qwen.tiktoken"
        if not file.is_file():
            raise UserError(f"{file}: not found; copy Qwen-VL's qwen.tiktoken next to its config.json")
        try:
            lines = (line.split() for line in file.read_bytes().splitlines() if line)
            pairs = [(base64.b64decode(token, validate=True), int(rank)) for token, rank in lines]
        except (ValueError, OSError) as error:
            raise UserError(f"{file}: expected lines of 'base64 rank' ({error}); copy it again") from None
        ranks = dict(pairs)
        whole = sorted(ranks.values()) == list(range(len(pairs))) and all(bytes([i]) in ranks for i in range(256))
        require(whole, str(file), "expected each rank from 0 on once, and all 256 single bytes; copy it again")
        self.num_ranks = len(ranks)
        self.specials = {token: self.num_ranks + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.specials)
        self.size = self.encoding.n_vocab  # the number of ids, special tokens included
        self.stop_ids = tuple(map(self.special, ("<|im_end|>", "<|im_start|>", "<|endoftext|>")))

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without markers at its ends."""
        return self.encoding.encode_ordinary(unicodedata.normalize("NFC", text))

    def decode(self, token_ids: list[int], keep_special: bool = False) -> str:
        """Returns the text of ids, without special tokens, or with them spelled out (`keep_special`).

        Ids without a token, of padding rows of the vocabulary, are dropped.
        """
        last = self.encoding.max_token_value if keep_special else self.num_ranks - 1
        return self.encoding.decode([i for i in token_ids if i <= last])

    def special(self, token: str) -> int:
        """Returns the id of a special token such as "<|im_end|>"."""
        return self.specials[token]
