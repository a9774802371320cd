import dataclasses

import pytest
import torch
import yaml

import fxq
from fxq.export.hub.card import Card, License, license_of, make_card, plain_words
from fxq.export.hub.client import HubError
from fxq.export.hub.use import EXPORTS
from fxq.export.interop import Options, export_bundle
from tests.toys import recipe, rows, toy


def parts(text):
    """Metadata and Markdown of a card."""
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_metadata_are_those_the_hub_reads(bundle):
    card = Card(repository="me/toy", base_model="org/base", license=License("apache-2.0"))
    data, body = parts(make_card(bundle, card))
    assert data["base_model"] == "org/base" and data["base_model_relation"] == "quantized"
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == ("apache-2.0", "fxq", "text-to-video")
    assert {"fxq", "quantized", "w4a8"} <= {*data["tags"]}
    assert 'fxq.load("me/toy")' in body and "https://huggingface.co/org/base" in body


def test_a_card_says_what_lies_in_the_folder(bundle):
    _, body = parts(make_card(bundle, Card()))
    module = fxq.load(bundle)
    summary = fxq.summary(module)
    assert f"| quantized linears | {len(summary.quantized)} as W4A8 |" in body
    assert "| PSNR dB | 41.5 |" in body and "output SQNR dB median" in body
    assert "[[methods]]" in body
    data, _ = parts(make_card(bundle, Card()))
    assert "base_model" not in data and "license" not in data
    assert "layers quantized" not in body


def test_names_and_reasons_are_no_markup(tmp_path):
    assert plain_words("a|b <img src=x>\n# [x](y)") == r"a\|b \<img src=x\> \# \[x\](y)"
    model = toy()
    first = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    rules = (fxq.Rule(first, None, "see | <script>alert(1)</script>"), *recipe(8).rules)
    q = fxq.quantize(model, [rows(32, 96)], dataclasses.replace(recipe(8), rules=rules), progress=False)
    body = make_card(fxq.save(q, tmp_path / "b"), Card()).split("<details>")[0]
    assert "<script>" not in body and r"see \| \<script\>" in body


@pytest.mark.parametrize("target", ["comfy", "diffusers-torchao"])
def test_an_export_says_how_its_runtime_reads_it(tmp_path, target):
    q = fxq.quantize(toy(), [rows(32, 96)], recipe(8, per_token=True, dual_scale=False), progress=False)
    folder = fxq.save(q, tmp_path / "b")
    export_bundle(folder, target, tmp_path / "e", Options(float_dtype=None, widen=True, base_config={}))
    _, body = parts(make_card(tmp_path / "e", Card(repository="me/x")))
    assert target in body and "hf download me/x" in body and EXPORTS[target].split("`")[0][:20] in body


def test_results_and_pictures_stand_in_it(bundle, tmp_path):
    (tmp_path / "table.md").write_text("| a |\n| --- |\n| 1 |\n")
    (tmp_path / "side_by_side.png").write_bytes(b"x")
    card = Card(results=tmp_path / "table.md", pictures=(tmp_path / "side_by_side.png",))
    text = make_card(bundle, card)
    assert "| a |\n| --- |\n| 1 |" in text and "![side by side](side_by_side.png)" in text
    for wrong, message in (("a.svg", "is no picture"), ("none.png", "no such picture")):
        with pytest.raises(fxq.BundleError, match=message):
            make_card(bundle, dataclasses.replace(card, pictures=(tmp_path / wrong,)))
    with pytest.raises(fxq.BundleError, match=r"results .* cannot be read"):
        make_card(bundle, dataclasses.replace(card, results=tmp_path / "none.md"))


def test_headings_of_results_stand_below_that_of_the_card(bundle, tmp_path):
    (tmp_path / "table.md").write_text("# two bundles\n\n```sh\n# not a heading\n```\n\n## more\n")
    text = make_card(bundle, Card(results=tmp_path / "table.md"))
    assert "\n### two bundles\n" in text and "\n#### more\n" in text and "\n# not a heading\n" in text


def test_parts_of_a_card_are_told_apart(bundle, tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.png").write_bytes(b"x")
    card = Card(base_model="org/base", pictures=(tmp_path / "a.png", tmp_path / "b.png"))
    body = parts(make_card(bundle, card))[1]
    for start in ("Quantized from", "![a]", "![b]", "- "):
        assert f"\n\n{start}" in body


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(fxq.BundleError, match="neither a bundle of fxq"):
        make_card(tmp_path, Card())


def test_the_licence_is_that_of_the_base_model(hub):
    hub.repositories["org/base"] = {}
    hub.cards["org/base"] = {"license": "other", "license_name": "wan", "license_link": "https://x"}
    assert license_of("org/base") == License("other", "wan", "https://x")
    hub.cards["org/base"] = {}
    with pytest.raises(HubError, match="states no licence on its card"):
        license_of("org/base")
    with pytest.raises(HubError, match="no such repository"):
        license_of("org/none")
