// Parts of the snapstore that come while snapshots are open.

package test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestStoreGrowsInTime runs blksnap store add from --on-store-low, as the manual
// shows it, while more is written than the store holds at first: no snapshot is
// lost, nor by a restart.
func TestStoreGrowsInTime(t *testing.T) {
	needRoot(t)
	dir := scratch(t)
	grow := filepath.Join(dir, "grow.sh")
	// $BLKSNAP stands for the path of the program.
	script := "n=$(ls " + dir + "/part-* 2>/dev/null | wc -l)\n" +
		"echo size $BLKSNAP_STORE_SIZE free $BLKSNAP_STORE_FREE rate $BLKSNAP_STORE_RATE left $BLKSNAP_STORE_LEFT >> " + dir + "/told\n" +
		blksnapPath + " store add file:" + dir + "/part-$n:96MiB\n"
	write(t, grow, []byte(script))
	d, origin := serveOrigin(t, 256*miB, "--store", "file:"+filepath.Join(dir, "first")+":96MiB",
		"--store-wait", "30s", "--on-store-low", "sh "+grow)
	before := make([]byte, 256*miB)
	content, err := os.ReadFile(origin)
	if err != nil {
		t.Fatal(err)
	}
	copy(before, content)
	mkdir(t, d.snapshot("s"))
	live := d.open("vda")
	p := make([]byte, miB)
	for off := int64(0); off < 192*miB; off += miB {
		Stamp(p, "vda", off, 2)
		if err := live.writeAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	live.Close()
	check := func(when string) {
		t.Helper()
		if got := read(t, d.snapshot("s", "state")); got != "ok" {
			t.Errorf("%s: the snapshot is %s\n%s", when, got, d.stderr)
		}
		image, err := os.ReadFile(d.snapshot("s", "vda.img"))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(image, before) {
			t.Errorf("%s: the image is not what the device held", when)
		}
	}
	check("after it was written over")
	if told := read(t, dir, "told"); !strings.Contains(told, "size 100663296 free ") {
		t.Errorf("the command was told %q", told)
	}
	parts := len(d.json("store", "list", "--json"))
	if parts < 2 {
		t.Errorf("%d part of the store, want more", parts)
	}
	d.kill()
	d.start(origin, "--store", "file:"+filepath.Join(dir, "first")+":96MiB")
	check("after a restart")
	if got := len(d.json("store", "list", "--json")); got != parts {
		t.Errorf("after a restart there are %d parts, want %d", got, parts)
	}
}

// TestStoreOnOurOwnExports adds parts that would wait for themselves: on a file system
// in the device, on one in an image, and on the block device itself.
func TestStoreOnOurOwnExports(t *testing.T) {
	needRoot(t)
	d, _ := serveOrigin(t, 64*miB)
	dev := attach(t, d, "vda")
	run(t, "mkfs.ext4", "-q", "-F", dev)
	d.blksnap("snapshot", "create", "w", "--writable")
	image := mount(t, loop(t, d.snapshot("w", "vda.img"), false), "ext4", "")
	image2 := mount(t, attach(t, d, "vda@w"), "ext4", "ro,noload")
	live := mount(t, dev, "ext4", "")
	parts := len(d.json("store", "list", "--json"))
	for what, spec := range map[string]string{
		"in the device":           "file:" + live + "/part:1MiB",
		"in an image of the tree": "file:" + image + "/part:1MiB",
		"in an exported image":    "file:" + image2 + "/part:1MiB",
		"the device itself":       "dev:" + dev,
	} {
		r := d.try("store", "add", "--force", spec)
		if r.status != 1 || !strings.Contains(r.stderr, "it stands on ") || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%s: status %d, %q; want status 1 and one line with what it stands on", what, r.status, r.stderr)
		}
	}
	if exists(filepath.Join(live, "part")) || exists(filepath.Join(image, "part")) {
		t.Error("a part was made")
	}
	if got := len(d.json("store", "list", "--json")); got != parts {
		t.Errorf("there are %d parts, want %d", got, parts)
	}
	write(t, filepath.Join(live, "file"), []byte("the device goes on"))
	run(t, "sync", "-f", live)
}

// TestStoreOnOthersExports adds a part on a file system that another process serves
// over NBD.
func TestStoreOnOthersExports(t *testing.T) {
	needRoot(t)
	other := filepath.Join(scratch(t), "other.img")
	write(t, other, make([]byte, 16*miB))
	dev := loop(t, nbdkitFile(t, other), false)
	run(t, "mkfs.ext4", "-q", "-F", dev)
	served := mount(t, dev, "ext4", "")
	d, _ := serveOrigin(t, 4*miB)
	d.blksnap("store", "add", "file:"+served+"/part:1MiB")
	if got := d.json("store", "list", "--json"); len(got) != 2 || got[1]["state"] != "ok" {
		t.Errorf("the parts are %v, want two", got)
	}
}

