package cbt

import (
	"bytes"
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"
)

const (
	block    = 1 << minShift
	leafSpan = block << leafBits // bytes of the device below one leaf
)

// TestMarkAtDuringFreeze holds a mark that no gate keeps away from snapshots.
// One is taken and released, and all that is free is used for something else:
// the mark must neither be missing nor be somewhere else.
func TestMarkAtDuringFreeze(t *testing.T) {
	m := newTestMap(t, newHeap(4<<20), 8*leafSpan)
	m.Mark(20*block, 1)
	m.stepped = func() {
		m.stepped = nil
		f := freeze(t, m)
		m.Mark(30*block, 1)
		f.Release()
		freeze(t, m).Release()
		for off := leafSpan; off < int(m.Size()); off += leafSpan {
			m.Mark(int64(off), 1)
		}
	}
	m.MarkAt(0, 16*block, 1)
	want := [][2]int64{{0, 16 * block}, {20 * block, block}, {30 * block, block}}
	for off := int64(leafSpan); off < m.Size(); off += leafSpan {
		want = append(want, [2]int64{off, block})
	}
	v := m.View()
	defer v.Release()
	wantChanged(t, v, 0, want...)
}

// TestMarkAtAcrossFreeze is the same for a mark that comes to its second leaf
// after the snapshot: it goes into the live map alone.
func TestMarkAtAcrossFreeze(t *testing.T) {
	m := newTestMap(t, newHeap(4<<20), 3*leafSpan)
	m.Mark(0, 1)
	m.Mark(2*leafSpan, 1)
	var f *Frozen
	m.stepped = func() {
		m.stepped = nil
		f = freeze(t, m)
	}
	m.MarkAt(leafSpan-block, 2*block, 1)
	first, last := [2]int64{0, block}, [2]int64{2 * leafSpan, block}
	wantChanged(t, &f.View, 0, first, [2]int64{leafSpan - block, block}, last)
	v := m.View()
	defer v.Release()
	wantChanged(t, v, 0, first, [2]int64{leafSpan - block, 2 * block}, last)
}

// spoil fills all nodes that are free with a byte: zeroes look like a map in
// which nothing changed, 0xff leads whoever follows a link out of memory.
func spoil(m *Map, with byte) {
	m.reap()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, no := range m.free {
		copy(m.header(no), bytes.Repeat([]byte{with}, nodeHeader))
		copy(m.data(no), bytes.Repeat([]byte{with}, nodeData))
	}
}

// spoilt runs test with both.
func spoilt(t *testing.T, test func(t *testing.T, with byte)) {
	for _, with := range []byte{0, 0xff} {
		t.Run(fmt.Sprintf("%#02x", with), func(t *testing.T) { test(t, with) })
	}
}

// scattered returns a map that is marked in all its leaves, and where.
func scattered(t *testing.T) (m *Map, marked [][2]int64) {
	m = newTestMap(t, newHeap(16<<20), 8*leafSpan)
	for off := int64(0); off < m.Size(); off += leafSpan / 4 {
		m.Mark(off, 1)
		marked = append(marked, [2]int64{off, block})
	}
	return m, marked
}

// leave makes the live map give up all its nodes.
func leave(t *testing.T, m *Map) {
	t.Helper()
	f := freeze(t, m)
	m.Mark(0, m.Size())
	f.Release()
	freeze(t, m).Release()
}

// TestReleaseDuringSince releases a frozen map and a view that are alone in
// using their nodes while they are read: their reader must not see it.
func TestReleaseDuringSince(t *testing.T) {
	for name, take := range map[string]func(m *Map) *View{
		"view":   (*Map).View,
		"frozen": func(m *Map) *View { return &freeze(t, m).View },
	} {
		t.Run(name, func(t *testing.T) {
			spoilt(t, func(t *testing.T, with byte) {
				m, want := scattered(t)
				other := m.View()
				v := take(m)
				leave(t, m)
				runs, _ := v.Since(0)
				var got [][2]int64
				for off, n := range runs {
					if len(got) == 1 {
						other.Release() // ends a grace period
						v.Release()
						leave(t, m)
						spoil(m, with)
					}
					got = append(got, [2]int64{off, n})
				}
				if !slices.Equal(got, want) {
					t.Errorf("changed\n got %v\nwant %v", got, want)
				}
			})
		})
	}
}

