"""`python -m tests.text_files FILE...` names those with spaces at line ends or without one line break at the end."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def fault(text: str) -> str | None:
    """What is wrong with the text of a file, or None."""
    spaces = re.search(r"[ \t]+$", text, re.MULTILINE)
    if spaces:
        return f"line {text.count(chr(10), 0, spaces.start()) + 1} ends in spaces"
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        return "does not end in exactly one line break"
    return None


if __name__ == "__main__":
    faults = {name: fault(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]}
    for name, what in faults.items():
        if what is not None:
            print(f"{name}: {what}", file=sys.stderr)
    sys.exit(any(faults.values()))
