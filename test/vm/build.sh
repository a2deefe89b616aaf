#!/usr/bin/env bash
# Fetch Debian's cloud kernel and put together the initial file system of a
# guest that has busybox, the kernel's NBD client and ext4. Installs nothing;
# what is there already is kept.
#
# usage: build.sh DIRECTORY
set -euo pipefail
here=$(dirname "$(realpath "$0")")
mkdir -p "$1"
cd "$1"
[[ -s base.cpio && -s kernel ]] && exit 0

modules="nbd fuse loop ext4 xfs crc32c_generic crc32c_intel virtio_mmio virtio_blk virtio_console virtio_rng"
tools="nbd-client mkfs.ext4 e2fsck blockdev"

fetch() { # fetch PACKAGE: unpack it below x/PACKAGE
    [[ -d x/$1 ]] && return
    mkdir -p debs x
    (cd debs && apt-get -q download "$1" >/dev/null)
    dpkg -x debs/"$1"_*.deb "x/$1.part"
    mv "x/$1.part" "x/$1"
}

put() { # put PROGRAM: copy it below root with its libraries
    local program
    program=$(command -v "$1")
    { echo "$program"; ldd "$program" | grep -o '/[^ ]*'; } | while read -r file; do
        install -D "$file" "root$file"
    done
}

package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends:/ {print $2; exit}')
version=${package#linux-image-}
fetch "$package"
fetch busybox-static
fetch kmod
kmod() { (exec -a "$1" x/kmod/bin/kmod "${@:2}"); } # it acts as the name it is called by

kmod depmod -b "x/$package" "$version"
rm -rf root
mkdir -p root/{bin,sbin,proc,sys,dev,tmp,run,mnt,etc,job,usr/sbin,usr/bin}
cp x/busybox-static/bin/busybox root/bin/
ln -s busybox root/bin/sh
for module in $modules; do # one that this kernel has built in needs no file
    kmod modprobe -d "x/$package" -S "$version" --show-depends "$module" 2>/dev/null |
        awk '/^insmod/ {print $2}' || true
done | sort -u | while read -r file; do
    file=${file#*"x/$package"}
    install -D -m 644 "x/$package$file" "root$file"
done
find root -name '*.ko.xz' -exec unxz {} +
cp "x/$package/lib/modules/$version"/modules.{order,builtin,builtin.modinfo} "root/lib/modules/$version/"
kmod depmod -b root "$version"
for tool in $tools; do put "$tool"; done
install -m 755 "$here/init" root/init

(cd root && find . | LC_ALL=C sort | ../x/busybox-static/bin/busybox cpio -o -H newc 2>/dev/null) >base.cpio
cp x/busybox-static/bin/busybox .
cp "x/$package/boot/vmlinuz-$version" kernel
rm -rf root x debs
