"""The variational autoencoder: a prior, a decoder and an encoder as a Pyro model and guide."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae._utils.display import Result, Table, count_of
from pyro_vae._utils.module_state import evaluation_mode
from pyro_vae._utils.param_store import register, without_training
from pyro_vae._utils.ranks import ranks
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.validation import boolean, describe, nonempty_string, positive_int
from pyro_vae.distributions.properties import same_support, spell_support
from pyro_vae.parts.base import Part
from pyro_vae.saving import model_file
from pyro_vae.saving.files import FileFormatError

__all__ = ["VAE"]

_numbers = count(1)
_ROWS = 3  # on which the parts are tried


class VAE(Result, nn.Module):
    r"""A generative model and its guide.

    .. math:: z_i \sim p(z),\quad x_i \sim p(x \mid z_i)\qquad\text{and}\qquad z_i \sim q(z \mid x_i),
              \quad i = 1, \dots, N.

    ``model`` and ``guide`` are plain Pyro functions of the data ``x``, ``(N, *data_shape)``, for SVI, ``Predictive``,
    ``poutine`` or NUTS. Sites are ``z`` and ``x`` in the plate ``data``, and ``code``, the decoder's input, if not z.
    :meth:`generate`, :meth:`reconstruct` and :meth:`impute` run in evaluation mode.

    **Covariates.** With ``context=C``, model and guide are functions of x and of covariates c, ``(N, C)``: a design
    matrix, one-hot batches or labels. Each part reads c behind its own input,

    .. math:: z_i \sim p(z),\quad x_i \sim p(x \mid z_i, c_i)\qquad\text{and}\qquad z_i \sim q(z \mid x_i, c_i),

    so the encoder takes D + C numbers, the flat x and c, and the decoder those of the code and c. A prior that is a
    :class:`pyro_vae.parts.base.Conditional` of C numbers is :math:`p(z \mid c)`. Nothing models c itself.

    Args:
        prior: part without a context, such as :class:`pyro_vae.parts.priors.StandardNormal`; or one with the context c.
        encoder: part with the context x, such as :class:`pyro_vae.parts.guides.DiagonalNormal`.
        decoder: part with the context ``prior.read(z)``, which is z for most priors, such as
            :class:`pyro_vae.parts.likelihoods.Normal`.
        name: prefix of the parameters in Pyro's param store; by default unique in the process.
        context: C, the number of covariates of a datum; none by default.
        table: a :class:`pyro_vae.tables.Table`, whose encoding is kept and saved with the model, without its rows.

    Raises:
        ValueError: if the parts do not fit: different event shapes or supports, or a density and a mass.

    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> net = networks.mlp([32])
    >>> vae = VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> from pyro import infer, optim
    >>> svi = infer.SVI(vae.model, vae.guide, optim.Adam({"lr": 4e-3}), infer.Trace_ELBO())
    >>> loss = svi.step(torch.randn(100, 2))

    With three covariates of each datum:

    >>> encoder, decoder = guides.DiagonalNormal(2 + 3, 1, net), likelihoods.Normal(1 + 3, 2, net)
    >>> vae = VAE(priors.StandardNormal(1), encoder, decoder, context=3)
    >>> x, c = torch.randn(100, 2), torch.eye(3)[torch.arange(100) % 3]
    >>> loss = infer.SVI(vae.model, vae.guide, optim.Adam({"lr": 4e-3}), infer.Trace_ELBO()).step(x, c)
    """

    def __init__(
        self,
        prior: nn.Module,
        encoder: nn.Module,
        decoder: nn.Module,
        name: str | None = None,
        context: int | None = None,
        table: Any = None,
    ):
        super().__init__()
        roles = {"prior": ("priors", prior), "encoder": ("guides", encoder), "decoder": ("likelihoods", decoder)}
        for role, (chapter, part) in roles.items():
            if not isinstance(part, nn.Module):
                must = f"a module that returns a distribution, such as those of pyro_vae.{chapter}"
                raise TypeError(f"`{role}` must be {must}, got {describe(part)}")
        self.encoder = encoder  # first, so that parameters shared with the prior have the encoder's names
        self.prior, self.decoder = prior, decoder
        self.name = f"vae{next(_numbers)}" if name is None else nonempty_string(name, "name")
        self.context = None if context is None else positive_int(context, "context")
        without_rows = getattr(table, "without_rows", None) if isinstance(table, nn.Module) else None
        if table is not None and without_rows is None:
            must = "a table, such as pv.tables.Table.from_frame(frame)"
            raise TypeError(f"`table` must be {must}, got {describe(table)}")
        self.table: Any = without_rows and without_rows()
        self.data_shape: torch.Size
        self._validate_parts()

    def __getstate__(self) -> dict[str, Any]:
        """The attributes, without weak references of Pyro to parameters, which pickle refuses and Pyro sets again."""
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)
        return vars(self).copy()

    def _parts(self) -> Iterator[tuple[str, str, str, int]]:
        """For each part: role, name, shapes of context and value, and number of its parameters."""
        for role in ("prior", "encoder", "decoder"):
            part = getattr(self, role)
            context, value = getattr(part, "context_shape", None), getattr(part, "event_shape", None)
            if role == "decoder":
                value = self.data_shape
            shown = " → ".join(_spell_shape(shape) for shape in (context, value) if shape is not None)
            yield role, type(part).__name__, shown, sum(parameter.numel() for parameter in part.parameters())

    def _total(self) -> str:
        """The number of all parameters, with dtype and device."""
        parameters = list(self.parameters())
        total = count_of(sum(parameter.numel() for parameter in parameters), "parameter")
        kinds = {f"{str(each.dtype).removeprefix('torch.')} on {each.device}" for each in parameters}
        return f"{total} in all, {' and '.join(sorted(kinds))}" if kinds else total

    def _line(self) -> str:
        parts = [f"{r}: {part}({shape}), {count_of(n, 'parameter')}" for r, part, shape, n in self._parts()]
        covariates = [] if self.context is None else [f"context: {count_of(self.context, 'covariate')}"]
        return "\n".join([*parts, *covariates, self._total()])

    def _table(self) -> Table:
        rows = [(role, part, shape, f"{number:,}") for role, part, shape, number in self._parts()]
        covariates = "" if self.context is None else f" Model and guide take {count_of(self.context, 'covariate')}."
        return Table(("role", "part", "shape", "parameters"), rows, f"{self._total()}.{covariates}")

    def __setstate__(self, state: dict) -> None:
        """A copy has parameters of its own, and so a name of its own."""
        super().__setstate__(state)
        self.name = f"{self.name}_copy{next(_numbers)}"

    def model(self, x: Tensor, context: Tensor | None = None) -> None:
        """The generative model, p(x, z), or p(x, z | c) with covariates, ``(N, C)``, or ``(1, C)`` for all rows."""
        self._check_rows(x, context)
        self.register()
        with pyro.plate("data", len(x)):
            x, context = self._subsample(x, context)
            z = pyro.sample("z", self._prior(context))
            pyro.sample("x", self.decoder(self._with_context(self._read(z, context), context)), obs=x)

    def guide(self, x: Tensor, context: Tensor | None = None) -> None:
        """The approximate posterior, q(z | x), or q(z | x, c) with covariates."""
        self._check_rows(x, context)
        self.register()
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoder(self.encoder_input(*self._subsample(x, context))))

    def _subsample(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The rows of the data plate's subsample."""
        x = pyro.subsample(x, event_dim=len(self.data_shape))
        return x, None if context is None else pyro.subsample(context, event_dim=1)

    def _check_rows(self, x: Tensor, context: Tensor | None) -> None:
        shape = ", ".join(map(str, self.data_shape))
        if not isinstance(x, Tensor):
            raise TypeError(f"`x` must be a tensor, (N, {shape}), got {describe(x)}")
        if x.shape[1:] != self.data_shape:
            raise ValueError(f"`x` must be (N, {shape}), as the decoder returns, got shape {tuple(x.shape)}")
        if not len(x):
            raise ValueError(f"`x` must be (N, {shape}) with N >= 1, got shape {tuple(x.shape)}, without rows")
        if x.dtype == torch.bool or x.is_complex():
            raise TypeError(f"`x` must be real numbers (convert booleans with `x.float()`), got {describe(x)}")
        self._check_context(context)
        if context is not None and (context.dim() != 2 or len(context) not in (1, len(x))):
            must = f"({len(x)}, {self.context}), the covariates of each row of x, or one row for all"
            raise ValueError(f"`context` must be {must}, got shape {tuple(context.shape)}")

    def _check_context(self, context: Tensor | None) -> None:
        if self.context is None:
            if context is not None:
                raise TypeError(
                    f"`context` must be left out for a VAE without covariates, `VAE(..., context=C)`, got "
                    f"{describe(context)}"
                )
        elif not isinstance(context, Tensor):
            got = "none" if context is None else describe(context)
            raise TypeError(f"`context` must be a tensor (N, {self.context}), the covariates of the VAE, got {got}")
        elif not context.is_floating_point() or context.shape[-1:] != (self.context,):
            must = f"floats (N, {self.context}), the covariates of the VAE"
            raise ValueError(f"`context` must be {must}, got {describe(context)}")

    def forward(self, *args: Any) -> None:
        """Raise a TypeError: a VAE is a pair of functions."""
        raise TypeError("a VAE is not a function but a pair of functions: pass `vae.model` and `vae.guide`")

    def register(self) -> None:
        """Register the parameters with Pyro under the VAE's name, see :func:`pyro_vae._utils.param_store.register`."""
        register(self.name, self)

    def _prior(self, context: Tensor | None) -> Any:
        """p(z), or p(z | c) of each row if the prior is a part with a context."""
        return self.prior(context) if hasattr(self.prior, "context_shape") else self.prior()

    def _read(self, z: Tensor, context: Tensor | None) -> Tensor:
        code = self.code(z)
        return code if code is z else pyro.deterministic("code", code, event_dim=self._prior(context).event_dim)

    def encoder_input(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """What the encoder reads of data ``x``, ``(*, *data_shape)``: x, or with covariates the flat x and c."""
        return x if context is None else _join(x.flatten(x.dim() - len(self.data_shape)), context)

    def _with_context(self, code: Tensor, context: Tensor | None) -> Tensor:
        """What the decoder reads: the code, or with covariates the flat code and c."""
        return code if context is None else _join(code.flatten(code.dim() - self._latent_dims), context)

    def code(self, z: Tensor) -> Tensor:
        """The input of the decoder at values of the site ``z``: for a relaxed latent, its sigmoid or exponential."""
        if not isinstance(z, Tensor):
            raise TypeError(f"`z` must be a tensor, such as a draw of the site, got {describe(z)}")
        read = getattr(self.prior, "read", None)
        return z if read is None else read(z)

    def discrete(self) -> "VAE":
        """The discrete VAE that a relaxed one approximates. It shares the parameters: training one trains the other.

        Buffers, such as fixed probabilities, are the current ones: convert dtype or device first.

        >>> from pyro_vae import priors, guides, likelihoods, networks
        >>> prior, encoder = priors.RelaxedBernoulli(1, 0.5), guides.RelaxedBernoulli(2, 1, networks.mlp([32]), 0.66)
        >>> relaxed = VAE(prior, encoder, likelihoods.Normal(1, 2, networks.linear()))
        >>> relaxed.discrete().prior().has_enumerate_support
        True
        """
        twins = []
        for role, part in (("prior", self.prior), ("encoder", self.encoder)):
            if not isinstance(part, Part):
                got = f"{type(part).__name__}, which has no discrete twin"
                raise TypeError(f"`{role}` must be a Part with `discrete()`, got {got}")
            twins.append(part.discrete())
        prior, encoder = twins
        return VAE(prior, encoder, self.decoder, self.name, self.context, self.table)

    def encode(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """q(z | x) of each row of ``x``, ``(*, *data_shape)``; q(z | x, c) with covariates, ``(*, C)``."""
        self._check_context(context)
        return self.encoder(self.encoder_input(x, context))

    def decode(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """p(x | z) at values of the site ``z``; p(x | z, c) with covariates, ``(*, C)``."""
        self._check_context(context)
        return self.decoder(self._with_context(self.code(z), context))

    @torch.no_grad()
    @without_training
    def reconstruct(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The mean of p(x | z) at one draw z ~ q(z | x) for each row."""
        return self.decode(self.encode(x, context).sample(), context).mean

    @torch.no_grad()
    @without_training
    def generate(self, num_samples: int, mean: bool = False, context: Tensor | None = None) -> Tensor:
        """``num_samples`` new data x ~ p(x), or with ``mean`` the means of p(x | z) at z ~ p(z).

        Args:
            context: the covariates of the new data, ``(num_samples, C)``, or ``(C,)`` for all of them.
        """
        boolean(mean, "mean")
        shape = torch.Size([positive_int(num_samples, "num_samples")])
        self._check_context(context)
        if context is not None:
            if context.shape[:-1] not in ((), shape):
                must = f"({num_samples}, {self.context}) or ({self.context},), for {num_samples} new data"
                raise ValueError(f"`context` must be {must}, got shape {tuple(context.shape)}")
            context = context.expand(num_samples, -1)
        prior = self._prior(context)
        p = self.decode(prior.sample() if prior.batch_shape else prior.sample(shape), context)
        return p.mean if mean else p.sample()

    @torch.no_grad()
    @without_training
    def impute(self, x: Tensor, num_samples: int, context: Tensor | None = None) -> Tensor:
        r"""Draws of the missing entries of x, NaN, given the observed ones: :math:`z \sim q(z \mid x_\mathrm{obs})`,
        :math:`x_\mathrm{mis} \sim p(x_\mathrm{mis} \mid z)`.

        Their mean is a point estimate, and their quantiles are an interval; exact where q is the posterior.

        Args:
            x: ``(N, *data_shape)``, with NaN where entries are missing.
            context: the covariates, ``(N, C)``.

        Returns:
            ``(num_samples, N, *data_shape)``. Observed entries are those of x in every draw.

        Source: Rezende, Mohamed and Wierstra 2014, "Stochastic backpropagation", appendix F: the first step of its
        Markov chain, from an encoder that reads missing entries.

        >>> from pyro_vae import priors, guides, likelihoods, networks
        >>> encoder = guides.DiagonalNormal(2, 1, networks.with_missing(networks.mlp([32])))
        >>> vae = VAE(priors.StandardNormal(1), encoder, likelihoods.Normal(1, 2, networks.linear(), missing=True))
        >>> vae.impute(torch.tensor([[0.5, torch.nan]]), num_samples=100)[:, 0, 0].unique()
        tensor([0.5000])
        """
        positive_int(num_samples, "num_samples")
        self._check_rows(x, context)
        drawn = self.decode(self.encode(x, context).sample(torch.Size([num_samples])), context).sample()
        return torch.where(x.isnan(), drawn, x)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the VAE to a file that :meth:`load` and ``torch.load`` read.

        The file has all parts as they are now: parameters and buffers (the temperature is one) in their dtypes, frozen
        parameters, training and evaluation modes, what parts share, and modules of your own. It is written whole or not
        at all, with a checksum. A slice of a tensor is stored with the whole tensor, as in ``torch.save``: clone it.
        Of several ranks, all of which call this, rank 0 writes the file.

        Args:
            path: the file, such as ``"model.pt"``. A file that is there is replaced.

        Raises:
            ValueError: if an attribute cannot be stored, such as a lambda. Classes and functions of your own are stored
                by name, so they must be at the top level of a Python module.
        """
        ranks().on_first("save", lambda: model_file.save(path, self))

    @staticmethod
    def load(path: str | os.PathLike[str], map_location: Any = None, using: Iterable[Any] = ()) -> "VAE":
        """Return the VAE that :meth:`save` wrote: the same densities to the bit, in another process or device.

        It has a new name in Pyro's param store, so that its parameters are not mixed up with those of another VAE from
        the same file. The file cannot run code, see :mod:`pyro_vae.saving.model_file`.

        Args:
            map_location: where parameters and buffers go, as in ``torch.load``; the CPU if left out.
            using: your own classes of modules, and functions that they store, found by their names.

        Raises:
            FileFormatError: if the file is damaged, or no model file, or does more than describe a model.
            FileNotFoundError: if there is no such file.
            ValueError: if a class or function is missing in ``using``.

        >>> import tempfile
        >>> from pyro_vae import priors, guides, likelihoods, networks
        >>> prior, encoder = priors.MixtureOfNormals(2, 3), guides.DiagonalNormal(5, 2, networks.mlp([32]))
        >>> vae = VAE(prior, encoder, likelihoods.Normal(2, 5, networks.mlp([32])))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vae.save(f"{folder}/model.pt")
        ...     again = VAE.load(f"{folder}/model.pt")
        >>> torch.equal(again.prior().log_prob(torch.zeros(2)), vae.prior().log_prob(torch.zeros(2)))
        True
        """
        vae = model_file.load(path, VAE, map_location, using)
        found = [getattr(vae, name, None) for name in ("prior", "encoder", "decoder", "data_shape")]
        if not all(map(isinstance, found, [nn.Module, nn.Module, nn.Module, torch.Size])):
            raise FileFormatError(f"`path` must be a model file: the VAE in {os.fspath(path)!r} lacks parts")
        vae.name = f"vae{next(_numbers)}"
        return vae

    def _validate_parts(self) -> None:
        """Run the parts once, check that they fit, and find the shape of a datum."""
        with torch.no_grad(), seeded(0), evaluation_mode(self):
            rows = self._check_prior()
            context = None if self.context is None else rows.new_zeros(_ROWS, self.context)
            prior = self._prior(context)
            self._latent_dims = prior.event_dim
            read = self._with_context(self.code(rows), context)
            likelihood = self._run_part("decoder", self.decoder, read, "prior", self.prior)
            self.data_shape = likelihood.event_shape
            read = self.encoder_input(likelihood.sample(), context)
            self._check_guide(self._run_part("encoder", self.encoder, read, "decoder", self.decoder), prior)

    def _check_prior(self) -> Tensor:
        """Raise if the prior is no p(z), or p(z | c) of three rows; else return values of z for three rows."""
        if not hasattr(self.prior, "context_shape"):
            with _error_context(f"`prior` must return p(z) without a context, got {_name(self.prior)}"):
                prior = _distribution(self.prior())
            if prior.batch_shape:
                got = f"{_name(self.prior)} of batch shape {tuple(prior.batch_shape)}"
                raise ValueError(f"`prior` must have an empty batch shape (use `.to_event()`), got {got}")
            return prior.sample(torch.Size([_ROWS]))
        shape: Any = self.prior.context_shape
        if self.context is None or shape != (self.context,):
            got = f"{_name(self.prior)}, which takes {tuple(shape)}"
            have = "no context, or covariates `VAE(..., context=C)`" if self.context is None else f"({self.context},)"
            raise ValueError(f"`prior` must take {have}, got {got}")
        device = next((tensor.device for tensor in (*self.prior.parameters(), *self.prior.buffers())), None)
        with _error_context(f"`prior` must return p(z | c), got {_name(self.prior)}"):
            return _distribution(self.prior(torch.zeros(_ROWS, self.context, device=device))).sample()

    def _run_part(self, role: str, part: nn.Module, context: Tensor, source: str, maker: nn.Module) -> Any:
        given = context.shape[1:]
        accepted = getattr(part, "context_shape", given)
        origin = f"the {source} {_name(maker)}" + ("" if self.context is None else f" and {self.context} covariates")
        must = f"`{role}` must take shape {tuple(given)} from {origin}, got {_name(part)}"
        if accepted != given:
            size = "latent" if role == "decoder" else "in_features"
            fitting = given[0] if len(given) == 1 else tuple(given)
            raise ValueError(f"{must}, which takes {tuple(accepted)}. What would fit: {size}={fitting}")
        num_data = getattr(part, "num_data", None)  # of a guide with parameters for each datum
        context = context[:num_data]
        with _error_context(must):
            if num_data is None:
                distribution = _distribution(part(context))
            else:
                rows = torch.arange(len(context), device=context.device)
                with poutine.block(), pyro.plate("validation", num_data, subsample=rows):
                    distribution = _distribution(part(context))
        if distribution.batch_shape != context.shape[:1]:
            must = f"have batch shape ({len(context)},) for {len(context)} data (use `.to_event()`)"
            got = f"{_name(part)} of batch shape {tuple(distribution.batch_shape)}"
            raise ValueError(f"`{role}` must {must}, got {got}")
        return distribution

    def _check_guide(self, guide: Any, prior: Any) -> None:
        if guide.event_shape == prior.event_shape and same_support(guide, prior):
            return
        kinds = ["mass" if q.support.is_discrete else "density" for q in (guide, prior)]
        partner = getattr(getattr(self.prior, "family", None), "fitting_guide", None)
        shape = prior.event_shape[0] if len(prior.event_shape) == 1 else tuple(prior.event_shape)
        hint = f" What would fit: guides.{partner}(latent={shape}, ...)" if partner else ""
        raise ValueError(
            f"`encoder` must be of one kind, shape and support with the prior, for log p(z) - log q(z | x); got a "
            f"{kinds[0]} of shape {tuple(guide.event_shape)} on {spell_support(guide)}, {_name(self.encoder)}, and "
            f"{_name(self.prior)}, a {kinds[1]} of shape {tuple(prior.event_shape)} on {spell_support(prior)}.{hint}"
        )


def _join(inputs: Tensor, context: Tensor) -> Tensor:
    """Put the covariates ``(*, C)`` behind inputs ``(*, D)``; further dimensions on the left of one fit the other.

    >>> _join(torch.zeros(5, 3, 2), torch.ones(3, 4)).shape
    torch.Size([5, 3, 6])
    """
    shape = torch.broadcast_shapes(inputs.shape[:-1], context.shape[:-1])
    return torch.cat([inputs.expand(*shape, -1), context.expand(*shape, -1)], dim=-1)


def _spell_shape(shape: Sequence[int]) -> str:
    """Spell a shape as in the arguments of parts: 64, or (3, 8, 8)."""
    return str(shape[0]) if len(shape) == 1 else str(tuple(shape))


def _name(part: nn.Module) -> str:
    return f"{type(part).__module__.rpartition('.')[2]}.{type(part).__name__}"


def _distribution(made: Any) -> Any:
    if not isinstance(made, torch.distributions.Distribution):
        raise TypeError(f"it returns {describe(made)} in place of a distribution")
    return made


@contextmanager
def _error_context(message: str) -> Iterator[None]:
    """Put this message before that of an error inside."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{message}: {error}") from error
