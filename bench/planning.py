"""The cells of the table that fit into a time budget on this device, and the order in which they are trained.

The longest cell that can still finish starts first. When no cell can finish any more, the remaining time goes to one
cell, which a later command resumes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from tabulate import tabulate

from bench.placement import Cell, Settings
from memcnn.training import checkpoint
from memcnn.training.record import BadRecord
from memcnn.training.timing import Cost, cost_of_records, timed

MARGIN = 1.05
"""Expected time of a run, divided by the time that its timing predicts."""
LEAST_TRAINING_SECONDS = 5.0
"""A cell that cannot finish is started only if it can train for at least this long."""


@dataclass(frozen=True)
class Need:
    """The time that a cell still needs on this device.

    Attributes:
        cell: the cell.
        done: iterations that are already done.
        iterations: all iterations of the recipe.
        alone: the cost of the network when it has the device to itself.
        together: its cost when other cells share the device.
        alone_seconds: seconds until the cell is complete if it has the device to itself.
        together_seconds: seconds until the cell is complete if other cells share the device.
    """

    cell: Cell
    done: int
    iterations: int
    alone: Cost
    together: Cost
    alone_seconds: float
    together_seconds: float


class Needs:
    """Computes the time that cells need on a device. Each network is timed once, for its first cell.

    Args:
        settings: the settings that all cells share.
        device: the device that trains.
        at_once: number of cells that share the device.
        use_records: take the time from the record of an equal run if there is one.
    """

    def __init__(self, settings: Settings, device: torch.device, at_once: int, *, use_records: bool) -> None:
        self.settings, self.device, self.at_once, self.use_records = settings, device, at_once, use_records
        self._costs: dict[str, tuple[Cost, Cost]] = {}

    def knows(self, cell: Cell) -> bool:
        """Return True if the cell's network has been timed already."""
        return cell.model in self._costs

    def of(self, cell: Cell) -> Need:
        """Return the time that a cell needs."""
        recipe, done = self.settings.recipe, iterations_done(self.settings, cell)
        if cell.model not in self._costs:
            self._costs[cell.model] = self._cost(cell)
        alone, together = self._costs[cell.model]
        seconds = [MARGIN * cost.seconds(recipe, done) for cost in (alone, together)]
        return Need(cell, done, recipe.iterations, alone, together, *seconds)

    def _cost(self, cell: Cell) -> tuple[Cost, Cost]:
        job, execution = self.settings.job(cell), self.settings.execution
        if self.use_records:
            together = cost_of_records(job, execution, self.settings.place(shared_by=self.at_once), self.device)
            if together is not None:
                return together, together
        return timed(job, execution, self.settings.place(), self.device, at_once=self.at_once)


def iterations_done(settings: Settings, cell: Cell) -> int:
    """Return the iteration at which a cell would resume; 0 if it starts from the beginning."""
    try:
        record = settings.record_of(cell)
    except BadRecord:
        return 0
    folder = settings.folder_of(cell)
    return record.iterations if (folder / checkpoint.FILE_NAME).exists() else 0


def choose(needs: Iterable[Need], left_seconds: float) -> tuple[Need, bool] | None:
    """Return the cell to start in the remaining time, and True if it can finish; None if no start is worthwhile."""
    needs = list(needs)
    finishing = [need for need in needs if need.together_seconds <= left_seconds]
    if finishing:
        return max(finishing, key=lambda need: need.together_seconds), True
    worth = [need for need in needs if need.together.start_seconds + LEAST_TRAINING_SECONDS <= left_seconds]
    return (min(worth, key=lambda need: need.together_seconds), False) if worth else None


