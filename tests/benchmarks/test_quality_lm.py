"""Language models through the product's own stages, on a tiny one: rows of numbers, or one sentence and exit code 1."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import layer_error, quality_lm
from benchmarks.layer_error import parser_of_layers
from benchmarks.quality_lm import PIECE, parser_of
from tests.benchmarks.tiny_gguf import LAYERS, text, write_gguf

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The file, and texts of which no single one makes a piece."""
    folder = tmp_path_factory.mktemp("given")
    write_gguf(folder / "model.gguf")
    for place, seeds in (("calibration", range(6)), ("evaluation", range(6, 11))):
        (folder / place).mkdir()
        for seed in seeds:
            (folder / place / f"{seed}.txt").write_text(text(PIECE // 2, seed))
    return folder


def words_for(given, *more):
    words = [str(given / "model.gguf"), "--calibration", str(given / "calibration"), "--device", "cpu"]
    words += ["--evaluation", str(given / "evaluation"), "--group-size", "32", "--rows", "256"]
    return [*words, "--calibration-tokens", "2048", "--evaluation-tokens", "1024", *more]


def test_recipes_give_rows(given, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    words = words_for(given, "--recipes", "minmax,fast", "--seeds", "0,1", "--out", str(out))
    quality_lm.main(parser_of("").parse_args(words))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["recipe"] for row in rows] == 2 * ["minmax", "fast"] and [row["seed"] for row in rows] == [0, 0, 1, 1]
    for row in rows:
        assert (row["tokens"], row["calibration_tokens"], row["bits"]) == (2 * (PIECE - 1), 3 * PIECE, 4)
        assert 0 < row["kl"] < 5 and row["kl_error"] >= 0 and 0 < row["top1"] <= 1
    assert rows[0]["kl"] == rows[2]["kl"]  # minmax looks at no text
    assert all(fast["kl"] < minmax["kl"] for minmax, fast in zip(rows[::2], rows[1::2], strict=True))
    told = capsys.readouterr()
    assert f"{3 * PIECE} of 2048 calibration tokens, {2 * PIECE} of 1024 to evaluate with" in told.out
    assert not told.err and "\r" not in told.out


def test_a_rotated_model_is_compared_with_the_files(given, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    for more in ([], ["--rotate"]):
        words = words_for(given, "--recipes", "minmax", "--out", str(out), *more)
        quality_lm.main(parser_of("").parse_args(words))
    plain, rotated = (json.loads(line) for line in out.read_text().splitlines())
    assert (plain["rotate"], rotated["rotate"]) == (False, True)
    assert plain["perplexity_bf16"] == rotated["perplexity_bf16"] and plain["kl"] != rotated["kl"] < 5
    assert "4/2 heads, rotated values; 4 bits" in capsys.readouterr().out


def test_single_layers(given, tmp_path, capsys):
    out = tmp_path / "layers.jsonl"
    words = words_for(given, "--recipes", "nearest,best", "--layers", "1,1", "--out", str(out))
    layer_error.main(parser_of_layers().parse_args(words))
    words = words_for(given, "--recipes", "nearest", "--layers", "1", "--out", str(out), "--rotate")
    layer_error.main(parser_of_layers().parse_args(words))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["rotate"] for row in rows] == [False, False, True]
    nearest, best, rotated = (row["errors"]["1"] for row in rows)
    assert rotated != nearest
    assert all(0 < ours < theirs for ours, theirs in zip(best, nearest, strict=True))
    assert f"{3 * PIECE} of 2048 calibration tokens, {2 * PIECE} of 1024 held out" in capsys.readouterr().out


def test_the_texts_of_the_installation(tmp_path):
    args = parser_of("").parse_args(["x.gguf"])
    places = [place for place, _ in quality_lm.texts_of(args, SimpleNamespace(hidden_size=64), tmp_path)]
    assert [place.name for place in places] == ["calibration", "evaluation"]
    assert all(list(place.glob("*.txt")) for place in places)
    names = [{file.name for file in place.iterdir()} for place in places]
    assert not names[0] & names[1]


BAD = [
    (["--recipes", "worst"], "--recipes has no 'worst'; choose from awq, best"),
    (["--bits", "5"], "bits=5 does not fit"),
    (["--group-size", "48"], "group_size=48 does not divide the 64 inputs of .*; sizes that fit: 16, 32, 64"),
    (["--group-size", "0", "--recipes", "published"], "group_size=0"),
    (["--calibration", "empty"], "empty holds no .txt or .md file"),
    (["--evaluation", "nowhere"], "nowhere is neither a file nor a folder"),
    (["--evaluation", "short"], "short holds 7 tokens of text, which do not make a piece of 512"),
    (["--evaluation-tokens", "100"], "--evaluation-tokens=100 makes no piece: give 512 or more"),
    (["--calibration-tokens", "0"], "--calibration-tokens=0 makes no piece"),
    (["--device", "tpu"], "device=tpu is unknown"),
    (["--work", "nowhere"], "--work=nowhere is no folder"),
    (["--out", "nowhere/rows.jsonl"], "--out=nowhere/rows.jsonl lies in no folder: make nowhere first"),
    (["--out", "."], "--out=. is a folder: name a file in it, such as results.jsonl"),
    (["--rows", "0"], "--rows=0 must be at least 1"),
    (["--gradient-tokens", "-1"], "--gradient-tokens=-1 must be at least 0"),
    (["--gradient-tokens", "0", "--recipes", "fast,best"], "recipe best weighs .*--gradient-tokens=0 keeps none"),
]
BAD_SEEDS = [
    (["--seeds", "one"], "--seeds=one must be whole numbers"),
    (["--seeds=-1"], r"--seeds has -1, which must lie between 0 and 2\*\*32 - 1"),
    (["--seeds", f"0,{2**32}"], "--seeds has 4294967296"),
]
ONE_PIECE = (["--evaluation-tokens", str(PIECE)], "gives one piece of 512 tokens to evaluate with")
BAD_LAYERS = [
    (["--layers", f"0,{LAYERS}"], "--layers has 2, and the model's are 0 to 1"),
    (["--layers", "last"], "--layers=last must be whole numbers"),
]


@pytest.mark.parametrize(
    "script, words, sentence",
    [("quality_lm", *bad) for bad in (*BAD, *BAD_SEEDS, ONE_PIECE)]
    + [("layer_error", *bad) for bad in BAD + BAD_LAYERS],
)
def test_bad_input_is_told_in_one_sentence(given, tmp_path, monkeypatch, script, words, sentence):
    for name, content in (("empty/readme.rst", ""), ("short/a.md", "the cat near the dog")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    module = {"quality_lm": quality_lm, "layer_error": layer_error}[script]
    parser = parser_of("") if script == "quality_lm" else parser_of_layers()
    layers = [] if script == "quality_lm" or "--layers" in words else ["--layers", "0"]
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}") as exit:
        module.main(parser.parse_args(words_for(given, "--recipes", "minmax", *layers, *words)))
    assert "\n" not in exit.value.code


EARLY = [bad for bad in BAD + BAD_SEEDS if bad[0][0].startswith(("--out", "--rows", "--gradient", "--seeds"))]


@pytest.mark.parametrize("words, sentence", EARLY)
def test_options_are_read_before_the_model(given, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality_lm, "write_checkpoint", lambda *_: pytest.fail("the model was read"))
    with pytest.raises(SystemExit, match=sentence):
        quality_lm.main(parser_of("").parse_args(words_for(given, *words)))


@pytest.mark.parametrize("watched", [True, False])
def test_progress_is_for_terminals(monkeypatch, watched):
    told = io.StringIO()
    told.isatty = lambda: watched
    monkeypatch.setattr("sys.stderr", told)
    quality_lm.show("fast: layer 1 of 2")
    assert ("fast: layer 1 of 2" in told.getvalue()) == watched


@pytest.mark.parametrize("script", ["quality_lm", "layer_error"])
def test_exit_code_and_stderr(tmp_path, script):
    (tmp_path / "readme.md").write_text("# A model\n")
    for file, sentence in (("readme.md", "is not a whole GGUF file"), ("absent.gguf", "there is no GGUF file at")):
        command = [sys.executable, f"benchmarks/{script}.py", str(tmp_path / file)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=quality_lm.ROOT)
        assert run.returncode == 1 and not run.stdout
        assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1 and sentence in run.stderr
