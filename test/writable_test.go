// Writable images: real file systems in them, while that of the origin goes on.

package test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestWritableImages mounts images of file systems that nobody froze, through the
// tree and over NBD, and works in them.
func TestWritableImages(t *testing.T) {
	needRoot(t)
	for _, fs := range fileSystems {
		for _, way := range []string{"in the tree", "over NBD"} {
			if fs.name == "btrfs" && way == "over NBD" {
				continue // ext4 and xfs have shown that
			}
			t.Run(fs.name+" "+way, func(t *testing.T) {
				need(t, fs.make[0], fs.check[0], "fstrim")
				testWritableImage(t, fs, way == "over NBD")
			})
		}
	}
}

func testWritableImage(t *testing.T, fs fileSystem, overNBD bool) {
	d, origin := serveOrigin(t, fs.size)
	older, newer, image := d.snapshot("older", "vda.img"), d.snapshot("newer", "vda.img"), d.snapshot("w", "vda.img")
	attachImage := func(t *testing.T) (dev string) {
		if overNBD {
			return attach(t, d, "vda@w")
		}
		return loop(t, image, false)
	}
	var now map[string]string // the files in the image
	var sums []string         // of the other two
	t.Run("at work", func(t *testing.T) {
		dev := attach(t, d, "vda")
		run(t, fs.make[0], append(fs.make[1:], dev)...)
		at := mount(t, dev, fs.name, "rw")
		files := fill(t, at, "file", 40)
		run(t, "sync", "-f", at)
		churn := startChurn(t, filepath.Join(at, "scribble-churn"))
		mkdir(t, d.snapshot("older"))
		d.blksnap("snapshot", "create", "--writable", "w")
		last := churn.pass.Load() + 1 // of a write that may be in w
		mkdir(t, d.snapshot("newer"))
		sums = []string{checksum(t, older), checksum(t, newer)}

		now = workInImage(t, fs, d, attachImage(t), files, last)
		churn.stop()
		if got := hashes(t, at, "scribble-"); !maps.Equal(got, files) {
			t.Errorf("files on the device after writes to its image\n got %v\nwant %v", got, files)
		}
		if err := unmount(at); err != nil {
			t.Fatal(err)
		}
		wantClean(t, fs, dev)
	})
	if got := []string{checksum(t, older), checksum(t, newer)}; !slices.Equal(got, sums) {
		t.Errorf("checksums of the older and the newer image after writes to this one and the origin\n got %v\nwant %v", got, sums)
	}
	sums = append(sums, checksum(t, image))
	d.kill()
	d.start(origin)
	if got := []string{checksum(t, older), checksum(t, newer), checksum(t, image)}; !slices.Equal(got, sums) {
		t.Errorf("checksums of the older image, the newer and this one after a restart\n got %v\nwant %v", got, sums)
	}
	t.Run("after a restart", func(t *testing.T) {
		dev := attachImage(t)
		at := mount(t, dev, fs.name, fs.mount)
		if got := hashes(t, at, "scribble-"); !maps.Equal(got, now) {
			t.Errorf("files in the image\n got %v\nwant %v", got, now)
		}
		if err := unmount(at); err != nil {
			t.Fatal(err)
		}
		wantClean(t, fs, dev)
	})
	if !overNBD { // nothing else comes of that
		wantIncrements(t, d)
	}
}

// workInImage replays the journal of the image behind dev, which holds files and
// what was churned until pass last. It changes, removes and makes files there,
// trims, and returns the files that are left.
func workInImage(t *testing.T, fs fileSystem, d *daemon, dev string, files map[string]string, last uint64) map[string]string {
	t.Helper()
	if len(fs.untwin) > 0 {
		run(t, fs.untwin[0], append(fs.untwin[1:], dev)...)
	}
	at := mount(t, dev, fs.name, fs.mount)
	if got := hashes(t, at, "scribble-"); !maps.Equal(got, files) {
		t.Errorf("files in the image\n got %v\nwant %v", got, files)
	}
	churned, err := os.ReadFile(filepath.Join(at, "scribble-churn"))
	if err != nil {
		t.Fatal(err)
	}
	if err := Verify(churned, "churn", 0, 1, last); err != nil {
		t.Errorf("in a file of the image that was written while it was taken: %v", err)
	}

	overwrite(t, at, files)
	big := filepath.Join(at, "big")
	content := make([]byte, 16*miB)
	Stamp(content, "big", 0, 1)
	write(t, big, content)
	run(t, "sync", "-f", at)
	full := holds(t, d, "w")
	if full < int64(len(content)) {
		t.Errorf("the image holds %d bytes of the snapstore after %d were written to it", full, len(content))
	}
	if err := os.Remove(big); err != nil {
		t.Fatal(err)
	}
	run(t, "sync", "-f", at)
	eventually(t, "fstrim gives space back", func() bool { // xfs frees what was removed some time later
		run(t, "fstrim", at)
		return holds(t, d, "w") < full-int64(len(content))/2
	})
	now := hashes(t, at, "scribble-")
	if err := unmount(at); err != nil {
		t.Fatal(err)
	}
	wantClean(t, fs, dev)
	return now
}

