r"""Train the checkpoints that ship, from a seed: the VAE, its later frames, vision tower and decoder; then the bars.

    python -m flows.train_tiny                                    # one GPU, under half an hour
    python -m flows.train_tiny device=cpu vae_minutes=180 clips_minutes=180 lance_minutes=900 vae.batch=16 \
        clips.batch=2 lance.batch=16 lance.pictures=10000 lance.clips=5000

The same command goes on where a run was stopped; what it trains is written to `out`, docs/lance_tiny.md says how to
ship it. Without Prefect and Hydra: python -m lance_quant.tiny stage=vae|clips|lance|export|measure.
"""

from dataclasses import dataclass, field
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from flows import server
from flows.command import one_sentence, run_command
from lance_quant.errors import LanceQuantError
from lance_quant.tiny.recipes import AutoencoderRecipe, ClipRecipe, ExportRecipe, LanceRecipe, MeasureRecipe
from tasks.config import CONF, strict


@dataclass(kw_only=True)
class TrainConfig:
    """Where, on what and how long to train, and the recipe of every stage."""

    out: str = "artifacts/train_tiny"
    device: str = "auto"
    vae_minutes: float = 30.0
    clips_minutes: float = 30.0
    lance_minutes: float = 60.0
    graph: bool = True
    vae: AutoencoderRecipe = field(default_factory=AutoencoderRecipe)
    clips: ClipRecipe = field(default_factory=ClipRecipe)
    lance: LanceRecipe = field(default_factory=LanceRecipe)
    measure: MeasureRecipe = field(default_factory=MeasureRecipe)

    def __post_init__(self) -> None:
        if min(self.vae_minutes, self.clips_minutes, self.lance_minutes) <= 0:
            raise LanceQuantError("vae_minutes, clips_minutes and lance_minutes must be above 0")


def train(cfg: TrainConfig) -> None:
    """The stages as Prefect tasks. Each keeps its own state in `out`, so that a stopped one goes on."""
    from prefect import flow, task

    from lance_quant.devices import choose_device
    from lance_quant.tiny.stages import run_stage

    out, device = Path(cfg.out), choose_device(cfg.device)

    def stage(name: str, recipe, minutes: float) -> None:
        task(run_stage, name=name, persist_result=False)(
            name, recipe, out=out, minutes=minutes, total_minutes=minutes, device=device, graph=cfg.graph
        )

    @flow(name="train-tiny", persist_result=False)
    def train_tiny() -> None:
        stage("vae", cfg.vae, cfg.vae_minutes)
        stage("clips", cfg.clips, cfg.clips_minutes)
        stage("lance", cfg.lance, cfg.lance_minutes)
        stage("export", ExportRecipe(), 0.0)
        stage("measure", cfg.measure, 0.0)

    train_tiny()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train_tiny")
def main(composed: DictConfig) -> None:
    with one_sentence():
        cfg = strict(TrainConfig, composed)
        server.prepare()
        child = server.start(Path(HydraConfig.get().runtime.output_dir) / "server.log")
        if child:
            child.wait()
        train(cfg)


if __name__ == "__main__":
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    run_command(main)
