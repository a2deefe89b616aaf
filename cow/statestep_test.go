package cow

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// stepDisk is a state disk that tells of each call that has changed it. Calls for which
// fail has an error fail, and change nothing.
type stepDisk struct {
	hostDisk
	fail func(what string) error
	step func(what string)

	mu sync.Mutex // held while it changes, and while somebody looks what that left
}

func (k *stepDisk) do(what, path string, f func() error) error {
	what += " " + filepath.Base(path)
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.fail(what); err != nil {
		return err
	}
	err := f()
	k.step(what)
	return err
}

func (k *stepDisk) open(path string, create bool) (f durableFile, err error) {
	if !create {
		f, err = k.hostDisk.open(path, false)
	} else {
		err = k.do("make", path, func() error { f, err = k.hostDisk.open(path, true); return err })
	}
	if err != nil {
		return nil, err
	}
	return stepFile{f, k, path}, nil
}

func (k *stepDisk) rename(from, to string) error {
	return k.do("rename", from, func() error { return k.hostDisk.rename(from, to) })
}

func (k *stepDisk) remove(path string) error {
	return k.do("remove", path, func() error { return k.hostDisk.remove(path) })
}

func (k *stepDisk) mkdir(dir string) error {
	return k.do("mkdir", dir, func() error { return k.hostDisk.mkdir(dir) })
}

// stepFile is a file of a stepDisk.
type stepFile struct {
	durableFile
	disk *stepDisk
	path string
}

func (f stepFile) WriteAt(p []byte, off int64) (n int, err error) {
	err = f.disk.do("write", f.path, func() error { n, err = f.durableFile.WriteAt(p, off); return err })
	return n, err
}

// stateSize is a device of two regions. Only the first bytes of each are written.
const (
	stateSize  = 1<<regionShift + chunkSize
	stateBytes = chunkSize
)

var stateRegions = []int64{0, 1 << regionShift}

// stateFacts are what is true of a device at one of its steps.
type stateFacts struct {
	live    []byte // what the regions' bytes are, to those whose writes were acknowledged
	next    []byte // what they may be besides
	changed []bool // whether the region must count as changed since the snapshot
	ending  bool   // a new generation may have begun
	ended   bool   // one has
}

// stateLife is a device whose state is written down, and what each step of that leaves.
type stateLife struct {
	*home
	t    *testing.T
	base string // what is left is below it
	disk *stepDisk

	generation string
	number     uint64 // of the snapshot s, at which the first region was 1 and the second 0

	mu    sync.Mutex
	fails func(what string) error
	begun bool // from now on steps are kept
	facts stateFacts
	left  []stateLeft
}

// stateLeft is what a step leaves.
type stateLeft struct {
	stateFacts
	what, dir string
}

func newStateLife(t *testing.T) *stateLife {
	h := newHome(t, stateSize)
	l := &stateLife{home: h, t: t, base: h.dir, fails: func(string) error { return nil }}
	h.dir = filepath.Join(l.base, "site")
	h.state, h.moved = filepath.Join(h.dir, "state"), true
	if err := errors.Join(os.MkdirAll(filepath.Join(h.dir, "run"), 0o700), os.WriteFile(filepath.Join(h.dir, "vda"), nil, 0o600),
		os.Truncate(filepath.Join(h.dir, "vda"), stateSize)); err != nil {
		t.Fatal(err)
	}
	l.disk = &stepDisk{step: func(what string) { l.keep(what) }, fail: func(what string) error {
		l.mu.Lock()
		fails := l.fails
		l.mu.Unlock()
		return fails(what)
	}}
	h.disk = l.disk
	h.step = func(what string) {
		l.disk.mu.Lock()
		defer l.disk.mu.Unlock()
		l.disk.step(what)
	}
	h.open()
	h.waitDurable()
	put(t, h.dev, 1, 0, stateBytes)
	s := h.take("s")
	l.generation, l.number = h.dev.Changes().Generation(), image(t, s, "vda").Changes().Number()
	l.must(l.checkpoint())
	l.facts = stateFacts{live: []byte{1, 0}, next: []byte{1, 0}, changed: []bool{false, false}}
	l.begun = true
	return l
}

