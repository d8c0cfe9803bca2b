"""Errors of the Hub, its client library and the disk, each as one sentence and a remedy. No message holds a token."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import AccessError, MachineError, ModelNotFoundError, NetworkError, SurgeryError, nearest

PROXIES = ("http_proxy", "https_proxy", "all_proxy")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def hub_errors(repo: str, revision: str | None = None, *, writing: bool = False) -> Iterator[None]:
    """Turn errors of huggingface_hub, its HTTP client and the disk into one sentence and a remedy.

    Raises:
        SurgeryError: no such repository or revision, or a request that the Hub refuses.
        MachineError: no network, no access or no disk space.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:
        reason: BaseException = error
        while isinstance(reason, (LocalEntryNotFoundError, RuntimeError)) and reason.__cause__:
            reason = reason.__cause__  # wrapped by the library
        if translated := _translate(reason, repo, revision or "main", writing):
            raise translated from error
        raise


def _translate(error: BaseException, repo: str, revision: str, writing: bool) -> SurgeryError | None:
    from huggingface_hub import constants, errors

    from surgery.io.demo_model import NAME as DEMO_NAME

    url, cache, retry = f"{constants.ENDPOINT}/{repo}", constants.HF_HUB_CACHE, "run the same command again"
    status = getattr(getattr(error, "response", None), "status_code", None)
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if isinstance(error, errors.GatedRepoError):
        fix = f"accept its terms at {url} and log in with `hf auth login`"
        return AccessError(f"`{repo}` is gated, and this machine has no access to it", fix=fix)
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(f"`{repo}` has no revision `{revision}`", fix=f"see its branches at {url}")
    # Without a token the Hub answers 401 for a missing repository; with a bad one, for everything.
    if status == 401 and (writing or hub_token()):
        return AccessError("the Hub does not accept this token", fix=LOGIN)
    if isinstance(error, errors.RepositoryNotFoundError):
        cached = [n[8:].replace("--", "/", 1) for n in folders(Path(cache)) if n.startswith("models--")]
        close = nearest(repo, [*cached, *folders(Path()), DEMO_NAME])
        fix = f"check the spelling; if it is private, {LOGIN}"
        return ModelNotFoundError(f"the Hub has no model `{repo}`, or it is private", exists=close, fix=fix)
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        what = "nothing can be pushed" if writing else f"`{repo}` at `{revision}` is not all in the Hub cache"
        if constants.HF_HUB_OFFLINE:
            return NetworkError(f"HF_HUB_OFFLINE is set, and {what}", fix="unset HF_HUB_OFFLINE")
        return NetworkError(what, where=cache, fix="allow the network once")
    if status in (401, 403):
        what = f"you may not {'write to' if writing else 'read'} `{repo}`"
        return AccessError(what, fix=f"use a token that has this right; {LOGIN}")
    if isinstance(error, json.JSONDecodeError):  # a proxy's login page
        return NetworkError(
            "this is not the Hub that answers",
            where=url,
            fix=f"check network and proxy, then {retry}",
        )
    if isinstance(error, ValueError) and "proxy URL" in str(error):  # the URL may hold a password: not shown
        named = sorted(name for name in os.environ if name.lower() in PROXIES)
        what = "the proxy that the environment names is not one of http, https, socks5 or socks5h"
        return NetworkError(
            what,
            exists=", ".join(named),
            fix="set these variables to a proxy's URL, or unset them",
        )
    if isinstance(error, ValueError) and (writing or status == 400):  # for example invalid metadata of a card
        return SurgeryError(f"the Hub refused the request: {brief(error)}", where=repo)
    if status is not None:
        return NetworkError(f"the Hub answered {status}", where=url, fix=f"{retry} later")
    if getattr(error, "errno", None) in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return MachineError("the disk is full", where=cache, fix="free space, or set HF_HOME", code="disk-full")
    if isinstance(error, PermissionError):
        return AccessError("no permission", where=str(error.filename or cache))
    clients = {"httpx", "httpx2", "requests", "urllib3"}
    if isinstance(error, (ConnectionError, TimeoutError)) or libraries & clients:
        what, fix = f"the Hub cannot be reached ({type(error).__name__})", f"check network and proxy, then {retry}"
        return NetworkError(what, where=constants.ENDPOINT, fix=fix)
    if "huggingface_hub" in libraries or isinstance(error, (OSError, RuntimeError)):
        return NetworkError(f"the transfer failed: {brief(error)}", where=url, fix=retry)
    return None


def hub_token() -> str | None:
    """The user's token, from HF_TOKEN or the file that `hf auth login` wrote, or None. Surgery stores no token."""
    from huggingface_hub import get_token

    return get_token()


def brief(error: BaseException) -> str:
    """The start of another library's message, on one line, with anything that is or looks like a token masked."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "***", text.replace(hub_token() or "\0", "***"))[:240]


def folders(parent: Path) -> list[str]:
    """Names of the folders in a folder, sorted; none where it cannot be read."""
    try:
        return sorted(p.name for p in parent.iterdir() if p.is_dir())
    except OSError:
        return []
