"""Pages about the Python interface: every public name once, each on the page of its purpose."""

from __future__ import annotations

import inspect

from site_roles import home, without_roles

import fxq

PAGES = {
    "quantize": (
        "Quantize and optimize",
        "quantize optimize sensitivity detect_outliers OutlierChannels summary Summary register launched keep_memory"
        " CudaGraphs",
    ),
    "recipe": ("Recipes in Python", "PRESETS Recipe Rule Scheme Budget load_recipe"),
    "data": ("Rollouts and data", "Rollout State Span Call Draws Condition OnCall Batch record Recording"),
    "files": (
        "Bundles and exports",
        "save load verify_bundle read_receipt export_onnx check_onnx export_program load_program load_folder"
        " save_diffusers",
    ),
    "modules": ("Compiled and swapped modules", "bind Binding apply"),
    "errors": (
        "Errors",
        "ApplyError BackendError BundleError CalibrationError CheckpointError CudaGraphError ExportError PromptError"
        " RecipeError RecordError TraceError WorkerError",
    ),
}
"""Page -> its title and the public names on it."""

_ALIASES = {
    "Condition": "What a video is asked to be: tensors by name.",
    "OnCall": "Is told of each call of a rollout's model: the call and its output.",
}
"""Names of types, which have no docstring."""


def names_on(page: str) -> list[str]:
    """The public names of a page."""
    return PAGES[page][1].split()


def first_sentence(name: str) -> str:
    """What a public name is, in a line."""
    if name in _ALIASES:
        return _ALIASES[name]
    if name == "PRESETS":
        return "The shipped recipes by name; `fxq recipe list` shows them."
    text = inspect.cleandoc(getattr(fxq, name).__doc__ or "").split("\n\n")[0]
    return without_roles(" ".join(text.split()))


def python_pages() -> dict[str, str]:
    """Path -> Markdown of the pages about Python: one that lists all names, and one for each purpose."""
    made = {"reference/index.md": _index()}
    for page, (title, _) in PAGES.items():
        made[f"reference/{page}.md"] = f"# {title}\n\n" + "\n".join(map(_entry, names_on(page)))
    return made


def _entry(name: str) -> str:
    """The place of a name in mkdocstrings, under the short name: a module may have that name too."""
    options = f"    options:\n      heading: fxq.{name}\n      toc_label: {name}\n"
    if name in _ALIASES:
        options += "      show_if_no_docstring: true\n"
    if name == "PRESETS":
        options += "      show_attribute_values: false\n"
    said = f"\n{_ALIASES[name]}\n" if name in _ALIASES else ""
    return f"[](){{#fxq.{name}}}\n\n::: {home(name)}\n{options}{said}"


def _index() -> str:
    lines = [
        "# Python",
        "",
        f"Everything that `import fxq` offers: {len(fxq.__all__)} names. What lies deeper may change without notice.",
    ]
    for page, (title, _) in PAGES.items():
        lines += ["", f"## [{title}]({page}.md)", "", "| name | what it is |", "| --- | --- |"]
        lines += [f"| [`fxq.{name}`][fxq.{name}] | {first_sentence(name)} |" for name in names_on(page)]
    return "\n".join(lines) + "\n"