// keep copies what a step leaves.
func (l *stateLife) keep(what string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.begun {
		return
	}
	f := l.facts
	f.live, f.next, f.changed = bytes.Clone(f.live), bytes.Clone(f.next), slices.Clone(f.changed)
	left := stateLeft{f, fmt.Sprintf("step %d, %s", len(l.left), what), filepath.Join(l.base, fmt.Sprint(len(l.left)))}
	copyHome(l.t, l.home.dir, left.dir)
	l.left = append(l.left, left)
}

// copyHome is copyTree with what the origin says of its generation.
func copyHome(t *testing.T, from, to string) {
	t.Helper()
	copyTree(t, from, to)
	var b [36]byte
	n, err := unix.Getxattr(filepath.Join(from, "vda"), endedAttr, b[:])
	if errors.Is(err, unix.ENODATA) {
		return
	}
	if err == nil {
		err = unix.Setxattr(filepath.Join(to, "vda"), endedAttr, b[:n], 0)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (l *stateLife) set(f func(*stateFacts)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(&l.facts)
}

// write writes to the beginning of a region.
func (l *stateLife) write(region int, v byte) {
	l.set(func(f *stateFacts) { f.next[region] = v })
	put(l.t, l.dev, v, stateRegions[region], stateBytes)
	l.set(func(f *stateFacts) { f.live[region], f.changed[region] = v, true })
}

func (l *stateLife) mark(region int) {
	l.must(l.dev.Mark(stateRegions[region], stateBytes))
	l.set(func(f *stateFacts) { f.changed[region] = true })
}

// reset begins a new generation, and keeps what there is before anything of that is
// written down.
func (l *stateLife) reset() {
	release := make(chan struct{})
	l.set(func(f *stateFacts) { f.ending = true })
	l.setFails(func(what string) error {
		if what == "mkdir vda" { // the first call of restartDurable
			<-release
		}
		return nil
	})
	l.must(l.dev.Reset("test"))
	l.set(func(f *stateFacts) { f.ended = true })
	l.keep("the end of a reset")
	close(release)
	l.waitDurable()
}

func (l *stateLife) setFails(f func(what string) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fails = f
}

// checkpoint writes the map down as the device does every minute.
func (l *stateLife) checkpoint() error {
	l.dev.keeping <- struct{}{}
	defer func() { <-l.dev.keeping }()
	return l.dev.checkpoint()
}

func (l *stateLife) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

// failAt has the next call of each kind fail, by which the generation may end. (The
// record's file is called what it was made as.)
func (l *stateLife) failAt(ending bool, kinds ...string) {
	l.set(func(f *stateFacts) { f.ending = ending })
	l.setFails(func(what string) error {
		if i := slices.Index(kinds, what); i >= 0 {
			kinds = slices.Delete(kinds, i, i+1)
			return fmt.Errorf("%s: %w", what, unix.EIO)
		}
		return nil
	})
}

// TestStateKilledAtEveryStep writes a device's map down, marks in it, begins a new
// generation, and has one end because its state cannot be written. It starts on what
// each step of that leaves, in the same boot and in another: the history goes on and
// misses nothing, or a new one has begun where it may, and has where it must.
func TestStateKilledAtEveryStep(t *testing.T) {
	for _, tc := range []struct {
		name string
		run  func(l *stateLife)
		met  string // a step that there must be
	}{
		{"a checkpoint", func(l *stateLife) {
			l.write(1, 2)
			l.must(l.checkpoint())
			l.write(0, 3)
			l.must(l.checkpoint())
			l.must(l.checkpoint()) // drops what is idle since
			l.write(1, 4)
		}, "rename map.new"},
		{"a mark", func(l *stateLife) {
			l.mark(1)
			l.must(l.checkpoint())
		}, "write regions.new"},
		{"a reset", func(l *stateLife) {
			l.write(1, 2)
			l.reset()
			l.write(0, 3)
			l.must(l.checkpoint())
		}, "the end of a reset"},
		{"a record that fails", func(l *stateLife) {
			l.failAt(true, "write regions.new")
			l.write(1, 2)
			l.waitDurable()
			l.write(0, 3)
		}, "remove map"},
		{"a record that fails, and its map", func(l *stateLife) {
			l.failAt(true, "write regions.new", "remove map")
			l.write(1, 2)
			l.waitDurable()
			l.write(0, 3)
		}, "rename map.new"},
		{"a map that cannot be written", func(l *stateLife) {
			l.write(1, 2)
			l.failAt(false, "write map.new")
			if err := l.checkpoint(); !errors.Is(err, unix.EIO) {
				l.t.Errorf("checkpoint: %v, want EIO", err)
			}
			l.write(0, 3)
			l.must(l.checkpoint())
		}, "remove map.new"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newStateLife(t)
			tc.run(l)
			l.step("the end")
			l.mu.Lock()
			l.begun = false
			l.mu.Unlock()
			l.close()
			if !slices.ContainsFunc(l.left, func(left stateLeft) bool { return strings.HasSuffix(left.what, ", "+tc.met) }) {
				t.Errorf("there was no step %q", tc.met)
			}
			for _, left := range l.left {
				reboot := left.dir + "-reboot"
				copyHome(t, left.dir, reboot)
				l.verify(left, left.dir, "killed at "+left.what, false)
				l.verify(left, reboot, "killed at "+left.what+", then a reboot", true)
				if t.Failed() {
					return
				}
			}
			t.Logf("killed at each of %d steps", len(l.left))
		})
	}
}

// verify starts on what is in dir.
func (l *stateLife) verify(f stateLeft, dir, what string, reboot bool) {
	l.t.Helper()
	h := &home{t: l.t, dir: dir, moved: true, state: filepath.Join(dir, "state")}
	if reboot {
		h.forgetRun()
	}
	for _, p := range inspect(l.t, dir) {
		l.t.Errorf("%s: %s: %s", what, p.File, p.Text)
	}
	snaps := h.open()
	defer h.close()
	for k, off := range stateRegions {
		got := make([]byte, stateBytes)
		if err := h.dev.Read(got, off); err != nil {
			l.t.Fatal(err)
		}
		for i, v := range got { // a write may have come halfway
			if v != f.live[k] && v != f.next[k] {
				l.t.Fatalf("%s: byte %d of region %d is %d, want %d or %d", what, i, k, v, f.live[k], f.next[k])
			}
		}
	}
	if s := snaps["s"]; (s != nil) == reboot {
		l.t.Errorf("%s: there are snapshots %v", what, snaps)
	} else if s != nil {
		want(l.t, image(l.t, s, "vda"), 1, 0, stateBytes)
		want(l.t, image(l.t, s, "vda"), 0, stateRegions[1], stateBytes)
	}
	switch c := h.dev.Changes(); {
	case c.Generation() == l.generation && f.ended:
		l.t.Errorf("%s: the generation that has ended goes on", what)
	case c.Generation() == l.generation:
		l.wantChanged(f, h.dev, what)
	case !f.ending:
		l.t.Errorf("%s: a new generation has begun", what)
	}
	if n := image(l.t, h.take("next"), "vda").Changes().Number(); n <= l.number {
		l.t.Errorf("%s: number %d, after %d was given", what, n, l.number)
	}
	if err := Check(h.pool, h.dev); err != nil {
		l.t.Errorf("%s: %v", what, err)
	}
}

// wantChanged checks that what must count as changed does.
func (l *stateLife) wantChanged(f stateLeft, d *Device, what string) {
	l.t.Helper()
	runs, ok := d.Changes().Since(l.number)
	if !ok {
		l.t.Errorf("%s: what changed is not known", what)
		return
	}
	found := make([]bool, len(stateRegions))
	for r, err := range runs {
		if err != nil {
			l.t.Fatal(err)
		}
		for k, off := range stateRegions {
			found[k] = found[k] || r.Off <= off && off+stateBytes <= r.Off+r.N
		}
	}
	for k := range found {
		if f.changed[k] && !found[k] {
			l.t.Errorf("%s: region %d does not count as changed", what, k)
		}
	}
}
