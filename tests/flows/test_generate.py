"""`python -m flows.generate`: what it writes, what it refuses, and that a text reaches the model to the letter."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from flows.command import run_command
from flows.generate import GenerateConfig, Int4Keys, Lines, generate, literal, main, register_settings
from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.pack import PackJob, pack
from lance_quant.awq.search import LayerJob, search_layer
from lance_quant.checkpoint.layout import open_checkpoint
from lance_quant.errors import LanceQuantError
from lance_quant.media import read_clip, read_image
from tasks.config import CONF, strict
from tests.flows.conftest import ROOT
from tests.random_checkpoint import write_random_checkpoint


def command(*words: str, **more) -> subprocess.CompletedProcess:
    call = [sys.executable, "-m", "flows.generate", *words]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300, **more)


def read_json(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_picture_of_the_checkpoint_that_ships(tmp_path):
    done = command("task=t2i", "prompt=a red circle, please", "steps=12", f"artifacts={tmp_path}")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "generate" / "t2i-42.png"
    assert done.stdout == f"{file}\n"
    assert read_image(file).size == (128, 128)
    lines = done.stderr.splitlines()
    assert lines[0] == "tiny, weights bf16, on cpu" or "cuda" in lines[0]
    assert 2 < len(lines) <= 10 and lines[-1] == "100%  t2i-42: 12 of 12"
    record = read_json(file.with_suffix(".json"))
    keys = "file frames height width request settings weights seconds seconds_per_step gpu_peak_bytes"
    assert list(record) == keys.split()
    assert record["request"] == {"task": "t2i", "prompt": "a red circle, please", "height": 128, "width": 128}
    assert record["settings"]["flow"]["steps"] == 12 and record["settings"]["seed"] == 42
    assert record["weights"]["checkpoint"] == "tiny" and len(record["weights"]["sha256"]) == 64
    assert {file.name for file in tmp_path.iterdir()} == {"generate", "hashes.json"}


def test_an_example_file_of_the_checkpoint_that_ships(tmp_path):
    """Two questions about one picture, whose results upstream would write over each other."""
    folder = tmp_path / "Lance" / "config" / "examples"
    folder.mkdir(parents=True)
    Image.new("RGB", (128, 128), "white").save(tmp_path / "Lance" / "a.png")
    questions = {
        key: {
            "interleave_array": ["a.png", ["Look at the image carefully and answer the question.", question, "none"]],
            "element_dtype_array": ["image", "text"],
            "istarget_in_interleave": [0, 1],
        }
        for key, question in {"0001": "how many circles?", "0002": "what color is the background?"}.items()
    }
    (folder / "x2t_image_example.json").write_text(json.dumps(questions))
    out = tmp_path / "generate" / "x2t_image_example"
    done = command(f"examples={folder / 'x2t_image_example.json'}", f"artifacts={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in out.iterdir()) == [
        "000001.json",
        "000001.txt",
        "000002.json",
        "000002.txt",
    ]
    record = read_json(out / "000002.json")
    assert record["answer_with_stop_token"] == f"{record['answer']}<|im_end|>"
    assert (out / "000002.txt").read_text() == f"{record['answer']}\n"
    assert record["request"]["reference"] == "none" and record["request"]["image"].endswith("/Lance/a.png")
    assert done.stdout.splitlines()[1] == f"{out / '000002.txt'}  {record['answer']}"


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A random checkpoint in the video layout."""
    return write_random_checkpoint(tmp_path_factory.mktemp("video"), layout="video", layers=1)


def run(tmp_path, checkpoint, **settings) -> dict:
    """Run in this process; the JSON that it writes."""
    fields = {"steps": 2, "device": "cpu", "out": str(tmp_path / "out"), "artifacts": str(tmp_path)}
    before = set((tmp_path / "out").rglob("*.json"))
    generate(GenerateConfig(checkpoint=replace(checkpoint, frames=9), **fields | settings))
    (file,) = set((tmp_path / "out").rglob("*.json")) - before
    return read_json(file)


def test_a_clip(tmp_path, video):
    record = run(tmp_path, video, task="t2v", prompt="a red circle", seed=7)
    assert (record["file"], record["frames"], record["height"], record["width"]) == ("t2v-7.mp4", 9, 64, 64)
    assert record["request"]["frames"] == 9
    assert read_clip(tmp_path / "out" / "t2v-7.mp4")[0].size == (64, 64)


def test_frames_are_those_that_were_drawn(tmp_path, video, capsys):
    record = run(tmp_path, video, task="t2v", prompt="a red circle", frames=6)
    assert record["frames"] == record["request"]["frames"] == 5
    assert "frames=6 draws 5: a clip has 4 n + 1\n" in capsys.readouterr().err
    run(tmp_path, video, task="t2v", prompt="a red circle", frames=5)
    run(tmp_path, replace(video, frames=6), task="t2i", prompt="a red circle")
    assert "4 n + 1" not in capsys.readouterr().err


