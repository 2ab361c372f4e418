"""Judge reports on drawn networks, and keep the largest errors that they contain."""

from hypothesis import assume, currently_in_test_context, target

from memcnn.testing import Report
from memcnn.testing.cases import Network

LARGEST: dict[tuple[str, str, str], tuple[float, float]] = {}
"""(law, kind of block, precision) -> the error closest to its limit, and that limit."""
UNDECIDED = "rounding may be as large", "not finite", "have no inverse"
"""Phrases that mark a result as undecidable for a network."""


def assert_holds(report: Report, network: Network, label: str) -> None:
    """Assert that no claim of the report fails, and reject the example if rounding left one undecided.

    Args:
        report: the report of a check of the network.
        network: the network; the table of largest errors names its kind of block and its precision.
        label: the name of the law in that table.
    """
    precision = "bfloat16 autocast" if network.autocast else str(network.dtype).removeprefix("torch.")
    for result in report:
        if not result.skipped and result.limit > 0:
            remember(
                (label, network.kind, "float64" if "float64" in result.claim else precision), result.error, result.limit
            )
            if currently_in_test_context() and result.error / result.limit < float("inf"):
                target(result.error / result.limit, label=f"{label}: {result.claim}")
    assert not report.failures, f"\n{report}"
    if currently_in_test_context():
        assume(not any(words in result.skipped for result in report for words in UNDECIDED))


def remember(key: tuple[str, str, str], error: float, limit: float) -> None:
    """Keep the error if no earlier error of this law, block and precision is closer to its limit."""
    before = LARGEST.get(key)
    if before is None or not error / limit <= before[0] / before[1]:
        LARGEST[key] = error, limit


def table() -> list[str]:
    """Return the lines of ``LARGEST``: a row for each law and kind of block, a column for each precision."""
    columns = sorted({precision for _, _, precision in LARGEST})
    rows = sorted({(law, kind) for law, kind, _ in LARGEST})

    def cell(law: str, kind: str, precision: str) -> str:
        if (law, kind, precision) not in LARGEST:
            return ""
        error, limit = LARGEST[law, kind, precision]
        return f"{error:.1e} / {limit:.1e} {error / limit:6.2%}"

    lines = [["law", "block", *columns], *([law, kind, *(cell(law, kind, c) for c in columns)] for law, kind in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
