import dataclasses
import json
import sys

import pytest
import torch
from safetensors import safe_open

import fxq
from benchmarks import size, synthetic
from fxq.calibration.rollout import Draws
from fxq.models.causal_wan import CausalWanConfig
from fxq.models.families import FAMILIES, Family
from fxq.models.loading import layout, load_causal_wan
from fxq.models.prompts import load_prompts
from fxq.models.self_forcing import SelfForcingRollout
from fxq.passes import detect_outliers
from fxq.planning.memory import meta_model
from fxq.runtime.memory.residency import DiskError
from tests.toys import recipe

CONFIG = CausalWanConfig(
    dim=192, ffn_dim=256, num_heads=2, num_layers=2, freq_dim=16, text_dim=64, text_len=40, in_dim=4, out_dim=4
)
SMALL = {"small": synthetic.Size("small", ".pt"), "other": synthetic.Size("small", ".safetensors")}


@pytest.fixture
def family(monkeypatch):
    found = Family(name="small", source="a test", config=CONFIG)
    monkeypatch.setattr(synthetic, "FAMILIES", {"small": found})
    monkeypatch.setattr(size, "FAMILIES", {"small": found})
    for module in (synthetic, size):
        monkeypatch.setattr(module, "SIZES", SMALL)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_synthetic_files_load_as_the_family_in_their_dtype(tmp_path, family, name, dtype):
    path = synthetic.write_checkpoint(name, tmp_path, dtype)
    model = load_causal_wan(path, family)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(bool(p.isfinite().all()) and p.count_nonzero() for p in model.parameters())
    written = path.stat().st_mtime_ns
    assert synthetic.write_checkpoint(name, tmp_path, dtype) == path and path.stat().st_mtime_ns == written


def test_both_forms_hold_the_same_weights_under_the_published_names(tmp_path, family):
    pickled = torch.load(synthetic.write_checkpoint("small", tmp_path), mmap=True, weights_only=True)
    with safe_open(synthetic.write_checkpoint("other", tmp_path), "pt") as file:
        assert set(file.keys()) == {f"model.{name}" for name in layout(CONFIG)} == set(pickled["generator_ema"])
        for name, tensor in pickled["generator_ema"].items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_linears_of_blocks_have_outlier_channels_and_no_others(tmp_path, family):
    model = load_causal_wan(synthetic.write_checkpoint("small", tmp_path), family)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            raw = detect_outliers(module.weight).raw_count
            assert raw >= synthetic.OUTLIERS if name.startswith("blocks.") else raw < synthetic.OUTLIERS


def test_a_call_of_a_synthetic_model_stays_finite(tmp_path, family):
    model = load_causal_wan(synthetic.write_checkpoint("small", tmp_path), family)
    prompts = load_prompts(synthetic.write_prompts(tmp_path, 64), 64, 40)
    condition = {"prompt_embeds": prompts.batch([0, 1], 40)}
    rollout = SelfForcingRollout(model, [(condition, Draws([1, 2], (3, 4, 4, 6)))])
    assert bool(rollout.rollout(*rollout.batches[0]).isfinite().all())


