package cow

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMemoryFaults empties each file that is mapped, under a device that is written to
// while its images are read and written and its map is asked. No write fails or is lost, what an
// image returns is right or EIO, the device goes on in a new generation and with new
// snapshots, and the next start finds nothing that is wrong.
func TestMemoryFaults(t *testing.T) {
	for _, name := range []string{"lease", "changes", "layers", "layer-0", "layer-1", "layer-2", "overlay-2", "catalogue"} {
		t.Run(name, func(t *testing.T) { testMemoryFault(t, name) })
	}
}

const faultSize = 4 << 20

func testMemoryFault(t *testing.T, name string) {
	h := newHome(t, faultSize)
	h.state = filepath.Join(h.dir, "state")
	began := make(chan struct{})
	var once sync.Once
	h.notify = func(e Event) {
		if e.Kind == EventGeneration && strings.Contains(e.Text, "cannot be read any more") {
			once.Do(func() { close(began) })
		}
	}
	h.open()
	put(t, h.dev, 1, 0, faultSize)
	a := h.take("a")
	put(t, h.dev, 2, 0, faultSize/2)
	gone := h.take("gone")
	put(t, h.dev, 3, 0, faultSize/4)
	b, err := h.cat.Take("b", []*Device{h.dev}, TakeOptions{Limit: time.Minute, Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	was := h.dev.Tracking().Number()

	path := h.layer(name)
	if name == "catalogue" {
		path = filepath.Join(h.dir, "run", name)
	}
	u := &users{t: t, h: h, a: a.Images()[0], b: b.Images()[0], stop: make(chan struct{})}
	u.content = bytes.Repeat([]byte{1}, faultSize)
	if err := h.dev.Read(u.content, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.end() })
	u.start()
	u.rounds(2)
	u.truncate(path)
	u.rounds(2)
	if err := gone.Destroy(true); err != nil { // a fold, and memory of all kinds
		t.Error(err)
	}
	if name == "layers" || name == "catalogue" { // which only snapshots touch
		if s, err := h.cat.Take("at the fault", []*Device{h.dev}, TakeOptions{Limit: time.Minute}); err == nil {
			s.Destroy(true)
		} else if !errors.Is(err, syscall.EIO) {
			t.Errorf("take a snapshot at the fault: %v, want EIO", err)
		}
	}
	if name != "catalogue" {
		select {
		case <-began:
		case <-time.After(time.Minute):
			t.Fatal("no new generation began")
		}
		if _, ok := h.dev.Changes().Since(was); ok {
			t.Errorf("changes since %d are known in the new generation", was)
		}
		for _, s := range []*Snapshot{a, b} {
			if got := s.State(); !strings.Contains(got, "cannot be read any more") {
				t.Errorf("snapshot %s is %q", s.Name(), got)
			}
		}
	}
	u.rounds(2)
	u.end()
	wantBytes(t, "the device", h.dev, u.content)

	var c *Snapshot
	for c == nil {
		if c, err = h.cat.Take("c", []*Device{h.dev}, TakeOptions{Limit: time.Minute}); name == "catalogue" {
			if err == nil {
				t.Error("a snapshot that no start would find was taken")
			}
			break
		} else if err != nil && !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
	}
	frozen := bytes.Clone(u.content)
	put(t, h.dev, 9, 0, faultSize/2)
	if c != nil {
		wantBytes(t, "the new snapshot", c.Images()[0], frozen)
	}
	for _, s := range []*Snapshot{a, b} {
		if err := s.Destroy(true); err != nil {
			t.Errorf("destroy %s: %v", s.Name(), err)
		}
	}
	if err := h.pool.Check(); err != nil {
		t.Error(err)
	}
	h.close()

	snaps := h.open()
	copy(u.content, bytes.Repeat([]byte{9}, faultSize/2))
	wantBytes(t, "the device after a start", h.dev, u.content)
	for _, s := range snaps {
		if s.Name() != "c" {
			t.Errorf("a start found snapshot %s", s.Name())
		} else if s.State() == "ok" {
			wantBytes(t, "the new snapshot after a start", s.Images()[0], frozen)
		}
	}
	if s := snaps["c"]; name != "catalogue" && (s == nil || s.State() != "ok") {
		t.Errorf("the start did not find the new snapshot")
	}
	h.close()
}

// users write to a device, and read and write its images, until end.
type users struct {
	t       *testing.T
	h       *home
	a, b    *Image
	content []byte // of the device

	stop    chan struct{}
	ended   sync.Once
	running sync.WaitGroup
	done    [5]atomic.Int64 // rounds of each

	// working is held shared in a round where the race detector watches.
	working sync.RWMutex
}

// truncate empties a file under all of them. The race detector dies of a fault that comes
// after its own look at the address: where it watches, the file is emptied between rounds.
func (u *users) truncate(path string) {
	u.t.Helper()
	if racing {
		u.working.Lock()
		defer u.working.Unlock()
	}
	if err := os.Truncate(path, 0); err != nil {
		u.t.Fatal(err)
	}
}

// round is one round of f.
func (u *users) round(f func(n int), n int) {
	if racing {
		u.working.RLock()
		defer u.working.RUnlock()
	}
	f(n)
}

func (u *users) start() {
	for k, f := range []func(round int){
		func(n int) { u.write(0, n, func(p []byte, off int64) error { return u.h.dev.Write(p, off, false) }) },
		func(n int) { u.write(1, n, u.tryWrite) },
		func(int) { u.read(u.a, 1, 0, faultSize) },
		func(n int) {
			u.allow(u.b.Write(bytes.Repeat([]byte{7}, blockSize), int64(n%64)*blockSize, false))
			u.read(u.b, 1, faultSize/2, faultSize/2)
			u.read(u.b, 7, int64(n%64)*blockSize, blockSize)
		},
		func(int) { u.h.dev.Changes().ReadMap(make([]byte, 64), 0) },
	} {
		u.running.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-u.stop:
					return
				default:
				}
				u.round(f, n)
				u.done[k].Add(1)
			}
		})
	}
}

