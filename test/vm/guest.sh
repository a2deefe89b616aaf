# shellcheck shell=sh
# Inside the guest: blksnap and the kernel's NBD client, with one and with two
# connections. A file system on it is frozen for a snapshot, written to, trimmed
# and discarded; then the daemon is killed under it and started again, and again under a
# client that connects again.
set -eu
fail() {
    for said in /tmp/ready /tmp/client /tmp/fsck; do [ ! -e $said ] || cat $said; done
    echo "guest: $*"
    exit 1
}

say() { echo "guest: $*, up $(cut -d' ' -f1 /proc/uptime) s"; }

serve() { # serve: start the daemon, and return when it is ready
    rm -f /tmp/ready # of the daemon before
    /job/blksnap serve --mount /tmp/tree --run /tmp/run --state /tmp/state \
        --store file:/tmp/store:64MiB /tmp/vda.img > /tmp/ready 2>&1 &
    daemon=$!
    until grep -qs ^ready /tmp/ready; do
        kill -0 $daemon || fail "the daemon did not start"
        usleep 20000
    done
}

connect() { # connect OPTION...: make the live device /dev/nbd0
    nbd-client -unix /tmp/run/nbd.sock -N vda -timeout 60 -b 4096 "$@" /dev/nbd0 > /tmp/client 2>&1 ||
        fail "nbd-client $*"
}

disconnect() {
    nbd-client -d /dev/nbd0 > /dev/null 2>&1
    while nbd-client -c /dev/nbd0 > /dev/null; do usleep 20000; done
}

format() { # format: a file system with some files on the live device, at /mnt
    mkfs.ext4 -q -F /dev/nbd0
    mount /dev/nbd0 /mnt
    dd if=/dev/urandom of=/mnt/a bs=1M count=4 2> /dev/null
    for i in 1 2 3 4 5; do echo $i > /mnt/f$i; sync /mnt/f$i; done
}

snapshot() { # snapshot: of the file system at /mnt, frozen
    fsfreeze --freeze /mnt
    mkdir /tmp/tree/snapshots/frozen
    fsfreeze --unfreeze /mnt
}

change() { # change: what is in the files at /mnt
    dd if=/dev/urandom of=/mnt/a bs=1M count=4 conv=notrunc 2> /dev/null
    rm /mnt/f1 /mnt/f2
    sync
}

files() { cat /mnt/* 2> /dev/null | md5sum; } # files: a sum of what is at /mnt

wantFiles() { # wantFiles FILE SUM WHAT: its file system has no fault and these files
    e2fsck -fn "$1" > /tmp/fsck 2>&1 || fail "e2fsck of $3"
    echo 3 > /proc/sys/vm/drop_caches # read it from where it is
    mount -o ro "$1" /mnt
    [ "$(files)" = "$2" ] || fail "$3 has other files"
    umount /mnt
}

wantImage() { # wantImage SUM: the snapshot's image has these files
    dd if=/tmp/tree/snapshots/frozen/vda.img of=/tmp/copy.img bs=1M 2> /dev/null
    wantFiles /tmp/copy.img "$1" "the image"
}

modprobe nbd max_part=0 nbds_max=2
modprobe loop
truncate -s 32M /tmp/vda.img
mkdir /tmp/tree
serve
for connections in 1 2; do
    say "$connections connection(s)"
    connect -C $connections
    [ "$(blockdev --getsize64 /dev/nbd0)" = 33554432 ] || fail "size of nbd0"
    [ "$(cat /sys/block/nbd0/queue/write_cache)" = "write back" ] || fail "nbd0 has no flush"
    [ "$(cat /sys/block/nbd0/queue/discard_max_bytes)" != 0 ] || fail "nbd0 has no trim"
    format
    before=$(files)
    snapshot
    change
    after=$(files)
    fstrim /mnt || fail "fstrim"
    umount /mnt
    wantFiles /dev/nbd0 "$after" "the live device"

    blkdiscard /dev/nbd0 || fail "blkdiscard"
    wantImage "$before"
    rmdir /tmp/tree/snapshots/frozen
    blkdiscard /dev/nbd0 || fail "blkdiscard without a snapshot"
    left=$(stat -c %b /tmp/vda.img)
    [ "$left" = 0 ] || fail "$left sectors are left of an origin that was discarded"
    disconnect
done

write() { # write: files to /mnt until /tmp/stop is there, with a sum of each that was synced
    i=0
    while [ ! -e /tmp/stop ]; do
        i=$((i + 1))
        dd if=/dev/urandom of=/mnt/w$i bs=16k count=2 conv=fsync 2> /dev/null || return 1
        md5sum /mnt/w$i >> /tmp/synced
        [ $i -le 32 ] || rm /mnt/w$((i - 32))
    done
}

progress() { # progress: return when some more files were synced
    goal=$(($(wc -l < /tmp/synced) + 5))
    until [ "$(wc -l < /tmp/synced)" -ge $goal ]; do
        kill -0 $writer || fail "a write failed"
        usleep 20000
    done
}

# The kernel gives up requests when its server has gone, and Debian's nbd-client
# ends then, with -persist as well: NBD_DO_IT returns 0, and only after an error does it
# connect again. What was synced is there afterwards.
say "SIGKILL"
connect
format
before=$(files)
snapshot
change
after=$(files)
kill -9 $daemon
wait $daemon || true
! dd if=/dev/nbd0 of=/dev/null bs=4k count=1 iflag=direct 2> /dev/null || fail "nbd0 can be read without a server"
umount /mnt
disconnect
serve
connect
mount /dev/nbd0 /mnt # replays the journal
umount /mnt
wantFiles /dev/nbd0 "$after" "the live device after SIGKILL"
wantImage "$before"
disconnect

# Over netlink the kernel lets requests wait for another connection, which nbd-client
# 3.24 does not ask for. No write fails, and none that was synced is lost.
say "a client that connects again"
/job/reconnect /tmp/run/nbd.sock vda 0 > /tmp/client 2>&1 &
client=$!
until grep -qs ^connected /tmp/client; do
    kill -0 $client || fail "reconnect did not connect"
    usleep 20000
done
mkfs.ext4 -q -F /dev/nbd0
mount -o errors=panic /dev/nbd0 /mnt
touch /tmp/synced
write &
writer=$!
for _ in 1 2 3; do
    progress
    kill -9 $daemon
    wait $daemon || true
    dd if=/dev/nbd0 of=/dev/null bs=4k count=1 iflag=direct 2> /dev/null & # nobody answers yet
    read=$!
    serve
    wait $read || fail "a read that had no server failed"
done
progress
touch /tmp/stop
wait $writer || fail "a write failed"
[ "$(grep -c "^connected again" /tmp/client)" -ge 3 ] || fail "the client did not connect again each time"
umount /mnt
echo 3 > /proc/sys/vm/drop_caches
e2fsck -fn /dev/nbd0 > /tmp/fsck 2>&1 || fail "e2fsck after three kills"
mount -o ro /dev/nbd0 /mnt
say "$(wc -l < /tmp/synced) files were synced"
tail -n 32 /tmp/synced | md5sum -c > /tmp/fsck 2>&1 || fail "what was synced is lost"
umount /mnt
kill $client
disconnect

kill $daemon
wait $daemon || fail "the daemon ended with status $?"
say "all is well"