// nbdkitFile serves a file by nbdkit, with a filter perhaps and what that is told,
// and returns the path of one that reads and writes it.
func nbdkitFile(t *testing.T, file string, filter ...string) string {
	t.Helper()
	need(t, "nbdkit")
	socket := filepath.Join(scratch(t), "other.sock")
	args := []string{"--foreground", "--exit-with-parent", "--unix", socket}
	if len(filter) > 0 {
		args, filter = append(args, filter[0]), filter[1:]
	}
	cmd := exec.Command("nbdkit", append(append(args, "file", file), filter...)...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	eventually(t, "nbdkit listens", func() bool { return exists(socket) })
	return fuseFile(t, "nbd+unix:///?socket="+socket)
}

// TestStoreLowAtStart fills the snapstore, and starts a daemon with a command for that.
func TestStoreLowAtStart(t *testing.T) {
	needRoot(t)
	dir := scratch(t)
	store := "file:" + filepath.Join(dir, "store") + ":16MiB"
	d, origin := serveOrigin(t, 32*miB, "--store", store)
	mkdir(t, d.snapshot("s"))
	live := d.open("vda")
	p := make([]byte, 12*miB)
	Stamp(p, "vda", 0, 2)
	if err := live.writeAt(p, 0); err != nil {
		t.Fatal(err)
	}
	live.Close()
	d.kill()
	told := filepath.Join(dir, "told")
	d.start(origin, "--store", store, "--on-store-low", blksnapPath+" store add mem:32MiB && echo $BLKSNAP_STORE_FREE >> "+told)
	eventually(t, "the command has run", func() bool { return exists(told) && read(t, told) != "" })
	if got := len(d.json("store", "list", "--json")); got != 2 {
		t.Errorf("the store has %d parts, want 2", got)
	}
}

// TestStoreIsEmptyAgain destroys all snapshots: the file takes no space any more, and
// the memory is the system's.
func TestStoreIsEmptyAgain(t *testing.T) {
	needRoot(t)
	const size = 128 * miB
	d := newDaemon(t, nil)
	d.path = production(t) // the race detector's memory grows with what it has seen
	file := filepath.Join(d.dir, "store")
	d.start(makeOrigin(t, d.dir, "vda", size), "--store", "mem:64MiB", "--store", "file:"+file)
	live := d.open("vda")
	before := anonymous(t, d)
	p := make([]byte, miB)
	for n, name := range []string{"a", "b"} {
		d.blksnap("snapshot", "create", "--writable", name)
		for off := int64(0); off < size/2; off += miB {
			Stamp(p, "vda", off, uint64(n+2))
			if err := live.writeAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
	}
	image := d.open("vda@b")
	if err := image.writeAt(p, size/2); err != nil {
		t.Fatal(err)
	}
	image.Close()
	if got := blocks(t, file); got < size/2 {
		t.Fatalf("the file takes %d bytes on disk, want at least %d", got, size/2)
	}
	if got := anonymous(t, d); got < before+48*miB {
		t.Fatalf("the daemon has %d bytes of memory, want at least 48 MiB more than %d", got, before)
	}
	d.blksnap("snapshot", "destroy", "a", "b")
	for _, part := range d.json("store", "list", "--json") {
		if part["used"] != 0.0 || part["free"] != part["size"] {
			t.Errorf("after all snapshots are destroyed there is %v, want nothing used", part)
		}
	}
	eventually(t, "the file is empty", func() bool { return blocks(t, file) <= 64*kiB })
	eventually(t, "memory is given back", func() bool { return anonymous(t, d) < before+24*miB })
}

// anonymous is how much memory of its own the daemon has, in bytes.
func anonymous(t *testing.T, d *daemon) int64 {
	t.Helper()
	for line := range strings.Lines(read(t, "/proc/"+pid(d)+"/status")) {
		var n int64
		if _, err := fmt.Sscanf(line, "RssAnon: %d kB", &n); err == nil {
			return n * kiB
		}
	}
	t.Fatal("the kernel does not say how much memory the daemon has")
	return 0
}

// TestPartPulledOut takes a block device away under the snapstore: what needs it is
// lost, and nothing else.
func TestPartPulledOut(t *testing.T) {
	needRoot(t)
	const size = 32 * miB
	disk, gone := filepath.Join(scratch(t), "disk.img"), filepath.Join(scratch(t), "gone")
	write(t, disk, make([]byte, 16*miB))
	dev := loop(t, nbdkitFile(t, disk, "--filter=error", "error-rate=100%", "error-file="+gone), false)
	d, origin := serveOrigin(t, size, "--store", "dev:"+dev, "--store", "mem:64MiB")
	defer d.stop() // it has the device open
	live := d.open("vda")
	p := make([]byte, miB)
	overwrite := func(from, to int64, pass uint64) {
		t.Helper()
		for off := from; off < to; off += miB {
			Stamp(p, "vda", off, pass)
			if err := live.writeAt(p, off); err != nil {
				t.Fatalf("write at %d: %v", off, err)
			}
		}
	}
	mkdir(t, d.snapshot("old"))
	overwrite(0, 8*miB, 2) // into the device
	run(t, "sync", dev)
	write(t, gone, nil)
	write(t, "/proc/sys/vm/drop_caches", []byte("1"))
	overwrite(8*miB, size, 2)
	if out := sh(t, `if cp "$1" /dev/null 2>&1; then echo copied; fi`, d.snapshot("old", "vda.img")); !strings.Contains(out, "Input/output error") {
		t.Errorf("cp of the image says %q, want Input/output error", out)
	}
	if got := read(t, d.snapshot("old", "vda.state")); !strings.HasPrefix(got, "failed: ") {
		t.Errorf("the image's state is %q, want that it failed", got)
	}
	if got := d.json("store", "list", "--json")[0]["state"].(string); !strings.HasPrefix(got, "failed: ") {
		t.Errorf("the part's state is %q, want that it failed", got)
	}
	mkdir(t, d.snapshot("new"))
	overwrite(0, 8*miB, 3)
	if err := live.flush(); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string][2]uint64{d.snapshot("new", "vda.img"): {2, 2}, origin: {2, 3}} {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := Verify(content, "vda", 0, want[0], want[1]); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
	if got := read(t, d.device("vda", "state")); got != "ok" {
		t.Errorf("the device's state is %q, want ok", got)
	}
}
