"""Each planted fault is caught by the law that names it and by no unrelated law, and healthy blocks pass."""

import pytest

from memcnn.testing.checks import LAWS
from memcnn.testing.laws.result import NEEDS_NO_INVERSE
from properties.zoo.faults import FAULTS
from properties.zoo.healthy import HEALTHY
from properties.zoo.specimen import Fault, Specimen, named_by


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.specimen.name)
def test_a_fault_is_caught_by_the_law_that_names_it_and_by_nothing_unrelated(fault: Fault):
    report = fault.specimen.report()
    assert report.failed_laws == {fault.law} | fault.also, f"\n{report}"
    assert named_by(fault, report) is not None, f"\n{report}"
    words = named_by(fault, report).explanation
    follows_from_the_inverse = NEEDS_NO_INVERSE in words and "inverse" in report.failed_laws
    assert (words in report.summary()) != follows_from_the_inverse, "a fault is explained once"


@pytest.mark.parametrize("specimen", HEALTHY, ids=lambda specimen: specimen.name)
def test_a_healthy_block_passes_every_check(specimen: Specimen):
    report = specimen.report()
    assert report.passed, f"\n{report}"


def test_names_are_unique():
    names = [fault.specimen.name for fault in FAULTS] + [specimen.name for specimen in HEALTHY]
    assert len(set(names)) == len(names)


def test_every_law_has_faults_of_its_own():
    assert {fault.law for fault in FAULTS} == set(LAWS)
    assert len(FAULTS) >= 40
