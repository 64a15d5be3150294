"""A corpus of corrupt GGUF files, each loaded by the real backend in a process of its own.

    python backends/llamacpp/tests/support/corrupt_gguf.py                 # all of them: some thousand files
    python backends/llamacpp/tests/support/corrupt_gguf.py --limit 200 --seed 3

A file may be refused, by an error that says why, or work. It may not end the process by a signal, hang, take more
than `MEMORY`, or be refused by an error that nobody meant.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np

from tgi_backend_llamacpp.vocabulary_entries import add_vocabulary
from tgi_gateway.hub import demo_model

CASE_S = 60.0
"""A file that is not refused or served by then hangs; generous, for machines with other work."""
MEMORY = 384 << 20
"""What the process may have in memory at its peak, for a file of less than a megabyte; the sound one takes 130 MiB."""
HEADS, KV_HEADS, HEAD, HIDDEN, INNER = 4, 2, 16, 64, 96
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
NUMBERS = (0, 1, 2, 7, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
LONG_NUMBERS = (0, 1, 1 << 20, 1 << 32, 1 << 40, (1 << 61) + 1, 1 << 63, (1 << 64) - 1)


def small_model(path: Path) -> Path:
    """A Llama of two layers with the demo model's vocabulary, its weights random, some of them in blocks."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    vocab_size = json.loads((demo_model() / "config.json").read_text())["vocab_size"]
    add_vocabulary(writer, demo_model(), vocab_size)
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int, kind: gguf.GGMLQuantizationType) -> None:
        values = (rng.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    blocks, halves = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16
    matrix("token_embd.weight", vocab_size, HIDDEN, blocks)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer, kind in enumerate((blocks, halves)):
        at = f"blk.{layer}"
        writer.add_tensor(f"{at}.attn_norm.weight", np.ones(HIDDEN, np.float32))
        writer.add_tensor(f"{at}.ffn_norm.weight", np.ones(HIDDEN, np.float32))
        matrix(f"{at}.attn_q.weight", HEADS * HEAD, HIDDEN, kind)
        matrix(f"{at}.attn_k.weight", KV_HEADS * HEAD, HIDDEN, kind)
        matrix(f"{at}.attn_v.weight", KV_HEADS * HEAD, HIDDEN, kind)
        matrix(f"{at}.attn_output.weight", HIDDEN, HEADS * HEAD, kind)
        matrix(f"{at}.ffn_gate.weight", INNER, HIDDEN, kind)
        matrix(f"{at}.ffn_up.weight", INNER, HIDDEN, kind)
        matrix(f"{at}.ffn_down.weight", HIDDEN, INNER, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@dataclass(frozen=True)
class Entry:
    """A metadata entry; `raw` is the value as it stands in the file."""

    key: bytes
    kind: int
    raw: bytes


@dataclass(frozen=True)
class Info:
    """A tensor's entry."""

    name: bytes
    dims: tuple[int, ...]
    kind: int
    offset: int


@dataclass
class Parts:
    """A file taken apart. Written again as it is, whether or not it makes sense."""

    entries: list[Entry]
    tensors: list[Info]
    data: bytes
    marks: list[int] = field(default_factory=list)
    """Places between two fields of the header."""

    def written(self) -> bytes:
        out = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.entries))]
        out += [_text(each.key) + struct.pack("<I", each.kind) + each.raw for each in self.entries]
        for info in self.tensors:
            dims = struct.pack(f"<I{len(info.dims)}Q", len(info.dims), *info.dims)
            out.append(_text(info.name) + dims + struct.pack("<IQ", info.kind, info.offset))
        head = b"".join(out)
        return head + b"\0" * (-len(head) % 32) + self.data


