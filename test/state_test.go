// state check, with a daemon and without one.

package test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestStateCheck verifies the state of a daemon that serves, writes meanwhile, and
// ends; what is spoiled is named, with what to do, and the status says so.
func TestStateCheck(t *testing.T) {
	needRoot(t)
	d, origin := serveOrigin(t, 8*miB)
	mkdir(t, d.snapshot("s1"))
	dev := d.open("vda")
	p := bytes.Repeat([]byte{1}, 64*kiB)
	for off := int64(0); off < 4*miB; off += int64(len(p)) {
		if err := dev.writeAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	d.blksnap("snapshot", "create", "--writable", "s2")

	writing, stop := make(chan error, 1), make(chan struct{})
	go func() {
		var err error
		for off := int64(0); err == nil; off = (off + int64(len(p))) % (8 * miB) {
			select {
			case <-stop:
				writing <- nil
				return
			default:
				err = dev.writeAt(p, off)
			}
		}
		writing <- err
	}()
	for range 5 {
		if out := d.blksnap("state", "check"); out != "" {
			t.Errorf("sound state of a daemon under load: %s", out)
		}
		d.blksnap("snapshot", "create", "more")
		d.blksnap("snapshot", "destroy", "more")
	}
	close(stop)
	if err := <-writing; err != nil {
		t.Fatal(err)
	}
	// Found by its lock where the command was told of another control socket.
	offline := []string{"state", "check", "--run", d.runDir, "--state", d.state}
	wantSound := func(when string, args ...string) {
		t.Helper()
		if r := d.try(args...); r.status != 0 || r.stdout+r.stderr != "" {
			t.Errorf("%s\n got status %d, %s%s\nwant status 0 and silence", when, r.status, r.stdout, r.stderr)
		}
	}
	wantSound("another control socket", append(offline, "--control", filepath.Join(d.dir, "none.sock"))...)

	tear := filepath.Join(d.state, "devices", "vda", "rollback")
	line := tear + ": damaged state: note of a rollback: no magic; roll the device back to an older snapshot, or restore it, then remove and add it\n"
	spoiled := func(when string, args ...string) {
		t.Helper()
		if err := os.WriteFile(tear, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		r := d.try(args...)
		if r.status != 1 || r.stdout != line || r.stderr != "blksnap: the state has 1 problem\n" {
			t.Errorf("%s\n got status %d, %q, %q\nwant status 1, %q", when, r.status, r.stdout, r.stderr, line)
		}
		r = d.try(append(args, "--json")...)
		if want := `{"file":"` + tear + `","problem":"damaged state: note of a rollback: no magic","advice":"roll`; !strings.HasPrefix(r.stdout, want) {
			t.Errorf("%s, as JSON\n got %s\nwant %s", when, r.stdout, want)
		}
		if err := os.Remove(tear); err != nil {
			t.Fatal(err)
		}
	}
	spoiled("spoiled, with a daemon", "state", "check")

	d.kill()
	wantSound("killed", offline...)
	spoiled("spoiled, without a daemon", offline...)
	d.start(origin)
	d.stop()
	wantSound("stopped", offline...)
	if r := d.try("state", "check"); r.status != 1 || !strings.Contains(r.stderr, "name its directories with --run and --state") {
		t.Errorf("no daemon and no directory\n got status %d, %s", r.status, r.stderr)
	}
	wantSound("nothing at all", "state", "check", "--run", filepath.Join(d.dir, "a"), "--state", filepath.Join(d.dir, "b"))
	if exists(filepath.Join(d.dir, "a")) || exists(filepath.Join(d.dir, "b")) {
		t.Error("it made directories")
	}
}
