"""The stages by name: what `python -m lance_quant.tiny` and `python -m flows.train_tiny` both run."""

from __future__ import annotations

from pathlib import Path

from lance_quant.tiny.recipes import AutoencoderRecipe, ClipRecipe, ExportRecipe, LanceRecipe, MeasureRecipe

RECIPES = {
    "vae": AutoencoderRecipe,
    "clips": ClipRecipe,
    "lance": LanceRecipe,
    "export": ExportRecipe,
    "measure": MeasureRecipe,
}


def run_stage(stage: str, recipe, *, out: Path, minutes: float, total_minutes: float, device: str, graph: bool) -> None:
    """Run one stage; training for at most `minutes`, its schedule laid over `total_minutes`."""
    import torch

    from lance_quant.tiny.autoencoder import train_vae
    from lance_quant.tiny.measure import run_measure
    from lance_quant.tiny.temporal import train_clips
    from lance_quant.tiny.training import run_export, train_lance

    out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    if stage == "measure":
        run_measure(recipe, out=out, device=device)
    elif stage == "export":
        run_export(recipe, out=out)
    else:
        train = {"vae": train_vae, "clips": train_clips, "lance": train_lance}[stage]
        train(recipe, out=out, minutes=minutes, total_minutes=total_minutes, device=device, graph=graph)
