import json
import sys

import pytest

from benchmarks import combined


@pytest.mark.sweep
def test_all_parts_together_keep_the_video_in_a_fraction_of_the_bytes(tmp_path, monkeypatch, capsys):
    out = tmp_path / "combined.json"
    words = ["--videos", "1", "--calibration-videos", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["combined", *words])
    combined.main()
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == list(combined.ROWS) and "| W4A8, KLT 1 bit |" in capsys.readouterr().out
    floats, together = rows["float"], rows["W4A8, KLT 1 bit, half the layers absorbed"]
    assert together["scores"]["shape"] == 1 and together["psnr"] > 25
    assert together["weights"] < 0.4 * floats["weights"] and together["cache"] < 0.3 * floats["cache"]
    assert together["peak_of_a_chunk"] < floats["peak_of_a_chunk"] and len(together["absorbed_layers"]) == 2
