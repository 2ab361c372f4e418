"""Write the tables and the figure of docs/networks.md, and README's table of networks, from reports/networks.

    python -m bench.networks_page

reports/networks holds the results of these commands:

    python -m bench.reference --csv reports/networks/memory.csv            bytes against depth
    python -m bench.volumes --csv reports/networks/volumes.csv             the largest volume for a card
    python -m bench.budget --peers FOLDER --csv reports/networks/budget.csv
    python -m bench.budget --unequal --csv reports/networks/unequal.csv    blocks of unequal cost
    python -m bench.budget --prices --csv reports/networks/prices.csv      their estimated and measured time
    python -m bench.network_laws --csv reports/networks/laws.csv           the laws at the size of real use
    python -m bench.grids --csv reports/networks/grids.csv                 exact mode: error against the grid
    python -m bench.reference_peers FOLDER --csv reports/networks/peers.csv

A table stands between ``<!-- NAME -->`` and ``<!-- end -->``; the text outside is kept. If a file of measurements is
missing, the command prints its name, and leaves the table as it is.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bench import budget, grids, network_laws, reference_peers, volumes
from bench.cases import THREE
from bench.figures import STYLES, save
from bench.result import MIB
from bench.tables import markdown
from memcnn import cli
from memcnn.training.files import write_by_rename

ROOT = Path(__file__).resolve().parent.parent
DATA, PAGE, FIGURE = ROOT / "reports/networks", ROOT / "docs/networks.md", ROOT / "docs/pictures/networks.svg"
README = ROOT / "README.md"

SHOWN_DEPTH = 32

NETWORKS = {
    "irevnet": ("i-RevNet", "irevnet", "IRevNet", "1802.07088"),
    "irevnet-exact": ("i-RevNet, exact mode", "irevnet", "IRevNet", "1802.07088"),
    "vit": ("vision transformer", "reversible_vit", "ReversibleViT", "2302.04869"),
    "momentum": ("momentum network", "momentum", "MomentumNet", "2102.07870"),
    "glow": ("Glow", "glow", "Glow", "1807.03039"),
    "lm": ("language model", "reformer", "ReversibleLM", "2001.04451"),
    "unet-3d": ("3-D U-Net", "reversible_unet", "ReversibleUNet", "1906.06148"),
    "iunet-2d": ("invertible U-Net", "reversible_unet", "InvertibleUNet", "2005.05220"),
    "ode": ("ODE block", "ode", "ReversibleHeun", "2105.13493"),
}
"""For each key of ``bench.reference.MAKERS``: a name for readers, file, class and number on arXiv."""


def mib(size: float) -> str:
    """Return bytes as MiB with three digits."""
    return f"{size / MIB:.3g}"


def networks(rows: pd.DataFrame) -> pd.DataFrame:
    """Return parameters and bytes of each network at the depth that the page shows."""
    rows = rows[rows["depth"] == SHOWN_DEPTH]
    named = [NETWORKS[network] for network in rows["network"]]
    return pd.DataFrame(
        {
            "network": [f"[{title}](../memcnn/models/{file}.py), `{name}`" for title, file, name, _ in named],
            "paper": [f"arXiv:{number}" for *_, number in named],
            "parameters": [f"{count:,}" for count in rows["parameters"]],
            "activations stored, MiB": [mib(size) for size in rows["plain"]],
            "checkpoint per block, MiB": [mib(size) for size in rows["checkpoint"]],
            "reversible, MiB": [mib(size) for size in rows["reversible"]],
            "reversible / stored": [
                f"{100 * a / b:.1f} %" for a, b in zip(rows["reversible"], rows["plain"], strict=True)
            ],
        }
    )


def in_readme(rows: pd.DataFrame) -> pd.DataFrame:
    """Return README's table: the same numbers, a row for each network in its usual mode."""
    rows = rows[(rows["depth"] == SHOWN_DEPTH) & ~rows["network"].str.endswith("-exact")]
    named = [NETWORKS[network] for network in rows["network"]]
    return pd.DataFrame(
        {
            "network": [f"[{title}](memcnn/models/{file}.py)" for title, file, *_ in named],
            "parameters": [f"{count:,}" for count in rows["parameters"]],
            "peak, MiB": [mib(size) for size in rows["reversible"]],
            "stored, MiB": [mib(size) for size in rows["plain"]],
            "paper": [f"[{number}](https://arxiv.org/abs/{number})" for *_, number in named],
        }
    )


