"""The largest size that fits."""

from collections.abc import Callable


def largest_that_fits(peak_bytes: Callable[[int], int], budget_bytes: int, *, start: int, limit: int) -> dict:
    """The largest n from 0 to `limit` for which `peak_bytes(n)`, which grows with n, is at most `budget_bytes`.

    Found by bisection from `start`, guided by the line through the last two values, since memory is close to affine:
    where it is, four evaluations do. Returned as `largest`, with `peak_bytes` there (None for 0) and
    `next_peak_bytes` one further, which does not fit; that is None where `limit` itself fits.
    """
    sizes: dict[int, int] = {0: 0}
    low, high = 0, limit + 1  # fits, does not
    guess = min(max(start, 1), limit)
    while high - low > 1:
        sizes[guess] = peak_bytes(guess)
        if sizes[guess] <= budget_bytes:
            low = guess
        else:
            high = guess
        if len(sizes) == 2:
            guess = 2 * guess if low else guess // 2
        elif len(sizes) > 6 and len(sizes) % 2 == 0:  # a curve misleads the line
            guess = (low + high) // 2
        else:
            (n, size), (other, other_size) = list(sizes.items())[-2:]
            slope = (other_size - size) / (other - n)
            guess = other + int((budget_bytes - other_size) // slope) if slope > 0 else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
    return {
        "largest": low,
        "peak_bytes": sizes[low] if low else None,
        "next_peak_bytes": sizes.get(high),
        "limit": limit,
        "evaluations": len(sizes) - 1,
    }
