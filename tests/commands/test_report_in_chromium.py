"""The report in a browser: drawn, silent, asking for nothing, and no wider than a phone."""

import pathlib

import pytest

from prism_jax import main
from tests import chromium
from tests.commands import audited, made_up_chain

_PUBLISHED = pathlib.Path(__file__).parents[2] / "docs" / "small" / "report.html"

_BOXES = """[...document.querySelectorAll("%s")].map(x => {
  const box = x.getBoundingClientRect();
  return [box.width, box.height, x.naturalWidth ?? 1];
})"""
# Marks inside plots; a straight horizontal or vertical line has a box without height or width.
_MARKS = """[...document.querySelectorAll("figure > svg")].map(plot =>
  [...plot.querySelectorAll(".bar, .line, text")].filter(x => {
    const box = x.getBoundingClientRect();
    return box.width + box.height > 0;
  }).length)"""
_SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll("svg text, p, td, pre")].map(x => {
  const plot = x.closest("svg");
  const scale = plot ? plot.getBoundingClientRect().width / plot.viewBox.baseVal.width : 1;
  return scale * parseFloat(getComputedStyle(x).fontSize);
}))"""
# Of text and what lies behind it, by WCAG's formula.
_CONTRAST = """(() => {
  const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = c => rgb(c).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = x => {
    for (; x; x = x.parentElement) {
      const c = getComputedStyle(x).backgroundColor;
      if (!/, 0\\)$/.test(c)) return c;
    }
  };
  return Math.min(...[...document.querySelectorAll(
      "h1, h2, h3, p, td, th, .note, .verdict, pre span, svg text")].map(x => {
    const style = getComputedStyle(x);
    const pair = [light(x.closest("svg") ? style.fill : style.color), light(behind(x))];
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  }));
})()"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return the pages of a whole chain and of one that was stopped after SFT."""
    root = tmp_path_factory.mktemp("pages")
    found = {}
    for name, stages in (("whole", tuple(made_up_chain.RIGHT)), ("stopped", ("sft",))):
        chain = made_up_chain.write(root / name, stages=stages)
        found[name] = root / f"{name}.html"
        given = [f"--workdir={chain}", f"--out={found[name]}", f"--title={made_up_chain.TITLE}"]
        assert main.main(["report", *given]) == 0
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = chromium.find()
    if program is None:
        pytest.skip(f"there is no browser here: none of {', '.join(chromium.NAMES)}")
    with chromium.start(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["whole", "stopped"])
def test_plots_and_pictures_are_drawn_and_nothing_is_logged(browser, pages, name, width):
    browser.open(pages[name], width=width, height=844)
    assert browser.run("document.title") == made_up_chain.TITLE
    plots, pictures = browser.run(_BOXES % "figure > svg"), browser.run(_BOXES % "img")
    # The panel of the discriminator has two where there was one.
    assert len(plots) == {"whole": 7, "stopped": 5}[name]
    assert len(pictures) == 4
    assert all(w > 200 and h > 100 for w, h, _ in plots)
    assert all(w > 60 and h > 20 and natural > 0 for w, h, natural in pictures)
    assert all(count > 0 for count in browser.run(_MARKS))
    assert browser.logged == []


@pytest.mark.parametrize("name", ["whole", "stopped"])
def test_a_phone_scrolls_one_way_only_and_texts_are_legible(browser, pages, name):
    browser.open(pages[name], width=390, height=844)
    browser.run("document.querySelectorAll('details').forEach(x => x.open = true)")
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert browser.run(_SMALLEST_TEXT) >= 10


@pytest.mark.parametrize("width", [390, 1280])
def test_the_published_report_is_drawn_silent_and_no_wider_than_its_window(browser, width):
    browser.open(_PUBLISHED, width=width, height=844)
    browser.run("document.querySelectorAll('details').forEach(x => x.open = true)")
    plots, pictures = browser.run(_BOXES % "figure > svg"), browser.run(_BOXES % "img")
    assert plots
    assert pictures
    assert all(w > 200 and h > 100 for w, h, _ in plots)
    assert all(w > 60 and h > 20 and natural > 0 for w, h, natural in pictures)
    assert all(count > 0 for count in browser.run(_MARKS))
    assert browser.logged == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(_SMALLEST_TEXT) >= 10


def test_the_page_of_an_audit_is_drawn_silent_and_fits_a_phone(browser, tmp_path):
    audited.write(tmp_path)
    assert audited.run(tmp_path) == 0
    for width, is_dark in ((390, True), (1280, False)):
        browser.open(tmp_path / "audit.html", width=width, height=844, dark=is_dark)
        plots, pictures = browser.run(_BOXES % "figure > svg"), browser.run(_BOXES % "img")
        assert len(plots) == 4
        assert all(w > 200 and h > 100 for w, h, _ in plots)
        assert pictures
        assert all(w > 60 and h > 20 and natural > 0 for w, h, natural in pictures)
        assert all(count > 0 for count in browser.run(_MARKS))
        assert browser.logged == []
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run(_SMALLEST_TEXT) >= 10
        assert browser.run(_CONTRAST) >= 4.5


@pytest.mark.parametrize("name", chromium.NAMES)
def test_a_browser_is_found_by_any_of_its_names(monkeypatch, tmp_path, name):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert chromium.find() is None
    program = tmp_path / name
    program.touch(mode=0o755)
    assert chromium.find() == str(program)


@pytest.mark.parametrize("is_dark", [False, True])
def test_texts_stand_out_from_what_is_behind_them(browser, pages, is_dark):
    browser.open(pages["whole"], width=390, height=844, dark=is_dark)
    # Source: WCAG 2.1, success criterion 1.4.3.
    assert browser.run(_CONTRAST) >= 4.5


def test_a_page_that_logs_an_error_is_caught(browser, tmp_path):
    page = tmp_path / "wrong.html"
    page.write_text("<script>undefined_name()</script><img src='http://localhost:9/x.png'>")
    browser.open(page, width=390, height=844)
    assert any("undefined_name" in line for line in browser.logged)
    assert any("localhost:9" in line for line in browser.logged)
