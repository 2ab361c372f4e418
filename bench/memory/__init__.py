"""The command ``python -m bench.memory``: the memory of a training step, predicted; see ``memcnn.memory``."""
