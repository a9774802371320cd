"""A distribution made on the spot: one module and its entry points, as pip would have installed them."""

import importlib
import sys
import textwrap


class Outside:
    """A folder on ``sys.path`` that distributions are put into; gone after the test."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.modules = folder, []
        monkeypatch.syspath_prepend(str(folder))

    def install(self, module, source, *, version="1.0", **groups):
        """Write ``module``.py and metadata of a distribution ``module`` with entry points, by group."""
        (self.folder / f"{module}.py").write_text(textwrap.dedent(source))
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: {version}\n")
        sections = [
            f"[fxq.{group}]\n" + "".join(f"{name} = {module}:{target}\n" for name, target in entries.items())
            for group, entries in groups.items()
        ]
        (info / "entry_points.txt").write_text("\n".join(sections))
        importlib.invalidate_caches()
        self.modules.append(module)

    def imported(self, module):
        """Whether the module was imported."""
        return module in sys.modules

    def forget(self):
        """Drop what was imported."""
        for module in self.modules:
            sys.modules.pop(module, None)