def cells_to_start(
    needs: Iterable[Need], left_seconds: Callable[[], float], say: Callable[[str], None]
) -> Iterator[Cell]:
    """Yield the cells to start, each when there is room for it. Report the cells that cannot finish or start.

    Args:
        needs: the time that each cell needs.
        left_seconds: returns the seconds that remain.
        say: prints a line.
    """
    waiting = list(needs)
    while waiting and (choice := choose(waiting, left_seconds())):
        need, finishes = choice
        waiting.remove(need)
        if not finishes:
            say(f"{need.cell}  needs {minutes(need.together_seconds)}, has {minutes(left_seconds())}: started; a "
                "later command resumes it")  # fmt: skip
        yield need.cell
        if not finishes:
            break
    for need in waiting:
        say(
            f"{need.cell}  needs {minutes(need.together_seconds)}, has {minutes(max(0.0, left_seconds()))}: not started"
        )


def simulate(needs: Iterable[Need], budget_seconds: float | None, lanes: int) -> tuple[dict[Cell, str], float]:
    """Simulate the training of cells within a budget.

    Args:
        needs: the time that each cell needs.
        budget_seconds: the budget; None for no limit.
        lanes: number of cells that train at the same time, on all devices.

    Returns:
        How much of each cell is trained ("whole", "part" or "no"), and the seconds until the last one ends.
    """
    waiting, fate = list(needs), {}
    free_at = [0.0] * lanes
    while waiting:
        now = min(free_at)
        left = float("inf") if budget_seconds is None else budget_seconds - now
        choice = choose(waiting, left)
        if choice is None:
            break
        need, finishes = choice
        waiting.remove(need)
        fate[need.cell] = "whole" if finishes else "part"
        free_at[free_at.index(now)] = now + (need.together_seconds if finishes else left)
        if not finishes:
            break
    fate |= {need.cell: "no" for need in waiting}
    return fate, max(free_at)


def table(needs: list[Need], budget_seconds: float | None, at_once: int, lanes: int) -> str:
    """Return the plan as text: a line for each cell, and the total.

    Args:
        needs: the time that each missing cell needs.
        budget_seconds: the budget; None for no limit.
        at_once: number of cells that share a device.
        lanes: number of cells that train at the same time, on all devices.
    """
    fate, end = simulate(needs, budget_seconds, lanes)
    together = [] if at_once == 1 else [f"ms/step, {at_once} together", f"min, {at_once} together"]
    head = ["cell", "done", "start s", "evaluation s", "ms/step alone", *together[:1], "min alone", *together[1:]]
    head += ["" if budget_seconds is None else f"in {minutes(budget_seconds)}"]
    rows = []
    for need in needs:
        beside = [f"{1000 * need.together.step_seconds:.2f}", f"{need.together_seconds / 60:.1f}"]
        beside = beside if at_once > 1 else []
        rows.append([
            str(need.cell), f"{100 * need.done / need.iterations:.0f} %", f"{need.alone.start_seconds:.0f}",
            f"{need.alone.evaluation_seconds:.1f}", f"{1000 * need.alone.step_seconds:.2f}", *beside[:1],
            f"{need.alone_seconds / 60:.1f}", *beside[1:], "" if budget_seconds is None else fate[need.cell],
        ])  # fmt: skip
    align = ["left", *["right"] * (len(head) - 1)]
    text = tabulate(rows, head, "plain", colalign=align, headersalign=align, disable_numparse=True)
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join([*lines, "", *_totals(needs, fate, end, budget_seconds, lanes)])


def _totals(
    needs: list[Need], fate: dict[Cell, str], end: float, budget_seconds: float | None, lanes: int
) -> list[str]:
    alone = sum(need.alone_seconds for need in needs)
    whole = simulate(needs, None, lanes)[1]
    lines = [f"{len(needs)} missing cells: {minutes(alone)} one after the other"]
    if lanes > 1:
        lines[0] += f", {minutes(whole)} with {lanes} at a time"
    if budget_seconds is not None:
        count = list(fate.values()).count("whole")
        lines.append(f"{count} of them fit into {minutes(budget_seconds)}, and take {minutes(end)}")
        if "part" in fate.values():
            part = next(cell for cell, what in fate.items() if what == "part")
            lines[-1] += f"; the rest of the time goes to {' '.join(str(part).split())}, which a later command resumes"
    return [f"{line}." for line in lines]


def minutes(seconds: float) -> str:
    """Return a time as text: "4.1 min", or "50 s" below two minutes."""
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"
