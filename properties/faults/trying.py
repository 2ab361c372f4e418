"""All faults, and how one is tried."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from properties.faults import data_files, disks, kills
from properties.faults.ground import Ground

Fault = Callable[[Ground, Random, int], Iterator[str]]
"""A generator that tries a fault a number of times, and yields a text after each try that was survived.

The docstring names the fault in the table; the last text describes the outcome."""

FAULTS: tuple[Fault, ...] = (*kills.FAULTS, *disks.FAULTS, *data_files.FAULTS)


@dataclass(frozen=True)
class Outcome:
    """The number of survived and lost tries. The tries end with the first lost one, which ``text`` describes."""

    fault: str
    tries: int
    survived: int
    lost: int
    text: str


def attempt(ground: Ground, fault: Fault, tries: int, seed: int) -> Outcome:
    texts, lost = [""], 0
    try:
        for text in fault(ground, Random(f"{fault.__name__} {seed}"), tries):
            texts.append(text)  # noqa: PERF402 - a fault that raises later has kept those before
    except Exception as error:  # whatever ails one fault, the others are tried
        lost = 1
        texts.append(f"{type(error).__name__}: {error}")
    survived = len(texts) - 1 - lost
    return Outcome(fault.__doc__, survived + lost, survived, lost, texts[-1])
