"""Bytes of GGUF files, sound ones and ones that lie, without the help of any library."""

import struct
from dataclasses import dataclass, field

UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


@dataclass(kw_only=True)
class Tensor:
    name: bytes = b"token_embd.weight"
    dims: tuple[int, ...] = (32, 4)  # fastest first
    type_code: int = 0
    offset: int = 0

    def info(self) -> bytes:
        dims = struct.pack(f"<I{len(self.dims)}Q", len(self.dims), *self.dims)
        return text(self.name) + dims + struct.pack("<IQ", self.type_code, self.offset)


@dataclass(kw_only=True)
class File:
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None  # None: the truth
    metadata_count: int | None = None
    metadata: list[bytes] = field(
        default_factory=lambda: [entry(b"general.architecture", STRING, text(b"llama"))]
    )
    tensors: list[Tensor] = field(default_factory=lambda: [Tensor()])
    data: bytes = bytes(32 * 4 * 4)

    def build(self) -> bytes:
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        keys = len(self.metadata) if self.metadata_count is None else self.metadata_count
        head = self.magic + struct.pack("<IQQ", self.version, tensors, keys)
        head += b"".join(self.metadata) + b"".join(tensor.info() for tensor in self.tensors)
        return head + bytes(-len(head) % 32) + self.data
