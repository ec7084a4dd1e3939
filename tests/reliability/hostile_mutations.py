"""Ways to spoil a file: any file byte by byte, and JSON, YAML, pickles, archives, safetensors and PNG by their parts.

A mutation takes a good file, a seeded random generator and JSON values that hypothesis has drawn, and returns bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence

from hypothesis import strategies as st

Values = Sequence[object]
Mutation = Callable[[bytes, random.Random, Values], bytes]

MARKER = "executed"  # what a hostile file would make in the working folder if any of it ran
SECRET = "secret"  # the start of the names of files outside of a case's folder, which no reader may open
LONG = "x" * 5000

EXTREMES = [
    *(0, -1, 1, 2**31, -(2**31), 2**32, 2**53, 2**60, 2**63, -(2**63), 2**64, 10**30, 10**400),
    *(0.0, -0.0, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan"), 0.1),
    *(True, False, None, "", " ", "\0", "\n", "\x1b[2J", "\ud800", "\udc80", "𝟘", LONG, "..", "/", "~", "%s{0}"),
    *(f"../{SECRET}.png", f"../../{SECRET}.json", "/etc/passwd", "a\0b", "x" * 300 + ".png", "${run.seed}", "???"),
    *([], {}, [[]], [[[]]], [None], [1, [2]], {"": ""}, {"a": {"b": {}}}, [[1e308, 1e308]], ["\ud800"]),
]
DEEP = 40_000  # levels of nesting, far beyond what an interpreter's stack holds

# Texts may hold half characters, as JSON can write them; numbers have no limit.
TEXTS = st.text(st.characters(), max_size=20)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.sampled_from(EXTREMES)
JSON_VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=6
)
DRAWN = st.lists(JSON_VALUES, min_size=1, max_size=3)

INTERESTING = [b"\0", b"\xff", b"\x7f", b"\x80", b"\0" * 8, b"\xff" * 8, b"\n", b'"', b"{", b"[", b"\xed\xa0\x80"]
NUMBERS = [b"0", b"-1", b"9" * 30, b"9" * 5000, b"1e999", b"-1e999", b"NaN", b"Infinity", b"4294967296", b"1.5", b"007"]


def mutate_bytes(data: bytes, rng: random.Random, values: Values, words: Sequence[bytes] = ()) -> bytes:
    """One to four changes at random places; `words` are of the format."""
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        place = rng.randrange(len(result) + 1)
        match rng.randrange(10):
            case 0 if place < len(result):
                result[place] ^= 1 << rng.randrange(8)
            case 1 if place < len(result):
                result[place] = rng.randrange(256)
            case 2:
                del result[place : place + rng.randint(1, 16)]
            case 3:
                result[place:place] = rng.choice([*INTERESTING, *words])
            case 4:
                result[place : place + rng.randint(0, 8)] = rng.randbytes(rng.randint(1, 8))
            case 5:  # a part again, somewhere else
                part = result[place : place + rng.randint(1, 64)]
                result[rng.randrange(len(result) + 1) :][:0] = part
                result[place:place] = part * rng.choice([1, 1, 2, 100])
            case 6 if place:
                del result[place:]
            case 7:
                result[place : place + 4] = struct.pack(rng.choice("<>") + "I", rng.choice([0, 1, 2**31, 2**32 - 1]))
            case 8:
                result[place : place + 8] = struct.pack(rng.choice("<>") + "Q", rng.choice([2**60, 2**63, 2**40, 7]))
            case 9:
                numbers = list(re.finditer(rb"-?[0-9]+(?:\.[0-9]+)?", bytes(result[:20_000])))
                if numbers:
                    found = rng.choice(numbers)
                    result[found.start() : found.end()] = rng.choice(NUMBERS)
    return bytes(result)


def random_bytes(data: bytes, rng: random.Random, values: Values) -> bytes:
    """Nothing of the file, or its first bytes and then noise."""
    return data[: rng.choice([0, 0, 2, 8, 64])] + rng.randbytes(rng.choice([0, 1, 10, 100, 2000]))


def _paths(value: object, path: tuple = ()) -> list[tuple]:
    found = [path]
    children = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    for key, child in children:
        found += _paths(child, (*path, key))
    return found


def change_value(content: object, rng: random.Random, values: Values) -> object:
    """A copy of the JSON value `content` with some parts replaced, removed, renamed or repeated."""
    content = json.loads(json.dumps(content))
    for value in values[: rng.choice([1, 1, 1, 2, 3])]:
        path = rng.choice(_paths(content))
        if not path:
            if rng.random() < 0.1:
                content = value
            continue
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        key = path[-1]
        new = rng.choice(EXTREMES) if rng.random() < 0.3 else value
        match rng.randrange(8):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[new if isinstance(new, str) else rng.choice(["", "x", "seed", "file"])] = parent[key]
            case 2 if isinstance(parent, list):
                parent[key:key] = [new] * rng.choice([1, 1, 3, 70])
            case 3:
                parent[key] = [parent[key]]
            case _:
                parent[key] = new
        # What hypothesis drew is shared; the next change must not reach into it.
        with contextlib.suppress(ValueError):
            content = json.loads(json.dumps(content))
    return content


def to_json(content: object, rng: random.Random) -> str:
    """As text; now and then with nesting without end in place of a value, or with a key twice."""
    try:
        text = json.dumps(content, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.8)
    except ValueError:  # a number of more digits than Python writes
        text = "1" * 5000
    if rng.random() < 0.03:
        opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
        levels = rng.choice([100, 450, 700, 1000, DEEP])
        deep = opening * levels + "1" + closing * (levels if rng.random() < 0.8 else 0)
        numbers = list(re.finditer(r"(?<=: )[^,\[\]{}\n]+", text)) or list(re.finditer(r"[0-9]+", text))
        if numbers:
            found = rng.choice(numbers)
            text = text[: found.start()] + deep + text[found.end() :]
    if rng.random() < 0.03:
        pairs = re.findall(r'"[a-zA-Z_]+": [^,\[\]{}\n]+', text)
        if pairs:
            text = text.replace(rng.choice(pairs), f"{rng.choice(pairs)}, {rng.choice(pairs)}", 1)
    return text


def encode(text: str, rng: random.Random) -> bytes:
    """UTF-8, half characters kept; seldom another encoding."""
    if rng.random() < 0.02:
        return text.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]), "surrogatepass")
    return text.encode("utf-8", "surrogatepass")


def mutate_json(data: bytes, rng: random.Random, values: Values) -> bytes:
    """A file that is one JSON value."""
    return encode(to_json(change_value(json.loads(data), rng, values), rng), rng)


def mutate_json_lines(data: bytes, rng: random.Random, values: Values) -> bytes:
    """A file of one JSON object a line."""
    lines = data.decode().splitlines()
    for index in rng.sample(range(len(lines)), min(len(lines), rng.randint(1, 2))):
        lines[index] = to_json(change_value(json.loads(lines[index]), rng, values), rng).replace("\n", " ")
    if rng.random() < 0.1:
        lines[rng.randrange(len(lines)) :][:0] = [rng.choice(lines)]
    if rng.random() < 0.2:
        lines += [rng.choice(lines)]
    return encode("\n".join(lines), rng)


# --- Pickles and torch's archives. ---


def text_opcode(text: str) -> bytes:
    """The pickle of a text."""
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def call_opcodes(module: str, name: str, *arguments: bytes) -> bytes:
    """The pickle of a call; the arguments are pickles without their ends."""
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def number_opcode(value: int) -> bytes:
    """The pickle of a whole number."""
    return pickle.dumps(value, 2)[2:-1]


def calls(lines: str) -> list[bytes]:
    """Pickles of calls, a line each: the function, then its arguments, which are numbers or else texts."""
    made = []
    for line in lines.strip().splitlines():
        name, *words = line.split()
        arguments = [number_opcode(int(word)) if word.isdecimal() else text_opcode(word) for word in words]
        made.append(call_opcodes(*name.split(":"), *arguments))
    return made


CALLS = calls(f"""
    os:system >{MARKER}
    posix:system >{MARKER}
    os:mkdir {MARKER}
    builtins:eval open('{MARKER}','w').close()
    builtins:exec open('{MARKER}','w').close()
    __builtin__:eval open('{MARKER}','w').close()
    builtins:open {MARKER} w
    builtins:getattr x upper
    builtins:bytearray {2**31}
    builtins:bytearray {2**60}
    builtins:complex x
    builtins:set 3
    torch:Tensor {2**29}
    torch:Tensor {2**60}
    torch:load ../{SECRET}.pt
    torch:device cuda:99
    torch:Size x
    torch.storage:UntypedStorage {2**31}
    torch.storage:_load_from_bytes x
    torch.hub:load owner/name model
    torch._utils:_rebuild_tensor_v2 x
    torch._utils:_rebuild_sparse_tensor x x
    torch._tensor:_rebuild_from_type_v2 x x x x
    _codecs:encode x punycode
    collections:OrderedDict 1
    collections:Counter aab
    numpy.core.multiarray:_reconstruct x
    training.networks:EPD_predictor
