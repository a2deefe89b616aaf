# An incremental copy by libnbd's Python module: brings COPY, which is what the
# device held at snapshot NUM, up to the export of URI.
#
# usage: increment.py URI NUM COPY
import sys

import nbd

uri, num, copy = sys.argv[1:]
context = "qemu:dirty-bitmap:since-" + num
h = nbd.NBD()
h.add_meta_context(context)
h.connect_uri(uri)
if not h.can_meta_context(context):
    sys.exit("a full copy is due")
size = h.get_size()
dirty = []


def extents(metacontext, offset, entries, err):
    global end
    for n, flags in zip(entries[::2], entries[1::2]):
        if flags & 1:
            dirty.append((offset, min(n, size - offset)))
        offset += n
    end = offset


end = 0
while end < size:
    h.block_status(min(size - end, 1 << 30), end, extents)

with open(copy, "r+b") as out:
    for offset, n in dirty:
        for at in range(offset, offset + n, 32 << 20):
            out.seek(at)
            out.write(h.pread(min(32 << 20, offset + n - at), at))
print(*(f"{offset} {n}" for offset, n in dirty), sep="\n")
h.shutdown()
