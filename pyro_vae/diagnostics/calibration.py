r"""Simulation-based calibration: test whether a guide's q(z | x) is the exact posterior, on data drawn from the model.

Where a latent is global, or q has parameters for the given data, each simulation is a data set, to which q is fitted.

If z* is drawn from the prior and x* from the likelihood at z*, then z* is a draw from the exact posterior p(z | x*).
If q(z | x*) is that posterior, the rank of z* among L draws of q(z | x*) is uniform on 0, ..., L, for each latent
coordinate and for any function of z and x.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.transforms import biject_to
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_vae._utils.chunks import in_chunks
from pyro_vae._utils.data import DataTensors, data_tensors
from pyro_vae._utils.display import Result, Table, count_of
from pyro_vae._utils.module_state import evaluation_mode
from pyro_vae._utils.param_store import scoped_param_store, without_training
from pyro_vae._utils.plates import every_row
from pyro_vae._utils.processes import default_processes, run_in_processes
from pyro_vae._utils.progress import Progress, progress_bar
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.shared_calls import report_of_ranks
from pyro_vae._utils.traces import latent_sites, log_density
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import function, positive, positive_int
from pyro_vae.arguments import any_arguments
from pyro_vae.diagnostics.refits import Refits, check_refit
from pyro_vae.diagnostics.simulation import Simulation, Simulator
from pyro_vae.diagnostics.uniformity import p_value, simultaneous_band
from pyro_vae.distributions.properties import base_distribution
from pyro_vae.evidence.importance_sampling import densities
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.exact.model_density import ModelDensity, Values
from pyro_vae.model_guide import ModelGuide, is_amortized

__all__ = ["ALL", "JOINT", "Calibration", "CalibrationErrors", "calibrate"]

JOINT = "log p(x, z)"
"""The name of the one quantity that depends on the data."""
ALL = "all coordinates"
"""The key of the faults that all coordinates have in common."""

_BATCH = 128  # rows for which the guide's network runs once
_FAR = 5.0  # standard deviations of q: beyond them lie 6e-7 of a normal, and 4e-4 of one of twice the variance
_MAX_FAR = 0.01  # share of the data whose truth may be that far away
_NEGLIGIBLE = 0.01  # nats
_EFFECTIVE = 20  # effective number of data that a coordinate needs to count in the overall errors


@dataclass(frozen=True, repr=False)
class CalibrationErrors(Result):
    """Errors of the variance and the mean of q, for each coordinate, ``(D,)``, and overall.

    Attributes:
        variance_ratio: the variance that q should have over the variance of q: 2 if q has half the variance.
        log_ratio_error: standard error of the logarithm of ``variance_ratio``.
        bias: by how much the mean of q should move, in standard deviations of q.
        bias_error: standard error of ``bias``.
        overall: four numbers for all coordinates: the geometric mean of the variance ratios, the standard error of its
            logarithm, the root mean square of the biases after the share of chance is subtracted, its standard error.
    """

    variance_ratio: Tensor
    log_ratio_error: Tensor
    bias: Tensor
    bias_error: Tensor
    overall: tuple[float, float, float, float]

    def _line(self) -> str:
        ratio, log_ratio_error, bias, bias_error = self.overall
        return (
            f"variance ratio {ratio:.3f} ± {ratio * log_ratio_error:.3f}, bias {bias:.3f} ± {bias_error:.3f} standard "
            f"deviations of q, over {count_of(len(self.bias), 'coordinate')}"
        )

    def _table(self) -> Table:
        columns = [self.variance_ratio, self.log_ratio_error, self.bias, self.bias_error]
        rows = [
            (index, f"{ratio:.3f} ± {ratio * log_error:.3f}", f"{bias:.3f} ± {bias_error:.3f}")
            for index, (ratio, log_error, bias, bias_error) in enumerate(torch.stack(columns, 1).tolist())
        ]
        note = f"{self._line()[0].upper()}{self._line()[1:]}."
        return Table(("coordinate", "variance ratio", "bias, in standard deviations of q"), rows, note)


@dataclass(frozen=True, repr=False)
class Calibration(Result):
    r"""The result of :func:`calibrate`: ranks of R simulated truths among L draws of each q(z | x), and their tests.

    There are Q quantities: the coordinates of the latents, and last log p(x, z). A latent on the reals is its own
    coordinate. A latent with constraints is compared in unconstrained coordinates (a point of the log-simplex in
    log-ratios), and a class by an indicator of each value.

    Attributes:
        names: names of the quantities, such as ``"z[0]"``.
        ranks: ranks of the truth among the L draws, from 0 to L, ``(R, Q)``; ties are broken at random.
        num_draws: L.
        p_values: exact p-values of the uniformity of the ranks, ``(Q,)``.
        errors: errors of q on the simulated data. The variance ratio is the mean squared distance of the truth from
            the mean of q, after a constant bias is subtracted, over the mean variance of q.
        elbo_corrections: the variance ratio and the shift of the mean, the same for all data, that would raise the ELBO
            on the given data. With :math:`h = -\mathbb{E}_q[\partial_z \log p(x, z)\,(z - \mathbb{E}_q z)]`, the ELBO
            is stationary in the variance where the mean of h is 1; the ratio is 1 / h, exact for a normal p(z | x).
            ``None`` if a latent is discrete, or for a single datum.
        divergence: unbiased estimate of
            :math:`\mathbb{E}_{p(x)}[\mathrm{KL}(q \Vert p(z|x)) + \mathrm{KL}(p(z|x) \Vert q)]`, in which log p(x)
            cancels, in nats per datum. Errors of single data that cancel in the ranks add up here.
        divergence_error: standard error of ``divergence``. The estimate has heavy tails where q is far too narrow. Both
            are NaN where log q(z | x) is known at the guide's own draws alone.
        tolerance: the largest ratio of variances that is no fault.
        alpha: the probability of any false alarm.
        far_shares: share of the simulated data whose true value is more than 5 standard deviations of q from the mean
            of q, ``(D,)``; 0 for discrete latents, ``None`` if it was not computed.
        num_data_sets: number of data sets, each with a q of its own; 0 where the rows of one were the simulations. A
            "datum" above is then the whole data set, or a group or a row of it where log p(x) has a value for each.

    Source: Talts et al. 2018, "Validating Bayesian inference algorithms with simulation-based calibration"; Modrák et
    al. 2023, "Simulation-based calibration checking for Bayesian computation", for log p(x, z), without which a guide
    that returns the prior would pass; Grosse, Ancha and Roy 2016, "Measuring the reliability of MCMC inference with
    bidirectional Monte Carlo", for the divergence.
    """

    names: tuple[str, ...]
    ranks: Tensor
    num_draws: int
    p_values: Tensor
    errors: CalibrationErrors
    elbo_corrections: CalibrationErrors | None
    divergence: float
    divergence_error: float
    tolerance: float
    alpha: float
    far_shares: Tensor | None = None
    num_data_sets: int = 0

    @property
    def verdict(self) -> str:
        """The verdict on q, as one word.

        * ``"sound"``: neither the ranks nor :attr:`divergence` show a difference from p(z | x).
        * ``"approximate"``: there is one, which :attr:`headline` measures, and no fault, as for most trained encoders.
        * ``"faulty"``: there are :attr:`faults`.
        """
        if self.faults:
            return "faulty"
        least = self.divergence - self._z_score(1) * self.divergence_error  # NaN if the divergence is infinite
        close = math.isnan(self.divergence) or least <= _NEGLIGIBLE
        return "sound" if self.is_exact and close else "approximate"

    @property
    def is_exact(self) -> bool:
        """Whether all ranks agree with an exact q; false with probability ``alpha`` if q is exact."""
        return not any(self.leaves_band(index) for index in range(len(self.names)))

    def leaves_band(self, index: int) -> bool:
        """Whether the ranks of a quantity are not uniform, at level ``alpha`` for all quantities together."""
        return float(self.p_values[index]) <= self.alpha / len(self.names)

    @property
    def faults(self) -> dict[str, str]:
        """Descriptions of the faults of q, by quantity, or by :data:`ALL`.

        There are three kinds. None is reported unless some ranks leave their band and the error is certain, both at
        level ``alpha`` for all quantities together:

        * the ELBO corrections change the variances by a factor of more than ``tolerance``, or the means by as many
          nats; for a single coordinate the factor is squared. With ``tolerance=1``, and for discrete latents,
          ``errors`` are used in place of the corrections;
        * intervals of 50 or 90 % cover less, or more, than those of a normal whose variance is wrong by the squared
          factor. This is what a guide does that finds one of two modes, where no small correction raises the ELBO;
        * more than 1 % of the true values lie 5 standard deviations of q from its mean: q is wrong for some data.
        """
        if self.is_exact:
            return {}
        z_score, strict = self._z_score(4 * len(self.names)), self.tolerance == 1  # two sides of two errors for each
        errors = self.errors if strict or self.elbo_corrections is None else self.elbo_corrections
        columns = (errors.variance_ratio, errors.log_ratio_error, errors.bias, errors.bias_error)
        found = {ALL: _describe_errors(errors.overall, self.tolerance, z_score)}
        for index, name in enumerate(self.names):
            lines = found[name] = []
            if name != JOINT:
                if errors is not self.errors or self.leaves_band(index):
                    numbers = [float(column[index]) for column in columns]
                    lines += _describe_errors(numbers, self.tolerance**2, z_score)
                lines += self._coverage_faults(index, z_score)
            if strict and not lines and self.leaves_band(index):
                lines += [f"differs from p(z | x), p-value {self.p_values[index]:.1g}"]
        return {name: "; ".join(lines) for name, lines in found.items() if lines}

    def _z_score(self, num_tests: int) -> float:
        from scipy.stats import norm

        return float(norm.isf(self.alpha / num_tests))

    def _coverage_faults(self, index: int, z_score: float) -> list[str]:
        """Describe intervals that cover too little or too much of one coordinate, and values far from all draws."""
        from scipy.stats import norm

        found: list[str] = []
        for level in (0.9, 0.5):
            share, error = (float(column[index]) for column in self.coverage(level))
            edge = norm.isf((1 - level) / 2)
            least, most = (1 - 2 * norm.sf(edge * factor) for factor in (1 / self.tolerance, self.tolerance))
            if not found and (share + z_score * error < least or share - z_score * error > most):
                found.append(f"its {level:.0%} intervals cover {share:.0%} of the true values".replace("%", " %"))
        far = 0.0 if self.far_shares is None else float(self.far_shares[index])
        if far - z_score * (far * (1 - far) / len(self.ranks)) ** 0.5 > _MAX_FAR:
            found.append(
                f"wrong for some data, {100 * far:.0f} % of the true values lie more than {_FAR:.0f} standard "
                "deviations of q from its mean"
            )
        return found

    def ecdf_difference(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Compare the empirical distribution function (ECDF) of a quantity's ranks with the uniform one.

        Returns:
            points u, the ECDF at u minus u, the lower and the upper edge of its band, ``(L,)`` each. If q is exact, all
            quantities stay within their bands with probability 1 - ``alpha``.
        """
        cells = self.num_draws + 1
        points = np.arange(1, cells) / cells
        ecdf = np.bincount(self.ranks[:, index].numpy(), minlength=cells).cumsum()[:-1] / len(self.ranks)
        lower, upper = simultaneous_band(len(self.ranks), cells, 1 - self.alpha / len(self.names))
        return points, ecdf - points, lower - points, upper - points

    def coverage(self, level: float) -> tuple[Tensor, Tensor]:
        """Compute how often the central interval of q at ``level`` contains the truth, and the standard error.

        The ends of the interval are quantiles of the draws. A truth between the two draws around an end counts in part.

        Returns:
            the share of truths, ``(Q,)``, which is ``level`` if q is exact, and its standard error, ``(Q,)``.
        """
        if isinstance(level, bool) or not isinstance(level, float) or not 0 < level < 1:
            raise ValueError(f"`level` must be a number between 0 and 1, such as 0.9, got {level!r}")
        low, high = ((1 - level) / 2, (1 + level) / 2)
        start, width = self.ranks.double() / (self.num_draws + 1), 1 / (self.num_draws + 1)
        covered = ((start + width).clamp(max=high) - start.clamp(min=low)).clamp(min=0) / width
        return covered.mean(0), covered.std(0) / len(covered) ** 0.5

    @property
    def summary(self) -> str:
        """The coverage of the 90 % intervals of q, and its divergence from p(z | x) in nats."""
        shares, errors = (100 * column[:-1] for column in self.coverage(0.9))
        ends = [int(shares.argmin()), int(shares.argmax())]
        shown = [f"{float(shares[end]):.1f} ± {float(errors[end]):.1f} %" for end in ends]
        names = [self.names[end] for end in ends]
        range_ = f"{shown[0]} ({names[0]}) to {shown[1]} ({names[1]}) of the true values"
        covered = f"{shown[0]} of the true {names[0]}" if len(shares) == 1 else range_
        both = f"{self.divergence:.2f} ± {self.divergence_error:.2f} nats from p(z | x), both KL divergences together"
        return f"90 % intervals of q(z | x) cover {covered}" + ("" if math.isnan(self.divergence) else f"; q is {both}")

    @property
    def headline(self) -> str:
        """One line with the verdict, the coverage of 90 % intervals, and the divergence from the exact posterior."""
        simulated = f"{len(self.ranks)} data drawn from the model"
        if self.num_data_sets:
            simulated = f"{count_of(self.num_data_sets, 'data set')} drawn from the model"
        return f"{self.verdict}: {self.summary}; {simulated}, {self.num_draws} draws each"

    def _line(self) -> str:
        return self.headline

    def _table(self) -> Table:
        levels = (0.5, 0.9)
        coverages = [self.coverage(level) for level in levels]
        rows = []
        for index, name in enumerate(self.names):
            p = self.p_values[index].item()
            covered = [f"{share[index].item():.1%} ± {error[index].item():.1%}" for share, error in coverages]
            rows.append((name, f"{p:.2g}" if p >= 1e-4 else "< 0.0001", *covered))
        note = (
            f"The calibration is {self.headline}. The p-value tests whether q(z|x) is exact. A trained encoder is "
            "never exact, so its p-values are often small. A fault is reported if one common correction of all "
            "variances, or of all means, would clearly raise the ELBO, if intervals clearly cover another share than "
            "they should, or if q is far off for some of the data."
        )
        return Table(
            ("quantity", "p-value", *(f"coverage of the {level:.0%} interval" for level in levels)), rows, note
        )

    def __str__(self) -> str:
        return "\n".join([self.headline, *(f"  {name}: {fault}" for name, fault in self.faults.items())])