def taken_apart(content: bytes) -> Parts:
    at = 4
    marks: list[int] = []

    def number(layout: str) -> int:
        nonlocal at
        marks.append(at)
        value: int = struct.unpack_from(layout, content, at)[0]
        at += struct.calcsize(layout)
        return value

    def text() -> bytes:
        nonlocal at
        length = number("<Q")
        at += length
        return content[at - length : at]

    def skip(kind: int) -> None:
        nonlocal at
        if kind == _STRING:
            text()
        elif kind == _ARRAY:
            inner, count = number("<I"), number("<Q")
            if inner != _STRING:
                at += count * _SIZES[inner]
                return
            outer, ends = len(marks), []
            for _ in range(count):
                text()
            ends = [marks[outer], marks[-1]] if count else []
            del marks[outer:]  # of a long list the first and the last will do
            marks.extend(ends)
        else:
            marks.append(at)
            at += _SIZES[kind]

    number("<I")
    tensor_count, entry_count = number("<Q"), number("<Q")
    entries: list[Entry] = []
    for _ in range(entry_count):
        key, kind, begin = text(), number("<I"), at
        skip(kind)
        entries.append(Entry(key, kind, content[begin:at]))
    tensors: list[Info] = []
    for _ in range(tensor_count):
        name = text()
        dims = tuple(number("<Q") for _ in range(number("<I")))
        tensors.append(Info(name, dims, number("<I"), number("<Q")))
    return Parts(entries, tensors, content[-(-at // 32) * 32 :], [*marks, at])


@dataclass(frozen=True)
class Case:
    """One corrupt file."""

    name: str
    content: bytes


def corpus(sound: bytes) -> Iterator[Case]:
    """Every kind of damage to every part of the file."""
    parts = taken_apart(sound)
    yield from _cut(sound, parts)
    yield from _overwritten(sound, parts)
    yield from _entries(parts)
    yield from _tensors(parts)
    yield from _retyped(parts)
    yield from _data(parts)


def combinations(sound: bytes, rng: random.Random) -> Iterator[Case]:
    """Without an end: some bytes of the header at once, or of the data."""
    header = len(sound) - len(taken_apart(sound).data)
    while True:
        content = bytearray(sound)
        places = [rng.randrange(4, rng.choice([400, header, len(sound)])) for _ in range(rng.randint(1, 6))]
        for place in places:
            content[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        yield Case(f"bytes {places}", bytes(content))


def _cut(sound: bytes, parts: Parts) -> Iterator[Case]:
    data = len(sound) - len(parts.data)
    for place in sorted({0, 3, *parts.marks, *(data + info.offset for info in parts.tensors)}):
        for cut in (place, place + 1):
            yield Case(f"cut at {cut}", sound[:cut])
    yield Case("cut by one byte", sound[:-1])
    yield Case("longer", sound + bytes(4096))


def _overwritten(sound: bytes, parts: Parts) -> Iterator[Case]:
    for mark in parts.marks[:-1]:
        for value in (*NUMBERS, *LONG_NUMBERS):
            layout = "<I" if value < 1 << 32 and value in NUMBERS else "<Q"
            content = bytearray(sound)
            struct.pack_into(layout, content, mark, value)
            if content != sound:
                yield Case(f"{value} at {mark}", bytes(content))


def _entries(parts: Parts) -> Iterator[Case]:
    for at, entry in enumerate(parts.entries):
        key = entry.key.decode()
        before, after = parts.entries[:at], parts.entries[at + 1 :]

        def with_these(entries: Sequence[Entry], what: str) -> Case:
            return Case(f"{key}: {what}", replace(parts, entries=[*before, *entries, *after]).written())  # noqa: B023

        yield with_these([], "absent")
        yield with_these([entry, entry], "twice")
        yield with_these([replace(entry, key=b"")], "without a key")
        yield with_these([replace(entry, key=b"\xff\xfe\0" + entry.key)], "key not UTF-8")
        yield with_these([replace(entry, key=entry.key * 60)], "long key")
        for what, kind, raw in _values():
            yield with_these([Entry(entry.key, kind, raw)], what)
        if entry.kind == _ARRAY:
            inner, count = struct.unpack_from("<IQ", entry.raw)
            items = _items(inner, entry.raw[12:], count)
            lists = {
                "one fewer": items[:-1],
                "one more": [*items, items[-1]],
                "none": [],
                "all alike": [items[0]] * count,
                "backwards": items[::-1],
                "one strange": [*items[: count // 2], _strange(inner, items[0]), *items[count // 2 + 1 :]],
                "all strange": [_strange(inner, items[0])] * count,
            }
            for what, changed in lists.items():
                raw = struct.pack("<IQ", inner, len(changed)) + b"".join(changed)
                yield with_these([Entry(entry.key, _ARRAY, raw)], what)


def _values() -> Iterator[tuple[str, int, bytes]]:
    """Values of every type: (name, type, as in the file)."""
    for number in NUMBERS:
        yield f"uint32 {number}", 4, struct.pack("<I", number)
    for signed in (-1, -(1 << 31), 3, 5, 1 << 20):
        yield f"int32 {signed}", 5, struct.pack("<i", signed)
    for value in (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e30, 1e-30):
        yield f"float32 {value}", 6, struct.pack("<f", value)
    for long in LONG_NUMBERS:
        yield f"uint64 {long}", 10, struct.pack("<Q", long)
    yield "int64 -1", 11, struct.pack("<q", -1)
    yield "float64 nan", 12, struct.pack("<d", float("nan"))
    yield "true", 7, b"\1"
    yield "a bool of 2", 7, b"\2"
    for words in (b"", b"x", b"llama", b"gpt2", b"\xff\xfe", b"a\0b", b"{{ x" * 5000, b"%s%n%x"):
        yield f"text {words[:8]!r}", _STRING, _text(words)
    yield "a list of none", _ARRAY, struct.pack("<IQ", 4, 0)
    yield "a list of 3", _ARRAY, struct.pack("<IQ3I", 4, 3, 1, 2, 3)
    yield "a list of texts", _ARRAY, struct.pack("<IQ", _STRING, 2) + _text(b"\xc3") + _text(b"")
    yield "a list of lists", _ARRAY, struct.pack("<IQIQ", _ARRAY, 1, 4, 0)
    yield "an unknown type", 99, b"\0" * 8


def _items(inner: int, raw: bytes, count: int) -> list[bytes]:
    if inner != _STRING:
        size = _SIZES[inner]
        return [raw[at : at + size] for at in range(0, count * size, size)]
    found: list[bytes] = []
    at = 0
    for _ in range(count):
        end = at + 8 + struct.unpack_from("<Q", raw, at)[0]
        found.append(raw[at:end])
        at = end
    return found


def _strange(inner: int, item: bytes) -> bytes:
    """A text that is not UTF-8; NaN; -1."""
    return _text(b"\xf0\x80\xff \0") if inner == _STRING else b"\xff" * len(item)


def _tensors(parts: Parts) -> Iterator[Case]:
    for at, info in enumerate(parts.tensors):
        name = info.name.decode()
        before, after = parts.tensors[:at], parts.tensors[at + 1 :]
        other = parts.tensors[(at + 1) % len(parts.tensors)]

        def with_these(tensors: Sequence[Info], what: str) -> Case:
            return Case(f"{name}: {what}", replace(parts, tensors=[*before, *tensors, *after]).written())  # noqa: B023

        yield with_these([], "absent")
        yield with_these([info, info], "twice")
        for label, changed in (("no name", b""), ("not UTF-8", b"\xff\0"), ("long", b"n" * 64), ("strange", b"x")):
            yield with_these([replace(info, name=changed)], label)
        yield with_these([replace(info, name=other.name)], "another's name")
        yield with_these([replace(info, offset=other.offset, dims=other.dims, kind=other.kind)], "another's data")
        for kind in (*range(43), 99, (1 << 32) - 1):
            if kind != info.kind:
                yield with_these([replace(info, kind=kind)], f"type {kind}")
        for offset in (0, 1, 32, info.offset + 1, info.offset + 32, len(parts.data), (1 << 63) + 32, (1 << 64) - 32):
            if offset != info.offset:
                yield with_these([replace(info, offset=offset)], f"offset {offset}")
        shapes = [(), info.dims[::-1], (*info.dims, 1), (*info.dims, 1, 1, 1, 1), (0,) * len(info.dims), (1,), (32,)]
        for place, size in enumerate(info.dims):
            for new in (0, 1, size // 2, size - 32, size + 32, size * 2, 1 << 31, 1 << 32, 1 << 62, (1 << 64) - 1):
                shapes.append((*info.dims[:place], max(new, 0), *info.dims[place + 1 :]))
        for shape in shapes:
            if shape != info.dims:
                yield with_these([replace(info, dims=shape)], f"shape {shape}")


def _retyped(parts: Parts) -> Iterator[Case]:
    """Tensors of another type, with zeros, the others moved: nothing is wrong but the type."""
    sizes = {kind.value: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    ends = [info.offset for info in parts.tensors[1:]] + [len(parts.data)]
    pieces = [parts.data[info.offset : end] for info, end in zip(parts.tensors, ends, strict=True)]
    for at, info in enumerate(parts.tensors):
        for kind, (block, block_bytes) in sizes.items():
            if kind == info.kind or info.dims[0] % block:
                continue
            content = bytes(int(np.prod(info.dims)) // block * block_bytes)
            changed = [*pieces[:at], content + b"\0" * (-len(content) % 32), *pieces[at + 1 :]]
            offsets = np.cumsum([0, *(len(piece) for piece in changed)]).tolist()
            moved = [replace(each, offset=offset) for each, offset in zip(parts.tensors, offsets, strict=False)]
            moved[at] = replace(moved[at], kind=kind)
            whole = replace(parts, tensors=moved, data=b"".join(changed))
            yield Case(f"{info.name.decode()}: made type {kind}", whole.written())


def _data(parts: Parts) -> Iterator[Case]:
    """Numbers that are none: scales of blocks (a half-precision number in front of each 34 bytes), or all bytes."""
    ends = [info.offset for info in parts.tensors[1:]] + [len(parts.data)]
    for info, end in zip(parts.tensors, ends, strict=True):
        name = info.name.decode()
        whole = {"all ones": b"\xff", "all zero": b"\0", "infinite": b"\x00\x7c"}
        for what, pattern in whole.items():
            size = end - info.offset
            yield Case(f"{name}: {what}", _filled(parts, info.offset, (pattern * size)[:size]))
        if info.kind == 8:
            for what, scale in {"nan": 0x7E00, "infinite": 0x7C00, "negative": 0x9C00}.items():
                changed = bytearray(parts.data[info.offset : end])
                for at in range(0, len(changed) // 34 * 34, 34 * 5):
                    struct.pack_into("<H", changed, at, scale)
                yield Case(f"{name}: {what} scales", _filled(parts, info.offset, bytes(changed)))


def _filled(parts: Parts, offset: int, content: bytes) -> bytes:
    return replace(parts, data=parts.data[:offset] + content + parts.data[offset + len(content) :]).written()


def _text(words: bytes) -> bytes:
    return struct.pack("<Q", len(words)) + words


# Running them.


@dataclass(frozen=True)
class Outcome:
    """What became of a file."""

    case: str
    kind: str
    """works, refused, or what must not be: unclear, signal, hang, memory"""
    told: str
    peak_mib: int

    @property
    def wrong(self) -> bool:
        return self.kind not in ("works", "refused")


class Loader:
    """A process that has loaded nothing but code, and forks for each file."""

    def __enter__(self) -> Loader:
        command = [sys.executable, str(Path(__file__).with_name("corrupt_child.py")), str(CASE_S), str(MEMORY)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(CASE_S)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def load(self, case: str, path: Path) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        kind, told, peak_mib = json.loads(self._process.stdout.readline())
        return Outcome(case, kind, told, peak_mib)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, metavar="N", help="only so many, drawn at random")
    parser.add_argument("--combinations", type=int, default=500, metavar="N", help="of random bytes (default 500)")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose name has these words")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the files that something is wrong with here")
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    counts: Counter[str] = Counter()
    peak = 0
    with tempfile.TemporaryDirectory(prefix="corrupt-gguf-") as scratch, Loader() as loader:
        sound = small_model(Path(scratch) / "sound.gguf").read_bytes()
        cases = list(corpus(sound))
        mixed = combinations(sound, rng)
        cases += [next(mixed) for _ in range(options.combinations)]
        cases = [case for case in cases if options.only in case.name]
        if options.limit is not None:
            cases = rng.sample(cases, min(options.limit, len(cases)))
        path = Path(scratch) / "case.gguf"
        for number, case in enumerate(cases):
            path.write_bytes(case.content)
            outcome = loader.load(case.name, path)
            counts[outcome.kind] += 1
            peak = max(peak, outcome.peak_mib)
            if outcome.wrong:
                print(f"{outcome.kind}: {case.name}: {outcome.told}", flush=True)
                if options.keep:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    (options.keep / f"{number}.gguf").write_bytes(case.content)
            if number % 200 == 199:
                print(f"{number + 1} of {len(cases)}: {dict(counts)}, peak {peak} MiB", file=sys.stderr, flush=True)
    print(f"{len(cases)} files: {dict(counts)}, peak {peak} MiB of a process")
    return 1 if counts.total() > counts["works"] + counts["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
