"""Benchmarks: the time and memory of reversible blocks, and the published table rebuilt from runs."""

import sys

if "-m" in sys.orig_argv:  # commands only: a worker may run where memcnn is another package, or is not installed
    from memcnn import needs

    needs.check()