def test_a_disk_without_room_gets_no_file(tmp_path, family, monkeypatch):
    full = synthetic.shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda _: full)
    with pytest.raises(DiskError, match="and 1 GB to spare"):
        synthetic.write_checkpoint("small", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.sweep
@pytest.mark.parametrize("bits", [8, 4])
def test_sizes_are_those_of_the_summary(tmp_path, family, bits):
    model = load_causal_wan(synthetic.write_checkpoint("small", tmp_path), family)
    rollout = SelfForcingRollout(model, [({"prompt_embeds": torch.randn(1, 9, 64)}, Draws([1], (3, 4, 4, 6)))])
    quantized = fxq.quantize(model, rollout, recipe(bits), progress=False)
    found = size.sizes(fxq.save(quantized, tmp_path / "bundle", fingerprint=False), "small")
    rows = [row for row in fxq.summary(quantized).quantized if row.layer.startswith("blocks.")]
    assert found["block_bytes"] == sum(row.bytes for row in rows)
    assert found["bf16_block_bytes"] == sum(row.bf16_bytes for row in rows)
    assert found["dual_scale_layers"] == len(rows) == 20
    assert found["bf16_file_bytes"] == 2 * sum(p.numel() for p in meta_model(CONFIG).parameters())
    assert found["times_smaller"] == found["bf16_file_bytes"] / found["file_bytes"] > 1


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        ({"peak_bytes": 2.9e9, "block_ratio": 0.51, "times_smaller": 1.96}, (True, True, True)),
        ({"peak_bytes": 3.1e9, "block_ratio": 0.53, "times_smaller": 1.94}, (False, False, False)),
    ],
)
def test_targets_are_compared(row, verdict):
    assert tuple(size.verdicts(size.Job("1.3b", "w8a8-dynamic"), row).values()) == verdict
    assert not size.verdicts(size.Job("14b", "w4a8-dynamic"), row)["times_smaller"]


def test_a_process_is_measured_and_its_last_words_are_kept():
    program = "import sys, time; x = b'1' * (300 << 20); time.sleep(0.3); sys.stderr.write('one\\ntwo\\n'); sys.exit(3)"
    row = size.run([sys.executable, "-c", program])
    assert row["exit_code"] == 3 and row["told"] == ["one", "two"]
    assert 300 << 20 < row["peak_bytes"] < 400 << 20
    assert row["cpu_seconds"] > 0 and 0 < row["seconds"] < 60


def test_a_process_is_killed_once_enough_files_are_there(tmp_path):
    program = (
        "import pathlib, sys, time\n"
        "for i in range(200): pathlib.Path(sys.argv[1], f'{i}.safetensors').touch(); time.sleep(0.1)"
    )
    row = size.run([sys.executable, "-c", program, str(tmp_path)], tmp_path, 3)
    assert row["exit_code"] == -9
    assert 3 <= len(list(tmp_path.iterdir())) < 50


@pytest.mark.parametrize("job", size.JOBS, ids=lambda job: job.name)
def test_the_command_of_a_job_names_a_family_and_gives_data_only_where_it_is_needed(tmp_path, job):
    command = size.command_of(job, tmp_path, tmp_path / "w.pt")
    assert command[command.index("--model") + 1] in FAMILIES
    assert ("--prompts" in command) == job.data == (not job.recipe.endswith("dynamic"))
    assert "--checkpoint-dir" not in size.command_of(job, tmp_path, tmp_path / "w.pt", spill=False)


def test_the_table_has_a_line_for_every_job_that_succeeded():
    row = {"job": "1.3b w8a8", "checkpoint_dir": True, "exit_code": 0, "peak_bytes": 2e9, "seconds": 90.0}
    row |= {"checkpoint_dir_bytes": 1.4e9, "file_bytes": 1.5e9, "bf16_file_bytes": 2.9e9, "times_smaller": 1.93}
    row |= {"block_ratio": 0.503}
    text = size.table({"jobs": [row, {**row, "exit_code": 1}, {"job": "killed"}]})
    assert (
        text.splitlines()[2] == "| 1.3b w8a8 | yes | 2.00 GB | 1.5 min | 1.4 GB | 1.50 GB | 2.90 GB | 1.93x | 0.503x |"
    )
    assert len(text.splitlines()) == 3
    assert json.loads(json.dumps(dataclasses.asdict(size.JOBS[0])))["recipe"] == "w8a8-dynamic"


def test_a_job_without_room_is_skipped_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "w.pt").write_bytes(b"1" * 10_000_000)
    free = synthetic.shutil._ntuple_diskusage(10**12, 0, 20 * 10**9)
    monkeypatch.setattr(size.shutil, "disk_usage", lambda _: free)
    small, large = size.JOBS[0], size.JOBS[-1]
    assert size.no_room(small, tmp_path) == ""
    assert size.no_room(large, tmp_path) == f"{tmp_path} has 20 GB left, 14b w4a8-dynamic needs about 60 GB"
