import pytest

from fxq.planning.gpus import GPUS, PlanningError, find_gpu, known_gpu


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("4090", "RTX 4090"),
        ("rtx-4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("a6000", "RTX A6000"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("a100", "A100 80GB"),
        ("NVIDIA L40S", "L40S"),
        ("l4", "L4"),
        ("pro 6000", "RTX PRO 6000"),
    ],
)
def test_a_gpu_is_found_by_any_spelling(name, found):
    assert find_gpu(name).name == found


@pytest.mark.parametrize(("name", "close"), [("H10O", "H100"), ("rtx 4070", "RTX 4090"), ("L45S", "L40S")])
def test_an_unknown_gpu_gets_the_closest_names(name, close):
    assert known_gpu(name) is None
    with pytest.raises(PlanningError, match=rf"unknown GPU '{name}'; the closest are .*{close}.*There are: RTX 3090"):
        find_gpu(name)


def test_a_gpu_like_no_other_gets_the_whole_list():
    with pytest.raises(PlanningError, match=r"unknown GPU 'voodoo'\. There are: .*H200"):
        find_gpu("voodoo")


def test_no_spelling_stands_for_two_gpus():
    names = [name for gpu in GPUS for name in (gpu.name, *gpu.aliases)]
    assert {name: find_gpu(name).name for name in names} == {
        name: gpu.name for gpu in GPUS for name in (gpu.name, *gpu.aliases)
    }


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_the_table_is_plausible(gpu):
    for low, high in (
        gpu.attainable.bf16,
        gpu.attainable.int8,
        gpu.attainable.attention,
        gpu.attainable.bandwidth,
    ):
        assert 0 < low < high <= 1
    assert 1.9 < gpu.int8 / gpu.bf16 < 4.1 and 20 < gpu.memory_gib < 200 and gpu.arch.startswith("sm_")
