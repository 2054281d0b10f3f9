"""Files of the Hugging Face hub: from the local cache, or fetched."""

from __future__ import annotations

from collections.abc import Sequence

from underpaint.errors import UnreachableError

__all__ = ["hub_file"]

_SECONDS = 5.0
"""Patience with a hub that does not answer."""


def hub_file(repository: str, names: Sequence[str], *, what: str, instead: str) -> str:
    """Return the path of a file of a hub repository in the local cache, fetched when it is not there.

    Args:
        repository: ``owner/name``.
        names: File names to look for; the first that the cache has, else the first that the repository has.
        what: What is in the file, such as ``The weights 'dino' of timm's 'vit_small_patch16_224'``, for the error.
        instead: What to do without the hub, as an order: ``write 'timm/vit_small_patch16_224@file:PATH'``.

    Raises:
        UnreachableError: It is not in the cache, and the hub cannot be reached or refuses.
    """
    import huggingface_hub

    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return cached
    try:
        # The hub's client retries for a minute when there is no network; this asks once.
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_SECONDS)
        for name in names[:-1]:
            try:
                return str(huggingface_hub.hf_hub_download(repository, name))
            except huggingface_hub.errors.RemoteEntryNotFoundError:
                continue
        return str(huggingface_hub.hf_hub_download(repository, names[-1]))
    except Exception as error:
        if not _is_download_failure(error):
            raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UnreachableError(
            f"{what} are not on this machine and the hub could not be reached or refused ({reason}); try again, or "
            f"{instead}."
        ) from error


def _is_download_failure(error: Exception) -> bool:
    # By package name: which HTTP library lies below the hub's client changes with its version.
    packages = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return isinstance(error, OSError) or bool(packages & {"huggingface_hub", "httpx", "httpx2", "httpcore", "requests"})
