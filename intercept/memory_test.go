// Devices for the tests.

package intercept

import (
	"bytes"
	"context"
	"iter"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// memory is a Device in memory. The functions are called before an operation;
// they may wait or return its error.
type memory struct {
	readOnly bool
	before   func(op string, off, n int64) error // nil: all goes well
	flushes  atomic.Int64
	fua      atomic.Int64 // writes of any kind with FUA
	cached   atomic.Int64 // bytes

	mu   sync.RWMutex
	data []byte
}

func newMemory(n int64) *memory { return &memory{data: make([]byte, n)} }

func (m *memory) Size() int64 { return int64(len(m.data)) }

func (m *memory) ReadOnly() bool { return m.readOnly }

// content is a copy of all its bytes.
func (m *memory) content() []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return bytes.Clone(m.data)
}

func (m *memory) enter(op string, off, n int64) error {
	if m.before == nil {
		return nil
	}
	return m.before(op, off, n)
}

func (m *memory) Read(p []byte, off int64) error {
	if err := m.enter("read", off, int64(len(p))); err != nil {
		return err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	copy(p, m.data[off:off+int64(len(p))])
	return nil
}

func (m *memory) Write(p []byte, off int64, fua bool) error {
	return m.change("write", off, int64(len(p)), fua, func(q []byte) { copy(q, p) })
}

func (m *memory) WriteZeroes(off, n int64, f ZeroFlags) error {
	if f.Fast && f.NoHole {
		return syscall.ENOTSUP
	}
	return m.change("zero", off, n, f.FUA, func(q []byte) { clear(q) })
}

func (m *memory) Trim(off, n int64, fua bool) error {
	return m.change("trim", off, n, fua, func(q []byte) { clear(q) })
}

func (m *memory) change(op string, off, n int64, fua bool, do func([]byte)) error {
	if err := m.enter(op, off, n); err != nil {
		return err
	}
	if fua {
		m.fua.Add(1)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	do(m.data[off : off+n])
	return nil
}

func (m *memory) Flush() error {
	m.flushes.Add(1)
	return m.enter("flush", 0, 0)
}

func (m *memory) Cache(off, n int64) error {
	m.cached.Add(n)
	return m.enter("cache", off, n)
}

const dirtyBitmap = "qemu:dirty-bitmap:since-3"

func (m *memory) Contexts() []string { return []string{"base:allocation", dirtyBitmap} }

func (m *memory) HasContext(name string) bool {
	return slices.Contains(m.Contexts(), name) || name == "qemu:dirty-bitmap:since-2"
}

// Status says of base:allocation which blocks of 4 KiB are zero, and of a
// bitmap that the blocks with an odd number are dirty.
func (m *memory) Status(name string, off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		if err := m.enter("status", off, n); err != nil {
			yield(Extent{}, err)
			return
		}
		m.mu.RLock()
		defer m.mu.RUnlock()
		for end := off + n; off < end; {
			e := Extent{N: min(4096-off%4096, m.Size()-off), Flags: uint32(off / 4096 & 1)}
			if name == "base:allocation" {
				e.Flags = NBD_STATE_HOLE | NBD_STATE_ZERO
				if bytes.ContainsFunc(m.data[off:off+e.N], func(r rune) bool { return r != 0 }) {
					e.Flags = 0
				}
			}
			if !yield(e, nil) {
				return
			}
			off += e.N
		}
	}
}

// tryMemory is memory that often serves at once, sometimes would block, and sometimes
// has a write taken over.
type tryMemory struct {
	*memory
	tries atomic.Int64
}

func (m *tryMemory) TryRead(p []byte, off int64) error {
	if m.tries.Add(1)%3 == 0 {
		p[0] = 0xee // what it leaves does not count
		return ErrWouldBlock
	}
	return m.Read(p, off)
}

func (m *tryMemory) TryWrite(p []byte, off int64, taken func(func() error)) error {
	n := m.tries.Add(1)
	if n%3 == 0 {
		return ErrWouldBlock
	}
	if n%8 == 0 && taken != nil {
		go taken(func() error { return m.Write(p, off, false) })
		return ErrTaken
	}
	return m.Write(p, off, false)
}

// plain hides everything but the Device.
type plain struct{ Device }

// shelf is a set of exports.
type shelf struct {
	mu      sync.Mutex
	devices map[string]Device
	gone    map[string]chan struct{}
	open    map[string]int
	changed sync.Cond // open became less
	opening func(name string) error
}

func newShelf(devices map[string]Device) *shelf {
	s := &shelf{devices: devices, gone: map[string]chan struct{}{}, open: map[string]int{}}
	for name := range devices {
		s.gone[name] = make(chan struct{})
	}
	s.changed.L = &s.mu
	return s
}

func (s *shelf) List() []ExportInfo {
	var list []ExportInfo
	for name := range s.devices {
		list = append(list, ExportInfo{Name: name, Description: "about " + name})
	}
	slices.SortFunc(list, func(a, b ExportInfo) int { return strings.Compare(a.Name, b.Name) })
	return list
}

func (s *shelf) Open(_ context.Context, name, _ string) (Export, error) {
	if s.opening != nil {
		if err := s.opening(name); err != nil {
			return Export{}, err
		}
	}
	if name == "" {
		name = "disk"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	dev, ok := s.devices[name]
	if !ok {
		return Export{}, &refusal{"no export " + name, syscall.ENOENT}
	}
	s.open[name]++
	release := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.open[name]--
		s.changed.Broadcast()
	}
	return Export{ExportInfo{name, "about " + name}, dev, release, s.gone[name]}, nil
}

// waitReleased returns when nobody uses name.
func (s *shelf) waitReleased(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.open[name] > 0 {
		s.changed.Wait()
	}
}

// users is how often name is in use.
func (s *shelf) users(name string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open[name]
}

// startServer serves exports on a unix socket until the test ends, and then
// checks that nothing of them is in use.
func startServer(t testing.TB, o Options) (*Server, net.Addr) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(o)
	serve(t, s, l, s.Serve)
	return s, l.Addr()
}

// serve runs one of s's Serve methods on l until the test ends.
func serve(t testing.TB, s *Server, l net.Listener, run func(context.Context, net.Listener) error) {
	served := make(chan error, 1)
	go func() { served <- run(context.Background(), l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shutdown at the end of the test: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
		s.budget.mu.Lock()
		defer s.budget.mu.Unlock()
		if got, want := s.budget.free, newBudget(s.opts.MemoryBudget, s.opts.MaxConns).free; got != want {
			t.Errorf("free budget after the server has ended\n got %d\nwant %d", got, want)
		}
		if got := s.spares.Load(); got != totalSpares {
			t.Errorf("spare workers after the server has ended\n got %d\nwant %d", got, totalSpares)
		}
		if shelf, ok := s.opts.Exports.(*shelf); ok {
			for name, n := range shelf.open {
				if n != 0 {
					t.Errorf("export %s is in use %d times after the server has ended", name, n)
				}
			}
		}
	})
}

// serveDevice is startServer for one device, called disk.
func serveDevice(t testing.TB, d Device) net.Addr {
	t.Helper()
	_, addr := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": d})})
	return addr
}
