"""Training on CIFAR: the recipe, the loop, its checkpoints and its record."""
