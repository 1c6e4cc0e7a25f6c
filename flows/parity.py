"""Run recorded cases of the upstream model against this one; exits with 1 where one is beyond its tolerance.

    python -m flows.parity                        # the cases of tests/golden
    python -m flows.parity golden=/path/to/folder

One line a case: its largest relative L2 difference and where it is. docs/parity.md works one case through.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from flows.command import one_sentence, run_command
from tasks.config import CONF, strict

MISSED = 1


@dataclass(kw_only=True)
class ParityConfig:
    """golden: folder with manifest.json, the recorded model's weights and a file a case."""

    golden: str = "tests/golden"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="parity")
def main(composed: DictConfig) -> None:
    with one_sentence():
        cfg = strict(ParityConfig, composed)
        from lance_quant.model.parity import Golden, run_cases

        failed = 0
        for verdict in run_cases(Golden(Path(cfg.golden))):
            state = "ok" if verdict.passed else "DIFFERS"
            exact = "" if verdict.exact else "; tokens or timesteps differ"
            print(
                f"{state:8}{verdict.mode:5} {verdict.case:22} {verdict.difference:.1e} in {verdict.where} "
                f"(at most {verdict.tolerance:g}){exact}",
                flush=True,
            )
            failed += not verdict.passed
        if failed:
            sys.exit(MISSED)


if __name__ == "__main__":
    ConfigStore.instance().store(name="parity_schema", node=ParityConfig)
    run_command(main)