""")
META = call_opcodes("torch._utils", "_rebuild_meta_tensor_no_storage", b"ctorch\nfloat32\n", b"K\x02\x85K\x01\x85\x89")
OPCODES = [
    *b"R b Q ( u 0 2 s a e t . N } ] \x81 h\0 q\0 \x8a\xff \x82\x01 K\x05Q X\xff\xff\xff\xff j\xff\xff\xff\xff".split(),
    *(b"P0\n", b"I1\n", b"F1\n", b"\x85" * 99, b"ctorch\nTensor\n)\x81", b"ctorch\nFloatStorage\n"),
    *(b"ctorch\nfloat32\n", b"ccollections\nOrderedDict\n)R", META),
]


def mutate_pickle(data: bytes, rng: random.Random, values: Values) -> bytes:
    """A pickle with changed opcodes, or with a call in place of one of its values."""
    if rng.random() < 0.5:
        return mutate_bytes(data, rng, values, [*OPCODES, *CALLS])
    result = bytearray(data)
    places = [found.start() for found in re.finditer(rb"[K\x88\x89NXMJGc}]", data)]
    place = rng.choice(places)
    # In place of a constant of one byte the rest stays as it was.
    width = {ord("K"): 2, ord("M"): 3, ord("J"): 5, ord("G"): 9, 0x88: 1, 0x89: 1, ord("N"): 1}.get(data[place], 0)
    new = rng.choice([*CALLS, *OPCODES, number_opcode(rng.choice([0, -1, 2**31, 2**40, 2**62, 2**200]))])
    result[place : place + width] = new
    return bytes(result)


def write_members(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of these members."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def mutate_archive(data: bytes, rng: random.Random, values: Values) -> bytes:
    """A file of `torch.save`: its checksums fit what has changed, as whoever means harm would see to."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    name = rng.choice(list(members))
    match rng.randrange(8):
        case 0:
            del members[name]
        case 1:
            names = [f"../{MARKER}", f"/{MARKER}", name + "x", f"x/{pickled}", "", "a/b", LONG]
            members[rng.choice(names)] = members[name]
        case 2:
            members[name] = mutate_bytes(members[name], rng, values)
        case 3:
            other = rng.choice(["constants.pkl", ".format_version", "byteorder", "data/9"])
            text = rng.choice([b"", b"big", b"little", b"9" * 50, members[pickled]])
            members[f"{pickled.rpartition('/')[0]}/{other}"] = text
        case 4:
            members[name] *= rng.choice([0, 2, 50])
        case _:
            members[pickled] = mutate_pickle(members[pickled], rng, values)
    result = write_members(members, zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED)
    if rng.random() < 0.2:  # a directory that lies
        place = result.rindex(b"PK\x01\x02") + rng.choice([8, 10, 16, 20, 24, 28, 30, 32, 42])
        lie = struct.pack("<I", rng.choice([0, 1, 8, 2**16 - 1, 2**31 - 1, 2**32 - 1]))
        result = result[:place] + lie + result[place + 4 :]
    return result


