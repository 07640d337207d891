"""Variational autoencoders and other latent-variable models in Pyro, compared with the exact answer.

The public names are imported when they are first used; ``__init__.pyi`` lists where each one comes from.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import lazy_loader

from pyro_vae._utils.rank_process import mark_process

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"

mark_process()  # before it can start others


class _PublicModules(MetaPathFinder, Loader):
    """Let ``from pyro_vae.priors import Normal`` import the public module ``priors`` from the chapter that it is in."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, public = name.rpartition(".")
        if package == __name__ and public in __all__ and isinstance(__getattr__(public), ModuleType):
            return ModuleSpec(name, self)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = __getattr__(spec.name.rpartition(".")[2])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_PublicModules())
