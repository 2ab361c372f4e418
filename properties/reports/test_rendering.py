"""The report in every format: complete, well-formed, and safe against hostile text in records."""

import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import reports
from memcnn.needs import INSTALL
from memcnn.training.recipe import SMOKE
from memcnn.training.text import clean
from reports import cells, notes, readme, text
from reports.page import SORT
from reports.render import markdown

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b || c\n| d |",
    "\x1b[31mred\x1b[0m \x07 \r\n",
    "100% of $x_1^2$ & #1 {\\input{/etc/passwd}} ~ \\",
    "`code` *bold* _it_ [link](http://x) &amp;",
    "\ud800 lone surrogate \u202e reversed",
    "Ünïcödé 漢字 🚀",
    "",
)
hostile_text = st.sampled_from(HOSTILE) | st.text(max_size=30)


class Page(HTMLParser):
    """Parses a page like a browser: its tags, external links and the text of its cells."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.links, self.cells, self.ids, self.scripts = set(), [], [], [], []
        self.inside = self.in_script = False
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        names = dict(attrs)
        links = ("src", "href", "xlink:href", "action")
        self.links += [value for name, value in attrs if name in links or "url(" in value]
        self.ids += [value for name, value in attrs if name == "id"]
        assert not any(name.startswith("on") for name in names)
        self.in_script = tag == "script"
        self.scripts += [""] * self.in_script
        self.inside = tag in ("td", "th") or (self.inside and tag in ("a", "button"))
        if tag not in ("td", "th"):
            return
        self.cells.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag in ("a", "button")
        self.in_script = False

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data
        if self.in_script:
            self.scripts[-1] += data


@pytest.fixture(scope="session")
def report_with(tmp_path_factory, full, put):
    """Return a function that builds a report whose records have ``words`` in every field of free text."""

    def make(words, curve=None):
        root = tmp_path_factory.mktemp("runs")
        device = {"type": "cpu", "name": words, "count": 1, "threads": 2}
        software = {"memcnn": words, "python": words, "torch": words, "torchvision": words, "platform": words}
        put(root, full(device=device, software=software, commit=words, clean=None), curve)
        put(root, full(seed=1, device=device, status="failed", reason=words, iterations=9, test_iteration=5))
        put(root, full(recipe=SMOKE, iterations=12, test_iteration=12, device=device, software=software), curve)
        (root / "spoilt").mkdir()
        (root / "spoilt" / "record.json").write_bytes(words.encode(errors="replace"))
        return reports.build(root, root / "none")

    return make


@pytest.fixture(scope="session")
def rendered(report_with, tmp_path_factory):
    """Return a function that writes such a report, and returns the text of each file by name."""

    def make(words, curve=None):
        paths = reports.write(report_with(words, curve), tmp_path_factory.mktemp("out"))
        return {path.name: path.read_text("utf-8") for path in paths}

    return make


@pytest.mark.parametrize("words", HOSTILE)
def test_html_shows_hostile_text_and_runs_none_of_it(rendered, words):
    page = Page(rendered(words)["table.html"])
    assert not page.tags & {"img", "iframe", "link", "object", "base"}
    assert page.scripts == [f"\n{SORT}"], "the page's own script, and no other"
    assert clean(f"failed: {words}") in page.cells
    assert clean(f"{words} (2 threads)") in page.cells


@given(words=hostile_text)
def test_cleaned_text_is_one_printable_line_and_stays_as_it_is(words):
    cleaned = clean(words)
    assert cleaned.isprintable() and cleaned == cleaned.strip() == clean(cleaned)
    assert [letter for letter in words if letter.isprintable() and letter != " "] == list(cleaned.replace(" ", ""))


CURVE = "epoch,test_accuracy\n" + "".join(f"{epoch},{10 * epoch}\n" for epoch in range(1, 6))


def test_html_needs_no_other_file_and_repeats_no_id(rendered):
    page = Page(rendered("x", CURVE)["table.html"])
    assert "svg" in page.tags
    needed = [link for link in page.links if not link.endswith((".csv", "record.json"))]
    assert all(link.startswith(("#", "url(#")) for link in needed), needed
    assert all(":" not in link for link in page.links), "links lead to files beside the page"
    assert len(page.ids) == len(set(page.ids))


def points(svg):
    """Return the number of points of each drawn line of ResNet-32, without the legend's strokes."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*stroke: #d4720b', svg.replace("\n", " "))
    return [count for count in (len(re.findall("[ML]", path)) for path in paths) if count > 3]


def test_curves_are_drawn_apart_for_full_and_other_runs(report_with):
    pictures = report_with("x", CURVE).curves
    assert [title for title, _ in pictures] == ["CIFAR-10, full runs", "CIFAR-10, other runs"]
    assert [points(svg) for _, svg in pictures] == [[5], [5]]


