"""Says what became worse between two results of ``python -m bench``, and fails if it is too much.

    python bench/gate.py BASE NOW --fail peak_bytes:1% --fail median:10%
    python -m bench.gate bench/baselines/cpu.json NOW          bytes and evaluations, exactly
    python -m bench.gate bench/baselines/cpu.json NOW --save   let NOW be the base from now on

A metric is a number of the memory measurements (peak_bytes, activation_bytes, evaluations, ...), or of the time:
`ratio` to plain autograd within one run, or `median` seconds, which are compared where both ran on the same kind of
machine, and as `ratio` elsewhere. Time fails only if beyond its limit the quartiles of the two do not overlap.

Exit status: 0 nothing became worse, 1 something did, 2 misuse.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the packages are in the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pandas as pd  # noqa: E402

from bench.cases import SUBJECTS, Chain  # noqa: E402
from bench.networks import Network  # noqa: E402
from bench.summary import load, ratios  # noqa: E402

EXACT = ("peak_bytes", "activation_bytes", "evaluations", "branches")
TIME = ("median", "ratio")
DEFAULT = {"peak_bytes": 0.0, "activation_bytes": 0.0, "evaluations": 0.0}


class Misuse(ValueError):
    """The two results cannot be compared as asked."""


@dataclass(frozen=True)
class Change:
    """Of one metric of one case."""

    case: str
    metric: str
    base: float
    now: float
    limit: float
    apart: bool = True  # beyond the spread

    @property
    def growth(self) -> float:
        return self.now / self.base - 1 if self.base else float("inf") if self.now else 0.0

    @property
    def failed(self) -> bool:
        return self.apart and self.growth > self.limit

    def __str__(self) -> str:
        verdict = "FAIL" if self.failed else "ok  " if self.growth <= self.limit else "held"
        why = "" if self.apart or self.growth <= self.limit else ", within the spread"
        return (f"{verdict} {self.case}: {self.metric} {self.base:,.6g} -> {self.now:,.6g} "
                f"({100 * self.growth:+.2f} %, limit {100 * self.limit:+g} %{why})")


def gated() -> list:
    """The cases of the committed baselines: small, as bytes and evaluations do not depend on what is computed."""
    return [
        *(Chain("gate", subject, depth, 2, 8, 8) for depth in (4, 12) for subject in SUBJECTS),
        *(Network("revnet38", subject, 2, "gate") for subject in ("plain", "reversible")),
    ]


def compare(base: pd.DataFrame, now: pd.DataFrame, limits: dict[str, float]) -> list[Change]:
    """The changes of all cases that both have. Misuse if there are none for a metric."""
    changes = []
    for metric, limit in limits.items():
        found = (_of_time if metric in TIME else _of_bytes)(base, now, metric, limit)
        if not found:
            raise Misuse(f"no case of both results has {metric!r}: choose a metric of their measurements")
        changes += found
    return changes


def _of_bytes(base: pd.DataFrame, now: pd.DataFrame, metric: str, limit: float) -> list[Change]:
    if (kinds := [_kind(results)[0] for results in (base, now)]) and kinds[0] != kinds[1]:
        raise Misuse(f"BASE ran on {kinds[0]}, NOW on {kinds[1]}, whose bytes are not comparable")
    values = []
    for results in (base, now):
        rows = results[results.group == "memory"].set_index("case")
        if metric not in rows or not pd.api.types.is_numeric_dtype(rows[metric]):
            return []
        values.append(rows[metric].dropna())
    return [Change(case, metric, values[0][case], values[1][case], limit) for case in values[0].index
            if case in values[1]]


def _of_time(base: pd.DataFrame, now: pd.DataFrame, metric: str, limit: float) -> list[Change]:
    same = _kind(base) == _kind(now)
    column = "median_s" if metric == "median" and same else "ratio"
    groups = [dict(list(ratios(results).groupby("case")[column])) for results in (base, now)]
    changes = []
    for case in groups[0].keys() & groups[1].keys():
        old, new = (group[case].dropna() for group in groups)
        if len(old) and len(new) and not (column == "ratio" and case.endswith("-plain")):
            apart = new.quantile(0.25) > old.quantile(0.75)
            name = metric if same or metric == "ratio" else "median/plain"
            changes.append(Change(case, name, old.median(), new.median(), limit, apart))
    return sorted(changes, key=lambda change: change.case)


def _kind(results: pd.DataFrame) -> tuple:
    """The machine: absolute times of equal ones may be compared."""
    device = results.device.iloc[0]
    return device["type"], device["name"], device["threads"], device.get("clock"), results.software.iloc[0]["torch"]


def report(base: pd.DataFrame, now: pd.DataFrame, limits: dict[str, float]) -> tuple[str, bool]:
    """What became worse, what is missing and what is new, as text; and whether it fails."""
    changes = compare(base, now, limits)
    failed = [change for change in changes if change.failed]
    lines = [str(change) for change in changes if change.growth > change.limit]
    lines.append(f"{len(changes)} figures of {len({change.case for change in changes})} cases compared: "
                 f"{len(failed)} failed, {sum(change.growth < 0 for change in changes)} became less")
    groups = ["time" if metric in TIME else "memory" for metric in limits]
    there = [set(results[results.group.isin(groups)].case) for results in (base, now)]
    for word, cases in (("missing in NOW", there[0] - there[1]), ("new in NOW", there[1] - there[0])):
        if cases:
            lines.append(f"{word} ({len(cases)}): {', '.join(sorted(cases))}")
    if _kind(base)[-1] != _kind(now)[-1]:
        lines.append(f"note: BASE ran with torch {_kind(base)[-1]}, NOW with {_kind(now)[-1]}")
    return "\n".join(lines), bool(failed)


def exact_part(results: pd.DataFrame) -> str:
    """A baseline, as JSON: of the gate's cases, what any machine of the kind would measure to the byte."""
    rows = results[(results.group == "memory") & (results.series == "gate")]
    if rows.empty:
        raise Misuse("NOW holds no case of the gate: run python -m bench -k gate")
    kept = ("case", "comparison", "subject", "series", *EXACT)
    first = rows.iloc[0]
    machine = {"device": {"type": first.device["type"], "name": "any", "threads": None},
               "software": {"torch": first.software["torch"]}}
    lines = [json.dumps({"group": "memory", "stats": {"median": None, "rounds": 1},
                         "extra_info": {**{name: _plain(row[name]) for name in kept}, **machine}})
             for _, row in rows.iterrows()]
    return '{"benchmarks": [\n' + ",\n".join(lines) + "\n]}\n"


def _plain(value: object) -> object:
    return value if isinstance(value, str) else int(value)


def limit(text: str) -> tuple[str, float]:
    """("peak_bytes", 0.01) from "peak_bytes:1%"."""
    match = re.fullmatch(r"(\w+):(\d+(?:\.\d+)?)%", text)
    if not match:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted METRIC:PERCENT%, such as peak_bytes:1%")
    return match[1], float(match[2]) / 100


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", type=Path)
    parser.add_argument("now", metavar="NOW", type=Path)
    parser.add_argument("--fail", metavar="METRIC:PERCENT%", type=limit, action="append",
                        help="most that a metric may grow (default: " + ", ".join(DEFAULT) + " by nothing)")
    parser.add_argument("--save", action="store_true", help="write the exact part of NOW to BASE; compare nothing")
    options = parser.parse_args(arguments)
    try:
        now = load(options.now)
        if options.save:
            options.base.write_text(exact_part(now), "utf-8")
            return 0
        text, failed = report(load(options.base), now, dict(options.fail or DEFAULT))
    except (OSError, ValueError) as error:
        print(f"bench.gate: {error}", file=sys.stderr)
        return 2
    print(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
