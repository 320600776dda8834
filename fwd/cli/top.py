"""`fwctl top`: who sends how much, and how each tunnel does, live; or once, as a table."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator

from ..rpc import INVALID_PARAMS, RpcError
from . import top_view as view
from .client import Client
from .top_data import Answers, Asker, Pictures, Question

#: Until rates are known a picture waits so long at most, and looks so often, in seconds.
_MEASURED_S, _LOOK_S = 4.0, 0.25


def show(path: str, question: Question, interval_s: float) -> None:
    """Take the terminal over until the user quits. `path` is the control socket; asks every `interval_s` seconds."""
    from .top_screen import TopApp, has_colours  # textual takes half a second to load: other commands need not wait

    TopApp(path, question, interval_s, is_plain=not has_colours()).run()


def has_terminal() -> bool:
    """Whether there is a terminal to take over: textual reads stdin and writes to stderr."""
    return sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty()


def once(path: str, question: Question, width: int, *, as_json: bool = False) -> str:
    """One picture as a table, or what the daemon said, as JSON. Raises NoDaemon, and RpcError also for a filter."""
    asker = Asker(Client(path))
    try:
        *_, answers = _until_measured(asker, question)
    finally:
        asker.close()
    if as_json:
        return json.dumps({"matched": answers.matched, "sessions": answers.sessions}, indent=2)
    return view.plain(Pictures(1.0).take(answers, time.monotonic()), width)


def _until_measured(asker: Asker, question: Question) -> Iterator[Answers]:
    """Answers, until all that they tell of has rates or it took too long."""
    deadline = time.monotonic() + _MEASURED_S
    while True:
        answers = asker.ask(question)
        if answers.sessions is None:
            raise RpcError(INVALID_PARAMS, answers.refusal)
        yield answers
        is_known = all(None not in session["rates"].values() for session in answers.sessions)
        if is_known or time.monotonic() >= deadline:
            return
        time.sleep(_LOOK_S)
