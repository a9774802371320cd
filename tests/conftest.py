import gc
import os
import pathlib

import hypothesis
import pytest
import torch

from fxq import cpu
from fxq.passes.measured import kept_times
from fxq.shadowed import answer_transformers
from tests import captures, features

hypothesis.settings.register_profile("fxq", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fxq")

# A capture makes a great many objects that live on: looking through them again and again is a seventh of its time.
gc.set_threshold(100_000, 50, 100)

captures.share()

# Results do not follow times; tests of what does ask for it, with times of their own.
os.environ.setdefault("FXQ_FLOATS_WHERE_FASTER", "0")

# With the repository's root on the path, before any test imports diffusers.
answer_transformers()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Uninitialised memory is filled with NaN (integers with their maximum), so an unwritten output fails.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True

GOLDEN_BESIDE_CHECKOUT = "../shared/golden"


def golden_files() -> list[pathlib.Path]:
    """Dumps of the official code: from $FXQ_GOLDEN, or else from the folder beside the checkout."""
    root = pathlib.Path(__file__).resolve().parent.parent
    folder = pathlib.Path(os.environ.get("FXQ_GOLDEN") or root / GOLDEN_BESIDE_CHECKOUT)
    return sorted(folder.glob("*.safetensors"))


def switches():
    """Variables that say which kernels run, here and in the processes that tests start."""
    limits = {name for variables in cpu.LIBRARIES.values() for name in variables} | {"OMP_NUM_THREADS"}
    return {name: value for name, value in os.environ.items() if name in limits or name.startswith("FXQ_")}


@pytest.fixture(scope="module", autouse=True)
def settled():
    """What a file leaves behind stays (caches, captures): later collections need not look through it again. Switches
    do not stay."""
    before = switches(), torch.get_num_threads()
    yield
    assert (switches(), torch.get_num_threads()) == before
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_times(tmp_path_factory):
    """Times that tests measure beside others are not kept for this machine."""
    folder = tmp_path_factory.mktemp("times")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_times, "lasting_folder", lambda: (folder, ""))
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


ANY_CPU = (
    "attacks/test_foreign_code.py",
    "attacks/test_fuzz.py",
    "attacks/test_indices.py",
    "attacks/test_native_cache.py",
    "attacks/test_other_files.py",
    "attacks/test_packed_cache.py",
    "attacks/test_programs.py",
    "attacks/test_resources.py",
    "bench",
    "benchmarks",
    "cache",
    "calibration",
    "calls",
    "capture",
    "cli",
    "comparison",
    "core",
    "demo",
    "diffusers",
    "export/graph",
    "export/hub",
    "export/interop",
    "export/test_bundle.py",
    "export/test_contract.py",
    "export/test_diffusers_folder.py",
    "export/test_files.py",
    "export/test_inputs.py",
    "export/test_interop_targets.py",
    "export/test_names.py",
    "export/test_receipt.py",
    "extension",
    "integrations/test_apply_held.py",
    "integrations/test_registration.py",
    "integrations/test_torch_compile.py",
    "kernels/test_aot.py",
    "kernels/gemm/test_gluon.py",
    "kernels/test_guards.py",
    "kernels/test_instruction_sets.py",
    "kernels/test_launches.py",
    "kernels/test_schema.py",
    "kernels/gemm/test_tiles.py",
    "kernels/test_triton_interpret.py",
    "machine",
    "metrics",
    "models/test_any_size.py",
    "models/test_cache_policy.py",
    "models/published",
    "models/video",
    "models/test_checkpoints.py",
    "models/test_official_parity.py",
    "models/test_prompts.py",
    "models/test_saved_state.py",
    "models/test_schedule.py",
    "models/test_wan_rotary.py",
    "parallel",
    "passes/match",
    "passes/methods",
    "passes/qdq",
    "passes/test_absorb_cache.py",
    "passes/test_apply_methods.py",
    "passes/test_choose_widths.py",
    "passes/test_docs.py",
    "passes/test_knapsack.py",
    "passes/test_line.py",
    "passes/test_pack_cache.py",
    "passes/test_plan_layers.py",
    "passes/test_share_inputs.py",
    "passes/transforms",
    "passes/test_with_cache.py",
    "planning/test_gpus.py",
    "planning/test_job.py",
    "planning/test_memory.py",
    "planning/test_plan.py",
    "planning/test_roofline.py",
    "planning/test_workloads.py",
    "play",
    "report",
    "runtime",
    "test_advice.py",
    "test_cpu.py",
    "test_docs_",
    "test_dtypes.py",
    "test_environment.py",
    "test_examples.py",
    "test_growth.py",
    "test_layout.py",
    "test_plugins.py",
    "test_recipes.py",
    "test_shadowed.py",
)
"""Tests whose result cannot depend on the CPU (float models, GPU code, texts, plans), and those of captures,
calibration, methods, comparison, files, command line, ranks and graph matching: they check what stands above kernels
that other tests run, or run the kernels of every instruction set themselves."""


def _any_cpu(path):
    here = pathlib.Path(__file__).resolve().parent
    return path.is_relative_to(here) and path.relative_to(here).as_posix().startswith(ANY_CPU)


def pytest_ignore_collect(collection_path, config):
    """Files whose tests would all be left out are not imported."""
    return True if "not any_cpu" in config.option.markexpr and _any_cpu(collection_path) else None


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no worker ends alone with one; marks :data:`ANY_CPU`."""
    for item in items:
        if _any_cpu(item.path):
            item.add_marker(pytest.mark.any_cpu)
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("sweep")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter):
    """A green run says what it did not test."""
    skips = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    for line in features.not_tested(skips):
        terminalreporter.write_line(line)


def pytest_generate_tests(metafunc):
    if "golden_path" in metafunc.fixturenames:
        files = golden_files()
        reason = f"no *.safetensors in $FXQ_GOLDEN or {GOLDEN_BESIDE_CHECKOUT}"
        params = files or [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
        metafunc.parametrize("golden_path", params, ids=[f.stem for f in files] or ["absent"])
