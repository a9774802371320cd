import os
import tempfile

import pytest

from fxq.runtime.writable import writable_file, writable_folder


def refusing(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_folder_that_is_to_be_made_is_not_made(tmp_path):
    folder = tmp_path / "a" / "b"
    assert writable_folder(str(folder)) == folder
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_is_refused_with_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        NotADirectoryError, match=r"cannot write to .*file.below: .*file is not a folder; choose another"
    ):
        writable_folder(tmp_path / "file" / "below")


def test_a_folder_that_refuses_is_told_with_the_systems_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", refusing)
    with pytest.raises(OSError, match=r"cannot write to .*a: No space left on device; choose another place"):
        writable_folder(tmp_path / "a")


def test_a_dangling_link_is_no_place_to_write(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="link is not a folder"):
        writable_folder(tmp_path / "link")


def test_a_file_that_exists_keeps_its_content(tmp_path):
    file = tmp_path / "out.json"
    file.write_text("kept")
    assert writable_file(file) == file and file.read_text() == "kept"
    assert writable_file(tmp_path / "new" / "out.json").parent.exists() is False


def test_a_folder_in_a_files_place_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match="it is a folder; name a file"):
        writable_file(tmp_path)


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "out.json"
    file.write_text("kept")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"cannot write .*out.json: no permission"):
        writable_file(file)


def test_the_null_device_is_a_file():
    assert writable_file(os.devnull) == type(writable_file(os.devnull))(os.devnull)