// holds is what the snapshot's images hold of the snapstore, in bytes.
func holds(t *testing.T, d *daemon, snapshot string) (n int64) {
	t.Helper()
	for _, i := range d.json("snapshot", "show", snapshot)[0]["images"].([]any) {
		n += int64(i.(map[string]any)["holds"].(float64))
	}
	return n
}

// wantIncrements brings a copy of the older image up to the writable one, and that
// up to a snapshot taken now: the blocks that were written to the image are in both
// increments.
func wantIncrements(t *testing.T, d *daemon) {
	t.Helper()
	mkdir(t, d.snapshot("next"))
	backup := filepath.Join(d.dir, "backup")
	sh(t, `cp "$1.img" "$2"; cat "$1.cbt/number" > "$2.number"`, d.snapshot("older", "vda"), backup)
	for _, snapshot := range []string{"w", "next"} {
		sh(t, incrementScript(t), d.snapshot(snapshot, "vda"), backup)
		if checksum(t, backup) != checksum(t, d.snapshot(snapshot, "vda.img")) {
			t.Errorf("the copy brought up to %s is not the snapshot", snapshot)
		}
	}
}

// churn writes to a file, past the page cache and as fast as it can.
type churn struct {
	pass atomic.Uint64 // of the last write
	stop func()        // returns when no write is in flight; may be called twice
}

// startChurn returns when all of the file at path was written at least once.
func startChurn(t *testing.T, path string) *churn {
	t.Helper()
	const size = 16 * miB
	content := make([]byte, size)
	Stamp(content, "churn", 0, 1)
	write(t, path, content)
	run(t, "sync", "-f", path)
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("repeat with -seed=%d", *seed)
	c := &churn{}
	c.pass.Store(1)
	quit, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- errors.Join(c.run(f, size, quit), f.Close()) }()
	c.stop = sync.OnceFunc(func() {
		close(quit)
		if err := <-done; err != nil {
			t.Error(err)
		}
		t.Logf("%d writes meanwhile", c.pass.Load())
	})
	t.Cleanup(c.stop)
	return c
}

