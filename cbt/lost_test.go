package cbt

import (
	"errors"
	"runtime/debug"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// wantLost fails unless v refuses to say what changed.
func wantLost(t *testing.T, what string, v *View) {
	t.Helper()
	if !v.Lost() {
		t.Errorf("%s is not lost", what)
	}
	if _, ok := v.Since(v.Number()); ok {
		t.Errorf("%s is lost and says what changed", what)
	}
}

// TestLost marks until there is no memory. From then on the map, what is
// frozen from it, and what another process finds refuse to answer; what was
// frozen before does answer; a new generation does, and needs no memory.
func TestLost(t *testing.T) {
	mem := newHeap(64 * nodeSize)
	m := newTestMap(t, mem, 1<<40)
	m.Mark(0, 1)
	before := freeze(t, m)
	if err := m.Prepare(); err != nil {
		t.Fatal(err)
	}
	off := int64(0)
	for ; !m.Lost(); off += leafSpan {
		if off == 100*leafSpan {
			t.Fatal("marked 100 leaves in memory for 64 nodes, and not lost")
		}
		m.Mark(off, 1)
	}
	m.Mark(off, 1) // goes on without a word
	if err := m.Resize(1<<40 - 512); err != nil || !m.Lost() {
		t.Errorf("after Resize: lost %t, error %v", m.Lost(), err)
	}
	v := m.View()
	wantLost(t, "view", v)
	v.Release()
	f, err := m.Freeze()
	if err != nil {
		t.Fatal(err)
	}
	wantLost(t, "frozen map", &f.View)
	wantChanged(t, &before.View, 0, [2]int64{0, block})

	other, frozen := openTestMap(t, copyHeap(mem))
	if !other.Lost() || len(frozen) != 2 {
		t.Fatalf("another process finds %d frozen maps, want 2; lost %t", len(frozen), other.Lost())
	}
	wantChanged(t, &frozen[0].View, 0, [2]int64{0, block})
	wantLost(t, "frozen map in another process", &frozen[1].View)

	generation := uuid.New()
	m.Reset(generation)
	if m.Lost() || m.Generation() != generation || m.Base() != 3 || m.Number() != 3 {
		t.Errorf("after Reset: lost %t, generation %v, base %d, number %d\nwant false, %v, 3, 3",
			m.Lost(), m.Generation(), m.Base(), m.Number(), generation)
	}
	f.Release()
	m.Mark(5*leafSpan, 1)
	v = m.View()
	defer v.Release()
	wantChanged(t, v, 3, [2]int64{5 * leafSpan, block})
}

// TestFrozenLost marks a frozen map without memory: only that one is lost.
func TestFrozenLost(t *testing.T) {
	mem := newHeap(18 * nodeSize)
	m := newTestMap(t, mem, 1<<30)
	m.Mark(0, 1)
	f := freeze(t, m)
	for off := int64(0); !f.Lost() && off < m.Size(); off += leafSpan {
		f.Mark(off, 1, 1)
	}
	wantLost(t, "frozen map", &f.View)
	if m.Lost() {
		t.Error("the live map is lost, too")
	}
	_, frozen := openTestMap(t, copyHeap(mem))
	wantLost(t, "frozen map in another process", &frozen[0].View)
}

// TestLostWhileAnswering loses a frozen map between the question and the
// answer.
func TestLostWhileAnswering(t *testing.T) {
	m := newTestMap(t, newHeap(18*nodeSize), 1<<30)
	m.Mark(0, 1)
	f := freeze(t, m)
	runs, _ := f.Since(1)
	for off := int64(0); !f.Lost() && off < m.Size(); off += leafSpan {
		f.Mark(off, 1, 1)
	}
	var got [][2]int64
	for off, n := range runs {
		got = append(got, [2]int64{off, n})
	}
	if want := [][2]int64{{0, m.Size()}}; !slices.Equal(got, want) {
		t.Errorf("changed\n got %v\nwant everything, %v", got, want)
	}
}

// TestUnprepared takes snapshots without Prepare until it fails. Nothing has
// changed then, and Reset still works.
func TestUnprepared(t *testing.T) {
	mem := newHeap(1 << 20)
	m := newTestMap(t, mem, 1<<30)
	n := uint64(0)
	for {
		m.Mark(int64(n)*block, 1)
		if _, err := m.Freeze(); err != nil {
			break
		}
		if n++; n > 2*nodeData/recordSize {
			t.Fatalf("%d snapshots without Prepare", n)
		}
	}
	if m.Number() != n {
		t.Errorf("number %d after %d snapshots", m.Number(), n)
	}
	v := m.View()
	wantChanged(t, v, n, [2]int64{int64(n) * block, block})
	v.Release()

	mem.onGrow(func() error { return unix.ENOSPC })
	m.fillers.Wait()
	for _, no := range m.free {
		m.counts[no] = 1 // no memory at all
	}
	m.Reset(uuid.New())
	if m.Base() != n+1 {
		t.Errorf("base %d after Reset, want %d", m.Base(), n+1)
	}
	mem.onGrow(nil)
	freeze(t, m)
}

// TestPrepareWithoutMemory fails where there is no room for a record, and only
// there.
func TestPrepareWithoutMemory(t *testing.T) {
	full := errors.New("full")
	mem := newHeap(1 << 20)
	m := newTestMap(t, mem, 1<<40)
	mem.onGrow(func() error { return full })
	for off := int64(0); !m.Lost(); off += leafSpan {
		m.Mark(off, 1)
	}
	for range nodeData/recordSize - 2 {
		if err := m.Prepare(); err != nil {
			t.Fatalf("Prepare after %d snapshots: %v", m.Number(), err)
		}
		if _, err := m.Freeze(); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Prepare(); !errors.Is(err, full) {
		t.Errorf("Prepare without room for a record: %v, want %v", err, full)
	}
}

// TestMarkDoesNotWaitForGrowth holds the growth of memory while nodes are left:
// a mark that needs one of them returns.
func TestMarkDoesNotWaitForGrowth(t *testing.T) {
	mem := newHeap(1 << 20)
	m := newTestMap(t, mem, 1<<40)
	entered, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	open := func() { once.Do(func() { close(release) }) }
	t.Cleanup(open)
	mem.onGrow(sync.OnceValue(func() error {
		close(entered)
		<-release
		return nil
	}))
	marked := make(chan struct{})
	go func() {
		defer close(marked)
		for off := int64(0); ; off += leafSpan {
			m.mu.Lock()
			left := m.availableLocked()
			m.mu.Unlock()
			if left < 4 {
				return
			}
			m.Mark(off, 1)
		}
	}()
	select {
	case <-entered:
	case <-time.After(20 * time.Second):
		t.Fatal("memory does not grow before it is used up")
	}
	select {
	case <-marked:
	case <-time.After(20 * time.Second):
		t.Fatal("a mark waits for memory while there is some")
	}
	open()
	if m.Lost() {
		t.Error("lost")
	}
}

// TestCloseWaits closes a map while its memory grows: Close returns when that
// has ended, and the owner of the memory may unmap it.
func TestCloseWaits(t *testing.T) {
	mem := newHeap(1 << 20)
	m := newTestMap(t, mem, 1<<40)
	entered, release, closed := make(chan struct{}), make(chan struct{}), make(chan struct{})
	mem.onGrow(func() error {
		close(entered)
		<-release
		return nil
	})
	for off := int64(0); m.availableLocked() >= minBatch/2; off += leafSpan {
		m.Mark(off, 1)
	}
	<-entered
	go func() {
		m.Close()
		close(closed)
	}()
	select {
	case <-closed:
		t.Error("Close returned while memory grew")
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	<-closed
}

// TestLastNodes marks until there is no room for a batch of nodes, and goes on
// until there is none for a single one.
func TestLastNodes(t *testing.T) {
	m := newTestMap(t, newHeap(40*nodeSize), 1<<40)
	leaves := 0
	for m.Mark(0, 1); !m.Lost(); m.Mark(int64(leaves)*leafSpan, 1) {
		leaves++
	}
	// All but the header, a table and an index.
	if leaves != 37 {
		t.Errorf("lost after %d leaves in memory for 40 nodes, want 37", leaves)
	}
}

// TestNodesOfReaders marks when there are no nodes left but those that a reader
// was the last to use: they are found before the map is lost.
func TestNodesOfReaders(t *testing.T) {
	m := newTestMap(t, newHeap(70*nodeSize), 1<<40)
	mark := func(from, to int64) {
		for leaf := from; leaf < to; leaf++ {
			m.Mark(leaf*leafSpan, 1)
		}
	}
	mark(0, 20)
	f := freeze(t, m)
	runs, _ := f.Since(0)
	for range runs {
		mark(0, 20)
		f.Release()
		freeze(t, m).Release()
		break
	}
	mark(20, 60)
	if m.Lost() {
		t.Error("lost with 60 leaves and an index in memory for 70 nodes")
	}
}

// TestLoseAfterRelease releases a frozen map while a mark of it waits for
// memory, of which there is none: the record that is free by then stays so.
func TestLoseAfterRelease(t *testing.T) {
	mem := newHeap(1 << 20)
	m := newTestMap(t, mem, 1<<40)
	m.Mark(0, 1)
	f := freeze(t, m)
	mem.onGrow(func() error { return unix.ENOSPC })
	for off := int64(0); !m.Lost(); off += leafSpan {
		m.Mark(off, 1)
	}
	m.fillers.Wait()
	release := sync.OnceFunc(f.Release)
	mem.onGrow(func() error {
		release()
		return unix.ENOSPC
	})
	f.Mark(leafSpan, 1, 1)
	_, frozen, err := Open(copyHeap(mem))
	if err != nil || len(frozen) != 0 {
		t.Errorf("found %d frozen maps, error %v; the only one was released", len(frozen), err)
	}
}

// TestEpochsEnd uses up all epochs: no snapshot can be taken any more, and the
// map is what it was.
func TestEpochsEnd(t *testing.T) {
	m := newTestMap(t, newHeap(1<<20), 1<<30)
	m.mu.Lock()
	m.epoch = maxEpoch - 1
	m.mu.Unlock()
	f := freeze(t, m)
	m.Mark(0, 1)
	f.Mark(block, 1, 1)
	if err := m.Prepare(); err == nil {
		t.Error("Prepare without an epoch: no error")
	}
	_, frozen := openTestMap(t, copyHeap(m.mem.(*heap)))
	wantChanged(t, &frozen[0].View, 0, [2]int64{block, block})
	v := m.View()
	defer v.Release()
	wantChanged(t, v, 1, [2]int64{0, block})
}

// TestResetAgain begins a generation in memory that faults when its record is written, and
// again when it does not: the last record is still there.
func TestResetAgain(t *testing.T) {
	mem := newMapped(t, 64*nodeSize)
	m := newTestMap(t, mem, 1<<30)
	for len(m.records) > 1 {
		if _, err := m.Freeze(); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mprotect(mem.bytes[:mem.n], unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	faults := func() (faulted bool) {
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		defer func() { faulted = recover() != nil }()
		m.Reset(uuid.New())
		return false
	}
	if !faults() {
		t.Fatal("nothing faulted")
	}
	if err := unix.Mprotect(mem.bytes[:mem.n], unix.PROT_READ|unix.PROT_WRITE); err != nil {
		t.Fatal(err)
	}
	generation := uuid.New()
	m.Reset(generation)
	if m.Generation() != generation {
		t.Errorf("generation\n got %v\nwant %v", m.Generation(), generation)
	}
}