// rounds waits until each has begun and ended n rounds.
func (u *users) rounds(n int64) {
	for k := range u.done {
		for want := u.done[k].Load() + n + 1; u.done[k].Load() < want; {
			time.Sleep(time.Millisecond)
		}
	}
}

func (u *users) end() {
	u.ended.Do(func() {
		close(u.stop)
		u.running.Wait()
	})
}

// write writes one block in each chunk of a half of the device.
func (u *users) write(half int64, n int, write func(p []byte, off int64) error) {
	v := byte(10 + n%200)
	p := bytes.Repeat([]byte{v}, blockSize)
	for off := half * faultSize / 2; off < (half+1)*faultSize/2; off += chunkSize {
		at := off + int64(n%blocksPerChunk)*blockSize
		if err := write(p, at); err != nil {
			u.t.Errorf("write at %d: %v", at, err)
		}
		copy(u.content[at:], p)
	}
}

func (u *users) tryWrite(p []byte, off int64) error {
	rest := make(chan func() error, 1)
	switch err := u.h.dev.TryWrite(p, off, func(f func() error) { rest <- f }); err {
	case syscall.EAGAIN:
		return u.h.dev.Write(p, off, false)
	case errTaken:
		return (<-rest)()
	default:
		return err
	}
}

// read reads what is v everywhere, or fails.
func (u *users) read(i *Image, v byte, off, n int64) {
	p := make([]byte, n)
	if err := i.Read(p, off); err != nil {
		u.allow(err)
	} else if k := len(p) - bytes.Count(p, []byte{v}); k > 0 {
		u.t.Errorf("%d of the image's %d bytes from %d on are not %d", k, n, off, v)
	}
}

// allow allows the errors of images that are lost.
func (u *users) allow(err error) {
	if err != nil && !errors.Is(err, syscall.EIO) {
		u.t.Errorf("%v, want EIO", err)
	}
}

// protect has the words of a layer fault at the next access that prot does not allow.
func protect(t *testing.T, i *Image, prot int) {
	t.Helper()
	m := i.layer.table.mem
	if err := unix.Mprotect(m.Bytes()[:m.Len()], prot); err != nil {
		t.Fatal(err)
	}
}

