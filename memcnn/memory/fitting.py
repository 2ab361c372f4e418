"""The largest size that fits into a number of bytes: a batch, a depth, a width."""

from collections.abc import Callable


def largest_that_fits(peak_bytes: Callable[[int], int], budget_bytes: int, *, start: int, limit: int) -> dict:
    """Find the largest n from 0 to ``limit`` for which ``peak_bytes(n)`` is at most ``budget_bytes``.

    The search is a bisection from ``start``, guided by the line through the last two values. Memory is close to affine,
    and where it is affine, four evaluations are enough. (``scipy.optimize`` searches roots of real functions, not of
    integers, and would evaluate each size several times.)

    Args:
        peak_bytes: returns the bytes for a size; it must grow with the size.
        budget_bytes: the bytes available.
        start: the size to evaluate first.
        limit: the largest size to try.

    Returns:
        ``largest``, the size; ``peak_bytes`` at that size, None for 0; ``next_peak_bytes`` at the next size, which does
        not fit, None where ``limit`` itself fits; ``limit``; and the number of ``evaluations``.
    """
    sizes: dict[int, int] = {0: 0}
    low, high = 0, limit + 1  # low fits, high does not
    guess = min(max(start, 1), limit)
    while high - low > 1:
        sizes[guess] = peak_bytes(guess)
        if sizes[guess] <= budget_bytes:
            low = guess
        else:
            high = guess
        if len(sizes) == 2:
            guess = 2 * guess if low else guess // 2
        elif len(sizes) > 6 and len(sizes) % 2 == 0:  # memory is far from affine
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