func (c *churn) run(f *os.File, size int64, quit <-chan struct{}) error {
	const unit = 4 * kiB // of offsets, lengths and memory, as O_DIRECT wants them
	p, err := unix.Mmap(-1, 0, 16*unit, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(p)
	rng := rand.New(rand.NewPCG(uint64(*seed), 7))
	for {
		select {
		case <-quit:
			return nil
		default:
		}
		n := (1 + rng.Int64N(16)) * unit
		off := rng.Int64N((size-n)/unit+1) * unit
		Stamp(p[:n], "churn", off, c.pass.Load()+1)
		if _, err := f.WriteAt(p[:n], off); err != nil {
			return err
		}
		c.pass.Add(1)
	}
}

// checksum is that of a file's blocks that are not all zeroes, of where they are, and
// of its size. Holes are not read: an image is mostly that.
func checksum(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	p, zeroes := make([]byte, miB), make([]byte, 4*kiB)
	size := fileSize(t, path)
	fmt.Fprintln(h, size)
	for off := int64(0); off < size; {
		if off, err = f.Seek(off, unix.SEEK_DATA); errors.Is(err, syscall.ENXIO) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		n, err := f.ReadAt(p, off)
		if err != nil && err != io.EOF {
			t.Fatal(err)
		}
		off += int64(n)
		for k := 0; k < n; k += len(zeroes) {
			if b := p[k:min(k+len(zeroes), n)]; !bytes.Equal(b, zeroes[:len(b)]) {
				fmt.Fprintln(h, off-int64(n-k))
				h.Write(b)
			}
		}
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// TestWritableExport has clients of NBD write to an image.
func TestWritableExport(t *testing.T) {
	needRoot(t)
	need(t, "nbdinfo", "qemu-io")
	d, origin := serveOrigin(t, 16*miB)
	mkdir(t, d.snapshot("older"))
	d.blksnap("snapshot", "create", "--writable", "w")
	mkdir(t, d.snapshot("newer"))
	others := func() []string {
		return []string{checksum(t, origin), checksum(t, d.snapshot("older", "vda.img")), checksum(t, d.snapshot("newer", "vda.img"))}
	}
	before := others()

	export := exports(t, "nbdinfo", "--json", d.uri("vda@w"))[0]
	for _, key := range []string{"can_multi_conn", "can_flush", "can_fua", "can_trim", "can_zero"} {
		if export[key] != true {
			t.Errorf("%s\n got %v\nwant true", key, export[key])
		}
	}
	if export["is_read_only"] != false {
		t.Error("the export of a writable image is read-only")
	}
	qemuIO(t, d.uri("vda@w"), false,
		"write -P 0xa1 1M 1M", "write -P 0xa2 2097664 1536", "write -f -P 0xa3 3M 64k",
		"write -z 1540k 100k", "write -z -u 1792k 64k", "discard 1664k 64k",
		"aio_write -P 0xa4 4M 512k", "aio_write -P 0xa5 5M 512k", "aio_flush")
	for _, uri := range []string{d.uri("vda@w"), d.snapshot("w", "vda.img")} {
		qemuIO(t, uri, true,
			"read -P 0xa1 1M 516k", "read -P 0xa2 2097664 1536", "read -P 0xa3 3M 64k",
			"read -P 0 1540k 100k", "read -P 0 1792k 64k", "read -P 0 1664k 64k",
			"read -P 0xa4 4M 512k", "read -P 0xa5 5M 512k")
	}
	if got := others(); !slices.Equal(got, before) {
		t.Errorf("the origin, the older and the newer image after writes to this one\n got %v\nwant %v", got, before)
	}

	p := make([]byte, 64*kiB)
	for name, do := range map[string]func(*nbdConn) error{
		"write": func(c *nbdConn) error { return c.writeAt(p, 0) },
		"zero":  func(c *nbdConn) error { return c.zero(0, 4096) },
		"trim":  func(c *nbdConn) error { return c.trim(0, 4096) },
	} {
		if err := do(d.open("vda@older")); !errors.Is(err, syscall.EPERM) {
			t.Errorf("%s to a read-only image\n got %v\nwant %v", name, err, syscall.EPERM)
		}
	}

	// Connections are one disk: what one has flushed, all read.
	a, b := d.open("vda@w"), d.open("vda@w")
	for pass := uint64(2); pass < 50; pass++ {
		Stamp(p, "vda", 8*miB, pass)
		if err := errors.Join(a.writeAt(p, 8*miB), a.flush(), b.readAt(p, 8*miB)); err != nil {
			t.Fatal(err)
		}
		if err := Verify(p, "vda", 8*miB, pass, pass); err != nil {
			t.Fatalf("read through another connection: %v", err)
		}
	}
}

// TestWritableImageInAFullStore writes more to an image than the store has room for:
// that is the writer's trouble alone.
func TestWritableImageInAFullStore(t *testing.T) {
	needRoot(t)
	const size = 16 * miB
	d, _ := serveOrigin(t, size, "--store", "mem:4MiB")
	mkdir(t, d.snapshot("older"))
	d.blksnap("snapshot", "create", "--writable", "w")
	live := d.open("vda")
	p := make([]byte, 64*kiB)
	Stamp(p, "vda", 0, 2)
	if err := live.writeAt(p, 0); err != nil { // one block that must be preserved
		t.Fatal(err)
	}
	image, err := os.OpenFile(d.snapshot("w", "vda.img"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	off := int64(0)
	for ; err == nil && off < size; off += int64(len(p)) {
		Stamp(p, "image", off, 1)
		_, err = image.WriteAt(p, off)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write %d bytes to an image over a store of 4 MiB\n got %v\nwant %v", off, err, syscall.ENOSPC)
	}
	if err := d.open("vda@w").writeAt(p, size-int64(len(p))); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write to it over NBD\n got %v\nwant %v", err, syscall.ENOSPC)
	}
	for _, name := range []string{"older", "w"} {
		if got := read(t, d.snapshot(name, "state")); got != "ok" {
			t.Errorf("state of %s\n got %s\nwant ok", name, got)
		}
	}
	if err := Verify(readAt(t, image, 0, off-int64(len(p))), "image", 0, 1, 1); err != nil {
		t.Errorf("what was written before: %v", err)
	}
	older, err := os.ReadFile(d.snapshot("older", "vda.img"))
	if err != nil {
		t.Fatal(err)
	}
	if err := Verify(older[:size/2], "vda", 0, 1, 1); err != nil {
		t.Error(err)
	}
}
