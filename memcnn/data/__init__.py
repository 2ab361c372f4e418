"""CIFAR-10 and CIFAR-100 on the training device: files, images, and augmented batches.

* ``files`` finds the files, compares their checksums, downloads them, and reads their arrays.
* ``images`` holds both sets as uint8 tensors on one device, real ones or generated ones.
* ``batches`` gathers a batch there: scale, subtract the mean, pad, crop, flip.

Order, crops and flips of an epoch depend only on (seed, epoch), and are the same on every device. A resumed run
therefore sees the same batches as an uninterrupted one.
"""

from memcnn.data.batches import EpochPlan, augment, batch, epoch_plan, normalise, train_batch
from memcnn.data.files import DATASETS, BadData, DataNotFound
from memcnn.data.images import GENERATED, Data, generate, load, whereabouts
from memcnn.datasets import NUM_CLASSES

__all__ = [
    "DATASETS",
    "GENERATED",
    "NUM_CLASSES",
    "BadData",
    "Data",
    "DataNotFound",
    "EpochPlan",
    "augment",
    "batch",
    "epoch_plan",
    "generate",
    "load",
    "normalise",
    "train_batch",
    "whereabouts",
]
