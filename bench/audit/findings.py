"""Run the checks of `memcnn.testing` on layers of public packages, and write what they found.

    python -m bench.findings --install    put the packages into results/findings-venv, with the running torch, and check
    python -m bench.findings              check
    python -m bench.findings --render     the page alone, from the last results

Writes findings.json and findings.md. The findings in words, each with a program that needs only the package and torch,
are the files of bench/audit/packages/reproductions. They are run again, and a finding whose program no longer holds is
named.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from itertools import product
from pathlib import Path

import torch

from bench.audit.peer.chains import ROOT
from bench.audit.peers import install
from bench.worker import Failed, Worker
from memcnn.training.environment import git_state

VENV = ROOT / "results" / "findings-venv"
PACKAGES = (
    "FrEIA==0.2",
    "normflows==1.7.3",
    "nflows==0.14",
    "zuko==1.6.0",
    "iunets==0.1",
    "revtorch==0.2.4",
    "revlib==1.7.2",
    "flowtorch==0.8",
    "antsnormflows==1.0.0",
)
NEEDS = ("scipy==1.17.1", "UMNN==1.71")
"""What the packages import beside the running environment."""
FILES = ("freia", "normflows", "nflows", "zuko", "iunets", "engines", "flowtorch", "antsnormflows")
COLUMNS = ("inverse", "log_det", "gradients", "state", "wrapped")
SINGLE = 1.2e-4  # 1,000 roundings of float32
REPRODUCTIONS = Path(__file__).parent / "packages" / "reproductions"

INTRODUCTION = """\
Rerun: `python -m bench.findings --install --out reports`. Every layer is drawn with three seeds and inputs of scale
1, 0.1 and 4 in training mode, and once in eval mode, its parameters moved by 0.2 times a normal number where it
starts as the identity. inverse, log_det, gradients and state judge the layer itself (the gradient of a flow is that
of a loss in which its log-determinant takes part, compared with finite differences); wrapped compares gradients
with plain backpropagation when it runs in this project's InvertibleModuleWrapper. **FAIL** is what the checks say,
not yet a finding: several are conditioning or the edge of a domain. declared: its package says so. float32: right
to float32's precision also where all else is float64, as with matrices rounded when they were made. An empty cell:
nothing to check, or skipped."""

NO_FINDINGS = """\
* `ActNorm` of FrEIA and normflows (and normflows' `GlowBlock`): the first batch sets the parameters by operations
  that autograd records, which the recomputation of that step lacks, so that the wrapper refuses it. Run one batch
  through it before it is wrapped.
* normflows' `Residual`: the number of terms of its series is drawn from numpy's generator, which the checks do not
  seed, and the gradient leaves out the power iteration of its Lipschitz constant, by design.
* nflows' transforms with `using_cache=True` in eval mode: finite differences move a parameter, the cache does not
  follow; see the finding.
* RevTorch and RevLib: forward hooks, BatchNorm's counter and autocast in the recomputation, compared at length in
  peers.md; RevTorch's masks come from Python's generator, so that no two steps have the same gradient.
* iunets' `StandardAdditiveCoupling` calls `F.forward`, which leaves out the hooks of F.
* `InvertibleSigmoid` at inputs of scale 4 is saturated: its inverse is badly conditioned, as logit(y) at y = 1 must
  be."""


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [VENV / "bin" / "python", "-W", "ignore", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def layers(package: str) -> list[dict]:
    """Return a row for each layer and mode, see ``bench.audit.packages.worker``.

    A layer whose check ends the process, or takes longer than the limit, is named; a new process checks the next one.
    """
    rows, worker = [], start(package)
    try:
        names = worker.ask("layers")["layers"]
        for number, mode in product(range(len(names)), ("train", "eval")):
            try:
                rows.append(slim(worker.ask("check", number=number, mode=mode)))
            except Failed as failure:
                print(f"{names[number]} ({mode}) is left out: {failure}", file=sys.stderr)
                worker.end()
                worker = start(package)
    except Failed as failure:
        print(f"{package} is left out: {failure}", file=sys.stderr)
    finally:
        worker.end()
    return rows


def start(package: str) -> Worker:
    """Start a process that checks the layers of one package, in the environment where it is installed."""
    return Worker(
        package,
        "bench.audit.packages.worker:Package",
        package,
        root=ROOT,
        python=VENV / "bin" / "python",
        environment={"OMP_NUM_THREADS": "1"},
    )


def slim(row: dict) -> dict:
    """Return the row with all failures, and for each column one PASS if anything passed."""
    kept = ("verdict", "law", "claim", "error", "explanation", "scale")
    columns = {}
    for column, results in row.get("columns", {}).items():
        failures = [{key: result[key] for key in kept} for result in results if result["verdict"] == "FAIL"]
        passed = any(result["verdict"] == "PASS" for result in results)
        columns[column] = [*failures, *([{"verdict": "PASS"}] if passed else [])]
    return {**row, "columns": columns}


def reproductions() -> Iterator[dict]:
    for file in sorted(REPRODUCTIONS.glob("*.py")):
        done = run(str(file))
        yield {
            "file": file.name,
            "holds": done.returncode == 0,
            "output": done.stdout.strip(),
            "error": done.stderr.strip()[-300:],
        }


def verdict(row: dict, column: str) -> str:
    """Return the verdict on one layer in one mode: PASS, **FAIL**, declared, float32, or why there is none."""
    if "refused" in row:
        return "does not run"
    results = [result for result in row["columns"].get(column, []) if result["verdict"] != "SKIP"]
    failed = [result for result in results if result["verdict"] == "FAIL"]
    if not results:
        return ""
    if not failed:
        return "PASS"
    if column in row["known"] or f"{column} in {row['mode']}" in row["known"]:
        return "declared"
    errors = [float(result["error"]) for result in failed]
    exact = all("float64" in result["claim"] or result["law"] == "log_det" for result in failed)
    return "float32" if exact and all(error < SINGLE for error in errors) else "**FAIL**"


def cell(rows: list[dict], column: str) -> str:
    """Return one verdict, or one for each mode where they differ."""
    by_mode = {row["mode"]: verdict(row, column) for row in rows if verdict(row, column)}
    return (
        next(iter(by_mode.values()), "")
        if len(set(by_mode.values())) < 2
        else ", ".join(f"{found} ({mode})" for mode, found in by_mode.items())
    )


def reason(rows: list[dict]) -> str:
    """Return the first sentence of the first failure that is not declared."""
    for row in rows:
        if "refused" in row:
            return row["refused"].splitlines()[0][:160]
        for column in COLUMNS:
            if verdict(row, column) == "**FAIL**":
                first = next(r for r in row["columns"][column] if r["verdict"] == "FAIL")
                said = (first["explanation"] or first["claim"]).splitlines()[0][:160]
                return f"{column}, inputs x {first['scale']:g}: {said}"
    return ""


def table(rows: list[dict]) -> list[str]:
    lines = [f"| layer | {' | '.join(COLUMNS)} | what failed first |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for name in dict.fromkeys(row["layer"] for row in rows):
        of = [row for row in rows if row["layer"] == name]
        cells = [f"`{name}`", *(cell(of, column) for column in COLUMNS), reason(of).replace("|", "\\|")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def render(result: dict) -> str:
    rows = result["layers"]
    packages = list(dict.fromkeys((row["package"], row["version"]) for row in rows))
    count = len({(row["package"], row["layer"]) for row in rows})
    lines = [
        "# The checks on code that nobody here wrote",
        "",
        f"{result['started']}: torch {result['torch']}, commit {result['commit']}; "
        f"{count} layers of {', '.join(result['packages'])}.",
        "",
        INTRODUCTION,
        "",
        "## Findings",
        "",
        "Each was reproduced by hand with the package and torch alone; program and output stand below it.",
        "",
    ]
    for found in result["reproductions"]:
        code = (REPRODUCTIONS / found["file"]).read_text("utf-8")
        title, _, words = ast.get_docstring(ast.parse(code)).partition("\n")
        program = code.split('"""', 2)[2].strip()
        state = "" if found["holds"] else f"\n\n**Does not hold in this run**: {found['error'].splitlines()[-1:]}"
        lines += [
            f"### {title}",
            "",
            words.strip() + state,
            "",
            "```python",
            program,
            "```",
            "",
            "```",
            found["output"],
            "```",
            "",
        ]
    lines += ["## Failures that are no findings", "", NO_FINDINGS, "", "## Layers", ""]
    for package, version in packages:
        lines += [f"### {package} {version}", "", *table([row for row in rows if row["package"] == package]), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.findings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", action="store_true", help="first (re)make results/findings-venv")
    parser.add_argument("--render", action="store_true", help="write findings.md from the folder's findings.json")
    parser.add_argument("--out", type=Path, default=Path("results/findings"), help="folder of the files (%(default)s)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "findings.json"
    if arguments.install:
        install(VENV, (*PACKAGES, *NEEDS))
    if not arguments.render:
        with ThreadPoolExecutor(2) as pool:
            rows = [row for of_package in pool.map(layers, FILES) for row in of_package]
        result = {
            "started": datetime.now(timezone.utc).isoformat(timespec="minutes"),
            "torch": torch.__version__,
            "packages": PACKAGES,
            **git_state(),
            "layers": rows,
            "reproductions": list(reproductions()),
        }
        file.write_text(json.dumps(result) + "\n", "utf-8")
    (arguments.out / "findings.md").write_text(render(json.loads(file.read_text("utf-8"))), "utf-8")
    return 0
