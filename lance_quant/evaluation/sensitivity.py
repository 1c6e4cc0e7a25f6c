"""sensitivity.parquet: what rounding did to every linear of a model, all layers in one table.

table = pd.read_parquet("artifacts/report/<key>/sensitivity.parquet")
plan = by_need(table).query("total <= 100e6")      # the linears that 100 MB are best spent on
"""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lance_quant.checkpoint.layout import PATHS, SITES
from lance_quant.checkpoint.native import NIBBLE_BITS, packed_specs

SENSITIVITY_FILE = "sensitivity.parquet"
SENSITIVITY = pa.schema(  # and error_<ingredient>, weighed_<ingredient> of those that the recipe has
    [
        ("layer", pa.int32()),
        ("path", pa.string()),
        ("site", pa.string()),
        ("name", pa.string()),
        ("recipe", pa.string()),
        ("bits", pa.int32()),
        ("group_size", pa.int32()),
        ("shape", pa.list_(pa.int32())),  # outputs, inputs
        ("scheme", pa.string()),
        ("fold", pa.string()),
        ("family", pa.string()),
        ("alpha", pa.float64()),
        ("clip_low", pa.float64()),
        ("clip_high", pa.float64()),
        ("error_kind", pa.string()),
        ("error_before", pa.float64()),
        ("error_after", pa.float64()),
        ("weighed_before", pa.float64()),
        ("weighed_after", pa.float64()),
        ("parameters", pa.int64()),  # of the weight
        ("bytes", pa.int64()),  # of its codes, scales and zeros as packed
    ]
)


def sensitivity(layers: list[Path], recipe: str) -> pa.Table:
    """A row a linear, by layer, path, site and name, from the search artifacts' folders in any order.

    Columns are those of linears.parquet, parameters and bytes, then the errors after each ingredient in the recipe's
    order, those before any being error_before and weighed_before.
    """
    linears, ingredients = (read_rows(layers, table) for table in ("linears", "ingredients"))
    names = list(dict.fromkeys(row["ingredient"] for row in ingredients if row["ingredient"] != "minmax"))
    kinds = ["error"] + ["weighed"] * any(row["weighed"] is not None for row in ingredients)
    after = {(row["name"], row["ingredient"]): row for row in ingredients}
    rows = []
    for row in sorted(linears, key=place):
        shape = (row["out_features"], row["in_features"])
        parts = packed_specs([(f"{row['name']}.weight", shape)], {row["name"]: row["group_size"]})
        counts = {"parameters": shape[0] * shape[1], "bytes": sum(part.bytes for part in parts)}
        errors = {f"{kind}_{name}": after[row["name"], name][kind] for kind in kinds for name in names}
        rows.append(row | {"recipe": recipe, "shape": shape} | counts | errors)
    columns = [pa.field(f"{kind}_{name}", pa.float64()) for kind in kinds for name in names]
    return pa.Table.from_pylist(rows, pa.schema([*SENSITIVITY, *columns]))


def read_rows(layers: list[Path], table: str) -> list[dict]:
    return [row for folder in layers for row in pq.read_table(folder / f"{table}.parquet").to_pylist()]


def place(row: dict) -> tuple[int, int, int, str]:
    return row["layer"], PATHS.index(row["path"]), SITES.index(row["site"]), row["name"]


def by_need(table: pd.DataFrame, bits: int = 8) -> pd.DataFrame:
    """Linears by what they suffer per byte that `bits` bits a weight would add, worst first: a mixed-precision plan is
    the top of it, down to a budget.

    error: weighed_after, or error_after where no gradient tells. more: bytes added. per_byte: error^2 / more, since
    squares add up where errors know nothing of each other, and of 4 bits' hardly any is left at 8. total: bytes added
    by the linear and all above. Errors are relative to each linear's own outputs: they rank, and foretell no loss.
    """
    need = table[["layer", "path", "site", "name", "error_kind", "bytes"]].copy()
    need["error"] = table["weighed_after"].fillna(table["error_after"])
    need["more"] = table["parameters"] * (bits - NIBBLE_BITS) // 8
    need["per_byte"] = need["error"] ** 2 / need["more"]
    need = need.sort_values("per_byte", ascending=False, kind="stable", ignore_index=True)
    return need.assign(total=need["more"].cumsum())
