// Starts that do not find all that the one before had.

package cow

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"blksnap/store"
)

func thisBoot(t *testing.T) string {
	t.Helper()
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	return boot
}

func newSiteDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	newSite(t, dir)
	return dir
}

// wantImage checks an image from its first byte to its last.
func wantImage(t *testing.T, s *site, snapshot, device string, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if err := image(t, s.snap[snapshot], device).Read(got, 0); err != nil {
		t.Errorf("read %s@%s: %v", device, snapshot, err)
	} else if k := firstDiff(got, want); k >= 0 {
		t.Errorf("%s@%s: byte %d\n got %d\nwant %d", device, snapshot, k, got[k], want[k])
	}
}

// TestDeviceThatWasAway starts without a device, which gives its slots to the
// other one, and then with it again: its images must not come back.
func TestDeviceThatWasAway(t *testing.T) {
	dir, boot := newSiteDir(t), thisBoot(t)
	zeroes := make([]byte, siteSize)
	s := openSite(t, dir, 64<<20, nil)
	s.snap["both"] = s.take(t, "both")
	for _, d := range s.devs {
		put(t, d, 1, 0, siteSize)
	}
	s.close(t)

	s = openSiteWith(t, dir, boot, 64<<20, nil, []string{"b"})
	if want := []string{"a"}; !slices.Equal(s.absent, want) {
		t.Errorf("devices that are not there\n got %q\nwant %q", s.absent, want)
	}
	s.snap["more"] = s.take(t, "more")
	put(t, s.devs[0], 2, 0, siteSize)
	wantImage(t, s, "both", "b", zeroes)
	s.close(t)

	s = openSite(t, dir, 64<<20, nil)
	defer s.close(t)
	if got, want := s.snap["both"].State(), "failed: 1 of 2 images were lost before the last start"; got != want {
		t.Errorf("state of the snapshot that lacks an image\n got %s\nwant %s", got, want)
	}
	if _, ok := s.snap["both"].Image("a"); ok {
		t.Error("the image of a device that was away is back, with slots that were given to others")
	}
	wantImage(t, s, "both", "b", zeroes)
	wantImage(t, s, "more", "b", bytes.Repeat([]byte{1}, siteSize))
}

// TestSlotOfAnotherDevice finds a table that names a slot of another device: no
// image reads bytes that are not its own.
func TestSlotOfAnotherDevice(t *testing.T) {
	dir := newSiteDir(t)
	s := openSite(t, dir, 64<<20, nil)
	s.take(t, "both")
	for _, d := range s.devs {
		put(t, d, 1, 0, chunkSize)
	}
	s.devs[1].layers[0].table.store(0, s.devs[0].layers[0].table.load(0))
	s.close(t)

	s = openSite(t, dir, 64<<20, nil)
	defer s.close(t)
	wantImage(t, s, "both", "a", make([]byte, siteSize))
	if got := image(t, s.snap["both"], "b").State(); !strings.HasPrefix(got, "failed: ") {
		t.Errorf("state of the image whose slot is another's\n got %s\nwant failed: and why", got)
	}
}

// TestForget gives up what a predecessor left, as one does who does not know what
// its slots' numbers mean, and as the engine does where the catalogue is gone, which
// says of which boot the rest is.
func TestForget(t *testing.T) {
	for _, tc := range []struct {
		name   string
		forget func(c *Catalogue) (int, error)
		before func(run string) error
		want   int
	}{
		{"on request", (*Catalogue).Forget, func(string) error { return nil }, 1},
		{"without a catalogue", func(*Catalogue) (int, error) { return 0, nil },
			func(run string) error { return os.Remove(filepath.Join(run, "catalogue")) }, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := newSiteDir(t)
			s := openSite(t, dir, 64<<20, nil)
			s.take(t, "both")
			put(t, s.devs[0], 1, 0, siteSize)
			s.close(t)
			run := filepath.Join(dir, "run")
			if err := tc.before(run); err != nil {
				t.Fatal(err)
			}
			c, err := openCatalogue(run, thisBoot(t))
			if err != nil {
				t.Fatal(err)
			}
			n, err := tc.forget(c)
			if err != nil || n != tc.want {
				t.Errorf("forgot %d snapshots, %v, want %d", n, err, tc.want)
			}
			if _, err := os.Stat(filepath.Join(run, "devices")); !os.IsNotExist(err) {
				t.Errorf("what devices left is still there (%v)", err)
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			s = openSite(t, dir, 64<<20, nil)
			defer s.close(t)
			if len(s.snap) > 0 {
				t.Errorf("snapshots that were given up are back: %v", s.snap)
			}
		})
	}
}

// TestOverflowIsNotForgotten loses images, gives their layers back, and starts again and
// again: each start shows them as they were, nothing is left of them in the snapstore, and
// with their snapshot all goes.
func TestOverflowIsNotForgotten(t *testing.T) {
	for _, tc := range []struct {
		name string
		lose []int // devices
		f    *fault
		want string
	}{
		{"one of two", []int{0}, overflowed, "overflowed"},
		{"both", []int{0, 1}, overflowed, "overflowed"},
		{"for a reason", []int{0, 1}, failed("disk on fire"), "failed: disk on fire"},
	} {
		t.Run(tc.name, func(t *testing.T) { loseAndStart(t, tc.lose, tc.f, tc.want) })
	}
}

