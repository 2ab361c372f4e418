"""The worker side of ``bench.peers``: what runs in a contender's own process, with the contender's memcnn alone.

Only torch and the standard library are imported here, modules of this package by relative import, and what ``shared``
takes from this project's ``memcnn``.
"""
