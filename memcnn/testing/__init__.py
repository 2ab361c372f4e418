"""Means to prove a reversible block right and to measure what it costs."""
