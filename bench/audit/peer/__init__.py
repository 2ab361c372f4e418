"""The worker side of ``bench.peers``. It runs in a contender's own process, where ``memcnn`` may be the contender's.

The modules import only torch, the standard library, each other (by relative import), and the parts of this project's
``memcnn`` that ``shared`` provides.
"""
