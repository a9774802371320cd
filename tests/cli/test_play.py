import re
import signal
import subprocess
import sys
import urllib.request

import pytest
from typer.testing import CliRunner

from fxq.cli import app
from fxq.cli.options.models import AdapterError

pytest.importorskip("uvicorn")


def test_the_command_serves_the_page_until_it_is_ended():
    command = [sys.executable, "-m", "fxq", "play", "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            address = re.match(r"(http://localhost:\d+)", running.stdout.readline())[1]
            assert b"fxq play" in urllib.request.urlopen(address, timeout=60).read()
        finally:
            running.send_signal(signal.SIGINT)
        assert running.wait(60) in (0, 130, -signal.SIGINT)


def test_latents_that_nothing_decodes_are_refused():
    done = CliRunner().invoke(app, ["play", "--model", "self-forcing", "--no-browser"])
    assert isinstance(done.exception, AdapterError) and "show them with --vae or --pipeline" in str(done.exception)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = CliRunner().invoke(app, ["play", "--no-browser"])
    assert isinstance(done.exception, AdapterError) and "pip install 'fxq[play]'" in str(done.exception)
