package cow

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"blksnap/store"
)

// home is where a device's origin, snapstore and state are. It is opened and closed
// as often as a test likes.
type home struct {
	t    *testing.T
	dir  string
	size int64

	state  string       // directory of what outlives the machine, empty where nothing does
	moved  bool         // the origin is a copy that is taken for the original
	notify func(Event)  // may be nil
	log    *slog.Logger // may be nil
	step   func(string) // see Catalogue.step
	disk   stateDisk    // nil: the host's

	// limit is Config.PreserveLimit.
	limit time.Duration

	// wrap, if set, is put around the origin.
	wrap func(originFile) originFile

	cat  *Catalogue
	part *part
	pool *store.Pool
	dev  *Device
}

func newHome(t *testing.T, size int64) *home {
	t.Helper()
	h := &home{t: t, dir: t.TempDir(), size: size}
	if err := os.WriteFile(filepath.Join(h.dir, "vda"), make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(h.dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	return h
}

// open returns the snapshots that were found.
func (h *home) open() map[string]*Snapshot {
	h.t.Helper()
	h.cat = newCatalogue(h.t, filepath.Join(h.dir, "run"), h.state)
	h.cat.step = h.step
	if h.disk != nil {
		h.cat.disk = h.disk
	}
	f, err := store.OpenFile(filepath.Join(h.dir, "store"), 16<<20, false)
	if err != nil {
		h.t.Fatal(err)
	}
	h.part = &part{Part: f, hangs: true}
	h.pool = store.NewPool(h.part)
	o, err := OpenOrigin(filepath.Join(h.dir, "vda"))
	if err != nil {
		h.t.Fatal(err)
	}
	if h.moved {
		o.file = movedFile{o.file}
	}
	if h.wrap != nil {
		o.file = h.wrap(o.file)
	}
	if h.dev, err = h.cat.Open(o, h.pool, Config{Name: "vda", Notify: h.notify, Log: h.log, PreserveLimit: h.limit}); err != nil {
		h.t.Fatal(err)
	}
	snaps := make(map[string]*Snapshot)
	found, _, err := h.cat.Recover()
	if err != nil {
		h.t.Fatal(err)
	}
	for _, s := range found {
		snaps[s.Name()] = s
	}
	if err := h.pool.Discard(); err != nil {
		h.t.Fatal(err)
	}
	return snaps
}

// movedFile is an origin that looks the same wherever it is.
type movedFile struct{ originFile }

func (f movedFile) identify(bool) (identity, error) {
	size, err := f.size()
	return identity{ino: 1, size: size, changed: 1}, err
}

func (h *home) take(name string) *Snapshot {
	h.t.Helper()
	s, err := h.cat.Take(name, []*Device{h.dev}, TakeOptions{Limit: time.Minute})
	if err != nil {
		h.t.Fatal(err)
	}
	return s
}

// keep waits until the change map is written down.
func (h *home) keep() {
	h.t.Helper()
	for {
		h.dev.keeping <- struct{}{}
		kept := h.dev.durable.Load() != nil
		<-h.dev.keeping
		if kept {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// close closes what is left when the device is closed.
func (h *home) close() {
	h.t.Helper()
	if err := errors.Join(h.dev.Close(), h.pool.Close(), h.cat.Close()); err != nil {
		h.t.Errorf("close: %v", err)
	}
}

// TestCloseKeepsSnapshots closes a device in the middle of a fold, while it is
// written to. The images that end with the process must not look to the reclaimer
// like ones that were destroyed, nor to a writer like ones that need nothing any
// more: the next start opens them again.
func TestCloseKeepsSnapshots(t *testing.T) {
	const size = 1 << 20
	for range 8 { // what the reclaimer sees first is a matter of chance
		h := newHome(t, size)
		h.open()
		put(t, h.dev, 1, 0, size)
		h.take("a")
		put(t, h.dev, 2, blockSize, blockSize)
		between := h.take("between")
		put(t, h.dev, 3, 2*blockSize, blockSize)
		h.take("c")
		want := map[string][]byte{"a": bytes.Repeat([]byte{1}, size), "c": make([]byte, size)}
		if err := h.dev.Read(want["c"], 0); err != nil {
			t.Fatal(err)
		}

		entered, release := stop(h.part.hook, "write", 2*blockSize) // joins two slots
		destroyed := begin(func() error { return between.Destroy(false) })
		<-entered
		closed := begin(h.dev.Close)
		stillWaits(t, closed, "closing while a slot is copied")
		err := h.dev.Write(bytes.Repeat([]byte{4}, blockSize), 5*blockSize, false)
		if err != nil && !errors.Is(err, ErrStopping) {
			t.Errorf("a write to a device that is closing: %v", err)
		}
		close(release)
		if err := errors.Join(<-closed, <-destroyed); err != nil {
			t.Error(err)
		}
		h.close()

		snaps := h.open()
		for name, bytes := range want {
			s := snaps[name]
			if s == nil {
				t.Errorf("snapshot %s is gone after a clean end", name)
				continue
			}
			got := make([]byte, size)
			if err := image(t, s, "vda").Read(got, 0); err != nil {
				t.Errorf("snapshot %s: %v", name, err)
				continue
			}
			if at := firstDiff(got, bytes); at >= 0 {
				t.Errorf("snapshot %s: at %d got %d, want %d", name, at, got[at], bytes[at])
			}
		}
		if err := Check(h.pool, h.dev); err != nil {
			t.Error(err)
		}
		h.close()
		if t.Failed() {
			return
		}
	}
}

// TestDestroyWhenClosed checks that nobody waits for a reclaimer that has ended, or
// ends meanwhile.
func TestDestroyWhenClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1, 1<<20, 1<<20)
		d := r.devs[0]
		r.devs = nil // closed here
		before, after := r.take("before", d), r.take("after", d)

		inside, _ := d.readers.tryEnter()
		start := time.Now()
		destroyed := begin(func() error { return before.Destroy(false) })
		waitsOn(t, destroyed, "destroying with a reader inside")
		closed := begin(d.Close)
		ends(t, destroyed, "destroying while the device is closed")
		waitsOn(t, closed, "closing with a reader inside")
		d.readers.leave(inside)
		ends(t, closed, "closing")
		if err := after.Destroy(false); err != nil {
			t.Error(err)
		}
		if got := time.Since(start); got != 0 {
			t.Errorf("destroying waited for %v", got)
		}
		if err := d.Close(); err != nil {
			t.Errorf("close again: %v", err)
		}
	})
}

// TestCloseWhileTheGenerationEnds closes a device while a new generation is due,
// and a snapshot is still being taken: both want the same lock.
func TestCloseWhileTheGenerationEnds(t *testing.T) {
	h := newHome(t, 1<<20)
	h.state = t.TempDir()
	h.open()
	d := h.dev
	d.taking.Lock()
	closed := begin(d.Close)
	select {
	case <-d.stop:
	case <-time.After(10 * time.Second):
		t.Error("Close does not begin before it has the lock that a new generation needs")
	}
	why := errors.New("a reason")
	d.reason.Store(&why)
	renewed := begin(func() error { d.renew(); return nil })
	d.taking.Unlock()
	for what, done := range map[string]<-chan error{"Close": closed, "renew": renewed} {
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s hangs", what)
		}
	}
	if err := d.Reset("too late"); !errors.Is(err, ErrStopping) {
		t.Errorf("Reset of a closed device: %v, want ErrStopping", err)
	}
	if _, ok := d.writers.tryEnter(); ok {
		t.Error("the gate of a closed device is open")
	}
	h.close()
}

