"""The token list of a GGUF file, and the tokenizer that it describes."""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dimscope.checkpoints.gguf import gguf_files, read_metadata
from dimscope.checkpoints.pieces import Spelling, byte_level_bytes, sentencepiece_bytes
from dimscope.checkpoints.sources import LocalFolder, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL, TOKENS, TYPES = "tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
SPECIAL = (2, 3)  # token types of GGUF: unknown, control
UNUSED = 5
WORD_START = "▁"  # before whole words in a list of WordPiece tokens, which has no marks for continuations


@dataclass(frozen=True, slots=True)
class TokenList:
    """The tokens of a GGUF model in the order of their ids.

    Attributes:
        path: The file.
        model: The kind of tokenizer: "gpt2" (byte-level BPE), "llama" (SentencePiece), "bert" (WordPiece), "t5" and others.
        pieces: The pieces as the original tokenizer spells them.
        types: Their types in numbers of GGUF; empty where the file has none.
    """

    path: Path
    model: str
    pieces: tuple[str, ...] = field(repr=False)
    types: tuple[int, ...] = field(repr=False)

    @property
    def special(self) -> set[int]:
        """Return the ids of unknown and control tokens."""
        return {i for i, kind in enumerate(self.types) if kind in SPECIAL}

    @property
    def unused(self) -> set[int]:
        """Return the ids that the file marks as unused."""
        return {i for i, kind in enumerate(self.types) if kind == UNUSED}

    @property
    def spelling(self) -> Spelling:
        """Return how the pieces spell bytes."""
        if self.model == "bert":
            return Spelling(str.encode, continuation="##")
        return Spelling(byte_level_bytes if self.model == "gpt2" else sentencepiece_bytes)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Return the tokenizer, as transformers builds it; WordPiece, which transformers does not build, from the list.

        Raises:
            ValueError: Transformers does not know this kind of tokenizer.
        """
        if self.model == "bert":
            return _word_piece(self)
        from transformers import PreTrainedTokenizerFast

        # Alone in a folder: transformers would prefer a tokenizer.json that happens to be beside it.
        with tempfile.TemporaryDirectory(prefix="dimscope-") as folder:
            os.symlink(self.path.resolve(), Path(folder) / "model.gguf")
            return PreTrainedTokenizerFast.from_pretrained(folder, gguf_file="model.gguf")


def token_list(source: Source) -> TokenList | None:
    """Return the token list of a GGUF model; None where the model is none, or where a tokenizer lies beside it.

    A file that the user names is taken for itself: what lies beside it may belong to another model.
    """
    named = Path(source.name).name if isinstance(source, LocalFolder) else ""
    named = named if named.endswith(".gguf") and named in source.files else None
    if named is None and any(f.endswith((".safetensors", "tokenizer.json", "tokenizer.model")) for f in source.files):
        return None
    for file in gguf_files(source, named):
        path = source.fetch(file)
        values = read_metadata(path, (MODEL, TOKENS, TYPES))
        if TOKENS in values:
            model, pieces = str(values.get(MODEL, "")), values[TOKENS]
            return TokenList(
                path, model, tuple(map(_marked, pieces)) if model == "bert" else pieces, values.get(TYPES, ())
            )
    return None


def _marked(piece: str) -> str:
    """Return a piece of WordPiece with the mark of a continuation: GGUF marks the beginnings of words instead."""
    if piece.startswith(WORD_START):
        return piece.removeprefix(WORD_START)
    return piece if piece.startswith("[") and piece.endswith("]") else f"##{piece}"


def _word_piece(tokens: TokenList) -> "PreTrainedTokenizerBase":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {tokens.pieces[i] for i in tokens.special}
    # No list says whether it is uncased; an uncased one has no capital letter outside of its special tokens.
    words = (piece for piece in tokens.pieces if not (piece.startswith("[") and piece.endswith("]")))
    uncased = not any(character.isupper() for piece in words for character in piece)
    model = models.WordPiece({piece: i for i, piece in enumerate(tokens.pieces)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=uncased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(sorted(special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