def test_two_evaluations_make_no_picture(report_with):
    assert report_with("x", "epoch,test_accuracy\n1,10\n2,20\n").curves == []


def test_curves_take_the_ink_of_the_page(report_with):
    svg = report_with("x", CURVE).curves[0][1]
    assert "currentColor" in svg and "#010203" not in svg


def table_blocks(source):
    return re.findall(r"(?:^\|.*\n)+", source, flags=re.MULTILINE)


@given(words=hostile_text)
@example(words="<script>")
@example(words="a | b")
def test_markdown_tables_keep_their_shape_and_let_no_tag_through(report_with, words):
    source = markdown(report_with(words))
    assert "<" not in source
    for block in table_blocks(source):
        lines = block.splitlines()
        assert len({len(line) for line in lines}) == 1
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines}) == 1
        assert re.fullmatch(r"\|(:?-+:?\|)+", lines[1])


@given(words=hostile_text, width=st.integers(60, 200))
def test_terminal_lines_fit_and_hold_no_control_character(report_with, words, width):
    shown = reports.terminal(report_with(words), width=width)
    lines = [line for line in shown.splitlines() if "bench.reproduce_table" not in line]
    assert max(map(len, lines)) <= max(width, 76)
    assert all(letter.isprintable() for line in lines for letter in line)


def test_a_wide_terminal_shows_a_table_a_data_set_and_a_narrow_one_a_card_a_model(report_with):
    report = report_with("x")
    wide, narrow = reports.terminal(report, width=120), reports.terminal(report, width=80)
    assert "ResNet-32        92.74   2:04       92.86  1:51       92.70     1" in wide
    assert narrow.count("TensorFlow  ") == 6 and "TensorFlow         92.74, 2:04" in narrow


def unescaped(latex):
    """Return LaTeX without comments and escaped characters."""
    return re.sub(r"\\.", "", re.sub(r"(?m)^%.*$", "", latex))


@given(words=hostile_text | st.text(st.characters(codec="latin-1"), max_size=20))
def test_latex_escapes_every_special_character(words):
    words = "".join(letter for letter in words if letter.isprintable())
    left = unescaped(re.sub(r"\\text\w+\{\}|\$\\?[\w-]+\$", "", text.escape_latex(words)))
    assert not set(left) & set('&%$#_{}~^\\<>|"`')
    assert left.isascii() or all(ord(letter) < 256 for letter in left)


def test_latex_keeps_the_signs_of_this_report(rendered):
    source = rendered("x")["table.tex"]
    assert "92.70 & 1 & 1:51:00 & --- & $-$0.16 & not enough runs" in source and "?" not in source