def test_what_was_drawn_before_stays(tmp_path, video):
    out, asked = tmp_path / "out", {"task": "t2v", "prompt": "a red circle", "seed": 7}
    first = run(tmp_path, video, **asked, frames=5)
    kept = {file: file.read_bytes() for file in out.iterdir()}
    records = [run(tmp_path, video, **asked | {"prompt": "a blue circle"}, frames=frames) for frames in (5, 1)]
    assert [record["file"] for record in (first, *records)] == ["t2v-7.mp4", "t2v-7-2.mp4", "t2v-7-3.png"]
    assert read_json(out / "t2v-7-3.json") == records[1]
    assert len(list(out.iterdir())) == 6
    assert kept == {file: file.read_bytes() for file in kept}


def test_an_example_file_run_again_has_a_folder_of_its_own(tmp_path, video):
    file = tmp_path / "t2i_example.json"
    file.write_text(json.dumps({"000000.png": "a red circle"}))
    for _ in range(3):
        run(tmp_path, video, examples=str(file))
    folders = {folder.name: sorted(one.name for one in folder.iterdir()) for folder in (tmp_path / "out").iterdir()}
    assert folders == {f"t2i_example{end}": ["000000.json", "000000.png"] for end in ("", "-2", "-3")}


def test_without_a_size_clips_take_that_of_clips(tmp_path, video):
    sized = replace(video, image_edge=64, video_edge=32)
    for task, edge in (("t2v", 32), ("t2i", 64)):
        record = run(tmp_path / task, sized, task=task, prompt="a red circle")
        assert (record["height"], record["width"]) == (edge, edge)
        assert record["request"]["height"] == edge
        assert record["settings"]["resolution"]["image_edge"] == edge


def test_a_clip_of_one_frame_is_a_picture(tmp_path, video):
    assert run(tmp_path, video, task="t2v", prompt="a red circle", frames=1)["file"] == "t2v-42.png"


def test_a_clip_that_was_drawn_can_be_changed(tmp_path, video):
    run(tmp_path / "a", video, task="t2v", prompt="a red circle")
    clip = str(tmp_path / "a" / "out" / "t2v-42.mp4")
    record = run(tmp_path, video, task="video_edit", prompt="make it blue", video=clip)
    assert record["file"] == "video_edit-42.mp4" and record["frames"] == 9
    assert record["request"] == {"task": "video_edit", "prompt": "make it blue", "video": clip}


def test_a_sweep_keeps_its_runs_apart(tmp_path, video, monkeypatch):
    register_settings()
    own = [f"checkpoint.path={video.path}", "checkpoint.image_edge=64", "device=cpu", f"artifacts={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["flows.generate", "-m", "task=t2i", "prompt=x", "steps=1,2", *own])
    run_command(main)
    for number, steps in enumerate((1, 2)):
        record = read_json(tmp_path / "generate" / str(number) / "t2i-42.json")
        assert record["settings"]["flow"]["steps"] == steps


def test_a_resolution(tmp_path, video):
    record = run(tmp_path, video, task="t2i", prompt="a red circle", resolution="image_256res")
    assert (record["height"], record["width"]) == (256, 256)
    assert record["settings"]["resolution"] == {"image_edge": 256, "vit_edge": 224}


def test_packed_weights(tmp_path, video):
    layer, packed = tmp_path / "layer", tmp_path / "packed"
    layer.mkdir(), packed.mkdir()
    shared = {"checkpoint": open_checkpoint(video), "recipe": RecipeConfig(name="minmax", scoring="none", folds=[])}
    search_layer(LayerJob(layer=0, capture=None, group_size=32, bits=4, **shared), layer, "cpu")
    pack(PackJob(layers=[layer], group_size=32, bits=4, tasks_calibrated=[], **shared), packed)
    record = run(tmp_path, video, task="i2v", prompt="it moves", weights=str(packed), image=picture(tmp_path))
    assert record["weights"]["file"] == str(packed / "awq_state_dict.safetensors")
    assert (record["weights"]["bits"], record["weights"]["group_size"]) == (4, 32)
    assert record["settings"]["int4"] == {"backend": "auto", "resident_gb": 0.0}
    asked = {"task": "t2i", "prompt": "it", "weights": str(packed)}
    for keys in (Int4Keys(backend="blocks"), Int4Keys(backend="dense", resident_gb=1)):
        assert run(tmp_path, video, int4=keys, **asked)["settings"]["int4"] == asdict(keys)
    wrong = {
        "int4.resident_gb=1 has no say on a CPU": Int4Keys(resident_gb=1),
        "backend=fastest is unknown: take auto or one of triton_gemv": Int4Keys(backend="fastest"),
        "resident_gb=-1 must be a number, 0 or more": Int4Keys(resident_gb=-1),
        "resident_gb=nan must be a number, 0 or more": Int4Keys(resident_gb=float("nan")),
    }
    for words, keys in wrong.items():
        with pytest.raises(LanceQuantError, match=words):
            run(tmp_path, video, int4=keys, **asked)


def picture(folder) -> str:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "a.png")
    return str(folder / "a.png")