// newFaulty is a home that is open, and a channel that is closed when memory has faulted
// and a new generation has begun.
func newFaulty(t *testing.T, size int64) (h *home, began chan struct{}) {
	t.Helper()
	began = make(chan struct{})
	h = newHome(t, size)
	h.notify = func(e Event) {
		if e.Kind == EventGeneration && strings.Contains(e.Text, "cannot be read any more") {
			close(began)
		}
	}
	h.open()
	return h, began
}

// wantSound waits for the new generation and looks whether each slot was given back once.
func (h *home) wantSound(began chan struct{}) {
	h.t.Helper()
	select {
	case <-began:
	case <-time.After(time.Minute):
		h.t.Fatal("no new generation began")
	}
	if !h.dev.settle(time.Minute) {
		h.t.Error("what is useless is not given back")
	}
	if err := h.pool.Check(); err != nil {
		h.t.Error(err)
	}
	h.close()
}

// TestFaultInAFold has the older layer fault where it is to get a word of which a part is
// useless: the newer layer has all of it then.
func TestFaultInAFold(t *testing.T) {
	if racing {
		t.Skip("the race detector makes the store, and dies of the fault")
	}
	const size = chunkSize + 2*blockSize
	h, began := newFaulty(t, size)
	put(t, h.dev, 1, 0, size)
	a := h.take("a")
	put(t, h.dev, 2, 0, blockSize) // makes the leaf
	if err := errors.Join(os.Truncate(filepath.Join(h.dir, "vda"), 2*chunkSize), h.dev.Resize()); err != nil {
		t.Fatal(err)
	}
	gone := h.take("gone")
	put(t, h.dev, 3, chunkSize, chunkSize)
	h.take("c")
	protect(t, a.Images()[0], unix.PROT_READ)
	if err := gone.Destroy(true); err != nil {
		t.Fatal(err)
	}
	h.wantSound(began)
}

// TestFaultBetweenSlotAndWord has a layer fault which is asked what its image has to count,
// when the slot of another has got one block more.
func TestFaultBetweenSlotAndWord(t *testing.T) {
	for _, tc := range []struct {
		name  string
		write func(h *home, p []byte) error
	}{
		{"write", func(h *home, p []byte) error { return h.dev.Write(p, blockSize, false) }},
		{"write that must not wait", func(h *home, p []byte) error {
			u := &users{t: h.t, h: h}
			return u.tryWrite(p, blockSize)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h, began := newFaulty(t, chunkSize)
			put(t, h.dev, 1, 0, chunkSize)
			a, err := h.cat.Take("a", []*Device{h.dev}, TakeOptions{Limit: time.Minute, MaxStore: 1 << 20})
			if err != nil {
				t.Fatal(err)
			}
			h.take("b")
			put(t, h.dev, 2, 0, blockSize)
			protect(t, a.Images()[0], unix.PROT_NONE)
			if err := tc.write(h, bytes.Repeat([]byte{3}, blockSize)); err != nil {
				t.Error(err)
			}
			want(t, h.dev, 3, blockSize, blockSize)
			h.wantSound(began)
		})
	}
}

// TestFaultWhileShrinking has a layer fault where what a device loses is to be preserved.
func TestFaultWhileShrinking(t *testing.T) {
	h, began := newFaulty(t, 4*chunkSize)
	put(t, h.dev, 1, 0, 4*chunkSize)
	a := h.take("a")
	put(t, h.dev, 2, 0, blockSize)
	protect(t, a.Images()[0], unix.PROT_NONE)
	if err := h.dev.Shrink(chunkSize); err != nil {
		t.Error(err)
	}
	want(t, h.dev, 2, 0, blockSize)
	h.wantSound(began)
}

// TestFaultInACheckpoint has the change map fault when it was written down: who gives a
// view of it back looks into it.
func TestFaultInACheckpoint(t *testing.T) {
	l := newPowerLife(t)
	l.dir = t.TempDir()
	l.keep()
	l.take() // who looked at the map until now has another one
	l.put(0)
	written, faulty := make(chan struct{}), make(chan struct{})
	l.disks.before = func(what string) error {
		if what == "rename /state/devices/vda/map.new" {
			close(written)
			<-faulty
		}
		return nil
	}
	checkpoint := begin(l.checkpoint)
	<-written
	l.unkept("fault")
	// Only the view has the root of now when these are over.
	for range 2 {
		l.take()
		l.put(0)
	}
	for _, s := range l.snaps {
		l.must(s.Destroy(true))
	}
	l.disks.before = nil
	mem := l.dev.mapMemory
	l.must(unix.Mprotect(mem.Bytes()[:mem.Len()], unix.PROT_NONE))
	close(faulty)
	l.must(<-checkpoint)
	if !mem.lost.Load() {
		t.Error("nobody looked into the map")
	}
	l.put(1 << regionShift)
}

