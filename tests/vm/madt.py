"""Prints a memory disk with an ACPI table that gives the CPUs of a guest other numbers.

usage: madt.py SOCKETS CORES THREADS split|alternate

QEMU numbers the threads of a core one after the other. Real machines seldom do. Linux numbers CPUs in the order of the
MADT (ACPI specification, Multiple APIC Description Table), and takes a table from the memory disk if its revision is
higher than that of the firmware (CONFIG_ACPI_TABLE_UPGRADE).

split      the first threads of all cores, socket by socket, then the second ones: siblings are n and n + N/2
alternate  the same, but the sockets take turns: even CPUs on one socket, odd ones on the other
"""

import struct
import sys

sockets, cores, threads = map(int, sys.argv[1:4])
numbering = sys.argv[4]


def bits(count):
    return (count - 1).bit_length()


def apic_id(socket, core, thread):
    return socket << bits(cores) + bits(threads) | core << bits(threads) | thread


if numbering == "split":
    ids = [apic_id(s, c, t) for t in range(threads) for s in range(sockets) for c in range(cores)]
elif numbering == "alternate":
    ids = [apic_id(s, c, t) for t in range(threads) for c in range(cores) for s in range(sockets)]
else:
    sys.exit(f"{numbering}: no such numbering")

ENABLED = 1
entries = b"".join(struct.pack("<BBBBI", 0, 8, cpu, cpu, ENABLED) for cpu in ids)
# As QEMU's machine `pc` has them: the I/O APIC, the interrupts that are wired in another way, and the NMI.
entries += struct.pack("<BBBBII", 1, 12, 0, 0, 0xFEC00000, 0)
entries += struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0)
for irq in (5, 9, 10, 11):
    entries += struct.pack("<BBBBIH", 2, 10, 0, irq, irq, 0x0D)
entries += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)

PC_COMPATIBLE = 1
body = struct.pack("<II", 0xFEE00000, PC_COMPATIBLE) + entries
# Signature, length, revision, checksum, OEM, OEM's table and its revision (QEMU's is 1), creator and its revision.
header = struct.pack("<4sIBB6s8sI4sI", b"APIC", 36 + len(body), 3, 0, b"BOCHS ", b"BXPC    ", 2, b"BXPC", 1)
table = bytearray(header + body)
table[9] = -sum(table) & 0xFF


def entry(name, content, mode):
    """A file in a cpio archive (the format `newc`)."""
    name = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
    packed = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    packed += b"\0" * (-len(packed) % 4) + content
    return packed + b"\0" * (-len(packed) % 4)


archive = b"".join(entry(name, b"", 0o40755) for name in ("kernel", "kernel/firmware", "kernel/firmware/acpi"))
archive += entry("kernel/firmware/acpi/APIC.aml", bytes(table), 0o100644) + entry("TRAILER!!!", b"", 0)
sys.stdout.buffer.write(archive + b"\0" * (-len(archive) % 512))
