"""The table of docs/programs.md: written from what the harness finds, and read again to compare."""

import re
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import torch

from programs.harness import CAPABILITIES, NAMES, Cell, examine

PAGE = Path(__file__).parent.parent.parent / "docs" / "programs.md"
BEGIN, END = "<!-- written by `make programs` -->", "<!-- end -->"
MARKS = {"right": "✓", "runs": "○", "refused": "–", "bug": "✗", "unmeasured": "?"}
Found = dict[str, dict[str, Cell]]


def reason(cell: Cell) -> str:
    """The first sentence of an error, without what it got."""
    text = cell.note.partition(", got ")[0]
    return text if len(text) < 200 else text[:197] + "..."


def text_of(cell: Cell, capability: str, reasons: list[str]) -> str:
    mark = MARKS[cell.status]
    if cell.status == "refused":
        return f"{mark} {reasons.index(reason(cell)) + 1}"
    return f"{mark} {cell.note}".strip() if capability == "compile" and cell.status == "right" else mark


def written(found: Found) -> str:
    """The table, the reasons of refusals, and the list of programs, in Markdown."""
    cells = [cell for row in found.values() for cell in row.values()]
    reasons = list(dict.fromkeys(reason(cell) for cell in cells if cell.status == "refused"))
    columns = list(next(iter(found.values())))
    lines = ["| program | " + " | ".join(f"`{column}`" for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in found.items():
        texts = [text_of(cell, column, reasons) for column, cell in row.items()]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    counts = {status: sum(cell.status == status for cell in cells) for status in MARKS}
    counts = {status: count for status, count in counts.items() if count or status != "unmeasured"}
    lines += ["", ", ".join(f"{MARKS[status]} {status}: {count}" for status, count in counts.items()) + "."]
    lines += ["", "## Reasons for refusals", ""]
    lines += [f"{number}. {text}" for number, text in enumerate(reasons, 1)] or ["None."]
    lines += ["", "## The programs", ""]
    for name in found:
        module = import_module(f"programs.{name}")
        lines.append(f"- **{name}** (`tests/programs/{name}.py`): {module.__doc__.strip()}")
    return "\n".join(lines)


def statuses(page: str) -> dict[str, dict[str, str]]:
    """The statuses in a page's table, by program and capability."""
    names = {mark: status for status, mark in MARKS.items()}
    table = page.partition(BEGIN)[2] or page
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    columns = [re.sub("[` ]", "", text) for text in rows[0][1:]]
    return {
        row[0].strip(): {column: names[text.split()[0]] for column, text in zip(columns, row[1:], strict=True)}
        for row in rows[2:]
    }


def statuses_of(found: Mapping[str, Mapping[str, Cell]]) -> dict[str, dict[str, str]]:
    return {name: {capability: cell.status for capability, cell in row.items()} for name, row in found.items()}


def find(processes: int) -> Found:
    """Run the harness on all programs, in processes of one thread each."""
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        return dict(zip(NAMES, pool.map(examine, NAMES), strict=True))


def update(found: Found) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{written(found)}\n\n{END}{rest.partition(END)[2]}")
    assert statuses(PAGE.read_text()) == statuses_of(found)
    assert all(column in row for row in found.values() for column in CAPABILITIES)
