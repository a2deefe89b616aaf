#!/usr/bin/env bash
# Show a whole backup, full and incremental, of a real file system in a disk
# image of its own, and prove that it is right. `make demo` runs this.
#
# usage: demo.sh BLKSNAP
#
# Commands are printed as the reader would type them, and then evaluated:
# shellcheck disable=SC2016
set -euo pipefail

blksnap=$(realpath "$1")
readme=$(dirname "$(realpath "$0")")/../README.md
dir=$(mktemp -d)
cd "$dir"
mkdir disk tree restored nbd
daemon='' nbdfuse='' loop=''
began=$(date +%s)

bold='' plain='' dim=''
if [[ -t 1 ]]; then bold=$'\e[1m' plain=$'\e[0m' dim=$'\e[2m'; fi

say() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }

# Print a command as the reader would type it, then run it.
run() {
    printf '  %s$ %s%s\n' "$dim" "$*" "$plain"
    eval "$*" 2>&1 | sed 's/^/    /'
}

# Wait until a condition holds; a minute is longer than any machine needs.
until_() {
    local deadline=$((SECONDS + 60))
    until eval "$1"; do
        ((SECONDS < deadline)) || { echo "demo: this did not become true: $1" >&2; exit 1; }
        sleep 0.05
    done
}

# Take away everything, in the order in which it stands on each other.
cleanup() {
    status=$?
    set +e
    cd /
    # A file system that is still frozen could not be unmounted.
    fsfreeze --unfreeze "$dir/disk" 2>/dev/null
    for point in restored disk; do
        mountpoint -q "$dir/$point" && umount "$dir/$point"
    done
    [[ -n $loop ]] && losetup --detach "$loop"
    if mountpoint -q "$dir/nbd"; then # nbdfuse ends when it is unmounted
        umount "$dir/nbd" || { umount --lazy "$dir/nbd"; kill "$nbdfuse"; }
    fi
    [[ -n $nbdfuse ]] && wait "$nbdfuse" 2>/dev/null
    [[ -n $daemon ]] && { kill "$daemon"; wait "$daemon"; } 2>/dev/null
    mountpoint -q "$dir/tree" && umount --lazy "$dir/tree"
    if ((status)); then
        echo "demo: failed; the daemon said:" >&2
        cat "$dir/log" >&2
    fi
    rm -rf --one-file-system "$dir"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

say "1. A disk: an image file, and blksnap in front of it"
run truncate -s 128M vda.img
echo "  $dim\$ blksnap serve --mount tree --run run --state state vda.img &$plain"
"$blksnap" serve --mount tree --run run --state state vda.img >ready 2>log &
daemon=$!
until_ 'grep -q ^ready ready || ! kill -0 $daemon'
sed 's/^/    /' ready
grep -q ^ready ready

say "2. The disk as a block device: here by FUSE and loop, which need no kernel module"
echo "  $dim"'$ nbdfuse nbd "nbd+unix:///vda?socket=$PWD/run/nbd.sock" &'"$plain"
nbdfuse nbd "nbd+unix:///vda?socket=$dir/run/nbd.sock" &
nbdfuse=$!
until_ '[[ -e nbd/nbd ]]'
loop=$(losetup --find --show --direct-io=on nbd/nbd)
echo "  $dim\$ losetup --find --show --direct-io=on nbd/nbd$plain"
echo "    $loop"
run mkfs.ext4 -q "$loop"
run mount "$loop" disk

say "3. Some work for it"
run 'mkdir disk/letters; for i in $(seq 200); do head -c 20000 /dev/urandom > disk/letters/$i; done'
run 'cp -r /usr/share/common-licenses disk/; (cd disk; find . -type f -exec sha256sum {} + | sort -k 2) > monday.sums'
run 'wc -l < monday.sums'

say "4. Monday's snapshot: mkdir takes it; the file system holds still meanwhile"
run 'fsfreeze --freeze disk; mkdir tree/snapshots/monday; fsfreeze --unfreeze disk'
run ls -l tree/snapshots/monday

say "5. Work goes on: files are overwritten, removed and made"
run 'for i in $(seq 1 50); do echo "not what it was" > disk/letters/$i; done; rm disk/letters/1[0-9][0-9]'
run 'head -c 5M /dev/urandom > disk/new; sync -f disk'

say "6. The full backup: the snapshot is a file, so cp copies it"
run cp tree/snapshots/monday/vda.img backup.img
run 'cat tree/snapshots/monday/vda.cbt/number > backup.img.number'
run du -h --apparent-size backup.img
run du -h backup.img

say "7. Is it right? On a second copy: the file system has no fault, and every file is as it was"
run cp --sparse=always backup.img check.img
run e2fsck -fn check.img
run mount -o loop,ro check.img restored
run '(cd restored; sha256sum --quiet -c ../monday.sums && echo every file is as it was on Monday)'
run umount restored

say "8. Tuesday's snapshot, and what changed since Monday's"
run 'fsfreeze --freeze disk; mkdir tree/snapshots/tuesday; fsfreeze --unfreeze disk'
run 'head -n 5 "tree/snapshots/tuesday/vda.cbt/since/$(cat backup.img.number)"'

say "9. The increment: this loop, from the README, copies only that"
sed -n '/^<!-- increment.sh -->/,/^```$/ { /^<!--/d; /^```/d; p }' "$readme" >increment.sh
sed 's/^/    | /' increment.sh
run 'awk "{n += \$2} END {print n, \"bytes of 134217728\"}" tree/snapshots/tuesday/vda.cbt/since/$(cat backup.img.number)'
run sh -e increment.sh tree/snapshots/tuesday/vda backup.img

say "10. Full copy and increment together are Tuesday's snapshot, byte for byte"
run 'cmp backup.img tree/snapshots/tuesday/vda.img && echo the same'
run e2fsck -fn backup.img

say "11. rmdir destroys snapshots; the disk never noticed any of this"
run rmdir tree/snapshots/monday tree/snapshots/tuesday
run 'umount disk; e2fsck -fn '"$loop"

say "That was all: mkdir, cp, a loop of ten lines, rmdir. It took $(($(date +%s) - began)) s."
