"""Find layers that make a faulty training step right if they are switched off, which narrows down the cause."""

from collections.abc import Callable
from dataclasses import replace

from memcnn.testing.laws.subject import Subject, sample_by_sample, without_dropout

SWITCHES = (
    (without_dropout, "with dropout off it is right"),
    (sample_by_sample, "with batch normalisation in eval mode it is right"),
)


def but_right_without(subject: Subject, is_right: Callable[[Subject], bool]) -> str:
    """Explain what must be switched off for the fault to go away; "" if none of ``SWITCHES`` helps."""
    for switch_off, words in SWITCHES:
        module = subject.fresh()
        switch_off(module)
        modes = zip(module.modules(), subject.module.modules(), strict=True)
        if any(a.training != b.training for a, b in modes) and is_right(replace(subject, module=module)):
            return f"; {words}"
    return ""
