"""Requests drawn from a seed are pinned: calibration and evaluation artifacts are keyed by their arguments alone."""

import hashlib

from lance_quant.tiny import SCENES_REVISION
from lance_quant.tiny.requests import scene_requests

DIGEST = {1: "c75c3e19a3b58e644d491388ec03b863c01d9f33ca251929e353d3623b980f9d"}


def test_digest():
    digest = hashlib.sha256()
    for unseen in (False, True):
        for request in scene_requests(["x2t_image", "t2i"], 8, 128, seed=3, unseen=unseen):
            digest.update(f"{request.name}|{request.prompt}|{request.instruction}|{request.answer}".encode())
            digest.update(request.image.tobytes())
    assert digest.hexdigest() == DIGEST[SCENES_REVISION], "other requests: raise SCENES_REVISION in lance_quant/tiny"


def test_unseen_scenes_differ_from_seen_ones():
    seen, unseen = (scene_requests(["t2i"], 4, 128, seed=0, unseen=value) for value in (False, True))
    assert not {request.prompt for request in seen} & {request.prompt for request in unseen}
