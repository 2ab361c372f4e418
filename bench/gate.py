"""Report the metrics that became worse between two results of ``python -m bench``, and fail beyond a limit.

    python bench/gate.py BASE NOW --fail peak_bytes:1% --fail median:10%
    python -m bench.gate bench/baselines/cpu.json NOW          bytes and evaluations, exactly
    python -m bench.gate bench/baselines/cpu.json NOW --save   let NOW be the base from now on
    python -m bench.gate BASE NOW --allow-missing 'speed-*'    NOW measured fewer cases

A metric is a number of the memory measurements (peak_bytes, activation_bytes, evaluations, ...) or of the time: "ratio"
to plain autograd within one run, or "median" seconds. Seconds are compared only if both results come from the same kind
of machine; otherwise their ratios to plain autograd are compared. A time fails only if it is beyond its limit and the
quartiles of the two do not overlap. A case with a value in BASE and none in NOW fails, unless --allow-missing names it.

Exit status: 0 nothing became worse, 1 something did or is missing, 2 misuse.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the packages are in the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pandas as pd

from bench.cases import SUBJECTS, Chain
from bench.networks import Network
from bench.result import load, ratios
from memcnn import cli

EXACT = ("peak_bytes", "activation_bytes", "evaluations", "branches")
TIME = ("median", "ratio")
DEFAULT = {"peak_bytes": 0.0, "activation_bytes": 0.0, "evaluations": 0.0}


@dataclass(frozen=True)
class Change:
    """The change of one metric of one case.

    Attributes:
        case: the name of the case.
        metric: the name of the metric.
        base: the earlier value.
        now: the later value.
        limit: the most that the metric may grow, as a fraction.
        apart: True if the quartiles of the two do not overlap; exact metrics have no spread.
    """

    case: str
    metric: str
    base: float
    now: float
    limit: float
    apart: bool = True

    @property
    def growth(self) -> float:
        """The growth, as a fraction of the earlier value."""
        return self.now / self.base - 1 if self.base else float("inf") if self.now else 0.0

    @property
    def failed(self) -> bool:
        """True if the metric grew beyond its limit and beyond its spread."""
        return self.apart and self.growth > self.limit

    def __str__(self) -> str:
        verdict = "FAIL" if self.failed else "ok  " if self.growth <= self.limit else "held"
        why = "" if self.apart or self.growth <= self.limit else ", within the spread"
        return (
            f"{verdict} {self.case}: {self.metric} {self.base:,.6g} -> {self.now:,.6g} "
            f"({100 * self.growth:+.2f} %, limit {100 * self.limit:+g} %{why})"
        )


def gated() -> list:
    """Return the cases of the committed baselines. They are small: bytes and evaluations do not need long kernels."""
    return [
        *(Chain("gate", subject, depth, 2, 8, 8) for depth in (4, 12) for subject in SUBJECTS),
        *(Network("revnet38", subject, 2, "gate") for subject in ("plain", "reversible")),
    ]


def compare(base: pd.DataFrame, now: pd.DataFrame, limits: dict[str, float]) -> tuple[list[Change], set[str]]:
    """Return the changes of all cases that both results have, and the cases that only BASE has a value for.

    Raises:
        cli.Misuse: a result has no value of a metric at all.
    """
    changes, missing = [], set()
    for metric, limit in limits.items():
        old, new = (_of_time if metric in TIME else _of_bytes)(base, now, metric)
        if not old or not new:
            raise cli.Misuse(_lacking("NOW" if old else "BASE", now if old else base, metric))
        name = "median/plain" if metric == "median" and _kind(base) != _kind(now) else metric
        for case in sorted(old.keys() & new.keys()):
            apart = metric not in TIME or new[case].quantile(0.25) > old[case].quantile(0.75)
            changes.append(Change(case, name, old[case].median(), new[case].median(), limit, apart))
        missing |= old.keys() - new.keys()
    return changes, missing


def _lacking(name: str, results: pd.DataFrame, metric: str) -> str:
    """Return the message about a result without a value of a metric."""
    measured = [known for known in EXACT if known in results and results[known].notna().any()]
    if metric in TIME and (results.group == "memory").all():
        why = ": like the committed baselines it holds only bytes and evaluations, and no time"
        fix = "give as BASE a result that python -m bench measured on this machine"
    else:
        why, fix = "", "choose a metric that both measured"
    return f"{name} has no case with {metric!r}{why}; {fix}. It has: {', '.join(measured)}"


def _of_bytes(base: pd.DataFrame, now: pd.DataFrame, metric: str) -> list[dict[str, pd.Series]]:
    """Return, for BASE and for NOW, the values of each case that has this metric."""
    (before, *_), (after, *_) = _kind(base), _kind(now)
    if before != after:
        raise cli.Misuse(f"BASE ran on {before}, NOW on {after}: wanted one kind of device, because their bytes differ")
    values = []
    for results in (base, now):
        rows = results[results.group == "memory"]
        numeric = metric in rows and pd.api.types.is_numeric_dtype(rows[metric])
        values.append(dict(list(rows.dropna(subset=metric).groupby("case")[metric])) if numeric else {})
    return values


def _of_time(base: pd.DataFrame, now: pd.DataFrame, metric: str) -> list[dict[str, pd.Series]]:
    """Return, for BASE and for NOW, the repeats of each case that has this metric."""
    column = "median_s" if metric == "median" and _kind(base) == _kind(now) else "ratio"
    values = []
    for results in (base, now):
        rows = ratios(results).dropna(subset=column)
        if column == "ratio":  # the ratio of a plain case is always 1
            rows = rows[~rows.case.str.endswith("-plain")]
        values.append(dict(list(rows.groupby("case")[column])))
    return values


def _kind(results: pd.DataFrame) -> tuple:
    """Return a key of the kind of machine: seconds from machines of one kind may be compared."""
    device = results.device.iloc[0]
    return device["type"], device["name"], device["threads"], device.get("clock"), results.software.iloc[0]["torch"]


def report(
    base: pd.DataFrame, now: pd.DataFrame, limits: dict[str, float], allowed: Sequence[str] = ()
) -> tuple[str, bool]:
    """Return a text on worse metrics, missing and new cases, and True if the gate fails.

    Args:
        base: the earlier result.
        now: the later one.
        limits: most that each metric may grow, as a fraction.
        allowed: patterns of cases that may be missing in ``now``.
    """
    changes, missing = compare(base, now, limits)
    failed = [change for change in changes if change.failed]
    excused = {case for case in missing if any(fnmatchcase(case, pattern) for pattern in allowed)}
    lines = [str(change) for change in changes if change.growth > change.limit]
    lines += [
        f"FAIL {case}: missing in NOW; measure it, or pass --allow-missing {case!r}"
        for case in sorted(missing - excused)
    ]
    lines.append(
        f"{len(changes)} figures of {len({change.case for change in changes})} cases compared: "
        f"{len(failed)} failed, {sum(change.growth < 0 for change in changes)} became less"
    )
    groups = ["time" if metric in TIME else "memory" for metric in limits]
    there = [set(results[results.group.isin(groups)].case) for results in (base, now)]
    for word, cases in (("missing in NOW, as allowed", excused), ("new in NOW", there[1] - there[0])):
        if cases:
            lines.append(f"{word} ({len(cases)}): {', '.join(sorted(cases))}")
    lines += [
        f"note: --allow-missing {pattern!r} names no missing case"
        for pattern in allowed
        if not any(fnmatchcase(case, pattern) for case in missing)
    ]
    if "median" in limits and _kind(base) != _kind(now):
        machines = [" ".join(map(str, _kind(results))) for results in (base, now)]
        lines.append(
            f"note: BASE ran on {machines[0]}, NOW on {machines[1]}: seconds of different machines are not "
            "comparable, so median is compared as the ratio to plain autograd in the same run"
        )
    if _kind(base)[-1] != _kind(now)[-1]:
        lines.append(f"note: BASE ran with torch {_kind(base)[-1]}, NOW with {_kind(now)[-1]}")
    return "\n".join(lines), bool(failed or missing - excused)


def exact_part(results: pd.DataFrame) -> str:
    """Return a baseline as JSON: the values of the gate's cases that are the same on every machine of the kind."""
    rows = results[(results.group == "memory") & (results.series == "gate")]
    if rows.empty:
        raise cli.Misuse("NOW holds no case of the gate: run python -m bench -k gate")
    kept = ("case", "comparison", "subject", "series", *EXACT)
    first = rows.iloc[0]
    machine = {
        "device": {"type": first.device["type"], "name": "any", "threads": None},
        "software": {"torch": first.software["torch"]},
    }
    lines = [
        json.dumps(
            {
                "group": "memory",
                "stats": {"median": None, "rounds": 1},
                "extra_info": {**{name: _plain(row[name]) for name in kept}, **machine},
            }
        )
        for _, row in rows.iterrows()
    ]
    return '{"benchmarks": [\n' + ",\n".join(lines) + "\n]}\n"


