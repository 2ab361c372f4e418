"""Mutation testing of ``memcnn/engine`` and ``memcnn/models`` with Cosmic Ray: each change that no test notices is
explained or a hole.

    python -m properties.mutation [FILE ...]      all files of both, or some; goes on where it was stopped
    python -m properties.mutation --table         what is known so far, as Markdown

It works in a copy of the repository. ``build/mutation`` keeps the map of tests and a session for each file; remove it
after a change of the code or of the tests. Several processes can take different files. With ``--seconds`` a mutant
meets the quickest of its tests alone; a later run without it lets all tests meet those that survive and are not
explained. The exit status is 1 where a mutant survives that ``explained.csv`` does not explain.
"""

import argparse
import csv
import math
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

import pytest
from cosmic_ray.commands import init
from cosmic_ray.mutating import _make_diff, use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult

from properties.mutation.coverage_map import recorded
from properties.mutation.operators import choose
from properties.mutation.selection import OPTIONS, failed_test, failing, in_a_fork, quickest, tests_of

ROOT = Path.cwd()
WORK = ROOT / "build" / "mutation"
TESTS = [str(path) for folder in ("engine", "") for path in sorted(Path("properties", folder).glob("test_*.py"))]
COPIED = ["memcnn", "properties", "bench", "reports", "docs", "examples", "tox.ini", "setup.py", "README.md"]
COPIED += ["CONTRIBUTING.md"]
ENVIRONMENT = {"MEMCNN_PROFILE": "ci", "MEMCNN_DATA": "", "OMP_NUM_THREADS": "1"}
EXPLAINED = Path(__file__).with_name("explained.csv")
WITHOUT_LINE = itemgetter(0, 2, 3)
UNFINISHED = "Only a part of its tests has met this mutant"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        default=[path for folder in ("engine", "models") for path in sorted(Path("memcnn", folder).glob("*.py"))],
    )
    parser.add_argument("--table", action="store_true", help="print what is known so far and run nothing")
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="that the tests of a mutant may compute, the quickest first (default: all of them)",
    )
    arguments = parser.parse_args()
    choose()
    if not arguments.table:
        os.environ.update(ENVIRONMENT)
        WORK.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            copy_to(Path(folder))
            os.chdir(folder)
            record = recorded(TESTS, WORK / "tests")
            in_a_fork(lambda: pytest.main([*OPTIONS, "--collect-only", *TESTS]))  # compiles them, as mutants do not
            for file in arguments.files:
                with use_db(str(session(file))) as db:
                    if not db.num_work_items:
                        init([file], db, {})
                    test(db, record, arguments.seconds)
            os.chdir(ROOT)
    return table(arguments.files)


def copy_to(folder: Path) -> None:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)


def session(file: Path) -> Path:
    return WORK / f"{file.stem}.sqlite"


def test(db: WorkDB, record: dict, seconds: float) -> None:
    """Every mutant without a result; and, with no limit of seconds, those that only a part of their tests has met."""
    kills = Counter()
    for item in [*db.pending_work_items, *(unfinished(db) if math.isinf(seconds) else ())]:
        (mutation,) = item.mutations
        operator = get_operator(mutation.operator_name)()
        with use_mutation(mutation.module_path, operator, mutation.occurrence) as (before, after):
            tests = tests_of(str(mutation.module_path), before, mutation.start_pos[0], record, kills)
            some = quickest(tests, record["seconds"], seconds)
            killed, output = failing(some, record["seconds"])
        if killed:
            kills[failed_test(output)] += 1
        db.set_result(
            item.job_id,
            WorkResult(
                WorkerOutcome.NORMAL,
                output if killed or some == tests else UNFINISHED,
                TestOutcome.KILLED if killed else TestOutcome.SURVIVED,
                "\n".join(_make_diff(before, after, mutation.module_path)),
            ),
        )


def unfinished(db: WorkDB) -> list[WorkItem]:
    """Survivors of a part of their tests that are not explained."""
    known = explained()
    return [
        item
        for item, result in db.completed_work_items
        if result.output == UNFINISHED and WITHOUT_LINE(change(item, result)) not in known
    ]


def table(files: list[Path]) -> int:
    """Prints the table and the survivors; returns the exit status."""
    known = explained()
    print("| file | mutants | killed | survived | of these explained |\n| --- | ---: | ---: | ---: | ---: |")
    survivors, status = [], 0
    for file in files:
        if not session(file).exists():
            continue
        with use_db(str(session(file))) as db:
            done = [
                (item, result)
                for item, result in db.completed_work_items
                if result.worker_outcome != WorkerOutcome.SKIPPED
            ]
            pending = len(db.pending_work_items)
        alive = sorted(change(item, result) for item, result in done if not result.is_killed)
        survivors += alive
        words = [known.get(WITHOUT_LINE(found)) for found in alive]
        status |= None in words or pending > 0
        print(
            f"| {file.name} | {len(done)}{f' of {len(done) + pending}' if pending else ''} | "
            f"{len(done) - len(alive)} | {len(alive)} | {len(alive) - words.count(None)} |"
        )
    for found in survivors:
        name, line, before, after = found
        print(
            f"\n* {name}:{line}  \n  `{before}`  \n  `{after}`  \n  {known.get(WITHOUT_LINE(found), 'NOT EXPLAINED')}"
        )
    return status


def explained() -> dict[tuple[str, str, str], str]:
    """The explanation of a change: of a file's name, and what has become of which lines."""
    with EXPLAINED.open(newline="") as lines:
        return {(row["file"], row["before"], row["after"]): row["explanation"] for row in csv.DictReader(lines)}


def change(item: WorkItem, result: WorkResult) -> tuple[str, int, str, str]:
    """File name, line, and what that and the lines behind it were and have become."""
    (mutation,) = item.mutations
    return mutation.module_path.name, mutation.start_pos[0], *(" ".join(_changed(result.diff, sign)) for sign in "-+")


def _changed(diff: str, sign: str) -> Iterator[str]:
    for line in diff.splitlines():
        if line.startswith(sign) and not line.startswith(sign * 3):
            yield line[1:].strip()


if __name__ == "__main__":
    sys.exit(main())
