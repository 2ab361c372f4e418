"""Print the requirements in a setup.py and its extra "harness", one a line: python requirements.py setup.py."""

import sys
from pathlib import Path

import setuptools

found: dict = {}
setuptools.setup = lambda **how: found.update(how)
setuptools.find_packages = lambda **how: []
path = Path(sys.argv[1])
source = path.read_text("utf-8")
# the version stands in a file that this layer lacks, so that a new version does not install everything again
start, end = source.index("VERSION ="), source.index("README =")
exec(compile(source[:start] + 'VERSION = "0"\n' + source[end:], str(path), "exec"), {"__file__": str(path.resolve())})
print(*found["install_requires"], *found["extras_require"]["harness"], "setuptools", sep="\n")
