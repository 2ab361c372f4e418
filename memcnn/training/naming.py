"""The name of a run's folder."""

from memcnn.training.recipe import Recipe
from memcnn.training.validation import check, is_count

DATA_SUFFIXES = {"official": "", "generated": "-generated", "unofficial": "-unofficial"}


def run_name(
    model: str,
    dataset: str,
    recipe: Recipe,
    seed: int,
    *,
    data: str = "official",
    engine: bool = True,
    processes: int = 1,
) -> str:
    """Return the name of a run's folder.

    Different runs have different folders. A run on the official files, with the reversible engine, in one process, is
    called "revnet38-cifar10-published-s0". Deviations are appended, as "-generated-plain-p2".

    Args:
        model: name of the network.
        dataset: name of the data set.
        recipe: the recipe; its name becomes part of the folder's.
        seed: seed of weights, order and augmentation.
        data: "official", "generated", or "unofficial" for files with other checksums (``memcnn.data.Data.kind``).
        engine: False if RevNets run with plain autograd, with all activations stored.
        processes: how many processes share each batch.

    Raises:
        ValueError: ``data`` is none of the three words, or ``processes`` is below 1.
    """
    check(data in DATA_SUFFIXES, "data", data, f"one of {', '.join(DATA_SUFFIXES)}")
    check(is_count(processes) and processes >= 1, "processes", processes, "a whole number of at least 1")
    suffix = DATA_SUFFIXES[data] + ("" if engine else "-plain") + ("" if processes == 1 else f"-p{processes}")
    return f"{model}-{dataset}-{recipe.name}-s{seed}{suffix}"
