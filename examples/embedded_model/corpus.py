"""The embedded model's text: the Python 3.11 standard library's source, split into training and held-out files."""

import hashlib
import re
import sysconfig
from pathlib import Path

# Tables of code points, generated topics and fixtures in foreign encodings teach nothing about code.
SKIP = re.compile(
    r"site-packages|/encodings/(cp|mac_|iso|koi|kz|ptcp|hp_|tis|palmos)|/lib2to3/tests/data/|/pydoc_data/"
    r"|cjkencodings|/test_importlib/data|stringprep|/idlelib/Icons"
)


def held_out(relative_path: str) -> bool:
    """Whether neither backbone nor heads were trained on the file (about one in fifty)."""
    return int(hashlib.sha256(relative_path.encode()).hexdigest(), 16) % 50 == 0


def documents(held: bool) -> list[tuple[str, str]]:
    """(path relative to the standard library, text) of all held-out or all training files, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        if SKIP.search(str(path)):
            continue
        text = path.read_text(encoding="utf8", errors="ignore")
        relative = str(path.relative_to(root))
        if 300 < len(text) < 300_000 and held_out(relative) == held:
            found.append((relative, text))
    return found
