"""Whether the training loss of a phase goes wrong, for ``training.back_off``."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["LossWatch", "WentWrong"]

_DECAY = 0.9  # of the moving average that smooths the loss
_FIRST = 3  # steps, while the rate is still low
_HORIZON = 10  # steps that this average takes to forget
_SHARE = 0.5  # of what the loss had fallen by, to have risen by
_RISE = 0.05  # of the first loss, for losses that have not fallen
_CLEAR = 8.0  # standard errors by which a smoothed loss is higher than the lowest of many
_LEARNED = 0.05  # of the loss of a prediction that does not look at the row, to have been lower by
_RISEN = 0.1  # of what the loss was before, to have been higher by
_LATE = 0.7  # of the steps: from when on a loss that is no better is given up, whatever came before
_SLOW = 0.1  # of the steps: those that the average by which it is given up takes to forget
_NEAR = 0.01  # of the loss of a prediction that does not look at the row, for losses that are no better


class WentWrong(Exception):  # noqa: N818 - no error yet: the phase may go back
    """The loss says that nothing will come of the phase at this learning rate; the message says why."""


@dataclass(frozen=True)
class LossWatch:
    """Judges the training loss of a phase by its moving average; a pure function of the losses.

    What it knows is a few numbers, kept in the training state: the number of losses ``count``, the ``last``, their
    moving sum ``mean``, that of the losses as they were ``measured``, their ``variance`` (the mean of half the squared
    differences of neighbours, which a trend does not change much), the mean of the ``first`` few, the smoothed loss at
    the ``start``, at its ``best`` and at its ``worst``, for how many steps in a row it has been no better than
    ``constant``, ``idle``, and a slower average of the losses, ``slow``.

    Attributes:
        steps: of the phase.
        warmup: those of them over which the learning rate rises.
        constant: the loss of a prediction that does not look at the row, nats; None where there is no such.
    """

    steps: int
    warmup: int
    constant: float | None

    def see(self, numbers: dict[str, float], measured: float, luck: float = 0.0) -> None:
        """Take note of the loss of a step.

        Args:
            numbers: what is known so far.
            measured: the loss, nats.
            luck: by how much the labels of its rows alone make it higher for a model that gives every row the
                frequencies of the classes. One that has not come to them does not have that luck: how it starts, and
                whether it gets worse at first, is judged with and without it.
        """
        loss = measured - luck
        count = numbers.get("count", 0.0) + 1
        if count > 1:
            variance = numbers.get("variance", 0.0)
            numbers["variance"] = variance + ((loss - numbers["last"]) ** 2 / 2 - variance) / (count - 1)
        numbers["mean"] = _DECAY * numbers.get("mean", 0.0) + (1 - _DECAY) * loss
        numbers["measured"] = _DECAY * numbers.get("measured", 0.0) + (1 - _DECAY) * measured
        numbers["count"], numbers["last"] = count, loss
        if count <= _FIRST:
            numbers["first"] = numbers.get("first", 0.0) + (measured - numbers.get("first", 0.0)) / count
        if count <= _HORIZON:
            numbers["start"] = numbers.get("start", 0.0) + (loss - numbers.get("start", 0.0)) / count
            numbers["best"] = numbers["start"]
            numbers["worst"] = min(numbers["start"], _smoothed(numbers, "measured"))
        else:
            numbers["best"] = min(numbers["best"], _smoothed(numbers))
            higher = min(_smoothed(numbers), _smoothed(numbers, "measured"))
            numbers["worst"] = max(numbers.get("worst", numbers["start"]), higher)
        kept = 1 - 1 / max(_HORIZON, _SLOW * self.steps)
        numbers["slow"] = kept * numbers.get("slow", loss) + (1 - kept) * loss
        if self.constant is not None:
            idle = _smoothed(numbers) > (1 - _NEAR) * self.constant
            numbers["idle"] = numbers.get("idle", 0.0) + 1 if idle else 0.0

    def verdict(self, numbers: dict[str, float], step: int) -> str | None:
        """What is wrong after ``step``; None for nothing."""
        if numbers.get("count", 0.0) < 2 * _HORIZON:
            return None
        now, best, start, error = _smoothed(numbers), numbers["best"], numbers["start"], _error(numbers)
        if now > best + max(_SHARE * (start - best), _RISE * abs(start), _CLEAR * error):
            return f"the smoothed training loss rose from {best:.3g} to {now:.3g}"
        late = step >= self.warmup + max(2 * _HORIZON, (self.steps - self.warmup) / 4)
        if self.constant is not None and late and numbers.get("idle", 0.0) >= 2 * _HORIZON:
            # the most extreme of so many normal numbers is about so many standard errors off, and one more is clear
            clear = (1 + math.sqrt(2 * math.log(numbers["count"]))) * error
            lost = best < self.constant - max(clear, _LEARNED * self.constant)
            before = max(self.constant, numbers.get("first", start))
            risen = numbers.get("worst", start) > before + max(clear, _RISEN * before)
            # a loss that only comes down to that of the frequencies may be of a task that is learned late, and half the
            # rate the wrong way: that is judged later
            if lost or risen:
                return _no_better(now)
        if step >= self.warmup + _LATE * (self.steps - self.warmup) and self.idles(numbers):
            return _no_better(numbers["slow"])
        return None

    def idles(self, numbers: dict[str, float]) -> bool:
        """Whether the loss, over some ten steps and over a tenth of all, is no better than that of the frequencies."""
        if self.constant is None or "slow" not in numbers:
            return False
        return min(numbers["slow"], _smoothed(numbers)) > (1 - _NEAR) * self.constant

    def is_good(self, numbers: dict[str, float]) -> bool:
        """Whether the smoothed loss is at its lowest, within its noise, and has fallen."""
        if numbers.get("count", 0.0) < 2 * _HORIZON:
            return False
        now, error = _smoothed(numbers), _error(numbers)
        return now <= min(numbers["best"] + 2 * error, numbers["start"] - _CLEAR * error)


def _no_better(loss: float) -> str:
    return f"the training loss is {loss:.3g}, that of giving every row the frequencies of the classes"


def _smoothed(numbers: dict[str, float], name: str = "mean") -> float:
    return numbers.get(name, 0.0) / (1 - _DECAY ** numbers["count"])


def _error(numbers: dict[str, float]) -> float:
    """The standard error of the smoothed loss: of a moving average of independent losses of this variance."""
    return math.sqrt(numbers["variance"] * (1 - _DECAY) / (1 + _DECAY))
