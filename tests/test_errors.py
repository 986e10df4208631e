"""Users' errors are errors of Python too, where it has one, and say nothing but their message."""

import pytest

from dimscope import errors


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (errors.InvalidArgument, ValueError), (errors.CheckpointNotFound, FileNotFoundError),
        (errors.NetworkError, ConnectionError), (errors.CorruptCheckpoint, ValueError),
        (errors.NonFiniteRows, ValueError), (errors.NonFiniteActivations, FloatingPointError),
    ],
)  # fmt: skip
def test_an_error_is_also_that_of_python(error, base):
    with pytest.raises(base, match=r"^one line$") as caught:
        raise error("one line")
    assert isinstance(caught.value, errors.DimscopeError)


def test_a_missing_extra_is_an_import_error_that_says_what_to_install():
    with pytest.raises(ImportError, match=r"^this needs the package peft: pip install 'dimscope\[lora\]'$"):
        raise errors.MissingExtra("peft", "lora")
