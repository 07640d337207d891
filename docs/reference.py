"""The reference: the public names by chapter, and the internals apart from them.

When Sphinx reads a line ``<!-- modules: pyro_vae.exact -->`` in a page of ``docs/api``, it inserts a table of the
public names of that package, and describes each under the name that a user types. A line ``<!-- internals: ... -->`` in
a page of ``docs/developers`` describes all other names of a package. A name is public if it is in
``pyro_vae.__all__``, or in ``__all__`` of a module that is.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.pycode import ModuleAnalyzer

import pyro_vae

MARKER = re.compile(r"^<!-- (modules|internals): (.*) -->$", re.MULTILINE)
PACKAGE = pyro_vae.__name__
ABBREVIATIONS = {"np": "numpy", "pd": "pandas", "xr": "xarray"}
ACRONYMS = ("elbo", "io", "kl", "nuts", "rng", "svi")


def expand(text: str) -> str:
    """Replace the markers of a page by sections; ``others`` are the modules that no page of internals names."""
    return MARKER.sub(lambda found: public(found[2]) if found[1] == "modules" else internals(found[2]), text)


def public(package: str) -> str:
    """Describe the public names of a package: its docstring, a table of the names, and a section for each module."""
    described = {name: names for name in modules_below(package) if (names := names_of(name, public=True))}
    table = [":::{list-table}", ":widths: auto", ":class: summary", ""]
    for names in described.values():
        for path, value in names.items():
            table += [f"* - {{py:obj}}`{_shown(path)} <{path}>`", f"  - {_summary(path, value)}"]
    sections = ["", *table, ":::", ""]
    if package not in described:
        sections = [_automodule(package), *sections]
    for name, names in described.items():
        heading = f"## {_title(name, package)}\n" if name != package and len(described) > 1 else ""
        sections += [heading, _automodule(name), _entries(names)]
    return "\n".join(sections)


def internals(package: str) -> str:
    """Describe the names of a package that are not public, with a section for each module."""
    modules = other_modules() if package == "others" else modules_below(package)
    sections = []
    for name in modules:
        if names := names_of(name, public=False):
            heading = f"## `{name.removeprefix(f'{PACKAGE}.')}`\n"
            sections += [heading, _automodule(name, index=not names_of(name, public=True)), _entries(names)]
    return "\n".join(sections)


def other_modules() -> list[str]:
    """Return the modules of the package that no page of ``docs/developers`` names."""
    pages = [page.read_text(encoding="utf-8") for page in sorted((Path(__file__).parent / "developers").glob("*.md"))]
    named = [found[2] for page in pages for found in MARKER.finditer(page) if found[2] != "others"]
    covered = {each for name in named for each in modules_below(name)}
    return [name for name in modules_below(PACKAGE) if name not in covered]


@cache
def modules_below(name: str) -> list[str]:
    """Return a module, or a package and all modules in it."""
    module = importlib.import_module(name)
    if not hasattr(module, "__path__"):
        return [name]
    return [name, *sorted(each.name for each in pkgutil.walk_packages(module.__path__, f"{name}."))]


@cache
def public_paths() -> dict[str, str]:
    """Return the name that a user types for each public object, by the place where it is defined."""
    paths: dict[str, str] = {}
    modules = [(PACKAGE, pyro_vae)]
    for path, module in modules:  # grows on the way, so that the shortest path of a name comes first
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.ismodule(value):
                modules.append((f"{path}.{name}", value))
            else:
                paths.setdefault(f"{_home(name, value, module.__name__)}.{name}", f"{path}.{name}")
    return paths


def _home(name: str, value: Any, package: str) -> str:
    """Return the module that defines an object; of a constant or an alias, the module that has it."""
    if str(getattr(value, "__module__", "")).startswith(f"{PACKAGE}."):
        return value.__module__
    inner = [each for each in modules_below(package) if name in getattr(importlib.import_module(each), "__all__", ())]
    return inner[-1]


def names_of(module: str, *, public: bool | None = None) -> dict[str, Any]:
    """Return the objects that a module defines, or only its public or internal ones, by their described path."""
    loaded = importlib.import_module(module)
    found = {}
    for name in getattr(loaded, "__all__", ()):
        value = getattr(loaded, name)
        place = f"{module}.{name}"
        home = str(getattr(value, "__module__", module))
        if inspect.ismodule(value) or (home.startswith(f"{PACKAGE}.") and home != module and not _adopted(home, place)):
            continue  # described where it is defined
        if _kind(value) == "data" and hasattr(loaded, "__path__"):
            continue  # a constant has its description in its own module
        if home != module and place not in public_paths() and not _adopted(home, place):
            continue  # an alias of a type of another library, without a description
        source = f"{home}.{name}" if _adopted(home, place) else place
        if public is None or (source in public_paths()) == public:
            found[typed(source)] = value
    return found


def _adopted(home: str, place: str) -> bool:
    """Whether users know an object by this place, while it is defined in another chapter."""
    known = public_paths().get(".".join([home, place.rpartition(".")[2]]))
    return known == place and place.count(".") > 1 and home.split(".")[1] != place.split(".")[1]


@cache
def typed(place: str) -> str:
    """Return the public path of an object, or its place where a module has the public path too."""
    path = public_paths().get(place, place)
    taken = path in modules_below(PACKAGE) or _kind(_get(place)) == "data"
    return place if taken else path


def _get(place: str) -> Any:
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _automodule(name: str, *, index: bool = True) -> str:
    options = ["   :no-members:"] if index else ["   :no-members:", "   :no-index:"]
    return "\n".join(["```{eval-rst}", f".. automodule:: {name}", *options, "```", ""])


def _entries(names: dict[str, Any]) -> str:
    lines = [line for path, value in names.items() for line in (f".. auto{_kind(value)}:: {path}", "")]
    return "\n".join(["```{eval-rst}", *lines, "```", ""])


def _summary(path: str, value: Any) -> str:
    """Return the first sentence of a description as Markdown."""
    description = inspect.getdoc(value) if _kind(value) != "data" else _comment(path)
    text = " ".join((description or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=[^.\s]{2}\.)\s", text)[0].rstrip(":,")
    sentence = re.sub(r":math:`([^`]*)`", r"$\1$", sentence)
    sentence = re.sub(r":\w+:`~?([\w.]+\.)?(\w+)`", r"`\2`", sentence)
    return sentence.replace("``", "`").replace("**", "")


def _shown(path: str) -> str:
    """Return what a user types after the name of the package."""
    return public_paths().get(path, path).removeprefix(f"{PACKAGE}.")


def _comment(path: str) -> str:
    """Return the string below a constant, or the name of its type."""
    module, _, name = path.rpartition(".")
    lines = ModuleAnalyzer.for_module(module).find_attr_docs().get(("", name))
    return "\n".join(lines) if lines else f"A {type(_get(path)).__name__}."


def _title(name: str, package: str) -> str:
    """Make a heading from the name of a module."""
    title = name.removeprefix(f"{package}.").replace(".", ": ").replace("_", " ")
    for word in ACRONYMS:
        title = re.sub(rf"\b{word}\b", word.upper(), title)
    return title[0].upper() + title[1:]


def _kind(value: Any) -> str:
    if inspect.isclass(value):
        return "exception" if issubclass(value, BaseException) else "class"
    return "function" if inspect.isroutine(value) else "data"


def skip_fields(app: Any, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of a named tuple, which its docstring describes."""
    return True if str(getattr(value, "__doc__", "")).startswith("Alias for field number") else None


