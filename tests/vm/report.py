"""Writes docs/machines.md: what was tried on which machine, and what holds there.

usage: report.py SCENARIOS RESULTS OUTPUT

SCENARIOS is the table of scripts/vm. RESULTS has a line for each check that holds: the scenario, the kernel and what was
checked, separated by tabs. A scenario that has no results gets no row.
"""

import sys

scenarios, results, output = sys.argv[1:]

HEAD = """# Machines

`scripts/vm --all` writes this page. It boots virtual machines (QEMU without KVM) with Debian's kernels and runs the
scenarios of `tests/vm` in them. A row is there only if it was run.
"""
NUMBERING = {
    "qemu": "siblings are neighbours",
    "split": "siblings are n and n + N/2",
    "alternate": "siblings are n and n + N/2, sockets alternate",
}


def machine(words):
    sockets, cores, threads, nodes, numbering, *line = words
    count = int(sockets) * int(cores) * int(threads)
    parts = [f"{count} CPUs: {sockets} × {cores} × {threads} (sockets, cores, threads)", f"{nodes} NUMA nodes"]
    if threads != "1":
        parts.append(NUMBERING[numbering])
    if line:
        parts.append(f"`{' '.join(line)}`")
    return ", ".join(parts).replace(", 1 NUMA nodes", "")


seen = {}
for row in open(results):
    name, kernel, what = row.rstrip("\n").split("\t")
    # The machines run at the same time, so the rows have no order.
    seen.setdefault(name, {}).setdefault(what, set()).add(kernel)

def linux(kernels):
    return ", ".join(sorted(kernels, key=lambda kernel: [int(n) for n in kernel.split("+")[0].split(".")]))


text = [HEAD]
command_lines = []
for row in open(scenarios):
    words = row.split()
    if not words or words[0].startswith("#") or words[0] not in seen:
        continue
    name, _, _, script, *shape = words
    if script == "isolcpus.sh":
        line = " ".join(word for word in shape[5:] if word != "kcm.corrected")
        command_lines.append((machine(shape[:5]), line, seen[name]))
        continue
    text.append(f"## {name}\n\n{machine(shape)}.\n")
    text.append("| what holds | Linux |\n| --- | --- |")
    for what, kernels in seen[name].items():
        text.append(f"| {what} | {linux(kernels)} |")
    text.append("")
if command_lines:
    text.append(f"## isolcpus\n\n{command_lines[0][0]}; one machine for each command line and kernel.\n")
    text.append("| command line | what holds | Linux |\n| --- | --- | --- |")
    for _, line, checks in command_lines:
        for what, kernels in checks.items():
            text.append(f"| `{line}` | {what} | {linux(kernels)} |")
    text.append("")
open(output, "w").write("\n".join(text))
