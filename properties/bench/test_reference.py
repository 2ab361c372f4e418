"""The cases of the reference networks: all subjects compute the same gradients, and store what their names say."""

import pytest

from bench.reference import MAKERS, Reference, activation_bytes, references
from memcnn.testing.tolerances import relative_error

SMALL = ("vit", "glow", "ode")


@pytest.mark.parametrize("network", SMALL)
def test_every_subject_computes_the_gradients_of_plain(network):
    gradients = {}
    for case in references(depths=[2], networks=[network]):
        model = case.model("cpu").double()
        step = case.step(model, "cpu")
        for x in step.batch:
            x.data = x.double()
        step.run()
        gradients[case.subject] = [p.grad for p in model.parameters()]
    for subject in ("checkpoint", "reversible"):
        errors = [relative_error(a, b) for a, b in zip(gradients[subject], gradients["plain"], strict=True)]
        assert max(errors) < 1e-9, subject


@pytest.mark.parametrize("network", ["vit", "ode"])
def test_the_subjects_store_what_their_names_say(network):
    sizes = {
        (subject, depth): activation_bytes(Reference(network, subject, depth, batch=2))
        for subject in ("plain", "checkpoint", "reversible")
        for depth in (4, 5)
    }
    growth = {subject: sizes[subject, 5] - sizes[subject, 4] for subject in ("plain", "checkpoint", "reversible")}
    assert growth["plain"] > growth["checkpoint"] > growth["reversible"] == 0


def test_a_full_run_has_every_network():
    assert {case.network for case in references()} == set(MAKERS)
