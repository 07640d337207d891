"""Many runs of ``fit`` over priors, guides, objectives, seeds and settings, on Ray Tune or Optuna.

* :func:`pyro_vae.sweep` trains and compares: :mod:`pyro_vae.sweeps.sweep`;
* ranges of settings: :mod:`pyro_vae.sweeps.space`;
* its result: :mod:`pyro_vae.sweeps.result`;
* one run of it, and its files: :mod:`pyro_vae.sweeps.run`.

The engines are :mod:`pyro_vae.sweeps.ray_engine` and :mod:`pyro_vae.sweeps.optuna_engine`: they start processes, start
those again that were killed, and end bad runs early.
"""

from pyro_vae.sweeps.result import Sweep
from pyro_vae.sweeps.space import Range, integers, log_uniform, uniform

__all__ = ["Range", "Sweep", "integers", "log_uniform", "uniform"]