def mutate_torch(data: bytes, rng: random.Random, values: Values) -> bytes:
    """An archive, or the format before it: pickles in a row, then numbers."""
    return (mutate_archive if data.startswith(b"PK") else mutate_pickle)(data, rng, values)


# --- safetensors. ---

DTYPES = [
    *("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "C64"),
    *("F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "U16", "x"),
]


def split_safetensors(data: bytes) -> tuple[dict, bytes]:
    """Header and numbers."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join_safetensors(header: object, numbers: bytes, rng: random.Random) -> bytes:
    """A file with a header of the right length."""
    text = encode(header if isinstance(header, str) else to_json(header, rng), rng)
    return struct.pack("<Q", len(text)) + text + numbers


def mutate_safetensors(data: bytes, rng: random.Random, values: Values) -> bytes:
    """A header that lies: of its length, or of types, shapes and offsets; or numbers that are none."""
    header, numbers = split_safetensors(data)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry = dict(header[name])
    match rng.randrange(10):
        case 0:
            length = rng.choice([0, 1, 7, len(data), len(data) - 8, 2**31, 2**60, 2**63, 2**64 - 1, 100_000_001])
            return struct.pack("<Q", length) + data[8:]
        case 1:
            entry["dtype"] = rng.choice(DTYPES)
        case 2:
            shapes = [[], [0], [-1], [2**60], [2**32, 2**32], [1] * 100, [0, 2**62], entry["shape"][::-1], [1.5], None]
            entry["shape"] = rng.choice(shapes)
        case 3:
            start, end = entry["data_offsets"]
            pairs = [[end, start], [start, end + 8], [start + 1, end + 1], [0, 2**60], [0, 0], [-1, 5], [start], None]
            entry["data_offsets"] = rng.choice(pairs)
        case 4:
            numbers = mutate_bytes(numbers, rng, values)
        case 5:
            return join_safetensors(change_value(header, rng, values), numbers, rng)
        case 6:
            others = [None, {}, [], "x", {"a": 1}, {"table": None}, {"format": "tf"}, *values]
            header["__metadata__"] = rng.choice(others)
        case 7:
            header[rng.choice(["\ud800", "", LONG, "../x", "a\nb", "__metadata__", "positions", *names])] = entry
        case 8:
            del header[name]
        case 9:
            start, end = entry["data_offsets"]
            alike = {"F64": "I64 C64 U64", "F32": "I32 U32", "F16": "BF16", "U8": "F8_E4M3 F8_E8M0 BOOL"}
            if rng.random() < 0.5:
                entry["dtype"] = rng.choice(alike.get(entry["dtype"], "I8").split())
            else:
                entry["dtype"], entry["shape"] = rng.choice([("F4", [2 * (end - start)]), ("F8_E5M2", [end - start])])
    if name in header:
        header[name] = entry
    return join_safetensors(header, numbers, rng)


# --- YAML. ---

YAML_WORDS = [
    *b"- |: |? |? [a]\n: b|? {a: b}\n: c|---\n|...\n|%YAML 9.9\n|&a |*a|<<: *a|<<: x|<<: [a]|run:|ppo:".split(b"|"),
    *b"!!python/object/apply:os.system ['touch executed']|!!python/object/new:os.mkdir [executed]".split(b"|"),
    *b"!!python/name:os.system|!!int x|!!int ''|!!float x|!!bool x|!!timestamp 2024-99-99|!!timestamp x".split(b"|"),
    *b"!!binary '=='|!!null x|!!set {a}|!!omap [a]|!!pairs [a]|!!str [a]|!!seq {a: b}|!!map [a]|!x y|! x".split(b"|"),
    *b"${run.seed} ${oc.env:HOME} ${ } ${a:b} ${oc.select:run} ${run} ${.run_name} ${..x} ${run}${run.seed}".split(),
    *b"??? 1:2:3 0x 0b 0o9 1_000 .inf .nan -.inf 1.0e999 2024-01-01 yes off null = ~ ' \" > #".split(),
    *(b"|", b"\t", b"\r", b"\x85", b"\xe2\x80\xa8", b'"\\uD800"', b'"\\x00"'),
    *(b"9" * 5000, b"[" * 2000, b"{a: " * 2000, b"- " * 2000),
]


def mutate_yaml(data: bytes, rng: random.Random, values: Values) -> bytes:
    """A configuration; JSON is YAML too, and so is nearly everything."""
    import yaml

    if rng.random() < 0.5:
        return mutate_bytes(data, rng, values, YAML_WORDS)
    content = change_value(yaml.safe_load(data), rng, values)
    if rng.random() < 0.5:
        with contextlib.suppress(ValueError, yaml.YAMLError):
            return encode(yaml.safe_dump(content, allow_unicode=rng.random() < 0.5), rng)
    return encode(to_json(content, rng), rng)


# --- PNG. ---

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHUNKS = b"tEXt zTXt iTXt iCCP gAMA cHRM sRGB pHYs tIME eXIf PLTE tRNS acTL fcTL fdAT bKGD CgBI abcd ABCD".split()
CHUNKS += [b"IHDR", b"IDAT", b"IEND", b"\0\0\0\0"]


def split_png(data: bytes) -> list[tuple[bytes, bytes]]:
    """Type and content of every chunk."""
    chunks, place = [], len(SIGNATURE)
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks


def join_png(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A PNG with checksums that fit."""
    parts = [struct.pack(">I", len(content)) + kind + content for kind, content in chunks]
    return SIGNATURE + b"".join(part + struct.pack(">I", zlib.crc32(part[4:])) for part in parts)


def mutate_png(data: bytes, rng: random.Random, values: Values) -> bytes:
    """Chunks changed, added, removed, repeated, in another order, or with other pixels behind the same header."""
    if not data.startswith(SIGNATURE):
        return mutate_bytes(data, rng, values)
    chunks = split_png(data)
    index = rng.randrange(len(chunks))
    kind, content = chunks[index]
    match rng.randrange(8):
        case 0:
            header = list(struct.unpack(">IIBBBBB", chunks[0][1]))
            sizes = [0, 1, 2, 8, 16, 5000, 10_000, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
            field = rng.randrange(7)
            header[field] = rng.choice(sizes) if field < 2 else rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 255])
            chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", *header))
        case 1:
            chunks[index] = (kind, mutate_bytes(content, rng, values))
        case 2:
            chunks[index] = (rng.choice(CHUNKS), content)
        case 3:
            bombs = [zlib.compress(bytes(200_000)), b"a\0\0" + zlib.compress(b"b" * 99)]
            extra = rng.choice([rng.randbytes(rng.choice([0, 1, 4, 8, 26, 32])), *bombs])
            chunks[index:index] = [(rng.choice(CHUNKS), extra)] * rng.choice([1, 1, 2, 20])
        case 4:
            del chunks[index]
        case 5:
            chunks.append(chunks.pop(index))
        case 6:
            pixels = rng.choice([b"", bytes(10), bytes(1_000_000), rng.randbytes(3000), bytes([7]) * 3000])
            chunks = [(kind, zlib.compress(pixels) if kind == b"IDAT" else content) for kind, content in chunks]
        case 7:
            chunks *= 2
    return join_png(chunks)
