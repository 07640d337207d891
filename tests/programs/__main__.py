"""Write the table of docs/programs.md: ``python tests/programs [PROCESSES]``, or ``make programs``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from programs import table

if __name__ == "__main__":
    found = table.find(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    table.update(found)
    for name, row in found.items():
        for capability, cell in row.items():
            print(f"{name:18} {capability:14} {cell.status:8} {cell.seconds:6.1f} s  {cell.note}")
