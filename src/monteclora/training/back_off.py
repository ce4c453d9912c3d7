"""``training.back_off``: a phase that goes wrong goes back to where it was well, and on at half the learning rate.

What it goes back to is a checkpoint: of its start, or of the last evaluation at which the smoothed loss was at its
lowest. Neither depends on how often a run saves or is interrupted. The model, made anew, takes up that checkpoint as a
resumed run does, so that nothing of the failed attempt is left in it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from monteclora.errors import DivergenceError
from monteclora.runs.manifest import Checkpoint, discard_later, read_checkpoint
from monteclora.runs.recipe import Recipe
from monteclora.runs.run_folder import RunFolder
from monteclora.training.agreement import by_main_process
from monteclora.training.checkpoint import Checkpoints, saved_state
from monteclora.training.class_prior import ClassPrior
from monteclora.training.loop import Loop
from monteclora.training.plans import Phase, warmup_steps
from monteclora.training.watch import LossWatch, WentWrong

__all__ = ["Return", "begin_again", "returning", "times_back", "watch_of"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Return:
    """A phase goes back.

    Attributes:
        checkpoint: to which.
        reason: why, a sentence without a full stop.
        number: how often the phase has gone back, this time included.
        left_step: the step of the phase that it had come to.
        tokens, seconds, skipped: spent up to there, which go on being counted.
    """

    checkpoint: Checkpoint
    reason: str
    number: int
    left_step: int
    tokens: int
    seconds: float
    skipped: int


def times_back(checkpoint: Checkpoint | None, back: Return | None) -> int:
    """How often a phase that starts from a checkpoint, or goes back to it, has gone back by then."""
    if back is not None:
        return back.number
    return 0 if checkpoint is None else saved_state(checkpoint.path).back_offs


def watch_of(recipe: Recipe, phase: Phase, prior: ClassPrior | None, times: int) -> LossWatch | None:
    """What judges the loss of a phase that went back so many times; None where it goes back no more.

    The posterior's own phase never does: the adapter, whose loss it is, stays as it was trained.
    """
    if times >= recipe.training.back_off or phase.name == "posterior":
        return None
    return LossWatch(phase.steps, warmup_steps(recipe.training, phase.steps), None if prior is None else prior.mean)


def returning(loop: Loop, saver: Checkpoints, error: WentWrong | DivergenceError) -> Return | None:
    """How a phase that ended with ``error`` goes back; None where it does not."""
    state = loop.state
    if loop.watch is None or state.good_step is None:
        return None
    return Return(
        checkpoint=read_checkpoint(saver.path_of(state.good_step)),
        reason=_reason(error),
        number=state.back_offs + 1,
        left_step=state.step,
        tokens=state.tokens,
        seconds=loop.seconds,
        skipped=state.skipped,
    )


def _reason(error: WentWrong | DivergenceError) -> str:
    """What is wrong, without the file that tells of it: that goes with the attempt."""
    if isinstance(error, WentWrong):
        return str(error)
    return error.message.partition(" (")[0]


def begin_again(loop: Loop, run: RunFolder, saver: Checkpoints, back: Return, learning_rate: float) -> None:
    """Make the checkpoint that a phase went back to the newest thing there is, with the lower learning rate.

    Killed at any point of it, the run resumes from a checkpoint of the failed attempt, and comes here again.

    Args:
        loop: with that checkpoint in it.
        run: its folder.
        saver: of the phase.
        back: what happened.
        learning_rate: the peak from now on.

    Raises:
        CheckpointError: the disk refuses it.
    """
    state = loop.state
    state.back_offs, state.tokens, state.seconds, state.skipped = back.number, back.tokens, back.seconds, back.skipped
    by_main_process(lambda: _forget_later(run, saver, back, learning_rate))
    saver.restore_generators()
    saver.save(loop)


def _forget_later(run: RunFolder, saver: Checkpoints, back: Return, learning_rate: float) -> None:
    """Leave nothing of what came after the checkpoint but the line that says so."""
    phase = back.checkpoint
    discard_later(saver.folder, phase.total_step)
    run.divergence_file.unlink(missing_ok=True)
    event = {"event": "back_off", "phase": phase.phase, "step": phase.total_step, "number": back.number}
    left = phase.first_step + back.left_step
    facts = {"left_step": left, "reason": back.reason, "learning_rate": learning_rate}
    run.metrics.rewind(phase.total_step, {**event, **facts, "tokens": back.tokens, "seconds": back.seconds})
    what = "step %d: %s; going back to step %d, at half the learning rate, %g"
    logger.warning(what, left, back.reason, phase.total_step, learning_rate)
