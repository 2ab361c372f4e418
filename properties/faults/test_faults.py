"""Try every fault a few times; ``python -m properties.faults`` tries each many times and writes reports/faults.md."""

import os
from random import Random

import pytest

from properties.faults.kills import kill_at_a_file_operation, kill_at_a_random_instant
from properties.faults.sandbox import Sandbox
from properties.faults.trying import FAULTS

pytestmark = pytest.mark.skipif(os.name == "nt", reason="processes are forked and killed; run on Linux or macOS")
THOROUGH = os.environ.get("MEMCNN_PROFILE") == "thorough"
KILLS = int(os.environ.get("MEMCNN_KILLS") or (100 if THOROUGH else 6))
TRIES = 10 if THOROUGH else 1


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    sandbox = Sandbox(tmp_path_factory.mktemp("faults"))
    yield sandbox
    sandbox.close()


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_every_try_of_a_fault_is_survived(sandbox, fault):
    tries = {kill_at_a_random_instant: KILLS, kill_at_a_file_operation: KILLS // 2}.get(fault, TRIES)
    assert len(list(fault(sandbox, Random(0), tries))) == tries
