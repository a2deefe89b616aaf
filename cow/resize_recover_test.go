package cow

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// sizeChange is a change of a device's size with two snapshots before it: one that
// has everything in its layers, and one that has nothing.
type sizeChange struct {
	name   string
	was    int64
	to     int64
	change func(h *home) error
	lost   bool // the second snapshot does not outlive it
}

func sizeChanges() []sizeChange {
	const was = 1<<20 + 512
	byOthers := func(to int64) func(h *home) error {
		return func(h *home) error {
			return errors.Join(os.Truncate(filepath.Join(h.dir, "vda"), to), h.dev.Resize())
		}
	}
	return []sizeChange{
		{"grow", was, 3 << 20, byOthers(3 << 20), false},
		{"cut", was, 512<<10 + 512, byOthers(512<<10 + 512), true},
		{"cut at a block", was, 512 << 10, byOthers(512 << 10), true},
		{"shrink", was, 512<<10 + 512, func(h *home) error { return h.dev.Shrink(512<<10 + 512) }, false},
	}
}

// prepare makes the snapshots and returns the generation.
func (c sizeChange) prepare(h *home) string {
	h.t.Helper()
	h.open()
	put(h.t, h.dev, 1, 0, c.was)
	h.take("full")
	put(h.t, h.dev, 2, 0, c.was)
	h.take("empty")
	return h.dev.Changes().Generation()
}

// verify checks what was found again; changed says that the device has the new size.
func (c sizeChange) verify(h *home, snaps map[string]*Snapshot, what, generation string, changed bool) {
	h.t.Helper()
	size := c.was
	if changed {
		size = c.to
	}
	if got := h.dev.Size(); got != size {
		h.t.Errorf("%s: size: got %d, want %d", what, got, size)
	}
	if got := h.dev.Changes().Generation(); got != generation {
		h.t.Errorf("%s: a new generation has begun", what)
	}
	if got := h.dev.Changes().view.Size(); got != size {
		h.t.Errorf("%s: the change map is of %d bytes, want %d", what, got, size)
	}
	want(h.t, h.dev, 2, 0, min(size, c.was))
	if snaps["full"] == nil || snaps["empty"] == nil {
		h.t.Fatalf("%s: snapshots %v, want full and empty", what, snaps)
	}
	want(h.t, image(h.t, snaps["full"], "vda"), 1, 0, c.was)
	switch empty := image(h.t, snaps["empty"], "vda"); {
	case !changed || !c.lost:
		want(h.t, empty, 2, 0, c.was)
	case empty.State() != fmt.Sprintf("failed: the origin was cut to %d bytes", c.to):
		h.t.Errorf("%s: state of an image that needs what was cut: got %q", what, empty.State())
	}
	runs, ok := h.dev.Changes().Since(image(h.t, snaps["empty"], "vda").Changes().Number())
	if !ok {
		h.t.Errorf("%s: what changed is not known", what)
		return
	}
	var end int64
	for r := range runs {
		end = r.Off + r.N
	}
	if changed && c.to > c.was && end != c.to {
		h.t.Errorf("%s: changed up to %d, want %d", what, end, c.to)
	}
	if err := Check(h.pool, h.dev); err != nil {
		h.t.Errorf("%s: %v", what, err)
	}
}

func TestResizeOverRestart(t *testing.T) {
	for _, c := range sizeChanges() {
		t.Run(c.name, func(t *testing.T) {
			h := newHome(t, c.was)
			h.step = func(what string) {
				if what != "cut an origin" && what != "note a new size" {
					return
				}
				if id, err := h.dev.file.identify(false); err != nil || h.dev.lease.Load() < id.changed {
					t.Errorf("%s: the lease ends before the change: %v", what, err)
				}
			}
			generation := c.prepare(h)
			h.dev.lease.Store(0)
			h.dev.leased.Store(0)
			if err := c.change(h); err != nil {
				t.Fatal(err)
			}
			h.close()
			for range 2 { // the second finds nothing to finish
				c.verify(h, h.open(), "after a restart", generation, true)
				h.close()
			}
		})
	}
}