def depths(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the bytes of all depths."""
    return pd.DataFrame(
        {
            "network": [NETWORKS[network][0] for network in rows["network"]],
            "blocks": rows["depth"],
            **{f"{subject}, bytes": [f"{size:,}" for size in rows[subject]] for subject in THREE},
        }
    )


TABLES = {
    "networks": ("memory.csv", networks),
    "depths": ("memory.csv", depths),
    "volumes": ("volumes.csv", volumes.table),
    "budget": ("budget.csv", budget.table),
    "unequal": ("unequal.csv", budget.table),
    "prices": ("prices.csv", budget.prices_table),
    "laws": ("laws.csv", network_laws.table),
    "grids": ("grids.csv", grids.table),
    "peers": ("peers.csv", reference_peers.table),
}
"""For each table of the page: the file of its measurements, and the function that makes it from them."""


def figure(rows: pd.DataFrame) -> Figure:
    """Draw the bytes of each network against its depth, both logarithmic, a panel for each network."""
    names = [name for name in NETWORKS if name in set(rows["network"])]
    drawn = Figure(figsize=(8.6, 2.5 * -(-len(names) // 3) + 0.4), layout="constrained")
    panels = drawn.subplots(-(-len(names) // 3), 3, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        one = rows[rows["network"] == name].sort_values("depth")
        for subject in THREE:
            color, marker, line = STYLES[subject]
            axes.plot(one["depth"], one[subject] / MIB, color=color, marker=marker, linestyle=line, label=subject)
        axes.set_title(NETWORKS[name][0], fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted(rows["depth"].unique()))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    drawn.supxlabel("blocks", fontsize=10)
    drawn.supylabel("activations of a training step, MiB", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return drawn


def measured(name: str) -> pd.DataFrame:
    """Return the rows of a file of measurements in the order of ``NETWORKS``; none if there is no such file."""
    rows = pd.read_csv(DATA / name) if (DATA / name).exists() else pd.DataFrame()
    if "network" in rows and set(rows["network"]) <= set(NETWORKS):
        order = [*NETWORKS].index
        rows = rows.sort_values(["network", "depth"], key=lambda c: c.map(order) if c.name == "network" else c)
    return rows


def with_table(page: str, name: str, table: pd.DataFrame) -> str:
    """Return the page with the table between its marks.

    Raises:
        ValueError: the page does not have the marks exactly once.
    """
    text = f"<!-- {name} -->\n\n{markdown(table)}\n\n<!-- end -->"
    page, count = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _: text, page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page has the marks of the table {name!r} {count} times; wanted once: "
                         f"<!-- {name} --> and <!-- end -->")  # fmt: skip
    return page


@cli.command("bench.networks_page")
def main(arguments: Sequence[str] | None = None) -> int:
    """Write page, figure and README's table; return 0, or 1 if a table was not measured."""
    cli.parser_from("bench.networks_page", __doc__, whole=True).parse_args(arguments)
    page, status = PAGE.read_text(), 0
    for name, (file, make) in TABLES.items():
        rows = measured(file)
        if rows.empty:
            print(f"bench.networks_page: the table {name} stays as it is: no {DATA / file}", file=sys.stderr)
            status = 1
            continue
        page = with_table(page, name, make(rows))
    write_by_rename(PAGE, page.encode())
    rows = measured("memory.csv")
    if not rows.empty:
        save(figure(rows), FIGURE)
        write_by_rename(README, with_table(README.read_text(), "networks", in_readme(rows)).encode())
    return status


if __name__ == "__main__":
    sys.exit(main())
