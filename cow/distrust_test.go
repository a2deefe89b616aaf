package cow

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// What the catalogue notes of devices is there for the next process in the same boot, until
// it is taken out; and who has no room for a name says so.
func TestDistrust(t *testing.T) {
	dir := t.TempDir()
	open := func() *Catalogue {
		t.Helper()
		c, why, err := OpenCatalogue(dir, "")
		if err != nil || why != nil {
			t.Fatal(err, why)
		}
		return c
	}
	want := func(c *Catalogue, name string, yes bool) {
		t.Helper()
		if got := c.distrusts(name); got != yes {
			t.Errorf("device %s is distrusted\n got %v\nwant %v", name, got, yes)
		}
	}
	c := open()
	if err := c.doubt("early"); err != nil {
		t.Fatal(err)
	}
	want(c, "early", false) // this start may yet fail
	if _, _, err := c.Recover(); err != nil {
		t.Fatal(err)
	}
	want(c, "early", true)
	name := func(i int) string { return fmt.Sprintf("vd%d", i) }
	const most = (catalogueHeader-catalogueDistrust)/8 - 1
	for i := range most {
		if err := c.doubt(name(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.distrust("one more"); err == nil {
		t.Error("a name that there is no room for is noted")
	}
	if err := c.distrust("early"); err != nil {
		t.Error(err)
	}
	c.trust(name(7))
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}

	c = open()
	for i := range most {
		want(c, name(i), i != 7)
	}
	want(c, "one more", false)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "catalogue")); err != nil {
		t.Fatal(err)
	}
	c = open()
	want(c, name(0), false)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

// inMemoryLife is a site of which device a has its state in memory, and what kills leave of
// it. Nothing tells of its origins that they were written to.
type inMemoryLife struct {
	t          *testing.T
	dir        string
	generation string // of device a before that
	number     uint64

	mu        sync.Mutex // steps come from anywhere
	met       met
	dirs      []string // copies
	distrusts int      // those of dirs from here on must not believe the old files
}

// keep keeps what a kill leaves now.
func (l *inMemoryLife) keep(what string) {
	l.met.add(what)
	l.mu.Lock()
	defer l.mu.Unlock()
	to := filepath.Join(l.t.TempDir(), "site")
	copyTree(l.t, l.dir, to)
	if l.dirs = append(l.dirs, to); what == "distrust a device" {
		l.distrusts = len(l.dirs) - 1
	}
}

// spoil puts the files of device a where no start finds them, and something in their place
// that is no directory.
func (l *inMemoryLife) spoil() {
	l.t.Helper()
	at := filepath.Join(l.dir, "run", "devices", "a")
	if err := errors.Join(os.Rename(at, filepath.Join(l.dir, "aside")), os.Symlink("nowhere", at)); err != nil {
		l.t.Fatal(err)
	}
}

// heal puts them back, of a site in dir.
func (l *inMemoryLife) heal(dir string) {
	l.t.Helper()
	at, aside := filepath.Join(dir, "run", "devices", "a"), filepath.Join(dir, "aside")
	if _, err := os.Stat(aside); err != nil {
		return
	}
	if err := errors.Join(os.RemoveAll(at), os.Rename(aside, at)); err != nil {
		l.t.Fatal(err)
	}
}

// verify starts on what a kill left in dir. Where it believes the old files the image is
// as it was, and no change is missing; where it must not, it does not.
func (l *inMemoryLife) verify(dir string, distrusts bool) {
	l.t.Helper()
	l.heal(dir)
	// Only the run directory: the state directory changes while it is copied.
	found, err := Inspection{Run: filepath.Join(dir, "run"), Slots: func(uint8) (int64, error) { return 1 << 30, nil }}.Inspect()
	if err != nil || len(found) > 0 {
		l.t.Errorf("%s: problems of the state: %v, %v", dir, found, err)
	}
	s := openSite(l.t, dir, 1<<20, nil)
	defer s.close(l.t)
	c := s.devs[0].Changes()
	believes := c.Generation() == l.generation
	if believes && distrusts {
		l.t.Errorf("%s: the old generation goes on", dir)
	}
	if _, known := c.Since(l.number); known != believes {
		l.t.Errorf("%s: it answers for an old number: %v, and has the old generation: %v", dir, known, believes)
	}
	if i, ok := s.snap["s1"].Image("a"); ok != believes {
		l.t.Errorf("%s: there is an image: %v, and the old generation: %v", dir, ok, believes)
	} else if ok {
		want(l.t, i, 0, 0, siteSize)
	}
	want(l.t, image(l.t, s.snap["s1"], "b"), 0, 0, siteSize)
}

// A start that has the state of one device in memory is killed at every step, and so is the
// next one, for which the old files are in their place again.
func TestKilledWithADeviceInMemory(t *testing.T) {
	l := &inMemoryLife{t: t, dir: filepath.Join(t.TempDir(), "site")}
	if err := os.Mkdir(l.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	newSite(t, l.dir)
	s := openSite(t, l.dir, 1<<20, nil)
	s.take(t, "s1")
	for _, d := range s.devs {
		put(t, d, 1, 0, blockSize)
	}
	l.generation, l.number = s.devs[0].Changes().Generation(), s.devs[0].Changes().Number()
	s.close(t)

	l.spoil()
	s = openSite(t, l.dir, 1<<20, l.keep)
	put(t, s.devs[0], 2, chunkSize, blockSize)
	l.keep("a write")
	s.take(t, "s2")
	put(t, s.devs[0], 3, chunkSize, blockSize)
	want(t, image(t, s.take(t, "s3"), "a"), 3, chunkSize, blockSize)
	s.close(t)
	l.keep("a clean end")
	l.heal(l.dir)
	s = openSite(t, l.dir, 1<<20, l.keep)
	s.close(t)
	l.keep("the end of the next")
	l.met.check(t, "a device in memory")
	for n, dir := range l.dirs {
		l.verify(dir, n >= l.distrusts)
	}
	t.Logf("killed at each of %d steps", len(l.dirs))
}

// A lease that another device finds unreadable, and that is made anew by the same start: the
// next one believes it.
func TestDoubtEndsWithNewFiles(t *testing.T) {
	dir := newSiteDir(t)
	openSite(t, dir, 1<<20, nil).close(t)
	lease := filepath.Join(dir, "run", "devices", "b", "lease") // a looks at it
	if err := errors.Join(os.Remove(lease), os.Mkdir(lease, 0o700)); err != nil {
		t.Fatal(err)
	}
	s := openSite(t, dir, 1<<20, nil)
	s.take(t, "s1")
	was := s.devs[1].Tracking().Generation()
	s.close(t)
	s = openSite(t, dir, 1<<20, nil)
	defer s.close(t)
	if got := s.devs[1].Tracking(); got.Generation() != was {
		t.Errorf("generation %s, because %q\nwant %s to go on", got.Generation(), got.Reason(), was)
	}
	if got := s.snap["s1"].State(); got != "ok" {
		t.Errorf("state of the snapshot: got %s, want ok", got)
	}
}