// TestFrozenMarkDuringSince marks a frozen map while it is read. Only its
// reader still uses the nodes that the mark takes out of it.
func TestFrozenMarkDuringSince(t *testing.T) {
	spoilt(t, func(t *testing.T, with byte) {
		m, want := scattered(t)
		f := freeze(t, m)
		defer f.Release()
		leave(t, m)
		var got [][2]int64
		runs, _ := f.Since(0)
		for off, n := range runs {
			if len(got) == 1 {
				f.Mark(leafSpan/8, 1, f.Number())
				f.Mark(leafSpan+leafSpan/8, 1, f.Number())
				spoil(m, with)
			}
			if off%(leafSpan/4) == 0 {
				got = append(got, [2]int64{off, n})
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("changed\n got %v\nwant %v", got, want)
		}
	})
}

// TestReleaseDuringFrozenMark releases a frozen map between two words of a
// mark: the leaf that the mark is in must not be free yet, and it must not make
// another one.
func TestReleaseDuringFrozenMark(t *testing.T) {
	m, _ := scattered(t)
	f := freeze(t, m)
	f.Mark(leafSpan-block, 1, 1) // the leaf is its own from here on
	leaf := f.t.leaf(0).node()
	m.stepped = func() {
		m.stepped = nil
		f.Release()
		if m.counts[leaf] == 0 {
			t.Error("the leaf is free while a marker is in it")
		}
	}
	made := m.made
	f.Mark(leafSpan-16*block, 32*block, 1)
	if m.made != made {
		t.Errorf("%d nodes were made for a frozen map that was released", m.made-made)
	}
	m.reap()
	if m.counts[leaf] != 0 {
		t.Error("the leaf is not free when the marker has left")
	}
}

// TestReplacedNodeOutlivesMarkers looks at a leaf that nobody uses any more
// but a marker of the live map that found it before: it is not used again
// before the next Freeze, during which there are no markers.
func TestReplacedNodeOutlivesMarkers(t *testing.T) {
	m := newTestMap(t, newHeap(1<<20), leafSpan)
	m.Mark(0, 1)
	f := freeze(t, m)
	found := m.live.Load().leaf(0).node()
	f.Release()
	m.Mark(0, 1)
	if err := m.Prepare(); err != nil {
		t.Fatal(err)
	}
	if m.live.Load().leaf(0).node() == found {
		t.Fatal("the leaf was not copied")
	}
	if got := m.counts[found]; got != 1 {
		t.Errorf("leaf is counted %d times before the next Freeze, want 1", got)
	}
	freeze(t, m)
	if err := m.Prepare(); err != nil {
		t.Fatal(err)
	}
	if got := m.counts[found]; got != 0 {
		t.Errorf("leaf is counted %d times after the next Freeze, want 0", got)
	}
}

// TestAfterRelease uses a frozen map that was released, whose nodes hold
// something else by now.
func TestAfterRelease(t *testing.T) {
	spoilt(t, func(t *testing.T, with byte) {
		m, _ := scattered(t)
		f := freeze(t, m)
		leave(t, m)
		runs, ok := f.Since(1)
		f.Release()
		f.Release()
		spoil(m, with)

		f.Mark(leafSpan, 1, 1)
		if n := f.ReadMap(make([]byte, 1), 0); n != 0 {
			t.Errorf("read %d bytes of a released map", n)
		}
		var got [][2]int64
		for off, n := range runs {
			got = append(got, [2]int64{off, n})
		}
		if all := [][2]int64{{0, m.Size()}}; !ok || !slices.Equal(got, all) {
			t.Errorf("changed in a released map\n got %v\nwant everything, %v", got, all)
		}
	})
}

// TestUnreachableView forgets views without releasing them.
func TestUnreachableView(t *testing.T) {
	m := newTestMap(t, newHeap(1<<20), leafSpan)
	m.Mark(0, 1)
	root := link(m.live.Load().root.Load()).node()
	for range 10 {
		m.View()
	}
	freeze(t, m).Release()
	m.Mark(0, 1) // copies the root
	freeze(t, m).Release()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); runtime.Gosched() {
		runtime.GC()
		m.reap()
		m.mu.Lock()
		n := m.counts[root]
		m.mu.Unlock()
		if n == 0 {
			return
		}
	}
	t.Errorf("root is counted %d times after its views became unreachable, want 0", m.counts[root])
}
