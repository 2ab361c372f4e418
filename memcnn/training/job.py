"""The request for a run: a ``Job`` (model, data set, recipe, seed) and a ``Place`` (folders and device)."""

from dataclasses import dataclass
from pathlib import Path

from memcnn import data as cifar
from memcnn.models.resnet import MODELS
from memcnn.training.recipe import Recipe
from memcnn.training.record import run_name


class BadArgument(ValueError):
    """The request is impossible. The message names the possible values."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The folders and the device that runs use.

    Attributes:
        data: the folder of the CIFAR files, or the word "generated"; see ``memcnn.data.load``.
        unofficial_data: accept files with wrong checksums; the record says so.
        runs: the folder of all runs.
        device: "cpu", "cuda", "cuda:1" ...; None for a GPU if there is one, else the CPU.
        shared_by: how many runs, or processes of runs, share the device; the record says so.
        progress: show progress on standard error.
    """

    data: str | Path | None = None
    unofficial_data: bool = False
    runs: str | Path = "runs"
    device: str | None = None
    shared_by: int = 1
    progress: bool = True

    def data_kind(self, dataset: str) -> str:
        """Return "official", "generated" or "unofficial". The files are read only if unofficial ones are accepted."""
        where = cifar.whereabouts(self.data)
        if where == cifar.GENERATED:
            return cifar.GENERATED
        if not self.unofficial_data:
            return "official"
        official = cifar.files.find(dataset, Path(where), download=False, unofficial=True)[1]
        return "official" if official else "unofficial"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to train.

    Attributes:
        model: one of ``memcnn.models.resnet.MODELS``.
        dataset: "cifar10" or "cifar100".
        recipe: the hyper-parameters.
        seed: seed of weights, order and augmentation.
        disable: train RevNets with plain autograd, with all activations stored.
        fresh: move an existing run aside, and start over.
        allow_mixed: resume a run although it was executed differently so far; the record lists both executions.
    Raises:
        BadArgument: a value is not one of the choices.
    """

    model: str
    dataset: str
    recipe: Recipe
    seed: int = 0
    disable: bool = False
    fresh: bool = False
    allow_mixed: bool = False

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise BadArgument(f"unknown model {self.model!r}: choose one of {', '.join(MODELS)}")
        if self.dataset not in cifar.DATASETS:
            raise BadArgument(f"unknown data set {self.dataset!r}: choose one of {', '.join(cifar.DATASETS)}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise BadArgument(f"seed: got {self.seed!r}, wanted a whole number from 0 up to 2**63")

    def folder(self, place: Place, *, data_kind: str | None = None, processes: int = 1) -> Path:
        """Return the run's folder.

        Args:
            place: gives the folder of all runs.
            data_kind: "official", "generated" or "unofficial"; by default ``place.data_kind``.
            processes: how many processes share each batch.
        """
        name = run_name(
            self.model,
            self.dataset,
            self.recipe,
            self.seed,
            data=data_kind or place.data_kind(self.dataset),
            engine=not self.disable,
            processes=processes,
        )
        return Path(place.runs) / name
