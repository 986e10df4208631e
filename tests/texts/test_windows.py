"""Windows hold the tokens that the whole text gives, know their bytes exactly, and shuffle by seed alone."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import PROPERTY
from models import TEXT, TOKENIZERS, write_tokenizer
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dimscope.errors import InvalidArgument
from dimscope.texts import encoding as module
from dimscope.texts.encoding import encode, special_prefix
from dimscope.texts.texts import Text, open_text, text_from_string
from dimscope.texts.windows import (
    Window,
    fitting_length,
    middle_windows,
    shuffle_across,
    shuffle_within,
    stream_windows,
)

FEW = settings(PROPERTY, max_examples=8)  # of examples that encode a whole text
SIZES = {"byte_bpe": 512, "sentencepiece": 512, "wordpiece": 512}
REAL = ("gpt2", "qwen2", "gpt_neox")
FRAGMENTS = (
    "the keeper", " of", " ", "  ", "\n", "\n\n", "\r\n", "\t", ".", '."', "-", "1907", "é", "e\u0301", "ﬁ", "漢字", "🚢", "🚢🚢",
    "don't", "naïve", "x", "<p>", "&nbsp;", "\u00a0",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerBase]:
    loaded = {}
    for kind in TOKENIZERS:
        folder = tmp_path_factory.mktemp(kind)
        write_tokenizer(folder, kind, SIZES[kind])
        loaded[kind] = AutoTokenizer.from_pretrained(folder)
    return loaded


@pytest.fixture(scope="module")
def real(shared_data: Path) -> Callable[[str], PreTrainedTokenizerBase]:
    """Return the tokenizer of a real model, or skip."""
    loaded = {}

    def load(name: str) -> PreTrainedTokenizerBase:
        folder = shared_data / "tokenizers" / name
        if not folder.is_dir():
            pytest.skip(f"the tokenizer {name} is not in the test data")
        if name not in loaded:
            loaded[name] = AutoTokenizer.from_pretrained(folder)
        return loaded[name]

    return load


@pytest.fixture(scope="module")
def alice(shared_data: Path) -> str:
    return (shared_data / "text/alice.txt").read_bytes().decode("utf-8-sig")


def text_of(whole: str, size: int = 1 << 20, pulled: list[int] | None = None, n_bytes: int | None = None) -> Text:
    """Return a text in pieces of `size` characters; the number of each piece that is read goes to `pulled`."""

    def pieces() -> Iterator[str]:
        for start in range(0, len(whole), size):
            if pulled is not None:
                pulled.append(start // size)
            yield whole[start : start + size]

    return Text("alice.txt", pieces, {}, n_bytes)


def at_once(whole: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]


def encoded(text: Text, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    blocks = list(encode(text, tokenizer))
    return [int(i) for block in blocks for i in block.ids], [int(e) for block in blocks for e in block.ends]


def pairs(window: Window) -> list[tuple[int, int]]:
    return sorted(zip(window.ids.tolist(), window.n_bytes.tolist(), strict=True))


# ---- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@FEW
@given(parts=st.lists(st.sampled_from(FRAGMENTS), min_size=150, max_size=300), size=st.integers(1, 300))
def test_pieces_give_the_tokens_of_the_whole(kind, tokenizers, parts, size):
    whole = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MARGIN", 64)
        found = encoded(text_of(whole, size), tokenizers[kind])
    assert found[0] == at_once(whole, tokenizers[kind])
    assert found == encoded(text_of(whole), tokenizers[kind])


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_give_the_tokens_of_the_whole_in_pieces_of_any_size(name, real, alice):
    expected = at_once(alice, real(name))
    for size in (5003, 60_000):
        ids, ends = encoded(text_of(alice, size), real(name))
        assert ids == expected
        assert ends[-1] == len(alice.encode())


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece"])
@PROPERTY
@given(parts=st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=60))
def test_tokens_that_spell_every_byte_end_where_their_bytes_do(kind, tokenizers, parts):
    whole = "".join(parts)
    tokenizer, before = tokenizers[kind], 0
    to_bytes = module.piece_decoder(tokenizer)
    for number, (i, end) in enumerate(zip(*encoded(text_of(whole), tokenizer), strict=True)):
        spelled = to_bytes(tokenizer.convert_ids_to_tokens(i))
        if number == 0 and kind == "sentencepiece":
            spelled = spelled.removeprefix(b" ")  # of the tokenizer, not of the text
        assert whole.encode()[before:end] == spelled
        before = end
    assert before == len(whole.encode())


@pytest.mark.parametrize("name", REAL)
def test_ends_split_the_text_where_a_real_tokenizer_does(name, real):
    whole = "Der Fuß, naïve 漢字 🚢🚢\n\n  e\u0301tude\tx  " * 3 + "end"
    tokenizer, text_bytes = real(name), whole.encode()
    ids, ends = encoded(text_of(whole), tokenizer)
    assert ends == sorted(ends)
    assert ends[-1] == len(text_bytes)
    if name == "gpt2":  # the others compose accents, so that their bytes are not the text's
        assert [tokenizer.decode(ids[: n + 1]) for n in (7, 20, 40)] == [
            text_bytes[: ends[n]].decode(errors="replace") for n in (7, 20, 40)
        ]
    words = {text_bytes[a:b].decode(errors="replace").strip() for a, b in zip([0, *ends], ends, strict=False)}
    assert {"Der", "end"} <= words


def test_wordpiece_counts_the_space_before_a_word_to_the_word(tokenizers):
    tokenizer = tokenizers["wordpiece"]
    ids, ends = encoded(text_of("the  keeper\n"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["the", "keeper"]
    assert ends == [3, 11]


def test_a_word_longer_than_the_margins_loses_no_byte(tokenizers):
    for whole in ("7" * 6000, "🚢" * 4000, " " * 5000):
        for kind in ("byte_bpe", "sentencepiece"):
            ids, ends = encoded(text_of(whole, 2500), tokenizers[kind])
            assert ends == sorted(ends)
            assert ends[-1] == len(whole.encode())
            assert tokenizers[kind].decode(ids).strip() == whole.strip()


@pytest.fixture(scope="module")
def composing() -> PreTrainedTokenizerBase:
    """Return a tokenizer that takes digits by threes, as Llama 3's, and composes characters, as many do."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "00", "000"]
    model = BPE({piece: i for i, piece in enumerate(pieces)}, [("0", "0"), ("00", "0")])
    backend = Tokenizer(model)
    backend.normalizer, backend.decoder = normalizers.NFKC(), decoders.ByteLevel()
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_pieces_without_a_common_joint_go_on_where_the_first_ends(composing):
    """In a number of 20,000 digits the second piece's groups of three never meet the first's."""
    assert module.MARGIN % 3
    for before in ("", "é " * 3000):
        whole = before + "0" * 20_000
        ids, ends = encoded(text_of(whole, 2500), composing)
        spelled = [len(piece) for piece in composing.convert_ids_to_tokens(ids)]
        assert composing.decode(ids) == whole
        assert ends == np.cumsum(spelled).tolist()


