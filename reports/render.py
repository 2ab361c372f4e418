"""The report on accuracy, time and memory, as files and as terminal text."""

import os
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from memcnn.needs import INSTALL
from memcnn.training.files import write_by_rename
from memcnn.training.record import DATASETS
from reports import cells, notes, page, text
from reports.figures import CURVE
from reports.page import Figure, Section
from reports.report import Report

FULL_RUNS = "Full runs"
TITLE = "MemCNN: the published table, rebuilt"
UNITS = "Test accuracy in per cent; training time in hours, minutes and, for this project, seconds."


def write(report: Report, out: str | Path) -> list[Path]:
    """Write table.md, table.csv, table.tex, table.html, memory.csv and runs.csv.

    The CSV files hold the numbers to ten digits. A missing number is an empty field.

    Args:
        report: the tables and curves.
        out: the folder; it is created if it is missing.

    Returns:
        The paths of the files, in the order above.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"float_format": "%.10g", "lineterminator": "\n"}
    contents = {
        "table.md": markdown(report),
        "table.csv": report.results.to_csv(**numbers),
        "table.tex": latex(report),
        "table.html": page.html(page_of(report, folder)),
        "memory.csv": report.memory.to_csv(**numbers),
        "runs.csv": report.runs.to_csv(index=False, **numbers),
    }
    for name, content in contents.items():
        write_by_rename(folder / name, content.encode(errors="replace"))
    return [folder / name for name in contents]


def markdown(report: Report) -> str:
    """Return the whole report as Markdown for GitHub."""
    return page.markdown(page_of(report))


def html(report: Report) -> str:
    """Return the whole report as an HTML page that needs no other file."""
    return page.html(page_of(report))


def page_of(report: Report, folder: Path | None = None) -> page.Page:
    """Return the whole report as a page: tables with notes, curves, memory, lists of runs, and files left out.

    Args:
        report: the tables and curves.
        folder: where the page will be, for links to the files of the runs; None for a page without such links.
    """
    sections = [
        Section(cells.LABELS[dataset], note=UNITS, table=cells.results(report.results, dataset), wide=True)
        for dataset in DATASETS
    ]
    sections.append(Section("Accuracy and time", note=UNITS, cards=list(cells.cards(report.results).items())))
    remarks = [*notes.executions(report.runs), *notes.RESULTS]
    sections.append(Section("About these tables", notes=remarks, command=notes.command(report.results) or ""))
    if report.curves:
        figures = [Figure(title, svg) for title, svg in report.curves]
        sections.append(Section("Training curves", note=notes.CURVES, figures=figures))
    memory = cells.memory(report.memory)
    sections.append(Section("Memory of one training step", note="Batch 100, MiB.", table=memory, notes=notes.MEMORY))
    for title, explanation, frame in _run_lists(report):
        runs = report.runs[report.runs["full"] == (title == FULL_RUNS)]
        links = [] if folder is None else [_files(Path(run), folder) for run in runs["folder"]]
        sections.append(Section(title, note=explanation, table=frame, links=links))
    if report.problems:
        sections.append(Section("Left out", notes=report.problems))
    data = [(name, name) for name in ("table.csv", "memory.csv", "runs.csv")] if folder is not None else []
    summary = [*notes.answer(report.results), *notes.effort(report.results, report.steps)]
    return page.Page(TITLE, sections, summary=summary, origin=[_origin(report)], links=data)


def _files(run: Path, folder: Path) -> list[tuple[str, str]]:
    """Return (text, address) of a run's record and curve, if they exist; addresses are relative to ``folder``."""
    names = {"record": "record.json", "curve": CURVE}
    there = {text: run / name for text, name in names.items() if (run / name).is_file()}
    return [(text, quote(os.fsencode(os.path.relpath(path, folder)))) for text, path in there.items()]


def latex(report: Report) -> str:
    """Return table floats for ``\\input``; a comment at the top shows how. The lists of runs are in runs.csv."""
    parts = [
        f"% {TITLE}. {_origin(report)}\n% The runs behind these tables, and all others, are in runs.csv.\n"
        "% \\documentclass{article}\\usepackage{booktabs}\\usepackage[T1]{fontenc}\\usepackage[margin=2cm]{geometry}\n"
        "% \\begin{document}\\input{table}\\end{document}"
    ]
    for dataset in DATASETS:
        caption = (
            f"{cells.LABELS[dataset]}: test accuracy and training time, published and by this project. Mean ± sd over "
            "full runs of the published recipe; difference to the published PyTorch value in points. "
            + " ".join(notes.executions(report.runs[report.runs["dataset"] == dataset]))
        ).rstrip()
        parts.append(text.latex(cells.results(report.results, dataset), caption=caption, label=f"tab:{dataset}"))
    memory = cells.narrow_memory(report.memory)
    caption = (
        "Memory of one training step at batch 100. Published: allocated at the end of the forward pass. The other "
        "activation columns: the highest total during forward and backward, without parameters and gradients, in "
        "float32 as the sum of all tensors, and as the CUDA allocator gave it out."
    )
    parts.append(text.latex(memory, caption=caption, label="tab:memory"))
    return "\n\n".join(parts) + "\n"


def terminal(report: Report, *, width: int = 120) -> str:
    """Return the tables and the command for missing runs, in lines of at most ``width`` characters.

    The width is at least 76. The line with the command may be longer.
    """
    width = max(width, 76)
    parts = [_origin(report)]
    frames = {cells.LABELS[name]: cells.results(report.results, name) for name in DATASETS}
    short = any(text.terminal(frame, width) == text.terminal(frame, width, short=True) for frame in frames.values())
    wide = [(label, text.terminal(frame, width, short=short)) for label, frame in frames.items()]
    if all(len(line) <= width for _, table in wide for line in table.splitlines()):
        parts += [f"{label} (TensorFlow and PyTorch: published)\n{table}" for label, table in wide]
    else:
        parts += [f"{label}\n{text.terminal(card, width)}" for label, card in cells.cards(report.results).items()]
    memory = cells.narrow_memory(report.memory)
    parts.append(f"Memory of one training step at batch 100, MiB\n{text.terminal(memory, width)}")
    for title, explanation, frame in _run_lists(report):
        parts.append(f"{title}. {explanation}\n{text.run_list(frame, width)}")
    if report.problems:
        parts.append("Left out\n" + "\n".join(text.wrap(problem, width) for problem in report.problems))
    parts += notes.executions(report.runs)
    parts.append(notes.summary(report.results))
    if command := notes.command(report.results):
        parts.append(f"{text.wrap(page.MISSING, width)}\n  {INSTALL}\n  {command}")
    return "\n\n".join(text.wrap(part, width) if "\n" not in part else part for part in parts)


def _origin(report: Report) -> str:
    full = int(report.runs["full"].sum())
    read = f"full runs {full}, other runs {len(report.runs) - full}, files left out {len(report.problems)}"
    return f"{report.made}. Rendered by {report.software}, commit {report.commit}. Read: {read}."


def _run_lists(report: Report) -> list[tuple[str, str, pd.DataFrame]]:
    lists = [
        (FULL_RUNS, "The runs behind the tables of accuracy and time.", cells.full_runs(report.runs)),
        ("Other runs", "These runs do not enter the tables of accuracy and time.", cells.other_runs(report.runs)),
    ]
    return [(title, explanation, frame) for title, explanation, frame in lists if not frame.empty]