def _plain(value: object) -> object:
    return value if isinstance(value, str) else int(value)


def limit(text: str) -> tuple[str, float]:
    """Return ("peak_bytes", 0.01) for "peak_bytes:1%"."""
    match = re.fullmatch(r"(\w+):(\d+(?:\.\d+)?)%", text)
    if not match:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted METRIC:PERCENT%, such as peak_bytes:1%")
    return match[1], float(match[2]) / 100


@cli.command("bench.gate")
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the metrics that became worse; return the exit status."""
    parser = cli.parser_from("bench.gate", __doc__, whole=True)
    parser.add_argument("base", metavar="BASE", type=Path)
    parser.add_argument("now", metavar="NOW", type=Path)
    parser.add_argument(
        "--fail",
        metavar="METRIC:PERCENT%",
        type=limit,
        action="append",
        help="most that a metric may grow (default: " + ", ".join(DEFAULT) + " by nothing)",
    )
    parser.add_argument(
        "--allow-missing",
        metavar="PATTERN",
        action="append",
        default=[],
        help="cases that NOW may lack: a name or a shell pattern, such as '*-plain'; repeatable",
    )
    parser.add_argument("--save", action="store_true", help="write the exact part of NOW to BASE; compare nothing")
    options = parser.parse_args(arguments)
    try:
        now = load(options.now)
        if options.save:
            options.base.write_text(exact_part(now), "utf-8")
            return 0
        text, failed = report(load(options.base), now, dict(options.fail or DEFAULT), options.allow_missing)
    except (OSError, ValueError) as error:
        print(f"bench.gate: {error}", file=sys.stderr)
        return 2
    print(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
