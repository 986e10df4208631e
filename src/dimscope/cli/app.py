"""The command line: parse, one call, print. torch is imported by the command that runs, not by `--help`."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError
from cyclopts.config import Dict

from dimscope import studies
from dimscope.cli import embedding, narrow
from dimscope.cli.damage import damage_command
from dimscope.cli.download import download
from dimscope.cli.options import STANDARD_INPUT
from dimscope.cli.pool import pool
from dimscope.cli.report import report_command
from dimscope.cli.studies import study_command
from dimscope.errors import DimscopeError, InvalidArgument
from dimscope.studies.study import Study

SPECIAL = {"damage": damage_command, "narrowing": narrow.narrow_command}
"""Studies whose command does more than run the study."""

EPILOGUE = (
    "MODEL is a folder, a hub id (owner/name), a .gguf file, or builtin, the small model that ships here. Commands that "
    "read only the embedding table also take a file of N x d vectors: .npy, .npz, .parquet or .safetensors."
)


def build_app(listed: Sequence[Study]) -> App:
    """Return the commands: those about tables and checkpoints, one for each study, and the report."""
    app = App(
        name="dimscope",
        default_parameter=Parameter(negative_iterable=(), show_default=default_text),
        suppress_keyboard_interrupt=False,  # `main` says what is kept
        help="How many dimensions does a language model really use?",
        help_epilogue=EPILOGUE,
    )
    for command in embedding.COMMANDS:
        app.command(command)
    for study in listed:
        app.command(SPECIAL.get(study.name, study_command)(study))
    app.command(report_command(listed), name="report")
    app.command(pool)
    app.command(download)
    return app


def main(tokens: list[str] | None = None) -> int:
    """Run one command. Users' mistakes: one line on stderr, exit code 2. Bugs: a traceback. Ctrl-C: 130."""
    for stream in (sys.stdout, sys.stderr):  # labels hold any Unicode; a terminal or pipe may not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if tokens is None else tokens
    # A lone hyphen, standard input, would be taken for an option without a name.
    arguments = [STANDARD_INPUT if token == "-" else token for token in arguments]
    app = build_app(studies.STUDIES)
    try:
        _require_values(arguments)
        app.config = _preset(arguments)
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as e:
        own = e.__cause__  # a ValueError of ours that was raised while a value was read
        return _fail(with_options(str(own)) if isinstance(own, DimscopeError) else _usage(e))
    except DimscopeError as e:
        return _fail(with_options(str(e)))
    except KeyboardInterrupt:
        print("stopped; finished tables are kept, and the same command resumes from there", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `dimscope tokens | head`
        sys.stderr.close()
        return 0
    return 0


def _usage(error: CycloptsError) -> str:
    """Return what is wrong with the arguments, in words of the command line."""
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"unexpected argument {error.unused_tokens[0]!r}; dimscope COMMAND --help lists the arguments"
    return str(error)


def _preset(arguments: Sequence[str]) -> list[Any]:
    """Return the settings of a preset as defaults that other options override, for the command that names one."""
    named = [arguments[i + 1] for i, word in enumerate(arguments[:-1]) if word == "--preset"]
    named += [word.removeprefix("--preset=") for word in arguments if word.startswith("--preset=")]
    study = next((study for study in studies.STUDIES if arguments[:1] == [study.name]), None)
    values = study.presets.get(named[-1]) if study is not None and named else None
    if study is None or values is None:
        return []
    names = option_names(study.settings)
    return [Dict({study.name: {names[field].removeprefix("--"): value for field, value in values.items()}})]


def default_text(value: Any) -> str | None:
    """Return a default as it is typed on the command line; None, which prints nothing, for no value and for a flag.

    >>> default_text(("input", "both")), default_text(0), default_text(()), default_text(False)
    ('input both', '0', None, None)
    """
    if value is None or value is False or value == ():
        return None
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def option_names(settings: type) -> dict[str, str]:
    """Return the option of every field of settings."""
    names = {field: as_option(field) for field in settings.__annotations__}
    for field, extra in _parameters(settings):
        if extra.name:
            names[field] = as_option(next(iter(extra.name)))  # without hyphens, so that --STUDY.NAME is an option too
    return names


def as_option(field: str) -> str:
    """Return the option of a field without a name of its own.

    >>> as_option("show_layer")
    '--show-layer'
    """
    return "--" + field.replace("_", "-")


def _parameters(settings: type) -> Iterator[tuple[str, Parameter]]:
    """Yield what the annotations of the fields say to the command line."""
    for field, hint in settings.__annotations__.items():
        for extra in getattr(hint, "__metadata__", ()):
            if isinstance(extra, Parameter):
                yield field, extra


def with_options(message: str) -> str:
    """Return a message of the library with `parameters` as the --options of the command line."""
    names = {field: option for study in studies.STUDIES for field, option in option_names(study.settings).items()}
    return re.sub(r"`(\w+)`", lambda m: names.get(m[1]) or as_option(m[1]), message)


def _require_values(arguments: Sequence[str]) -> None:
    """Raise InvalidArgument for an option that stands alone, as where a variable of the shell is not set."""
    several = {"--studies", *(option for study in studies.STUDIES for option in lists_of(study.settings))}
    for option, value in zip(arguments, [*arguments[1:], "--"], strict=True):
        if option in several and value.startswith("--"):
            raise InvalidArgument(f"{option} takes one or more values, got none")


def lists_of(settings: type) -> list[str]:
    """Return the options that take several values."""
    names = option_names(settings)
    return [names[field] for field, extra in _parameters(settings) if extra.consume_multiple]


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2
