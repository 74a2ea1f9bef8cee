"""Both pages in a real browser: data, hover, sorting, widths, dark mode. Skipped where there is no browser.

pip install -e '.[browser]'   # and a Chromium, such as Debian's package `chromium`
"""

import json
import pathlib
import re
import shutil

import pytest

from mtl_sparse.report import page as page_lib
from mtl_sparse.report import plots, run_page, svg, web
from tests.report.run_page_test import LAYERS, STEPS, TASKS, write_whole
from tests.report.study_test import BOTH, write_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra 'browser'")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
if CHROMIUM is None:
    pytest.skip(f"needs one of {', '.join(NAMES)}", allow_module_level=True)
WIDTHS, MODES = (400, 1500), ("light", "dark")
# Row -> (lambda, IoU of each seed, MAE of each seed, M parameters); 10 and 9 sort differently as text.
ROWS = {
    "dense": (0.0, (0.30, 0.31, 0.32), (0.140, 0.141, 0.145), 10.0),
    "λ 1e-05": (1e-5, (0.33, 0.35, 0.36), (0.130, 0.131, 0.138), 9.0),
    "λ 0.0001": (1e-4, (0.28, 0.29, 0.31), (0.150, 0.154, 0.155), 0.5),
}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # As root, in a container, Chromium has no sandbox; the pages are this project's own.
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> pathlib.Path:
    """Return the page of a study of three rows with three seeds."""
    parent = tmp_path_factory.mktemp("study")
    folders = []
    for name, (lambda_, ious, maes, size) in ROWS.items():
        for seed, (iou, mae) in enumerate(zip(ious, maes, strict=True)):
            folder = write_run(parent / f"{name} {seed}", BOTH, lambda_, seed, iou=iou, mae=mae, group=0.0)
            results = json.loads((folder / "results.json").read_text())
            results["size"]["compact"] = {"parameters": int(size * 10**6), "macs": int(size * 10**7)}
            (folder / "results.json").write_text(json.dumps(results))
            folders.append(folder)
    return page_lib.write(folders, parent / "report")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """Return the page of a finished run."""
    return run_page.write(write_whole(tmp_path_factory.mktemp("runs") / "demo"))


@pytest.fixture
def open_page(browser):
    """Return a function (path, width, mode) -> page; there must be no error in the console at the end."""
    errors, contexts = [], []

    def open_(path, width=1500, mode="light", **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=mode, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith("file:") else _remote(request.url))
        page.goto(path.as_uri())
        return page

    def _remote(url):
        if not url.startswith("data:"):
            errors.append(f"request of {url}")

    yield open_
    for context in contexts:
        context.close()
    assert errors == []


def gain_over_dense(name):
    """Return Δm over the dense row by hand, in percent."""
    (_, ious, maes, _), (_, base_ious, base_maes, _) = ROWS[name], ROWS["dense"]
    parts = [value / base - 1 for value, base in zip(ious, base_ious, strict=True)]
    parts += [1 - value / base for value, base in zip(maes, base_maes, strict=True)]
    return 100 * sum(parts) / len(parts)


def figure(page, title):
    return page.locator("figure").filter(has=page.get_by_role("heading", name=title, exact=True))


def tips(located):
    return located.locator(".hits > *").evaluate_all("found => found.map(one => one.dataset.tip)")


def column(page, table, name):
    """Return the cells of a table's column, from top to bottom."""
    heads = page.locator(f"h2#{table} ~ .scroll").first.locator("th").all_inner_texts()
    (index,) = [i for i, head in enumerate(heads) if head.strip(" ▲▼\n") == name]
    cells = page.locator(f"h2#{table} ~ .scroll").first.locator(f"tbody tr td:nth-child({index + 1})")
    return [cell.strip() for cell in cells.all_inner_texts()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "run"])
def test_nothing_overflows_the_page(name, width, mode, open_page, request):
    page = open_page(request.getfixturevalue(name), width, mode)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('figure').getBoundingClientRect().right") <= width
    assert page.locator("svg").count() > 3


@pytest.mark.parametrize("name", ["report", "run"])
def test_dark_mode_changes_background_text_and_plots(name, open_page, request):
    light, dark = (open_page(request.getfixturevalue(name), mode=mode) for mode in MODES)

    def color(page, selector, which):
        found = page.evaluate(f"getComputedStyle(document.querySelector({selector!r})).{which}")
        return sum(map(int, re.findall(r"\d+", found)[:3]))

    assert color(light, "body", "backgroundColor") > 700 and color(dark, "body", "backgroundColor") < 100
    assert color(light, "svg text", "fill") < 150 and color(dark, "svg text", "fill") > 600
    assert color(light, "figure", "backgroundColor") > 700 and color(dark, "figure", "backgroundColor") < 150


def test_plots_of_the_report_have_a_point_for_each_record(report, open_page):
    page = open_page(report)
    gains = tips(figure(page, "Gain over dense"))
    shown = [re.match(r"(.*): Δm ([+-][\d.]+) %", tip).groups() for tip in gains]
    assert shown == [(name, f"{gain_over_dense(name):+.2f}") for name in ("λ 0.0001", "λ 1e-05")]
    assert len(tips(figure(page, "Gain against cost"))) == len(ROWS)
    assert len(tips(figure(page, "Metrics against sparsity"))) == len(ROWS) * len(BOTH)
    assert len(tips(figure(page, "Metrics against lambda"))) == len(ROWS) * len(BOTH)
    assert len(tips(figure(page, "Sparsity over the run"))) == 2 * 2, "two sparse rows, validated twice"
    assert len(tips(figure(page, "Groups left by layer"))) == 2 * 2, "two sparse rows of two layers"
    markers = figure(page, "Metrics against lambda").locator("svg").first.locator("g[clip-path] > use").count()
    assert markers >= len(ROWS), "and what is drawn are these points"


