"""The dispatch as torch operators, opaque to torch.compile: the compiled trunk calls them like any kernel.

`expertmesh::start` and `expertmesh::finish` are two, so that what stands between them is computed while the rows are
away; the ticket that the one gives to the other keeps them in order.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import torch

from router_service.dispatcher import Dispatch, Dispatcher
from router_service.halves import away
from router_service.losses import lose
from router_service.recovery import RowsLost

log = logging.getLogger(__name__)

OPERATORS = ("expertmesh::experts", "expertmesh::start", "expertmesh::finish")
LIBRARY = torch.library.Library("expertmesh", "FRAGMENT")  # type: ignore[no-untyped-call]

_connects: dict[str, Callable[[], Dispatcher]] = {}
_dispatchers: dict[str, Dispatcher] = {}
_under_way: dict[int, tuple[Dispatcher, Dispatch]] = {}
_tickets = itertools.count()


def register_model(fingerprint: str, connect: Callable[[], Dispatcher]) -> None:
    """Names the connection that operators called with this fingerprint use; made on first use."""
    _connects[fingerprint] = connect
    _dispatchers.pop(fingerprint, None)


def dispatchers() -> list[Dispatcher]:
    """Those of this process that have been used."""
    return list(_dispatchers.values())


def _dispatcher(model: str) -> Dispatcher:
    found = _dispatchers.get(model)
    if found is None:
        found = _dispatchers[model] = _connects[model]()
    return found


def _experts(
    hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: int, model: str
) -> torch.Tensor:
    dispatcher = _dispatcher(model)
    return _gather(dispatcher, dispatcher.start(layer, hidden_states, ids, weights))


def _gather(dispatcher: Dispatcher, dispatch: Dispatch) -> torch.Tensor:
    """The layer's sums; where rows are lost or degraded, whoever runs the step is told which, and it goes on."""
    try:
        with away():
            return dispatcher.finish(dispatch)
    except RowsLost as error:
        if not lose(error.tokens, error.degraded):
            raise
        if error.tokens:
            log.error("%s; %d rows of a step are lost", error, len(error.tokens))
        return error.sums


def _start(
    hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: int, model: str
) -> torch.Tensor:
    dispatcher = _dispatcher(model)
    ticket = next(_tickets)
    _under_way[ticket] = dispatcher, dispatcher.start(layer, hidden_states, ids, weights)
    return torch.tensor(ticket)


def _finish(ticket: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return _gather(*_under_way.pop(int(ticket)))


def _fake_experts(
    hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: int, model: str
) -> torch.Tensor:
    return torch.empty_like(hidden_states)


def _fake_start(
    hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: int, model: str
) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


def _fake_finish(ticket: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like)


def _define() -> None:
    rows = "Tensor hidden_states, Tensor weights, Tensor ids, SymInt layer, str model"
    for name, arguments, function, fake in (
        ("experts", rows, _experts, _fake_experts),
        ("start", rows, _start, _fake_start),
        ("finish", "Tensor ticket, Tensor like", _finish, _fake_finish),
    ):
        LIBRARY.define(f"{name}({arguments}) -> Tensor")  # type: ignore[no-untyped-call]
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"expertmesh::{name}", fake, lib=LIBRARY)


_define()
