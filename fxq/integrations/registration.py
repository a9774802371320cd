"""fxq made known to diffusers, which is loaded when that is asked for."""

from __future__ import annotations


def register() -> None:
    """Make ``from_pretrained`` of diffusers read folders of :func:`fxq.save_diffusers`; once per process suffices.

    Raises:
        ImportError: when diffusers cannot be imported.
    """
    try:
        from fxq.integrations.diffusers import register as make_known
    except ImportError as error:
        raise ImportError(f"fxq.register needs diffusers ({error}): pip install 'fxq[wan]'") from error
    make_known()
