"""Tables of the benches: Markdown on standard output, and the rows as a CSV file where ``--csv`` names one."""

import argparse
from pathlib import Path

import pandas as pd

from memcnn import cli


def add_csv_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--csv FILE``."""
    parser.add_argument("--csv", type=cli.output_file, metavar="FILE", help="write the rows to this file, too")


def markdown(table: pd.DataFrame) -> str:
    """Return a table of text as Markdown."""
    return table.to_markdown(index=False, disable_numparse=True)


def publish(rows: pd.DataFrame, table: pd.DataFrame, csv: Path | None) -> None:
    """Write the rows to ``csv``, if a file is given, and print the table that shows them to readers."""
    if csv is not None:
        rows.to_csv(csv, index=False)
    print(markdown(table))
