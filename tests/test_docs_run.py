"""The README's lines print what stands below them, and the tutorials run."""

import pathlib
import re
import sys

import pytest

import fxq

ROOT = pathlib.Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def stable(text: str) -> list[list[str]]:
    """Words of each line without the frame, errors and the kernel's name, which depend on the machine."""
    text = re.sub(r"\b(int_mm|native(?: avx2| avx_vnni)?|float32)\b|\b\d+\.\d\b|0\.0\d{3}", "#", text)
    return [words for line in text.splitlines() if (words := re.findall(r"[\w.#-]+", line))]


def printed_error(text: str, name: str) -> float:
    return float(re.search(rf"^{name} ([\d.]+)$", text, re.MULTILINE)[1])


def test_the_readme_prints_what_it_says(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (code,), (said,) = blocks("README.md", "python"), blocks("README.md", "text")
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    text = capsys.readouterr().out
    # A CPU without VNNI says so under the table, in one line or two.
    text = re.sub(r"this CPU has no VNNI[^.]*?(?:float model|native\s+kernels)\s*\n", "", text.replace("fxq.", "fxq "))
    assert stable(text) == stable(said.replace("fxq.", "fxq "))
    assert 0.5 < printed_error(text, "relative error") / printed_error(said, "relative error") < 2
    assert (tmp_path / "out" / "bundle" / "manifest.json").exists()


def test_speeds_of_the_readme_are_those_of_the_page_on_speed():
    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/speed.md"))
    said = re.search(r"Wan 1\.3B (\d\.\d\d) to (\d\.\d\d) times and a whole rollout (\d\.\d\d)\s", readme)
    fastest = {row: float(value) for row, value in re.findall(r"^\| (block|whole).*\| (\d\.\d\d) \(bf16", page, re.M)}
    blocks_ = [float(value) for value in re.findall(r"^\| block.*\| (\d\.\d\d) \(bf16", page, re.MULTILINE)]
    assert [float(value) for value in said.groups()] == [min(blocks_), max(blocks_), fastest["whole"]]
    (with_amx,) = re.findall(r"runs (\d\.\d\d) times as fast as compiled bfloat16", readme)
    assert re.search(rf"^\| block, [^|]* \| \d\.\d\d \| \d\.\d\d \| {with_amx} \|", page, re.MULTILINE)


def test_the_tutorial_runs_and_loses_little(capsys, monkeypatch):
    code = "\n".join(blocks("docs/tutorial.md", "python"))
    names = {"__name__": "docs_tutorial"}
    monkeypatch.setitem(sys.modules, "docs_tutorial", type(sys)("docs_tutorial"))
    exec(compile(code, "tutorial.md", "exec"), names)
    text = capsys.readouterr().out
    assert all(printed_error(text, name) < 0.03 for name in ("loaded", "optimized", "plain"))
    summary = fxq.summary(names["quantized"])
    assert {row.layer for row in summary.kept} == {"time_embedding", "head", "patch_in"}
    assert len(names["sensitivity"]) == 3 and float(names["sensitivity"].sum()) == pytest.approx(1)
    remarks = {row.layer: row.remarks for row in fxq.summary(names["fast"]).rows}
    assert "attention to 2 pieces of keys and values" in remarks["blocks.0.o"]
    assert "one GEMM with blocks.1.k, blocks.1.v" in remarks["blocks.1.q"]
    assert "quantize fused into its norm" in remarks["blocks.1.up"]


def test_the_tutorial_on_publishing_runs_and_its_file_computes_what_the_model_does(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks("docs/publish.md", "python")), "publish.md", "exec"), {"__name__": "docs_publish"})
    text = capsys.readouterr().out
    assert 0 < printed_error(text, "layer") < 0.02 and "lightx2v: model.safetensors" in text
