"""List all faults, and try one of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from properties.faults import data_files, disks, kills
from properties.faults.sandbox import Sandbox

Fault = Callable[[Sandbox, Random, int], Iterator[str]]
"""A generator that tries a fault a given number of times, and yields a text after each try that was survived.

Its docstring names the fault in the table; the last text describes the outcome there."""

FAULTS: tuple[Fault, ...] = (*kills.FAULTS, *disks.FAULTS, *data_files.FAULTS)


@dataclass(frozen=True)
class Outcome:
    """The numbers of survived and lost tries of a fault. The first lost try ends them; then ``text`` is its error."""

    fault: str
    tries: int
    survived: int
    lost: int
    text: str


def attempt(sandbox: Sandbox, fault: Fault, tries: int, seed: int) -> Outcome:
    """Try the fault at most ``tries`` times, and return the outcome."""
    texts, lost = [""], 0
    try:
        for text in fault(sandbox, Random(f"{fault.__name__} {seed}"), tries):
            texts.append(text)  # noqa: PERF402 - keeps the texts from before an exception
    except Exception as error:  # the other faults are tried all the same
        lost = 1
        texts.append(f"{type(error).__name__}: {error}")
    survived = len(texts) - 1 - lost
    return Outcome(fault.__doc__, survived + lost, survived, lost, texts[-1])
