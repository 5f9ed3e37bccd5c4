"""The pickle inside a torch archive, read by an interpreter that can build nothing but inert values.

Nothing is imported, called or constructed on a file's behalf. Every global name is looked up in literal tables and
stays a name; what a call would return is described by a small frozen value. Values are never hashed, compared or
walked recursively, so neither depth nor sharing costs anything.

Format: ``pickletools`` of Python 3.11 for the opcodes; torch 2.13 ``torch/serialization.py`` for the persistent ids.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Container, Iterable

from .torchvalues import GLOBALS, STORAGES, Global, Object, Opaque, PickleError, Storage, Table, call, is_count, kind
from .untrusted import shown

MAX_PICKLE = 64 * 2**20
"""Bytes of a data.pkl that is accepted; about 600,000 tensors."""
MAX_DEPTH = 1000
"""Containers under construction at one time."""
MAX_OBJECTS = 6_000_000
"""Containers, strings, pairs and, counted apart, memo entries of one pickle."""
MAX_LONG = 64
"""Bytes of an integer."""

_WORD = struct.Struct("<I")
_SET = Opaque("builtins.set")


class Unpickler:
    """Interpret one pickle; after ``load``, ``storages`` holds every storage it mentions, by key.

    ``objects``: names of classes whose instances are wanted as :class:`.torchvalues.Object`; they are never resolved.
    """

    def __init__(self, data: bytes, objects: Container[str] = ()) -> None:
        self._objects = objects
        self.storages: dict[str, Storage] = {}
        self._data = data
        self._at = 0
        self._stack: list[object] = []
        self._below: list[list[object]] = []
        self._memo: dict[int, object] = {}
        self._made = 0

    @property
    def at(self) -> int:
        """How many bytes are read."""
        return self._at

    def load(self, *, whole: bool = True) -> object:
        """Return the pickled value: stand-ins of ``torchvalues`` and str, int, float, bool, None, bytes, list, tuple.

        ``whole``: nothing may follow it.

        Raises PickleError for opcodes and names that are not allowed, for calls with unexpected arguments and for
        malformed data.
        """
        if whole and len(self._data) > MAX_PICKLE:
            raise PickleError(f"the pickle has {len(self._data)} bytes, more than {MAX_PICKLE}")
        data, operations = self._data, _TABLE
        try:
            while True:
                code = data[self._at]
                self._at += 1
                if code == 0x2E:  # STOP
                    break
                operations[code](self)
            value = self._stack.pop()
        except (LookupError, struct.error):
            raise PickleError(f"the pickle ends early or takes what was never put, at byte {self._at}") from None
        if self._stack or self._below or (whole and self._at != len(data)):
            raise PickleError(f"the pickle leaves something over at byte {self._at}")
        return value

    # Reading the stream

    def _take(self, length: int) -> bytes:
        start = self._at
        if length > len(self._data) - start:
            raise PickleError(f"the pickle ends early, at byte {start}")
        self._at = start + length
        return self._data[start : start + length]

    def _number(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _byte(self) -> int:
        value = self._data[self._at]
        self._at += 1
        return value

    def _word(self) -> int:
        value: int = _WORD.unpack_from(self._data, self._at)[0]
        self._at += 4
        return value

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + 4096)
        if end < 0:
            raise PickleError(f"a name at byte {self._at} has no end")
        return self._text(self._take(end + 1 - self._at)[:-1])

    def _text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise PickleError(f"a string before byte {self._at} is not UTF-8") from None

    # Opcodes

    def _refused(self) -> None:
        raise PickleError(f"the opcode {self._data[self._at - 1]:#04x} at byte {self._at - 1} is not allowed")

    def _binint1(self) -> None:
        self._stack.append(self._data[self._at])
        self._at += 1

    def _binput(self) -> None:
        self._memo[self._data[self._at]] = self._stack[-1]
        self._at += 1

    def _binget(self) -> None:
        self._stack.append(self._memo[self._data[self._at]])
        self._at += 1

    def _proto(self) -> None:
        if not 2 <= self._number(1) <= 5:
            raise PickleError("the pickle protocol is not 2 to 5")

    def _frame(self) -> None:
        if self._number(8) > len(self._data) - self._at:
            raise PickleError(f"a frame at byte {self._at} is longer than the pickle")

    def _new(self, value: object) -> None:
        self._made += 1
        if self._made > MAX_OBJECTS:
            raise _too_many()
        self._stack.append(value)

    def _mark(self) -> None:
        if len(self._below) >= MAX_DEPTH:
            raise PickleError(f"the pickle nests deeper than {MAX_DEPTH}")
        self._below.append(self._stack)
        self._stack = []

    def _marked(self) -> list[object]:
        items = self._stack
        self._stack = self._below.pop()
        return items

    def _put(self, index: int) -> None:
        if len(self._memo) > MAX_OBJECTS:
            raise _too_many()
        self._memo[index] = self._stack[-1]

    def _long_binget(self) -> None:
        self._stack.append(self._memo[self._word()])

    def _long(self, width: int) -> None:
        length = self._number(width)
        if length > MAX_LONG:
            raise PickleError(f"an integer of {length} bytes at byte {self._at} is not accepted")
        self._stack.append(int.from_bytes(self._take(length), "little", signed=True))

    def _string(self, length: int) -> None:
        self._new(self._text(self._take(length)))

    def _tuple1(self) -> None:
        self._new((self._stack.pop(),))

    def _tuple2(self) -> None:
        last, first = self._stack.pop(), self._stack.pop()
        self._new((first, last))

    def _tuple3(self) -> None:
        last, middle, first = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._new((first, middle, last))

    def _append(self, items: Iterable[object]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise PickleError(f"something is appended to {kind(target)}, at byte {self._at}")

    def _setitems(self, items: list[object]) -> None:
        target = self._stack[-1]
        if len(items) % 2 or not isinstance(target, Table | Opaque):
            raise PickleError(f"keys are set in {kind(target)}, at byte {self._at}")
        if isinstance(target, Table):
            self._made += len(items) // 2
            if self._made > MAX_OBJECTS:
                raise _too_many()
            target.items.extend(zip(items[::2], items[1::2], strict=True))

    def _opaque_set(self) -> None:
        self._marked()
        if not isinstance(self._stack[-1], Opaque):
            raise PickleError(f"something is added to {kind(self._stack[-1])}, at byte {self._at}")

    def _frozenset(self) -> None:
        self._marked()
        self._new(_SET)

    def _discard(self) -> None:
        self._stack.pop()

    def _global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError(f"a global's name is not a string, at byte {self._at}")
        path = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if path not in GLOBALS and path not in self._objects:
            raise PickleError(f"it names {shown(path)}, which is not needed to hold tensors")
        self._new(Global(path))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(module, name)

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise PickleError(f"it calls {kind(function)}, at byte {self._at}")
        made = Object(function.path, arguments) if function.path in self._objects else call(function.path, arguments)
        self._new(made)

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Object):
            target.state = state
            return
        # An OrderedDict's state is its attributes: nn.Module.state_dict keeps module versions in _metadata.
        if not (
            isinstance(target, Opaque) or (isinstance(target, Table) and (state is None or isinstance(state, Table)))
        ):
            raise PickleError(f"it sets the state of {kind(target)}, at byte {self._at}")

    def _persistent(self) -> None:
        match self._stack.pop():
            case ("storage", Global(path), str(key), str(), int(numel), *rest) if is_count(numel) and rest in (
                [],
                [None],
            ):
                if path not in STORAGES:
                    raise PickleError(f"a storage has the type {path}")
                storage = self.storages.setdefault(key, Storage(key, STORAGES[path], numel))
                if (storage.dtype, storage.numel) != (STORAGES[path], numel):
                    raise PickleError(f"the storage {shown(key)} is described in two ways")
                self._stack.append(storage)
            case _:
                raise PickleError(f"a persistent id before byte {self._at} does not describe a storage")


def _too_many() -> PickleError:
    return PickleError(f"the pickle holds more than {MAX_OBJECTS} objects")


def _push(value: object) -> Callable[[Unpickler], None]:
    return lambda self: self._stack.append(value)


def _unpack(form: str) -> Callable[[Unpickler], None]:
    parts = struct.Struct(form)
    return lambda self: self._stack.append(parts.unpack(self._take(parts.size))[0])


_OPERATIONS: dict[int, Callable[[Unpickler], None]] = {
    0x80: Unpickler._proto,
    0x95: Unpickler._frame,
    ord("("): Unpickler._mark,
    ord("0"): Unpickler._discard,
    ord("N"): _push(None),
    0x88: _push(True),
    0x89: _push(False),
    ord("J"): _unpack("<i"),
    ord("K"): Unpickler._binint1,
    ord("M"): _unpack("<H"),
    ord("G"): _unpack(">d"),
    0x8A: lambda self: self._long(1),
    0x8B: lambda self: self._long(4),
    ord("X"): lambda self: self._string(self._word()),
    0x8C: lambda self: self._string(self._byte()),
    0x8D: lambda self: self._string(self._number(8)),
    ord("B"): lambda self: self._new(self._take(self._number(4))),
    ord("C"): lambda self: self._new(self._take(self._number(1))),
    0x8E: lambda self: self._new(self._take(self._number(8))),
    ord(")"): _push(()),
    ord("t"): lambda self: self._new(tuple(self._marked())),
    0x85: Unpickler._tuple1,
    0x86: Unpickler._tuple2,
    0x87: Unpickler._tuple3,
    ord("]"): lambda self: self._new([]),
    ord("a"): lambda self: self._append([self._stack.pop()]),
    ord("e"): lambda self: self._append(self._marked()),
    ord("}"): lambda self: self._new(Table()),
    ord("s"): lambda self: self._setitems([self._stack.pop(), self._stack.pop()][::-1]),
    ord("u"): lambda self: self._setitems(self._marked()),
    0x8F: lambda self: self._new(_SET),
    0x90: Unpickler._opaque_set,
    0x91: Unpickler._frozenset,
    ord("c"): lambda self: self._global(self._line(), self._line()),
    0x93: Unpickler._stack_global,
    ord("R"): Unpickler._reduce,
    0x81: Unpickler._reduce,
    ord("b"): Unpickler._build,
    ord("q"): Unpickler._binput,
    ord("r"): lambda self: self._put(self._word()),
    0x94: lambda self: self._put(len(self._memo)),
    ord("h"): Unpickler._binget,
    ord("j"): Unpickler._long_binget,
    ord("Q"): Unpickler._persistent,
}
"""The opcodes that torch.save emits under protocols 2 to 5 for checkpoints; all others are refused."""

_TABLE = [_OPERATIONS.get(code, Unpickler._refused) for code in range(256)]
