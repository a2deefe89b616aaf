#!/usr/bin/env bash
# Say in one line what this machine lacks, then install the Debian or Ubuntu
# packages of those programs that are missing.
#
# usage: require.sh PROGRAM|FILE...
set -euo pipefail

# The package that holds each program or file, where it is not called like it.
declare -A package=(
    [/usr/lib/python3/dist-packages/nbd.py]=python3-libnbd
    [e2fsck]=e2fsprogs
    [fusermount3]=fuse3
    [gcc]="gcc libc6-dev"
    [groff]=groff-base
    [losetup]=mount
    [mkfs.btrfs]=btrfs-progs
    [mkfs.ext4]=e2fsprogs
    [mkfs.xfs]=xfsprogs
    [nbdcopy]=libnbd-bin
    [nbdfuse]=libnbd-bin
    [nbdinfo]=libnbd-bin
    [qemu-img]=qemu-utils
    [qemu-nbd]=qemu-utils
    [qemu-storage-daemon]=qemu-system-common
    [qemu-system-x86_64]=qemu-system-x86
    [unxz]=xz-utils
)

goIsNew() { # goIsNew VERSION: 1.26 or later, as in "go1.26.8"
    [[ $1 =~ ^go([0-9]+)\.([0-9]+) ]] &&
        ((BASH_REMATCH[1] > 1 || BASH_REMATCH[1] == 1 && BASH_REMATCH[2] >= 26))
}

lacks() { # lacks PROGRAM|FILE...: those that are not installed
    for program; do
        command -v "$program" >/dev/null || [[ -f $program ]] || echo "$program"
    done
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PATH:/usr/sbin:/sbin # Debian's su leaves these out
problems=()
if ! command -v go >/dev/null; then
    problems+=("Go 1.26 or later (none in \$PATH)")
elif found=$(go env GOVERSION 2>/dev/null) && goIsNew "$found"; then :; else
    problems+=("Go 1.26 or later (found ${found:-an older one})")
fi
[[ $(id -u) == 0 ]] || problems+=("root (try: sudo -E env PATH=\"\$PATH\" make ...)")
[[ -c /dev/fuse ]] || problems+=("/dev/fuse (try: modprobe fuse)")
if ((${#problems[@]})); then
    IFS=,
    echo "blksnap: this needs ${problems[*]}" | sed 's/,/, /g' >&2
    exit 1
fi

mapfile -t missing < <(lacks "$@")
((${#missing[@]})) || exit 0

if ! command -v apt-get >/dev/null; then
    echo "blksnap: please install ${missing[*]} (no apt-get here to do it)" >&2
    exit 1
fi
echo "installing what is missing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get -q update >/dev/null
wanted=()
for program in "${missing[@]}"; do
    read -ra names <<<"${package[$program]:-$program}"
    wanted+=("${names[@]}")
done
apt-get -q install -y --no-install-recommends "${wanted[@]}" >/dev/null

# Some releases have put a program of a package above into one of its own.
for program in $(lacks "${missing[@]}"); do
    if apt-cache show "$program" >/dev/null 2>&1; then
        apt-get -q install -y --no-install-recommends "$program" >/dev/null
    fi
done
mapfile -t missing < <(lacks "${missing[@]}")
if ((${#missing[@]})); then
    echo "blksnap: no package of this system provides ${missing[*]}" >&2
    exit 1
fi
