package cbt

import (
	"runtime"
	"slices"
	"testing"
	"time"
)

const (
	block    = 1 << minShift
	leafSpan = block << leafBits // bytes of the device below one leaf
)

// TestMarkDuringView holds a mark between its first word and its second. A
// view begins a new epoch then, and another mark copies the leaf: the second
// word's mark goes into the old leaf, and must be made again in the new one.
func TestMarkDuringView(t *testing.T) {
	for _, tc := range []struct {
		name string
		mark func(m *Map)
	}{
		{"Mark", func(m *Map) { m.Mark(0, 16*block) }},
		{"MarkAt", func(m *Map) { m.MarkAt(0, 16*block, 1) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newTestMap(t, newHeap(1<<20), leafSpan)
			m.Mark(20*block, 1) // the leaf is the live map's own from here on
			m.stepped = func() {
				m.stepped = nil
				v := m.View()
				m.Mark(30*block, 1)
				v.Release()
			}
			tc.mark(m)
			v := m.View()
			defer v.Release()
			wantChanged(t, v, 0, [2]int64{0, 16 * block}, [2]int64{20 * block, block}, [2]int64{30 * block, block})
		})
	}
}

// TestSeenInOldLeaf is the same for a mark that finds its byte set: one that
// has not noticed the view set it, in a leaf that was copied before.
func TestSeenInOldLeaf(t *testing.T) {
	m := newTestMap(t, newHeap(1<<20), leafSpan)
	m.Mark(20*block, 1)
	old := m.live.Load()
	v := m.View()
	m.Mark(30*block, 1)
	old.mark(0, 1, 1)

	if !old.seen(0, 1) {
		t.Error("the block is not marked in the old leaf")
	}
	if m.seen(old, 0, 1) {
		t.Error("the block counts as marked in the live map")
	}
	v.Release()
}

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

// reuse marks the whole device in several intervals, so that every node that
// is free is used for something else.
func reuse(t *testing.T, m *Map) {
	t.Helper()
	for range 3 {
		f := freeze(t, m)
		m.Mark(0, m.Size())
		f.Release()
	}
}

// TestReleaseDuringSince releases a frozen map and a view while they are read,
// and uses all nodes again that are free then: readers must not see it.
func TestReleaseDuringSince(t *testing.T) {
	for _, tc := range []struct {
		name string
		take func(m *Map) *View
	}{
		{"view", (*Map).View},
		{"frozen", func(m *Map) *View { return &freeze(t, m).View }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newTestMap(t, newHeap(16<<20), 8*leafSpan)
			var want [][2]int64
			for off := int64(0); off < m.Size(); off += leafSpan / 4 {
				m.Mark(off, 1)
				want = append(want, [2]int64{off, block})
			}
			other := m.View()
			m.Mark(0, 1)
			m.Mark(m.Size()-block, 1)
			want = append(want, [2]int64{m.Size() - block, block})
			v := tc.take(m)
			runs, _ := v.Since(0)
			var got [][2]int64
			for off, n := range runs {
				if len(got) == 1 {
					other.Release() // another grace period begins
					v.Release()
					reuse(t, m)
				}
				got = append(got, [2]int64{off, n})
			}
			if !slices.Equal(got, want) {
				t.Errorf("changed\n got %v\nwant %v", got, want)
			}
		})
	}
}

// TestFrozenMarkDuringSince marks a frozen map while it is read. The nodes
// that the mark takes out of it are used by nobody else.
func TestFrozenMarkDuringSince(t *testing.T) {
	m := newTestMap(t, newHeap(16<<20), 8*leafSpan)
	var want [][2]int64
	for off := int64(0); off < m.Size(); off += leafSpan / 4 {
		m.Mark(off, 1)
		want = append(want, [2]int64{off, block})
	}
	f := freeze(t, m)
	defer f.Release()
	reuse(t, m)
	var got [][2]int64
	runs, _ := f.Since(0)
	for off, n := range runs {
		if len(got) == 1 {
			for _, run := range want {
				f.Mark(run[0], 1, f.Number())
				f.Mark(run[0]+leafSpan/8, 1, f.Number())
			}
			reuse(t, m)
		}
		if off%(leafSpan/4) == 0 {
			got = append(got, [2]int64{off, n})
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("changed\n got %v\nwant %v", got, want)
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
	freeze(t, m).Release()
	if got := m.counts[found]; got != 0 {
		t.Errorf("leaf is counted %d times after the next Freeze, want 0", got)
	}
}

// TestAfterRelease uses a frozen map that was released, whose nodes are used
// for something else by now.
func TestAfterRelease(t *testing.T) {
	m := newTestMap(t, newHeap(16<<20), 4*leafSpan)
	m.Mark(0, 1)
	f := freeze(t, m)
	f.Mark(leafSpan, 1, 1)
	runs, ok := f.Since(1)
	f.Release()
	f.Release()
	reuse(t, m)
	before := m.View()
	want := changed(t, before, before.Number()-1)
	before.Release()

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
	v := m.View()
	defer v.Release()
	wantChanged(t, v, v.Number()-1, want...)
}

// TestUnreachableView forgets views without releasing them.
func TestUnreachableView(t *testing.T) {
	m := newTestMap(t, newHeap(1<<20), leafSpan)
	m.Mark(0, 1)
	root := link(m.live.Load().root.Load()).node()
	for range 10 {
		m.View()
	}
	m.Mark(block, 1) // copies the root
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
