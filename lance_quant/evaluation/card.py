"""The Hugging Face model card of a packed folder: what it holds, what it was measured on, how to read it.

write_card(job, packed / "README.md")
"""

import json
from pathlib import Path

from lance_quant.evaluation.findings import Findings, ReportJob, packed_files
from lance_quant.evaluation.names import SOURCE_NAMES, TASK_NAMES
from lance_quant.evaluation.rendering import render

HUB_MODEL = "bytedance-research/Lance"
LEAST_PUBLISHED = 10**9  # parameters; anything smaller is a Lance-tiny of this project, under its licence


def write_card(job: ReportJob, path: Path) -> None:
    """Writes the card to `path`: front matter, scores and samples, sizes, tensors, a snippet that reads one weight."""
    found = Findings(job)
    calibrated = found.meta["tasks_calibrated"]
    view = {
        "found": found,
        "job": job,
        "metrics": found.metrics,
        "front": front_matter(found),
        "calibrated": [TASK_NAMES[task].many if task in TASK_NAMES else task for task in calibrated],
        "samples": SOURCE_NAMES[job.evaluated_on],
        "calibration_samples": SOURCE_NAMES[job.calibrated_on],
        "example": next(iter(found.meta["per_weight"])).removesuffix(".weight"),
        "files": packed_files(job),
        "base": None if is_shipped(found) else HUB_MODEL,
    }
    path.write_text(render("card.md.j2", view), encoding="utf-8")


def is_shipped(found: Findings) -> bool:
    """Whether the weights are those of Lance-tiny: by size, since a name is free to choose."""
    return found.job.checkpoint["parameters"] < LEAST_PUBLISHED


def front_matter(found: Findings) -> list[tuple[str, str]]:
    """(key, value as JSON, which is YAML too) of the card's header, as the hub reads it."""
    job = found.job
    tags = ["lance", "multimodal", "awq", f"{found.bits}-bit", "quantized"]
    tags += [TASK_NAMES[task].tag for task in found.meta["tasks_calibrated"] if task in TASK_NAMES]
    origin = {"license": "apache-2.0"}
    if not is_shipped(found):  # the licence of other weights is their maker's to say
        origin = {"base_model": HUB_MODEL, "base_model_relation": "quantized"}
    fields = origin | {
        "library_name": "lance-quant",
        "pipeline_tag": "any-to-any",
        "tags": list(dict.fromkeys(tags)),
        "quantization": {
            "bits": found.bits,
            "group_size": found.group_size,
            "scheme": found.meta["scheme"],
            "recipe": job.recipe,
            "linears": len(found.meta["per_weight"]),
            "tasks_calibrated": found.meta["tasks_calibrated"],
            "source_fingerprint": job.checkpoint["fingerprint"],
        },
    }
    return [(key, json.dumps(value)) for key, value in fields.items()]
