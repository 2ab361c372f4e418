"""Run the checks of ``memcnn.testing`` on the layers of public packages, and write a page with the results.

    python -m bench.findings --install    first install the packages into results/findings-venv, with the running torch
    python -m bench.findings              check all layers
    python -m bench.findings --render     write the page again, from the last results

The command writes findings.json and findings.md. Each finding is a file of bench/audit/packages/reproductions: a text,
and a program that needs only the package and torch. The command runs these programs, and the page marks a finding whose
program no longer shows it.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from itertools import product
from pathlib import Path

import torch

from bench.audit.peer.chains import ROOT
from bench.audit.peers import install, rendered
from bench.worker import Failed, Interpreter, Worker
from memcnn import cli
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
"""Further requirements of the packages that the running environment may lack."""
FILES = ("freia", "normflows", "nflows", "zuko", "iunets", "engines", "flowtorch", "antsnormflows")
COLUMNS = ("inverse", "log_det", "gradients", "state", "wrapped")
SINGLE = 1.2e-4
"""Largest error that counts as float32 precision: 1,000 machine epsilons."""
REPRODUCTIONS = Path(__file__).parent / "packages" / "reproductions"

INTRODUCTION = """\
Rerun: `python -m bench.findings --install --out reports`.

Every layer is checked with three seeds and inputs of scale 1, 0.1 and 4 in training mode, and with one seed in eval
mode. Normal noise times 0.2 is added to the parameters of layers that start as the identity.

* inverse, log_det, gradients and state check the layer itself. The gradient of a flow is the gradient of a loss that
  contains its log-determinant. It is compared with finite differences.
* wrapped runs the layer in this project's InvertibleModuleWrapper, and compares gradients with plain backpropagation.
* **FAIL** is the verdict of a check and not yet a finding: some failures come from a badly conditioned inverse or from
  inputs at the edge of a domain.
* declared: the package's documentation says that this does not hold.
* float32: in float64 the layer is only right to float32 precision, for example because it rounded a matrix when it
  was created.