// TestFaultWhileClosing has memory fault while the device closes, with a write in flight.
// It is told, closing is no failure, and the next start takes nothing for sound that is not.
func TestFaultWhileClosing(t *testing.T) {
	for _, tc := range []struct {
		name  string
		sound bool // the snapshot is
	}{{"layer-0", false}, {"lease", true}, {"changes", false}} {
		t.Run(tc.name, func(t *testing.T) { testFaultWhileClosing(t, tc.name, tc.sound) })
	}
}

func testFaultWhileClosing(t *testing.T, name string, sound bool) {
	h := newHome(t, 4*chunkSize)
	h.state = filepath.Join(h.dir, "state")
	log := new(bytes.Buffer)
	h.log = slog.New(slog.NewTextHandler(log, nil))
	h.open()
	h.keep()
	put(t, h.dev, 1, 0, 4*chunkSize)
	a := h.take("a")
	was, generation := a.Images()[0].Changes().Number(), h.dev.Changes().Generation()
	entered, release := stop(h.part.hook, "write", 0)
	wrote := begin(func() error { return h.dev.Write(bytes.Repeat([]byte{2}, blockSize), 0, false) })
	<-entered
	closed := begin(h.dev.Close)
	<-h.dev.stop
	if err := os.Truncate(h.layer(name), 0); err != nil {
		t.Fatal(err)
	}
	close(release)
	if err := errors.Join(<-wrote, <-closed); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "cannot be read any more") {
		t.Errorf("the log does not say what was lost:\n%s", log)
	}
	h.close()

	s := h.open()["a"]
	if got := s != nil && s.State() == "ok"; got != sound {
		t.Errorf("the snapshot is sound: %v, want %v", got, sound)
	} else if sound {
		want(t, s.Images()[0], 1, 0, 4*chunkSize)
	}
	want(t, h.dev, 2, 0, blockSize)
	// The map as it is, or what was written down of it and all that was written since.
	if got := h.dev.Changes().Generation(); got != generation {
		t.Errorf("generation\n got %v\nwant %v", got, generation)
	}
	since, ok := h.dev.Changes().Since(was)
	if !ok {
		t.Fatal("what changed since the snapshot is not known")
	}
	var list []Run
	for r, err := range since {
		if list = append(list, r); err != nil {
			t.Error(err)
		}
	}
	if len(list) != 1 || list[0].Off != 0 {
		t.Errorf("changed are %v, want one run that begins at 0", list)
	}
	h.close()
}

// TestFaultInAStart cuts a layer short when a start has found it sound, and opens another: the
// device is served, begins a new generation, and says why.
func TestFaultInAStart(t *testing.T) {
	h := newHome(t, 4*chunkSize)
	h.open()
	put(t, h.dev, 1, 0, 4*chunkSize)
	h.take("a")
	put(t, h.dev, 2, 0, blockSize)
	h.take("b")
	put(t, h.dev, 3, 0, blockSize)
	h.close()
	if err := os.Remove(h.layer("layer-0")); err != nil {
		t.Fatal(err)
	}
	why := ""
	h.notify = func(e Event) {
		switch {
		case e.Kind == EventSnapshotFailed && e.Snapshot == "a": // the first of its layers
			if err := os.Truncate(h.layer("layer-1"), 0); err != nil {
				t.Error(err)
			}
		case e.Kind == EventGeneration:
			why = e.Text
		}
	}
	for _, s := range h.open() {
		if s.State() == "ok" {
			t.Errorf("snapshot %s is ok", s.Name())
		}
	}
	if !strings.Contains(why, "layer-1 cannot be read any more") {
		t.Errorf("new generation because of %q, want layer-1", why)
	}
	want(t, h.dev, 3, 0, blockSize)
	h.notify = nil
	c := h.take("c")
	put(t, h.dev, 4, 0, blockSize)
	want(t, image(t, c, "vda"), 3, 0, blockSize)
	if err := h.pool.Check(); err != nil {
		t.Error(err)
	}
	h.close()
	if s := h.open()["c"]; s == nil || s.State() != "ok" {
		t.Error("the next start has not found the new snapshot")
	}
	h.close()
}

