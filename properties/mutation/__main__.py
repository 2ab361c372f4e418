"""Change one place of the package at a time with Cosmic Ray, and list the changes that no test notices.

    python -m properties.mutation [FILE ...]              all files of engine, models and testing, or the files named
    python -m properties.mutation --sample 300 --seed 0   test 300 mutants of these files, drawn at random
    python -m properties.mutation --table                 print the results so far as Markdown

The command works in a copy of the repository. After a stop, the same command resumes. ``build/mutation`` keeps the map
of tests and a session for each file: remove it when the code or the tests have changed. With ``--seconds`` only the
quickest tests of each mutant run. A later run without ``--seconds`` runs the remaining tests on the survivors that
``explained.csv`` does not explain. The exit status is 1 if such a survivor is left.
"""

import csv
import math
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path

import pytest

from memcnn import cli

try:
    from cosmic_ray.commands import init
    from cosmic_ray.mutating import _make_diff, use_mutation
    from cosmic_ray.plugins import get_operator
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult

    from properties.mutation.coverage_map import recorded
    from properties.mutation.operators import choose
except ModuleNotFoundError as error:
    print(
        f"properties.mutation needs {error.name}: pip install cosmic-ray coverage, or tox -e mutation", file=sys.stderr
    )
    sys.exit(cli.MISUSE)

from properties.mutation.selection import OPTIONS, failed_test, failing, in_a_fork, quickest, tests_of

ROOT = Path.cwd()
WORK = ROOT / "build" / "mutation"
MUTATED = ("memcnn/engine", "memcnn/models", "memcnn/testing")
TESTS = [
    str(path)
    for folder in ("engine", "laws", "models", "migration", "meta", "")
    for path in sorted(Path("properties", folder).glob("test_*.py"))
]
NOT_COPIED = {"build", "data", "results"}
"""Folders of the repository that hold results and images."""
ENVIRONMENT = {"MEMCNN_PROFILE": "ci", "MEMCNN_DATA": "", "OMP_NUM_THREADS": "1"}
EXPLAINED = Path(__file__).with_name("explained.csv")
WITHOUT_LINE = itemgetter(0, 2, 3)
UNFINISHED = "Only a part of its tests has met this mutant"


@cli.command("properties.mutation")
def main(arguments: Sequence[str] | None = None) -> int:
    """Test the mutants of the files on the command line, and return the exit status."""
    parser = cli.parser_from("properties.mutation", __doc__.splitlines()[0], whole=True)
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        default=[path for folder in MUTATED for path in sorted(Path(folder).rglob("*.py"))],
    )
    parser.add_argument(
        "--sample",
        type=cli.count,
        metavar="N",
        help="test N mutants of FILE ..., drawn at random, and skip the others (default: test all)",
    )
    parser.add_argument("--seed", type=cli.whole_number, default=0, help="seed of the sample (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print the results so far and run nothing")
    parser.add_argument(
        "--seconds",
        type=cli.seconds,
        default=math.inf,
        help="processor seconds that the tests of a mutant may take, the quickest first (default: no limit)",
    )
    given = parser.parse_args(arguments)
    if absent := [str(file) for file in given.files if not file.is_file()]:
        parser.error(
            f"argument files: got {', '.join(absent)}, wanted Python files of memcnn, seen from its repository"
        )
    choose()
    if not given.table:
        os.environ.update(ENVIRONMENT)
        WORK.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            copy_to(Path(folder))
            os.chdir(folder)
            record = recorded(TESTS, MUTATED, WORK / "tests")
            in_a_fork(lambda: pytest.main([*OPTIONS, "--collect-only", *TESTS]))  # writes the bytecode of the tests
            find_mutants(given.files, given.sample, given.seed)
            test(given.files, record, given.seconds, given.seed)
            os.chdir(ROOT)
    return table(given.files)


def find_mutants(files: list[Path], sample: int | None, seed: int) -> None:
    """Start a session for each file that has none. Mark all of their mutants but ``sample`` as skipped."""
    new = [file for file in files if not session(file).exists()]
    found: list[tuple[Path, str]] = []
    for file in new:
        with use_db(str(session(file))) as db:
            init([file], db, {})
            mutants = sorted(db.pending_work_items, key=lambda item: str(item.mutations))
            found += [(file, item.job_id) for item in mutants]
    drawn = set(found if sample is None else random.Random(seed).sample(found, min(sample, len(found))))
    for file in new:
        with use_db(str(session(file))) as db:
            for mutant in found:
                if mutant[0] == file and mutant not in drawn:
                    db.set_result(mutant[1], WorkResult(WorkerOutcome.SKIPPED))