* An empty cell: there was nothing to check, or the check was skipped."""

NO_FINDINGS = """\
* `ActNorm` of FrEIA and normflows (and normflows' `GlowBlock`): the first batch sets the parameters, and autograd
  records these operations. The recomputation of that step does not run them, so the wrapper refuses the layer. Run
  one batch through the layer before wrapping it.
* normflows' `Residual` draws the number of terms of its series from numpy's generator, which the checks do not seed.
  By design, its gradient leaves out the power iteration of the Lipschitz constant.
* nflows' transforms with `using_cache=True` in eval mode: finite differences change a parameter, but the cached
  weight stays the same. See the finding.
* RevTorch and RevLib: peers.md compares their forward hooks, BatchNorm counters and autocast in the recomputation.
  RevTorch draws its masks from Python's generator, so that no two steps have the same gradient.
* iunets' `StandardAdditiveCoupling` calls `F.forward`, which skips the hooks of F.
* `InvertibleSigmoid` saturates at inputs of scale 4. Its inverse, logit(y), is badly conditioned near y = 1."""


def run(*arguments: str) -> subprocess.CompletedProcess:
    """Run the Python of the packages' environment with these arguments."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [VENV / "bin" / "python", "-W", "ignore", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def check_layers(package: str) -> list[dict]:
    """Check all layers of a package, and return a row for each layer and mode (``bench.audit.packages.worker``).

    If a check ends the process or exceeds the time limit, print the layer's name and continue in a new process.
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
    """Start a worker that checks the layers of one package, in the environment in which the package is installed."""
    interpreter = Interpreter(ROOT, python=VENV / "bin" / "python", environment={"OMP_NUM_THREADS": "1"})
    return Worker(package, "bench.audit.packages.worker:Package", package, interpreter=interpreter)


def slim(row: dict) -> dict:
    """Return the row with all failures, but with at most one PASS in each column."""
    kept = ("verdict", "law", "claim", "error", "explanation", "scale")
    columns = {}
    for column, results in row.get("columns", {}).items():
        failures = [{key: result[key] for key in kept} for result in results if result["verdict"] == "FAIL"]
        passed = any(result["verdict"] == "PASS" for result in results)
        columns[column] = [*failures, *([{"verdict": "PASS"}] if passed else [])]
    return {**row, "columns": columns}


def reproductions() -> Iterator[dict]:
    """Run the program of each finding, and yield its output and whether the finding still holds."""
    for file in sorted(REPRODUCTIONS.glob("*.py")):
        done = run(str(file))
        yield {
            "file": file.name,
            "holds": done.returncode == 0,
            "output": done.stdout.strip(),
            "error": done.stderr.strip()[-300:],
        }


def verdict(row: dict, column: str) -> str:
    """Return the verdict on one layer in one mode: PASS, **FAIL**, declared, float32, "does not run", or nothing."""
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
    """Return the verdict on a layer; if the modes differ, the verdict for each mode."""
    by_mode = {row["mode"]: verdict(row, column) for row in rows if verdict(row, column)}
    if len(set(by_mode.values())) < 2:
        return next(iter(by_mode.values()), "")
    return ", ".join(f"{found} ({mode})" for mode, found in by_mode.items())


def reason(rows: list[dict]) -> str:
    """Return why the layer does not run, or the first line of its first failure; "" if there is neither."""
    for row in rows:
        if "refused" in row:
            return row["refused"].splitlines()[0][:160]
        for column in COLUMNS:
            if verdict(row, column) == "**FAIL**":
                first = next(r for r in row["columns"][column] if r["verdict"] == "FAIL")
                text = (first["explanation"] or first["claim"]).splitlines()[0][:160]
                return f"{column}, inputs x {first['scale']:g}: {text}"
    return ""


def table(rows: list[dict]) -> list[str]:
    """Return the lines of a Markdown table with a row for each layer."""
    lines = [f"| layer | {' | '.join(COLUMNS)} | what failed first |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for name in dict.fromkeys(row["layer"] for row in rows):
        modes = [row for row in rows if row["layer"] == name]
        cells = [f"`{name}`", *(cell(modes, column) for column in COLUMNS), reason(modes).replace("|", "\\|")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def render(result: dict) -> str:
    """Return the page as Markdown."""
    rows = result["layers"]
    packages = list(dict.fromkeys((row["package"], row["version"]) for row in rows))
    count = len({(row["package"], row["layer"]) for row in rows})
    lines = [
        "# The checks on other people's packages",
        "",
        f"{result['started']}: torch {result['torch']}, commit {result['commit']}; "
        f"{count} layers of {', '.join(result['packages'])}.",
        "",
        INTRODUCTION,
        "",
        "## Findings",
        "",
        "Each finding was reproduced by hand with only the package and torch. Its program and output follow its text.",
        "",
    ]
    for found in result["reproductions"]:
        lines += finding(found)
    lines += ["## Failures that are not findings", "", NO_FINDINGS, "", "## Layers", ""]
    for package, version in packages:
        lines += [f"### {package} {version}", "", *table([row for row in rows if row["package"] == package]), ""]
    return "\n".join(lines)


def finding(found: dict) -> list[str]:
    """Return the lines of one finding: title, text, program and output."""
    code = (REPRODUCTIONS / found["file"]).read_text("utf-8")
    title, _, text = ast.get_docstring(ast.parse(code)).partition("\n")
    program = code.split('"""', 2)[2].strip()
    error = found["error"].splitlines()[-1:]
    state = "" if found["holds"] else f"\n\n**This run does not show it**: {error[0] if error else 'no message'}"
    return [
        f"### {title}",
        "",
        text.strip() + state,
        "",
        *("```python", program, "```"),
        "",
        *("```", found["output"], "```"),
        "",
    ]


@cli.command("bench.findings")
def main(arguments: Sequence[str] | None = None) -> int:
    """Check the layers, write findings.json and findings.md; return 0."""
    parser = cli.parser_from("bench.findings", __doc__, whole=True)
    parser.add_argument("--install", action="store_true", help="first create results/findings-venv again")
    parser.add_argument("--render", action="store_true", help="only write findings.md from the folder's findings.json")
    parser.add_argument(
        "--out", type=cli.output_folder, default="results/findings", help="folder of the files (%(default)s)"
    )
    arguments = parser.parse_args(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "findings.json"
    if arguments.install:
        install(VENV, (*PACKAGES, *NEEDS))
    if not arguments.render:
        with ThreadPoolExecutor(2) as pool:
            rows = [row for of_package in pool.map(check_layers, FILES) for row in of_package]
        result = {
            "started": datetime.now(timezone.utc).isoformat(timespec="minutes"),
            "torch": torch.__version__,
            "packages": PACKAGES,
            **git_state(),
            "layers": rows,
            "reproductions": list(reproductions()),
        }
        file.write_text(json.dumps(result) + "\n", "utf-8")
    (arguments.out / "findings.md").write_text(rendered(file, render), "utf-8")
    return 0
