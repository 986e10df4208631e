"""What each row of an embedding table represents: piece, bytes, a readable label, and a category."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dimscope.checkpoints.gguf_tokens import TokenList, token_list
from dimscope.checkpoints.hub import HubRepository, damaged_file
from dimscope.checkpoints.loaded import LoadedModel
from dimscope.checkpoints.pieces import BYTE_PIECE, label_of, spelling_of
from dimscope.checkpoints.reachability import Candidate, reachable_ids
from dimscope.checkpoints.sources import Source
from dimscope.errors import CorruptCheckpoint, DimscopeError, TokenizerMissing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
CATEGORIES = ("ordinary", "special", "byte", "undecodable", "unreachable", "beyond")
REACHABILITY = ("ordinary", "byte", "undecodable", "unreachable")  # categories that depend on what texts produce
NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})  # RFC 3629, section 1


@dataclass(frozen=True, slots=True)
class Token:
    """One row of the table. `piece` and `data` are None for rows beyond the tokenizer."""

    id: int
    piece: str | None
    data: bytes | None
    label: str
    category: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a table.

    Attributes:
        tokens: In the order of its rows.
        tokenizer_size: Tokens of the tokenizer; None where there is none.
        encode: Returns the ids of a text; None where there is no tokenizer.
        missing: Why there is no tokenizer.
    """

    tokens: tuple[Token, ...] = field(repr=False)
    tokenizer_size: int | None
    encode: Callable[[str], list[int]] | None = field(repr=False)
    missing: str | None = None

    def ids(self, text: str) -> list[int]:
        """Return the token that spells exactly this text, leading space and all, else the tokens of the text.

        The spelling comes first so that " water" is one token also where the tokenizer puts a space before every text.

        Raises:
            TokenizerMissing: There is no tokenizer.
        """
        if self.encode is None:
            raise TokenizerMissing(f"{self.missing}, so text cannot be looked up; name tokens by id: '#123'")
        data = text.encode()
        exact = next((t.id for t in self.tokens if t.category == "ordinary" and _spelled(t) == data), None)
        return self.encode(text) if exact is None else [exact]


def _spelled(token: Token) -> bytes | None:
    """Return the bytes that name a token: those that it stands for, or "##ing" where only the mark tells it from a word."""
    return token.piece.encode() if token.piece is not None and token.label == token.piece else token.data


def read_tokenizer(source: Source) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer of a checkpoint, or None where it has none. Remote code is never run for it."""
    if isinstance(source, LoadedModel):
        return source.tokenizer
    if (listed := token_list(source)) is not None:
        return listed.tokenizer()
    from transformers import AutoTokenizer

    present = [f for f in TOKENIZER_FILES if f in source.files]
    vocabularies = {"tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model"}
    if not vocabularies & set(present):
        return None
    if isinstance(source, HubRepository):
        # Some tokenizers find their class through the config; the template belongs to the tokenizer.
        present += [f for f in ("config.json", "chat_template.jinja") if f in source.files]
        if vocabularies & set(at_hand := source.at_hand(present)):  # one of several kinds is enough
            present = at_hand
    paths = [source.fetch(f) for f in present]
    return AutoTokenizer.from_pretrained(str(paths[0].parent), trust_remote_code=False)


def require_tokenizer(source: Source) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a checkpoint.

    Raises:
        TokenizerMissing: The checkpoint has none, or one that cannot be read.
    """
    tokenizer, missing = _try_tokenizer(source)
    if tokenizer is None:
        raise TokenizerMissing(f"{source.name}: {missing}, and texts cannot be read without one")
    return tokenizer


def read_vocabulary(source: Source, n_rows: int) -> Vocabulary:
    """Return labels and categories of the `n_rows` rows of a table. Without a tokenizer every row is `#id`, ordinary."""
    tokenizer, missing = _try_tokenizer(source)
    listed = None if isinstance(source, LoadedModel) else token_list(source)
    if listed is not None:
        return _describe_list(listed, tokenizer, n_rows, missing)
    if tokenizer is None:
        tokens = tuple(Token(i, None, None, f"#{i}", "ordinary") for i in range(n_rows))
        return Vocabulary(tokens, None, None, missing)
    return describe_vocabulary(tokenizer, n_rows)


