"""The results of a run as files: its record and its curve."""

import csv
import io
from pathlib import Path

from memcnn import data as cifar
from memcnn.training.files import write_by_rename
from memcnn.training.identity import Identity
from memcnn.training.recipe import Recipe
from memcnn.training.record import RunRecord
from memcnn.training.state import State

COLUMNS = ("iteration", "epoch", "learning_rate", "train_loss", "test_loss", "test_accuracy", "train_seconds")


def record_of(
    state: State, identity: Identity, recipe: Recipe, data: cifar.Data, *, parameters: int, outcome: tuple
) -> RunRecord:
    """Return the record of a run.

    Args:
        state: the run's state; its last segment ends at the present iteration.
        identity: the run's identity.
        recipe: the run's recipe.
        data: the images.
        parameters: number of the network's parameters.
        outcome: status and reason, as the record names them.
    """
    here, last = state.segments[-1], state.rows[-1] if state.rows else {}
    status, reason = outcome
    return RunRecord(
        model=identity.model,  # type: ignore[arg-type]  # None only in old checkpoints
        dataset=identity.dataset,  # type: ignore[arg-type]  # None only in old checkpoints
        seed=identity.seed,  # type: ignore[arg-type]  # None only in old checkpoints
        engine=identity.engine,  # type: ignore[arg-type]  # None only in old checkpoints
        recipe=recipe,
        status=status,
        reason=reason,
        iterations=state.iteration,
        test_accuracy=last.get("test_accuracy"),
        test_loss=last.get("test_loss"),
        test_iteration=last.get("iteration"),
        train_seconds=state.train_seconds,
        interruptions=state.interruptions,
        parameters=parameters,
        **state.memory,
        device=here.device,
        commit=here.commit,
        clean=here.clean,
        software={**here.software, "execution": here.execution},
        data={"official": data.official, "checksums": data.checksums},
        segments=tuple(state.segments),
    )


def write_curve(folder: Path, rows: list[dict]) -> None:
    """Write curve.csv: a row for each evaluation."""
    text = io.StringIO()
    curve = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    curve.writeheader()
    curve.writerows(rows)
    write_by_rename(folder / "curve.csv", text.getvalue().encode())
