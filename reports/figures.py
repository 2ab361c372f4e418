"""Training curves as SVG, with one picture for each data set, in the text colour of the surrounding page."""

import io
import math
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from memcnn.models.resnet import MODELS
from reports.cells import LABELS

CURVE = "curve.csv"
LEAST_POINTS = 3
COLOURS = dict(zip(MODELS, ("#d4720b", "#c2413c", "#9a4fb0", "#2f8f5b", "#2a7fba", "#6b6fd0"), strict=True))
_INK = "#010203"  # replaced by `currentColor`, so that pictures follow the page's light or dark theme


def read_curves(runs: pd.DataFrame) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Read the epochs and test accuracies (%) in the curve.csv of each run.

    Returns:
        The curves by the run's folder, and a line for each file that cannot be used. Runs without the file, or with
        fewer than ``LEAST_POINTS`` evaluations, are in neither.
    """
    curves, problems = {}, []
    for folder in runs["folder"]:
        path = Path(folder) / CURVE
        if not path.is_file():
            continue
        try:
            curve = pd.read_csv(path)[["epoch", "test_accuracy"]].astype(float).dropna()
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{path}: {error}")
            continue
        if not (curve["test_accuracy"].between(0, 100) & curve["epoch"].between(0, math.inf, inclusive="left")).all():
            problems.append(f"{path}: an epoch below 0 or an accuracy outside 0 to 100")
        elif len(curve) >= LEAST_POINTS:
            curves[folder] = curve
    return curves, problems


def draw_curves(runs: pd.DataFrame, curves: dict[str, pd.DataFrame]) -> list[tuple[str, str]]:
    """Return (title, SVG) pairs: for each data set a picture of full runs and one of other runs, coloured by model."""
    pictures = []
    for dataset, of_dataset in runs.groupby("dataset", sort=False):
        for is_comparable, word in ((True, "full runs"), (False, "other runs")):
            shown = of_dataset[(of_dataset["full"] == is_comparable) & of_dataset["folder"].isin(curves)]
            if not shown.empty:
                title = f"{LABELS[dataset]}, {word}"
                pictures.append((title, _picture(title, shown, curves)))
    return pictures


def _picture(title: str, runs: pd.DataFrame, curves: dict[str, pd.DataFrame]) -> str:
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    style = {**ink, "svg.fonttype": "none", "svg.hashsalt": title, "font.size": 11}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        axes = figure.add_subplot()
        labelled = set()
        for run in runs.itertuples():
            curve = curves[run.folder]
            style = "-" if run.data == "official" and run.engine else "--"
            label = None if run.model in labelled else LABELS[run.model]
            labelled.add(run.model)
            marker = "." if len(curve) < 40 else ""
            colour = COLOURS[run.model]
            axes.plot(curve["epoch"], curve["test_accuracy"], style, marker=marker, color=colour, lw=1.3, label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel("test accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.15, color=_INK)
        axes.legend(frameon=False, fontsize=10, ncols=2)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue().replace(_INK, "currentColor")
