"""Windows of another tokenizer have the tokens that lie inside the bytes of the given windows: all of them, no other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import PROPERTY
from models import TEXT, TOKENIZERS, write_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dimscope.texts import encoding
from dimscope.texts.alignment import aligned_windows
from dimscope.texts.encoding import encode, join_tokens, special_prefix
from dimscope.texts.texts import text_from_string
from dimscope.texts.windows import Window, middle_windows, stream_windows

FEW = settings(PROPERTY, max_examples=8)
WHOLE = text_from_string("Größe – müßig: ½ ≠ ⅓ 🚢🚢.\n" + TEXT)
Tokenizers = dict[str, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    loaded = {}
    for kind in TOKENIZERS:
        folder = tmp_path_factory.mktemp(kind)
        write_tokenizer(folder, kind, 512)
        loaded[kind] = AutoTokenizer.from_pretrained(folder)
    return loaded


def contents(windows: list[Window]) -> list[tuple[int, list[int], list[int], list[int], int]]:
    return [(w.index, w.ids.tolist(), w.ends.tolist(), w.n_bytes.tolist(), w.n_prefix) for w in windows]


@pytest.mark.parametrize("kind", list(TOKENIZERS))
def test_the_same_tokenizer_gives_the_same_windows(tokenizers: Tokenizers, kind: str) -> None:
    own = tokenizers[kind]
    for windows in (
        middle_windows(WHOLE, own, length=20, count=5),
        list(stream_windows(WHOLE, own, length=20)),
    ):
        assert contents(list(aligned_windows(WHOLE, own, windows))) == contents(windows)


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@FEW
@given(
    other=st.sampled_from(list(TOKENIZERS)),
    length=st.integers(4, 60),
    count=st.integers(1, 4),
    cut=st.integers(50, 400),
)
def test_windows_hold_every_token_that_lies_inside_the_bytes(
    tokenizers: Tokenizers, kind: str, other: str, length: int, count: int, cut: int
) -> None:
    like = middle_windows(WHOLE, tokenizers[other], length=length, count=count)
    reader, prefix = tokenizers[kind], special_prefix(tokenizers[kind])
    everything = join_tokens(encode(WHOLE, reader))
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), everything.ends[:-1]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "MARGIN", 64)
        patch.setattr(encoding, "CHUNK", cut)
        found = {window.index: window for window in aligned_windows(WHOLE, reader, like)}
    for window in like:
        inside = (begins >= window.begin) & (everything.ends <= window.ends[-1]) & (begins < window.ends[-1])
        assert (window.index in found) == bool(inside.any())
        if window.index in found:
            own = found[window.index]
            assert own.ids.tolist() == prefix + everything.ids[inside].tolist()
            assert own.ends[len(prefix) :].tolist() == everything.ends[inside].tolist()
            assert own.begin == int(begins[inside][0])


def test_no_window_is_longer_than_allowed(tokenizers: Tokenizers) -> None:
    like, reader = list(stream_windows(WHOLE, tokenizers["wordpiece"], length=40)), tokenizers["sentencepiece"]
    whole, short = (list(aligned_windows(WHOLE, reader, like, longest=longest)) for longest in (None, 20))
    assert max(len(window.ids) for window in whole) > 20
    assert [w.ids.tolist() for w in short] == [w.ids[:20].tolist() for w in whole]
