package cow

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"blksnap/store"
)

// site is a directory with all that outlives a process: two origins, a snapstore
// and the run directory.
type site struct {
	dir  string
	cat  *Catalogue
	pool *store.Pool
	devs []*Device
	snap map[string]*Snapshot

	absent []string
}

const siteSize = 1<<20 + 3*SectorSize

var siteDevices = []string{"a", "b"}

// copied is an origin that is taken for the one that it is a copy of, and for no other:
// each device has its own.
type copied struct {
	originFile
	device string
}

func (c copied) identify(bool) (identity, error) {
	return identity{ino: uint64(1 + slices.Index(siteDevices, c.device)), size: siteSize, changed: 1}, nil
}

// newSite makes the files of a site.
func newSite(t *testing.T, dir string) {
	t.Helper()
	for _, name := range siteDevices {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, siteSize), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
}

// openSite starts on what is in dir.
func openSite(t *testing.T, dir string, limit int64, step func(string)) *site {
	t.Helper()
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	return openSiteIn(t, dir, boot, limit, step)
}

// openSiteIn starts in another boot.
func openSiteIn(t *testing.T, dir, boot string, limit int64, step func(string)) *site {
	t.Helper()
	return openSiteWith(t, dir, boot, limit, step, siteDevices)
}

// openSiteWith starts with some of the devices.
func openSiteWith(t *testing.T, dir, boot string, limit int64, step func(string), devices []string) *site {
	t.Helper()
	s := &site{dir: dir, snap: make(map[string]*Snapshot)}
	var why, err error
	s.cat, why, err = openSoundCatalogue(filepath.Join(dir, "run"), boot)
	if err = errors.Join(why, err); err != nil {
		t.Fatal(err)
	}
	s.cat.state = filepath.Join(dir, "state")
	s.cat.step = step
	part, err := store.OpenFile(filepath.Join(dir, "store"), limit, false)
	if err != nil {
		t.Fatal(err)
	}
	s.pool = store.NewPool(part)
	for _, name := range devices {
		o, err := OpenOrigin(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		o.file = copied{o.file, name}
		d, err := s.cat.Open(o, s.pool, Config{Name: name})
		if err != nil {
			t.Fatal(err)
		}
		s.devs = append(s.devs, d)
	}
	found, absent, err := s.cat.Recover()
	if err != nil {
		t.Fatal(err)
	}
	s.absent = absent
	for _, n := range found {
		s.snap[n.Name()] = n
	}
	if err := s.pool.Discard(); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *site) take(t *testing.T, name string) *Snapshot {
	t.Helper()
	n, err := s.cat.Take(name, s.devs, TakeOptions{Limit: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (s *site) close(t *testing.T) {
	t.Helper()
	var errs []error
	for _, d := range s.devs {
		errs = append(errs, d.Close())
	}
	if err := errors.Join(append(errs, s.pool.Close(), s.cat.Close())...); err != nil {
		t.Errorf("close: %v", err)
	}
}

// copyTree copies a directory; holes stay holes. A checkpoint may be written
// meanwhile: records of regions are copied first, because one from before it goes
// with a map from after it, but not the other way round.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	early := make(map[string]bool)
	records, err := filepath.Glob(filepath.Join(from, "state", "devices", "*", "regions"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range records {
		rel, _ := filepath.Rel(from, path)
		if err := os.MkdirAll(filepath.Dir(filepath.Join(to, rel)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := copySparse(path, filepath.Join(to, rel)); err != nil {
			t.Fatal(err)
		}
		early[path] = true
	}
	err = filepath.WalkDir(from, func(path string, e os.DirEntry, err error) error {
		rel, _ := filepath.Rel(from, path)
		switch {
		case errors.Is(err, os.ErrNotExist): // went meanwhile
			return nil
		case err != nil:
			return err
		case e.IsDir():
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		case early[path]:
			return nil
		}
		return copySparse(path, filepath.Join(to, rel))
	})
	if err != nil {
		t.Fatal(err)
	}
}

func copySparse(from, to string) error {
	in, err := os.Open(from)
	if errors.Is(err, os.ErrNotExist) {
		return nil // went meanwhile
	}
	if err != nil {
		return err
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer out.Close()
	h := hostFile{File: in}
	for off := int64(0); off < st.Size(); {
		hole, end, err := h.next(off, st.Size())
		if err != nil {
			return err
		}
		if !hole {
			if _, err := io.Copy(io.NewOffsetWriter(out, off), io.NewSectionReader(in, off, end-off)); err != nil {
				return err
			}
		}
		off = end
	}
	return out.Truncate(st.Size())
}

// facts are what must be true of a site at a moment.
type facts struct {
	what     string
	live     [][]byte            // by device
	snaps    map[string][][]byte // by name and device
	changing string              // a snapshot that may or may not be there
	lost     map[string]bool     // snapshots that may have overflowed
	off, n   int64               // bytes of every device that may be old or new
	written  string              // a snapshot whose images may have old or new bytes there instead
}

func (f facts) clone() facts {
	f.live = slices.Clone(f.live)
	for i := range f.live {
		f.live[i] = slices.Clone(f.live[i])
	}
	f.snaps = maps.Clone(f.snaps)
	f.lost = maps.Clone(f.lost)
	return f
}

// verify checks the facts on a site.
func (f facts) verify(t *testing.T, s *site) {
	t.Helper()
	for k, d := range s.devs {
		got := make([]byte, siteSize)
		if err := d.Read(got, 0); err != nil {
			t.Fatal(err)
		}
		if f.written == "" {
			copy(got[f.off:f.off+f.n], f.live[k][f.off:])
		}
		if !bytes.Equal(got, f.live[k]) {
			t.Errorf("after %q: device %s does not hold what was acknowledged", f.what, d.Name())
		}
	}
	for name, want := range f.snaps {
		n := s.snap[name]
		if n == nil {
			if name != f.changing {
				t.Errorf("after %q: snapshot %s is gone", f.what, name)
			}
			continue
		}
		for k, d := range siteDevices {
			i, ok := n.Image(d)
			if !ok {
				t.Errorf("after %q: %s@%s is gone", f.what, d, name)
				continue
			}
			got := make([]byte, siteSize)
			err := i.Read(got, 0)
			if name == f.written {
				copy(got[f.off:f.off+f.n], want[k][f.off:])
			}
			switch {
			case err == nil && !bytes.Equal(got, want[k]):
				t.Errorf("after %q: %s@%s: at %d other bytes", f.what, d, name, firstDiff(got, want[k]))
			case err != nil && !(f.lost[name] && errors.Is(err, ErrOverflowed)):
				t.Errorf("after %q: %s@%s: %v", f.what, d, name, err)
			}
		}
	}
	for name := range s.snap {
		if f.snaps[name] == nil && name != f.changing {
			t.Errorf("after %q: snapshot %s is there", f.what, name)
		}
	}
	f.verifyIncrements(t, s)
	if err := Check(s.pool, s.devs...); err != nil {
		t.Errorf("after %q: %v", f.what, err)
	}
}

// verifyIncrements checks that what a snapshot and the device differ in is inside
// what the device says has changed since.
func (f facts) verifyIncrements(t *testing.T, s *site) {
	t.Helper()
	for name, n := range s.snap {
		for _, d := range s.devs {
			i, ok := n.Image(d.Name())
			if !ok || i.Err() != nil || f.snaps[name] == nil {
				continue
			}
			runs, ok := d.Changes().Since(i.Changes().Number())
			if !ok {
				t.Errorf("after %q: %s does not know what changed since %s", f.what, d.Name(), name)
				continue
			}
			copied, now := make([]byte, siteSize), make([]byte, siteSize)
			if err := errors.Join(i.Read(copied, 0), d.Read(now, 0)); err != nil {
				t.Fatal(err)
			}
			for r := range runs {
				copy(copied[r.Off:r.Off+r.N], now[r.Off:])
			}
			if !bytes.Equal(copied, now) {
				t.Errorf("after %q: the increment of %s since %s misses byte %d", f.what, d.Name(), name, firstDiff(copied, now))
			}
		}
	}
}

func firstDiff(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// script drives a site and keeps the facts.
type script struct {
	t *testing.T
	s *site

	mu          sync.Mutex
	facts       facts
	generations []string
	numbers     []map[string]uint64
	highest     uint64
}

func (c *script) set(f func(*facts)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.facts = c.facts.clone()
	f(&c.facts)
}

func (c *script) write(v byte, off, n int64) {
	c.set(func(f *facts) { f.off, f.n = off, n })
	for _, d := range c.s.devs {
		// As the reader of a connection does it, then as a worker.
		err := tryWrite(d, bytes.Repeat([]byte{v}, int(n)), off)
		if err == syscall.EAGAIN {
			put(c.t, d, v, off, n)
		} else if err != nil {
			c.t.Fatal(err)
		}
	}
	c.set(func(f *facts) {
		for k := range f.live {
			copy(f.live[k][off:], bytes.Repeat([]byte{v}, int(n)))
		}
		f.n = 0
	})
}

// zero makes holes of a range: no snapshot is open.
func (c *script) zero(off, n int64) {
	c.set(func(f *facts) { f.off, f.n = off, n })
	for _, d := range c.s.devs {
		if err := d.Trim(off, n, false); err != nil {
			c.t.Fatal(err)
		}
	}
	c.set(func(f *facts) {
		for k := range f.live {
			clear(f.live[k][off : off+n])
		}
		f.n = 0
	})
}

// writeImage writes to a snapshot's images; v 0 is written as zeroes.
func (c *script) writeImage(name string, v byte, off, n int64) {
	c.set(func(f *facts) { f.off, f.n, f.written = off, n, name })
	for _, d := range siteDevices {
		i := image(c.t, c.s.snap[name], d)
		if v != 0 {
			put(c.t, i, v, off, n)
		} else if err := i.Zero(off, n); err != nil {
			c.t.Fatal(err)
		}
	}
	c.set(func(f *facts) {
		images := slices.Clone(f.snaps[name])
		for k := range images {
			images[k] = slices.Clone(images[k])
			fill(images[k], v, off, n)
		}
		f.snaps[name] = images
		f.n, f.written = 0, ""
	})
}

func (c *script) take(name string) { c.takeWith(name, TakeOptions{}) }

func (c *script) takeWith(name string, o TakeOptions) {
	c.set(func(f *facts) { f.snaps[name], f.changing = f.live, name })
	o.Limit = time.Minute
	n, err := c.s.cat.Take(name, c.s.devs, o)
	if err != nil {
		c.t.Fatal(err)
	}
	c.s.snap[name] = n
	c.set(func(f *facts) {
		f.changing = ""
		for i, d := range siteDevices {
			num := image(c.t, n, d).Changes().Number()
			c.numbers[i][name], c.highest = num, max(c.highest, num)
		}
	})
}

func (c *script) destroy(name string) {
	c.set(func(f *facts) { f.changing = name })
	if err := c.s.snap[name].Destroy(false); err != nil {
		c.t.Fatal(err)
	}
	delete(c.s.snap, name)
	c.set(func(f *facts) {
		delete(f.snaps, name)
		f.changing = ""
		for i := range c.numbers {
			delete(c.numbers[i], name)
		}
	})
}

// run is a life with everything in it that changes state.
func (c *script) run() {
	c.write(1, 0, siteSize)
	c.zero(512<<10, 128<<10)
	c.take("one")
	c.write(2, 0, 70000)
	c.write(9, 600<<10, 4096) // in a hole
	c.take("two")
	c.write(3, 4096, 4096)
	c.write(4, 64<<10, 8192)
	c.write(9, 5*chunkSize-8192, 16384) // of two chunks at once
	c.takeWith("three", TakeOptions{Writable: true})
	c.writeImage("three", 50, 2000, 70000)
	c.write(5, 0, 200000)
	c.writeImage("three", 51, 4096, 5000)
	c.writeImage("three", 0, 0, 64<<10)
	c.writeImage("three", 52, 100, 100)
	c.destroy("two") // folds: slots move, and are joined
	c.write(6, 300000, 5)
	c.take("four")
	c.write(10, 100000, 8192)  // what three has, too
	c.write(11, 198000, 10000) // some of it
	c.destroy("four")          // a nameless head
	c.write(7, 290000, 100000)
	c.destroy("three")
	c.destroy("one")
	c.take("five")
	c.write(8, siteSize-1000, 1000)
}

// life is what is left of a site by a process that was killed at a moment.
type life struct {
	facts
	dir         string
	generations []string            // by device
	numbers     []map[string]uint64 // of the snapshots, by device
	highest     uint64              // number that any snapshot had
}

// runFull is a life in which snapshots are lost: the snapstore is full, or a snapshot
// takes more of it than it may.
func (c *script) runFull() {
	c.write(1, 0, siteSize)
	c.lose("one")
	c.take("one")
	c.write(2, 0, 600000)
	c.take("two")
	c.write(3, 0, 4096)
	c.lose("limited")
	c.takeWith("limited", TakeOptions{MaxStore: 16 << 10})
	c.write(4, 0, 40000)
	c.write(5, 64<<10, 5)
	c.destroy("one")
	c.destroy("limited")
	c.destroy("two")
}

// lose says that a snapshot may overflow from now on.
func (c *script) lose(name string) {
	c.set(func(f *facts) { f.lost[name] = true })
}

// livesOf runs a script once and keeps what each of its changes of state left.
func livesOf(t *testing.T, limit int64, run func(*script), steps *met) []life {
	t.Helper()
	base := t.TempDir()
	dir := filepath.Join(base, "site")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	newSite(t, dir)
	c := &script{t: t, facts: facts{
		live:  [][]byte{make([]byte, siteSize), make([]byte, siteSize)},
		snaps: make(map[string][][]byte),
		lost:  make(map[string]bool),
	}}
	var left []life
	var copying sync.Mutex
	c.s = openSite(t, dir, limit, func(what string) {
		copying.Lock()
		defer copying.Unlock()
		c.mu.Lock()
		l := life{facts: c.facts.clone(), dir: filepath.Join(base, fmt.Sprint(len(left)))}
		l.generations, l.numbers, l.highest = c.generations, slices.Clone(c.numbers), c.highest
		for i := range l.numbers {
			l.numbers[i] = maps.Clone(l.numbers[i])
		}
		c.mu.Unlock()
		l.what = fmt.Sprintf("step %d: %s", len(left), what)
		steps.add(what)
		copyTree(t, dir, l.dir)
		left = append(left, l)
	})
	c.mu.Lock()
	for _, d := range c.s.devs {
		c.generations = append(c.generations, d.Changes().Generation())
		c.numbers = append(c.numbers, make(map[string]uint64))
	}
	c.mu.Unlock()
	run(c)
	c.facts.verify(t, c.s)
	c.s.close(t)
	again := openSite(t, dir, limit, nil)
	c.facts.what = "a clean end"
	c.facts.verify(t, again)
	again.close(t)
	return left
}

// TestKilledAtEveryStep looks, after every single change of state, at what a
// process that is killed there leaves, and starts on it, twice: what a start
// itself does may be cut off as well.
func TestKilledAtEveryStep(t *testing.T) {
	for _, tc := range []struct {
		name  string
		limit int64
		run   func(*script)
	}{
		{"space for all", 64 << 20, (*script).run},
		{"snapshots are lost", 640 << 10, (*script).runFull},
	} {
		t.Run(tc.name, func(t *testing.T) { killAtEveryStep(t, tc.name, tc.limit, tc.run) })
	}
}

func killAtEveryStep(t *testing.T, scenario string, limit int64, run func(*script)) {
	var steps met
	left, second := livesOf(t, limit, run, &steps), 0
	steps.check(t, scenario)
	for _, l := range left {
		var once sync.Once
		s := openSite(t, l.dir, limit, func(what string) {
			once.Do(func() { // a start that is killed at its first step
				copyTree(t, l.dir, l.dir+"-again")
			})
		})
		l.verify(t, s)
		s.close(t)
		if _, err := os.Stat(l.dir + "-again"); err == nil {
			l.what += ", then a start"
			s := openSite(t, l.dir+"-again", limit, nil)
			l.verify(t, s)
			s.close(t)
			second++
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("killed after each of %d steps, and %d times again in the start after it", len(left), second)
}

// TestRebootAtEveryStep starts on what each step leaves as if the machine had been
// started anew. Snapshots are gone; generation, numbers and map go on: what differs
// from a snapshot that was, is inside what the device says has changed since.
func TestRebootAtEveryStep(t *testing.T) {
	left := livesOf(t, 64<<20, (*script).run, &met{})
	kept := 0
	for _, l := range left {
		s := openSiteIn(t, l.dir, "00000000-0000-0000-0000-000000000000", 64<<20, nil)
		if len(s.snap) > 0 {
			t.Errorf("after %q and a reboot there are snapshots", l.what)
		}
		for i, d := range s.devs {
			c := d.Changes()
			if c.Generation() != l.generations[i] {
				continue // not written down yet: the next copy is a full one
			}
			kept++
			for name, num := range l.numbers[i] {
				runs, ok := c.Since(num)
				if !ok {
					t.Errorf("after %q and a reboot: what changed since %s is not known", l.what, name)
					continue
				}
				copied, now := slices.Clone(l.snaps[name][i]), make([]byte, siteSize)
				if err := d.Read(now, 0); err != nil {
					t.Fatal(err)
				}
				for r := range runs {
					copy(copied[r.Off:r.Off+r.N], now[r.Off:])
				}
				if !bytes.Equal(copied, now) {
					t.Errorf("after %q and a reboot: the increment of %s since %s misses byte %d", l.what, d.Name(), name, firstDiff(copied, now))
				}
			}
			if n := s.take(t, "next"); image(t, n, d.Name()).Changes().Number() <= l.highest {
				t.Errorf("after %q and a reboot: number %d is given again", l.what, image(t, n, d.Name()).Changes().Number())
			} else if err := n.Destroy(false); err != nil {
				t.Error(err)
			}
		}
		s.close(t)
		if t.Failed() {
			return
		}
	}
	if kept == 0 {
		t.Error("no generation outlived a reboot")
	}
	t.Logf("rebooted after each of %d steps, %d maps went on", len(left), kept)
}

// A device whose state cannot be used after some of its images were found already: the
// snapshot lacks them, because nothing is preserved for them any more.
func TestImagesThatWereFoundAndGivenUp(t *testing.T) {
	dir := t.TempDir()
	newSite(t, dir)
	s := openSite(t, dir, 1<<20, nil)
	s.take(t, "s1")
	s.close(t)
	// An overlay of no image, which is not to be removed.
	if err := os.MkdirAll(filepath.Join(dir, "run", "devices", "a", fmt.Sprintf(overlayName, 7), "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	s = openSite(t, dir, 1<<20, nil)
	defer s.close(t)
	p := bytes.Repeat([]byte{1}, 4096)
	for _, d := range s.devs {
		if err := d.Write(p, 0, false); err != nil {
			t.Fatal(err)
		}
	}
	snap := s.snap["s1"]
	if i, ok := snap.Image("a"); ok {
		err := i.Read(p, 0)
		t.Errorf("the image is there: it reads %d, %v", p[0], err)
	}
	if got, want := snap.State(), "failed: 1 of 2 images were lost before the last start"; got != want {
		t.Errorf("state of the snapshot\n got %s\nwant %s", got, want)
	}
	i, ok := snap.Image("b")
	if !ok {
		t.Fatal("the image of the other device is lost")
	}
	if err := i.Read(p, 0); err != nil || p[0] != 0 {
		t.Errorf("the image of the other device reads %d, %v, want 0", p[0], err)
	}
}

// A start finds something else than a directory where the devices' files are: it serves them
// with their state in memory, and as ever when there is nothing any more.
func TestNoDirectoryOfDevices(t *testing.T) {
	dir := newSiteDir(t)
	s := openSite(t, dir, 1<<20, nil)
	s.take(t, "s1")
	was := s.devs[0].Tracking().Generation()
	s.close(t)
	devices := filepath.Join(dir, "run", "devices")
	if err := errors.Join(os.RemoveAll(devices), os.WriteFile(devices, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, inMemory := range []bool{true, false} {
		s = openSite(t, dir, 1<<20, nil)
		for _, d := range s.devs {
			if got := strings.HasPrefix(d.State(), "ok, in memory only: "); got != inMemory {
				t.Errorf("state of device %s: %s, want in memory: %v", d.Name(), d.State(), inMemory)
			}
			put(t, d, 1, 0, blockSize)
		}
		if got := s.devs[0].Tracking().Generation(); got == was {
			t.Error("the generation of before goes on")
		} else {
			was = got
		}
		if got, want := s.snap["s1"].State(), "failed: 2 of 2 images were lost before the last start"; got != want {
			t.Errorf("state of the snapshot\n got %s\nwant %s", got, want)
		}
		s.close(t)
		if err := os.RemoveAll(devices); err != nil {
			t.Fatal(err)
		}
	}
}
