// An origin in memory that tests can make fail, wait and count.

package cow

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"blksnap/store"
)

// disk is an origin in memory. Blocks that were never written, or were freed, are
// holes.
type disk struct {
	mu     sync.RWMutex
	data   []byte
	filled []bool // by block: not a hole

	// before, if set, is called before each operation ("read", "write", "zero",
	// "sync", "next") and may wait; an error fails the operation.
	before atomic.Pointer[func(op string, off, n int64) error]
}

func newDisk(size int64) *disk {
	return &disk{data: make([]byte, size), filled: make([]bool, (size+blockSize-1)/blockSize)}
}

func (k *disk) hook(f func(op string, off, n int64) error) {
	if f == nil {
		k.before.Store(nil)
		return
	}
	k.before.Store(&f)
}

func (k *disk) call(op string, off, n int64) error {
	if f := k.before.Load(); f != nil {
		return (*f)(op, off, n)
	}
	return nil
}

func (k *disk) ReadAt(p []byte, off int64) (int, error) {
	if err := k.call("read", off, int64(len(p))); err != nil {
		return 0, err
	}
	k.mu.RLock()
	defer k.mu.RUnlock()
	n := copy(p, k.data[min(off, int64(len(k.data))):])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (k *disk) WriteAt(p []byte, off int64) (int, error) {
	if err := k.call("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if end := off + int64(len(p)); end > int64(len(k.data)) {
		k.resizeLocked(end) // as a file does
	}
	k.fill(off, int64(len(p)))
	return copy(k.data[off:], p), nil
}

func (k *disk) fill(off, n int64) {
	for b := off / blockSize; b <= (off+n-1)/blockSize; b++ {
		k.filled[b] = true
	}
}

func (k *disk) tryReadAt(p []byte, off int64) error {
	_, err := k.ReadAt(p, off)
	return err
}

func (k *disk) tryWriteAt(p []byte, off int64) error {
	_, err := k.WriteAt(p, off)
	return err
}

func (k *disk) sync(bool) error { return k.call("sync", 0, 0) }

func (k *disk) zero(off, n int64, free bool) error {
	if err := k.call("zero", off, n); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	off = min(off, int64(len(k.data)))
	n = min(n, int64(len(k.data))-off)
	clear(k.data[off : off+n])
	if !free {
		k.fill(off, n)
		return nil
	}
	for b := (off + blockSize - 1) / blockSize; (b+1)*blockSize <= off+n; b++ {
		k.filled[b] = false
	}
	return nil
}

func (k *disk) next(off, end int64) (hole bool, to int64, err error) {
	if err := k.call("next", off, end-off); err != nil {
		return false, off, err
	}
	k.mu.RLock()
	defer k.mu.RUnlock()
	size := int64(len(k.data))
	if off >= size && size < end {
		return true, end, io.ErrUnexpectedEOF // as of a file
	}
	b := off / blockSize
	hole = !k.filled[b]
	for ; b*blockSize < min(end, size) && k.filled[b] != hole; b++ {
	}
	to = min(b*blockSize, end, size)
	if hole && to == size && size < end {
		err = io.ErrUnexpectedEOF
	}
	return hole, to, err
}

func (k *disk) size() (int64, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return int64(len(k.data)), k.call("size", 0, 0)
}

func (k *disk) truncate(size int64) error {
	if err := k.call("truncate", size, 0); err != nil {
		return err
	}
	k.resize(size)
	return nil
}

// resize is what somebody else does.
func (k *disk) resize(size int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.resizeLocked(size)
}

func (k *disk) resizeLocked(size int64) {
	data, filled := make([]byte, size), make([]bool, (size+blockSize-1)/blockSize)
	copy(data, k.data)
	copy(filled, k.filled)
	k.data, k.filled = data, filled
}

func (k *disk) willNeed(off, n int64) {}

func (k *disk) identify(bool) (identity, error) {
	size, err := k.size()
	return identity{ino: 1, size: size, changed: 1}, err
}

func (k *disk) written() (uint64, bool) { return 0, false }

func (k *disk) noteEnded(uuid.UUID) error { return syscall.ENOTSUP }

func (k *disk) ended() (uuid.UUID, error) { return uuid.Nil, syscall.ENOTSUP }

func (k *disk) Close() error { return nil }

// part is a part of a snapstore in memory that tests can make fail and wait.
type part struct {
	store.Part
	before atomic.Pointer[func(op string, off, n int64) error]
	hangs  bool
}

func (p *part) hook(f func(op string, off, n int64) error) {
	if f == nil {
		p.before.Store(nil)
		return
	}
	p.before.Store(&f)
}

func (p *part) Traits() store.Traits {
	t := p.Part.Traits()
	t.MayHang = p.hangs
	return t
}

func (p *part) ReadAt(b []byte, off int64) (int, error) {
	if f := p.before.Load(); f != nil {
		if err := (*f)("read", off, int64(len(b))); err != nil {
			return 0, err
		}
	}
	return p.Part.ReadAt(b, off)
}

func (p *part) WriteAt(b []byte, off int64) (int, error) {
	if f := p.before.Load(); f != nil {
		if err := (*f)("write", off, int64(len(b))); err != nil {
			return 0, err
		}
	}
	return p.Part.WriteAt(b, off)
}

// rig is a pool and devices over it; at the end of the test the books are
// checked and everything is closed.
type rig struct {
	t      *testing.T
	cat    *Catalogue
	pool   *store.Pool
	parts  []*part
	disks  []*disk
	devs   []*Device
	stuck  int64 // bytes in slots that a write hangs in
	mu     sync.Mutex
	events []Event
	notify func(Event) // if set, called for each event as well
}

// newRig makes n devices of size bytes each over a snapstore of limit bytes.
func newRig(t *testing.T, n int, size, limit int64) *rig {
	t.Helper()
	r := newEmptyRig(t)
	r.addPart(limit)
	for i := range n {
		r.addDevice(fmt.Sprintf("d%d", i), size, Config{})
	}
	return r
}

// newEmptyRig has no part and no device yet.
func newEmptyRig(t *testing.T) *rig {
	r := &rig{t: t, cat: newCatalogue(t, "", ""), pool: store.NewPool()}
	t.Cleanup(r.close)
	return r
}

func (r *rig) addPart(limit int64) *part {
	r.t.Helper()
	return r.add(limit, false)
}

func (r *rig) add(limit int64, hangs bool) *part {
	r.t.Helper()
	m, err := store.OpenMem(limit)
	if err != nil {
		r.t.Fatal(err)
	}
	p := &part{Part: m, hangs: hangs}
	if err := r.pool.Add(p); err != nil {
		r.t.Fatal(err)
	}
	r.parts = append(r.parts, p)
	return p
}

func (r *rig) addDevice(name string, size int64, c Config) *Device {
	r.t.Helper()
	k := newDisk(size)
	c.Name = name
	c.Notify = func(e Event) {
		r.mu.Lock()
		r.events = append(r.events, e)
		notify := r.notify
		r.mu.Unlock()
		if notify != nil {
			notify(e)
		}
	}
	d, err := r.cat.Open(&Origin{path: "/" + name, size: size, file: k}, r.pool, c)
	if err != nil {
		r.t.Fatal(err)
	}
	r.disks, r.devs = append(r.disks, k), append(r.devs, d)
	return d
}

func (r *rig) close() {
	if err := Check(r.pool, r.devs...); err != nil {
		r.t.Errorf("the books are wrong at the end of the test: %v", err)
	}
	for _, d := range r.devs {
		d.mu.Lock()
		images := slices.Clone(d.images)
		d.mu.Unlock()
		for _, i := range images {
			if err := i.snapshot.Destroy(true); err != nil && !errors.Is(err, ErrDestroyed) {
				r.t.Errorf("destroy: %v", err)
			}
		}
	}
	if _, used, _ := r.pool.Space(); used != r.stuck {
		r.t.Errorf("%d bytes of the snapstore are in use after all snapshots were destroyed, want %d", used, r.stuck)
	}
	for _, d := range r.devs {
		if err := d.Close(); err != nil {
			r.t.Errorf("close: %v", err)
		}
	}
	if err := errors.Join(r.pool.Close(), r.cat.Close()); err != nil {
		r.t.Errorf("close: %v", err)
	}
}

func newCatalogue(t *testing.T, dir, state string) *Catalogue {
	t.Helper()
	c, why, err := OpenCatalogue(dir, state)
	if err = errors.Join(why, err); err != nil {
		t.Fatal(err)
	}
	return c
}

func (r *rig) take(name string, devs ...*Device) *Snapshot {
	r.t.Helper()
	return r.takeWith(TakeOptions{}, name, devs...)
}

func (r *rig) takeWritable(name string, devs ...*Device) *Snapshot {
	r.t.Helper()
	return r.takeWith(TakeOptions{Writable: true}, name, devs...)
}

func (r *rig) takeWith(o TakeOptions, name string, devs ...*Device) *Snapshot {
	r.t.Helper()
	if devs == nil {
		devs = r.devs
	}
	o.Limit = time.Minute
	s, err := r.cat.Take(name, devs, o)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

func (r *rig) destroy(s *Snapshot) {
	r.t.Helper()
	if err := s.Destroy(false); err != nil {
		r.t.Fatal(err)
	}
}

// event says whether an event of the kind was told for the snapshot.
func (r *rig) event(kind, snapshot string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		if e.Kind == kind && e.Snapshot == snapshot {
			return true
		}
	}
	return false
}

var errIO = fmt.Errorf("injected: %w", syscall.EIO)
