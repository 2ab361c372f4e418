"""The report that ``python -m bench.memory`` prints."""

from bench.result import MIB

PARTS = {
    "parameter_bytes": "parameters",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimiser state",
    "buffer_bytes": "buffers",
    "batch_bytes": "batch",
    "activation_bytes": "activations",
}
PHASES = {"forward": "forward pass", "backward": "backward pass", "update": "update"}


def render(result: dict) -> str:
    """Return the report of one model as lines of text."""
    peak = result["peak"]
    how = f"{result['dtype']}{' autocast' if result['dtype'] != 'float32' else ''}, optimiser {result['optimizer']}"
    engine = ", reversible units off" if result["disable"] else ""
    lines = [
        f"{result['model']}, input {' x '.join(map(str, result['shape']))}, {how}{engine}",
        "One training step on CUDA at its peak, predicted",
        "",
        *(f"{name:<16}{mib(peak[key]):>14}" for key, name in PARTS.items()),
        f"{'peak':<16}{mib(peak['peak_bytes']):>14}  in the {PHASES[peak['phase']]}",
    ]
    if result["check"]:
        lines += ["", "The prediction's error, on steps that were computed"]
        lines += [_check(row) for row in result["check"]]
    if not any(row["device"] == "cuda" for row in result["check"]):
        why = "there is no CUDA device: run this where torch.cuda.is_available()" if result["check"] else "--no-check"
        lines += [f"on CUDA: not measured, {why}"]
    if result["budget_bytes"] is not None:
        budget, reserve = mib(result["budget_bytes"]), mib(result["reserve_bytes"])
        lines += ["", f"Within {budget}, {reserve} reserved for CUDA context, kernels' workspaces and fragmentation"]
        lines += [_fit(result["largest_batch"], "batch", "")]
        if result["largest_depth"] is not None:
            depth = result["largest_depth"]
            name = f" ({depth['layers'] * depth['largest'] + 2} layers)" if depth["largest"] else ""
            lines += [_fit(depth, "depth", f" units a stage{name} at batch {result['shape'][0]}")]
    return "\n".join(lines)


def _check(row: dict) -> str:
    """Return the line that compares prediction and measurement on one device."""
    error = (row["predicted_bytes"] - row["tensor_bytes"]) / row["tensor_bytes"]
    with_workspaces = (row["predicted_bytes"] - row["allocated_bytes"]) / row["allocated_bytes"]
    reserved = "" if row["reserved_bytes"] is None else f", {mib(row['reserved_bytes'])} reserved"
    return (
        f"on {row['device']}, batch {row['batch']}: predicted {mib(row['predicted_bytes'])}, measured "
        f"{mib(row['tensor_bytes'])} of tensors (error {error:+.3%}), {mib(row['allocated_bytes'])} by the allocator, "
        f"kernels' workspaces included ({with_workspaces:+.1%}){reserved}"
    )


def _fit(found: dict, what: str, of: str) -> str:
    """Return the line about the largest size that fits."""
    if found["largest"] == 0:
        return f"largest {what}: none, {mib(found['next_peak_bytes'])} for 1{of}"
    text = f"largest {what}: {found['largest']:,}{of}, {mib(found['peak_bytes'])}"
    if found["next_peak_bytes"] is None:
        return f"{text}; the search ended there, more may fit{': see --most-units' if what == 'depth' else ''}"
    return f"{text}; one more needs {mib(found['next_peak_bytes'])}"


def mib(size_bytes: int) -> str:
    """Format a number of bytes as MiB, or as KiB below one MiB."""
    return f"{size_bytes / MIB:,.1f} MiB" if size_bytes >= MIB else f"{size_bytes / 1024:,.1f} KiB"