# --- Links -----------------------------------------------------------------------------------------------------------


def resolve(app: Any, env: Any, node: Any, text: Any) -> Any:
    """Resolve a cross-reference to an object by the place where it is defined, or by its bare name."""
    if node.get("refdomain") != "py":
        return None
    short, _, rest = node["reftarget"].partition(".")
    if short in ABBREVIATIONS and rest:  # the name of an import; intersphinx looks for it after this function
        node["reftarget"] = f"{ABBREVIATIONS[short]}.{rest}"
        return None
    domain = env.domains["py"]
    for path in candidates(node["reftarget"], node.get("py:module")):
        if path in domain.objects:
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", path, node, text)
    return None


def candidates(target: str, module: str | None) -> Iterator[str]:
    """Yield the names under which the target of a reference may be described."""
    parts = target.split(".")
    for length in range(len(parts), 0, -1):
        place, rest = ".".join(parts[:length]), parts[length:]
        if place in public_paths():
            yield ".".join([typed(place), *rest])
        homes = [each for each in public_paths() if each.rpartition(".")[2] == place]
        preferred = [each for each in homes if module and each.startswith(module)]
        for home in preferred or (homes if len(homes) == 1 else []):
            yield ".".join([typed(home), *rest])
    if target.startswith(f"{PACKAGE}.parts."):
        yield target.replace(".parts", "", 1)


def link_sources(app: Any, doctree: nodes.document) -> None:
    """Name the defining module of each described object, which :mod:`sphinx.ext.viewcode` reads."""
    places = {typed(place): place for place in public_paths() if typed(place) != place}
    for signature in doctree.findall(lambda node: node.tagname == "desc_signature"):
        path = f"{signature.get('module')}.{signature.get('fullname')}"
        found = next((each for each in (path, path.rpartition(".")[0]) if each in places), None)
        if found is not None:
            module, _, name = places[found].rpartition(".")
            signature["module"], signature["fullname"] = module, name + path.removeprefix(found)
            signature["ids"].append(f"{module}.{signature['fullname']}")  # where the link back from the source leads