def test_ends_stay_inside_a_character_that_becomes_many(composing):
    whole = "\ufdfaa e\u0301 ㎏ b"  # the first becomes 18 characters, the second one
    ids, ends = encoded(text_of(whole), composing)
    assert ends == sorted(ends)
    assert (ends[0], ends[-1]) == (0, len(whole.encode()))
    assert len(ids) > len(whole)
    assert {3, 4, 5, 9, 12, 13, 14} <= set(ends)  # every character's but the accent, which is the next token's


def test_a_text_without_tokens_gives_none(tokenizers):
    assert encoded(text_of(" \n" * 2000, 500), tokenizers["wordpiece"]) == ([], [])


def test_a_text_longer_than_the_context_brings_no_warning(tokenizers, caplog, recwarn):
    tokenizer = tokenizers["byte_bpe"]
    limit, tokenizer.model_max_length = tokenizer.model_max_length, 8
    try:
        assert len(encoded(text_of(TEXT), tokenizer)[0]) > 8
    finally:
        tokenizer.model_max_length = limit
    assert not caplog.records
    assert not recwarn.list


def test_a_tokenizer_without_offsets_is_refused(tokenizers):
    class Slow:
        is_fast = False

    with pytest.raises(InvalidArgument, match="Slow does not tell where in the text its tokens are"):
        next(encode(text_of(TEXT), Slow()))


