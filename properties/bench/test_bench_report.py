"""Tests of ``bench.report``: tables, figures and pages show the measurements with unit, n and spread."""

import re
from math import isfinite, isqrt

import pandas as pd
import pytest

from bench import figures, folders, report, result, summary
from bench.cases import SUBJECTS, Chain
from bench.networks import Network
from properties.support.results import MACHINE, row, written

MIB = 2**20
SLOPES = {
    "plain": 10,
    "checkpoint": 3,
    "checkpoint-sqrt": 3,
    "keep-every-2": 6,
    "keep-every-4": 4,
    "wrapped": 1,
    "reversible": 1,
}
DEPTHS = (1, 4, 9, 16, 64)


def peak(subject: str, depth: int) -> int:
    """Return a peak in MiB that lies exactly on the line to be fitted."""
    return 20 + SLOPES[subject] * depth + (4 * isqrt(depth) if subject == "checkpoint-sqrt" else 0)


def memory_row(case, mib: int, **more) -> dict:
    split = {"parameter_bytes": MIB, "gradient_bytes": MIB, "optimizer_bytes": MIB}
    return row(
        "memory",
        case,
        activation_bytes=mib * MIB,
        peak_bytes=(mib + 3) * MIB,
        allocated_bytes=(mib + 5) * MIB,
        evaluations=4 * getattr(case, "depth", 4),
        branches=2 * getattr(case, "depth", 4),
        **split,
        **more,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> pd.DataFrame:
    rows = []
    for subject in SUBJECTS:
        for depth in DEPTHS:
            case = Chain("depth", subject, depth, 4)
            rows.append(memory_row(case, peak(subject, depth) - 3))
            rows += [
                row("time", case, seconds * (1 if subject == "plain" else factor), repeat=repeat)
                for repeat, (seconds, factor) in enumerate([(1.0, 1.3), (2.0, 1.2), (4.0, 1.7)])
            ]
        rows += [memory_row(Chain("law", subject, depth, 2, 8, 8), 1) for depth in (50, 100)]
        rows.append(row("time", Chain("tiny", subject, 32, 2, 4, 4), 0.032, repeat=0))
        for series, sizes in (("batch", (1, 64)), ("width", (8, 256))):
            rows += [
                row(
                    "time",
                    Chain(series, subject, 8, size if series == "batch" else 4, size if series == "width" else 64, 16),
                    0.1,
                    repeat=0,
                )
                for size in sizes
            ]
    for network, subject in (("resnet32", "plain"), ("revnet38", "plain"), ("revnet38", "reversible")):
        case = Network(network, subject, 8)
        rows += [memory_row(case, 7), row("time", case, 0.5, repeat=0)]
    rows.append(row("time", Chain("mode", "plain", 4, 4, mode="bf16"), 0.25, repeat=0))
    return result.load(written(tmp_path_factory.mktemp("results") / "result.json", rows))


def table(results: pd.DataFrame, title: str) -> pd.DataFrame:
    return {name: frame.set_index("") for name, _, frame in summary.sections(results)}[title]


def test_a_ratio_is_taken_within_a_repeat_so_that_a_slowing_machine_does_not_distort_it(results):
    assert table(results, "Time against depth").loc["ReversibleSequential", 16] == "1.30 [1.25, 1.50]"
    assert table(results, "Contenders").loc["plain autograd", "time / plain, 16 blocks"] == "1.00 [1.00, 1.00]"


def test_the_table_of_contenders_has_memory_and_evaluations(results):
    row_of_plain = table(results, "Contenders").loc["plain autograd"]
    assert row_of_plain["peak activations, 16 blocks, MiB"] == 20 + 160 - 3
    assert row_of_plain["peak activations, 64 blocks, MiB"] == 20 + 640 - 3
    assert row_of_plain["evaluations of F and G per block and step"] == 4


def test_scratch_is_the_allocated_memory_beyond_the_tensors(results):
    assert set(table(results, "What the allocator gave beyond that, MiB").to_numpy().ravel()) == {2}


def test_the_largest_depth_is_that_of_the_line_through_the_measured_peaks(results):
    fits = summary.fit(result.series_of(results, "memory", "depth"))
    assert fits.misfit.max() < 1e-9
    straight = {subject: slope for subject, slope in SLOPES.items() if subject != "checkpoint-sqrt"}
    assert (fits.b / MIB).to_dict() == pytest.approx(straight)
    for budget_mib in (100, 1000, 1_000_000):
        deepest = summary.largest_depth(fits, budget_mib * MIB + 1)  # beyond rounding
        for subject, slope in straight.items():
            assert 20 + slope * deepest[subject] <= budget_mib < 20 + slope * (deepest[subject] + 1)
    assert (summary.largest_depth(fits, 19 * MIB) == 0).all()


def test_too_few_depths_get_no_line(results):
    few = result.series_of(results, "memory", "depth")
    assert summary.fit(few[few.depth <= 9]).empty


def test_the_table_of_networks_has_steps_and_images_per_second(results):
    networks = table(results, "Training step of the CIFAR networks")
    assert list(networks.index) == ["resnet32", "revnet38, engine off", "revnet38, engine on"]
    assert networks.loc["revnet38, engine on", ["steps/s", "images/s", "peak MiB"]].tolist() == [2, 16, 10]


def test_python_time_is_reported_per_block(results):
    assert table(results, "Tiny tensors").loc["plain autograd", "microseconds per block"] == "1000 [1000, 1000]"


@pytest.mark.parametrize(
    ("growth", "shown"), [(-3.1e-7, "−0.000031"), (0.123, "+12.3"), (0.0123, "+1.2"), (2.0, "+200.0")]
)
def test_a_change_has_a_sign_and_no_change_looks_like_zero(growth, shown):
    assert report.per_cent(growth) == shown


@pytest.mark.parametrize(("value", "text"), [(1.234, "1.23"), (12.34, "12.3"), (1234.0, "1234")])
def test_a_spread_without_given_digits_has_three_significant_ones(value, text):
    assert result.spread(pd.Series([value] * 3), None) == f"{text} [{text}, {text}]"


def test_the_environment_is_named(results):
    assert result.origin(results).startswith("a processor (cpu, 2 cores, 1 thread), load average 0.5 to 0.5")
    assert MACHINE["software"]["torch"] in result.origin(results)


def test_a_run_without_plain_has_times_and_no_ratio(tmp_path):
    rows = [row("time", Chain("tiny", "reversible", 32, 2, 4, 4), 0.032, repeat=0)]
    found = result.load(written(tmp_path / "narrow.json", rows))
    text = summary.render(found)
    assert re.search(r"1000 \[1000, 1000\] +\| +— \|", text) and "nan" not in text
    assert figures.draw(found) == {}


def test_every_figure_is_drawn_with_units_and_a_line_or_mark_for_each_contender(results):
    drawn = figures.draw(results)
    assert set(drawn) == set(figures.FIGURES)
    for name, (figure, _) in drawn.items():
        assert all(axes.get_xlabel() for axes in figure.axes), name
        assert figure.axes[0].get_ylabel() or name == "networks"
    legend = [text.get_text() for text in drawn["pareto"][0].legends[0].get_texts()]
    assert set(result.NAMES.values()) <= set(legend) and "Pareto front" in legend


def test_no_two_contenders_look_the_same_without_colour():
    looks = [look[1:] for look in figures.STYLES.values()]
    assert len({marker for marker, _ in looks}) == len(looks)


def test_the_pareto_front_leaves_out_a_contender_that_another_beats_in_time_and_memory(results):
    rows = pd.DataFrame(
        {"memory": [1, 2, 3, 4], "ratio": [1.4, 1.5, 1.2, 1.0]}, index=["reversible", "wrapped", "checkpoint", "plain"]
    )
    rows["ratio_low"], rows["ratio_high"] = rows.ratio - 0.1, rows.ratio + 0.1
    (front,) = [line for line in figures._front(rows, "").axes[0].lines if line.get_label() == "Pareto front"]
    assert list(front.get_xdata()) == [1, 3, 4]


def test_the_page_needs_no_other_file_and_escapes_what_was_measured(results, tmp_path):
    evil = "<script>alert(1)</script>"
    tainted = results.assign(device=[{**MACHINE["device"], "name": evil}] * len(results))
    written_files = report.write(tainted, tmp_path / "out", "python -m bench.report")
    page = (tmp_path / "out" / "page.html").read_text("utf-8")
    assert evil not in page and "&lt;script&gt;" in page
    assert page.count("<svg") == page.count("</svg>") == len(figures.FIGURES) + 1  # the peers'
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    names = re.findall(r' id="([^"]*)"', page)
    assert links and all(link.startswith("#") and link[1:] in names for link in links)
    assert len(names) == len(set(names))
    names = {path.relative_to(tmp_path / "out").as_posix() for path in written_files}
    assert {"summary.md", "page.html", "measurements.csv", "figures/pareto.svg", "figures/pareto.png"} <= names
    text = (tmp_path / "out" / "summary.md").read_text("utf-8")
    assert all((tmp_path / "out" / link).is_file() for link in re.findall(r"\]\((\S+)\)", text))
    assert len(pd.read_csv(tmp_path / "out" / "measurements.csv")) == len(results)


def test_committed_data_renders_the_same_page_again(results, tmp_path, monkeypatch):
    root, pages = tmp_path / "bench", tmp_path / "out"
    monkeypatch.setattr(folders, "MEASUREMENTS", root)
    monkeypatch.setattr(folders, "PAGES", pages)
    report.write(results, root / "cpu", "python -m bench.report")
    kinds = {path.suffix for path in root.rglob("*") if path.is_file()}
    assert kinds == {".md", ".svg", ".csv", ".json"}, "pages and PNGs are not committed"
    first = (pages / "cpu" / "page.html").read_text("utf-8")
    assert {path.stem for path in pages.rglob("*.png")} == {*figures.FIGURES, "pareto_of_peers"}
    assert report.main([str(root / "cpu")]) == 0
    command = f"python -m bench.report {root / 'cpu'}"
    again = (pages / "cpu" / "page.html").read_text("utf-8").replace(command, "python -m bench.report")
    assert again == first


def test_tables_have_four_significant_digits_and_all_digits_before_the_point(results):
    numbers = [
        value
        for _, _, table in summary.sections(results)
        for column in table
        for value in table[column]
        if isinstance(value, float) and isfinite(value)
    ]
    assert any(value != round(value) for value in numbers)
    for value in numbers:
        assert value == round(value) or float(f"{value:.4g}") == value


def test_whole_numbers_are_written_exactly(results):
    table = results.assign(peak_bytes=[123_456_789.0, None] + [0] * (len(results) - 2), median_s=1 / 3)
    text = report.measurements(table)
    assert "123456789" in text and "0.333333," in text and "1.23457e" not in text


def test_the_headline_says_where_reversibility_loses(results):
    lines = "\n".join(report.headline(results))
    assert "at 64 blocks activations take 657 MiB in plain autograd" in lines
    assert all(words in lines for words in ("Time at the largest depth", "The smallest batch", "Tiny tensors"))


@pytest.mark.parametrize("content", ["no JSON", "[1]", "{}", '{"benchmarks": []}', '{"benchmarks": [{"group": "x"}]}'])
def test_a_file_of_something_else_is_refused_by_name(content, tmp_path):
    (path := tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match="other.json holds no measurements"):
        result.load(path)


@pytest.mark.parametrize(
    ("bytes_now", "words"), [(6_420_990, "0 better"), (6_420_900, "1 better"), (6_421_100, "1 became worse")]
)
def test_rounded_bytes_of_committed_measurements_are_no_change_against_the_baseline(bytes_now, words):
    base = result.load(report.BASELINES / "cpu.json")
    now = base.copy()
    now.loc[now.case == "gate-revnet38-batch2-plain", "activation_bytes"] = bytes_now
    assert words in report.against_baseline(now).note
