"""The library stands without an orchestrator."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROBE = """
import importlib, pkgutil, sys
import lance_quant
for module in pkgutil.walk_packages(lance_quant.__path__, "lance_quant."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(*sorted({name.split(".")[0] for name in sys.modules} & {"prefect", "hydra", "tasks", "flows"}))
"""


def loaded(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_part_of_the_library_imports_prefect_or_hydra():
    assert loaded(PROBE) == ""


def test_importing_the_package_is_light():
    code = "import lance_quant, sys; print(*{'prefect', 'hydra', 'torch', 'pandas'} & set(sys.modules))"
    assert loaded(code) == ""
    assert loaded("import lance_quant; print(lance_quant.__version__)") == "0.1.0"


def test_the_settings_are_light():
    """A run whose stages are all there reads its settings without torch."""
    assert loaded("import tasks.config, sys; print(*{'prefect', 'torch', 'pandas'} & set(sys.modules))") == ""


def test_artifacts_holds_nothing_but_its_gitignore():
    tracked = subprocess.run(["git", "ls-files", "artifacts"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert tracked == ["artifacts/.gitignore"]