// cutLater is an origin that cuts a file short when it is asked who it is, which is after a
// start has found all of the device's state sound.
type cutLater struct {
	originFile
	cut func()
}

func (f cutLater) identify(print bool) (identity, error) {
	f.cut()
	return f.originFile.identify(print)
}

// TestFaultInResume cuts a file short when a start has found it sound, before it puts the
// slots in use that its words name.
func TestFaultInResume(t *testing.T) {
	for _, name := range []string{"layer-0", "layer-1", "layer-2", "overlay-1"} {
		t.Run(name, func(t *testing.T) {
			h := newHome(t, 4*chunkSize)
			h.open()
			put(t, h.dev, 1, 0, 4*chunkSize)
			h.take("a")
			put(t, h.dev, 2, 0, blockSize)
			b, err := h.cat.Take("b", []*Device{h.dev}, TakeOptions{Limit: time.Minute, Writable: true, MaxStore: 1 << 20})
			if err != nil {
				t.Fatal(err)
			}
			put(t, h.dev, 3, 0, 2*chunkSize)
			put(t, image(t, b, "vda"), 7, chunkSize, blockSize)
			h.take("c")
			put(t, h.dev, 4, 0, blockSize)
			h.close()

			began := make(chan struct{})
			h.notify = func(e Event) {
				if e.Kind == EventGeneration && strings.Contains(e.Text, name+" cannot be read any more") {
					close(began)
				}
			}
			var once sync.Once
			h.wrap = func(f originFile) originFile {
				return cutLater{f, func() {
					once.Do(func() {
						if err := os.Truncate(h.layer(name), 0); err != nil {
							t.Error(err)
						}
					})
				}}
			}
			for _, s := range h.open() {
				if got := s.State(); !strings.Contains(got, name+" cannot be read any more") {
					t.Errorf("snapshot %s is %q", s.Name(), got)
				}
			}
			want(t, h.dev, 4, 0, blockSize)
			want(t, h.dev, 3, blockSize, 2*chunkSize-blockSize)
			h.wantSound(began)

			h.notify = nil
			h.open()
			s := h.take("next")
			put(t, h.dev, 5, 0, 4*chunkSize)
			want(t, image(t, s, "vda"), 4, 0, blockSize)
			if err := Check(h.pool, h.dev); err != nil {
				t.Error(err)
			}
			h.close()
		})
	}
}

// TestMemoryIsGivenUpWhileItGrows gives a file up while it grows: it is empty afterwards,
// and what it has grown by is there all the same, and cannot fault.
func TestMemoryIsGivenUpWhileItGrows(t *testing.T) {
	const most = 64 << 20
	blocks := func(path string) int64 {
		var st syscall.Stat_t
		if err := syscall.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks
	}
	for round := range 8 {
		path := filepath.Join(t.TempDir(), "table")
		m, err := mapFile(path, 2*most)
		if err != nil {
			t.Fatal(err)
		}
		grow(t, m, memoryStep)
		m.Bytes()[0] = 1
		grown, before := make(chan error, 1), blocks(path)
		go func() { grown <- m.Grow(most) }()
		for blocks(path) == before { // it is past its first look
			runtime.Gosched()
		}
		if err := errors.Join(m.replace(), <-grown); err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if st.Size() != 0 {
			t.Errorf("round %d: the file has %d bytes, want 0", round, st.Size())
		}
		for off := int64(0); off < m.Len(); off += memoryStep {
			if b := m.Bytes()[off]; b != 0 {
				t.Errorf("byte %d is %d, want 0", off, b)
			}
			m.Bytes()[off] = 1
		}
		if err := m.Grow(memoryStep); err != nil || m.Len() != most+2*memoryStep {
			t.Errorf("then it grows to %d bytes: %v", m.Len(), err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}
