"""Variational autoencoders and other latent-variable models in Pyro, compared with the exact answer.

The public names are imported when they are first used; ``__init__.pyi`` lists where each one comes from.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
