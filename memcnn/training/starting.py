"""Check a job, and find the folder, the identity and the images of its run."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from memcnn import data as cifar
from memcnn.training import checkpoint, record
from memcnn.training.identity import Identity
from memcnn.training.job import BadArgument, Job
from memcnn.training.recipe import Recipe
from memcnn.training.record import RunRecord
from memcnn.training.setting import Setting


@dataclass(frozen=True)
class Start:
    """A job that was checked.

    Attributes:
        job: the job.
        folder: the run's folder.
        identity: everything that decides what the run computes.
        images: the images, on the device.
    """

    job: Job
    folder: Path
    identity: Identity
    images: cifar.Data


def check_job(job: Job, setting: Setting) -> Start | RunRecord:
    """Check a job, and load its images. If the run is complete already, return its record instead. Nothing is written.

    Raises:
        BadArgument: the recipe asks for more images than there are.
        BadCheckpoint: the folder holds the record of another run.
    """
    world, place = setting.world, setting.place
    images = None
    if place.unofficial_data:  # only reading the files shows whether they are official
        images = setting.images_of(job)
    kind = place.data_kind(job.dataset) if images is None else images.kind
    folder = job.folder(place, data_kind=kind, processes=world.size)
    shares = world.size > 1 and not setting.execution.sync_batch_norm
    identity = Identity(
        model=job.model,
        dataset=job.dataset,
        seed=job.seed,
        recipe=job.recipe.to_dict(),
        engine=not job.disable,
        official_data=kind == "official",
        data_checksums=None if images is None else images.checksums,
        batch_norm_images=job.recipe.batch_size // world.size if shares else None,
    )
    if not job.fresh and (done := world.on_rank_0(lambda: _finished(folder, identity))):
        if setting.shown:
            print(f"{folder} is already complete; --fresh trains it again from the start.", file=sys.stderr)
        return done
    images = images or setting.images_of(job)
    _check_sizes(job.recipe, images)
    return Start(job, folder, replace(identity, data_checksums=images.checksums), images)


def _finished(folder: Path, wanted: Identity) -> RunRecord | None:
    """Return the record in the folder if the run is complete; raise BadCheckpoint if it is another run's."""
    found = record.find(folder)
    if found is None or found.status != "complete":
        return None
    unknown = {"batch_norm_images"} | ({"data_checksums"} if wanted.data_checksums is None else set())
    checkpoint.refuse_other_run(folder / record.FILE_NAME, Identity.of_record(found), wanted, ignoring=unknown)
    return found


def _check_sizes(recipe: Recipe, data: cifar.Data) -> None:
    for name, wanted, there in (
        ("batch_size", recipe.batch_size, len(data.train_images)),
        ("test_images", recipe.test_images or 1, len(data.test_images)),
    ):
        if wanted > there:
            raise BadArgument(f"{name}: got {wanted}, but there are only {there} images")