// TestCloseEndsFold checks that closing does not wait for all of a fold.
func TestCloseEndsFold(t *testing.T) {
	const chunksEach = 8
	h := newHome(t, chunksEach*chunkSize)
	h.open()
	each := func(block int64, v byte) {
		for c := range chunkNo(chunksEach) {
			put(t, h.dev, v, c.off()+block*blockSize, blockSize)
		}
	}
	put(t, h.dev, 1, 0, h.size)
	h.take("a")
	each(1, 2)
	between := h.take("between")
	each(2, 3) // in the same chunks: slots are joined
	h.take("c")
	var copies atomic.Int32
	entered, release := make(chan struct{}), make(chan struct{})
	h.part.hook(func(op string, off, n int64) error {
		if op == "write" && copies.Add(1) == 1 {
			close(entered)
			<-release
		}
		return nil
	})
	destroyed := begin(func() error { return between.Destroy(false) })
	<-entered
	closed := begin(h.dev.Close)
	<-h.dev.stop
	close(release)
	if err := errors.Join(<-closed, <-destroyed); err != nil {
		t.Error(err)
	}
	if got := copies.Load(); got != 1 {
		t.Errorf("%d of %d chunks were copied, want only the one that was under way", got, chunksEach)
	}
	h.close()
	snaps := h.open()
	want(t, image(t, snaps["a"], "vda"), 1, 0, h.size)
	if err := Check(h.pool, h.dev); err != nil {
		t.Error(err)
	}
	h.close()
}

// TestFoldGivesUpOnHangingStore checks that a fold waits for a store that hangs
// once, and not for each of its chunks.
func TestFoldGivesUpOnHangingStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const chunksEach = 8
		r := newEmptyRig(t)
		p := r.add(16<<20, true)
		d := r.addDevice("d0", chunksEach*chunkSize, Config{})
		each := func(block int64, v byte) {
			for c := range chunkNo(chunksEach) {
				put(t, d, v, c.off()+block*blockSize, blockSize)
			}
		}
		put(t, d, 1, 0, d.Size())
		a := r.take("a")
		each(1, 2)
		between := r.take("between")
		each(2, 3)
		r.take("c")
		release := make(chan struct{})
		p.hook(func(op string, off, n int64) error {
			if op == "write" {
				<-release
			}
			return nil
		})
		start := time.Now()
		r.destroy(between)
		if !d.settle(time.Hour) {
			t.Error("the fold does not end")
		}
		if got := time.Since(start); got != 10*time.Second {
			t.Errorf("the fold ended after %v, want 10s", got)
		}
		want(t, image(t, a, "d0"), 1, 0, d.Size())
		p.hook(nil)
		close(release)
		synctest.Wait()
		want(t, image(t, a, "d0"), 1, 0, d.Size())
		r.stuck = blockSize // what the slot that was to grow holds
	})
}
