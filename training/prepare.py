"""Corpus -> tokenizer and token stream of the built-in model.

Reads a folder of plain-text works (one file each, paragraphs separated by blank lines), renders HTML
pages of the standard library with pydoc, trains a byte-level BPE on both, and writes

    OUT/tokenizer/       the tokenizer, as transformers loads it
    OUT/train.npy        uint16 token ids of the training works and pages, shuffled by document
    OUT/validation.npy   the same for the held-out works
    OUT/data.json        what went in: bytes and tokens per source, the held-out check

Every work goes in twice: once plain (one line a paragraph, straight quotes) and once as books are usually
found (typographic quotes and dashes, hard-wrapped lines, half of them with CRLF).
"""

import argparse
import importlib
import json
import pydoc
import random
import re
import textwrap
import warnings
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<|bos|>", "<|eos|>"
VALIDATION_WORKS = {"the-princess-and-curdie", "kidnapped"}
VALIDATION_MODULES = {"textwrap", "statistics"}
MODULES = """
abc aifc argparse array ast asyncio base64 bdb bisect builtins bz2 calendar cgi cmath cmd code codecs
collections colorsys compileall configparser contextlib contextvars copy csv ctypes dataclasses datetime decimal
difflib dis doctest email enum filecmp fileinput fnmatch fractions ftplib functools gc getopt getpass gettext
glob graphlib gzip hashlib heapq hmac html http.client http.cookies http.server imaplib importlib inspect io
ipaddress itertools json keyword linecache locale logging lzma mailbox math mimetypes mmap multiprocessing.pool
netrc numbers operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint
profile pstats py_compile pyclbr queue quopri random re reprlib rlcompleter sched secrets select selectors
shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl stat string struct subprocess sys sysconfig
tabnanny tarfile tempfile threading time timeit token tokenize trace traceback tracemalloc types typing
unicodedata unittest.case unittest.mock urllib.parse urllib.request uuid warnings wave weakref webbrowser
xml.dom.minidom xml.etree.ElementTree xml.sax.handler xmlrpc.client zipapp zipfile zipimport zlib zoneinfo
""".split()  # noqa: SIM905  (a list of 120 names reads better so)
# Contractions (either apostrophe), words, single digits, punctuation, line breaks with what leads to them, spaces.
SPLIT = r"['’](?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def render_module(name: str) -> str:
    """The pydoc HTML page of a module, with the path of this installation replaced by a relative one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(name)
    page = pydoc.HTMLDoc().page(pydoc.describe(module), pydoc.HTMLDoc().docmodule(module))
    library = str(Path(pydoc.__file__).parent)
    page = re.sub(r"file:[^\"]*?/lib/python3[^/\"]*/", "file:Lib/", page)
    return page.replace(library, "Lib")


def as_printed(text: str, rng: random.Random) -> str:
    """The text as printed books are transcribed: curly quotes, em dashes, emphasis marks, lines wrapped hard."""
    text = re.sub(r"--+", "—", text)
    text = re.sub(r"(^|[\s(\[—])\"", r"\1“", text, flags=re.M).replace('"', "”")
    text = re.sub(r"(^|[\s(\[—“])'(?=\w)", r"\1‘", text, flags=re.M).replace("'", "’")
    text = re.sub(r"(?<= )([a-z]{2,9})(?= )", lambda m: f"_{m[1]}_" if rng.random() < 1 / 250 else m[1], text)
    width = rng.choice((70, 72, 75, 78))
    wrapped = (textwrap.fill(p, width, break_long_words=False, break_on_hyphens=False) for p in text.split("\n\n"))
    text = "\n\n".join(wrapped)
    return text.replace("\n", "\r\n") if rng.random() < 0.5 else text


def shingles(text: str, words: int = 12) -> set[str]:
    """Every run of `words` consecutive words, lower-case letters only: what two copies of a text share."""
    stream = re.findall(r"[a-z]+", text.lower())
    return {" ".join(stream[i : i + words]) for i in range(len(stream) - words + 1)}


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]),
        ]
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder of .txt works")
    parser.add_argument("--held-out", type=Path, nargs="*", default=[], help="texts that must not occur in the corpus")
    parser.add_argument("--out", type=Path, default=Path("training/run"))
    parser.add_argument("--vocab-size", type=int, default=4200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)

    works = {p.stem: p.read_text(encoding="utf-8").strip() + "\n" for p in sorted(args.corpus.glob("*.txt"))}
    held_out = {p.name: shingles(p.read_text(encoding="utf-8-sig")) for p in args.held_out}
    overlap = {name: {w: len(s & shingles(t)) / len(s) for w, t in works.items()} for name, s in held_out.items()}
    for name, shares in overlap.items():
        worst = max(shares, key=lambda w: shares[w])
        print(f"{name}: at most {shares[worst]:.3%} of its 12-word runs occur in one work ({worst})")
        if shares[worst] > 0.01:
            raise SystemExit(f"{name} is not held out: {shares[worst]:.1%} of it occurs in {worst}")

    pages = {m: render_module(m) for m in (*MODULES, *sorted(VALIDATION_MODULES))}
    pages = {m: p for m, p in pages.items() if len(p) < 250_000}
    documents = []
    for name, text in works.items():
        validation = name in VALIDATION_WORKS
        documents += [(validation, "plain", text), (validation, "printed", as_printed(text, rng))]
    documents += [(name in VALIDATION_MODULES, "html", page) for name, page in pages.items()]
    rng.shuffle(documents)

    training_texts = [text for validation, _, text in documents if not validation]
    tokenizer = train_tokenizer(training_texts, args.vocab_size)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    wrapped.save_pretrained(args.out / "tokenizer")

    eos = tokenizer.token_to_id(EOS)
    streams: dict[bool, list[np.ndarray]] = {False: [], True: []}
    summary: dict[str, dict[str, int]] = {}
    encodings = tokenizer.encode_batch([text for _, _, text in documents], add_special_tokens=False)
    for (validation, kind, text), encoding in zip(documents, encodings, strict=True):
        ids = np.array([*encoding.ids, eos], dtype=np.uint16)
        streams[validation].append(ids)
        entry = summary.setdefault(
            ("validation " if validation else "train ") + kind, {"documents": 0, "bytes": 0, "tokens": 0}
        )
        entry["documents"] += 1
        entry["bytes"] += len(text.encode())
        entry["tokens"] += len(ids)
    np.save(args.out / "train.npy", np.concatenate(streams[False]))
    np.save(args.out / "validation.npy", np.concatenate(streams[True]))
    record = {"seed": args.seed, "sources": summary, "held_out": {n: max(s.values()) for n, s in overlap.items()}}
    (args.out / "data.json").write_text(json.dumps(record, indent=1))
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
