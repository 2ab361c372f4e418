"""Benchmarks: the time and memory of reversible blocks, and the published table rebuilt from runs."""

import sys

if "-m" in sys.orig_argv:  # a command; a worker imports this package where memcnn is another one, or absent
    from memcnn import needs

    needs.check()
