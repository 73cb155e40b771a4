"""What a cubin says of its kernels: launch bounds, and instructions that touch memory.

A cubin is an ELF file with the code of a kernel in `.text.KERNEL` and its attributes in
`.nv.info.KERNEL`. From sm_70 on an instruction has 16 bytes, its opcode in the lowest 12 bits and
the width of a global access in bits 73 to 75. A copy from global to shared memory has its width
elsewhere on sm_100, but on every architecture it bypasses L1 (bit 81 clear) just if it has 16
bytes. `nvdisasm -hex` shows the same.
"""

from __future__ import annotations

import struct

import numpy as np

_LOAD_GLOBAL, _STORE_GLOBAL, _COPY_TO_SHARED = 0x981, 0x986, 0xFAE
_LOAD_LOCAL, _STORE_LOCAL = 0x983, 0x387
_SIXTEEN_BYTES = 6
_MAX_THREADS = 0x05  # attribute: the launch bound


def sections(cubin: bytes) -> dict[str, bytes]:
    """Name -> contents of every section of an ELF64 file."""
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    table = headers[names][4]
    return {
        cubin[table + name : cubin.index(b"\0", table + name)].decode(): b""
        if kind == 8  # no contents in the file
        else cubin[start : start + length]
        for name, kind, _, _, start, length in headers
    }


def _attributes(info: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at + 4 <= len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:  # `value` is a length
            found[attribute] = info[at : at + value]
            at += value
    return found


def kernels(cubin: bytes) -> dict[str, dict[str, int]]:
    """Mangled name -> threads, and counts of memory instructions by kind."""
    parts, table = sections(cubin), {}
    for name, code in parts.items():
        info = parts.get(".nv.info." + name.removeprefix(".text."))
        if not name.startswith(".text.") or info is None:
            continue
        words = np.frombuffer(code, dtype=np.uint64).reshape(-1, 2)
        opcode = words[:, 0] & np.uint64(0xFFF)
        by_width = words[:, 1] >> np.uint64(9) & np.uint64(7) == _SIXTEEN_BYTES
        bypass = words[:, 1] >> np.uint64(17) & np.uint64(1) == 0
        wide = np.where(opcode == _COPY_TO_SHARED, bypass, by_width)

        loads = np.isin(opcode, (_LOAD_GLOBAL, _COPY_TO_SHARED))
        stores = opcode == _STORE_GLOBAL
        bound = _attributes(info).get(_MAX_THREADS)
        table[name.removeprefix(".text.")] = {
            "threads": struct.unpack("<III", bound)[0] if bound else 1024,
            "wide_loads": int((loads & wide).sum()),
            "loads": int(loads.sum()),
            "wide_stores": int((stores & wide).sum()),
            "stores": int(stores.sum()),
            "local": int(np.isin(opcode, (_LOAD_LOCAL, _STORE_LOCAL)).sum()),
        }
    return table
