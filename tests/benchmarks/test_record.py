import json
import sys

from benchmarks import record


def test_a_result_says_how_when_and_where_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/else/benchmarks/mixed.py", "--out", "a b.json"])
    record.write(tmp_path / "deep" / "r.json", {"rows": [1]}, onnxruntime="1.2")
    found = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert found["command"] == "python -m benchmarks.mixed --out 'a b.json'" and found["rows"] == [1]
    assert {"torch", "python", "onnxruntime"} <= found["environment"].keys() and found["date"].count("-") == 2
