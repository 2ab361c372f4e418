"""The page of ``bench.peers``, as Markdown."""

import pandas as pd

from bench.result import MIB, spread

MARKS = {"right": "right", "wrong": "**wrong**", "error": "error"}


def behaviour_table(result: dict) -> pd.DataFrame:
    """Return the outcomes, with a row for each behaviour and a column for each contender."""
    rows = pd.DataFrame(result["behaviours"])
    rows["cell"] = [cell(row) for row in result["behaviours"]]
    return _in_order(rows.pivot(index="behaviour", columns="contender", values="cell"), result["behaviours"])


def cell(row: dict) -> str:
    """Return the outcome of one behaviour with one contender as text."""
    if row["outcome"] == "wrong":
        return f"{MARKS['wrong']} ({row['detail'] if row['error'] is None else format(row['error'], '.0e')})"
    return MARKS[row["outcome"]]


def messages(result: dict) -> list[tuple[str, str, str]]:
    """Return (contender, behaviour, first line of the message) for each error."""
    return [
        (row["contender"], row["behaviour"], row["detail"]) for row in result["behaviours"] if row["outcome"] == "error"
    ]


def ratios(times: list[dict]) -> pd.DataFrame:
    """Return the times with the ratio of each time to that of ``plain`` in the same round."""
    frame = pd.DataFrame(times)
    plain = frame[frame.contender == "plain"].set_index(["blocks", "round"]).seconds
    frame["plain"] = plain.reindex(pd.MultiIndex.from_frame(frame[["blocks", "round"]])).array
    frame["ratio"] = frame.seconds / frame.plain
    return frame


def cost_table(result: dict) -> pd.DataFrame:
    """Return time relative to ``plain``, peak MiB, work and evaluations for each contender."""
    columns = {}
    for blocks, group in ratios(result["time"]).groupby("blocks"):
        columns[f"time / plain, {blocks} blocks"] = group.groupby("contender").ratio.agg(spread)
    memory = pd.DataFrame(result["memory"]).pivot(index="contender", columns="blocks", values="peak_bytes") / MIB
    for blocks in memory:
        columns[f"peak MiB, {blocks}"] = memory[blocks].map("{:.1f}".format, na_action="ignore")
    work = pd.DataFrame(result["work"]).set_index("contender").flops
    columns["convolution work / plain"] = (work / work["plain"]).map("{:.4f}".format)
    evaluations = pd.DataFrame(result["evaluations"]).set_index("contender")
    counts = [f"{row.forward:g} + {row.backward:g}" for row in evaluations.itertuples()]
    columns["evaluations of F (and of G), forward + backward"] = pd.Series(counts, evaluations.index)
    return _in_order(pd.DataFrame(columns).fillna(""), result["evaluations"], columns=False)


def python_table(result: dict) -> pd.DataFrame:
    """Return each contender's time on a tiny chain beyond 4/3 of ``plain``. It is spent in Python, not in kernels."""
    frame = ratios(result["tiny_time"])
    frame["own"] = (frame.seconds - 4 / 3 * frame.plain) / frame.blocks * 1e6
    groups = frame[frame.contender != "plain"].groupby("contender")
    checkpoint = frame[frame.contender == "checkpoint"].set_index("round").own
    frame["relative"] = frame.own / checkpoint.reindex(frame["round"]).array
    table = pd.DataFrame(
        {
            "step, us per block": frame.assign(us=frame.seconds / frame.blocks * 1e6)
            .groupby("contender")
            .us.agg(spread0),
            "time / plain": frame.groupby("contender").ratio.agg(spread),
            "above 4/3 of plain, us per block": groups.own.agg(spread0),
            "of checkpoint's": frame[frame.contender != "plain"].groupby("contender").relative.agg(spread),
        }
    )
    return _in_order(table.fillna(""), result["evaluations"], columns=False)


def spread0(values: pd.Series) -> str:
    """Return median and quartiles without decimals."""
    return spread(values, 0)


def render(result: dict) -> str:
    """Return the page as Markdown."""
    sections = [_head(result), _behaviour_section(result), _cost_section(result), _python_section(result)]
    if failures := result.get("failures"):  # older results have none
        lines = "\n".join(f"* {' '.join(failure['reason'].split())}" for failure in failures)
        sections.append(f"## Failed\n\nThese contenders failed, and were left out from there on:\n\n{lines}\n")
    return "\n".join(sections)


def _head(result: dict) -> str:
    software, device = result["software"], result["device"]
    load = ", ".join(f"{result[key][0]:.1f}" for key in ("load_before", "load_after"))
    changes = "" if result["clean"] in (True, None) else " with uncommitted changes"
    return f"""\
# Reversible blocks compared with their peers

{result["started"]}: {device["name"]}, {device["cores"]} cores, one thread for each contender. Load average of the \
last minute, with this run's own process: {load} before and after. torch {software["torch"]}, Python \
{software["python"]}, memcnn {software["memcnn"]}, commit {(result["commit"] or "unknown")[:12]}{changes}. Peers: \
{", ".join(result["peers"].values())}.

Rerun: `python -m bench.peers --install --out reports`; add `--quick` for a small case. `plain`, `checkpoint` \
(torch.utils.checkpoint for each block, use_reentrant=False), `ReversibleSequential` and `wrapped blocks` (in \
nn.Sequential) run from this tree. The peers run in an environment of their own, with the same torch.
"""


def _behaviour_section(result: dict) -> str:
    count = len({row["behaviour"] for row in result["behaviours"]})
    errors = "\n".join(f"* {contender}, {title}: `{text[:160]}`" for contender, title, text in messages(result))
    return f"""\
## Behaviour

{count} small programs run on a chain of two couplings with conv-BN-ReLU-conv-BN branches in float64. Their results \
are compared with plain autograd on the same weights. Right: the error is below 1e-12. Wrong: the cell shows the \
largest relative error, or a count. Where a program needs it, peers run with their own options for dropout and for \
two backward passes (upstream: preserve_rng_state, num_bwd_passes; RevTorch: fix_random_seed, \
eagerly_discard_variables).

{behaviour_table(result).to_markdown()}

Messages of the errors:

{errors}
"""


def _cost_section(result: dict) -> str:
    return f"""\
## Cost

One forward and backward pass in float32, input {_shape(result["case"])} in two streams, the same branches. Time: \
median [quartiles] of the ratio to plain within a round, n = {result["rounds"]} interleaved rounds. Peak: allocated \
bytes above parameters, input and output gradient; gradients of the parameters (0.14 MiB a block) and of the input \
are included. n = 1, because bytes do not vary.

{cost_table(result).to_markdown()}
"""


def _python_section(result: dict) -> str:
    tiny = result["tiny"]
    return f"""\
## Python time

A chain of {tiny["blocks"]} blocks on {_shape(tiny)}, where kernels take almost no time. Median [quartiles] of n = \
{3 * result["rounds"]} interleaved rounds; a round is the fastest of 5 steps.

{python_table(result).to_markdown()}
"""


def _shape(case: dict) -> str:
    return "{batch} x {channels} x {side} x {side}".format(**case)


def _in_order(table: pd.DataFrame, rows: list[dict], columns: bool = True) -> pd.DataFrame:
    """Put contenders and behaviours into the order in which they ran, and remove the axis names."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    if columns:
        table = table.loc[list(dict.fromkeys(row["behaviour"] for row in rows)), names]
    else:
        table = table.loc[[name for name in names if name in table.index]]
    return table.rename_axis(index=None, columns=None)
