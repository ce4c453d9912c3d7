"""How often at least one of k answers is right, estimated from n of them (Chen et al. 2021, equation 1)."""

from __future__ import annotations

from math import comb

from monteclora.errors import DataError

__all__ = ["pass_at_k"]


def pass_at_k(answers: int, right: int, k: int) -> float:
    """The unbiased estimate ``1 - C(n - c, k) / C(n, k)`` for one problem.

    Args:
        answers: n, at least k.
        right: c, how many of them are right.
        k: at least 1.

    Raises:
        DataError: the numbers do not fit.
    """
    if not 0 <= right <= answers or not 1 <= k <= answers:
        raise DataError(
            f"{right} right ones of {answers} answers say nothing about {k} of them", "Give k answers or more."
        )
    return 1.0 - comb(answers - right, k) / comb(answers, k)
