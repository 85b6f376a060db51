"""torch.cuda without a card, as strict as one: the rules of captures, and which work is ordered before which.

`StrictCuda` stands in for the module torch.cuda. Tensors lie on the CPU and every operation is computed at once, but
the fake notes on which stream it was issued, what it reads and writes, and what the stream and the host have waited
for. Work on two streams that touches the same bytes without an order is an error, as is a host that writes to memory
which a copy still reads. Memory from `cudart().cudaHostRegister` counts as the host's, all other tensors as the card's.

A captured graph keeps operations and addresses, no tensors: replaying it computes the same operations on the same
addresses, and raises where one of them has been freed. Two modes follow the rules of torch 2.11 and of torch 2.13.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

VERSIONS = ("2.11", "2.13")
STREAMS = 32  # that torch hands out in turns
PRODUCTS = {"mm", "addmm", "mv", "addmv", "bmm", "baddbmm", "linear", "dot"}
RANDOM = {"randn", "rand", "randint", "normal_", "uniform_", "random_", "randperm", "bernoulli_", "multinomial"}
READS_HOST = {"tolist", "item", "__bool__", "__int__", "__float__", "cpu", "nonzero", "is_nonzero", "equal"}
FROM_HOST = {"tensor", "as_tensor", "from_numpy", "frombuffer"}
OOM = "CUDA out of memory. Tried to allocate 2.00 GiB."
INVALID = "CUDA error: operation failed due to a previous error during capture"

Clock = dict[int, int]  # by stream: how many of its operations are ordered before


class Unordered(AssertionError):
    """Two accesses to the same bytes, at least one of them a write, without an order between them."""


@dataclass(frozen=True)
class Access:
    """Bytes that an operation touches."""

    start: int
    end: int
    writes: bool
    what: str
    at: int = 0  # the number of the operation on its stream

    def conflicts(self, other: Access) -> bool:
        return (self.writes or other.writes) and self.start < other.end and other.start < self.end


@dataclass(eq=False)
class Stream:
    cuda: StrictCuda
    number: int
    device: int = 0
    clock: Clock = field(default_factory=dict)
    open: list[Access] = field(default_factory=list)  # accesses of which the host does not know that they are done

    def wait_stream(self, other: Stream) -> None:
        _merge(self.clock, self.cuda.ordered(other))

    def wait_event(self, event: Event) -> None:
        _merge(self.clock, event.clock)

    def synchronize(self) -> None:
        self.cuda.host_waits(self.cuda.ordered(self))


class Event:
    def __init__(self, cuda: StrictCuda) -> None:
        self.cuda, self.clock = cuda, Clock()

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict(self.cuda.ordered(stream or self.cuda.current_stream()))

    def synchronize(self) -> None:
        self.cuda.host_waits(self.clock)

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Workspace:
    """The memory that a library for matrix products keeps for a stream."""

    def __init__(self, pool: Any) -> None:
        self.pool, self.freed = pool, False


@dataclass
class Pool:
    used_by: int = 0  # graphs
    workspaces: int = 0  # that were allocated in it
    recording: bool = False  # a capture into it has begun and has not ended well
    tensors: list[StorageWeakRef] = field(default_factory=list)  # that were allocated in it

    @property
    def live(self) -> bool:
        """Whether some of its memory is in use, so that it cannot be freed."""
        return bool(self.workspaces) or any(not storage.expired() for storage in self.tensors)


class Graph:
    """A captured graph: operations with the addresses of what they read and write."""

    def __init__(self, cuda: StrictCuda) -> None:
        self.cuda = cuda
        self.pool: Any = None
        self.ended = False
        self.error = ""  # why the capture has become invalid
        self.on: Stream | None = None
        self.operations: list[tuple[Any, Any, Any]] = []  # function, arguments, new tensors that it gives
        self.own: dict[int, Any] = {}  # storages allocated within the capture, which lie in the pool
        self.accesses: set[Access] = set()
        self.workspaces: set[Workspace] = set()

    def capture_begin(self, pool: Any, capture_error_mode: str = "global") -> None:
        cuda, stream = self.cuda, self.cuda.current_stream()
        if stream is cuda.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if stream.device != cuda.current_device():
            raise RuntimeError("CUDA error: invalid argument: the stream is of another card")
        if cuda.version == "2.11":
            cuda.generator.capturing = True  # before the pool is taken
        known = cuda.pools.setdefault(pool, Pool(used_by=-1))
        if known.used_by == 0:
            raise RuntimeError('it->second->use_count > 0 INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp"')
        if known.recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        known.used_by, known.recording = max(known.used_by, 0) + 1, True
        cuda.generator.capturing = True
        self.pool, self.on, cuda.capturing = pool, stream, self
        cuda.captures += 1

    def capture_end(self) -> None:
        self.cuda.capturing = None
        if self.error:
            raise RuntimeError(INVALID)
        self.cuda.generator.capturing = False
        self.cuda.pools[self.pool].recording = False
        self.ended = True

    def note(self, function: Any, arguments: Any, given: Any) -> None:
        """Keep an operation. Tensors from outside the capture are kept as addresses."""
        for tensor in _tensors(given):
            self.own[_storage(tensor)] = storage = tensor.untyped_storage()
            self.cuda.pools[self.pool].tensors.append(StorageWeakRef(storage))
        self.operations.append((function, *(tree_map(self._address, part) for part in (arguments, given))))

    def _address(self, value: Any) -> Any:
        inside = isinstance(value, Tensor) and _storage(value) in self.own
        return value if inside or not isinstance(value, Tensor) else _Address(value)

    def replay(self) -> None:
        if any(workspace.freed for workspace in self.workspaces):
            raise RuntimeError("CUDA error: an illegal memory access was encountered: a workspace has been freed")
        cuda = self.cuda
        cuda.replays += 1
        cuda.note("a graph", self.accesses)
        with _disable_current_modes(), torch.inference_mode():
            for function, (arguments, named), given in self.operations:
                found = function(*tree_map(_tensor, arguments), **tree_map(_tensor, named))
                for old, new in zip(_tensors(tree_map(_tensor, given)), _tensors(found), strict=False):
                    old.copy_(new)

    def reset(self) -> None:
        if not self.ended:
            return
        self.ended = False
        assert self.on is not None
        if self.cuda.version != "2.11":
            self.cuda.free_workspaces(self.on)
        self.cuda.pools[self.pool].used_by -= 1
        self.operations.clear()
        self.own.clear()

    def __del__(self) -> None:
        self.reset()
        if self.error:
            self.cuda.dangling = True  # the allocator goes on asking it whether it captures


class _Address:
    """Where a tensor lies, without keeping it."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._at = (tensor.storage_offset(), tensor.size(), tensor.stride())
        self._dtype = tensor.dtype

    def tensor(self) -> Tensor:
        if self._storage.expired():
            raise RuntimeError("CUDA error: an illegal memory access was encountered: a graph reads freed memory")
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._at)


