"""Both pages in a headless Chromium: at three widths, light, dark and as printed; tables are read back from the DOM.

Needs a Chromium: ``MEMCNN_CHROMIUM`` names one that is not on the PATH.
"""

import html
import json
import os
import re
import shutil
import subprocess

import pandas as pd
import pytest

import reports
from bench import report as bench_report
from bench import result
from bench.cases import SUBJECTS, Chain
from properties.support.results import row, written
from reports import cells

NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
CHROMIUM = os.environ.get("MEMCNN_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: install it, or set MEMCNN_CHROMIUM to its path")

WIDTHS = {"wide": 1280, "tablet": 800, "phone": 390, "print": 1032}
"""Widths of the window in pixels; A4 across, less its margins, is 1032 wide."""
PROBE = """
const luminance = (text) => { const [r, g, b] = text.match(/[\\d.]+/g); return (0.3 * r + 0.6 * g + 0.1 * b) / 255; };
const look = (view) => {
  const page = view.contentDocument, style = view.contentWindow.getComputedStyle(page.body);
  const shown = [...page.querySelectorAll("table")].filter((table) => table.offsetParent !== null);
  const text = (table) => [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent.trim()));
  const found = {
    width: view.contentWindow.innerWidth,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    cut: [...shown.keys()].filter((i) => shown[i].parentNode.scrollWidth > shown[i].parentNode.clientWidth + 1),
    hidden: [...page.querySelectorAll("figure")].filter((figure) => figure.scrollWidth > figure.clientWidth + 1).length,
    scrolls: shown.every((table) => view.contentWindow.getComputedStyle(table.parentNode).overflowX === "auto"),
    paper: luminance(style.backgroundColor), ink: luminance(style.color),
    tables: shown.map(text),
    scale: Math.min(...[...page.querySelectorAll("svg")].map((svg) => svg.clientWidth / svg.viewBox.baseVal.width)),
  };
  const first = shown[0], button = first.querySelector("thead tr:last-child th:nth-child(3) button");
  if (button) {
    const orders = [0, 1].map(() => { button.click(); return text(first).slice(first.tHead.rows.length); });
    found.sorted = { column: button.closest("th").cellIndex, orders };
  }
  return found;
};
addEventListener("load", () => {
  const found = Object.fromEntries([...document.querySelectorAll("iframe")].map((view) => [view.id, look(view)]));
  document.querySelector("pre").textContent = JSON.stringify(found);
});
"""


def printed(page: str) -> str:
    """Return the page with its rules for print in force on the screen."""
    return page.replace("@media print", "@media all").replace("@media (prefers-color-scheme: dark)", "@media not all")


@pytest.fixture(scope="module")
def pages(full, put, tmp_path_factory) -> dict[str, str]:
    """Return the source of each page."""
    root = tmp_path_factory.mktemp("runs")
    curve = "epoch,test_accuracy\n" + "".join(f"{epoch},{10 * epoch}\n" for epoch in range(1, 6))
    for seed, accuracy in enumerate((92.8, 92.9, 93.0)):
        put(root, full(seed=seed, test_accuracy=accuracy), curve)
    put(root, full(model="revnet38", train_seconds=300.0), curve)
    generated = {"official": False, "checksums": {"generated": "00"}}
    for dataset in ("cifar10", "cifar100"):  # "other runs": a second and a third figure
        put(root, full(dataset=dataset, seed=7, data=generated), curve)
    reports.write(reports.build(root, root / "none"), root / "out")
    rows = []
    for subject in SUBJECTS:
        for depth in (1, 4, 8, 16):
            case = Chain("depth", subject, depth, 4)
            more = {"activation_bytes": depth << 20, "peak_bytes": depth << 21, "allocated_bytes": depth << 22}
            rows.append(row("memory", case, **more, evaluations=4, branches=2))
            rows += [
                row("time", case, 1.0 if subject == "plain" else 1.4, repeat=repeat, load=3.0) for repeat in (0, 1)
            ]
    results = result.load(written(root / "result.json", rows))
    bench_report.write(results, root / "bench", "python -m bench.report", beside=root)
    files = {"results": root / "out" / "table.html", "benchmark": root / "bench" / "page.html"}
    return {name: path.read_text("utf-8") for name, path in files.items()}