MISTAKES = {
    "": "nothing to do: give task=t2i prompt='a red circle', or examples=FILE",
    "task=paint prompt=x": "task=paint is unknown: take one of x2t_image",
    "task=t2i": "task t2i needs a text and got none: give prompt='...'",
    "task=t2v prompt=x": "which serves x2t_image, t2i, image_edit: take checkpoint=tiny_video",
    "task=x2t_image prompt=x": "task x2t_image needs a picture and got none: give image=FILE",
    "task=x2t_image prompt=x image=/none.png": "the picture /none.png is missing",
    "task=t2i prompt=x image=a.png": "task t2i looks at no image: leave image=... out",
    "task=t2i prompt=x instruction=y": "task t2i takes no instruction",
    "task=t2i prompt=x examples=a.json": "examples=a.json brings its own requests: leave prompt out",
    "examples=/none/t2i.json": "the example file /none/t2i.json is missing",
    "task=t2i prompt=x resolution=big": "resolution=big is unknown: take one of image_256res",
    "task=t2i prompt=x height=-1": "height=-1 must be positive",
    "task=t2i prompt=x steps=0": "steps=0 must be at least 1",
    "task=t2i prompt=x guidance=-3": "guidance=-3.0 must be at least 0",
    "task=t2i prompt=x guidance=nan": "guidance=nan must be at least 0",
    "task=t2i prompt=x timestep_shift=nan": "timestep_shift=nan must be positive",
    "task=t2i prompt=x frames=5": "task t2i draws a single frame: leave frames=5 out",
    "task=i2v prompt=x image=a.png height=64 checkpoint=tiny_video": "takes its height from image=...: leave height=64",
    "task=video_edit prompt=x video=a.gif frames=5 checkpoint=tiny_video": "takes its frames from video=...: leave",
    "task=x2t_image prompt=x image=a.png width=64": "task x2t_image draws nothing: leave width=64 out",
    "task=t2v prompt=x frames=45 checkpoint=tiny_video": "draws 45 frames at 12 a second, beyond this model's 9: take",
    "task=t2i prompt=x seed=-1": "seed=-1 must lie between",
    "task=t2i prompt=x max_new_tokens=0": "max_new_tokens=0 must be at least 1",
    "task=t2i prompt=x device=gpu": "device=gpu is unknown",
    "task=t2i prompt=x weights=''": "weights is empty: give weights=bf16",
    "task=t2i prompt=x int4.backend=blocks": "int4.backend=blocks is of packed weights: give weights=FOLDER",
    "task=t2i prompt=x int4.resident_gb=2": "int4.resident_gb=2.0 is of packed weights: give weights=FOLDER",
    "task=t2i prompt=x int4=null": "field 'int4' is not Optional",
    "task=t2i prompt=x weights=none int4.backend=fast device=cpu": "backend=fast is unknown: take auto or one of",
    "task=t2i prompt=x weights=none int4.resident_gb=2 device=cpu": "int4.resident_gb=2.0 has no say on a CPU",
    "task=t2i prompt=x int4.speed=2": "Key 'speed'",
    "task=t2i prompt=x +y=1": "Key 'y' not in 'GenerateConfig'",
    "task=t2i prompt=x checkpoint=imag": "Could not find 'checkpoint/imag'",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_one_sentence(words, monkeypatch, capsys):
    register_settings()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["flows.generate", *words.split()])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert MISTAKES[words] in err and err.startswith("error: ") and err.count("\n") == 1


TEXTS = [
    "a, b",
    "it's",
    "end\\",
    r"a\'b",
    "{x: 1}",
    "[1,2]",
    "${seed}",
    "a=b",
    "'q' and 'r'",
    "",
    "1",
    "ünï\nline",
    "#x",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_taken_to_the_letter(text):
    register_settings()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("generate", literal(["task=t2i", f"prompt={text}", "seed=3"]))
    assert strict(GenerateConfig, composed).prompt == text


def test_what_is_quoted_for_hydra_stays(monkeypatch):
    assert literal(["prompt='a, b'", 'prompt="a"', "seed=1,2"]) == ["prompt='a, b'", 'prompt="a"', "seed=1,2"]


def test_at_most_nine_lines_of_progress(capsys):
    lines = Lines(7)
    for index in range(7):
        progress = lines.of(index)
        for step in range(30):
            progress(step + 1, 30, "it")
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 9 and err[-1] == "100%  it: 30 of 30"