func loseAndStart(t *testing.T, lose []int, f *fault, want string) {
	dir := newSiteDir(t)
	s := openSite(t, dir, 64<<20, nil)
	s.take(t, "older")
	put(t, s.devs[0], 1, 0, chunkSize)
	n, err := s.cat.Take("both", s.devs, TakeOptions{Limit: time.Minute, Writable: true, MaxStore: 2 * siteSize})
	if err != nil {
		t.Fatal(err)
	}
	put(t, s.devs[0], 2, 0, 3*chunkSize)
	put(t, image(t, n, "a"), 3, 0, chunkSize)
	s.take(t, "newer")
	put(t, s.devs[0], 4, 0, siteSize)
	for _, k := range lose {
		s.devs[k].breakImage(image(t, n, siteDevices[k]), f, f.err)
		s.devs[k].settle(time.Minute)
	}
	older := make([]byte, siteSize)
	newer := append(bytes.Repeat([]byte{2}, 3*chunkSize), make([]byte, siteSize-3*chunkSize)...)
	for start := range 4 {
		if start > 0 {
			s.close(t)
			for _, p := range inspect(t, dir) {
				t.Errorf("before start %d: %s: %s", start, p.File, p.Text)
			}
			s = openSite(t, dir, 64<<20, nil)
			if n = s.snap["both"]; n == nil {
				t.Fatalf("start %d: the snapshot is gone", start)
			}
			wantImage(t, s, "older", "a", older)
			wantImage(t, s, "newer", "a", newer)
		}
		if got := n.State(); got != want {
			t.Errorf("start %d: state of the snapshot\n got %s\nwant %s", start, got, want)
		}
		if got := n.MaxStore(); got != 2*siteSize/blockSize*blockSize {
			t.Errorf("start %d: its limit is %d", start, got)
		}
		for _, k := range lose {
			i := image(t, n, siteDevices[k])
			if got := i.State(); got != want {
				t.Errorf("start %d: state of the image of %s\n got %s\nwant %s", start, siteDevices[k], got, want)
			}
			if err := i.Read(make([]byte, 1), 0); !errors.Is(err, errors.Unwrap(f.err)) && !errors.Is(err, f.err) {
				t.Errorf("start %d: it reads with %v", start, err)
			}
		}
		if err := Check(s.pool, s.devs...); err != nil {
			t.Errorf("start %d: %v", start, err)
		}
	}
	if err := n.Destroy(false); err != nil {
		t.Error(err)
	}
	wantLayers(t, dir, 2)
	s.close(t)
	s = openSite(t, dir, 64<<20, nil)
	defer s.close(t)
	if _, back := s.snap["both"]; back {
		t.Error("a destroyed snapshot is back")
	}
	wantLayers(t, dir, 2)
}

// wantLayers checks how many layers of device a have files, and how many are entered.
func wantLayers(t *testing.T, dir string, want int) {
	t.Helper()
	run := filepath.Join(dir, "run", "devices", "a")
	numbers, err := numbersIn(run, layerName)
	if err != nil || len(numbers) != want {
		t.Errorf("files of layers %v, %v, want %d", numbers, err, want)
	}
	b, err := os.ReadFile(filepath.Join(run, registerName))
	if err != nil {
		t.Fatal(err)
	}
	entries := 0
	for at := entryBytes; at < len(b); at += entryBytes {
		if host.Uint64(b[at:]) != 0 {
			entries++
		}
	}
	if entries != want {
		t.Errorf("%d layers are entered, want %d", entries, want)
	}
}

// TestSpentLayer looks at the file that is left of a lost image, and does something to it
// while nobody looks: that costs the older image nothing, and the lost one stays lost.
func TestSpentLayer(t *testing.T) {
	for _, tc := range []struct {
		name  string
		spoil func(path string) error
		want  string // in the state
	}{
		{"nothing", func(string) error { return nil }, "overflowed"},
		{"removed", os.Remove, "failed: layer 1 is lost: no such file"},
		{"emptied", func(path string) error { return os.Truncate(path, 0) }, "failed: layer 1 is lost: its file was emptied"},
		{"not cut", func(path string) error { return os.Truncate(path, 3*memoryStep) }, "overflowed"},
		{"not entered as spent", func(path string) error {
			return poke(filepath.Join(filepath.Dir(path), registerName), entryBytes*2, entrySpent^entryInUse)
		}, "overflowed"},
		{"not spent by itself", func(path string) error { return poke(path, layerSpent, 1) }, "overflowed"},
		{"register removed", func(path string) error {
			return os.Remove(filepath.Join(filepath.Dir(path), registerName))
		}, "overflowed"},
		{"no fault", func(path string) error { return poke(path, layerFault, faultOverflowed) }, "failed: nobody knows why"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := newSiteDir(t)
			s := openSite(t, dir, 64<<20, nil)
			s.take(t, "older")
			n := s.take(t, "lost")
			for c := chunkNo(0); c < chunks(siteSize); c++ {
				put(t, s.devs[0], byte(c+1), c.off(), min(blockSize, siteSize-c.off()))
			}
			s.take(t, "newer")
			path := s.devs[0].layers[1].table.path
			s.devs[0].breakImage(image(t, n, "a"), overflowed, ErrOverflowed)
			s.devs[0].settle(time.Minute)
			if st, err := os.Stat(path); err != nil || st.Size() != memoryStep {
				t.Fatalf("what is left of the layer: %v, %v; want a file of %d bytes", st, err, memoryStep)
			}
			s.close(t)
			if err := tc.spoil(path); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				s = openSite(t, dir, 64<<20, nil)
				if got := image(t, s.snap["lost"], "a").State(); !strings.HasPrefix(got, tc.want) {
					t.Errorf("state of the lost image\n got %s\nwant %s", got, tc.want)
				}
				if tc.name != "register removed" {
					wantImage(t, s, "older", "a", make([]byte, siteSize))
				}
				if err := Check(s.pool, s.devs...); err != nil {
					t.Error(err)
				}
				if st, err := os.Stat(path); err != nil || st.Size() != memoryStep {
					t.Errorf("what is left of the layer: %v, %v; want a file of %d bytes", st, err, memoryStep)
				}
				s.close(t)
			}
		})
	}
}

