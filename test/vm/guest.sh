# shellcheck shell=sh
# Inside the guest: blksnap, the kernel's NBD client with one and with two
# connections, ext4 on it, and a snapshot whose image must be clean.
set -eu
fail() { cat /tmp/ready; echo "guest: $*"; exit 1; }

modprobe nbd max_part=0 nbds_max=2
modprobe loop
truncate -s 64M /tmp/vda.img
mkdir /tmp/tree
/job/blksnap serve --mount /tmp/tree --run /tmp/run --state /tmp/state --store mem:128MiB /tmp/vda.img > /tmp/ready 2>&1 &
daemon=$!
until grep -qs ^ready /tmp/ready; do
    kill -0 $daemon || fail "the daemon did not start"
    usleep 20000
done

for connections in 1 2; do
    echo "guest: $connections connection(s)"
    nbd-client -unix /tmp/run/nbd.sock -N vda -C $connections -timeout 60 -b 4096 /dev/nbd0 > /tmp/client 2>&1 ||
        { cat /tmp/client; fail "nbd-client"; }
    [ "$(blockdev --getsize64 /dev/nbd0)" = 67108864 ] || fail "size of nbd0"
    [ "$(cat /sys/block/nbd0/queue/write_cache)" = "write back" ] || fail "nbd0 has no flush"

    mkfs.ext4 -q -F /dev/nbd0
    mount /dev/nbd0 /mnt
    dd if=/dev/urandom of=/mnt/a bs=1M count=12 2> /dev/null
    for i in 1 2 3 4 5; do echo $i > /mnt/f$i; sync /mnt/f$i; done
    before=$(cat /mnt/* 2> /dev/null | md5sum)

    fsfreeze --freeze /mnt
    mkdir /tmp/tree/snapshots/frozen
    fsfreeze --unfreeze /mnt
    dd if=/dev/urandom of=/mnt/a bs=1M count=12 conv=notrunc 2> /dev/null
    rm /mnt/f1 /mnt/f2
    sync
    after=$(cat /mnt/* 2> /dev/null | md5sum)
    umount /mnt
    e2fsck -fn /dev/nbd0 > /tmp/fsck 2>&1 || { cat /tmp/fsck; fail "e2fsck of the live device"; }

    # Read it again from the server, not from the page cache.
    echo 3 > /proc/sys/vm/drop_caches
    mount -o ro /dev/nbd0 /mnt
    [ "$(cat /mnt/* 2> /dev/null | md5sum)" = "$after" ] || fail "the live device has other files"
    umount /mnt
    nbd-client -d /dev/nbd0 > /dev/null 2>&1
    while nbd-client -c /dev/nbd0 > /dev/null; do usleep 20000; done

    cp /tmp/tree/snapshots/frozen/vda.img /tmp/copy.img
    e2fsck -fn /tmp/copy.img > /tmp/fsck 2>&1 || { cat /tmp/fsck; fail "e2fsck of the image"; }
    mount -o ro,loop /tmp/copy.img /mnt
    [ "$(cat /mnt/* 2> /dev/null | md5sum)" = "$before" ] || fail "the image has other files"
    umount /mnt
    rmdir /tmp/tree/snapshots/frozen
done

kill $daemon
wait $daemon || fail "the daemon ended with status $?"
echo "guest: all is well"
