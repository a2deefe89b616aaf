// Devices whose origin becomes longer or shorter.

package test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// exportSize is the size that nbdinfo says an export has.
func exportSize(t *testing.T, d *daemon, export string) string {
	t.Helper()
	return run(t, "nbdinfo", "--size", d.uri(export))
}

// wantSize checks all places that say how long vda is.
func wantSize(t *testing.T, d *daemon, printed string, size int64) {
	t.Helper()
	want := fmt.Sprint(size)
	for what, got := range map[string]string{
		"device resize": printed,
		"nbdinfo":       exportSize(t, d, "vda"),
		"the tree":      read(t, d.device("vda", "size")),
		"device show":   fmt.Sprintf("%.0f", d.json("device", "show", "vda")[0]["size"]),
	} {
		if what == "device resize" {
			want := fmt.Sprintf("vda  %d  %s", size, d.uri("vda"))
			if got != want {
				t.Errorf("%s says %q, want %q", what, got, want)
			}
		} else if got != want {
			t.Errorf("%s says %s bytes, want %s", what, got, want)
		}
	}
}

func TestResize(t *testing.T) {
	needRoot(t)
	need(t, "nbdinfo")
	const size = 16 * miB
	d, origin := serveOrigin(t, size)
	backup := filepath.Join(d.dir, "backup")
	increment := func(snapshot string) {
		t.Helper()
		sh(t, incrementScript(t), d.snapshot(snapshot, "vda"), backup)
		sh(t, `cmp "$1.img" "$2"`, d.snapshot(snapshot, "vda"), backup)
	}
	mkdir(t, d.snapshot("first"))
	sh(t, `cp "$1.img" "$2"; cat "$1.cbt/number" > "$2.number"`, d.snapshot("first", "vda"), backup)
	first := checksum(t, d.snapshot("first", "vda.img"))
	before := d.open("vda")
	p := make([]byte, 64*kiB)

	// Larger, under a client that does not know.
	if err := os.Truncate(origin, 2*size); err != nil {
		t.Fatal(err)
	}
	wantSize(t, d, d.blksnap("device", "resize", "vda"), 2*size)
	Stamp(p, "vda", 0, 2)
	if err := before.writeAt(p, 0); err != nil {
		t.Errorf("a write by a client from before: %v", err)
	}
	if err := before.writeAt(p, size); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a write beyond the size that the client was told\n got %v\nwant %v", err, syscall.ENOSPC)
	}
	after := d.open("vda")
	Stamp(p, "vda", 2*size-64*kiB, 2)
	if err := errors.Join(after.writeAt(p, 2*size-64*kiB), before.readAt(p, 0)); err != nil {
		t.Error(err)
	}
	mkdir(t, d.snapshot("larger"))
	increment("larger")
	larger := checksum(t, d.snapshot("larger", "vda.img"))
	images := func(when string) {
		t.Helper()
		for name, want := range map[string]string{"first": first, "larger": larger} {
			if got := checksum(t, d.snapshot(name, "vda.img")); got != want {
				t.Errorf("%s: image of the snapshot %s\n got %s\nwant %s", when, name, got, want)
			}
		}
		if got := exportSize(t, d, "vda@first"); got != fmt.Sprint(size) {
			t.Errorf("%s: the first image has %s bytes, want %d", when, got, size)
		}
	}
	images("when it was made larger")
	generation := read(t, d.device("vda", "cbt", "generation"))
	d.kill()
	d.start(origin)
	images("after a restart")

	// Smaller; what was cut is in the images.
	after = d.open("vda")
	wantSize(t, d, d.blksnap("device", "resize", "--shrink", "8MiB", "vda"), size/2)
	if got := fileSize(t, origin); got != size/2 {
		t.Errorf("the origin has %d bytes, want %d", got, size/2)
	}
	images("when it was cut")
	if err := after.readAt(p, size); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("a read of what was cut, by a client from before\n got %v\nwant %v", err, syscall.EINVAL)
	}
	mkdir(t, d.snapshot("smaller"))
	increment("smaller")

	// Cut by somebody else: who needs what is gone is lost, who does not is not.
	p = make([]byte, size/4)
	Stamp(p, "vda", size/4, 3)
	if err := d.open("vda").writeAt(p, size/4); err != nil {
		t.Fatal(err)
	}
	mkdir(t, d.snapshot("lost"))
	if err := os.Truncate(origin, size/4); err != nil {
		t.Fatal(err)
	}
	wantSize(t, d, d.blksnap("device", "resize", "vda"), size/4)
	if got := read(t, d.snapshot("lost", "state")); !strings.HasPrefix(got, "failed: the origin was cut") {
		t.Errorf("state of an image that needs what was cut\n got %s\nwant failed, and why", got)
	}
	images("when it was cut behind our back")
	if got := read(t, d.device("vda", "state")); got != "ok" {
		t.Errorf("state of the device\n got %s\nwant ok", got)
	}
	d.kill()
	d.start(origin)
	images("after another restart")
	if got := read(t, d.device("vda", "cbt", "generation")); got != generation {
		t.Errorf("generation\n got %s\nwant %s, as before all that", got, generation)
	}
	if got := d.blksnap("events"); strings.Contains(got, "generation") {
		t.Errorf("a new generation has begun:\n%s", got)
	}
}

// fileSize is a file's length in bytes.
func fileSize(t *testing.T, path string) int64 {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Size()
}

// TestResizeBlockDevice makes the disk below a device longer.
func TestResizeBlockDevice(t *testing.T) {
	needRoot(t)
	need(t, "nbdinfo")
	const size = 8 * miB
	disk := makeOrigin(t, scratch(t), "disk", size)
	dev := loop(t, disk, false)
	d := serve(t, "vda="+dev)
	mkdir(t, d.snapshot("s1"))
	sum := checksum(t, d.snapshot("s1", "vda.img"))
	if err := os.Truncate(disk, 2*size); err != nil {
		t.Fatal(err)
	}
	setCapacity(t, dev)
	wantSize(t, d, d.blksnap("device", "resize", "vda"), 2*size)
	p := make([]byte, 2*size)
	Stamp(p, "vda", 0, 2)
	live := d.open("vda")
	if err := errors.Join(live.writeAt(p, 0), live.flush()); err != nil {
		t.Fatal(err)
	}
	if got := checksum(t, d.snapshot("s1", "vda.img")); got != sum {
		t.Errorf("image from before\n got %s\nwant %s", got, sum)
	}
	content, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	if err := Verify(content, "vda", 0, 2, 2); err != nil {
		t.Error(err)
	}
	wantRefused(t, d.try("device", "resize", "--shrink", "4MiB", "vda"), 1, "shrink vda")
	if got := read(t, d.device("vda", "state")); got != "ok" {
		t.Errorf("state after a refused cut\n got %s\nwant ok", got)
	}
}

// setCapacity lets a loop device look at the size of its file again.
func setCapacity(t *testing.T, dev string) {
	t.Helper()
	f, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		t.Fatal(err)
	}
}
