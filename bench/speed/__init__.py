"""The command ``python -m bench.speed``: the time of a training step beside the floor that the device sets."""
