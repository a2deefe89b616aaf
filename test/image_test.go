// Ordinary programs on the image files of the tree, while the device is
// written.

package test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestProgramsReadImages(t *testing.T) {
	needRoot(t)
	need(t, "rsync", "tar", "python3")
	const size = 12*miB + 512 // dd with odd blocks meets an odd end
	d, origin := serveOrigin(t, size)
	before := filepath.Join(d.dir, "before")
	run(t, "cp", "--sparse=always", origin, before)
	mkdir(t, d.snapshot("s1"))
	writeUntilTheEnd(t, d.open("vda"))

	images, image := d.snapshot("s1"), d.snapshot("s1", "vda.img")
	for _, tc := range []struct{ name, script string }{ // $1 image, $2 its directory, $3 expected content
		{"cp", `cp "$1" out; cmp out "$3"`},
		{"cp leaves holes", `cp "$1" out; cmp out "$3"; test $(stat -c %b out) -le $(($(stat -c %b "$3") + 256))`},
		{"cp --sparse=never", `cp --sparse=never "$1" out; cmp out "$3"`},
		{"cp keeps size and mode", `cp -p "$1" out; test "$(stat -c '%s %a' out)" = "$(stat -c %s "$3") 600"`},
		{"cat", `cat "$1" | cmp - "$3"`},
		{"dd bs=512", `dd if="$1" bs=512 skip=20000 status=none | cmp - <(tail -c +10240001 "$3")`},
		{"dd bs=7777", `dd if="$1" bs=7777 status=none | cmp - "$3"`},
		{"dd bs=1M+1", `dd if="$1" bs=1048577 status=none | cmp - "$3"`},
		{"dd bs=4M", `dd if="$1" bs=4M status=none | cmp - "$3"`},
		{"dd in the middle", `dd if="$1" bs=999 skip=1234 count=3000 status=none |
			cmp - <(dd if="$3" bs=999 skip=1234 count=3000 status=none)`},
		{"dd O_DIRECT", `dd if="$1" iflag=direct bs=4096 status=none | cmp - "$3"`},
		{"dd O_DIRECT 1M", `dd if="$1" iflag=direct bs=1M status=none | cmp - "$3"`},
		{"md5sum", `test "$(md5sum < "$1")" = "$(md5sum < "$3")"`},
		{"tar -S", `tar -C "$2" -cSf out.tar vda.img; mkdir x; tar -C x -xf out.tar; cmp x/vda.img "$3"
			test $(stat -c %s out.tar) -lt $(($(stat -c %s "$3") * 3 / 4))`},
		{"rsync -S", `rsync -S "$1" out; cmp out "$3"; test $(stat -c %b out) -le $(($(stat -c %b "$3") + 256))`},
		{"rsync --inplace over an older copy", `head -c 9M /dev/zero > out; rsync --inplace --no-whole-file "$1" out; cmp out "$3"`},
		{"find", `test "$(find "$2" -name '*.img' -size $(stat -c %s "$3")c -perm 600)" = "$1"`},
		{"mmap", `python3 -c 'import mmap, sys
a = open(sys.argv[1], "rb"); b = open(sys.argv[2], "rb")
assert mmap.mmap(a.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)[:] == b.read()' "$1" "$3"`},
		{"losetup", `dev=$(losetup --find --show --read-only "$1"); trap 'losetup -d $dev' EXIT; cmp $dev "$3"`},
		{"losetup with direct I/O", `dev=$(losetup --find --show --read-only --direct-io=on "$1")
			trap 'losetup -d $dev' EXIT; cmp $dev "$3"`},
		{"writing is refused", `! dd if=/dev/zero of="$1" bs=1 count=1 conv=notrunc 2> err; grep -q 'Read-only file system' err`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			sh(t, "cd $(mktemp -d -p "+d.dir+")\n"+tc.script, image, images, before)
		})
	}
}

