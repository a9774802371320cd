import subprocess
import sys

import pytest

CODE = """
import sys
import fxq
from fxq.shadowed import answer_transformers
answer_transformers()
assert "kernels" not in sys.modules
from transformers.utils.import_utils import is_kernels_available
print(is_kernels_available())
import diffusers
print(diffusers.WanTransformer3DModel.__name__)
"""


@pytest.mark.sweep
def test_with_a_checkout_on_the_path_transformers_and_diffusers_can_be_imported():
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "WanTransformer3DModel"], done.stderr


@pytest.mark.sweep
def test_without_transformers_nothing_is_imported():
    code = "import sys; sys.modules['transformers'] = None\n" + CODE.partition("from transformers")[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
