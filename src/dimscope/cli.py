"""The command line: parse, one call, print. torch is imported by the command that runs, not by `--help`."""

import io
import sys

from cyclopts import App, CycloptsError

from dimscope.commands import damage, embedding, layers, narrow, report
from dimscope.commands.options import STANDARD_INPUT
from dimscope.errors import DimscopeError

app = App(
    name="dimscope",
    suppress_keyboard_interrupt=False,  # `main` says what is kept
    help="How many dimensions does a language model really use?",
    help_epilogue="MODEL is a folder, a hub id (owner/name), a .gguf file, or `builtin`, the small model that ships here (default).",
)
for command in (
    embedding.inspect,
    embedding.tokens,
    embedding.neighbors,
    embedding.pairs,
    embedding.correlate,
    embedding.spectrum,
    layers.layers,
    damage.damage,
    narrow.narrow,
    report.report,
):
    app.command(command)


def main(tokens: list[str] | None = None) -> int:
    """Runs one command. Users' mistakes: one line on stderr, exit code 2. Bugs: a traceback. Ctrl-C: 130."""
    for stream in (sys.stdout, sys.stderr):  # labels hold any Unicode; a terminal or pipe may not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if tokens is None else tokens
    # A lone hyphen, standard input, would be taken for an option without a name.
    given = [STANDARD_INPUT if token == "-" else token for token in given]
    try:
        app(given, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as e:
        return _fail(str(e))
    except DimscopeError as e:
        return _fail(str(e))
    except KeyboardInterrupt:
        print("stopped; finished tables are kept, and the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `dimscope tokens | head`
        sys.stderr.close()
        return 0
    return 0


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2
