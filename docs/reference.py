"""The reference: one page for each chapter of the package.

When Sphinx reads a line ``<!-- modules: pyro_vae.exact -->`` in a page of ``docs/api``, it inserts one section for each
module of that package. Every name in a module's ``__all__`` is described once, under the name that a user types.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pyro_vae

MARKER = re.compile(r"^<!-- modules: (.*) -->$", re.MULTILINE)


def expand(text: str) -> str:
    """Replace the markers of a page by sections; ``others`` are the modules that no page names."""
    return MARKER.sub(lambda found: _sections(found[1]), text)


def other_modules() -> list[str]:
    """Return the modules of the package that no page of ``docs/api`` names."""
    pages = [page.read_text(encoding="utf-8") for page in sorted((Path(__file__).parent / "api").glob("*.md"))]
    named = [found[1] for page in pages for found in MARKER.finditer(page) if found[1] != "others"]
    covered = {each for name in named for each in modules_below(name)}
    packages = {name.rpartition(".")[0] for name in covered}
    return [name for name in modules_below(pyro_vae.__name__) if name not in covered | packages]


def modules_below(name: str) -> list[str]:
    """Return a module, or a package and all modules in it."""
    module = importlib.import_module(name)
    if not hasattr(module, "__path__"):
        return [name]
    return [name, *sorted(each.name for each in pkgutil.walk_packages(module.__path__, f"{name}."))]


def _sections(name: str) -> str:
    """Describe a package, whose docstring introduces the page, and its modules."""
    if name == "others":
        return "\n".join(_describe(each, pyro_vae.__name__) for each in other_modules())
    first, *others = modules_below(name)
    return "\n".join([_describe(first, ""), *(_describe(each, name) for each in others)])


def _describe(name: str, package: str) -> str:
    """Describe a module: its docstring and the names that it defines."""
    module = importlib.import_module(name)
    heading = (
        ""
        if not package
        else f"## {name.removeprefix(f'{package}.').replace('_', ' ').replace('.', ', ').capitalize()}\n"
    )
    lines = [f".. automodule:: {name}", "   :no-members:", ""]
    for symbol in getattr(module, "__all__", ()):
        value = getattr(module, symbol)
        if inspect.ismodule(value) or getattr(value, "__module__", name) != name:
            continue  # described where it is defined
        kind = _kind(value)
        if kind == "data" and hasattr(module, "__path__"):
            continue  # a constant has its description in its own module
        path = f"{name}.{symbol}" if kind == "data" else f"{_public_module(name, symbol, value)}.{symbol}"
        lines += [f".. auto{kind}:: {path}", ""]
    return "\n".join([heading, "```{eval-rst}", *lines, "```", ""])


def _title(name: str) -> str:
    """Make a heading from the name of a module."""
    title = name.replace(".", ": ").replace("_", " ").strip()
    for word in ("elbo", "kl", "nuts", "rng", "svi"):
        title = re.sub(rf"\b{word}\b", word.upper(), title)
    return title[0].upper() + title[1:]


def _kind(value: Any) -> str:
    if inspect.isclass(value):
        return "exception" if issubclass(value, BaseException) else "class"
    return "function" if inspect.isroutine(value) else "data"


def _public_module(name: str, symbol: str, value: Any) -> str:
    """Return the shortest package that has this object under its name, which no module of the package has too."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        package = ".".join(parts[:depth])
        module = importlib.import_module(package)
        taken = importlib.util.find_spec(f"{package}.{symbol}") is not None
        if not taken and symbol in getattr(module, "__all__", ()) and getattr(module, symbol, None) is value:
            return package
    return name
