package cbt

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"unsafe"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

var seed = flag.Uint64("seed", 0, "seed of the random tests; 0: a new one")

// random returns a source of random numbers and says how to get it again.
func random(t *testing.T) *rand.Rand {
	t.Helper()
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Logf("repeat with -seed=%d", s)
	return rand.New(rand.NewPCG(s, 0))
}

// heap is a Memory in Go's heap, where the race detector sees what happens in
// it.
type heap struct {
	bytes []byte

	mu      sync.Mutex // not held while growing is called
	n       int64
	growing func() error
}

func newHeap(limit int64) *heap {
	words := make([]uint64, limit/8)
	return &heap{bytes: unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(words))), len(words)*8)}
}

// copyHeap is what a process that is killed now leaves behind. Nobody marks
// meanwhile.
func copyHeap(mem *heap) *heap {
	c := newHeap(mem.Len())
	c.n = int64(len(c.bytes))
	copy(c.bytes, mem.bytes)
	return c
}

// onGrow makes memory call grows before it grows, from now on: in the
// background too, so that grows may be called at any time.
func (h *heap) onGrow(grows func() error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.growing = grows
}

func (h *heap) Bytes() []byte { return h.bytes }

func (h *heap) Len() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.n
}

func (h *heap) Grow(n int64) error {
	h.mu.Lock()
	grows := h.growing
	h.mu.Unlock()
	if grows != nil {
		if err := grows(); err != nil {
			return err
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if n > int64(len(h.bytes))-h.n {
		return fmt.Errorf("grow by %d: %w", n, unix.ENOSPC)
	}
	h.n += n
	return nil
}

// mapped is a Memory as a device has it.
type mapped struct {
	bytes []byte
	n     int64
}

func newMapped(tb testing.TB, limit int64) *mapped {
	tb.Helper()
	b, err := unix.Mmap(-1, 0, int(limit), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		tb.Fatalf("reserve %d bytes: %v", limit, err)
	}
	tb.Cleanup(func() {
		if err := unix.Munmap(b); err != nil {
			tb.Errorf("unmap: %v", err)
		}
	})
	return &mapped{bytes: b}
}

func (m *mapped) Bytes() []byte { return m.bytes }
func (m *mapped) Len() int64    { return m.n }

func (m *mapped) Grow(n int64) error {
	n = (n + 1<<16 - 1) &^ (1<<16 - 1)
	if n > int64(len(m.bytes))-m.n {
		return fmt.Errorf("grow by %d: %w", n, unix.ENOMEM)
	}
	b := m.bytes[m.n:][:n]
	if err := unix.Mprotect(b, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return err
	}
	if err := unix.Madvise(b, unix.MADV_POPULATE_WRITE); err != nil {
		return err
	}
	m.n += n
	return nil
}

// newTestMap returns a map that is checked and closed when the test ends. Its
// number is 0 and its tracking blocks have 4 KiB.
func newTestMap(t *testing.T, mem Memory, size int64) *Map {
	t.Helper()
	m, err := New(mem, size, 1<<minShift, uuid.New(), 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMap(t, m) })
	return m
}

// openTestMap is newTestMap for a map that is there.
func openTestMap(t *testing.T, mem Memory) (*Map, []*Frozen) {
	t.Helper()
	m, frozen, err := Open(mem)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMap(t, m) })
	return m, frozen
}

func closeMap(t *testing.T, m *Map) {
	t.Helper()
	if t.Failed() {
		return // perhaps in the middle of something, with a lock held
	}
	m.Close()
	m.reap()
	checkCounts(t, m)
}

// checkCounts fails unless each node is counted as often as it is used, and
// free exactly if it is not. views are those in use.
func checkCounts(t *testing.T, m *Map, views ...*View) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	want := make([]uint32, len(m.counts))
	for l := m.tables; l != 0; l = m.link(l.node().offset() + nodeNext) {
		want[l.node()]++
		for r := l.data(); r < l.data()+nodeData; r += recordSize {
			if used := m.load(r+recordState) != stateFree; used == slices.Contains(m.records, r) {
				t.Errorf("record at %d: used %t and free %t", r, used, used)
			} else if root := m.link(r + recordRoot); used && root != 0 {
				expect(m, want, root.node())
			}
		}
	}
	trees := map[*tree]bool{m.live.Load(): true} // counted with its record
	for _, v := range views {
		if root := link(v.t.root.Load()); root != 0 && !trees[v.t] {
			expect(m, want, root.node())
		}
		trees[v.t] = true
	}
	lists := slices.Concat(m.dead, m.period.Load().dropped, [][]node{m.replaced})
	for _, no := range slices.Concat(lists...) {
		expect(m, want, no)
	}
	unused := make(map[node]bool)
	for _, no := range m.free {
		unused[no] = true
	}
	for no, got := range m.counts {
		free := no >= int(m.unused) || unused[node(no)]
		if got != want[no] || no > 0 && free != (got == 0) {
			t.Errorf("node %d: free %t, counted %d times, used %d times", no, free, got, want[no])
		}
	}
	if g := m.period.Load().holders.Load(); g != 1 {
		t.Errorf("%d readers never left", g-1)
	}
}

// expect counts a use of no, and at the first of the uses of what is below.
func expect(m *Map, want []uint32, no node) {
	want[no]++
	level := int(m.load(no.offset() + nodeLevel))
	if want[no] > 1 || level == 0 {
		return
	}
	m.eachChild(newLink(no, level, 0), func(c node) { expect(m, want, c) })
}

// freeze takes a snapshot of m.
func freeze(tb testing.TB, m *Map) *Frozen {
	tb.Helper()
	if err := m.Prepare(); err != nil {
		tb.Fatal(err)
	}
	f, err := m.Freeze()
	if err != nil {
		tb.Fatal(err)
	}
	return f
}

// changed returns the runs that changed after num, one {off, n} each.
func changed(t *testing.T, v *View, num uint64) [][2]int64 {
	t.Helper()
	return changedIn(t, v, 0, v.Size(), num)
}

func changedIn(t *testing.T, v *View, off, n int64, num uint64) [][2]int64 {
	t.Helper()
	runs, ok := v.ChangedSince(off, n, num)
	if !ok {
		t.Fatalf("changes since %d refused; base %d, number %d, lost %t", num, v.Base(), v.Number(), v.Lost())
	}
	var all [][2]int64
	for off, n := range runs {
		all = append(all, [2]int64{off, n})
	}
	return all
}

// wantChanged fails unless exactly the runs want changed after num.
func wantChanged(t *testing.T, v *View, num uint64, want ...[2]int64) {
	t.Helper()
	if got := changed(t, v, num); !slices.Equal(got, want) {
		t.Errorf("changed since %d\n got %v\nwant %v", num, got, want)
	}
}
