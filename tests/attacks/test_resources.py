"""Attack 4: files that are no files, and texts, headers and archives that cost more than they are."""

import json
import os
import shutil
import threading

import pytest
import torch
from safetensors.torch import save_file

import fxq
from fxq.core.config import RecipeError
from fxq.export import read_manifest, read_receipt, verify_bundle
from fxq.models.checkpoints import CheckpointError, read_tensors
from fxq.recipes import get_recipe
from fxq.runtime.reading import MAX_JSON_BYTES, ReadError, parse_json, read_header, regular_file
from tests.attacks.corpus import FILES, edit_json, resign

READERS = (fxq.load, read_manifest)


def within(seconds, call):
    """The result of a call that must end in time; a reader that waits would wait for ever."""
    done = []
    thread = threading.Thread(target=lambda: done.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert done, f"no end within {seconds} seconds"
    return done[0]


def error_of(call):
    try:
        call()
    except fxq.BundleError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(bundle, name):
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    assert "no regular file" in within(20, lambda: error_of(lambda: fxq.load(bundle)))
    assert not within(20, lambda: verify_bundle(bundle)).ok


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("target", ["/dev/zero", "/proc/self/mem", "/etc/hostname", "/proc/self/environ", "/dev/fd/0"])
def test_a_link_out_of_the_folder_is_not_followed(bundle, name, target):
    (bundle / name).unlink()
    (bundle / name).symlink_to(target)
    with pytest.raises(fxq.BundleError, match=r"outside its folder|cannot be read|Permission|no regular file"):
        fxq.load(bundle)


def test_a_folder_in_the_place_of_a_file_is_refused(bundle):
    (bundle / "graph.json").unlink()
    (bundle / "graph.json").mkdir()
    with pytest.raises(fxq.BundleError, match="no regular file"):
        fxq.load(bundle)


def test_the_layout_of_a_hub_cache_is_read(bundle, tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, name in enumerate(FILES):
        shutil.move(bundle / name, blobs / str(i))
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    assert fxq.load(snapshot) is not None


def test_a_link_to_the_folder_itself_is_the_users_own(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle)
    assert fxq.load(tmp_path / "link") is not None


HUGE = 100 * (1 << 20)


@pytest.mark.parametrize("name", ["manifest.json", "graph.json"])
def test_a_text_of_a_hundred_megabytes_is_not_parsed(bundle, name):
    edit_json(bundle, name, lambda data: data.update(note="x" * HUGE))
    with pytest.raises(fxq.BundleError, match=rf"has \d+ bytes, a file of its kind has at most {MAX_JSON_BYTES}"):
        fxq.load(bundle)


@pytest.mark.parametrize("name", ["manifest.json", "graph.json"])
@pytest.mark.parametrize("pair", ["[]", '{"a":1}'.replace("1", "{}")])
def test_nesting_is_refused_before_it_is_parsed(bundle, name, pair):
    text = (bundle / name).read_text().rstrip()[:-1] + ', "deep": ' + "[" * 900 + "]" * 900 + "}"
    (bundle / name).write_text(text)
    resign_raw(bundle, name)
    for read in (fxq.load, verify_bundle) if name == "graph.json" else (fxq.load, read_manifest, verify_bundle):
        try:
            assert not read(bundle).ok
        except fxq.BundleError as error:
            assert "nested deeper than 100 levels" in str(error)


def resign_raw(bundle, name):
    if name == "graph.json":
        resign(bundle)


JSON = {
    "twice": ('{"a": 1, "a": 2}', "stands twice"),
    "deep": ("[" * 101 + "]" * 101, "nested deeper"),
    "wide": ("[" + "{}," * 600_000 + "{}]", "more than"),
    "long": (json.dumps("x" * (2 << 20)), "characters"),
    "integer": ("1" + "0" * 19, "more than 64 bits"),
    "huge integer": ("1" * 5000, "more than 64 bits"),
    "surrogate": (r'"\ud800"', "not valid JSON"),
    "half": ('{"a": ', "not valid JSON"),
    "latin": (b'"\xff"', "not valid JSON"),
    "brackets in a text": ('"' + "[" * 500 + '"', None),
    "quotes in a text": (r'"\"[\\\"["', None),
    "special": ("[NaN, Infinity, -Infinity]", None),
}


@pytest.mark.parametrize("case", JSON)
def test_json_is_read_within_limits(case):
    text, message = JSON[case]
    if message is None:
        assert parse_json(text) is not None
        return
    with pytest.raises(ReadError, match=message):
        parse_json(text)


def header(path, **entries):
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    return path


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "sound": ({"a": F32}, None),
    "too long": ({"a": {**F32, "data_offsets": [0, 9]}}, "are not the 9 bytes"),
    "too short": ({"a": {**F32, "shape": [1], "data_offsets": [0, 4]}}, "describes 4 bytes of data, it has 8"),
    "overlap": ({"a": F32, "b": F32}, "begins at 0, expected 8"),
    "negative": ({"a": {**F32, "data_offsets": [-8, 0]}}, "no shape and offsets"),
    "overflow": ({"a": {**F32, "shape": [2**62, 2**62, 4]}}, "are not the 8 bytes"),
    "zero times huge": ({"a": F32, "b": {**F32, "shape": [0, 2**62], "data_offsets": [8, 8]}}, None),
    "rank": ({"a": {**F32, "shape": [1] * 17 + [2]}}, "no shape"),
    "boolean": ({"a": {**F32, "shape": [True, 2]}}, "no shape"),
    "dtype": ({"a": {**F32, "dtype": "Q8"}}, "has dtype 'Q8'"),
    "name": ({"a" * 600: F32}, "no name of a tensor"),
    "escape": ({"\x1b[2J": F32}, "no name of a tensor"),
    "metadata": ({"__metadata__": {"a": 1}, "b": F32}, "is not text by name"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_of_tensor_files_describe_every_byte_once(tmp_path, case):
    entries, message = HEADERS[case]
    path = header(tmp_path / "x.safetensors", **entries)
    if message is None:
        assert "a" in read_header(path).tensors
        return
    with pytest.raises(ReadError, match=message):
        read_header(path)
    with pytest.raises(fxq.BundleError, match="cannot be read"):
        read_receipt(path)


@pytest.mark.parametrize("size", [0, 2**62, 2**64 - 1, MAX_JSON_BYTES + 1])
def test_a_header_of_another_length_is_refused(tmp_path, size):
    path = tmp_path / "x.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + bytes(64))
    with pytest.raises(ReadError, match=r"truncated|not valid JSON"):
        read_header(path)


def test_a_large_header_is_not_parsed(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((MAX_JSON_BYTES + 8).to_bytes(8, "little"))
        file.truncate(MAX_JSON_BYTES + 64)
    with pytest.raises(ReadError, match="its header has"):
        read_header(path)


NAMES = ["lambda", "x y", "a.b", "torch", "\uff4cambda", "__import__('os')", "1x", "a" * 600, "x\n", ""]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_reach_generated_source_are_identifiers(bundle, name):
    def edit(data):
        data["arguments"] = [name]

    edit_json(bundle, "graph.json", edit)
    with pytest.raises(fxq.BundleError, match=r"is not an identifier|global of the generated source"):
        fxq.load(bundle)


@pytest.mark.parametrize(
    "name", ["forward", "__class__", "training", "_parameters", "a" + ".a" * 40, 'a"b', "graph.x", "."]
)
def test_names_of_tensors_do_not_touch_the_module(bundle, name):
    def edit(data):
        node = next(node for node in data["nodes"] if node["target"] == "head.bias")
        node["target"] = name

    edit_json(bundle, "graph.json", edit)
    with pytest.raises(fxq.BundleError, match="is not a tensor's name"):
        fxq.load(bundle)


def test_a_call_of_verify_takes_bounded_memory(bundle):
    edit_json(bundle, "manifest.json", lambda data: data["inputs"][0].update(example=[2**21, 96]))
    verdict = verify_bundle(bundle)
    detail = next(c.detail for c in verdict.checks if c.name == "one call against the fingerprint")
    assert not verdict.ok and "one call is too large" in detail


def test_a_checkpoint_that_is_a_pipe_or_points_elsewhere_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    os.mkfifo(tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        with pytest.raises(CheckpointError, match="no regular file"):
            read_tensors(tmp_path / name)
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    (folder / "s.safetensors").symlink_to(tmp_path / "outside.safetensors")
    for shard in ("../outside.safetensors", "/etc/hostname", "..\\outside.safetensors", "s.safetensors"):
        index = folder / "m.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(CheckpointError, match="outside"):
            read_tensors(folder)


def test_a_regular_file_behind_a_link_of_the_user_is_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").symlink_to(tmp_path / "x.safetensors")
    assert torch.equal(read_tensors(tmp_path / "y.safetensors")["a"], torch.ones(2))
    assert regular_file(tmp_path / "y.safetensors").name == "x.safetensors"


RECIPES = {
    "deep.json": "[" * 5000 + "]" * 5000,
    "deep.toml": "a = " + "[" * 5000 + "]" * 5000,
    "dotted.toml": ".".join("a" * 400) + " = 1",
    "large.json": '{"name": "' + "x" * (2 << 20) + '"}',
    "pattern.json": json.dumps({"name": "x", "methods": [], "rules": [{"pattern": "re:(a+)+b", "scheme": None}]}),
    "repeats.json": json.dumps({"name": "x", "methods": [], "rules": [{"pattern": "re:" + ".*a" * 9, "scheme": None}]}),
    "number.json": json.dumps({"name": "x", "rules": [], "methods": [{"method": "AdaRound", "iterations": 10**12}]}),
    "nan.json": '{"name": "x", "rules": [], "methods": [], "max_rows": NaN}',
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_file_asks_for_no_more_than_a_model_needs(tmp_path, name):
    (tmp_path / name).write_text(RECIPES[name])
    with pytest.raises(RecipeError, match="recipe file"):
        get_recipe(tmp_path / name)


def test_usual_patterns_of_recipe_files_are_read(tmp_path):
    patterns = [r"re:blocks\.\d+\.(self|cross)_attn\.(q|k|v)", r"re:(model\.)?.*ffn.*", "*attn*", "re:a{2}b?"]
    rules = [{"pattern": pattern, "scheme": None, "reason": "x", "optional": True} for pattern in patterns]
    (tmp_path / "r.json").write_text(json.dumps({"name": "x", "methods": [{"method": "MinMax"}], "rules": rules}))
    assert [rule.pattern for rule in get_recipe(tmp_path / "r.json").rules] == patterns