// TestResizeKilledAtEveryStep starts on what each step of a resize leaves behind.
func TestResizeKilledAtEveryStep(t *testing.T) {
	for _, c := range sizeChanges() {
		t.Run(c.name, func(t *testing.T) {
			h := newHome(t, c.was)
			h.dir = filepath.Join(h.dir, "site")
			if err := os.MkdirAll(filepath.Join(h.dir, "run"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(h.dir, "vda"), make([]byte, c.was), 0o600); err != nil {
				t.Fatal(err)
			}
			h.moved = true
			var mu sync.Mutex
			var lives []*home
			var steps []string
			begun := false
			var met met
			h.step = func(what string) {
				mu.Lock()
				defer mu.Unlock()
				if !begun {
					return
				}
				met.add(what)
				l := &home{t: t, dir: fmt.Sprintf("%s-%d", h.dir, len(lives)), moved: true}
				copyTree(t, h.dir, l.dir)
				lives, steps = append(lives, l), append(steps, what)
			}
			generation := c.prepare(h)
			mu.Lock()
			begun = true
			mu.Unlock()
			if err := c.change(h); err != nil {
				t.Fatal(err)
			}
			h.step("the end")
			h.step = nil
			scenario := "a resize"
			if c.name == "shrink" {
				scenario = "a cut by us"
			}
			met.check(t, scenario)
			h.close()
			noted := false
			for k, l := range lives {
				what := fmt.Sprintf("killed at step %d, %s", k, steps[k])
				snaps := l.open()
				noted = noted || steps[k] == "note a new size"
				st, err := os.Stat(filepath.Join(l.dir, "vda"))
				if err != nil {
					t.Fatal(err)
				}
				if c.name != "shrink" && !noted {
					// The origin was changed, and we had not noticed.
					if got := l.dev.Changes().Generation(); got == generation {
						t.Errorf("%s: the generation goes on", what)
					}
				} else {
					c.verify(l, snaps, what, generation, st.Size() == c.to)
				}
				l.close()
				if t.Failed() {
					return
				}
			}
			if !noted {
				t.Error("the new size was never noted")
			}
			t.Logf("killed after each of %d steps", len(lives))
		})
	}
}

// TestKilledInSecondResize ends a process before it noted the new size, after it had
// noted another before: what was noted then must not outlive the next start.
func TestKilledInSecondResize(t *testing.T) {
	h := newHome(t, 1<<20)
	h.open()
	file := filepath.Join(h.dir, "vda")
	if err := errors.Join(os.Truncate(file, 2<<20), h.dev.Resize()); err != nil {
		t.Fatal(err)
	}
	h.take("s")
	if err := errors.Join(os.Truncate(file, 3<<20), h.dev.changes().Resize(3<<20)); err != nil {
		t.Fatal(err)
	}
	h.close()
	if s := h.open()["s"]; s == nil || s.State() == "ok" {
		t.Error("a snapshot is healthy, although the origin was changed and nobody noticed")
	}
	h.take("again")
	h.close()
	if s := h.open()["again"]; s == nil || s.State() != "ok" {
		t.Error("a snapshot is lost over a restart in which nothing happened")
	}
	h.close()
}

// TestResizeOverReboot changes the size of a device whose map outlives a loss of
// power: what is new in it is marked then, or its generation has ended.
func TestResizeOverReboot(t *testing.T) {
	for _, c := range sizeChanges() {
		t.Run(c.name, func(t *testing.T) {
			h := newHome(t, c.was)
			h.state, h.moved = filepath.Join(h.dir, "state"), true
			l := &home{t: t, dir: t.TempDir(), moved: true}
			l.state = filepath.Join(l.dir, "state")
			h.step = func(what string) {
				if what == "note a new size" {
					copyTree(t, h.dir, l.dir)
				}
			}
			c.prepare(h)
			h.waitDurable()
			generation, number := h.dev.Changes().Generation(), h.dev.Changes().Number()
			if err := c.change(h); err != nil {
				t.Fatal(err)
			}
			// At the instant the old record is gone and the new one is not there.
			// (The origin's new size may not be on the disk, either.)
			l.forgetRun()
			if err := os.Truncate(filepath.Join(l.dir, "vda"), c.was); err != nil {
				t.Fatal(err)
			}
			l.open()
			if got := l.dev.Changes().Generation(); got == generation {
				t.Error("power was lost while the size changed, and the generation goes on")
			}
			l.close()
			h.waitDurable()
			put(t, h.dev, 3, c.to-512, 512)
			h.close()
			h.forgetRun()
			h.open()
			if got := h.dev.Changes().Generation(); got != generation {
				t.Errorf("a new generation has begun, although the new size was written down")
			}
			runs, ok := h.dev.Changes().Since(number)
			if !ok {
				t.Fatal("what changed is not known")
			}
			var end int64
			for r := range runs {
				end = r.Off + r.N
			}
			if end != c.to || h.dev.Size() != c.to {
				t.Errorf("changed up to %d of %d bytes, want %d", end, h.dev.Size(), c.to)
			}
			h.close()
		})
	}
}

// forgetRun is what a reboot does to the run directory.
func (h *home) forgetRun() {
	h.t.Helper()
	run := filepath.Join(h.dir, "run")
	if err := errors.Join(os.RemoveAll(run), os.Mkdir(run, 0o700)); err != nil {
		h.t.Fatal(err)
	}
}

// waitDurable waits until the device's map was written down.
func (h *home) waitDurable() {
	h.t.Helper()
	awaitDurable(h.t, h.dev, nil)
	h.dev.keeping <- struct{}{} // behind who is writing
	<-h.dev.keeping
}
