# Addresses are of dense memory that the caller keeps for the call; dtypes and codes are expert.proto's numbers.

from collections.abc import Callable

import numpy
from numpy.typing import NDArray
from torch import Tensor

# --- the router's side (client_bindings.cc) ---

class Latency:
    def __init__(self) -> None: ...
    def note(self, rows: int, round_trip_ns: int, /) -> None: ...
    def late_after(self, rows: int, /) -> int: ...

class Step:
    def wait(self, patience_us: int, /) -> bool: ...
    def gather(self, out: int, /) -> bool: ...
    def late_after_us(self) -> int: ...
    def parts(self) -> list[tuple[str, bytes, bytes, bytes, bytes, int, bytes, int, int, int, bool]]: ...
    def unserved(self) -> tuple[bytes, bytes, bytes]: ...
    def copy_output(self, part: int, out: int, /) -> None: ...

class Client:
    def __init__(
        self,
        channel_options: list[tuple[str, int]],
        fingerprint: str,
        timeout_s: float,
        server_name: str,
        checksums: bool,
        /,
    ) -> None: ...
    def event_fd(self) -> int: ...
    def events(self) -> list[tuple[int, bytes | None]]: ...
    def open(
        self,
        address: str,
        replica: str,
        max_rows: int,
        experts: dict[int, list[int]],
        ca_certificate_key: tuple[bytes, bytes, bytes] | None,
        /,
    ) -> int: ...
    def close_stream(self, stream: int, /) -> None: ...
    def use(self, streams: list[int], /) -> None: ...
    def load(self, stream: int, /) -> tuple[int, int, int]: ...
    def scatter(
        self,
        layer: int,
        hidden_states: int,
        tokens: int,
        width: int,
        dtype: int,
        topk_ids: int,
        id_bytes: int,
        topk_weights: int,
        top_k: int,
        /,
    ) -> Step: ...
    def send(
        self,
        layer: int,
        hidden_states: int,
        tokens: int,
        width: int,
        dtype: int,
        parts: list[tuple[int, str, bytes, bytes, bytes, bytes]],
        /,
    ) -> Step: ...
    def timings(self) -> dict[int, tuple[int, int, int, int, int, int, int, int, int]]: ...
    def close(self) -> None: ...

def choose_owners(counts: list[tuple[int, int]], candidates: list[tuple[list[int], int, int]], /) -> list[int]: ...

# --- the replica's side (server_bindings.cc) ---

class Server:
    def __init__(
        self,
        *,
        replica_id: str,
        group: str,
        fingerprint: str,
        hidden_size: int,
        held: dict[int, bytes],
        layers_text: str,
        max_rows: int,
        max_pairs: int,
        max_queued_rows: int,
        max_batch_rows: int,
        description: bytes,
        reflect: Callable[[bytes], bytes | None],
        options: list[tuple[str, int]],
        tls: Callable[[], tuple[bytes, bytes, bytes]] | None,
    ) -> None: ...
    def listen(self, host: str, first: int, last: int) -> int: ...
    def compute_with(self, computation: Computation | None) -> None: ...
    def take(self) -> tuple[int, int, int, int, int] | None: ...
    def buffers(
        self,
    ) -> tuple[NDArray[numpy.uint8], NDArray[numpy.int32], NDArray[numpy.int32], NDArray[numpy.float32]]: ...
    def reply(self, address: int, dtype: int) -> None: ...
    def fail(self, message: str) -> None: ...
    def close(self) -> None: ...
    def stop(self, grace_s: float) -> None: ...
    def set_state(self, state: int) -> None: ...
    def set_serving(self, serving: bool) -> None: ...
    def load(self) -> tuple[int, float, int, float]: ...
    def expert_rows(self) -> dict[int, list[int]]: ...
    def queue_wait(self) -> tuple[int, int]: ...
    def streams(self) -> tuple[int, int, int]: ...
    def last_request_at(self) -> float: ...

class Turns:
    def __init__(self) -> None: ...
    def rows_of(self, caller: int, /) -> int: ...
    def callers_with(self, caller: int, /) -> int: ...
    def join(self, caller: int, rows: int, /) -> int: ...
    def leave(self, caller: int, rows: int, /) -> None: ...
    def advance(self, turn: int | None, /) -> None: ...

def may_wait(rows: int, own_rows: int, callers: int, queued_rows: int, max_queued_rows: int, /) -> bool: ...

# Times are nanoseconds of the monotonic clock; a negative `oldest` means that nothing waits.
class LoadMeter:
    def __init__(self, experts_per_layer: dict[int, int], now: int) -> None: ...
    def record(
        self, now: int, layer: int, arrived: list[int], experts: list[int], rows: int, times: int = 1
    ) -> None: ...
    def queue_wait(self, now: int, oldest: int) -> tuple[int, int]: ...

def fill_table(
    rows: NDArray[numpy.int32],
    experts: NDArray[numpy.int32],
    weights: NDArray[numpy.float32],
    slots: NDArray[numpy.int32],
    num_rows: int,
    pairs_per_read: int,
    capacity: int,
    ids_address: int,
    topk_weights_address: int,
) -> int: ...
def spread_pairs(
    rows: NDArray[numpy.int32],
    experts: NDArray[numpy.int32],
    weights: NDArray[numpy.float32],
    slots: NDArray[numpy.int32],
    num_rows: int,
    x_address: int,
    row_bytes: int,
    pair_rows_address: int,
    ids_address: int,
    topk_weights_address: int,
    spread_address: int,
) -> None: ...
def sum_pairs(
    pairs: int,
    width: int,
    dtype: int,
    pair_rows_address: int,
    outputs_address: int,
    num_rows: int,
    sums_address: int,
) -> None: ...
def can_compute_experts() -> bool: ...

class Computation:
    """What computes batches without Python (computation.h)."""

class Echo(Computation):
    def __init__(self) -> None: ...

class Experts(Computation):
    def __init__(self) -> None: ...
    def add_layer(self, layer: int, gate_up: Tensor, down: Tensor, slots: NDArray[numpy.int32]) -> None: ...
    def run(
        self,
        layer: int,
        x_address: int,
        num_rows: int,
        rows: NDArray[numpy.int32],
        experts: NDArray[numpy.int32],
        weights: NDArray[numpy.float32],
        sums_address: int,
    ) -> None: ...
