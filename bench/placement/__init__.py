"""Where the cells of the table are trained: on the devices of this machine, or on a Ray cluster.

A cell is one run in its folder. Only one process at a time can train it, and it resumes from its last checkpoint
wherever it is taken up again: the folder of runs must be on storage that all machines share.

Several cells share a GPU as runs that take turns in one process, see ``memcnn.training.together``. On a CPU each cell
has a process of its own, because processes use several cores. These are processes of ``multiprocessing`` and Ray, not
of ``bench.worker``: they exchange Python objects, several of them are waited for at once, and they must stop cleanly.
"""

from bench.placement.cells import Cell, Lost, Outcome, Settings, in_turns, train_cell
from bench.placement.cluster import on_cluster
from bench.placement.devices import on_devices

__all__ = ["Cell", "Lost", "Outcome", "Settings", "in_turns", "on_cluster", "on_devices", "train_cell"]
