import builtins
import subprocess
import sys

import pytest

import fxq
from fxq.integrations import diffusers as integration


def test_diffusers_knows_the_method_after_it(monkeypatch):
    for mapping in (integration.auto.AUTO_QUANTIZER_MAPPING, integration.auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(mapping, integration.METHOD, raising=False)
    fxq.register()
    fxq.register()
    assert integration.auto.AUTO_QUANTIZER_MAPPING[integration.METHOD] is integration.FxqQuantizer


def test_without_diffusers_it_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "fxq.integrations.diffusers")
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "diffusers":
            raise ModuleNotFoundError("No module named 'diffusers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'fxq\[wan\]'"):
        fxq.register()


@pytest.mark.sweep
def test_importing_fxq_loads_no_diffusers():
    code = "import fxq, sys; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "False"
