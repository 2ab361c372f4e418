"""Benchmarks: what reversible blocks cost in time and memory, and the published table rebuilt from runs."""
