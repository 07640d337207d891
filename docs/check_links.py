"""Check the links, anchors and pictures of the built pages: `python docs/check_links.py docs/_build/html`.

The script prints one line for each dead link and exits with status 1 if there are any. It does not follow links to
other sites.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.targets: set[str] = set()
        self.anchors = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the link and the anchor of a tag."""
        for name, value in attrs:
            if value is None:
                continue
            if name in ("href", "src"):
                self.targets.add(value)
            elif name == "srcset":
                self.targets |= {choice.split()[0] for choice in value.split(",") if choice.strip()}
            elif name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)


def dead_links(root: Path) -> list[tuple[str, str]]:
    """Return pairs of a page under ``root`` and a target of its links that does not exist."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.html"))}
    dead = []
    for path, page in pages.items():
        for target in sorted(page.targets):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            file = file / "index.html" if file.is_dir() else file
            anchor = unquote(parts.fragment)
            if not file.exists() or (file in pages and anchor not in pages[file].anchors):
                dead.append((str(path.relative_to(root.resolve())), target))
    return dead


def main() -> None:
    """Check the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/check_links.py FOLDER")
    root = Path(sys.argv[1])
    if not (root / "index.html").exists():
        sys.exit(f"{root}: has no index.html; build the documentation first")
    dead = dead_links(root)
    for page, target in dead:
        print(f"{page}: nothing at {target}")
    sys.exit(1 if dead else 0)


if __name__ == "__main__":
    main()
