#!/bin/sh
# Back up the disks of blksnap as qcow2 files: the first of a disk holds all of it,
# each later one what changed since the one before, its backing file.
#
# usage: backup.sh DIR                back up every disk to DIR/DEVICE@NUMBER.qcow2;
#                                     DIR/DEVICE.qcow2 is a link to the newest, and
#                                     without it the next one is a full one again
#        backup.sh DIR NAME TARGET    restore NAME, a DEVICE or DEVICE@NUMBER, over
#                                     TARGET: an NBD URI, or a raw image that exists
#
# $TREE is the path of the tree, /run/blksnap by default.
set -eu
tree=${TREE:-/run/blksnap} dir=${1:?usage: backup.sh DIR [NAME TARGET]}
if [ $# -eq 3 ]; then
    exec qemu-img convert -n -f qcow2 -O raw "$dir/$2.qcow2" "$3"
fi
cd "$dir"

snapshot=$tree/snapshots/backup-$(date -u +%Y%m%dT%H%M%SZ)-$$
mkdir "$snapshot"
for image in "$snapshot"/*.img; do
    device=$(basename "$image" .img)
    name=$device@$(cat "$snapshot/$device.cbt/number").qcow2
    # What changed since snapshot 7 is called vda@7.qcow2, as the backup of
    # snapshot 7 is. Where it does not exist that is not known any more.
    last=$(readlink "$device.qcow2" || true)
    if [ "$last" ] && [ -e "$snapshot/$last" ]; then
        cp "$snapshot/$last" "$name.part"
        qemu-img rebase -u -f qcow2 -F qcow2 -b "$last" "$name.part"
    else
        cp "$snapshot/$device.qcow2" "$name.part"
    fi
    qemu-img check -q -f qcow2 "$name.part"
    qemu-img compare -q -f qcow2 -F raw "$name.part" "$image"
    sync "$name.part"
    mv "$name.part" "$name"
    ln -sfn "$name" "$device.qcow2"
done
for old in "$tree"/snapshots/backup-*; do [ "$old" = "$snapshot" ] || rmdir "$old"; done
