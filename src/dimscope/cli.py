"""The command line: parse, one call, print. No command is imported, and no torch, before it is asked for."""

import io
import sys

from cyclopts import App, CycloptsError

app = App(
    name="dimscope",
    suppress_keyboard_interrupt=False,  # `main` says what is kept
    help="How many dimensions does a language model really use?",
    help_epilogue="MODEL is a folder, a hub id (owner/name), a .gguf file, or `builtin`, the small model that ships here (default).",
)
for name, target, summary in (
    ("inspect", "inspect", "What the model is made of: every tensor, and how much of it is embeddings."),
    (
        "tokens",
        "tokens",
        "Every row of the embedding table: label, bytes, category, norm; duplicates and under-trained ones.",
    ),
    ("neighbors", "neighbors", "The nearest tokens of a token, an id, a phrase or an expression."),
    ("pairs", "pairs", "All pairs of rows within a radius, exact in all dimensions, and the groups they form."),
    ("correlate", "correlate", "Pearson correlation between tokens, and blocks of near-perfectly correlated ones."),
    ("spectrum", "spectrum", "Singular values and every linear dimension, beside noise of the same shape."),
    ("report", "report", "One page with everything, for a double click."),
):
    app.command(f"dimscope.commands:{target}", name=name, help=summary)


def main(tokens: list[str] | None = None) -> int:
    """Runs one command. Users' mistakes: one line on stderr, exit code 2. Bugs: a traceback. Ctrl-C: 130."""
    from dimscope.errors import DimscopeError

    for stream in (sys.stdout, sys.stderr):  # labels hold any Unicode; a terminal or pipe may not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
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
