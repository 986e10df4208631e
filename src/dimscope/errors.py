"""The errors that a user can cause, and that the command line answers with one line and exit code 2.

DimscopeError
├── CheckpointError             the checkpoint itself
│   ├── CheckpointNotFound      no such folder, hub id or revision; no access to it (also a FileNotFoundError)
│   ├── NetworkError            the hub cannot be reached, or broke off (also a ConnectionError)
│   ├── CorruptCheckpoint       truncated or damaged files, a wrong index, a shape that contradicts the config (also a ValueError)
│   ├── UnsupportedCheckpoint   quantised weights, an architecture that transformers does not know
│   └── UnsafeCheckpoint        pickle weights or remote code, without the flag that accepts the risk
├── TokenizerMissing            text is needed, and there is no tokenizer
├── NonFiniteWeights            NaN or Inf in the weights of a model, or in what would be written (also a ValueError)
├── NonFiniteRows               NaN or Inf in the table (also a ValueError)
├── NonFiniteActivations        NaN or Inf in the hidden states or logits (also a FloatingPointError)
├── MissingExtra                a package that only an extra installs (also an ImportError)
└── InvalidArgument             an argument that does not fit (also a ValueError)
"""


class DimscopeError(Exception):
    """Base of all errors whose message is meant for the user."""


class CheckpointError(DimscopeError):
    """Something is wrong with the checkpoint."""


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no such folder, hub id or revision, or no access to it."""


class NetworkError(CheckpointError, ConnectionError):
    """The hub cannot be reached, or a download broke off."""


class CorruptCheckpoint(CheckpointError, ValueError):
    """The files contradict themselves, each other or the config."""


class UnsupportedCheckpoint(CheckpointError):
    """The files are sound, but of a kind that cannot be studied."""


class UnsafeCheckpoint(CheckpointError):
    """Reading the files could run code that they bring along."""


class TokenizerMissing(DimscopeError):
    """The checkpoint has no tokenizer, and the question needs one."""


class NonFiniteWeights(DimscopeError, ValueError):
    """A weight of a model, or of a checkpoint that is to be written, is NaN or Inf."""


class NonFiniteRows(DimscopeError, ValueError):
    """The table has rows with NaN or Inf."""


class NonFiniteActivations(DimscopeError, FloatingPointError):
    """The model computed NaN or Inf."""


class MissingExtra(DimscopeError, ImportError):
    """A package is needed that only an extra of dimscope installs."""

    def __init__(self, package: str, extra: str) -> None:
        """Name the package and the extra that installs it."""
        super().__init__(f"this needs the package {package}: pip install 'dimscope[{extra}]'")


class InvalidArgument(DimscopeError, ValueError):
    """An argument does not fit: its value, or the model it is for."""
