// Devices that become what they were.

package test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// rollbackSite is a daemon with a device, vda, and three snapshots of it, older,
// target and newer. Between two of them, and after the last, all of its first half is
// written.
type rollbackSite struct {
	d      *daemon
	before string   // a copy of what the device held at target
	sums   []string // of older and newer
	size   int64
}

func newRollbackSite(t *testing.T, origin string, size int64, args ...string) *rollbackSite {
	t.Helper()
	s := &rollbackSite{size: size, before: filepath.Join(scratch(t), "before")}
	s.d = serve(t, append([]string{"vda=" + origin}, args...)...)
	live := s.d.open("vda")
	p := make([]byte, size/2)
	for pass, name := range []string{"older", "target", "newer"} {
		s.d.blksnap("snapshot", "create", "--writable", name)
		if name == "target" {
			run(t, "cp", s.d.snapshot(name, "vda.img"), s.before)
		}
		Stamp(p, "vda", 0, uint64(pass+2))
		if err := live.writeAt(p, 0); err != nil {
			t.Fatal(err)
		}
	}
	live.Close()
	s.sums = s.others(t)
	return s
}

func (s *rollbackSite) others(t *testing.T) []string {
	t.Helper()
	return []string{checksum(t, s.d.snapshot("older", "vda.img")), checksum(t, s.d.snapshot("newer", "vda.img"))}
}

// wantRolledBack checks the device and the other images.
func (s *rollbackSite) wantRolledBack(t *testing.T, origin string) {
	t.Helper()
	run(t, "cmp", s.before, origin)
	if got := s.others(t); !slices.Equal(got, s.sums) {
		t.Errorf("checksums of the older and the newer image\n got %v\nwant %v", got, s.sums)
	}
	for _, path := range []string{s.d.device("vda", "state"), s.d.snapshot("target", "state")} {
		if got := read(t, path); got != "ok" {
			t.Errorf("%s\n got %s\nwant ok", path, got)
		}
	}
}

func TestRollback(t *testing.T) {
	needRoot(t)
	const size = 16 * miB
	dir := scratch(t)
	origin, other := makeOrigin(t, dir, "vda", size), makeOrigin(t, dir, "vdb", miB)
	s := newRollbackSite(t, origin, size, other)
	d := s.d
	backup := filepath.Join(d.dir, "backup")
	sh(t, `cp "$1.img" "$2"; cat "$1.cbt/number" > "$2.number"`, d.snapshot("newer", "vda"), backup)
	p := make([]byte, 64*kiB)
	Stamp(p, "vdb", 0, 9)
	vdbClient := d.open("vdb") // is not in the way
	if err := errors.Join(d.open("vda@target").writeAt(p, 0), vdbClient.writeAt(p, 0)); err != nil {
		t.Fatal(err)
	}
	now, vdb := checksum(t, origin), checksum(t, other)

	client := d.open("vda")
	for _, args := range [][]string{{"target"}, {"target", "--device", "vda"}} {
		wantRefused(t, d.try(append([]string{"snapshot", "rollback"}, args...)...), 1, "device vda has 1 NBD connection open")
	}
	wantRefused(t, d.try("snapshot", "rollback", "none"), 1, "none")
	wantRefused(t, d.try("snapshot", "rollback", "target", "--device", "vdc"), 1, "vdc")
	if got := checksum(t, origin); got != now {
		t.Error("a refused rollback changed the device")
	}
	if got, want := d.blksnap("snapshot", "rollback", "target", "--device", "vda", "--force"), "vda rolled back to target"; got != want {
		t.Errorf("snapshot rollback\n got %q\nwant %q", got, want)
	}
	if err := client.writeAt(p, 0); err == nil {
		t.Error("a client that should have been disconnected writes on")
	}
	s.wantRolledBack(t, origin)
	if got := checksum(t, other); got != vdb {
		t.Error("another device was rolled back, too")
	}
	events := d.blksnap("events")
	for _, want := range []string{"rollback-begun  vda  target", "rollback-ended  vda  target  done in "} {
		if !strings.Contains(events, want) {
			t.Errorf("events\n got %s\nwant %q in it", events, want)
		}
	}

	// The next increment brings a copy back as well.
	mkdir(t, d.snapshot("after"))
	sh(t, incrementScript(t), d.snapshot("after", "vda"), backup)
	run(t, "cmp", s.before, backup)

	// All devices, whose clients have just left; and over a restart.
	d.open("vda").Close()
	vdbClient.Close()
	if got, want := d.blksnap("snapshot", "rollback", "after"), "vda, vdb rolled back to after"; got != want {
		t.Errorf("snapshot rollback\n got %q\nwant %q", got, want)
	}
	d.kill()
	d.start("vda="+origin, other)
	s.wantRolledBack(t, origin)
	if got := checksum(t, other); got != vdb {
		t.Error("the other device is not what it was at the snapshot")
	}
}

