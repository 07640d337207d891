"""Inventories of other documentations, from the short lists of names in ``inventories``: the build needs no network.

The first line of a list has the project's name and the address of its documentation. Each other line has a name, what
it is, and its page; ``$`` stands for the name.
"""

import zlib
from pathlib import Path
from typing import NamedTuple

LISTS = Path(__file__).parent / "inventories"


class Inventory(NamedTuple):
    """The names of a project that our pages link to."""

    project: str
    address: str
    lines: list[tuple[str, str, str]]

    @classmethod
    def read(cls, path: Path) -> "Inventory":
        """Read a list."""
        first, *others = path.read_text(encoding="utf-8").splitlines()
        project, address = first.removeprefix("# ").split()
        return cls(project, address, [(name, kind, page) for name, kind, page in map(str.split, filter(None, others))])

    def write(self, path: Path) -> None:
        """Write the file ``objects.inv`` that :mod:`sphinx.ext.intersphinx` reads (its version 2)."""
        head = f"# Sphinx inventory version 2\n# Project: {self.project}\n# Version: \n"
        head += "# The remainder of this file is compressed using zlib.\n"
        body = "".join(f"{name} py:{kind} 1 {page.replace('$', name)} -\n" for name, kind, page in self.lines)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(head.encode() + zlib.compress(body.encode()))


def mapping(folder: Path) -> dict[str, tuple[str, str]]:
    """Write all inventories to a folder, and return ``intersphinx_mapping``."""
    found = {}
    for path in sorted(LISTS.glob("*.txt")):
        inventory, target = Inventory.read(path), folder / f"{path.stem}.inv"
        inventory.write(target)
        found[path.stem] = (inventory.address, str(target))
    return found
