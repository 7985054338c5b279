"""Make programs that were built for a newer glibc load on this machine's: `relink.py PROGRAM...`.

Rewrites x86-64 ELF files in place, and only where it is safe: the symbols too new for this glibc must be the C23 twins
(`__isoc23_strtol`) of old ones (`strtol`). Each is renamed by moving its name's offset past the prefix, and the version
it asks for becomes GLIBC_2.2.5. Anything else is an error that names the symbol. A program that loads already is left alone.
"""

import platform
import struct
import sys
from pathlib import Path

_PREFIX = b"__isoc23_"
_BASE_VERSION = b"GLIBC_2.2.5"


def relink(program: Path) -> list[str]:
    """Rewrite one program; return the names of the symbols that were changed."""
    elf = bytearray(program.read_bytes())
    if elf[:6] != b"\x7fELF\x02\x01":
        raise SystemExit(f"relink: {program} is not a 64-bit little-endian ELF file")
    sections = _sections(elf)
    strings = sections[".dynstr"][0]
    versions = _needed_versions(elf, sections[".gnu.version_r"][0], strings)
    too_new = {index for index, (_, name) in versions.items() if _is_newer(name)}
    base = [at for at, name in versions.values() if name == _BASE_VERSION]
    if not too_new:
        return []
    if not base:
        raise SystemExit(f"relink: {program} needs a newer glibc and has no {_BASE_VERSION.decode()} entry to borrow")

    symbols_at, symbols_size = sections[".dynsym"]
    versions_of_symbols = sections[".gnu.version"][0]
    changed = []
    for i in range(symbols_size // 24):
        (version,) = struct.unpack_from("<H", elf, versions_of_symbols + 2 * i)
        if version & 0x7FFF not in too_new:
            continue
        (name_at,) = struct.unpack_from("<I", elf, symbols_at + 24 * i)
        name = _string(elf, strings + name_at)
        if not name.startswith(_PREFIX):
            wanted = versions[version & 0x7FFF][1].decode()
            raise SystemExit(f"relink: {program} needs {name.decode()} of {wanted}, which has no older twin")
        struct.pack_into("<I", elf, symbols_at + 24 * i, name_at + len(_PREFIX))
        changed.append(name.decode())
    for index in too_new:
        entry = versions[index][0]
        elf[entry : entry + 4] = elf[base[0] : base[0] + 4]  # vna_hash
        elf[entry + 8 : entry + 12] = elf[base[0] + 8 : base[0] + 12]  # vna_name

    mode = program.stat().st_mode
    partial = program.with_suffix(".relinked")
    partial.write_bytes(elf)
    partial.chmod(mode)
    partial.replace(program)
    return changed


def _sections(elf: bytearray) -> dict[str, tuple[int, int]]:
    """Section name → (file offset, size)."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    rows = [struct.unpack_from("<IIQQQQ", elf, table + entry_size * i) for i in range(count)]
    names_at = rows[names_index][4]
    return {_string(elf, names_at + row[0]).decode(): (row[4], row[5]) for row in rows}


def _needed_versions(elf: bytearray, at: int, strings: int) -> dict[int, tuple[int, bytes]]:
    """Version index → (offset of its Elf64_Vernaux, version name), over every library needed."""
    found = {}
    while True:
        _, count, _, first_aux, next_need = struct.unpack_from("<HHIII", elf, at)
        aux = at + first_aux
        for _ in range(count):
            _, _, index, name_at, next_aux = struct.unpack_from("<IHHII", elf, aux)
            found[index] = (aux, _string(elf, strings + name_at))
            aux += next_aux
        if not next_need:
            return found
        at += next_need


def _is_newer(version: bytes) -> bool:
    """Whether a symbol version (`GLIBC_2.38`) is newer than this machine's glibc."""
    family, _, number = version.decode().partition("_")
    return family == "GLIBC" and number[:1].isdigit() and _numbers(number) > _numbers(platform.libc_ver()[1])


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _string(elf: bytearray, at: int) -> bytes:
    return bytes(elf[at : elf.index(0, at)])


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{argument}: {' '.join(relink(Path(argument))) or 'loads as it is'}")
