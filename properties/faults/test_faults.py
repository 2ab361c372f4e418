"""A few tries of every fault; `python -m properties.faults` tries each many times and writes reports/faults.md."""

import os
from random import Random

import pytest

from properties.faults.ground import Ground
from properties.faults.kills import kill_at_a_file_operation, kill_at_a_random_instant
from properties.faults.trying import FAULTS

pytestmark = pytest.mark.skipif(os.name == "nt", reason="processes are forked and killed; run on Linux or macOS")
THOROUGH = os.environ.get("MEMCNN_PROFILE") == "thorough"
KILLS = int(os.environ.get("MEMCNN_KILLS") or (100 if THOROUGH else 6))
TRIES = 10 if THOROUGH else 1


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    ground = Ground(tmp_path_factory.mktemp("faults"))
    yield ground
    ground.close()


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_nothing_is_lost(ground, fault):
    tries = {kill_at_a_random_instant: KILLS, kill_at_a_file_operation: KILLS // 2}.get(fault, TRIES)
    assert len(list(fault(ground, Random(0), tries))) == tries
