package cow

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestTearFormat: the bytes below are the format. A program that cannot read them any
// more would serve a torn device as a sound one: raise the version instead of
// changing them.
func TestTearFormat(t *testing.T) {
	want := append([]byte("blksnapT\x01\x00\x00\x00\xbe\x4a\x30\xf0"+
		"\x02\x01\x00\x00\x00\x00\x00\x00"+"\x07\x00\x00\x00\x00\x00\x00\x00"+"nightly"), make([]byte, 57)...)
	got := (&tear{number: 258, snapshot: "nightly"}).encode()
	if !bytes.Equal(got, want) {
		t.Errorf("encoded:\n got %q\nwant %q", got, want)
	}
	if r, err := decodeTear(want); err != nil || *r != (tear{number: 258, snapshot: "nightly"}) {
		t.Errorf("decoded: got %+v, %v", r, err)
	}
	for at := range want {
		b := bytes.Clone(want)
		b[at] ^= 1
		if _, err := decodeTear(b); !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrVersion) {
			t.Errorf("with another byte %d: got %v, want ErrDamaged or ErrVersion", at, err)
		}
	}
	if _, err := decodeTear(want[:40]); !errors.Is(err, ErrDamaged) {
		t.Errorf("cut short: got %v, want ErrDamaged", err)
	}
}

// tearHome tears a device: it has 2 in its first half, which the snapshot "lost" had 1
// in. The snapshot "before" has 1 everywhere, and all of it is preserved.
func tearHome(t *testing.T) (h *home, before *Snapshot) {
	t.Helper()
	const size = 4 << 20
	h = newHome(t, size)
	h.state = filepath.Join(h.dir, "state")
	h.open()
	put(t, h.dev, 1, 0, size)
	before = h.take("before")
	lost := image(t, h.take("lost"), "vda")
	put(t, h.dev, 2, 0, size)
	writes := 0
	h.step = func(what string) {
		if what == "write back" {
			if writes++; writes == 2 {
				h.dev.breakImage(lost, failed("test"), errIO)
			}
		}
	}
	h.cat.step = h.step
	if err := lost.Rollback(); !errors.Is(err, ErrFailed) {
		t.Fatalf("a rollback to an image that is lost: got %v, want ErrFailed", err)
	}
	h.step, h.cat.step = nil, nil
	return h, before
}

const tornState = "failed: a rollback to lost did not end"

// TestTear has a device say that it is torn, also after a restart, until it is rolled
// back to a snapshot from before that.
func TestTear(t *testing.T) {
	for _, restarts := range []bool{false, true} {
		h, before := tearHome(t)
		told := 0
		h.notify = func(e Event) {
			if e.Kind == EventRollbackFailed {
				told++
			}
		}
		restart := func() {
			if restarts {
				h.close()
				before = h.open()["before"]
			}
		}
		wantTorn := func(when string, want bool) {
			t.Helper()
			if got := strings.HasPrefix(h.dev.State(), tornState); got != want {
				t.Errorf("%s: state %q, want torn: %v", when, h.dev.State(), want)
			}
		}
		wantTorn("after a rollback that did not end", true)
		restart()
		wantTorn("after a restart", true)
		put(t, h.dev, 3, 0, 512) // it is served
		later := h.take("later")
		put(t, h.dev, 4, 0, 8192)
		if err := image(t, later, "vda").Rollback(); err != nil {
			t.Fatal(err)
		}
		wantTorn("after a rollback to a snapshot of the torn device", true)
		want(t, h.dev, 3, 0, 512)
		restart()
		if err := image(t, before, "vda").Rollback(); err != nil {
			t.Fatal(err)
		}
		wantTorn("after a rollback to an older snapshot", false)
		want(t, h.dev, 1, 0, h.size)
		restart()
		wantTorn("after another restart", false)
		if restarts && told != 2 {
			t.Errorf("told %d times, want at each of two starts", told)
		}
		h.close()
	}
}

// TestTearIsOfUnknownSnapshot damages the note.
func TestTearIsOfUnknownSnapshot(t *testing.T) {
	h, _ := tearHome(t)
	path := h.dev.tearPath()
	h.close()
	if err := os.WriteFile(path, []byte("blksnapT"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := h.open()["before"]
	const want = "failed: a rollback to an unknown snapshot did not end"
	for range 2 {
		if got := h.dev.State(); !strings.HasPrefix(got, want) {
			t.Errorf("state: got %q, want %q…", got, want)
		}
		// Nobody knows which snapshots are older.
		if err := image(t, before, "vda").Rollback(); err != nil {
			t.Error(err)
		}
	}
	h.close()
}

// TestTearCannotBeNoted rolls back where the state cannot be written: nothing has
// changed.
func TestTearCannotBeNoted(t *testing.T) {
	const size = 1 << 20
	h := newHome(t, size)
	h.state = filepath.Join(h.dir, "state")
	h.open()
	put(t, h.dev, 1, 0, size)
	old := h.take("old")
	put(t, h.dev, 2, 0, size)
	newer := h.take("newer")
	if err := os.MkdirAll(h.dev.tearPath()+".new/in the way", 0o700); err != nil {
		t.Fatal(err)
	}
	h.dev.settle(settleLimit)
	_, before, _ := h.pool.Space()
	if err := image(t, old, "vda").Rollback(); !errors.Is(err, syscall.EISDIR) {
		t.Errorf("rollback: got %v, want EISDIR", err)
	}
	h.dev.settle(settleLimit)
	if _, after, _ := h.pool.Space(); after != before {
		t.Errorf("space in use went from %d to %d", before, after)
	}
	if got := h.dev.State(); got != "ok" {
		t.Errorf("state: got %s, want ok", got)
	}
	want(t, h.dev, 2, 0, size)
	if err := Check(h.pool, h.dev); err != nil {
		t.Error(err)
	}
	put(t, h.dev, 3, 0, size)
	want(t, image(t, newer, "vda"), 2, 0, size)
	h.close()
}
