import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from fxq import cpu
from fxq.core.ir import QuantGraph
from fxq.kernels import native
from fxq.kernels.native import cache
from fxq.passes.measured import kept_times
from fxq.passes.measured.kept_times import KeptTimes, machine, power_of_two


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of this user's own, which the times are kept in as outside of tests."""
    native.ready()  # its library lies where it always does
    monkeypatch.setenv("FXQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_times, "lasting_folder", cache.lasting_folder)
    return tmp_path / "cache"


def never():
    raise AssertionError("measured again")


def test_a_later_process_finds_what_was_measured(folder):
    assert KeptTimes().of("a", "cpu", lambda: (0.25, 0.5)) == (0.25, 0.5)
    later = KeptTimes()
    assert later.of("a", "cpu", never) == (0.25, 0.5)
    assert later.of("b", "cpu", lambda: (1.0, 2.0)) == (1.0, 2.0)
    (file,) = folder.iterdir()
    said = json.loads(file.read_text())
    assert said["seconds"] == {"a": [0.25, 0.5], "b": [1.0, 2.0]} and not later.trouble
    assert said["machine"] == machine() | {"device": "cpu"} and said["machine"]["processor"] == cpu.name()


def test_what_times_depend_on_has_a_file_of_its_own(folder, monkeypatch):
    KeptTimes().of("a", "cpu", lambda: (1.0, 2.0))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert KeptTimes().of("a", "cpu", lambda: (3.0, 4.0)) == (3.0, 4.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert KeptTimes().of("a", "cpu", lambda: (5.0, 6.0)) == (5.0, 6.0)
    monkeypatch.setattr(kept_times.native, "library_name", lambda: "native-other.so")
    assert KeptTimes().of("a", "cpu", lambda: (7.0, 8.0)) == (7.0, 8.0)
    assert len(list(folder.iterdir())) == 4


def test_times_of_a_gpu_last_as_long_as_the_process(folder):
    kept = KeptTimes()
    assert kept.of("a", "cuda:0", lambda: (1.0, 2.0)) == kept.of("a", "cuda:0", never) == (1.0, 2.0)
    assert not folder.exists()


def test_who_is_first_decides_for_processes_at_once(folder):
    def slow():
        assert KeptTimes().of("a", "cpu", lambda: (1.0, 2.0)) == (1.0, 2.0)
        return 2.0, 1.0

    assert KeptTimes().of("a", "cpu", slow) == (1.0, 2.0)


def test_processes_that_write_at_once_lose_nothing(folder):
    code = (
        "import sys; from fxq.passes.measured.kept_times import KeptTimes; kept = KeptTimes()\n"
        "for i in range(20): kept.of(f'{sys.argv[1]} {i}', 'cpu', lambda: (1.0, 2.0))\n"
        "assert not kept.trouble, kept.trouble"
    )
    environment = os.environ | {"FXQ_NATIVE": "0"}
    running = [subprocess.Popen([sys.executable, "-c", code, name], env=environment) for name in "abc"]
    assert [process.wait() for process in running] == [0, 0, 0]
    (file,) = folder.iterdir()
    assert len(json.loads(file.read_text())["seconds"]) == 60


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 10**5,
        '{"format": 1, "machine": {}, "seconds": {}}',
        "{format}",
        '{"seconds": {"a": [1.0]}}',
        '{"seconds": {"a": [1.0, -2.0]}}',
        '{"seconds": {"a": [1.0, 0.0]}}',
        '{"seconds": {"a": [1.0, true]}}',
        '{"seconds": {"a": [1.0, 1e999]}}',
        '{"seconds": {"a": "fast"}}',
        '{"seconds": []}',
    ],
)
def test_a_damaged_file_is_measured_and_written_anew(folder, text):
    KeptTimes().of("a", "cpu", lambda: (1.0, 2.0))
    (file,) = folder.iterdir()
    if text.startswith('{"seconds"'):
        facts = json.dumps(machine() | {"device": "cpu"})
        text = f'{{"format": 1, "machine": {facts}, {text[1:]}'
    file.write_text(text)
    kept = KeptTimes()
    assert kept.of("a", "cpu", lambda: (3.0, 4.0)) == (3.0, 4.0)
    assert kept.trouble.startswith(f"{file} is damaged (") and kept.trouble.endswith("): measured and written anew")
    again = KeptTimes()
    assert again.of("a", "cpu", never) == (3.0, 4.0) and not again.trouble


