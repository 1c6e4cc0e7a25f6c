"""Plain text that lies in any Python installation, in two disjoint lists:  write_texts(folder)

The language reference that `pydoc` carries and the long descriptions of installed packages, long ones alone; every
other one, in order of name, is for calibration, the rest to evaluate with.
"""

from importlib import metadata
from pathlib import Path

LEAST, MOST = 3500, 12000  # characters of a document: what is longer is cut, so that no subject prevails


def documents() -> list[tuple[str, str]]:
    """(name, text) in order of name."""
    from pydoc_data.topics import topics

    found = {f"topic-{name}": text for name, text in topics.items()}
    for package in metadata.distributions():
        text = package.metadata.get_payload() or package.metadata.get("Description") or ""
        found[f"package-{package.metadata['Name'].lower()}"] = text
    return sorted((name, text[:MOST]) for name, text in found.items() if len(text) >= LEAST)


def write_texts(folder: Path) -> tuple[Path, Path]:
    """(calibration, evaluation): two folders of .txt files inside `folder`."""
    places = (folder / "calibration", folder / "evaluation")
    for index, (name, text) in enumerate(documents()):
        place = places[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.txt").write_text(text, encoding="utf-8")
    return places
