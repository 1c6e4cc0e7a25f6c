"""`python -m lance_quant.tiny stage=vae|clips|lance|export|measure out=DIR minutes=9 [any recipe field=value]`

Trains Lance-tiny in pieces, without an orchestrator: every stage goes on from what DIR holds and stops itself in
time.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

from lance_quant.devices import choose_device
from lance_quant.errors import LanceQuantError
from lance_quant.tiny.stages import RECIPES, run_stage

COMMON = {
    "stage": "str",
    "out": "str",
    "minutes": "float",
    "total_minutes": "float",
    "device": "str",
    "graph": "bool",
}
READERS = {"str": str, "int": int, "float": float, "bool": lambda text: {"true": True, "false": False}[text.lower()]}


def parse(arguments: list[str], recipe: type) -> tuple[dict, dict]:
    """Split key=value words into the common settings and the recipe's fields; refuse what neither knows."""
    kinds = {f.name: f.type for f in fields(recipe)} | COMMON
    common, own = {}, {}
    for word in arguments:
        key, equals, text = word.partition("=")
        if not equals or key not in kinds:
            raise LanceQuantError(f"{word!r} is no setting: use {', '.join(f'{name}=...' for name in kinds)}")
        try:
            (common if key in COMMON else own)[key] = READERS[kinds[key]](text)
        except (ValueError, KeyError):
            raise LanceQuantError(f"{key}={text} is not of type {kinds[key]}") from None
    return common, own


def main(arguments: list[str]) -> None:
    stage = next((word.removeprefix("stage=") for word in arguments if word.startswith("stage=")), "")
    if stage not in RECIPES:
        raise LanceQuantError(f"stage={stage} is unknown: use stage={', stage='.join(RECIPES)}")
    common, own = parse(arguments, RECIPES[stage])
    if "out" not in common:
        raise LanceQuantError("out is missing: name the folder for weights and training state, out=DIR")
    minutes = common.get("minutes", 8.0)
    run_stage(
        stage,
        RECIPES[stage](**own),
        out=Path(common["out"]),
        minutes=minutes,
        total_minutes=common.get("total_minutes", minutes),
        device=choose_device(common.get("device", "auto")),
        graph=common.get("graph", True),
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LanceQuantError as error:
        sys.exit(f"error: {error}")