def test_what_a_damaged_file_says_steers_no_terminal_and_fills_no_screen(folder):
    KeptTimes().of("a", "cpu", lambda: (1.0, 2.0))
    (file,) = folder.iterdir()
    text = json.loads(file.read_text())
    for key in ("\x1b[31mred", "e" * 10**5):
        file.write_text(json.dumps(text | {"seconds": {key: [0, 0]}}))
        kept = KeptTimes()
        kept.of("a", "cpu", lambda: (3.0, 4.0))
        assert kept.trouble.isprintable() and len(kept.trouble) < 200 + len(str(file))


def test_a_file_that_is_none_is_no_reason_to_stop(folder):
    KeptTimes().of("a", "cpu", lambda: (1.0, 2.0))
    (file,) = folder.iterdir()
    file.unlink(), file.mkdir()
    kept = KeptTimes()
    assert kept.of("a", "cpu", lambda: (3.0, 4.0)) == kept.of("a", "cpu", never) == (3.0, 4.0)
    assert kept.trouble.startswith("measured for this process only: ") and "cannot be written" in kept.trouble


def test_without_a_folder_times_last_as_long_as_the_process(tmp_path, folder, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    kept = KeptTimes()
    assert kept.of("a", "cpu", lambda: (1.0, 2.0)) == kept.of("a", "cpu", never) == (1.0, 2.0)
    assert kept.trouble.startswith(f"measured for this process only: {folder} cannot be made (")
    assert kept.trouble.endswith("; set FXQ_CACHE_DIR to a folder of your own")


def test_a_folder_of_others_is_not_read(folder):
    KeptTimes().of("a", "cpu", lambda: (1.0, 2.0))
    folder.chmod(0o777)
    kept = KeptTimes()
    assert kept.of("a", "cpu", lambda: (3.0, 4.0)) == (3.0, 4.0)
    assert "other users can write into" in kept.trouble


@pytest.mark.parametrize("missing", ["home", "permission"])
def test_what_keeps_a_folder_from_lasting_is_said(folder, missing, monkeypatch):
    if missing == "permission":
        monkeypatch.setattr(os, "access", lambda *given: False)
    else:

        def homeless():
            raise RuntimeError

        monkeypatch.delenv("FXQ_CACHE_DIR"), monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(pathlib.Path, "home", homeless)
    found, why_not = cache.lasting_folder()
    assert found is None
    assert why_not.startswith({"home": "there is no home folder", "permission": f"{folder} cannot be written"}[missing])


def test_sizes_are_rounded_by_ratio():
    assert [power_of_two(count) for count in (0, 1, 2, 3, 5, 6, 9, 1560, 4680)] == [1, 1, 2, 4, 4, 8, 8, 2048, 4096]


def test_the_summary_says_once_what_is_wrong(folder, monkeypatch):
    monkeypatch.setattr(kept_times, "KEPT", kept := KeptTimes())
    module = torch.export.export(torch.nn.Linear(3, 4), (torch.randn(2, 3),)).module()
    graph = QuantGraph(module)
    kept_times.note_trouble(graph)
    assert not graph.notes
    for trouble, lasts in (("f.json is damaged (x): measured and written anew", False), (kept_times._ONLY + "y", True)):
        kept.trouble = trouble
        kept_times.note_trouble(graph), kept_times.note_trouble(graph)
        assert graph.notes[kept_times.PLACE].count(trouble) == 1
        assert kept.trouble == (trouble if lasts else "")
