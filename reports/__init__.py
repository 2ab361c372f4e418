"""The published table rebuilt from run records, as Markdown, CSV, LaTeX, HTML and terminal text.

report = reports.build("runs")         # reads runs/ and reports/records/
reports.write(report, "reports/out")   # table.md, table.csv, table.tex, table.html, memory.csv, runs.csv
print(reports.terminal(report, width=100))
"""

from memcnn import needs  # isort: split

needs.check()  # before the first import of pandas

from reports.render import terminal, write
from reports.report import RECORDS, Report, build

__all__ = ["RECORDS", "Report", "build", "terminal", "write"]
