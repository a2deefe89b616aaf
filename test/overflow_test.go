// A snapstore that is too small.

package test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
)

func TestOverflowBreaksSnapshotsAndNeverTheOrigin(t *testing.T) {
	needRoot(t)
	for _, tc := range []struct {
		name  string
		store string // STATE stands for a directory
	}{
		{"memory", "mem:1MiB"},
		{"file", "file:STATE/small:1MiB"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			const size = 16 * miB
			dir := scratch(t)
			d, origin := serveOrigin(t, size, "--store", strings.ReplaceAll(tc.store, "STATE", dir))
			live := d.open("vda")
			mkdir(t, d.snapshot("old"))
			image, err := os.Open(d.snapshot("old", "vda.img"))
			if err != nil {
				t.Fatal(err)
			}
			export := d.open("vda@old")
			number := readNumber(t, d.device("vda", "cbt", "number"))

			p := make([]byte, size/2)
			Stamp(p, "vda", 0, 2)
			if err := live.writeAt(p, 0); err != nil { // eight times what the store holds
				t.Fatalf("write to the origin while the store overflows: %v", err)
			}
			if err := live.flush(); err != nil {
				t.Fatal(err)
			}

			checkBroken(t, d, image)
			if err := export.readAt(make([]byte, 4096), 12*miB); !errors.Is(err, syscall.EIO) {
				t.Errorf("the export of the broken image reads with error %v, want EIO", err)
			}
			export.Close()
			image.Close()

			// The origin has everything, and tracking missed nothing.
			content, err := os.ReadFile(origin)
			if err != nil {
				t.Fatal(err)
			}
			if err := Verify(content[:size/2], "vda", 0, 2, 2); err != nil {
				t.Error(err)
			}
			want := fmt.Sprintf("0 %d data", size/2)
			if got := read(t, d.device("vda", "cbt", "since", fmt.Sprint(number))); got != want {
				t.Errorf("changed extents\n got %s\nwant %s", got, want)
			}

			// The space is back, and a new snapshot works.
			destroy(t, d, "old")
			mkdir(t, d.snapshot("new"))
			Stamp(p[:256*kiB], "vda", 0, 3)
			if err := live.writeAt(p[:256*kiB], 0); err != nil {
				t.Fatal(err)
			}
			fresh, err := os.ReadFile(d.snapshot("new", "vda.img"))
			if err != nil {
				t.Fatal(err)
			}
			if err := Verify(fresh[:size/2], "vda", 0, 2, 2); err != nil {
				t.Error(err)
			}
		})
	}
}

// checkBroken checks every place that must say that the snapshot old is lost;
// image is a file of it that was opened before.
func checkBroken(t *testing.T, d *daemon, image *os.File) {
	t.Helper()
	for _, path := range []string{d.snapshot("old", "state"), d.snapshot("old", "vda.state")} {
		if got, want := read(t, path), "overflowed"; got != want {
			t.Errorf("%s\n got %s\nwant %s", path, got, want)
		}
	}
	if got, want := read(t, d.device("vda", "state")), "ok"; got != want {
		t.Errorf("state of the device\n got %s\nwant %s", got, want)
	}
	if _, err := image.ReadAt(make([]byte, 4096), 12*miB); !errors.Is(err, syscall.EIO) {
		t.Errorf("an open file of the broken image reads with error %v, want EIO", err)
	}
	if out := sh(t, `if cp "$1" /dev/null 2>&1; then echo copied; fi`, d.snapshot("old", "vda.img")); !strings.Contains(out, "Input/output error") {
		t.Errorf("cp of the broken image says %q, want Input/output error", out)
	}
	if got := fmt.Sprint(d.json("snapshot", "show", "old")); !strings.Contains(got, "overflowed") {
		t.Errorf("snapshot show says %s, want overflowed", got)
	}
	if got := d.blksnap("events"); !strings.Contains(got, "overflow") || !strings.Contains(got, "old") {
		t.Errorf("events do not mention the overflow of old:\n%s", got)
	}
}

