import csv
import io
import json
import math

from fxq.comparison.bundles import tables
from tests.comparison.bundles.example import results, row


def cells(line):
    return [cell.strip() for cell in line.strip("|").replace("\\|", "/").split("|")]


def test_the_markdown_table_has_what_people_gate_on():
    head, rule, full, a, b = tables.markdown_table(results()).splitlines()
    names = cells(head)
    assert len(cells(rule)) == len(names) == len(cells(full))
    of_a, of_b = (dict(zip(names, cells(line), strict=True)) for line in (a, b))
    assert (of_a["forced PSNR median chunk, dB"], of_b["forced PSNR median chunk, dB"]) == ("46.5", "37.5")
    assert of_a["forced PSNR worst chunk, dB"] == "31.2 (video 2, chunk 2)"
    assert of_a["free PSNR first → last chunk, dB"] == "47.0 → 42.5"
    assert (of_a["speed of full precision"], of_a["memory peak"], of_b["bits"]) == ("2.00", "1.50 GB", "W4A8")
    assert dict(zip(names, cells(full), strict=True))["time s a chunk"] == "0.500"


def test_metrics_are_columns_and_those_that_are_lacking_are_named():
    assert "LPIPS, FVD and VBench" in tables.lacking(results())
    found = results(full_metrics={"lpips": 0.0}, rows=(row("a", [[50.0, 40.0]], metrics={"lpips": 0.0123}),))
    assert tables.lacking(found).startswith("Not measured: FVD and VBench.")
    assert "lpips" in tables.markdown_table(found) and "0.01230" in tables.markdown_table(found)
    everything = {"LPIPS-alex": 0.0, "fvd": 1.0, "VBench": 2.0}
    assert not tables.lacking(results(full_metrics=everything, rows=()))


def test_texts_say_what_was_measured_and_hostile_names_stay_cells():
    text = tables.to_markdown(results())
    assert "2. a \\| dog &lt;b>" in text and "`fxq compare --bundles a b`" in text
    assert "decoded frames" in tables.about(results()) and "takes 0.750 s a chunk more" in tables.about(results())
    assert "as no decoder was given" in tables.about(results(space="latents", clips=()))
    assert "31.2 dB (video 2, chunk 2)" in tables.sentences(results())["a"]
    table = tables.markdown_table(results(rows=(row("a|b\n<i>", [[50.0, 40.0]]),)))
    assert len(table.splitlines()) == 4 and "a\\|b &lt;i>" in table


def test_every_chunk_is_a_line_and_json_has_all_of_it():
    found = results()
    lines = list(csv.DictReader(io.StringIO(tables.chunks_to_csv(found))))
    assert len(lines) == 3 * 2 * 3
    line = next(x for x in lines if (x["version"], x["video"], x["chunk"]) == ("a", "2", "2"))
    assert (float(line["forced_psnr"]), float(line["free_psnr"]), float(line["seconds"])) == (31.25, 29.25, 0.25)
    assert all(x["forced_psnr"] == "" for x in lines if x["version"] == "full precision")
    bad = results(full_metrics={"fvd": math.nan}, rows=(row("a", [[50.0, 40.0]], metrics={"fvd": math.inf}),))
    told = json.loads(json.dumps(tables.to_json(bad), allow_nan=False))
    assert told["full"]["metrics"]["fvd"] is None and told["rows"][0]["metrics"]["fvd"] is None
    assert json.loads(json.dumps(tables.to_json(found)))["rows"][0]["by_chunk"]["forced_psnr"][1] == [44, 31.25, 47]