def _describe_errors(errors: Sequence[float], tolerance: float, z_score: float) -> list[str]:
    """Describe a ratio (with the error of its logarithm) and a bias that exceed the tolerance by ``z_score`` errors.

    The tolerated bias costs as many nats, in both KL divergences together, as the tolerated ratio of variances.
    """
    ratio, log_ratio_error, bias, bias_error = errors
    found = []
    if abs(math.log(ratio)) - z_score * log_ratio_error > math.log(tolerance):
        kind = "narrow" if ratio > 1 else "wide"
        found.append(f"too {kind}, the variance of q is {1 / ratio:.2f} times what it should be")
    if abs(bias) - z_score * bias_error > math.sqrt(max((tolerance + 1 / tolerance) / 2 - 1, 0.0)):
        found.append(f"biased, the mean of q is off by {abs(bias):.2f} of its standard deviations")
    return found


@report_of_ranks("calibrate")
@any_arguments
def calibrate(
    model: Function,
    guide: Function,
    *data: Data,
    num_simulations: int | None = None,
    num_draws: int = 99,
    refit: Mapping[str, Any] | None = None,
    processes: int | None = None,
    latents: Sequence[str] | None = None,
    tolerance: float = 2**0.5,
    alpha: float = 1e-3,
    plate: str = "data",
    seed: int = 0,
    progress: bool | None = None,
) -> Calibration:
    r"""Test a guide by simulation-based calibration, on data drawn from the model.

    Each simulation draws :math:`z^* \sim p(z)`, :math:`x^* \sim p(x \mid z^*)` and L times
    :math:`z_l \sim q(z \mid x^*)`. The rank of a quantity f is :math:`r = \#\{l : f(z_l, x^*) < f(z^*, x^*)\}`.

    A trained encoder is hardly ever exact, and enough simulations show it: the errors of its means are larger than its
    variances allow. That is a limit of the encoder and the family, which longer training does not remove.
    The verdict then is "approximate", with the coverage of 90 % intervals and the divergence in nats.
    :attr:`Calibration.faults` lists only deviations that the ranks make certain **and** that are larger: another
    variance or mean, the same for all data, would raise the ELBO on the given data, by more than a factor of
    ``tolerance``; intervals cover far from what they should; or q is far off for some of the data.

    The default tolerance :math:`\sqrt 2` is half way, on a log scale, between a sound q and a q of half the variance,
    whose factor is 2. At :math:`\sqrt 2` an interval of 90 % of a normal covers 83 %, and the two KL divergences add up
    to 0.06 nats per dimension; at 2 it covers 76 %, at 0.25 nats. At 1 all deviations of the ranks are faults.

    All results are averages over data, in which a few data with a wrong q can be hidden.
    :func:`pyro_vae.exact.inference.kl` has the KL divergence of each datum, where there is an exact answer.

    **One simulation is a row, or a data set.** Where all latents are local to the data plate and the guide is
    amortized, each simulated row is one, and nothing is fitted. Otherwise each is a whole data set, as where a latent
    is global. A guide whose q is fitted to the data, such as an autoguide, is fitted to each of them with the options
    ``refit``: the test is of the whole procedure, of the family of q and of its optimization alike. The model keeps its
    parameters. A guide that reads the data set with a network of its own needs no ``refit``. The cells of the plates
    that all sites share are independent, and each is a simulation: with three groups that share no latent, a data set
    has three.

    Args:
        model: a Pyro model.
        guide: its guide. Without ``refit`` it gives a q(z | x) of new data without being fitted to them. With it, each
            fit starts at its present parameters.
        data: arguments of both. They are the template of the simulations (their rows, repeated, where each row is one):
            covariates and the pattern of missing entries (NaN) stay, and observed values are simulated. Values that a
            model closes over are simulated as well; a guide must read data from its arguments.
        num_simulations: R, 10 or more; by default 1000, and 100 with ``refit``. Where each is a cell, as many data sets
            are drawn as have so many.
        num_draws: L for each simulation, 10 or more.
        refit: options of :func:`pyro_vae.fit` for a fit of the guide to each simulated data set, such as
            ``{"epochs": 1000, "lr": 0.01}``. Take those of the fit to the given data.
        processes: number of processes for the data sets, of one thread each; by default all processors. On several
            ranks it is that of each. The results are the same for each number. Where no process can be forked (on
            Windows and macOS, and with CUDA) there is one.
        latents: names of the latents to rank; by default those outside of the data plate or, without any, all. All
            latents count in log p(x, z). Fewer names make a sharper test, since ``alpha`` is that of all together.
        tolerance: the largest ratio of variances that is no fault, 1 or more.
        alpha: the probability of any false alarm if q is exact.
        plate, seed: name of the data plate, and seed of all draws and refits.
        progress: whether to show a progress bar; by default only on a terminal or in a notebook.

    Raises:
        ValueError: if a q does not depend on the data and ``refit`` is left out, if the model has values of its own for
            each datum, or if simulated values cannot reach the guide.
        FloatingPointError: if a refit meets a loss or gradient that is not finite, with the number of its data set.

    >>> from pyro_vae import VAE, fit, priors, guides, likelihoods, networks
    >>> net = networks.linear()
    >>> vae = VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> x = vae.generate(200)
    >>> before = calibrate(vae.model, vae.guide, x)
    >>> fitted = fit(vae.model, vae.guide, x, epochs=500, lr=1e-2, seed=0)
    >>> before.is_exact, calibrate(vae.model, vae.guide, x).faults
    (False, {})

    The global mean of a normal, whose exact q is known for each data set, and a fit of q to each of them:

    >>> import pyro
    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
    >>> def exact(x):
    ...     pyro.sample("mean", dist.Normal(x.sum() / (1 + len(x)), (1 + len(x)) ** -0.5))
    >>> calibrate(model, exact, torch.randn(8), num_simulations=200).verdict
    'sound'
    >>> from pyro.infer.autoguide import AutoNormal
    >>> options = {"epochs": 100, "lr": 0.05}
    >>> fitted = calibrate(model, AutoNormal(model), torch.randn(8), refit=options, num_simulations=10)
    >>> fitted.names, fitted.num_data_sets
    (('mean', 'log p(x, z)'), 10)
    """
    many = 1000 if refit is None else 100
    num_simulations = many if num_simulations is None else num_simulations
    _check_arguments(num_simulations, num_draws, tolerance, alpha)
    refit = None if refit is None else check_refit(refit)
    processes = default_processes() if processes is None else positive_int(processes, "processes")
    data = data_tensors(data, "data", model)
    function(guide, "guide")
    test = partial(Calibration, num_draws=num_draws, tolerance=float(tolerance), alpha=alpha)
    with scoped_param_store():
        with seeded(seed), torch.no_grad(), every_row(), evaluation_mode(model, guide):
            batches = ModelGuide.in_batches(model, guide, data, plate)
            pair = batches.first if refit is None and batches.first.by_rows else batches.whole()
        if refit is None and (pair.by_rows or plate not in ("data", *pair.plates)):
            return _by_rows(pair, data, num_simulations, num_draws, latents, seed, progress, test)
        if refit is None:
            with every_row():
                _check_reads_data(pair)
        return _by_data_sets(pair, num_simulations, num_draws, refit, processes, latents, seed, progress, test)


