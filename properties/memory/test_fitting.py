"""``largest_that_fits`` finds the largest size that fits, in few evaluations."""

from hypothesis import given
from hypothesis import strategies as st

from memcnn.memory import largest_that_fits


@given(
    steps=st.lists(st.integers(1, 100), min_size=2, max_size=60),
    start=st.integers(1, 100),
    share=st.floats(0, 1.2),
    shift=st.integers(-1, 1),
)
def test_the_result_is_the_largest_size_that_fits(steps, start, share, shift):
    sizes = {n: sum(steps[:n]) for n in range(1, len(steps) + 1)}  # any growing curve
    budget = int(share * sizes[len(steps)]) + shift
    found = largest_that_fits(sizes.__getitem__, budget, start=start, limit=len(steps))
    n = found["largest"]
    assert n == sum(size <= budget for size in sizes.values())
    assert found["peak_bytes"] == sizes.get(n)
    assert found["next_peak_bytes"] == sizes.get(n + 1)


def test_four_evaluations_are_enough_where_memory_is_affine():
    found = largest_that_fits(lambda n: 1000 + 37 * n, 10**8, start=100, limit=2**24)
    assert found["largest"] == (10**8 - 1000) // 37 and found["evaluations"] == 4