// Writes that wait for space in the snapstore hold up nothing else, also not on
// their own connection, of whose requests the server serves some at a time.
func TestWritesThatWaitHoldUpNobody(t *testing.T) {
	needRoot(t)
	const size, n, writes, inFlight = 16 * miB, 64 * kiB, 100, 64
	d, _ := serveOrigin(t, size, "--store", "mem:1MiB", "--store-wait", "50s")
	mkdir(t, d.snapshot("s1"))
	c := d.open("vda")
	p := make([]byte, n)
	for i := range int64(writes) {
		Stamp(p, "vda", i*n, 2)
		if err := c.request(NBD_CMD_WRITE, 0, i*n, n, p); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.request(NBD_CMD_FLUSH, 0, 0, 0, nil); err != nil {
		t.Fatal(err)
	}
	flush, waiting := c.cookie, writes
	next := func() (cookie uint64) {
		t.Helper()
		cookie, err := c.anyReply()
		if err != nil {
			t.Fatalf("with %d writes waiting: %v", waiting, err)
		}
		return cookie
	}
	for next() != flush {
		waiting--
	}
	if waiting < inFlight {
		t.Errorf("only %d of %d writes waited when the flush was answered, want %d at least", waiting, writes, inFlight)
	}

	rmdir(t, d.snapshot("s1")) // nothing is to be preserved any more
	for ; waiting > 0; waiting-- {
		next()
	}
	got := make([]byte, writes*n)
	if err := c.readAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if err := Verify(got, "vda", 0, 2, 2); err != nil {
		t.Error(err)
	}
}

// Exactly those snapshots break that need a block which did not fit: an older
// one that has it already goes on.
func TestOverflowSparesWhoHasTheBlock(t *testing.T) {
	needRoot(t)
	const size, changed = 16 * miB, 3 * miB
	d, _ := serveOrigin(t, size, "--store", "mem:4MiB")
	live := d.open("vda")
	p := make([]byte, changed)
	for pass, name := range []string{"older", "newer"} {
		mkdir(t, d.snapshot(name))
		Stamp(p, "vda", 0, uint64(pass+2))
		if err := live.writeAt(p, 0); err != nil {
			t.Fatal(err)
		}
	}

	for name, want := range map[string]string{"older": "ok", "newer": "overflowed"} {
		if got := read(t, d.snapshot(name, "state")); got != want {
			t.Errorf("state of %s\n got %s\nwant %s", name, got, want)
		}
	}
	image, err := os.ReadFile(d.snapshot("older", "vda.img"))
	if err != nil {
		t.Fatal(err)
	}
	if err := Verify(image[:size/2], "vda", 0, 1, 1); err != nil {
		t.Error(err)
	}
}

// TestMaxStore limits one of two snapshots, over a restart: with the first block that
// is too much it alone is lost.
func TestMaxStore(t *testing.T) {
	needRoot(t)
	const size, limit = 8 * miB, miB
	d, origin := serveOrigin(t, size)
	d.blksnap("snapshot", "create", "--max-store", "1MiB", "limited")
	mkdir(t, d.snapshot("free"))
	p := make([]byte, limit/2)
	overwrite := func(off, n int64) {
		t.Helper()
		Stamp(p[:n], "vda", off, 2)
		c := d.open("vda")
		defer c.Close()
		if err := c.writeAt(p[:n], off); err != nil {
			t.Fatal(err)
		}
	}
	states := func(when, want string) {
		t.Helper()
		for name, want := range map[string]string{"limited": want, "free": "ok"} {
			if got := read(t, d.snapshot(name, "state")); got != want {
				t.Errorf("%s: state of %s\n got %s\nwant %s", when, name, got, want)
			}
		}
	}
	overwrite(0, limit/2)
	d.kill()
	d.start(origin)
	overwrite(limit/2, limit/2)
	states("at the limit", "ok")
	shown := d.json("snapshot", "show", "limited")[0]
	if got := shown["max_store"]; got != float64(limit) {
		t.Errorf("max_store\n got %v\nwant %d", got, limit)
	}
	if got := d.blksnap("snapshot", "show", "limited"); !strings.Contains(got, "max_store  1048576 (1MiB)") {
		t.Errorf("snapshot show does not tell the limit:\n%s", got)
	}
	overwrite(limit, 4*kiB)
	states("over the limit", "overflowed")
	if got := d.blksnap("events"); !strings.Contains(got, "snapshot-overflowed  vda  limited") {
		t.Errorf("events do not tell:\n%s", got)
	}
	image, err := os.ReadFile(d.snapshot("free", "vda.img"))
	if err != nil {
		t.Fatal(err)
	}
	if err := Verify(image[:size/2], "vda", 0, 1, 1); err != nil {
		t.Error(err)
	}
	wantRefused(t, d.try("snapshot", "create", "--max-store", "1KiB", "tiny"), 1, "1024")

	// An image that is written to.
	d.blksnap("snapshot", "create", "--max-store", "1MiB", "--writable", "w")
	w := d.open("vda@w")
	if err := errors.Join(w.writeAt(p, 0), w.writeAt(p, limit)); err != nil {
		t.Fatal(err)
	}
	if err := w.writeAt(p[:4*kiB], 2*limit); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write beyond the limit\n got %v\nwant %v", err, syscall.ENOSPC)
	}
	if got := read(t, d.snapshot("w", "state")); got != "ok" {
		t.Errorf("state of the image that was written to\n got %s\nwant ok", got)
	}
}

// What has become of a lost snapshot is known after each restart, until it is destroyed,
// and takes no space.
func TestOverflowOutlivesTheDaemon(t *testing.T) {
	needRoot(t)
	const size, limit = 4 * miB, miB
	dir := scratch(t)
	origin := makeOrigin(t, dir, "vda", size)
	args := []string{"--store", "file:" + dir + "/store:8MiB", origin}
	d := serve(t, args...)
	d.blksnap("snapshot", "create", "--max-store", fmt.Sprint(limit), "old")
	if err := d.open("vda").writeAt(bytes.Repeat([]byte{1}, 2*limit), 0); err != nil {
		t.Fatal(err)
	}
	for round := range 3 {
		if round > 0 {
			d.kill()
			d.start(args...)
		}
		for _, path := range []string{d.snapshot("old", "state"), d.snapshot("old", "vda.state")} {
			if got, want := read(t, path), "overflowed"; got != want {
				t.Errorf("start %d: %s\n got %s\nwant %s", round, path, got, want)
			}
		}
		if _, err := os.ReadFile(d.snapshot("old", "vda.img")); !errors.Is(err, syscall.EIO) {
			t.Errorf("start %d: the image reads with error %v, want EIO", round, err)
		}
		if got := d.json("snapshot", "show", "old")[0]["max_store"]; got != float64(limit) {
			t.Errorf("start %d: max_store\n got %v\nwant %d", round, got, limit)
		}
		if part := d.json("store", "list", "--json")[0]; part["used"] != 0.0 {
			t.Errorf("start %d: there is %v in the snapstore, want nothing used", round, part)
		}
	}
	destroy(t, d, "old")
	d.kill()
	d.start(args...)
	if exists(d.snapshot("old")) {
		t.Error("the destroyed snapshot is back")
	}
}