// writeUntilTheEnd writes stamped sectors all over the device until the test
// ends.
func writeUntilTheEnd(t *testing.T, c *nbdConn) {
	rng := rand.New(rand.NewPCG(uint64(*seed), 0))
	t.Logf("repeat with -seed=%d", *seed)
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		p := make([]byte, 48*kiB)
		for pass := uint64(2); ; pass++ {
			select {
			case <-stop:
				stopped <- nil
				return
			default:
			}
			off, n := randomRange(rng, c.size, int64(len(p)))
			Stamp(p[:n], "vda", off, pass)
			if err := c.writeAt(p[:n], off); err != nil {
				stopped <- fmt.Errorf("write %d bytes at %d: %w", n, off, err)
				return
			}
		}
	}()
	t.Cleanup(func() {
		close(stop)
		if err := <-stopped; err != nil {
			t.Error(err)
		}
	})
}

// What SEEK_DATA and SEEK_HOLE say must not lose data, and must not call the
// half of the device data that was never written.
func TestSeekHole(t *testing.T) {
	needRoot(t)
	const size = 16 * miB
	d, _ := serveOrigin(t, size)
	mkdir(t, d.snapshot("s1"))
	live := d.open("vda")
	p := make([]byte, miB)
	Stamp(p, "vda", 12*miB, 2)
	if err := live.writeAt(p, 12*miB); err != nil { // a hole of the image, data of the origin
		t.Fatal(err)
	}
	if err := live.zero(0, miB); err != nil { // the reverse
		t.Fatal(err)
	}

	f, err := os.Open(d.snapshot("s1", "vda.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var data, holes int64
	for off := int64(0); off < size; {
		hole, err := f.Seek(off, unix.SEEK_HOLE)
		if err != nil {
			t.Fatal(err)
		}
		if err := Verify(readAt(t, f, off, hole-off), "vda", off, 1, 1); err != nil {
			t.Errorf("data from %d to %d: %v", off, hole, err)
		}
		data += hole - off
		off = hole
		next, err := f.Seek(off, unix.SEEK_DATA)
		if err != nil {
			next = size // ENXIO: no more data
		}
		if err := Verify(readAt(t, f, off, next-off), "vda", off, 0, 0); err != nil {
			t.Errorf("hole from %d to %d: %v", off, next, err)
		}
		holes += next - off
		off = next
	}
	if data != size/2 || holes != size/2 {
		t.Errorf("the image has %d bytes of data and %d of holes, want %d each", data, holes, size/2)
	}
}

// readAt returns n bytes of f from off.
func readAt(t *testing.T, f io.ReaderAt, off, n int64) []byte {
	t.Helper()
	p := make([]byte, n)
	if _, err := f.ReadAt(p, off); err != nil {
		t.Fatalf("read %d bytes at %d: %v", n, off, err)
	}
	return p
}

// A name that is used again shows the new snapshot's content, also where the
// kernel has seen the old one.
func TestNameUsedAgain(t *testing.T) {
	needRoot(t)
	d, _ := serveOrigin(t, 4*miB)
	live := d.open("vda")
	p := make([]byte, miB)
	number := readNumber(t, d.device("vda", "cbt", "number"))
	for pass := uint64(2); pass < 12; pass++ {
		Stamp(p, "vda", miB, pass)
		if err := live.writeAt(p, miB); err != nil {
			t.Fatal(err)
		}
		mkdir(t, d.snapshot("again"))

		image, err := os.ReadFile(d.snapshot("again", "vda.img"))
		if err != nil {
			t.Fatal(err)
		}
		if err := Verify(image[miB:2*miB], "vda", miB, pass, pass); err != nil {
			t.Error(err)
		}
		number++
		if got := readNumber(t, d.snapshot("again", "vda.cbt", "number")); got != number {
			t.Errorf("number\n got %d\nwant %d", got, number)
		}
		rmdir(t, d.snapshot("again"))
	}
}

// A script that reads an image and destroys its snapshot in the next line must
// not meet the kernel's late release of the file, also on a busy machine.
func TestDestroyRightAfterReading(t *testing.T) {
	needRoot(t)
	d, _ := serveOrigin(t, 256*kiB)
	mkdir(t, d.snapshot("other"))
	stop := make(chan struct{})
	var readers sync.WaitGroup
	defer readers.Wait()
	defer close(stop)
	for range 4 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := os.ReadFile(d.snapshot("other", "vda.img")); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}

	for n := range 100 {
		mkdir(t, d.snapshot("s1"))
		if _, err := os.ReadFile(d.snapshot("s1", "vda.img")); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Rmdir(d.snapshot("s1")); err != nil {
			t.Fatalf("rmdir in round %d: %v", n, err)
		}
	}
}