@torch.no_grad()
@without_training
def _by_rows(
    pair: ModelGuide,
    data: DataTensors,
    num_simulations: int,
    num_draws: int,
    latents: Sequence[str] | None,
    seed: int,
    progress: bool | None,
    test: Callable[..., Calibration],
) -> Calibration:
    """Calibrate an amortized guide on simulated rows like those of the data, each a simulation of its own.

    The pair has been run on the data, or on the first ones of many.
    """
    model, guide, plate = pair.model, pair.guide, pair.plate
    rows = num_simulations + min(num_simulations, len(data[0]))  # of the ranks, and of the corrections
    with seeded(seed), progress_bar("calibrate", progress, total=rows, unit="datum") as bar:
        p = ModelDensity(pair)  # first, since its errors are more precise than those of the next check
        names = _chosen(latents, p, list(p.latents))
        _check_local(pair)
        simulated, truth = _simulate(model, guide, data, num_simulations)
        _check_amortized(guide, simulated, plate)
        device = simulated[0].device

        def rank_batch(batch: tuple[tuple[Tensor, ...], Values]) -> SimulationResults:
            part, values = batch
            q = GuideDensity(ModelDensity(ModelGuide(model, guide, part, plate)))
            found = _rank_truth(q, values, num_draws, names)
            bar.advance(len(part[0]))
            return found

        # The simulation has the first random numbers.
        parts = in_chunks("calibrate", _batches(simulated, truth), rank_batch, device, seed, first=1)
        results = SimulationResults(*(torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True)))
        corrections = _elbo_corrections(
            model, guide, data, plate, num_simulations, num_draws, names, bar, seed, first=1 + len(parts)
        )
    return _tested(p, names, results, num_draws, corrections, test)