class StreamContext:
    """torch.cuda.stream: one that is entered and never left keeps its stream current."""

    def __init__(self, cuda: StrictCuda, stream: Stream) -> None:
        self._cuda, self._stream = cuda, stream

    def __enter__(self) -> None:
        self._before, self._watched = self._cuda.current_stream(), self._cuda.watched()
        self._cuda.set_stream(self._stream)
        self._watched.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._watched.__exit__(None, None, None)
        self._cuda.set_stream(self._before)


class GraphContext:
    """torch.cuda.graph: what fails to begin is not ended, and the thread then stays on the stream."""

    def __init__(self, cuda: StrictCuda, graph: Graph, pool: Any, stream: Stream | None, mode: str) -> None:
        if stream is None:
            cuda.shared_capture_stream = stream = cuda.shared_capture_stream or cuda.Stream()
        self._cuda, self._graph, self._pool, self._mode = cuda, graph, pool, mode
        self._on = cuda.stream(stream)

    def __enter__(self) -> None:
        self._cuda.synchronize()
        self._cuda.empty_cache()
        self._on.__enter__()
        self._graph.capture_begin(self._pool, self._mode)

    def __exit__(self, *error: Any) -> None:
        self._graph.capture_end()
        self._on.__exit__(*error)


class Generator:
    """The card's default generator, which believes to be in a capture until that has ended."""

    def __init__(self) -> None:
        self.capturing = False

    def clone_state(self) -> Generator:
        return Generator()

    def graphsafe_set_state(self, other: Generator) -> None:
        self.capturing = other.capturing


