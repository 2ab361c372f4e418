"""The runs in a folder, a line each."""

from pathlib import Path

from memcnn.training.files import HOLDER, holder
from memcnn.training.record import RunRecord, load_all
from memcnn.training.text import clean

DASH = "-"
HEAD = ("run", "iterations", "test acc. %", "train s", "status")


def list_runs(folder: Path) -> str:
    """Return a table of the runs directly in ``folder``, and the reasons why records cannot be read."""
    records, problems = load_all(folder)
    rows: dict[str, tuple[Path, RunRecord | None]] = {path.name: (path, record) for path, record in records}
    bad = {Path(problem.partition(": ")[0]).parent.name for problem in problems}
    begun = [path.parent for path in folder.glob(f"*/{HOLDER}") if path.parent.name not in {*rows, *bad}]
    rows |= {path.name: (path, None) for path in begun if holder(path)}
    if not rows and not problems:
        return f"no runs in {folder}"
    table = [HEAD, *(_row(path, record) for _, (path, record) in sorted(rows.items()))] if rows else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for name, *numbers, status in table:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells, status]))
    return "\n".join([*lines, *(f"left out: {clean(problem)}" for problem in problems)])


def _row(folder: Path, record: RunRecord | None) -> tuple[str, ...]:
    name = clean(folder.name)
    if record is None:
        return name, DASH, DASH, DASH, _status(folder, None)
    accuracy = DASH if record.test_accuracy is None else f"{record.test_accuracy:.2f}"
    done = f"{record.iterations}/{record.recipe.iterations}"
    return name, done, accuracy, f"{record.train_seconds:.0f}", f"{_status(folder, record)}{record.mark}"


def _status(folder: Path, record: RunRecord | None) -> str:
    """Return the status of a run from its record and, if the run has not ended, from its lock."""
    if record is not None and record.status == "complete":
        return "complete"
    by = holder(folder)
    if by is not None and by.is_alive:
        return f"running, {by}"
    if record is not None and record.reason is not None:
        return f"{record.status}: {clean(record.reason)}"
    if by is None:
        return "partial"
    return f"killed, {by}" if by.is_alive is False else f"running or killed, {by}"
