"""The posterior of one adapter: rho and eta of every layer, its draws and its regulariser.

See docs/method.md, sections 1 to 5.

Layers may differ in rank and width, so what belongs to rows is stored flat, layer after layer: ``rho`` has R = sum of
the ranks entries, and one draw fills one flat buffer for the whole model in a handful of kernels, however many layers
there are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monteclora.errors import ConfigError
from monteclora.posterior import dirichlet, flipout, in_force, mixture, noise, wishart
from monteclora.posterior.bounds import bounded
from monteclora.posterior.cells import filled
from monteclora.posterior.draws import (
    DifferentiableDraw,
    Differentiation,
    Draw,
    LayerDraw,
    LayerSlot,
    RawDraw,
    Repetitions,
)
from monteclora.posterior.layout import LayerShape, Layout
from monteclora.posterior.regulariser import Regulariser, row_divergences
from monteclora.posterior.reminder import Reminder
from monteclora.posterior.settings import PosteriorSettings
from monteclora.posterior.torch_private import MovableModule, versions

__all__ = ["AdapterPosterior"]


class AdapterPosterior(MovableModule):
    """Learned ``rho`` (R,) and ``eta`` (L, N) of an adapter's L layers, R the sum of their ranks.

    Both stay in float32 whatever the model is cast to: log-gamma and digamma need it.

    Args:
        layers: the adapted layers, in a fixed order.
        scale: eps of each layer, L positive numbers (0 turns the noise off).
        settings: see :class:`PosteriorSettings`.
        seed: the noise stream.
        device: where the parameters live and the noise is drawn.

    Raises:
        ConfigError: a degree of freedom below a layer's rank.
    """

    rho: nn.Parameter
    eta: nn.Parameter
    scale: Tensor
    slots: tuple[LayerSlot, ...]
    _current: Draw | None
    _nu: Tensor
    _c: Tensor
    _log_determinant: Tensor
    _ranks: Tensor
    _layer_of_row: Tensor

    def __init__(
        self,
        layers: Iterable[LayerShape],
        scale: Iterable[float],
        settings: PosteriorSettings,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layers = [LayerShape(*layer) for layer in layers]
        self.settings = settings.resolved()
        self.seed = seed
        self.draws = 0
        self.enabled = True
        self.trained = True  # whether training forward passes draw; adapters for reference stay at their mean
        self.calibration: Mapping[str, Any] | None = None  # how ``scale`` was changed since it was trained last
        self.measured = False  # whether ``scale`` is final: A has its final initial value, or both were restored
        self.repeating = False
        self.drawn = False  # whether ``current`` is the draw of a forward pass in progress, or is repeated
        self.awaits_draw = False  # whether prediction draws are asked for, and the pass in progress has none yet
        self._repetitions = Repetitions()
        self._reminder = Reminder()
        if settings.kl_weight == settings.coop_weight == 0.0:
            self._reminder.silence()
        self._layout = Layout(self.layers)
        self.slots = tuple(LayerSlot(index) for index in range(len(self.layers)))
        self.current = None
        rows = sum(layer.rank for layer in self.layers)
        # float32 by name: the default dtype may be a lower one while a model is being built
        factory: dict[str, Any] = {"dtype": torch.float32, "device": device}
        shape = (len(self.layers), settings.num_components)
        self.rho = nn.Parameter(torch.zeros(rows, **factory))
        self.eta = nn.Parameter(torch.full(shape, math.log(settings.alpha_prior), **factory))
        self.register_buffer("scale", torch.tensor(list(scale), **factory))
        self._set_constants()

    def _set_constants(self) -> None:
        """What each row needs and nothing changes: nu, c, E[log|Sigma|] - 2 rho, its layer's number."""
        s = self.settings
        factory: dict[str, Any] = {"dtype": self.rho.dtype, "device": self.rho.device}
        nu: list[float] = []
        log_determinant: list[float] = []
        for layer in self.layers:
            dof = float(layer.rank if s.degrees_of_freedom is None else s.degrees_of_freedom)
            if dof < layer.rank:
                raise ConfigError(
                    f"degrees_of_freedom is {dof:g} but layer '{layer.name}' has rank {layer.rank}",
                    "Give at least the largest rank, or leave it out.",
                )
            nu += [dof] * layer.rank
            log_determinant += mixture.log_determinant_constants(
                dof, layer.rank, covariance=s.covariance, normalised=bool(s.normalised)
            )
        dof_rows = torch.tensor(nu, **factory)
        self.register_buffer("_nu", dof_rows, persistent=False)
        self.register_buffer("_c", torch.ones_like(dof_rows) if s.normalised else dof_rows, persistent=False)
        self.register_buffer("_log_determinant", torch.tensor(log_determinant, **factory), persistent=False)
        ranks = self._layout.ranks
        number = [i for i, rank in enumerate(ranks) for _ in range(rank)]
        for name, values in (("_ranks", ranks), ("_layer_of_row", number)):
            integers = torch.tensor(values, dtype=torch.long, device=self.rho.device)
            self.register_buffer(name, integers, persistent=False)

    def converted(self, before: Tensor, after: Tensor) -> Tensor:
        """Follow the model to another device, and to float64, but never below float32."""
        low = after.dtype in (torch.float16, torch.bfloat16)
        return before.to(after.device) if low and before.dtype != after.dtype else after

    def after_conversion(self) -> None:
        """Forget the draws, which have another device or dtype, and compute the constants again.

        No state dict holds the constants: computed again, they are right after ``to_empty`` and exact after ``double``.
        """
        self.current = None
        self.mirror(None)
        self._set_constants()

    def __getstate__(self) -> dict[str, Any]:
        # a copy makes its own draws: the noise of the current forward pass can be as large as the adapter
        return {**self.__dict__, "_current": None, "drawn": False, "awaits_draw": False}

    def get_extra_state(self) -> Tensor:
        """What ``state_dict`` holds beside the tensors: the number of draws made, and whether noise is on."""
        return torch.tensor([self.draws, self.enabled], dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take the noise stream's position from a ``state_dict``."""
        draws, enabled = state.tolist()
        self.draws, self.enabled = int(draws), bool(enabled)
        self.measured = True

    @property
    def cells(self) -> int:
        """The number of entries of all A together."""
        return self._layout.cells

    # -- draws ---------------------------------------------------------------------------------------------------

    @property
    def current(self) -> Draw | None:
        """The draw of the training forward pass; setting it hands every slot its part."""
        return self._current

    @current.setter
    def current(self, draw: Draw | None) -> None:
        self._current = draw
        for index, slot in enumerate(self.slots):
            slot.current = None if draw is None else draw.layers[index]

    @property
    def predictive(self) -> Draw | None:
        """The draw that evaluation forward passes of the calling context see; None for the mean."""
        return in_force.draw_of(self)

    def predict_with(self, draw: Draw | None) -> None:
        """Let evaluation forward passes of this context see ``draw``, see :mod:`~monteclora.posterior.in_force`."""
        in_force.put(self, draw)
        self.mirror(draw)

    def mirror(self, draw: Draw | None) -> None:
        """Hand every slot its part of a prediction draw, for compiled code."""
        for index, slot in enumerate(self.slots):
            slot.predictive = None if draw is None else draw.layers[index]

    def draw(self, process: int = 0, batch_size: int | None = None, means: Sequence[Tensor] | None = None) -> Draw:
        """The next training draw: made from the counter, which it advances, and kept as ``current``.

        Args:
            process: the number of the training process.
            batch_size: examples in the batch; used where noise is per example.
            means: mu of every layer, shape (r, n), on this device: layers are then given A. It takes the place of the
                noise, and the gradient of mu is that of A. Not used where every example has an A of its own.

        Raises:
            ConfigError: noise is per example and the batch size is unknown, or the posterior is trained on after its
                scale was calibrated to zero.
        """
        self._reminder.before_draw(self.rho)
        signs = None
        if self.settings.noise == "per_example":
            if batch_size is None:
                raise ConfigError(
                    "noise='per_example' needs the number of examples, and the model was called without a tensor",
                    "Call the model with input_ids or inputs_embeds, or set noise='shared'.",
                )
            # of a single example they would turn the draw into another one of the same law
            if batch_size != 1:
                signs, means = self._signs(process, batch_size), None
        # two draws at once would take twice the memory; graphs that still need the last one hold it themselves
        self.current = None
        trainable = torch.is_grad_enabled() and (self.rho.requires_grad or self.eta.requires_grad)
        raw = self._raw(self.seed, process, self.draws, means=means, differentiable=trainable)
        blocks = self._differentiable(raw, means)
        parts = zip(*signs, strict=True) if signs else [(None, None)] * len(self.layers)
        layers = tuple(LayerDraw(block, means is not None, *part) for block, part in zip(blocks, parts, strict=True))
        draw = Draw(self.draws, layers, 0, *raw[3:])
        self._repetitions.indices.clear()
        self.draws += 1
        self.current = draw
        return draw

    def note_repetition(self, layer: LayerDraw) -> None:
        """A layer runs inside a backward pass, with its part of the current draw.

        Code that repeats a forward pass under its own draw sets ``repeating`` meanwhile.

        Raises:
            RuntimeError: foreign code recomputes it, and with rho and eta frozen a wrong draw would go unnoticed.
        """
        if self.repeating or self.current is None:
            return
        if torch.is_grad_enabled() and not layer.transposed.requires_grad:
            raise RuntimeError(
                "activation checkpointing recomputes a layer whose rho and eta are frozen: checkpoint through the "
                "model's gradient_checkpointing_enable()"
            )
        self._repetitions.note(self.current.index)

    def sample(self, seed: int, first: int, count: int = 1, drawn: Collection[int] | None = None) -> Draw:
        """Draw from the posterior for prediction; the training counter and ``current`` stay as they are.

        Args:
            seed: the prediction's stream, apart from training's.
            first: number of the first draw in that stream.
            count: S: the draws first, ..., first + S - 1 are made at once, for a batch that is repeated S times along
                its first dimension.
            drawn: numbers of the layers that have noise; the others have no part in the draw and are at their mean.
                None is every layer. A layer's noise does not depend on what other layers have.
        """
        raws = [self._raw(seed, 0, first + s, posterior_sample=True) for s in range(count)]
        blocks = self._layout.transposed_blocks(torch.stack([raw.cells for raw in raws]))
        row_scale = torch.stack([raw.row_scale for raw in raws])
        parts = [LayerDraw(block) for block in blocks]
        layers = tuple(part if drawn is None or i in drawn else None for i, part in enumerate(parts))
        return Draw(first, layers, count, row_scale, *raws[0][4:])

    def _differentiable(self, raw: RawDraw, means: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """The layers' parts of a training draw, with gradient where anything has one."""
        inputs = (self.rho, self.eta, *(means or ()))
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
            return raw.blocks
        if self.calibration is not None:
            self._forget_calibration()
        known = Differentiation(
            layout=self._layout,
            ranks=self._ranks,
            cells=raw.cells,
            log_norm_grad=raw.log_norm_grad,
            means=means,
            versions=versions(means or ()),
            index=self.draws,
            repetitions=self._repetitions,
            reminder=self._reminder,
        )
        parts: tuple[Tensor, ...] = DifferentiableDraw.apply(known, raw.blocks, *inputs)
        return parts

    def _forget_calibration(self) -> None:
        """Training continues at the calibrated scale, which from now on is the scale of training."""
        if not self.scale.any():
            raise ConfigError(
                "the posterior was calibrated to a scale of zero, and would be trained without noise",
                "Undo that first, with `monteclora calibrate --undo` or monteclora.adapters.rescaling.",
            )
        self.calibration = None

    @torch.no_grad()
    def _raw(
        self,
        seed: int,
        process: int,
        index: int,
        *,
        means: Sequence[Tensor] | None = None,
        posterior_sample: bool = False,
        differentiable: bool = False,
    ) -> RawDraw:
        (rho, eta), s = bounded(self.rho, self.eta), self.settings

        def generator(kind: noise.Kind) -> torch.Generator:
            return noise.generator(seed, process, index, kind, rho.device, posterior_sample=posterior_sample)

        factors: list[Tensor] | None = None
        ratio = self._c / self._nu
        if s.covariance == "diagonal":
            row_squared_norm = ratio * wishart.raw_chi_square(self._nu, generator(noise.Kind.WISHART))
            row_log_determinant, root = row_squared_norm.log(), row_squared_norm.sqrt()
        else:
            factors = self._factors(generator(noise.Kind.WISHART))
            row_squared_norm = ratio * torch.cat([t.square().sum(-1) for t in factors])
            row_log_determinant, root = (ratio * torch.cat([t.diag().square() for t in factors])).log(), ratio.sqrt()
        weights = dirichlet.raw(eta, s.dirichlet, generator(noise.Kind.DIRICHLET))
        if differentiable:
            log_norm, log_norm_grad = dirichlet.log_norm_with_gradient(eta, weights)
        else:
            log_norm, log_norm_grad = dirichlet.log_norm(eta, weights), None
        norm = (self.scale * log_norm.exp()).to(rho.dtype)
        row_scale = norm[self._layer_of_row] * rho.exp() * root
        cells, blocks = filled(self._layout, generator(noise.Kind.NORMAL), row_scale, factors, means)
        return RawDraw(
            cells=cells,
            blocks=blocks,
            log_norm_grad=log_norm_grad,
            row_scale=row_scale,
            squared_norm=(2.0 * log_norm).exp(),
            row_squared_norm=row_squared_norm,
            row_log_determinant=row_log_determinant,
            weights=weights,
        )

    def _factors(self, generator: torch.Generator) -> list[Tensor]:
        """Full covariance: T of every layer, shape (r, r)."""
        drawn: dict[int, Iterator[Tensor]] = {}
        for rank, count in Counter(self._layout.ranks).items():
            dof = self.settings.degrees_of_freedom or float(rank)
            drawn[rank] = iter(wishart.raw_bartlett(dof, rank, count, self.rho, generator))
        return [next(drawn[rank]) for rank in self._layout.ranks]

    def _signs(self, process: int, batch_size: int) -> flipout.Signs:
        device = self.rho.device
        generator = noise.generator(self.seed, process, self.draws, noise.Kind.SIGN, device)
        return flipout.signs(self.layers, batch_size, generator, self.rho.dtype, device)

    # -- objective -----------------------------------------------------------------------------------------------

    def regulariser(self) -> Regulariser:
        """The KL terms and the cooperative loss, averaged over layers (docs/method.md section 4).

        With ``regulariser="expected"`` the expectations in closed form: no draw is needed, no variance is added. The
        cooperative expectation is that of the exact Dirichlet. With ``"sampled"``, KL_z and ||pi||^2 of the current
        draw.

        Raises:
            ConfigError: ``"sampled"`` before the first training forward.
        """
        if torch.is_grad_enabled():
            self._reminder.silence()
        (rho, eta), s, count = bounded(self.rho, self.eta), self.settings, len(self.layers)
        row_squared_norm, row_log_determinant = self._c, self._log_determinant
        if s.regulariser == "sampled":
            if self.current is None:
                raise ConfigError(
                    "regulariser='sampled' describes the last training draw, and there is none",
                    "Run a forward pass in training mode first, or use regulariser='expected'.",
                )
            row_squared_norm, row_log_determinant = self.current.row_squared_norm, self.current.row_log_determinant
            coop = (2.0 * dirichlet.log_norm(eta, self.current.weights)).exp()
        else:
            coop = dirichlet.mean_squared_norm(eta)
        kl_sigma, kl_z = row_divergences(rho, self._nu, row_squared_norm, row_log_determinant, s.num_components)
        return Regulariser(
            kl_pi=dirichlet.kl_divergence(eta, s.alpha_prior).mean(),
            kl_sigma=kl_sigma / count,
            kl_z=kl_z / count,
            coop=coop.mean(),
            kl_weight=s.kl_weight,
            coop_weight=s.coop_weight,
        )

    @torch.no_grad()
    def moments(self) -> dict[str, Tensor]:
        """What the posterior looks like, layer by layer, each of shape (L,) (docs/method.md section 3).

        ``squared_norm`` is E||pi||^2 and ``noise_std`` the root mean square of A - mu.
        """
        rho, eta = bounded(self.rho, self.eta)
        squared_norm = dirichlet.mean_squared_norm(eta)
        variance = self._c * (2.0 * rho).exp()
        mean = torch.segment_reduce(variance, "mean", lengths=self._ranks)
        return {"squared_norm": squared_norm, "noise_std": self.scale * (squared_norm * mean).sqrt()}

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"layers={len(self.layers)}, rows={self.rho.numel()}, num_components={self.settings.num_components}"
