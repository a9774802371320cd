import subprocess
import sys

import pytest

from fxq.cli.user_code import users_part

BROKEN = """
import fxq

def helper():
    raise KeyError("no such camera")

def make(videos, seed):
    return helper()

def narrow(videos):
    return None
"""


def run(tmp_path, model):
    (tmp_path / "mine.py").write_text(BROKEN)
    command = [sys.executable, "-m", "fxq", "quantize", "--out", "o", "--model", model, "--recipe", "w8a8"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)


def test_an_error_of_a_users_function_is_shown_with_its_own_lines(tmp_path):
    done = run(tmp_path, "mine:make")
    assert done.returncode == 1 and "no such camera" in done.stderr
    assert done.stderr.count("  File ") == 2 and "mine.py" in done.stderr and "typer" not in done.stderr


@pytest.mark.sweep
def test_a_function_of_other_arguments_is_refused_in_a_line(tmp_path):
    done = run(tmp_path, "mine:narrow")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "refused: AdapterError: 'mine:narrow' has to take the number of videos and a seed" in done.stderr


def test_an_error_of_this_library_has_no_users_part():
    import fxq

    with pytest.raises(fxq.BundleError) as caught:
        fxq.load("/nowhere")
    part = users_part(caught.value)
    assert part is not None and part.tb_frame.f_code.co_filename == __file__
    error = RuntimeError("ours")
    assert users_part(error) is None
