"""Line ends of texts: CRLF and CR are read as LF, which is what models were trained on. Knows nothing of tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

COUNTED = 1 << 26  # characters in which line ends are counted; a longer text would cost a noticeable pass


def with_lf(parts: Iterable[str]) -> Iterator[str]:
    r"""Yield the parts of a text with every CRLF and every other CR as LF; a CRLF may lie across two parts.

    >>> list(with_lf(["a\r", "\nb\rc"]))
    ['a\n', 'b\nc']
    """
    after_cr = False
    for part in filter(None, parts):
        own = part[1:] if after_cr and part[0] == "\n" else part
        after_cr = part[-1] == "\r"
        yield own.replace("\r\n", "\n").replace("\r", "\n") if "\r" in own else own


@dataclass(frozen=True, slots=True)
class CarriageReturns:
    """Line ends that have a carriage return.

    Attributes:
        crlf: Number of CRLF.
        cr: Number of CR that no LF follows.
        counted: Whether the whole text was counted, not its beginning only.
    """

    crlf: int
    cr: int
    counted: bool = True

    def __str__(self) -> str:
        """Return what they are: "3,757 CRLF line ends", and without numbers where only a part was counted."""
        kinds = [(n, name) for n, name in ((self.crlf, "CRLF"), (self.cr, "CR")) if n]
        words = (f"{n:,} {name}" if self.counted else name for n, name in kinds)
        return f"{' and '.join(words)} line ends"


def count_carriage_returns(parts: Iterable[str]) -> CarriageReturns | None:
    r"""Count the line ends with a carriage return in the first `COUNTED` characters; return None where there is none.

    >>> print(count_carriage_returns(["a\r", "\nb\rc\r\n"]))
    2 CRLF and 1 CR line ends
    """
    crlf = returns = n_read = 0
    after_cr, counted = False, True
    for part in filter(None, parts):
        if n_read >= COUNTED:
            counted = False
            break
        crlf += part.count("\r\n") + (after_cr and part[0] == "\n")
        returns += part.count("\r")
        after_cr = part[-1] == "\r"
        n_read += len(part)
    return CarriageReturns(crlf, returns - crlf, counted) if returns else None