def test_the_prefix_is_what_the_tokenizer_puts_before_a_text(tokenizers, real):
    assert special_prefix(tokenizers["byte_bpe"]) == []
    assert special_prefix(tokenizers["sentencepiece"]) == [1]
    assert special_prefix(tokenizers["wordpiece"]) == [2]  # [CLS], and not the [SEP] at the end
    assert special_prefix(real("gpt2")) == special_prefix(real("qwen2")) == []


# ---- windows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@FEW
@given(length=st.integers(3, 90), size=st.integers(50, 9000))
def test_windows_one_after_another_are_the_text(kind, tokenizers, length, size):
    tokenizer, prefix = tokenizers[kind], special_prefix(tokenizers[kind])
    windows = list(stream_windows(text_of(TEXT, size), tokenizer, length=length))
    ids, ends = encoded(text_of(TEXT), tokenizer)
    room = length - len(prefix)
    assert len(windows) == len(ids) // room
    assert [w.index for w in windows] == list(range(len(windows)))
    assert [i for w in windows for i in w.ids[w.n_prefix :].tolist()] == ids[: len(windows) * room]
    assert all(w.ids[: w.n_prefix].tolist() == prefix and len(w.ids) == length for w in windows)
    assert [e for w in windows for e in w.ends[w.n_prefix :].tolist()] == ends[: len(windows) * room]
    assert sum(int(w.n_bytes.sum()) for w in windows) == int(windows[-1].ends[-1])
    for before, window in zip([None, *windows], windows, strict=False):
        begin = 0 if before is None else int(before.ends[-1])
        assert window.n_bytes.tolist() == np.diff(window.ends.numpy(), prepend=begin).tolist()
        assert int(window.n_bytes[: window.n_prefix].sum()) == 0
        assert window.unique_tokens == len(set(window.ids.tolist()))


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@FEW
@given(length=st.integers(3, 150), share=st.floats(0, 1), size=st.integers(50, 9000))
def test_windows_lie_in_the_middle_of_equal_parts(kind, tokenizers, length, share, size):
    tokenizer = tokenizers[kind]
    ids, ends = encoded(text_of(TEXT), tokenizer)
    room = length - len(special_prefix(tokenizer))
    count = 1 + int(share * (len(ids) // room - 1))
    windows = middle_windows(text_of(TEXT, size), tokenizer, length=length, count=count)
    assert len(windows) == count
    last = 0
    for i, window in enumerate(windows):
        body, begin = window.ids[window.n_prefix :].tolist(), int(window.ends[-1]) - int(window.n_bytes.sum())
        centre = (i + 0.5) * len(ids) / count
        starts = [s for s in range(len(ids)) if (ends[s - 1] if s else 0) == begin and ids[s : s + room] == body]
        start = min(starts, key=lambda s: abs(s + room / 2 - centre))
        assert abs(start + room / 2 - centre) <= 1
        assert window.ends[window.n_prefix :].tolist() == ends[start : start + room]
        assert window.ends[: window.n_prefix].tolist() == [begin] * window.n_prefix
        assert last <= start <= len(ids) - room
        last = start + room


def test_without_a_count_as_many_as_fit_and_eight_at_most(tokenizers):
    tokenizer = tokenizers["byte_bpe"]
    total = len(at_once(TEXT, tokenizer))
    assert len(middle_windows(text_of(TEXT), tokenizer, length=32, count=None)) == 8
    assert len(middle_windows(text_of(TEXT), tokenizer, length=total // 3, count=None)) == 3
    (whole,) = middle_windows(text_of(TEXT), tokenizer, length=total, count=None)
    assert whole.ids.tolist() == at_once(TEXT, tokenizer)


def test_the_stream_reads_no_further_than_it_is_asked(tokenizers):
    pulled: list[int] = []
    whole = TEXT * 300
    windows = stream_windows(text_of(whole, 20_000, pulled), tokenizers["byte_bpe"], length=64)
    assert pulled == []
    next(windows)
    assert pulled == [0]
    for _ in range(400):
        next(windows)
    assert len(pulled) < 10 < len(whole) // 20_000


def test_a_window_keeps_no_block_alive(tokenizers):
    for window in middle_windows(text_of(TEXT * 20), tokenizers["byte_bpe"], length=16, count=2):
        assert window.ids.untyped_storage().nbytes() == window.ends.untyped_storage().nbytes() == 16 * 8


def test_the_texts_of_the_package_as_the_model_of_the_package_reads_them():
    tokenizer = AutoTokenizer.from_pretrained(Path(module.__file__).parent.parent / "builtin/model")
    (window,) = middle_windows(open_text("builtin:prose"), tokenizer, length=256, count=1)
    whole = "".join(open_text("builtin:prose").pieces()).encode()
    begin, end = int(window.ends[0]), int(window.ends[-1])
    assert window.ids[: window.n_prefix].tolist() == [tokenizer.bos_token_id]
    assert tokenizer.decode(window.ids[1:]).encode() == whole[begin:end]
    assert abs((begin + end) / 2 - len(whole) / 2) < 200


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "least"), [("byte_bpe", 2), ("sentencepiece", 3)])
def test_a_window_holds_two_tokens_of_the_text(kind, least, tokenizers):
    for verb in (lambda **k: middle_windows(count=1, **k), lambda **k: next(stream_windows(**k))):
        with pytest.raises(InvalidArgument, match=rf"`length` must be {least} or more, got {least - 1}"):
            verb(text=text_of(TEXT), tokenizer=tokenizers[kind], length=least - 1)
        verb(text=text_of(TEXT), tokenizer=tokenizers[kind], length=least)


def test_a_text_shorter_than_a_window(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    total = len(at_once(TEXT[:200], tokenizer))
    message = (
        rf"alice.txt has {total} tokens, fewer than one window of 512: give a longer text or pass `length` {total + 1}$"
    )
    with pytest.raises(InvalidArgument, match=message):
        middle_windows(text_of(TEXT[:200]), tokenizer, length=512, count=None)
    with pytest.raises(InvalidArgument, match=message):
        list(stream_windows(text_of(TEXT[:200]), tokenizer, length=512))
    assert len(list(stream_windows(text_of(TEXT[:200]), tokenizer, length=total + 1))) == 1
    with pytest.raises(InvalidArgument, match=r"has 1 tokens, fewer than one window of 512: give a longer text$"):
        middle_windows(text_of("a"), tokenizer, length=512, count=None)


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece"])
def test_a_short_text_fits_one_window_of_all_its_tokens(kind, tokenizers):
    tokenizer, prefix = tokenizers[kind], special_prefix(tokenizers[kind])
    text = text_from_string("The cat sat.")
    length = fitting_length(text, tokenizer, 512)
    assert length == len(prefix) + len(at_once("The cat sat.", tokenizer))
    assert fitting_length(text, tokenizer, length) == fitting_length(text, tokenizer, length + 1) == length
    assert len(middle_windows(text, tokenizer, length=length, count=None)) == 1
    with pytest.raises(InvalidArgument, match="text has 1 tokens; a text needs at least 2"):
        fitting_length(text_from_string("a"), tokenizers["byte_bpe"], 512)


def test_a_long_text_is_read_only_as_far_as_a_window_goes(tokenizers):
    pulled: list[int] = []
    assert fitting_length(text_of(TEXT * 50, 20_000, pulled), tokenizers["byte_bpe"], 64) == 64
    assert pulled == [0]


def test_a_count_that_does_not_fit(tokenizers):
    tokenizer = tokenizers["byte_bpe"]
    length = len(at_once(TEXT, tokenizer)) // 3
    for count in (8, 0, -1):
        message = rf"`windows` must be 1 to 3 for alice.txt and windows of {length} tokens, got {count}; pass fewer"
        with pytest.raises(InvalidArgument, match=message):
            middle_windows(text_of(TEXT), tokenizer, length=length, count=count)


def test_a_text_above_the_cap_is_streamed_only(tokenizers):
    pulled: list[int] = []
    known, unknown = text_of(TEXT, 100, pulled, n_bytes=len(TEXT)), text_of(TEXT * 20, 2000, pulled)
    for text, read in ((known, 0), (unknown, 4)):
        with pytest.raises(InvalidArgument, match=r"larger than 0.0015 MB.*pass `windows` all, which streams"):
            middle_windows(text, tokenizers["byte_bpe"], length=16, count=1, cap_bytes=1500)
        assert len(pulled) <= read
    assert list(stream_windows(unknown, tokenizers["byte_bpe"], length=16))


# ---- shuffles ------------------------------------------------------------------------------------------------------


@FEW
@given(kind=st.sampled_from(list(TOKENIZERS)), seed=st.integers(0, 2**63), draw=st.integers(0, 99))
def test_a_shuffle_permutes_the_tokens_behind_the_prefix(kind, tokenizers, seed, draw):
    windows = list(stream_windows(text_of(TEXT), tokenizers[kind], length=40))
    for dealt in ([shuffle_within(w, seed, draw) for w in windows], shuffle_across(windows, seed, draw)):
        for before, after in zip(windows, dealt, strict=True):
            assert (after.index, after.n_prefix) == (before.index, before.n_prefix)
            assert torch.equal(after.ids[: after.n_prefix], before.ids[: before.n_prefix])
            assert torch.equal(after.ends, before.ends)
            assert len(after.ids) == len(after.n_bytes) == 40
        assert sorted(p for w in dealt for p in pairs(w)) == sorted(p for w in windows for p in pairs(w))
        assert any(not torch.equal(a.ids, b.ids) for a, b in zip(windows, dealt, strict=True))
    assert all(pairs(shuffle_within(w, seed, draw)) == pairs(w) for w in windows)
    assert any(pairs(a) != pairs(b) for a, b in zip(shuffle_across(windows, seed, draw), windows, strict=True))


def test_a_shuffle_depends_on_seed_draw_and_index_only(tokenizers):
    windows = list(stream_windows(text_of(TEXT), tokenizers["byte_bpe"], length=64))
    alone = [shuffle_within(w, 3, 1).ids.tolist() for w in windows]
    torch.manual_seed(17)
    np.random.seed(17)
    assert [shuffle_within(w, 3, 1).ids.tolist() for w in reversed(windows)][::-1] == alone
    orders = set()
    for seed, draw, index in ((3, 1, 0), (1, 3, 0), (3, 0, 1), (0, 0, 0), (4, 1, 0), (3, 2, 0), (3, 1, 1)):
        orders.add(tuple(shuffle_within(Window(index, *(torch.arange(50),) * 3, 0), seed, draw).ids.tolist()))
    assert len(orders) == 7
    some = [shuffle_across(windows[2:5], 3, 1)[i].ids.tolist() for i in range(3)]
    assert some == [w.ids.tolist() for w in shuffle_across(windows[2:5], 3, 1)]
    assert some != [w.ids.tolist() for w in shuffle_across(windows[2:5], 3, 2)]
    assert shuffle_across([], 0, 0) == []


def test_every_order_is_as_likely_as_another():
    """Each of 4 tokens comes to each of 4 positions about 250 times in 1,000 draws: five standard errors are 68."""
    window = Window(0, torch.tensor([9, 0, 1, 2, 3]), torch.arange(5), torch.arange(5), 1)
    placed = np.zeros((4, 4))
    for draw in range(1000):
        placed[range(4), shuffle_within(window, 0, draw).ids[1:]] += 1
    assert np.abs(placed - 250).max() < 68