class Runtime:
    """torch.cuda.cudart(): page-locked host memory by address."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.refuses = False
        self.error = ""  # kept until a launch asks for it
        self.unmapped = 0  # of what was unlocked

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:
        if self.refuses:
            self.error = OOM
            return 2
        assert address not in self.locked, "CUDA error: part or all of the requested memory range is already mapped"
        self.locked[address] = n_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        # Of memory that is gone: another thread may have mapped, and locked, something else there.
        there = ctypes.CDLL(None).msync(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 1) == 0
        self.unmapped += not there  # and not raised, since a finalizer's errors are not
        del self.locked[address]
        return 0

    def launched(self) -> None:
        """Torch asks after every launch whether there was an error."""
        said, self.error = self.error, ""
        if said:
            raise RuntimeError(said)

    def holds(self, tensor: Tensor) -> bool:
        return any(start <= tensor.data_ptr() < start + n for start, n in self.locked.items())


class StrictCuda:
    """torch.cuda as far as serving and measuring use it."""

    def __init__(self, version: str = VERSIONS[0], cards: int = 1) -> None:
        self.version, self.cards = version, cards
        self.default = Stream(self, 0)
        self.pools: dict[Any, Pool] = {}
        self.workspaces: dict[tuple[int, int], Workspace] = {}  # by thread and stream
        self.generator = Generator()
        self.default_generators = [self.generator] * cards
        self.capturing: Graph | None = None
        self.shared_capture_stream: Stream | None = None
        self.captures = self.replays = self.waits = 0
        self.dangling = False
        self.fails: Callable[[int], bool] = lambda captures: False  # whether an allocation in this capture fails
        self.pinned_pools: list[Any] = []  # pools in which a workspace was allocated
        self.runtime = Runtime()
        self._streams: list[Stream] = []
        self._given = 0
        self._numbers = itertools.count(1)
        self._known: Clock = {}  # what the host knows to be done
        self._thread = threading.local()
        self._card = 0

    # Devices

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return self.cards

    def set_device(self, device: Any) -> None:
        self._card = int(getattr(device, "index", device) or 0)

    def current_device(self) -> int:
        return self._card

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(name="NVIDIA H200", total_memory=139 << 30, multi_processor_count=132, uuid="ab-c")

    def cudart(self) -> Runtime:
        return self.runtime

    # Streams

    def Stream(self, device: Any = None) -> Stream:
        """One of 32, in turns."""
        if len(self._streams) < STREAMS:
            index = getattr(device, "index", device)
            self._streams.append(Stream(self, len(self._streams) + 1, self._card if index is None else index))
        self._given += 1
        return self._streams[(self._given - 1) % STREAMS]

    def current_stream(self, device: Any = None) -> Stream:
        return getattr(self._thread, "stream", self.default)

    def stream(self, stream: Stream) -> StreamContext:
        return StreamContext(self, stream)

    def set_stream(self, stream: Stream) -> None:
        self._thread.stream = stream

    def Event(self, enable_timing: bool = False) -> Event:
        return Event(self)

    def synchronize(self, device: Any = None) -> None:
        if self.capturing is not None:
            self.invalid("synchronize()")
        for stream in (self.default, *self._streams):
            stream.synchronize()

    def _sleep(self, cycles: int) -> None:
        """A launch, which takes no time here."""
        self.runtime.launched()

    def ordered(self, stream: Stream) -> Clock:
        """Everything that comes before the stream's next operation."""
        _merge(stream.clock, self._known)
        return stream.clock

    def host_waits(self, clock: Clock) -> None:
        self.waits += 1
        _merge(self._known, clock)
        for stream in (self.default, *self._streams):
            done = self._known.get(stream.number, 0)
            stream.open = [access for access in stream.open if access.at > done]

    @property
    def busy(self) -> bool:
        """Whether the host does not know that the default stream has done everything."""
        return bool(self.default.open)

    def note(self, what: str, accesses: Any) -> None:
        """One operation on the current stream."""
        stream = self.current_stream()
        clock = self.ordered(stream)
        clock[stream.number] = at = clock.get(stream.number, 0) + 1
        mine = [Access(a.start, a.end, a.writes, what, at) for a in accesses]
        for other in (self.default, *self._streams):
            if other is not stream:
                self._check(mine, [a for a in other.open if a.at > clock.get(other.number, 0)], other, stream)
        stream.open += mine

    def host_touches(self, tensor: Tensor) -> None:
        """The host writes to page-locked memory."""
        mine = [_range(tensor, True, "the host")]
        for other in (self.default, *self._streams):
            self._check(mine, other.open, other, None)

    def _check(self, mine: list[Access], theirs: list[Access], other: Stream, stream: Stream | None) -> None:
        for a, b in itertools.product(mine, theirs):
            if a.conflicts(b):
                here = "" if stream is None else f" on stream {stream.number}"
                raise Unordered(f"{a.what}{here} and {b.what} on stream {other.number} touch the same bytes")

    # Memory and libraries

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, next(self._numbers))

    def empty_cache(self) -> None:
        for key in [key for key, pool in self.pools.items() if not pool.used_by and not pool.live]:
            del self.pools[key]

    def memory_allocated(self) -> int:
        return 0

    def max_memory_allocated(self) -> int:
        return 0

    def reset_peak_memory_stats(self) -> None:
        """Nothing is counted."""

    def free_workspaces(self, stream: Stream) -> None:
        for key in [key for key in self.workspaces if key[1] == stream.number]:
            workspace = self.workspaces.pop(key)
            workspace.freed = True
            if workspace.pool is not None:
                self.pools[workspace.pool].workspaces -= 1

    def product(self) -> None:
        """A product of matrices: allocates the stream's workspace, inside a capture from the capture's pool."""
        key, graph = (threading.get_ident(), self.current_stream().number), self.capturing
        if key not in self.workspaces:
            self.workspaces[key] = Workspace(None if graph is None else graph.pool)
            if graph is not None:
                self.pools[graph.pool].workspaces += 1
                self.pinned_pools.append(graph.pool)
        if graph is not None:
            graph.workspaces.add(self.workspaces[key])

    def draw(self) -> None:
        if self.generator.capturing and self.capturing is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    # Captures

    def CUDAGraph(self) -> Graph:
        return Graph(self)

    def graph(
        self, graph: Graph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> GraphContext:
        return GraphContext(self, graph, pool, stream, capture_error_mode)

    def invalid(self, what: str) -> None:
        """What no capture may do."""
        assert self.capturing is not None
        self.capturing.error = f"{what} inside a capture"
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within, every operation of this thread is the card's."""
        if getattr(self._thread, "watched", False):
            yield
            return
        self._thread.watched = True
        try:
            with ExitStack() as modes:
                modes.enter_context(_Host(self))
                modes.enter_context(_Operations(self))
                yield
        finally:
            self._thread.watched = False


class _Host(TorchFunctionMode):
    """What the host asks of tensors."""

    def __init__(self, cuda: StrictCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, cuda = getattr(function, "__name__", ""), self._cuda
        capturing = cuda.capturing is not None and cuda.current_stream() is cuda.capturing.on
        if name in READS_HOST and isinstance(args[0], Tensor) and not cuda.runtime.holds(args[0]):
            if capturing:
                cuda.invalid(f"{name}() waits for the card")
            cuda.current_stream().synchronize()
        elif name in FROM_HOST and capturing:
            cuda.invalid(f"{name}() copies from the host")
        elif name == "numpy" and cuda.runtime.holds(args[0]):
            cuda.host_touches(args[0])
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Every operation: what it reads and writes, and on which stream."""

    def __init__(self, cuda: StrictCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cuda, kwargs = self._cuda, kwargs or {}
        name, schema = function.overloadpacket.__name__, function._schema
        graph = cuda.capturing if cuda.capturing and cuda.current_stream() is cuda.capturing.on else None
        cuda.runtime.launched()
        if name in PRODUCTS:
            cuda.product()
        if name in RANDOM and kwargs.get("generator") is None:
            cuda.draw()
        if graph is not None and cuda.fails(cuda.captures):
            graph.error = OOM if cuda.version == "2.11" else ""
            raise torch.OutOfMemoryError(OOM)
        found = function(*args, **kwargs)
        written = [
            value for argument, value in zip(schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]  # fmt: skip
        read = _tensors((args, kwargs))
        given = () if written else found
        if not written and {_storage(tensor) for tensor in _tensors(found)} <= {_storage(tensor) for tensor in read}:
            return found  # a view: nothing is computed
        touched = [*_tensors(written), *_tensors(given)]
        if graph is not None and name in ("copy_", "_to_copy") and any(cuda.runtime.holds(t) for t in read):
            cuda.invalid("a copy from the host")
        accesses = [_range(t, t_writes, name) for group, t_writes in ((read, False), (touched, True)) for t in group]
        if graph is None:
            cuda.note(name, [access for access in accesses if access.end > access.start])
        else:
            graph.note(function, (args, kwargs), given)
            graph.accesses.update(accesses)
        return found


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for each in values for tensor in _tensors(each)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensor(value: Any) -> Any:
    return value.tensor() if isinstance(value, _Address) else value


def _range(tensor: Tensor, writes: bool, what: str) -> Access:
    reach = sum((n - 1) * stride for n, stride in zip(tensor.size(), tensor.stride(), strict=True))
    n_bytes = (reach + 1) * tensor.element_size() if tensor.numel() else 0
    return Access(tensor.data_ptr(), tensor.data_ptr() + n_bytes, writes, what)


def _merge(into: Clock, more: Clock) -> None:
    for stream, at in more.items():
        into[stream] = max(into.get(stream, 0), at)
