"""The hub's client, and its errors as errors of fxq."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from fxq.export.files import BundleError
from fxq.runtime.messages import first_line

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REPOSITORY = re.compile(rf"{_NAME}/{_NAME}")
_NETWORK = ("httpx", "httpcore", "requests", "urllib3", "socket", "ssl")


class HubError(BundleError):
    """A repository of the hub that is not there, cannot be reached, or holds what is not fetched or pushed."""


class UnreachableError(HubError):
    """The hub does not answer."""


def is_repository(name: str) -> bool:
    """Whether a text has the form ``org/name``."""
    return _REPOSITORY.fullmatch(name) is not None


def client() -> Any:
    """The module huggingface_hub.

    Raises:
        HubError: when it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise HubError(f"the hub needs huggingface_hub ({error}): pip install 'fxq[hub]'") from error
    return huggingface_hub


@contextlib.contextmanager
def speaking(repository: str, revision: str | None = None) -> Iterator[Any]:
    """The module huggingface_hub; its errors within the block say which repository and what to do.

    Raises:
        UnreachableError: when nothing answers, or the hub is switched off.
        HubError: for every other refusal.
    """
    hub = client()
    errors = hub.errors
    where = f"{repository} on {hub.constants.ENDPOINT}"
    try:
        yield hub
    except errors.GatedRepoError as error:
        raise HubError(f"{where} asks for consent first: open its page, agree, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(f"{where}: no such repository, or a private one: check the name, or `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{where} has no revision {revision!r}: expected a branch, a tag or a commit") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise UnreachableError(
            f"{where} is not in the cache and the hub cannot be asked: {first_line(error)}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{where}: a file is missing: {first_line(error)}") from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"{where}: {first_line(error)}") from error
    except Exception as error:
        if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(_NETWORK):
            raise UnreachableError(f"{where} does not answer: {type(error).__name__}: {first_line(error)}") from error
        raise
