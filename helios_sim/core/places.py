"""The array types of compiled code: an array is passed as its place, where its address and lengths are written.

Numba's own array is a struct of seven or more numbers, and a group of arrays has fifty. Each call takes them apart and
puts them together again, which would be most of the code to compile. A place is one pointer, and a group is the pointer
to its first place; addresses and lengths are read where they are needed.

A place is a row of `NUMBERS` whole numbers: the address, then the length of each axis. Arrays are contiguous, no index
is negative, and no place changes while compiled code runs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from numpy.typing import NDArray

_DIMENSIONS = 5  # most axes of an array
NUMBERS = 1 + _DIMENSIONS


def place_of(array: NDArray[Any]) -> list[int]:
    """The numbers that are written at the place of an array."""
    return [address_of(array), *array.shape, *[0] * (_DIMENSIONS - array.ndim)]


def address_of(array: Any) -> int:
    """The address of an array. `__array_interface__` is slower, since it also describes each field of a record."""
    address: int = array.ctypes.data
    return address


def arrays_of(arg: Any) -> Iterator[Any]:
    """Yield the arrays of an argument, in order."""
    if isinstance(arg, tuple):
        for each in arg:
            yield from arrays_of(each)
    else:
        yield arg


def type_of(arg: Any) -> Any:
    """Numba's type for the place of an array, or for the consecutive places of a named tuple of arrays."""
    if isinstance(arg, tuple):
        return group_type(type(arg).__name__, {name: type_of(each) for name, each in arg._asdict().items()})  # type: ignore[attr-defined]
    return _types().place(import_module("numba").from_dtype(arg.dtype), arg.ndim)


def group_type(name: str, fields: dict[str, Any]) -> Any:
    """Numba's type for consecutive places, which are attributes of these types."""
    return _types().group(name, fields)


def array_type(group: Any) -> Any:
    """Numba's type for an array with the places of one such group in each row."""
    return _types().place(group, 1)


class _Types(NamedTuple):
    place: Any
    group: Any


@cache
def _types() -> _Types:
    """Both types, registered with Numba for what the loop does with them: indices, lengths, shapes and fields."""
    numba, extending = import_module("numba"), import_module("numba.extending")
    cgutils, attributes = import_module("numba.core.cgutils"), import_module("numba.core.typing.templates")
    types: Any = numba.types
    whole = cgutils.intp_t

    class Place(types.Type):  # type: ignore[misc]
        places = 1

        def __init__(self, item: Any, ndim: int) -> None:
            self.item, self.ndim = item, ndim
            super().__init__(f"{item.mangling_args[0]}{ndim}")

        @property
        def key(self) -> Any:
            return self.item, self.ndim

    class Group(types.Type):  # type: ignore[misc]
        def __init__(self, name: str, fields: dict[str, Any]) -> None:
            self.fields, self.firsts, self.places = fields, dict[str, int](), 0
            for field, kind in fields.items():
                self.firsts[field] = self.places
                self.places += kind.places
            super().__init__(name)

        @property
        def key(self) -> Any:
            return self.name, tuple(self.fields.items())

    def number(builder: Any, place: Any, at: int) -> Any:
        """Load the number with index `at` of a place."""
        found = builder.load(builder.gep(builder.bitcast(place, whole.as_pointer()), [whole(at)], inbounds=True))
        found.set_metadata("invariant.load", builder.module.add_metadata([]))
        return found

    def item_at(context: Any, builder: Any, of: Sequence[Any], args: Sequence[Any]) -> Any:
        """A pointer to an array's item."""
        indices, kinds = [args[1]], [of[1]]
        if isinstance(of[1], types.BaseTuple):
            indices, kinds = cgutils.unpack_tuple(builder, args[1]), list(of[1])
        at = whole(0)
        for axis, (index, kind) in enumerate(zip(indices, kinds, strict=True)):
            index = context.cast(builder, index, kind, types.intp)
            at = builder.add(builder.mul(at, number(builder, args[0], 1 + axis)), index) if axis else index
        item = of[0].item
        written = cgutils.ir.ArrayType(whole, item.places * NUMBERS) if isinstance(item, Group) else None
        pointer = (written or context.get_data_type(item)).as_pointer()
        return builder.gep(builder.inttoptr(number(builder, args[0], 0), pointer), [at], inbounds=True)

    def get(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found, kind = item_at(context, builder, signature.args, args), signature.return_type
        if isinstance(kind, Group):
            return builder.bitcast(found, context.get_value_type(kind))
        return context.unpack_value(builder, kind, found)

    def put(context: Any, builder: Any, signature: Any, args: Any) -> None:
        found, kind = item_at(context, builder, signature.args, args), signature.args[0].item
        if isinstance(kind, types.Record):
            cgutils.raw_memcpy(builder, found, args[2], whole(kind.size), whole(1))
        else:
            context.pack_value(builder, kind, context.cast(builder, args[2], signature.args[2], kind), found)

    def length(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return number(builder, args[0], 1)

    def shape(context: Any, builder: Any, kind: Any, place: Any) -> Any:
        return cgutils.pack_array(builder, [number(builder, place, 1 + axis) for axis in range(kind.ndim)])

    def field_of(context: Any, builder: Any, kind: Any, group: Any, field: str) -> Any:
        at = kind.firsts[field] * NUMBERS
        found = builder.gep(builder.bitcast(group, whole.as_pointer()), [whole(at)], inbounds=True)
        return builder.bitcast(found, group.type)

    def suits(kind: Any, index: Any) -> bool:
        each = list(index) if isinstance(index, types.BaseTuple) else [index]
        return isinstance(kind, Place) and len(each) == kind.ndim and all(isinstance(i, types.Integer) for i in each)

    class OfPlace(attributes.AttributeTemplate):  # type: ignore[misc, name-defined]
        key = Place

        def resolve_shape(self, kind: Any) -> Any:
            return types.UniTuple(types.intp, kind.ndim)

    class OfGroup(attributes.AttributeTemplate):  # type: ignore[misc, name-defined]
        key = Group

        def generic_resolve(self, kind: Any, field: str) -> Any:
            return kind.fields.get(field)

    for kind in (Place, Group):
        extending.register_model(kind)(extending.models.OpaqueModel)
    for of in (OfPlace, OfGroup):
        extending.infer_getattr(of)
    callable_ = extending.type_callable
    callable_(operator.getitem)(lambda _: lambda kind, index: kind.item if suits(kind, index) else None)
    callable_(operator.setitem)(lambda _: lambda kind, index, value: types.none if suits(kind, index) else None)
    callable_(len)(lambda _: lambda kind: types.intp if isinstance(kind, Place) else None)
    for index in (types.Integer, types.BaseTuple):
        extending.lower_builtin(operator.getitem, Place, index)(get)
        extending.lower_builtin(operator.setitem, Place, index, types.Any)(put)
    extending.lower_builtin(len, Place)(length)
    extending.lower_getattr(Place, "shape")(shape)
    extending.lower_getattr_generic(Group)(field_of)
    return _Types(Place, Group)
