"""The data sets by name. ``memcnn.data`` reads their images; records need no more than the names."""

NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
