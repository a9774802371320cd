import torch

from fxq.models.published.skyreels import adapt, fits


def test_the_embedding_of_the_frame_rate_becomes_a_bias():
    torch.manual_seed(0)
    up, down, embedding = torch.nn.Linear(3, 3), torch.nn.Linear(3, 18), torch.nn.Embedding(2, 3)
    tensors = {"time_projection.1.bias": torch.randn(18).bfloat16(), "fps_embedding.weight": embedding.weight.detach()}
    for number, layer in ((0, up), (2, down)):
        tensors |= {f"fps_projection.{number}.{n}": p.detach() for n, p in layer.named_parameters()}
    assert fits(tensors) and not fits({"time_projection.1.bias": torch.ones(18)})
    found = adapt(tensors)
    assert list(found) == ["time_projection.1.bias"] and found["time_projection.1.bias"].dtype == torch.bfloat16
    added = down(torch.nn.functional.silu(up(embedding.weight[1])))
    want = (tensors["time_projection.1.bias"].float() + added).bfloat16()
    assert torch.equal(found["time_projection.1.bias"], want)
