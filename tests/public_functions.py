"""The public functions of the package, and which of them a process runs.

:func:`record_runs` is to be called before the package is imported: it lets each function note that it runs. A profiler
would take several times as long.
"""

import ast
import builtins
import inspect
import sys
from functools import cached_property
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, FunctionType, ModuleType

_PACKAGE = "pyro_vae"
_RECORD = "__functions_that_ran__"
_SPECIAL = ("__init__", "__call__")


def record_runs() -> None:
    """Let each function of the package note that it runs, from now on."""
    assert _PACKAGE not in sys.modules, f"{_PACKAGE} is imported already"
    setattr(builtins, _RECORD, set())
    sys.meta_path.insert(0, _Finder())


def public_functions() -> dict[str, CodeType]:
    """All public functions, methods and properties that the package defines, by their names for users."""
    import pyro_vae as pv

    found: dict[str, CodeType] = {}
    for name in pv.__all__:
        value = getattr(pv, name)
        is_module = isinstance(value, ModuleType)
        members = {f"{name}.{one}": getattr(value, one) for one in value.__all__} if is_module else {name: value}
        for path, member in members.items():
            found |= _functions(path, member)
    return found


def functions_that_ran() -> set[str]:
    """Return the names of the public functions that ran in this process."""
    ran = getattr(builtins, _RECORD)
    return {name for name, code in public_functions().items() if (code.co_filename, code.co_firstlineno) in ran}


def _functions(path: str, value) -> dict[str, CodeType]:
    """The public functions of a class, or a function, by name."""
    if isinstance(value, type) and value.__module__.startswith(_PACKAGE):
        found = {}
        for name, member in vars(value).items():
            if not name.startswith("_") or name in _SPECIAL:
                found |= _functions(f"{path}.{name}", member)
        return found
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, cached_property):
        value = value.func
    elif isinstance(value, classmethod | staticmethod):
        value = value.__func__
    value = inspect.unwrap(value) if callable(value) else value
    is_own = isinstance(value, FunctionType) and f"/{_PACKAGE}/" in value.__code__.co_filename  # not of a dataclass
    return {path: value.__code__} if is_own else {}


class _Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None) -> ModuleSpec | None:
        if name.partition(".")[0] != _PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Compile a module whose functions first add their place to the record."""

    def path_stats(self, path):
        raise OSError("no cache")

    def source_to_code(self, data, path, *, _optimize=-1):
        tree = ast.parse(data, path)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                line = min([node.lineno, *(one.lineno for one in node.decorator_list)])
                note = ast.parse(f"{_RECORD}.add({(path, line)!r})").body[0]
                begin = int(ast.get_docstring(node, clean=False) is not None)
                node.body.insert(begin, ast.copy_location(note, node.body[0]))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, optimize=_optimize)
