import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.capture.trace import trace
from fxq.core.products import other_products
from tests.toys import recipe, rows

X = rows(4, 10, 64)


class Product(nn.Module):
    """A linear and one product with a parameter."""

    def __init__(self, how):
        super().__init__()
        self.how, self.fc = how, nn.Linear(64, 64)
        self.w, self.b = nn.Parameter(torch.randn(64, 48)), nn.Parameter(torch.randn(48))
        self.stack = nn.Parameter(torch.randn(4, 64, 8))
        self.register_buffer("frequencies", torch.randn(5))
        self.conv, self.patch, self.volume = nn.Conv1d(64, 16, 1), nn.Conv2d(10, 6, 4, 4), nn.Conv3d(1, 2, (2, 4, 4))
        self.pairs, self.gru = nn.Bilinear(64, 64, 3), nn.GRU(64, 32, batch_first=True)

    def forward(self, x):
        y = self.fc(x)
        forms = {
            "addmm": lambda: torch.addmm(self.b, y[0], self.w),
            "matmul": lambda: y @ self.w,
            "transposed": lambda: self.w.T @ y.transpose(1, 2),
            "mm": lambda: torch.mm(y[0], self.w),
            "normalised": lambda: torch.mm(y[0], F.normalize(self.w, dim=0)),
            "bmm": lambda: torch.bmm(y, self.stack),
            "baddbmm": lambda: torch.baddbmm(y[:, :, :8], y, self.stack),
            "einsum": lambda: torch.einsum("bnk,km->bnm", y, self.w),
            "conv1d": lambda: self.conv(y.transpose(1, 2)),
            "conv2d": lambda: self.patch(y.unflatten(-1, (8, 8))),
            "conv3d": lambda: self.volume(y.unflatten(-1, (8, 8))[:, None]),
            "bilinear": lambda: self.pairs(y, y),
            "gru": lambda: self.gru(y)[0],
            "attention": lambda: F.scaled_dot_product_attention(y, y, y) + y @ y.transpose(1, 2) @ y,
            "rotary": lambda: y[..., :5] * (y[..., :1] @ self.frequencies[None]),
        }
        return forms[self.how]()


@pytest.mark.parametrize(
    ("how", "operator", "layers"),
    [
        ("addmm", "addmm", ["w"]),
        ("matmul", "matmul", ["w"]),
        ("transposed", "matmul", ["w"]),
        ("mm", "mm", ["w"]),
        ("normalised", "mm", ["w"]),
        ("bmm", "bmm", ["stack"]),
        ("baddbmm", "baddbmm", ["stack"]),
        ("einsum", "einsum", ["w"]),
        ("conv1d", "conv1d", ["conv"]),
        ("conv2d", "conv2d", ["patch"]),
        ("conv3d", "conv3d", ["volume"]),
        ("bilinear", "bilinear", ["pairs"]),
        ("gru", "gru", ["gru.weight_ih_l0", "gru.weight_hh_l0"]),
        ("attention", "", []),
        ("rotary", "", []),
    ],
)
def test_a_summary_tells_of_products_that_are_no_linear(how, operator, layers, tmp_path):
    model = Product(how).eval()
    quantized = fxq.quantize(model, [X], recipe(), progress=False)
    fxq.save(quantized, tmp_path / "bundle")
    for module in (quantized, fxq.load(tmp_path / "bundle")):
        summary = fxq.summary(module)
        assert [row.layer for row in summary.quantized] == ["fc"]
        assert [(row.layer, row.reason) for row in summary.kept if "never called" not in row.reason] == [
            (layer, f"matrix product that is no linear: aten.{operator}") for layer in layers
        ]
        assert str(summary).count("matrix product that is no linear") == len(layers)


def test_a_product_has_the_shape_of_its_tensor():
    graphs = [trace(Product(how).eval(), (X,)) for how in ("matmul", "conv3d")]
    found = {product.layer: product for graph in graphs for product in other_products(graph.module)}
    assert (found["w"].shape, found["w"].size) == ((64, 48), 64 * 48)
    assert (found["volume"].shape, found["volume"].size) == ((2, 32), 64)


def test_the_projection_of_an_attention_module_is_a_linear():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x):
            return self.mha(x, x, x)[0]

    summary = fxq.summary(fxq.quantize(Attention().eval(), [X], recipe(), progress=False))
    assert {row.layer for row in summary.quantized} == {"mha.in_proj_weight", "mha.out_proj"}
    assert [row.reason for row in summary.kept] in ([], ["never called in the captured graph"])
