"""Bars for the cells that other processes are training."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from bench.placement.cells import Cell, Settings
from memcnn.training.record import BadRecord

POLL_SECONDS = 1.0
"""The time between two looks at the cells that are being trained."""


class Bars:
    """A bar for every cell that is being trained, from its record; no bars if standard error is no terminal."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.bars: dict[Cell, tqdm] = {}

    def show(self, cells: Sequence[Cell]) -> None:
        """Show the bars of these cells, and no others."""
        if not sys.stderr.isatty():
            return
        for cell in [cell for cell in self.bars if cell not in cells]:
            self.bars.pop(cell).close()
        for cell in cells:
            try:
                record = self.settings.record_of(cell)
            except BadRecord:  # nothing written yet
                continue
            if cell not in self.bars:
                self.bars[cell] = tqdm(total=self.settings.recipe.iterations, desc=str(cell), leave=False, unit="it")
            self.bars[cell].n = record.iterations
            if record.test_accuracy is not None:
                self.bars[cell].set_postfix_str(f"test {record.test_accuracy:.2f} %", refresh=False)
            self.bars[cell].refresh()


@contextmanager
def bars(settings: Settings) -> Iterator[Bars]:
    """Yield the bars, and remove them in the end."""
    view = Bars(settings)
    try:
        yield view
    finally:
        view.show([])