// TestLayerCutShort cuts a layer that older images read through: they are lost, not
// wrong, and the newer one lives on.
func TestLayerCutShort(t *testing.T) {
	for _, to := range []int64{1, tableHeader, tableNodes, memoryStep - 1} {
		dir := newSiteDir(t)
		s := openSite(t, dir, 64<<20, nil)
		for k, name := range []string{"one", "two", "three"} {
			s.take(t, name)
			put(t, s.devs[0], byte(k+1), 0, siteSize)
		}
		layer := s.devs[0].layers[1].table.path
		s.close(t)
		if err := os.Truncate(layer, to); err != nil {
			t.Fatal(err)
		}
		s = openSite(t, dir, 64<<20, nil)
		for _, name := range []string{"one", "two"} {
			if i, ok := s.snap[name].Image("a"); ok && i.Err() == nil {
				t.Errorf("a@%s is %s, its layer was cut to %d bytes", name, i.State(), to)
			}
		}
		wantImage(t, s, "three", "a", bytes.Repeat([]byte{2}, siteSize))
		s.close(t)
	}
}

// TestStartThatFails starts with another snapstore and without a device, and ends
// before Recover: that costs no image anything.
func TestStartThatFails(t *testing.T) {
	dir, boot := newSiteDir(t), thisBoot(t)
	s := openSite(t, dir, 64<<20, nil)
	n, err := s.cat.Take("both", s.devs, TakeOptions{Limit: time.Minute, Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range s.devs {
		put(t, d, 1, 0, siteSize)
		put(t, image(t, n, d.Name()), 2, 0, chunkSize)
	}
	s.close(t)

	for range 2 { // of them the second finds what the first has left
		cat, why, err := openSoundCatalogue(filepath.Join(dir, "run"), boot)
		if err = errors.Join(why, err); err != nil {
			t.Fatal(err)
		}
		part, err := store.OpenMem(1 << 20)
		if err != nil {
			t.Fatal(err)
		}
		pool := store.NewPool(part)
		o, err := OpenOrigin(filepath.Join(dir, "b"))
		if err != nil {
			t.Fatal(err)
		}
		o.file = copied{o.file, "b"}
		b, err := cat.Open(o, pool, Config{Name: "b"})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(b.Close(), pool.Close(), cat.Close()); err != nil {
			t.Fatal(err)
		}
	}

	s = openSite(t, dir, 64<<20, nil)
	defer s.close(t)
	content := append(bytes.Repeat([]byte{2}, chunkSize), make([]byte, siteSize-chunkSize)...)
	for _, name := range siteDevices {
		wantImage(t, s, "both", name, content)
	}
	if err := Check(s.pool, s.devs...); err != nil {
		t.Error(err)
	}
}

// TestForeignWriteLosesOverlays finds an origin that somebody else wrote to: what its
// images held, and what was written to them, goes back to the snapstore.
func TestForeignWriteLosesOverlays(t *testing.T) {
	h := newHome(t, siteSize)
	h.open()
	n, err := h.cat.Take("s", []*Device{h.dev}, TakeOptions{Limit: time.Minute, Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	put(t, h.dev, 1, 0, 2*chunkSize)
	put(t, image(t, n, "vda"), 2, chunkSize, 2*chunkSize)
	h.close()

	h.moved = true // and that is another file than the one before
	snaps := h.open()
	defer h.close()
	if got := image(t, snaps["s"], "vda").State(); got != "failed: the origin was replaced by another file" {
		t.Errorf("state of the image\n got %s\nwant failed, and why", got)
	}
	if err := Check(h.pool, h.dev); err != nil {
		t.Error(err)
	}
	if _, used, _ := h.pool.Space(); used != 0 {
		t.Errorf("%d bytes of the snapstore are in use, want none", used)
	}
}