def _by_data_sets(
    pair: ModelGuide,
    num_simulations: int,
    num_draws: int,
    refit: Mapping[str, Any] | None,
    processes: int,
    latents: Sequence[str] | None,
    seed: int,
    progress: bool | None,
    test: Callable[..., Calibration],
) -> Calibration:
    """Calibrate a guide on simulated data sets, fitted to each; each cell of the units is a simulation of its own."""
    with seeded(seed), torch.no_grad(), every_row(), evaluation_mode(pair.model, pair.guide):
        refits = Refits(pair, refit, seed)
        p, q = densities(refits.model, pair.guide, pair.data, pair.plate)
        if not p.latents:
            raise ValueError(
                "`guide` must draw latents, whose ranks are tested, got one that draws none: those of the model, "
                f"{list(pair.latents)}, are summed out, and their posterior is exact"
            )
        names = _chosen(latents, p, [name for name in p.latents if not pair.is_local(p.latents[name])])

    def read(simulation: Simulation) -> list[np.ndarray]:
        ours = q.of_rows(p.on_data(simulation.data))
        truth = {name: p.layouts[name].to_cells(simulation.truth[name][None])[0] for name in p.latents}
        return [tensor.cpu().numpy() for tensor in _rank_truth(ours, truth, num_draws, names)]

    num_data_sets = -(-num_simulations // p.num_data)  # each of so many simulations
    with progress_bar("calibrate", progress, total=num_data_sets, unit="data set") as bar:
        found = run_in_processes(lambda number: refits.run(number, read), num_data_sets, processes, bar.advance)
    results = SimulationResults(*(torch.from_numpy(np.concatenate(part)) for part in zip(*found, strict=True)))
    return _tested(p, names, results, num_draws, None, test, num_data_sets)


def _chosen(latents: Sequence[str] | None, p: ModelDensity, default: list[str]) -> list[str]:
    """The names of the latents that are ranked: by default those outside of the data plate or, without any, all."""
    if latents is None:
        return default or list(p.latents)
    names = [latents] if isinstance(latents, str) else list(latents)
    if not names or any(name not in p.latents for name in names):
        raise ValueError(
            f"`latents` must be names of latents that the guide draws, of {list(p.latents)}, got {latents!r}"
        )
    return names


def _tested(
    p: ModelDensity,
    names: list[str],
    results: "SimulationResults",
    num_draws: int,
    corrections: CalibrationErrors | None,
    test: Callable[..., Calibration],
    num_data_sets: int = 0,
) -> Calibration:
    """Test the ranks, and assemble the result."""
    p_values = torch.tensor(
        [p_value(column.numpy(), num_draws + 1) for column in results.ranks.T], dtype=torch.float64, device="cpu"
    )
    divergence, error = results.excess.mean().item(), results.excess.std().item() / len(results.excess) ** 0.5
    far = (results.errors**2 > _FAR**2 * results.variances).double().mean(0).masked_fill(_is_discrete(p, names), 0.0)
    return test(
        names=_names(p, names),
        ranks=results.ranks,
        p_values=p_values,
        errors=_simulation_errors(results, num_draws),
        elbo_corrections=corrections,
        divergence=divergence,
        divergence_error=error,
        far_shares=far,
        num_data_sets=num_data_sets,
    )


def _check_reads_data(pair: ModelGuide) -> None:
    """Raise if the guide has some q that does not depend on the data: it is that of the given data alone."""
    drawn = latent_sites(pair.guide_trace)
    others = tuple(
        tensor.flip(0) + 0.5 + tensor.nan_to_num().abs() if tensor.is_floating_point() else tensor.flip(0)
        for tensor in pair.data
    )
    with poutine.block(), torch.no_grad(), seeded(0), pyro.validation_enabled(False):
        again = latent_sites(poutine.trace(poutine.replay(pair.guide, pair.guide_trace)).get_trace(*others))
    if fixed := [name for name in drawn if torch.allclose(log_density(drawn[name]), log_density(again[name]))]:
        shown = [name for name in fixed if name in pair.latents] or sorted(pair.latents)
        raise ValueError(
            f'`refit` must be options of `pv.fit`, such as {{"epochs": 1000, "lr": 0.01}}, where q does not depend on '
            f"the data, got none, and such a q of {shown}, fitted to the given data: simulated data need a new fit"
        )


def _check_arguments(num_simulations: int, num_draws: int, tolerance: float, alpha: float) -> None:
    for name, value in (("num_simulations", num_simulations), ("num_draws", num_draws)):
        if positive_int(value, name) < 10:
            raise ValueError(f"`{name}` must be 10 or more, for a test of uniform ranks, got {value}")
    if positive(tolerance, "tolerance") < 1:
        raise ValueError(f"`tolerance` must be a factor of 1 or more, got {tolerance!r}")
    if not positive(alpha, "alpha") < 1:
        raise ValueError(f"`alpha` must be a probability between 0 and 1, got {alpha!r}")


def _check_local(pair: ModelGuide) -> None:
    if not pair.is_amortized("model"):
        raise ValueError(
            "`model` must have a p(x, z) of each datum that depends on that datum alone, got one that depends on other "
            "rows or on values that the model has for each row, such as a covariate indexed by the plate: simulated "
            "data have no such values. Pass covariates as data"
        )


def _check_amortized(guide: Function, data: tuple[Tensor, ...], plate: str) -> None:
    if not is_amortized(guide, data, plate):
        raise ValueError(
            "`guide` must be amortized, such as guides.DiagonalNormal in evaluation mode, got a q(z | x) of a datum "
            "that depends on more than that datum, such as free parameters for each datum: simulated data have none. "
            "Compare other guides with pyro_vae.exact.inference.posterior or pyro_vae.reference"
        )


def _simulate(
    model: Function, guide: Function, data: tuple[Tensor, ...], num: int
) -> tuple[tuple[Tensor, ...], Values]:
    """Draw data of ``num`` rows from the model, like the given ones, with the latents that they were drawn from."""
    count, index = len(data[0]), torch.arange(num, device=data[0].device)
    rows = index * count // num if num < count else index % count
    simulator = Simulator(model, guide, tuple(tensor[rows] for tensor in data))
    if others := [name for name in simulator.shapes if name not in simulator.places]:
        raise ValueError(
            f"`model` must observe one of its {len(data)} data tensors, unchanged, at {others[0]!r}, as in `obs=x`, "
            "got values that are equal to none of them. With `refit`, it may observe others"
        )
    simulation = simulator.draw(check=True)
    return simulation.data, simulation.truth


def _batches(data: tuple[Tensor, ...], truth: Values) -> Iterator[tuple[tuple[Tensor, ...], Values]]:
    for first in range(0, len(data[0]), _BATCH):
        rows = slice(first, first + _BATCH)
        yield tuple(tensor[rows] for tensor in data), {name: value[rows] for name, value in truth.items()}


class SimulationResults(NamedTuple):
    """The truth compared with draws of q, for N simulated data."""

    ranks: Tensor  # of the truth, (N, Q)
    errors: Tensor  # the truth minus the mean of the draws, (N, D)
    variances: Tensor  # of the draws, (N, D)
    excess: Tensor  # log p(x, z) - log q(z | x) at the truth minus its mean over the draws, (N,)


def _rank_truth(q: GuideDensity, truth: Values, count: int, names: Sequence[str]) -> SimulationResults:
    """Compare the truth, ``(N, ...)``, with draws of q, in all coordinates of these latents and in log p(x, z)."""
    p = q.p
    draws, log_q = q.sample(count)
    chunks = range(0, count, p.chunk)
    log_p = torch.cat([p.log_joint({name: v[i : i + p.chunk] for name, v in draws.items()}) for i in chunks]).double()
    at_truth = {name: value[None] for name, value in truth.items()}
    true_log_p = p.log_joint(at_truth)[0].double()
    true_log_q = torch.full_like(true_log_p, math.nan)
    if q.has_any_density:
        with pyro.validation_enabled(False):  # the truth may lie where q has no density
            true_log_q = q.log_prob(at_truth)[0].double().nan_to_num(nan=-math.inf, neginf=-math.inf, posinf=math.inf)
    values = torch.cat([_coordinates(p, draws, names), log_p[..., None]], -1)
    true = torch.cat([_coordinates(p, at_truth, names)[0], true_log_p[:, None]], -1)
    ties = (values == true).sum(0)
    ranks = (values < true).sum(0) + (torch.rand(ties.shape, device=ties.device) * (ties + 1)).long().clamp(max=ties)
    excess = (true_log_p - true_log_q) - (log_p - log_q.double()).mean(0)
    return SimulationResults(ranks, (true - values.mean(0))[:, :-1], values.var(0)[:, :-1], excess)


def _coordinates(p: ModelDensity, values: Values, names: Sequence[str]) -> Tensor:
    """These latents in unconstrained coordinates, ``(C, N, D)``."""
    return _concatenate(_unconstrained(p.latents[name]["fn"], values[name]) for name in names)


def _concatenate(values: Iterable[Tensor]) -> Tensor:
    """Concatenate values ``(C, N, ...)`` to ``(C, N, D)``."""
    return torch.cat([value.detach().reshape(*value.shape[:2], -1).double() for value in values], -1)


def _unconstrained(fn: Any, value: Tensor) -> Tensor:
    """Map values ``(C, N, *event)`` to the reals, or classes to indicators, ``(C, N, *shape)``."""
    if not fn.support.is_discrete:
        return biject_to(fn.support).inv(value)
    base = base_distribution(fn)
    return one_hot(value.long(), base.probs.shape[-1]) if isinstance(base, dist.Categorical) else value


def _names(p: ModelDensity, latents: Sequence[str]) -> tuple[str, ...]:
    names: list[str] = []
    for name, shape in _shapes(p, latents).items():
        names += [f"{name}{list(place)}" if shape else name for place in np.ndindex(*shape)]
    return (*names, JOINT)


def _shapes(p: ModelDensity, names: Sequence[str]) -> dict[str, torch.Size]:
    """The shape of each latent, of one datum, in unconstrained coordinates."""
    values = {name: p.layouts[name].to_cells(p.latents[name]["value"][None]) for name in names}
    return {name: _unconstrained(p.latents[name]["fn"], value).shape[2:] for name, value in values.items()}


def _is_discrete(p: ModelDensity, names: Sequence[str]) -> Tensor:
    """Whether each coordinate is of a discrete latent, ``(D,)``."""
    each = [
        torch.full((shape.numel(),), p.latents[name]["fn"].support.is_discrete, device="cpu")
        for name, shape in _shapes(p, names).items()
    ]
    return torch.cat(each)


def _simulation_errors(results: SimulationResults, num_draws: int) -> CalibrationErrors:
    """Compare the distances of the truth from the mean of the draws with the variance of the draws."""
    num, errors, variances = len(results.errors), results.errors, results.variances
    scale, centre = variances.mean(0), errors.mean(0)
    squared = (errors - centre) ** 2 * num / (num - 1) - variances / num_draws  # less the variance of the draws' mean
    mean_squared = squared.mean(0)
    constant = (scale == 0) & (mean_squared == 0)
    ratio = torch.where(constant, 1.0, (mean_squared / scale).clamp(1e-9, 1e9))
    influence = torch.where(constant, 0.0, (squared - ratio * variances) / mean_squared.abs().clamp(min=1e-300))
    deviation = scale.clamp(min=1e-300).sqrt()
    reliable = (squared.sum(0) ** 2 >= _EFFECTIVE * (squared**2).sum(0)) & ~constant & (scale > 0)
    return _with_overall(ratio, influence, centre / deviation, errors.std(0) / deviation / num**0.5, reliable)


def _elbo_corrections(
    model: Function,
    guide: Function,
    data: tuple[Tensor, ...],
    plate: str,
    num: int,
    num_draws: int,
    names: Sequence[str],
    bar: Progress,
    seed: int,
    first: int,
) -> CalibrationErrors | None:
    """Compute what would make the ELBO stationary, from gradients of log p(x, z) on at most ``num`` of the data."""
    if len(data[0]) == 1:
        return None  # standard errors come from the spread over data
    rows = torch.arange(min(num, len(data[0])), device=data[0].device) * len(data[0]) // min(num, len(data[0]))

    def correct(batch: tuple[tuple[Tensor, ...], Values]) -> tuple[Tensor, Tensor] | None:
        part, _ = batch
        p = ModelDensity(ModelGuide(model, guide, part, plate))
        if any(site["fn"].support.is_discrete for site in p.latents.values()):
            return None
        z, gradients = _gradients(p, GuideDensity(p).sample(num_draws)[0], names)
        h = -(gradients * (z - z.mean(0))).sum(0) / (num_draws - 1)
        bar.advance(len(part[0]))
        return h, gradients.mean(0) * z.std(0)

    batches = _batches(tuple(tensor[rows] for tensor in data), {})
    parts = [part for part in in_chunks("calibrate", batches, correct, rows.device, seed, first) if part is not None]
    if not parts:
        return None
    h, slope = (torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True))  # (N, D); slope per deviation of q
    mean = h.mean(0).clamp(1e-9, 1e9)
    bias_error = slope.std(0) / mean / len(slope) ** 0.5
    return _with_overall(1 / mean, -(h - mean) / mean, slope.mean(0) / mean, bias_error, torch.ones_like(mean).bool())


