"""`notify=URL`: posts one JSON document when a run or a sweep has ended."""

import http.client
import json
from collections.abc import Mapping
from typing import Any

from dlopt.basics.folders import RunFolder
from dlopt.basics.interruption import print_message
from dlopt.basics.plain_values import without_nan
from dlopt.basics.secrets import redacted

_SECONDS = 10.0  # that a server may take to connect, and to answer


def notify(url: str | None, content: Mapping[str, Any]) -> None:
    """Posts a document, if there is a URL; a server that does not accept it costs a warning."""
    if url is None:
        return
    import urllib.request  # most runs notify nobody

    body = json.dumps(without_nan(redacted(content)), allow_nan=False).encode()
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=_SECONDS).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        print_message(f"warning: notify: the end was not reported: {error}")


def notify_of_run(url: str | None, folder: RunFolder, name: str) -> None:
    """Posts the summary of a run that has ended. `text`: for the channels of chats, which show it."""
    summary = folder.summary() or {"status": "interrupted"}
    text = f"{name}: {summary.get('status')}: {folder.path}"
    notify(url, {"text": text, "name": name, "folder": str(folder.path.absolute()), "summary": summary})
