"""Train the cells of the table on the devices of this machine, or on a Ray cluster.

A cell is one run in its own folder. Only one process at a time can train it. A cell resumes from its last checkpoint on
any machine, so the folder of runs must be on storage that all machines share.

Cells that share a GPU take turns in one process (``memcnn.training.together``). On a CPU each cell has its own process,
because processes use several cores. The processes come from ``multiprocessing`` and Ray and not from ``bench.worker``:
they exchange Python objects, the command waits for several of them at once, and they must stop cleanly.
"""

from bench.placement.cells import Cell, Lost, Outcome, Settings, in_turns, train_cell
from bench.placement.cluster import on_cluster
from bench.placement.devices import on_devices

__all__ = ["Cell", "Lost", "Outcome", "Settings", "in_turns", "on_cluster", "on_devices", "train_cell"]
