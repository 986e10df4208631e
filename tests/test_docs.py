"""The Markdown pages: short lines, links and anchors that exist, and options that the commands have."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import App, CycloptsError

from dimscope.cli.app import build_app
from dimscope.evaluation import metrics as evaluation
from dimscope.geometry.metrics import METRICS
from dimscope.storage import COLUMNS
from dimscope.studies import STUDIES

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "benchmarks", "training", "examples", "tests", "src")  # not those of environments and results
PAGES = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
LONGEST = 140  # characters of a line
DATED = {"CHANGELOG.md", "LOG.md"}  # pages that may name options of older versions

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def marked_lines(page: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield number, text and whether it is code, for each line; indented code follows an empty line."""
    fenced = indented = blank = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = line.lstrip().startswith("```")
        indented = line.startswith("    ") and (indented or blank) if line else indented
        yield number, line, fenced or fence or (indented and bool(line))
        fenced, blank = fenced != fence, not line


def prose(page: Path) -> list[tuple[int, str]]:
    return [(number, line) for number, line, code in marked_lines(page) if not code]


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings as GitHub makes them."""
    titles = [line.lstrip("# ") for _, line in prose(page) if re.match(r"#{1,6} ", line)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_pages_are_found():
    names = {page.relative_to(ROOT).as_posix() for page in PAGES}
    assert {"README.md", "docs/definitions.md", "benchmarks/README.md", "training/MODEL_CARD.md"} <= names


@every_page
def test_lines_are_short_outside_code_and_tables(page):
    lines = [(number, len(line)) for number, line in prose(page) if not line.startswith("|")]
    assert [(number, length) for number, length in lines if length > LONGEST] == []


@every_page
def test_links_lead_to_files_and_headings(page):
    missing = []
    for number, line in prose(page):
        for link in re.findall(r"\]\(([^)\s]+)\)", line):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if "://" in link:
                continue
            if not target.exists() or (anchor and anchor not in anchors(target)):
                missing.append((number, link))
    assert missing == []


def test_the_definitions_list_every_measure_and_common_column():
    text = (ROOT / "docs/definitions.md").read_text(encoding="utf-8")
    rows = [f"| {m.name} | `{m.slug}` | {m.unit} | {m.definition} |" for m in METRICS.values()]
    assert text.partition("## All measures")[2].strip().splitlines()[-len(rows) :] == rows
    columns = re.findall(r"^\| `(\w+)` \|", text.partition("## Common columns")[2].partition("##")[0], re.M)
    assert sorted(columns) == sorted(COLUMNS)


def test_the_definitions_explain_every_measure_by_its_name():
    text = (ROOT / "docs/definitions.md").read_text(encoding="utf-8")
    evaluated = set(evaluation.DEFINITIONS)
    bold = {name.removesuffix(" x%") for name in re.findall(r"\*\*([^*]+)\*\*", text)}
    assert {*METRICS, *evaluated} - bold == set()


current_page = pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in DATED],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)


@current_page
def test_commands_in_code_blocks_parse(page, app):
    for number, line, code in marked_lines(page):
        if code and line.strip().startswith("dimscope "):
            arguments = shlex.split(line, comments=True)[1:]
            try:
                app.parse_args(arguments, exit_on_error=False, print_error=False)
            except CycloptsError as e:
                raise AssertionError(f"line {number}: {line.strip()}: {e}") from e


@current_page
def test_options_in_the_text_exist(page, known_options):
    named = {option for _, line in prose(page) for option in re.findall(r"`(?:dimscope [\w ]+)?(--[a-z][\w-]*)", line)}
    assert named - known_options == set()


@pytest.fixture(scope="module")
def app() -> App:
    return build_app(STUDIES)


@pytest.fixture(scope="module")
def known_options(app: App) -> set[str]:
    """Return the options of all commands, and those of the programs in benchmarks and training."""
    commands = [app[name] for name in app if not name.startswith("-")]
    own = {
        name for command in commands for argument in command.assemble_argument_collection() for name in argument.names
    }
    programs = [
        path.read_text(encoding="utf-8")
        for folder in ("benchmarks", "training")
        for path in (ROOT / folder).glob("*.py")
    ]
    return (
        own | {"--help"} | {option for text in programs for option in re.findall(r'add_argument\("(--[\w-]+)"', text)}
    )
