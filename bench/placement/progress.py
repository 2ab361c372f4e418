"""Progress bars for the cells that other processes train."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from bench.placement.cells import Cell, Settings
from memcnn.training.record import BadRecord

POLL_SECONDS = 1.0
"""Time between two updates of the bars."""


class Bars:
    """Shows a bar for every running cell, from its record; no bars unless standard error is a terminal."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.bars: dict[Cell, tqdm] = {}

    def show(self, cells: Sequence[Cell]) -> None:
        """Show the bars of these cells, and close all others."""
        if not sys.stderr.isatty():
            return
        for cell in [cell for cell in self.bars if cell not in cells]:
            self.bars.pop(cell).close()
        for cell in cells:
            try:
                record = self.settings.record_of(cell)
            except BadRecord:  # no record has been written yet
                continue
            if cell not in self.bars:
                self.bars[cell] = tqdm(total=self.settings.recipe.iterations, desc=str(cell), leave=False, unit="it")
            self.bars[cell].n = record.iterations
            if record.test_accuracy is not None:
                self.bars[cell].set_postfix_str(f"test {record.test_accuracy:.2f} %", refresh=False)
            self.bars[cell].refresh()


@contextmanager
def bars(settings: Settings) -> Iterator[Bars]:
    """Yield the bars, and remove them at the end."""
    view = Bars(settings)
    try:
        yield view
    finally:
        view.show([])