def test_latex_tables_are_balanced_and_every_row_has_all_its_cells(rendered):
    for table in re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", rendered("x")["table.tex"], flags=re.DOTALL):
        columns = len(re.search(r"@\{\}([lr]+)@\{\}", table)[1])
        for row in re.findall(r"(.*) \\\\", table):
            spanned = sum(int(width) - 1 for width in re.findall(r"multicolumn\{(\d+)\}", row))
            assert len(re.findall(r"(?<!\\)&", row)) + spanned == columns - 1
        assert unescaped(table).count("{") == unescaped(table).count("}")


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex: install texlive-latex-recommended")
def test_latex_compiles_as_its_comment_says(rendered, tmp_path):
    source = rendered("x")["table.tex"]
    document = "".join(line[2:] for line in source.splitlines() if line.startswith(("% \\doc", "% \\begin")))
    (tmp_path / "table.tex").write_text(source)
    (tmp_path / "main.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout


def test_csv_holds_the_numbers_of_the_tables(report_with, tmp_path):
    report = report_with("x")
    _, results, _, _, memory, runs = reports.write(report, tmp_path)
    read = pd.read_csv(results).set_index(["dataset", "model"])
    pd.testing.assert_frame_equal(read, report.results, check_dtype=False)
    pd.testing.assert_frame_equal(pd.read_csv(memory).set_index("model"), report.memory, check_dtype=False)
    assert list(pd.read_csv(io.StringIO(runs.read_text()))["full"]) == [True, False, False]


def test_the_command_names_only_what_is_missing(full, tmp_path, put):
    for seed, accuracy in enumerate((92.8, 92.9, 93.0)):
        put(tmp_path, full(seed=seed, test_accuracy=accuracy))
    for model in ("resnet110", "resnet164", "revnet38", "revnet110", "revnet164"):
        for dataset in ("cifar10", "cifar100"):
            for seed in range(3):
                put(tmp_path, full(model=model, dataset=dataset, seed=seed, test_accuracy=50 + seed / 10))
    shown = reports.terminal(reports.build(tmp_path, tmp_path / "none"))
    assert (
        f"{INSTALL}\n  python -m bench.reproduce_table --train --models resnet32 --datasets cifar100 --seeds 0-2"
        in shown
    )
    assert "12 cells: 1 reproduced, 10 differ, 1 without a verdict, which needs at least 3 full runs." in shown


def test_the_command_asks_for_more_seeds_where_the_runs_scatter_too_much(full, tmp_path, put):
    for seed, accuracy in enumerate((90.0, 92.0, 95.0)):
        put(tmp_path, full(seed=seed, test_accuracy=accuracy))
    assert "--train --seeds 0-4" in reports.terminal(reports.build(tmp_path, tmp_path / "none"))


def test_numbers_are_missing_or_signed_with_a_true_minus():
    assert cells.number(float("nan"), 2) == "—"
    assert cells.number(-0.156, 2, sign=True) == "−0.16"
    assert cells.number(2452.8, 1) == "2,452.8"


def test_both_tables_of_a_terminal_have_the_same_column_names(full, tmp_path, put):
    put(tmp_path, full(test_accuracy=92.85, train_seconds=242.8))
    shown = reports.terminal(reports.build(tmp_path, tmp_path / "none"), width=120)
    heads = [line.split() for line in shown.splitlines() if line.startswith("model") and "verdict" in line]
    assert len(heads) == 2 and heads[0] == heads[1]
    assert "92.85     1  0:04:03" in shown


def test_every_format_names_device_and_execution_of_full_runs(full, tmp_path, put):
    device = {"type": "cuda", "name": "NVIDIA H200", "count": 1, "threads": 16}
    put(tmp_path, full(device=device, software={**full().software, "execution": "bf16, graph, compile"}))
    report = reports.build(tmp_path, tmp_path / "none")
    sentence = "ResNet-32 on CIFAR-10: 1 full run on NVIDIA H200 (execution: bf16, graph, compile)."
    assert sentence in " ".join(reports.terminal(report).split())
    for path in reports.write(report, tmp_path / "out"):
        if path.name in ("table.md", "table.html", "table.tex"):
            assert sentence in path.read_text()


def test_the_runs_of_a_cell_are_one_sentence_in_the_order_of_the_table(full, tmp_path, put):
    for seed, execution in enumerate(("bf16", "float32", "float32")):
        put(tmp_path, full(seed=seed, software={**full().software, "execution": execution}))
    put(tmp_path, full(model="revnet38", dataset="cifar10", train_seconds=300.0))
    put(tmp_path, full(dataset="cifar100"))
    lines = notes.executions(reports.build(tmp_path, tmp_path / "none").runs)
    device = f"{full().device['name']} (2 threads)"
    assert lines == [
        f"ResNet-32 on CIFAR-10: 3 full runs: 1 on {device} (execution: bf16), 2 on {device} (execution: float32).",
        f"RevNet-38 on CIFAR-10: 1 full run on {device} (execution: float32).",
        f"ResNet-32 on CIFAR-100: 1 full run on {device} (execution: float32).",
    ]


def test_the_readme_explains_shared_devices_only_if_a_run_shared_its_own(full, tmp_path, put):
    put(tmp_path, full())
    assert notes.SHARED not in readme.block(reports.build(tmp_path, tmp_path / "none"))
    assert notes.SHARED in readme.block(reports.build(reports.RECORDS, reports.RECORDS))


def test_the_readme_shows_the_table_of_the_committed_records():
    report = reports.build(reports.RECORDS, reports.RECORDS)
    content = readme.README.read_text("utf-8")
    assert readme.inserted(content, readme.block(report)) == content, "run: python -m reports.readme"


def test_the_readme_names_runs_and_a_verdict_only_where_there_is_one(full, tmp_path, put):
    for seed, accuracy in enumerate((92.8, 92.9, 93.0)):
        put(tmp_path, full(seed=seed, test_accuracy=accuracy))
    put(tmp_path, full(model="revnet38", train_seconds=300.0))
    rows = table_blocks(readme.block(reports.build(tmp_path, tmp_path / "none")) + "\n")[0].splitlines()
    found = [[cell.strip() for cell in row.strip("|").split("|")][3] for row in rows[2:]]
    assert found == ["92.90 ± 0.10, 1:51:00, n = 3: reproduced", "—", "—", "92.70, 0:05:00, n = 1", "—", "—"]


@pytest.mark.parametrize("content", ["", readme.BEGIN, f"{readme.END}{readme.BEGIN}", 2 * (readme.BEGIN + readme.END)])
def test_a_readme_without_one_place_for_the_table_is_refused(content):
    with pytest.raises(readme.NoPlace, match="once each and in this order"):
        readme.inserted(content, "table")
