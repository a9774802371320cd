import pytest
import torch
from torch import nn

import fxq
from fxq.calls.rules import InputError
from fxq.kernels.opaque import opaque
from tests.toys import recipe


def test_it_is_the_function_itself_and_takes_what_has_no_code():
    def f():
        return 3

    assert opaque(f) is f and f() == 3
    assert opaque(len) is len


@pytest.mark.parametrize("grad", [True, False])
def test_a_compiled_module_is_right_after_a_call_that_was_refused(grad):
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval(), torch.randn(4, 8, 64)
    q = fxq.quantize(model, [x], recipe(), progress=False)
    compiled = torch.compile(q, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        want = q(x)
        torch.testing.assert_close(compiled(x), want)
        with pytest.raises(InputError):
            compiled(torch.randn(4, 9, 64))
        torch.testing.assert_close(compiled(x), want)
    torch._dynamo.reset()
