import inspect

import pytest

import fxq

NAMES = {
    "PRESETS",
    "ApplyError",
    "BackendError",
    "Batch",
    "Binding",
    "Budget",
    "BundleError",
    "CalibrationError",
    "Call",
    "Condition",
    "CheckpointError",
    "CudaGraphError",
    "CudaGraphs",
    "Draws",
    "ExportError",
    "OnCall",
    "OutlierChannels",
    "PromptError",
    "Recipe",
    "RecipeError",
    "RecordError",
    "Recording",
    "Rollout",
    "Rule",
    "Scheme",
    "Span",
    "State",
    "Summary",
    "TraceError",
    "WorkerError",
    "apply",
    "bind",
    "check_onnx",
    "detect_outliers",
    "export_onnx",
    "export_program",
    "keep_memory",
    "launched",
    "load",
    "load_folder",
    "load_program",
    "load_recipe",
    "optimize",
    "quantize",
    "read_receipt",
    "record",
    "register",
    "save",
    "save_diffusers",
    "sensitivity",
    "summary",
    "verify_bundle",
}


def test_the_public_names_are_these():
    assert set(fxq.__all__) == NAMES
    assert list(fxq.__all__) == sorted(fxq.__all__, key=lambda name: (not name.isupper(), name.islower(), name))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_public_name_exists_and_is_documented(name):
    value = getattr(fxq, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__doc__ and value.__doc__.rstrip().endswith((".", "``"))
        assert not value.__doc__.startswith(f"{name}("), "a generated dataclass docstring"
        for member_name, member in vars(value).items() if inspect.isclass(value) else ():
            if not member_name.startswith("_") and inspect.isfunction(member):
                assert member.__doc__, f"{name}.{member_name}"


@pytest.mark.parametrize("name", sorted(n for n in NAMES if inspect.isfunction(getattr(fxq, n))))
def test_a_public_function_is_annotated(name):
    signature = inspect.signature(getattr(fxq, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_quantize_keeps_its_signature():
    parameters = inspect.signature(fxq.quantize).parameters
    assert list(parameters) == [
        "model",
        "calib_loader",
        "recipe",
        "example_inputs",
        "dynamic_shapes",
        "forward_loop",
        "checkpoint_dir",
        "sensitivity",
        "passes",
        "group",
        "progress",
    ]
    keyword_only = [n for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert keyword_only == list(parameters)[3:]
    assert parameters["recipe"].default == "w4a8"


def test_errors_are_value_or_runtime_errors():
    for name in NAMES:
        if name.endswith("Error"):
            assert issubclass(getattr(fxq, name), ValueError | RuntimeError)
