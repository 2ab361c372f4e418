"""The identity of a run. A checkpoint or a record with another identity is never continued or overwritten."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, fields

from memcnn.training.record import RunRecord

WORDS = {
    "official_data": "official data",
    "data_checksums": "data checksums",
    "batch_norm_images": "images that BatchNorm sees",
}
"""Names of fields in messages, where they differ from the attribute. Old checkpoints use them as keys."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that decides what a run computes, up to rounding.

    Attributes:
        model: name of the network.
        dataset: name of the data set.
        seed: seed of weights, order and augmentation.
        recipe: the recipe as plain values (``Recipe.to_dict``).
        engine: False if a RevNet runs with plain autograd, with all activations stored.
        official_data: whether the images are the official ones.
        data_checksums: MD5 by file name; None before the images are loaded.
        batch_norm_images: how many images BatchNorm normalises together, if that is fewer than a batch; else None.
    """

    model: str | None
    dataset: str | None
    seed: int | None
    recipe: dict | None
    engine: bool | None
    official_data: bool | None
    data_checksums: dict[str, str] | None = None
    batch_norm_images: int | None = None

    def to_dict(self) -> dict:
        """Return plain values, as a checkpoint holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Identity":
        """Return the identity in a checkpoint; a value that is missing there is None."""
        return cls(**{
            field.name: values.get(field.name, values.get(WORDS.get(field.name, field.name))) for field in fields(cls)
        })  # fmt: skip

    @classmethod
    def of_record(cls, record: RunRecord) -> "Identity":
        """Return the identity of a recorded run; records do not say how BatchNorm shared a batch."""
        return cls(
            model=record.model,
            dataset=record.dataset,
            seed=record.seed,
            recipe=record.recipe.to_dict(),
            engine=record.engine,
            official_data=record.data["official"],
            data_checksums=record.data["checksums"],
        )

    def differences(self, wanted: "Identity", *, ignoring: Collection[str] = ()) -> list[str]:
        """Return a phrase for each field that differs from the wanted identity, except for the ignored ones.

        Args:
            wanted: the identity of the requested run.
            ignoring: names of fields that one of the two does not know.
        """
        names = sorted({field.name for field in fields(self)} - {*ignoring}, key=lambda name: WORDS.get(name, name))
        return [
            f"{WORDS.get(name, name)} is {getattr(self, name)!r} there, {getattr(wanted, name)!r} here"
            for name in names
            if getattr(self, name) != getattr(wanted, name)
        ]