def _try_tokenizer(source: Source) -> "tuple[PreTrainedTokenizerBase | None, str]":
    """Return the tokenizer, or None and the reason: studies that need no text work without one."""
    in_memory = isinstance(source, LoadedModel)
    missing = (
        "the model came without a tokenizer (pass the tokenizer)" if in_memory else "the checkpoint has no tokenizer"
    )
    try:
        return read_tokenizer(source), missing
    except DimscopeError:
        raise
    except Exception as e:  # damaged or of an unknown kind: tokenizers raises bare Exception
        if damaged := damaged_file(source, TOKENIZER_FILES):
            raise CorruptCheckpoint(
                f"{source.name}: the cached file {damaged} is damaged: delete it and run the same command again"
            ) from e
        return None, f"the tokenizer cannot be read ({' '.join(str(e).split())[:200]})"


def _describe_list(
    listed: TokenList, tokenizer: "PreTrainedTokenizerBase | None", n_rows: int, missing: str
) -> Vocabulary:
    """Return labels and categories by the token list of a GGUF model; only a tokenizer shows what is unreachable."""
    described = None if tokenizer is None else describe_vocabulary(tokenizer, n_rows)
    spelling, special, unused = listed.spelling, listed.special, listed.unused
    tokens = []
    for i, piece in enumerate(listed.pieces[:n_rows]):
        data = piece.encode() if i in special else spelling.bytes_of(piece)
        label = label_of(data) if i in special else spelling.label(piece, data)
        category, reason = _categorise(piece, data, i in special, i not in unused)
        if i in unused:
            reason = "the file marks it as unused"
        elif described is not None and category != "special" and described.tokens[i].category in REACHABILITY:
            category, reason = described.tokens[i].category, described.tokens[i].reason
        tokens.append(Token(i, piece, data, label, category, reason))
    tokens += [_beyond(i) for i in range(len(tokens), n_rows)]
    encode = None if described is None else described.encode
    return Vocabulary(tuple(tokens), len(listed.pieces), encode, None if described else missing)


def _beyond(i: int) -> Token:
    return Token(i, None, None, f"#{i}", "beyond", "no token of the tokenizer has this id")


def describe_vocabulary(tokenizer: "PreTrainedTokenizerBase", n_rows: int) -> Vocabulary:
    """Return labels and categories of the rows of a table that is read with this tokenizer."""
    pieces: dict[int, str] = {i: p for p, i in tokenizer.get_vocab().items()}
    spelling = spelling_of(tokenizer)
    added = tokenizer.added_tokens_decoder
    special = {i for i, t in added.items() if t.special} | set(tokenizer.all_special_ids)
    data = {i: p.encode() if i in added else spelling.bytes_of(p) for i, p in pieces.items()}
    reached = reachable_ids(
        tokenizer,
        {
            i: Candidate(p, data[i], i not in added and spelling.continues(p))
            for i, p in pieces.items()
            if i not in special
        },
    )
    tokens = []
    for i in range(n_rows):
        if i not in pieces:
            tokens.append(_beyond(i))
            continue
        category, reason = _categorise(pieces[i], data[i], i in special, i in reached)
        label = label_of(data[i]) if i in added else spelling.label(pieces[i], data[i])
        tokens.append(Token(i, pieces[i], data[i], label, category, reason))
    return Vocabulary(tuple(tokens), len(tokenizer), lambda text: tokenizer.encode(text, add_special_tokens=False))


def _categorise(piece: str, data: bytes, special: bool, reached: bool) -> tuple[str, str | None]:
    if special:
        return "special", None
    if len(data) == 1 and data[0] in NEVER_IN_UTF8:
        return "unreachable", f"the byte {data[0]:02X} never occurs in UTF-8"
    if not reached:
        return "unreachable", "the tokenizer produces it for no text"
    if BYTE_PIECE.fullmatch(piece) or (len(data) == 1 and data[0] >= 0x80):
        return "byte", None
    if _decoded(data) is None:
        return "undecodable", "a part of a character"
    return "ordinary", None


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None