def test_plots_of_a_run_have_a_point_for_each_record(run, open_page):
    page = open_page(run)
    curves = tips(figure(page, "Losses and metrics"))
    assert len(curves) == len(TASKS) * (3 * len(STEPS) + 1), "train and validation loss, the metric, and the test"
    assert "test, best checkpoint: 0.31 (step 30)" in curves
    assert len(tips(figure(page, "Sparsity over the run"))) == 3 * len(STEPS), "groups, parameters, lambda"
    assert len(tips(figure(page, "Groups per layer"))) == 2 * len(LAYERS)
    assert "layer1_0/conv1, left after training: 2" in tips(figure(page, "Groups per layer"))
    assert len(tips(figure(page, "MACs of each layer"))) == 4, "two layers, dense and compact"


def test_pointing_at_a_plot_shows_the_value(report, open_page):
    for width in WIDTHS:
        page = open_page(report, width)
        tip = page.locator("#tip")
        assert not tip.is_visible()
        target = figure(page, "Gain over dense").locator(".hits circle").first
        target.scroll_into_view_if_needed()
        target.hover()
        assert tip.is_visible() and tip.inner_text() == target.get_attribute("data-tip")
        expected = f"λ 0.0001: Δm {gain_over_dense('λ 0.0001'):+.2f} % (95 % interval"
        assert tip.inner_text().startswith(expected) and tip.inner_text().endswith("3 seeds)")
        box = tip.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        page.locator("h1").hover()
        assert not tip.is_visible()


def test_points_in_one_place_show_all_their_values(tmp_path, open_page):
    figure_ = plots.new_figure(figsize=(4, 3))
    axis = figure_.subplots()
    for name in ("one", "two"):
        axis.plot([0, 1], [5, 6], label=name)
    drawn = web.plot(svg.inline(figure_, "lines", "lines"), "Lines")
    path = tmp_path / "page.html"
    path.write_text(web.document("Page", "", [web.Section("all", "All", drawn)]))
    page = open_page(path)
    page.locator(".hits circle").last.hover()
    assert page.locator("#tip").inner_text() == "two: 6 (x 1)\none: 6 (x 1)"


def test_without_scripts_plots_have_titles(report, open_page):
    page = open_page(report, java_script_enabled=False)
    assert page.locator("svg .hits title").count() > 10


def test_columns_sort_by_number_and_by_text(report, open_page):
    page = open_page(report)
    button = lambda name: page.locator("h2#summary ~ .scroll").first.get_by_role("button", name=name, exact=True)  # noqa: E731
    head = "compact M parameters"
    ours = lambda: [cell for cell in column(page, "summary", head) if cell]  # noqa: E731
    assert ours() == ["10.00 ± 0.00", "9.00 ± 0.00", "0.50 ± 0.00"]
    button(head).click()
    button(head).click()
    assert ours() == ["0.50 ± 0.00", "9.00 ± 0.00", "10.00 ± 0.00"], "numbers, not text"
    assert column(page, "summary", head)[-1] == "", "empty cells come last"
    assert page.locator("th[aria-sort]").count() == 1
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith(head)
    button(head).click()
    assert ours() == ["10.00 ± 0.00", "9.00 ± 0.00", "0.50 ± 0.00"] and column(page, "summary", head)[-1] == ""
    button("row").focus()
    page.keyboard.press("Enter")
    rows = column(page, "summary", "row")
    assert rows == sorted(rows) and rows[0] == "dense", "by the keyboard as well"
    button("segmentation IoU ↑").click()
    found = column(page, "summary", "segmentation IoU ↑")
    assert found == ["0.3467 ± 0.0153", "0.3345 ± 0.0073", "0.3100 ± 0.0100", "0.2933 ± 0.0153", "0.2233 ± 0.0094"]


def test_signs_thousands_and_missing_numbers_sort(tmp_path, open_page):
    values = ["-3.5", "+12.00 ± 1.00", "1,200", "", "9.50x", "0.5 to 0.9"]
    path = tmp_path / "page.html"
    body = web.table([("name", "value"), *((f"r{i}", value) for i, value in enumerate(values))])
    path.write_text(web.document("Page", "", [web.Section("all", "All", body)]))
    page = open_page(path)
    page.get_by_role("button", name="value").click()
    assert column(page, "all", "value") == ["1,200", "+12.00 ± 1.00", "9.50x", "0.5 to 0.9", "-3.5", ""]


def test_plots_have_descriptions_and_images_have_texts(run, open_page):
    page = open_page(run)
    described = page.locator("svg[role=img]").evaluate_all("found => found.map(one => one.getAttribute('aria-label'))")
    assert len(described) == page.locator("svg").count() and all(described)
    alts = page.locator("img").evaluate_all("found => found.map(one => one.alt)")
    assert len(alts) == 2 * (1 + 2 * len(TASKS)) and all(alts)
    assert page.locator("th").count() and page.locator("th:not(:has(button)):not(.samples th)").count() == 0
