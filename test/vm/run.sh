#!/usr/bin/env bash
# Boot a throw-away guest in software emulation, run SCRIPT inside as
# /job/run.sh with each FILE beside it, show what it prints, and end with its
# status: 125 if the guest ended without one, 124 if it took too long.
#
# usage: run.sh DIRECTORY SECONDS SCRIPT [FILE]...   DIRECTORY is build.sh's
set -euo pipefail
built=$(realpath "$1") limit=$2 script=$3
shift 3
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

mkdir "$dir/job"
install -m 755 "$script" "$dir/job/run.sh"
for file; do install -m 755 "$file" "$dir/job/"; done
busybox() { "$built/busybox" "$@"; }
(cd "$dir" && find job | busybox cpio -o -H newc 2>/dev/null) >"$dir/job.cpio"
cat "$built/base.cpio" "$dir/job.cpio" >"$dir/initrd"

# On a busy host the guest fails to find out how fast its clock ticks.
khz=$(awk '/cpu MHz/ {printf "%d", $4 * 1000; exit}' /proc/cpuinfo)
status=0
timeout -k 5 "$limit" qemu-system-x86_64 -M microvm -cpu max,la57=off -accel tcg,thread=multi \
    -m 768 -smp 2 -nodefaults -no-user-config -display none -no-reboot -serial stdio \
    -device virtio-serial-device -device virtio-rng-device \
    -chardev "file,id=status,path=$dir/status" -device virtserialport,chardev=status \
    -kernel "$built/kernel" -initrd "$dir/initrd" \
    -append "console=ttyS0 quiet panic=-1 reboot=t nokaslr mitigations=off tsc=reliable \
tsc_early_khz=$khz lpj=$((khz * 4)) no_timer_check cryptomgr.notests init_on_alloc=0 audit=0 \
apparmor=0 random.trust_cpu=on" </dev/null || status=$?
case $status in
0) exit "$(grep -xE '[0-9]+' "$dir/status" || echo 125)" ;;
124 | 137) exit 124 ;;
*) exit 125 ;;
esac