def copy_to(folder: Path) -> None:
    """Copy the repository into ``folder``, without results, images and hidden folders other than .ci."""
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
        elif path.name not in NOT_COPIED and (path.name == ".ci" or not path.name.startswith(".")):
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__", "venv"))


def session(file: Path) -> Path:
    return WORK / f"{'.'.join(file.with_suffix('').parts)}.sqlite"


def test(files: list[Path], record: dict, seconds: float, seed: int) -> None:
    """Test every untested mutant, in random order, so that the results of an interrupted run are a fair sample."""
    waiting = []
    for file in files:
        with use_db(str(session(file))) as db:
            again = unfinished(db) if math.isinf(seconds) else []
            waiting += [(file, item) for item in (*db.pending_work_items, *again)]
    random.Random(seed).shuffle(waiting)
    kills: Counter[str | None] = Counter()
    for file, item in waiting:
        result = outcome(item, record, seconds, kills)
        with use_db(str(session(file))) as db:
            db.set_result(item.job_id, result)


def outcome(item: WorkItem, record: dict, seconds: float, kills: Counter) -> WorkResult:
    """Run the tests of one mutant until one fails, at most for ``seconds``. Count the test that fails in ``kills``."""
    (mutation,) = item.mutations
    operator = get_operator(mutation.operator_name)()
    with use_mutation(mutation.module_path, operator, mutation.occurrence) as (before, after):
        tests = tests_of(str(mutation.module_path), before, mutation.start_pos[0], record, kills)
        some = quickest(tests, record["seconds"], seconds)
        killed, output = failing(some, record["seconds"])
    if killed:
        kills[failed_test(output)] += 1
    return WorkResult(
        WorkerOutcome.NORMAL,
        output if killed or some == tests else UNFINISHED,
        TestOutcome.KILLED if killed else TestOutcome.SURVIVED,
        "\n".join(_make_diff(before, after, mutation.module_path)),
    )


def unfinished(db: WorkDB) -> list[WorkItem]:
    """Return the unexplained mutants that survived only some of their tests."""
    known = explained()
    return [
        item
        for item, result in db.completed_work_items
        if result.output == UNFINISHED and WITHOUT_LINE(change(item, result)) not in known
    ]


def table(files: list[Path]) -> int:
    """Print a table with a row for each folder, then the survivors. Return the exit status."""
    known = explained()
    print("| folder | files | mutants | killed | survived | of these explained |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    survivors, pending = [], 0
    for folder in sorted({file.parent for file in files}):
        done, waiting = results([file for file in files if file.parent == folder and session(file).exists()])
        alive = sorted(change(item, result) for item, result in done if not result.is_killed)
        touched = {item.mutations[0].module_path for item, _ in done}
        survivors += alive
        pending += waiting
        print(
            f"| {folder} | {len(touched)} | {len(done)}{f' of {len(done) + waiting}' if waiting else ''} | "
            f"{len(done) - len(alive)} | {len(alive)} | {sum(WITHOUT_LINE(found) in known for found in alive)} |"
        )
    for found in survivors:
        name, line, before, after = found
        print(
            f"\n* {name}:{line}  \n  `{before}`  \n  `{after}`  \n  {known.get(WITHOUT_LINE(found), 'NOT EXPLAINED')}"
        )
    return int(pending > 0 or any(WITHOUT_LINE(found) not in known for found in survivors))


def results(files: list[Path]) -> tuple[list[tuple[WorkItem, WorkResult]], int]:
    """Return the tested mutants of ``files`` with their results, and the number of untested ones."""
    done, waiting = [], 0
    for file in files:
        with use_db(str(session(file))) as db:
            done += [
                (item, result)
                for item, result in db.completed_work_items
                if result.worker_outcome != WorkerOutcome.SKIPPED
            ]
            waiting += len(db.pending_work_items)
    return done, waiting


def explained() -> dict[tuple[str, str, str], str]:
    """Return the explanations by change: file below memcnn, old text and new text."""
    with EXPLAINED.open(newline="") as lines:
        return {(row["file"], row["before"], row["after"]): row["explanation"] for row in csv.DictReader(lines)}


def change(item: WorkItem, result: WorkResult) -> tuple[str, int, str, str]:
    """Return the change as file below memcnn, line number, old text and new text."""
    (mutation,) = item.mutations
    file = mutation.module_path.relative_to("memcnn").as_posix()
    return file, mutation.start_pos[0], *(" ".join(_changed(result.diff, sign)) for sign in "-+")


def _changed(diff: str, sign: str) -> Iterator[str]:
    for line in diff.splitlines():
        if line.startswith(sign) and not line.startswith(sign * 3):
            yield line[1:].strip()


if __name__ == "__main__":
    sys.exit(main())
