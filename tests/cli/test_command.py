import json
import subprocess
import sys

import pytest

import fxq
import fxq_command

HEAVY = ("fxq", "torch", "torch.export", "sympy", "matplotlib")
SCRIPT = f"""
import json, sys
import fxq_command
code = 0
try:
    fxq_command.main()
except SystemExit as end:
    code = end.code or 0
print(json.dumps([code, sorted(name for name in {HEAVY!r} if name in sys.modules)]))
"""


def run(*arguments: str) -> tuple[str, int, list[str]]:
    """Output of the script ``fxq``, its exit code, and which of HEAVY it loaded."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    *lines, last = done.stdout.splitlines()
    code, loaded = json.loads(last)
    return "\n".join(lines) + done.stderr, code, loaded


def test_help_lists_every_command_and_loads_no_library():
    text, code, loaded = run("--help")
    assert (code, loaded) == (0, [])
    assert set(fxq_command.COMMANDS) <= set(text.split())


def test_version_is_printed_without_loading_the_package():
    text, code, loaded = run("--version")
    assert (text.strip(), code, loaded) == (f"fxq {fxq.__version__}", 0, [])


def test_a_wrong_environment_variable_is_refused_in_a_line(monkeypatch):
    monkeypatch.setenv("FXQ_CPU", "avx1024")
    done = subprocess.run(
        [sys.executable, "-c", "import fxq_command; fxq_command.main()", "doctor"], capture_output=True, text=True
    )
    expected = "refused: FXQ_CPU='avx1024': expected avx512, avx_vnni, avx2, portable, or unset for what this CPU has"
    assert (done.returncode, done.stdout, done.stderr.strip()) == (1, "", expected)


def test_a_mistyped_command_is_answered_without_loading_the_package():
    text, code, loaded = run("quantise")
    assert (code, loaded) == (2, [])
    assert "quantise" in text and "quantize" in text


@pytest.mark.parametrize("name", fxq_command.COMMANDS)
def test_the_list_says_what_the_commands_say(name):
    paragraph = fxq_command.command(name).help.split("\n\n")[0]
    assert " ".join(paragraph.split()) == fxq_command.COMMANDS[name][1]
