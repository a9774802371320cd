import mmap
import pathlib

import pytest
import torch
from torch import nn

from fxq.capture.trace import trace
from fxq.core.interpret import SparingInterpreter, sparing
from fxq.runtime.memory.residency import Residency, mapped_tensor
from tests.toys import rows


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(256, 300)
        self.second = nn.Linear(300, 8)

    def forward(self, x, *, gain):
        return {"y": self.second(torch.relu(self.first(x))) * gain}


def test_the_result_is_the_modules():
    graph = trace(Net().eval(), (rows(3, 256),), {"gain": torch.ones(1)})
    want = graph.module(rows(3, 256), gain=torch.ones(1))
    got = SparingInterpreter(graph.module).call(rows(3, 256), torch.ones(1))
    assert list(got) == ["y"] and torch.equal(got["y"], want["y"])


@pytest.mark.skipif(not pathlib.Path("/proc/self/pagemap").exists(), reason="pages are given back on Linux")
def test_mapped_weights_leave_memory_after_their_use(tmp_path, monkeypatch):
    model = Net().eval().requires_grad_(False)
    weight = mapped_tensor(tmp_path / "w", (300, 256), torch.float32).copy_(model.first.weight)
    model.first.weight = nn.Parameter(weight, requires_grad=False)
    dropped, give_back = [], Residency.give_back
    monkeypatch.setattr(Residency, "give_back", lambda *given: dropped.append(give_back(*given)))
    whole = weight.nbytes // mmap.PAGESIZE * mmap.PAGESIZE
    runner = SparingInterpreter(trace(model, (rows(3, 256),), {"gain": torch.ones(1)}).module)
    dropped.clear()
    want = model(rows(3, 256), gain=torch.ones(1))["y"]
    assert torch.equal(runner.call(rows(3, 256), torch.ones(1))["y"], want)
    assert dropped == [whole, 0]
    with sparing(model):
        assert torch.equal(model(rows(3, 256), gain=torch.ones(1))["y"], want)
    assert dropped == [whole, 0, whole] and not model.first._forward_hooks
