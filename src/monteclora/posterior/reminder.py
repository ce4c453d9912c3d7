"""Notices that rho and eta are trained without the regulariser, which no error and no number would show."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

__all__ = ["Reminder"]

_UPDATES = 3


class Reminder:
    """Warns once of updates of a posterior whose gradient came from draws alone.

    It sees the gradients of draws, the values of ``rho`` before each, and evaluations of the regulariser. One
    evaluation silences it permanently: how often and with which weight the regulariser is added is then the caller's
    choice. Until then a comparison of a few numbers waits for the device once per forward pass.
    """

    def __init__(self) -> None:
        self._silent = False
        self._gradient = False
        self._updates = 0
        self._rho: Tensor | None = None

    def silence(self) -> None:
        """The regulariser was evaluated, it has no weight, or the caller has been warned."""
        self._silent, self._rho = True, None

    def gradient(self) -> None:
        """rho and eta got a gradient through a draw."""
        self._gradient = True

    def before_draw(self, rho: Tensor) -> None:
        """A training forward pass begins: warn if ``rho``, of shape (R,), was updated and nothing regularised it.

        Batches that are accumulated in one update count as one.
        """
        if self._silent or not rho.requires_grad:
            return
        if self._rho is None:
            self._rho = rho.detach().clone()
        # by value: the fused optimisers do not count their changes as torch's version counter should
        elif self._gradient and not torch.equal(rho, self._rho.to(rho.device)):
            self._rho, self._gradient = rho.detach().clone(), False
            self._updates += 1
        if self._updates >= _UPDATES:
            self.silence()
            warnings.warn(
                f"{self._updates} optimiser steps were taken on a MonteCLoRA adapter without its regulariser, so rho "
                "and eta are fitted to the training loss alone: add monteclora.variational_loss(model) to the loss "
                "once per optimiser step, or use monteclora.MonteCLoRATrainerMixin",
                UserWarning,
                stacklevel=2,
            )
