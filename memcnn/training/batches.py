"""The batches of a run, iteration by iteration."""

from memcnn import data as cifar
from memcnn.training.distributed import World
from memcnn.training.recipe import Recipe
from memcnn.training.turns import Lane


class Batches:
    """The part of each batch that this process trains on, as plans on its device.

    Attributes:
        per_epoch: number of batches of an epoch; the remaining images are left out.

    Args:
        images: number of training images.
        recipe: gives the size of a batch, the padding and the flips.
        seed: the run's seed.
        world: the processes that share each batch.
        lane: the run's CUDA stream, or the CPU.
    """

    def __init__(self, images: int, recipe: Recipe, *, seed: int, world: World, lane: Lane) -> None:
        self.images, self.recipe, self.seed, self.world, self.lane = images, recipe, seed, world, lane
        self.per_epoch = images // recipe.batch_size
        self._epoch: int | None = None
        self._plan: cifar.EpochPlan | None = None

    def __getitem__(self, iteration: int) -> cifar.EpochPlan:
        """Return this process's share of the batch of an iteration, counted from 0."""
        epoch, index = divmod(iteration, self.per_epoch)
        if self._plan is None or epoch != self._epoch:
            plan = cifar.epoch_plan(self.seed, epoch, self.images, pad=self.recipe.pad, flip=self.recipe.flip)
            self._plan, self._epoch = self.lane.copy(plan), epoch
        first, share = index * self.recipe.batch_size, self.world.share(self.recipe.batch_size)
        return self._plan.part(first + share.start, first + share.stop)