def _gradients(p: ModelDensity, draws: Values, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Draws in unconstrained coordinates, and the gradients of log p(x, z) in them, ``(C, N, D)`` each."""
    maps = {name: biject_to(site["fn"].support) for name, site in p.latents.items()}
    parts = []
    for first in range(0, len(next(iter(draws.values()))), p.chunk):
        values = {name: maps[name].inv(draws[name][first : first + p.chunk]).detach() for name in maps}
        with torch.enable_grad():
            values = {name: value.requires_grad_() for name, value in values.items()}
            sites = {name: maps[name](value) for name, value in values.items()}
            log_p = p.log_joint(sites).sum()
            log_p = log_p + sum(maps[name].log_abs_det_jacobian(values[name], sites[name]).sum() for name in maps)
            gradients = torch.autograd.grad(log_p, list(values.values()))
        of = dict(zip(values, gradients, strict=True))
        parts.append((_concatenate(values[name] for name in names), _concatenate(of[name] for name in names)))
    z, slopes = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return z, slopes


def _with_overall(
    ratio: Tensor, influence: Tensor, bias: Tensor, bias_error: Tensor, reliable: Tensor
) -> CalibrationErrors:
    """Add the overall errors, over the reliable coordinates. The influence of each datum on a ratio is ``(N, D)``."""
    log_ratio_error = influence.std(0) / len(influence) ** 0.5
    overall = (1.0, 0.0, 0.0, 0.0)
    if reliable.any():
        chance = float((bias_error[reliable] ** 2).mean())
        size = max(float((bias[reliable] ** 2).mean()) - chance, 0.0) ** 0.5
        error = float((bias * bias_error)[reliable].norm()) / int(reliable.sum()) / size if size else 0.0
        # The errors of the coordinates may be correlated: take the spread over data of the mean influence.
        ratio_error = float(influence[:, reliable].mean(1).std()) / len(influence) ** 0.5
        mean_ratio = math.exp(float(ratio[reliable].log().mean()))
        overall = (mean_ratio, ratio_error, size, max(error, (chance / len(bias)) ** 0.5))
    return CalibrationErrors(ratio, log_ratio_error, bias, bias_error, overall)
