// Starting, stopping, and everything that can happen to a daemon in between.

package test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCleanStop(t *testing.T) {
	needRoot(t)
	d, origin := serveOrigin(t, 16*miB)
	if got, want := d.uris, []string{"vda  16777216  " + d.uri("vda")}; !slices.Equal(got, want) {
		t.Errorf("serve printed\n got %q\nwant %q", got, want)
	}
	live := d.open("vda")
	p := make([]byte, miB)
	Stamp(p, "vda", 0, 2)
	if err := live.writeAt(p, 0); err != nil {
		t.Fatal(err)
	}
	mkdir(t, d.snapshot("s1"))
	generation := read(t, d.device("vda", "cbt", "generation"))
	number := readNumber(t, d.device("vda", "cbt", "number"))

	d.stop() // with a client connected and a snapshot open
	for _, path := range []string{d.socket(), filepath.Join(d.runDir, "control.sock")} {
		if exists(path) {
			t.Errorf("the stopped daemon left %s", path)
		}
	}
	if r := d.try("device", "list"); r.status != 1 {
		t.Errorf("a command to a stopped daemon ends with status %d: %s", r.status, r.stderr)
	}
	content, err := os.ReadFile(origin)
	if err != nil {
		t.Fatal(err)
	}
	if err := Verify(content[:miB], "vda", 0, 2, 2); err != nil {
		t.Error(err)
	}

	d.start(origin)
	if got := read(t, d.device("vda", "cbt", "generation")); got != generation {
		t.Errorf("the generation went from %s to %s, but nobody wrote to the origin", generation, got)
	}
	if got := read(t, d.device("vda", "cbt", "since", fmt.Sprint(number))); got != "" {
		t.Errorf("changed since the snapshot before the stop: %q, want nothing", got)
	}
	image, err := os.ReadFile(d.snapshot("s1", "vda.img"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(image, content) {
		t.Error("the image is not what it was before the stop")
	}
}

// After SIGKILL every acknowledged write is in the origin, and the next start
// clears the stale mount. Snapshots and history go on.
func TestKillAndStartAgain(t *testing.T) {
	needRoot(t)
	d, origin := serveOrigin(t, 16*miB)
	for round := range uint64(3) {
		live := d.open("vda")
		mkdir(t, d.snapshot("s1"))
		p := make([]byte, miB)
		Stamp(p, "vda", 0, 2+round)
		if err := live.writeAt(p, 0); err != nil {
			t.Fatal(err)
		}
		number := readNumber(t, d.device("vda", "cbt", "number"))
		d.kill()
		if _, err := os.ReadDir(d.mount); !errors.Is(err, syscall.ENOTCONN) {
			t.Errorf("the tree of a killed daemon is read with error %v, want ENOTCONN", err)
		}

		d.start(origin)
		got := make([]byte, miB)
		if err := d.open("vda").readAt(got, 0); err != nil {
			t.Fatal(err)
		}
		if err := Verify(got, "vda", 0, 2+round, 2+round); err != nil {
			t.Error(err)
		}
		if got, want := read(t, d.device("vda", "cbt", "since", fmt.Sprint(number))), "0 1048576 data"; got != want {
			t.Errorf("changed since the snapshot before the kill\n got %q\nwant %q", got, want)
		}
		image, err := os.ReadFile(d.snapshot("s1", "vda.img"))
		if err != nil {
			t.Fatal(err)
		}
		if round > 0 {
			if err := Verify(image[:miB], "vda", 0, 1+round, 1+round); err != nil {
				t.Errorf("the image after the kill: %v", err)
			}
		}
		rmdir(t, d.snapshot("s1"))
	}
}

func TestUnmountFromOutside(t *testing.T) {
	needRoot(t)
	t.Run("without clients the daemon stops", func(t *testing.T) {
		d, _ := serveOrigin(t, 4*miB)
		run(t, "umount", d.mount)
		d.waitForEnd()
		if got := d.cmd.ProcessState.ExitCode(); got != 0 {
			t.Errorf("the daemon ended with %v, want status 0", d.cmd.ProcessState)
		}
	})
	t.Run("with a client it stays until that leaves", func(t *testing.T) {
		d, _ := serveOrigin(t, 4*miB)
		live := d.open("vda")
		run(t, "umount", d.mount)
		p := make([]byte, 64*kiB)
		for pass := uint64(2); pass < 100; pass++ {
			Stamp(p, "vda", 0, pass)
			if err := live.writeAt(p, 0); err != nil {
				t.Fatalf("write without a tree: %v", err)
			}
		}
		if err := live.request(NBD_CMD_DISC, 0, 0, 0, nil); err != nil {
			t.Fatal(err)
		}
		live.Close()
		d.waitForEnd()
	})
	t.Run("a busy tree stays", func(t *testing.T) {
		d, _ := serveOrigin(t, 4*miB)
		mkdir(t, d.snapshot("s1"))
		f, err := os.Open(d.snapshot("s1", "vda.img"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := unix.Unmount(d.mount, 0); !errors.Is(err, unix.EBUSY) {
			t.Errorf("umount of a tree in use: %v, want EBUSY", err)
		}
		readAt(t, f, 0, miB)
	})
}

// Devices come and go while others work.
func TestDevicesComeAndGo(t *testing.T) {
	needRoot(t)
	d, origin := serveOrigin(t, 8*miB)
	stop := make(chan struct{})
	worked := make(chan error, 1)
	live := d.open("vda")
	go func() {
		p := make([]byte, 64*kiB)
		for pass := uint64(2); ; pass++ {
			select {
			case <-stop:
				worked <- nil
				return
			default:
			}
			Stamp(p, "vda", 0, pass)
			if err := live.writeAt(p, 0); err != nil {
				worked <- err
				return
			}
		}
	}()

	other := makeOrigin(t, d.dir, "other", 4*miB)
	for range 5 {
		d.blksnap("device", "add", "vdb="+other)
		if got, want := read(t, d.device("vdb", "origin")), other; got != want {
			t.Errorf("origin of vdb\n got %s\nwant %s", got, want)
		}
		p := make([]byte, miB)
		Stamp(p, "vdb", 0, 2)
		client := d.open("vdb")
		if err := client.writeAt(p, 0); err != nil {
			t.Fatal(err)
		}
		mkdir(t, d.snapshot("both"))
		if !exists(d.snapshot("both", "vdb.img")) {
			t.Error("a snapshot of all devices lacks the one that was added")
		}
		if r := d.try("device", "remove", "vdb"); r.status != 1 {
			t.Errorf("a device with a snapshot is removed with status %d, want 1", r.status)
		}
		rmdir(t, d.snapshot("both"))
		client.Close()
		eventually(t, "the device without clients is removed", func() bool { return d.try("device", "remove", "vdb").status == 0 })
		if exists(d.device("vdb")) {
			t.Error("the removed device is still in the tree")
		}
	}
	close(stop)
	if err := <-worked; err != nil {
		t.Errorf("write while devices come and go: %v", err)
	}
	if r := d.try("device", "add", origin); r.status != 1 {
		t.Errorf("an origin is added a second time with status %d", r.status)
	}
}

// An origin that fails is failed, and nothing else is. A loop device whose
// backing file is cut short answers EIO.
func TestOriginFails(t *testing.T) {
	needRoot(t)
	dir := scratch(t)
	backing := makeOrigin(t, dir, "backing", 8*miB)
	d := serve(t, makeOrigin(t, dir, "vda", 4*miB), "vdb="+loop(t, backing, false))
	mkdir(t, d.snapshot("s1"))
	bad, good := d.open("vdb"), d.open("vda")
	if err := os.Truncate(backing, 0); err != nil {
		t.Fatal(err)
	}

	p := make([]byte, miB)
	// Not where the daemon itself has read, which is in the page cache.
	if err := bad.readAt(p, 4*miB); !errors.Is(err, syscall.EIO) {
		t.Errorf("read of an origin that fails: %v, want EIO", err)
	}
	Stamp(p, "vda", 0, 2)
	if err := good.writeAt(p, 0); err != nil {
		t.Errorf("write to the other device: %v", err)
	}
	if got, want := read(t, d.device("vda", "state")), "ok"; got != want {
		t.Errorf("state of the other device\n got %s\nwant %s", got, want)
	}
	if got := read(t, d.device("vdb", "state")); !strings.HasPrefix(got, "failed: ") {
		t.Errorf("state of the device whose origin fails\n got %s\nwant failed: and why", got)
	}
	image := make([]byte, miB)
	f, err := os.Open(d.snapshot("s1", "vda.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(image, 0); err != nil {
		t.Fatal(err)
	}
	if err := Verify(image, "vda", 0, 1, 1); err != nil {
		t.Error(err)
	}
	f.Close()

	// Nothing that was written is lost, so the stop is a clean one; it says what it could
	// not bring to an end.
	d.signal(syscall.SIGTERM)
	const want = `msg="the change map cannot be written down: after a reboot more counts as changed" device=vdb`
	if got := d.cmd.ProcessState.ExitCode(); got != 0 || !strings.Contains(d.stderr.String(), want) {
		t.Errorf("after SIGTERM the daemon ended with %v, want status 0 and %s", d.cmd.ProcessState, want)
	}
}
