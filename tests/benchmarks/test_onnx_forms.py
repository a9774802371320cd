import json
import sys

from benchmarks import onnx_forms
from fxq import cpu


def test_every_form_but_one_is_right_on_every_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_forms, "ROWS", 40)
    monkeypatch.setattr(onnx_forms, "WIDTH", 64)
    out = tmp_path / "forms.json"
    monkeypatch.setattr(sys, "argv", ["onnx_forms", "--out", str(out), "--rounds", "2"])
    onnx_forms.main()
    found = json.loads(out.read_text())["rows"]
    assert list(found) == list(onnx_forms.FORMS) and "x float32" in capsys.readouterr().out
    right = {name for name, row in found.items() if row["sqnr"] > 30}
    assert {"unsigned (vnni=False)", "halves"} <= right
    assert not cpu.has_vnni() or len(right) == 3
