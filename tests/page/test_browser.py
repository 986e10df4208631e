"""The page in a real browser: it searches, picks, rethemes and prints without an error and without a request."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from layer_tables import Model, Plan, layer_tables, study_facts

from dimscope.page.section import Tables
from dimscope.page.theme import figure
from dimscope.report import rewrite_page
from dimscope.storage import FORMAT
from dimscope.studies import LAYERS

CHROMIUM = Path("/usr/bin/chromium")
# Software WebGL, and none of the calls home that a browser makes by itself.
FLAGS = [
    "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
]  # fmt: skip
# Buttons of figures that act on the figure only, by their titles.
BUTTONS = {
    "Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes", "Autoscale", "Box Select", "Lasso Select",
}  # fmt: skip
BUTTONS_OF = "[...document.querySelectorAll('.modebar-btn')].map(button => button.dataset.title)"
FIGURES_WITHOUT_BUTTONS = """[...document.querySelectorAll('.js-plotly-plot')]
  .filter(figure => !figure.querySelector('.modebar-btn')).map(figure => figure.id)"""
# Targets of links and forms, without places of the page, data in it and files in its folder.
FOREIGN_TARGETS = """[...document.querySelectorAll('[*|href], [action], [formaction], [ping]')]
  .flatMap(element => ['href', 'xlink:href', 'action', 'formaction', 'ping'].map(name => element.getAttribute(name)))
  .filter(target => target && !/^(#|data:|tables[/])/.test(target))"""
POINTS_OF = """name => document.getElementById('token-map').data
  .filter(trace => trace.name.startsWith(name)).flatMap(trace => [...trace.customdata])"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no chromium at {CHROMIUM}"),
]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield opened
        opened.close()


@dataclass(frozen=True, slots=True)
class Watched:
    """A page with everything it logged and requested."""

    page: Any
    url: str
    troubles: list[str]
    requests: list[str]


@pytest.fixture(scope="module")
def watched(browser: Any, small_run: Path) -> Iterator[Watched]:
    """Open the page of the small tables once: it is one page to a reader as well."""
    url = rewrite_page(small_run).as_uri()
    watched = Watched(browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light"), url, [], [])
    watched.page.on("pageerror", lambda error: watched.troubles.append(str(error)))
    watched.page.on("console", lambda message: watched.troubles.append(message.text))
    watched.page.on("request", lambda request: watched.requests.append(request.url))
    # Generous limits: software WebGL on a busy machine is slow, and no test here is about speed.
    watched.page.set_default_timeout(240_000)
    watched.page.goto(url)
    watched.page.wait_for_selector("html[data-ready=true]", state="attached", timeout=240_000)
    yield watched
    watched.page.close()


@pytest.fixture
def opened(watched: Watched) -> Iterator[Any]:
    """Return the page as after "Show all"; at the end no error was logged and nothing was requested but the file."""
    page = watched.page
    page.click("#reset")
    page.wait_for_function("!document.getElementById('token-map').data.some(t => !t.meta)")
    yield page
    page.wait_for_timeout(100)
    assert watched.troubles == []
    assert [url for url in watched.requests if not url.startswith(("data:", "blob:"))] == [watched.url]


def test_map_holds_all_tokens_at_their_places(opened: Any, tables: Tables) -> None:
    traces = opened.evaluate(
        "document.getElementById('token-map').data.map(t => [[...t.customdata], [...t.x], [...t.y], t.text])"
    )
    seen = {i: (x, y, text) for ids, xs, ys, texts in traces for i, x, y, text in zip(ids, xs, ys, texts, strict=True)}
    for row in tables["tokens"].iter_rows(named=True):
        x, y, text = seen[row["id"]]
        assert (x, y) == pytest.approx((row["pc1"], row["pc2"]), abs=1e-3)
        assert text == row["label"].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def test_search_finds_text_ids_and_spaces(opened: Any) -> None:
    def expect(text: str, said: str, labels: list[str]) -> None:
        opened.fill("#find", text)
        is_now = """wanted => JSON.stringify([document.getElementById('found').textContent,
          [...document.querySelectorAll('#hits bdi')].map(label => label.textContent)]) === JSON.stringify(wanted)"""
        opened.wait_for_function(is_now, arg=[said, labels], timeout=120_000)

    expect("water", "2 tokens found.", ["␣water", "Water"])
    expect(" water", "1 token found.", ["␣water"])
    opened.wait_for_function(f"(({POINTS_OF})('found')).join() === '1'", timeout=120_000)
    expect("#2", "1 token found.", ["Water"])
    expect("<script>", "1 token found.", ["</script><script>alert(1)</script>"])
    expect("nowhere", "No token found.", [])
    expect("", "", [])


def test_click_lists_neighbours_or_names_the_command(opened: Any) -> None:
    opened.locator("#token-map").scroll_into_view_if_needed()
    click = """id => { const div = document.getElementById('token-map'); const l = div._fullLayout;
      const t = div.data.find(t => [...t.customdata].includes(id)); const i = [...t.customdata].indexOf(id);
      const box = div.getBoundingClientRect();
      return [box.x + l.xaxis._offset + l.xaxis.d2p(t.x[i]), box.y + l.yaxis._offset + l.yaxis.d2p(t.y[i])]; }"""

    def pick(token: int) -> str:
        x, y = opened.evaluate(click, token)
        opened.mouse.move(x - 3, y - 3)
        opened.mouse.move(x, y)
        opened.wait_for_timeout(400)
        opened.mouse.click(x, y)
        opened.wait_for_selector(f"#picked h3:has-text('#{token}')", timeout=120_000)
        return opened.inner_text("#picked")

    known = pick(1)
    assert "Water" in known
    assert "0.900" in known
    assert "computed for a sample of 2 tokens" in known
    assert sorted(opened.evaluate(POINTS_OF, "neighbours")) == [2, 3]
    unknown = pick(5)
    assert "Only a random sample of 2 tokens" in unknown
    assert "dimscope neighbors 'my model'\"'\"'s <tiny>' '#5'" in unknown


def test_components_and_colours_can_be_chosen(opened: Any, tables: Tables) -> None:
    opened.select_option("#axis-y", "pc3")
    opened.select_option("#colour", "norm")
    opened.wait_for_function(
        "document.getElementById('token-map').data.every(t => t.marker.coloraxis && t.meta.y === 'pc3')",
        timeout=120_000,
    )
    data = opened.evaluate("document.getElementById('token-map').data.map(t => [[...t.y], [...t.marker.color]])")
    assert sorted(y for ys, _ in data for y in ys) == pytest.approx(sorted(tables["tokens"]["pc3"]), abs=1e-3)
    assert sorted(c for _, colours in data for c in colours) == pytest.approx(range(1, 9), abs=1e-3)
    title = opened.evaluate("document.getElementById('token-map').layout.yaxis.title.text")
    assert title == "component 3 (4.7% of the variance)"


def test_theme_changes_page_and_figures(opened: Any) -> None:
    colours = """[getComputedStyle(document.body).backgroundColor,
      document.getElementById('spectrum-input')._fullLayout.font.color]"""
    light, dark = ["rgb(255, 255, 255)", "#1c2430"], ["rgb(18, 22, 28)", "#e6eaf0"]
    is_now = f"wanted => JSON.stringify({colours}) === JSON.stringify(wanted)"
    for wanted in (dark, light):
        opened.click("#theme-toggle")
        # Figures follow one by one; on a busy machine that takes a while.
        opened.wait_for_function(is_now, arg=wanted, timeout=120_000)


def test_tables_and_csv_can_be_saved(opened: Any, tables: Tables) -> None:
    with opened.expect_download() as download:
        opened.click("#spectrum a[data-table=spectrum]")
    assert pl.read_parquet(Path(download.value.path()).read_bytes()).equals(tables["spectrum"])
    with opened.expect_download() as download:
        opened.click("#csv")
    saved = pl.read_csv(Path(download.value.path()).read_bytes().removeprefix(b"\xef\xbb\xbf"))
    assert saved["label"].to_list() == tables["tokens"]["label"].to_list()
    assert saved["norm"].to_list() == pytest.approx(tables["tokens"]["norm"].to_list(), rel=1e-3)


def test_no_control_leads_out_of_the_page(opened: Any) -> None:
    assert opened.evaluate(FIGURES_WITHOUT_BUTTONS) == []
    assert set(opened.evaluate(BUTTONS_OF)) <= BUTTONS
    assert opened.evaluate(FOREIGN_TARGETS) == []
    policy = opened.get_attribute("meta[http-equiv=Content-Security-Policy]", "content")
    assert {"default-src 'none'", "form-action 'none'", "base-uri 'none'"} <= set(policy.split("; "))


def test_figures_outside_the_page_have_no_button_that_uploads_them(browser: Any) -> None:
    page = browser.new_page()
    page.set_content(figure(300).add_scatter(x=[1, 2], y=[3, 4]).to_html(config={"displaylogo": False}))
    page.wait_for_selector(".modebar-btn", state="attached", timeout=240_000)
    titles = page.evaluate(BUTTONS_OF)
    page.close()
    assert "Zoom" in titles
    assert set(titles) <= BUTTONS


@pytest.mark.parametrize("width", [390, 1600])
def test_page_never_scrolls_sideways(opened: Any, width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 900})
    opened.wait_for_timeout(400)
    opened.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width, timeout=30_000)


def test_paper_is_light_and_the_screen_comes_back(opened: Any) -> None:
    opened.click("#theme-toggle")
    assert opened.pdf(format="A4").startswith(b"%PDF")
    # Printing goes through the light theme on its way, and comes back.
    opened.wait_for_function("document.documentElement.dataset.screenTheme === 'dark'", timeout=120_000)
    opened.wait_for_function("document.documentElement.dataset.theme === 'dark'", timeout=120_000)


def test_layer_can_be_chosen_and_the_theme_keeps_it(browser: Any, run_folder: Callable[..., Path]) -> None:
    plan = Plan(models=(Model(blocks=2, dim=16),), texts=("prose",), windows=1, length=64)
    tables = layer_tables(plan)
    folder = run_folder(
        tables,
        {
            "studies": {
                "layers": {
                    "facts": study_facts(plan),
                    "tables": list(tables),
                    "definition": [FORMAT, LAYERS.definition],
                }
            }
        },
    )
    troubles: list[str] = []
    page = browser.new_page(viewport={"width": 390, "height": 900}, color_scheme="light")
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text))
    page.set_default_timeout(240_000)
    page.goto(rewrite_page(folder).as_uri())
    page.wait_for_selector("html[data-ready=true]", state="attached")
    seen = """id => [...new Set(document.getElementById(id).data
      .filter(t => t.visible !== false && t.meta).map(t => t.meta.layer))].join()"""
    page.select_option("select[data-layers=scree]", "1")
    page.click("#theme-toggle")
    for anchor in ("scree-shares", "scree-cumulative"):
        page.wait_for_function(f"({seen})('{anchor}') === '1'")
    assert page.evaluate(seen, "intrinsic-scale") == "3"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert set(page.evaluate(BUTTONS_OF)) <= BUTTONS
    assert page.evaluate(FOREIGN_TARGETS) == []
    assert troubles == []
    page.close()