@pytest.fixture(scope="module", params=["light", "dark"])
def looks(request, pages, tmp_path_factory) -> tuple[str, dict]:
    """Return the colour scheme and what the browser shows of each page at each width."""
    folder = tmp_path_factory.mktemp("chromium")
    views = [
        f'<iframe id="{name} {how}" width="{width}" height="900" style="border: 0" srcdoc="'
        f'{html.escape(printed(page) if how == "print" else page)}"></iframe>'
        for name, page in pages.items()
        for how, width in WIDTHS.items()
    ]
    (folder / "all.html").write_text(
        f"<!doctype html><meta charset=utf-8><pre></pre>{''.join(views)}<script>{PROBE}</script>"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    command += ["--virtual-time-budget=5000", f"--user-data-dir={folder / 'profile'}"]
    command += ["--force-dark-mode"] * (request.param == "dark")
    done = subprocess.run(
        [*command, f"file://{folder / 'all.html'}"], capture_output=True, text=True, timeout=120, errors="replace"
    )
    found = re.search(r"<pre>(\{.*?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return request.param, json.loads(html.unescape(found[1]))


def test_no_page_is_wider_than_its_window(looks):
    _, found = looks
    assert len(found) == 2 * len(WIDTHS)
    for name, look in found.items():
        assert look["width"] == WIDTHS[name.split()[1]]
        assert look["overflow"] <= 0, name


def test_the_colours_follow_the_scheme_and_print_is_black_on_white(looks):
    scheme, found = looks
    for name, look in found.items():
        assert abs(look["paper"] - look["ink"]) > 0.6, name
        assert (look["paper"] < 0.5) == (scheme == "dark" and not name.endswith("print")), name


def test_print_cuts_no_table_and_elsewhere_wide_tables_scroll(looks):
    _, found = looks
    for name, look in found.items():
        assert look["scrolls"] or name.endswith("print"), name
        assert not look["cut"] or not name.endswith("print"), name
        assert 0 not in look["cut"] or name == "benchmark phone", f"{name}: the main table"
    assert found["results phone"]["cut"], "the lists of runs are wider than a phone"


def test_the_text_of_figures_can_be_read_at_every_width(looks):
    smallest_points = 8.5
    for name, look in looks[1].items():
        assert smallest_points * look["scale"] >= 9, name


def test_figures_are_seen_whole_except_on_a_phone(looks):
    for name, look in looks[1].items():
        assert not look["hidden"] or name.endswith("phone"), name


def test_the_main_table_reads_back_as_it_was_computed(looks, full):
    head, names, *body = looks[1]["results wide"]["tables"][0]
    assert head == ["", cells.TENSORFLOW, cells.PYTORCH, cells.OURS]
    shown = pd.DataFrame(body, columns=pd.Index([name.strip() for name in names]))
    assert list(shown["model"]) == [cells.LABELS[name] for name in cells.MODELS]
    assert body[0] == ["ResNet-32", "92.74", "2:04", "92.86", "1:51", "92.90 ± 0.10", "3", "1:51:00", "92.40–93.40",
                       "+0.04", "reproduced"]  # fmt: skip
    phone = looks[1]["results phone"]["tables"][0]
    assert phone[0] == ["", "CIFAR-10", "CIFAR-100"] and phone[3] == ["this project", "92.90 ± 0.10, 1:51:00", "—"]
    assert looks[1]["results print"]["tables"][0] == looks[1]["results wide"]["tables"][0]


def test_a_heading_sorts_its_table_up_and_down(looks):
    found = looks[1]["results wide"]["sorted"]
    up, down = ([row[found["column"]] for row in order] for order in found["orders"])
    times = [tuple(map(int, text.split(":"))) for text in up]
    assert times == sorted(times) and len(set(times)) == 6
    assert down == up[::-1]


def test_the_benchmark_page_warns_of_the_load_and_keeps_every_column(looks, pages):
    assert "load average was up to 3.0, and this run accounts for 1" in pages["benchmark"]
    assert all(len(row) == 4 for row in looks[1]["benchmark print"]["tables"][0])
    dates = [table for table in looks[1]["benchmark wide"]["tables"] if table[0][0].startswith("date")]
    assert len(dates) == 1 and dates[0][1][4] == "1.40 [1.40, 1.40]"