// TestRollbackWithoutRoom is refused, and has changed nothing, where the snapstore
// has no room for what a newer snapshot needs.
func TestRollbackWithoutRoom(t *testing.T) {
	needRoot(t)
	const size = 4 * miB
	origin := makeOrigin(t, scratch(t), "vda", size)
	d := serve(t, origin, "--store", "mem:3MiB")
	d.blksnap("snapshot", "create", "target")
	p := make([]byte, 2*miB)
	Stamp(p, "vda", 0, 2)
	live := d.open("vda")
	if err := live.writeAt(p, 0); err != nil {
		t.Fatal(err)
	}
	live.Close()
	mkdir(t, d.snapshot("newer"))
	now := checksum(t, origin)
	wantRefused(t, d.try("snapshot", "rollback", "target"), 1, "full")
	if got := checksum(t, origin); got != now {
		t.Error("a refused rollback changed the device")
	}
	for _, path := range []string{d.device("vda", "state"), d.snapshot("target", "state"), d.snapshot("newer", "state")} {
		if got := read(t, path); got != "ok" {
			t.Errorf("%s\n got %s\nwant ok", path, got)
		}
	}
	rmdir(t, d.snapshot("newer"))
	d.blksnap("snapshot", "rollback", "target")
	content, err := os.ReadFile(origin)
	if err != nil {
		t.Fatal(err)
	}
	if err := Verify(content[:size/2], "vda", 0, 1, 1); err != nil {
		t.Error(err)
	}
}

// TestRollbackGoesOn ends the daemon in the middle of a rollback.
func TestRollbackGoesOn(t *testing.T) {
	needRoot(t)
	const (
		rolling  = "ok, rolling back to target"
		stopping = "the daemon is stopping, and goes on rolling back vda when it starts again"
	)
	for _, tc := range []struct {
		name   string
		signal syscall.Signal
		said   string // by the command
		status int    // of the daemon
	}{
		{"killed", syscall.SIGKILL, "EOF", -1},
		{"stopped", syscall.SIGTERM, stopping, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			origin, gate := gatedOrigin(t, 16*miB)
			s := newRollbackSite(t, origin, 16*miB)
			d := s.d
			gate.shut()
			command := make(chan result, 1)
			go func() {
				cmd, said := d.command("snapshot", "rollback", "target"), &log{}
				cmd.Stderr = said
				cmd.Run()
				command <- result{stderr: said.String(), status: cmd.ProcessState.ExitCode()}
			}()
			select {
			case <-gate.entered:
			case r := <-command:
				t.Fatalf("the rollback ended before it wrote anything: %s", r.stderr)
			}

			for what, got := range map[string]string{
				"in the tree": read(t, d.device("vda", "state")),
				"device show": fmt.Sprint(d.json("device", "show", "vda")[0]["state"]),
			} {
				if got != rolling {
					t.Errorf("state, %s\n got %s\nwant %s", what, got, rolling)
				}
			}
			for _, args := range []string{"snapshot destroy target --force", "snapshot create another", "device resize vda", "snapshot rollback newer --force"} {
				wantRefused(t, d.try(strings.Fields(args)...), 1, "rolled back")
			}
			c := &nbdConn{Conn: dial(t, d.socket())}
			if err := c.handshake("vda"); err == nil || !strings.Contains(err.Error(), "device vda is being rolled back to target") {
				t.Errorf("a client that connects meanwhile\n got %v\nwant it refused, and told why", err)
			}

			d.mayEnd = true
			d.cmd.Process.Signal(tc.signal)
			if tc.signal == syscall.SIGKILL {
				gate.open() // no process ends before its writes
			}
			r := <-command
			if r.status != 1 || !strings.Contains(r.stderr, tc.said) {
				t.Errorf("the command ended with status %d, %q\nwant 1 and %q", r.status, r.stderr, tc.said)
			}
			// The devices are closed next, much sooner than the rest is written back.
			eventually(t, "the tree is gone", func() bool { return len(mountsBelow(t, d.mount)) == 0 || tc.signal == syscall.SIGKILL })
			gate.slow.Store(int64(5 * time.Millisecond))
			gate.open()
			d.waitForEnd()
			if got := d.cmd.ProcessState.ExitCode(); got != tc.status {
				t.Errorf("the daemon ended with %v, want status %d", d.cmd.ProcessState, tc.status)
			}
			if end(t, exec.Command("cmp", s.before, origin)).status != 1 {
				t.Fatal("the rollback has ended")
			}

			gate.slow.Store(0)
			gate.shut()
			d.start("vda=" + origin)
			if got := read(t, d.device("vda", "state")); got != rolling {
				t.Errorf("state after the restart\n got %s\nwant %s", got, rolling)
			}
			gate.open()
			eventually(t, "the rollback has ended", func() bool { return read(t, d.device("vda", "state")) == "ok" })
			s.wantRolledBack(t, origin)
			events := d.blksnap("events")
			for _, want := range []string{"rollback-begun  vda  target  going on", "rollback-ended  vda  target  done in "} {
				if !strings.Contains(events, want) {
					t.Errorf("events\n got %s\nwant %q in it", events, want)
				}
			}
			d.open("vda").Close()
			rmdir(t, d.snapshot("target"))
		})
	}
}
