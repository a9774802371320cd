"""The page on the cache runs, and its tables are the result file's."""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cache.md").read_text()
RESULT = json.loads((ROOT / "benchmarks" / "results" / "kv_cache.json").read_text())


ABSORBED = json.loads((ROOT / "benchmarks" / "results" / "absorb_cache.json").read_text())


def test_the_code_of_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names = {"__name__": "docs_cache"}
    exec(compile("\n".join(blocks), "cache.md", "exec"), names)
    assert names["latents"].shape == (2, 21, 3, 20, 20)
    assert len(names["verdicts"]) == 4 and names["verdicts"][0].converted
    exact, packed = map(int, capsys.readouterr().out.split())
    assert 0 < packed < exact


def test_every_number_of_the_tables_is_measured():
    for name, row in RESULT["reconstruction"].items():
        assert f"| {name} | {row['keys_bits']:.2f} | {row['keys_sqnr']:.1f} | {row['values_sqnr']:.1f} |" in PAGE
    for name, row in RESULT["free_rollouts"].items():
        assert f"| {name} | {row['psnr']:.1f}" in PAGE if "psnr" in row else f"| {name} |" in PAGE
    for name, row in RESULT["long_rollouts"].items():
        assert f"| {name} | {row['scores']['shape']:.3f} |" in PAGE


def test_every_number_of_the_table_on_absorbing_is_measured():
    for positions in ("absolute", "relative"):
        for name, row in ABSORBED[positions]["rows"].items():
            layers = ", ".join(map(str, row["layers"]))
            assert f"| {positions} | {name} | {layers} | {row['psnr']:.1f} (" in PAGE
