"""Seconds a layer, on tiny sizes: the script makes its own checkpoint and capture, and recipes run on them."""

import json

from benchmarks import recipe_cost


def test_recipes_give_rows(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    words = ["--sizes", "tiny", "--layers", "1", "--tokens", "600", "--length", "300", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["recipe_cost.py", *words, "--recipes", "minmax,fast,best", "--out", str(out)])
    recipe_cost.main(recipe_cost.arguments())
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["recipe"] for row in rows] == ["minmax", "fast", "best"]
    assert all(row["seconds_layer"] > 0 and row["host_bytes"] > 0 for row in rows)
    assert all(row["error_after"] < row["error_before"] for row in rows[1:])
    assert capsys.readouterr().out.count("\n") == 6
