package cbt

import (
	"fmt"
	"math"
	"testing"

	"github.com/google/uuid"
)

func TestNewRefuses(t *testing.T) {
	for _, tc := range []struct {
		name        string
		size, block int64
		number      uint64
	}{
		{"size 0", 0, DefaultBlock, 0},
		{"negative size", -512, DefaultBlock, 0},
		{"size of half a sector", 4096 + 256, DefaultBlock, 0},
		{"tracking block of 2 KiB", 1 << 30, 2048, 0},
		{"tracking block of 32 MiB", 1 << 30, 32 << 20, 0},
		{"tracking block of 5000 bytes", 1 << 30, 5000, 0},
		{"negative tracking block", 1 << 30, math.MinInt64, 0},
		{"number without a next one", 1 << 30, DefaultBlock, math.MaxUint64},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if m, err := New(newHeap(1<<20), tc.size, tc.block, uuid.New(), tc.number); err == nil {
				m.Close()
				t.Error("no error")
			}
		})
	}
	if m, err := New(newHeap(nodeSize), 512, DefaultBlock, uuid.New(), 0); err == nil {
		m.Close()
		t.Error("no error without memory")
	}
}

// TestGeometry marks the last byte of devices of all kinds of sizes, and asks
// for ranges at their edges.
func TestGeometry(t *testing.T) {
	for _, size := range []int64{512, 4096, 4096 + 512, 16 << 20, 16<<20 + 512, 1<<40 - 512, 1 << 40, 1<<55 + 512, math.MaxInt64 - 511} {
		for _, block := range []int64{4 << 10, DefaultBlock, 16 << 20} {
			t.Run(fmt.Sprintf("%d/%d", size, block), func(t *testing.T) {
				m, err := New(newHeap(1<<20), size, block, uuid.New(), 0)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { closeMap(t, m) })
				last := (size - 1) / block * block
				m.Mark(size-1, 1)
				v := m.View()
				defer v.Release()
				if got, want := v.Blocks(), (size-1)/block+1; got != want {
					t.Errorf("%d blocks, want %d", got, want)
				}
				wantChanged(t, v, 0, [2]int64{last, size - last})
				var p [2]byte
				if n := v.ReadMap(p[:], v.Blocks()-1); n != 1 || p[0] != 1 {
					t.Errorf("read %d bytes at the end of the map, %d", n, p[0])
				}
			})
		}
	}
}

// TestMarkInGaps marks blocks far apart, most of them where the tree has neither a leaf
// nor a node above it yet.
func TestMarkInGaps(t *testing.T) {
	const size, block = 1 << 50, DefaultBlock
	for shift := leafBits; 1<<shift < size/block; shift++ {
		m, err := New(newHeap(64<<20), size, block, uuid.New(), 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { closeMap(t, m) })
		m.Mark(size-1, 1)
		v := m.View()
		n := min(int64(size/block)>>shift, 1<<indexBits)
		for i := range n {
			m.Mark(i<<shift*block, 1)
		}
		v.Release()
		v = m.View()
		for i := range n {
			var p [2]byte
			if v.ReadMap(p[:], i<<shift); p != [2]byte{1, 0} {
				t.Errorf("1<<%d: block %d of the map and the next\n got %v\nwant marked, not marked", shift, i<<shift, p)
			}
		}
		v.Release()
	}
}

// TestSpan asks for ranges that reach beyond the device, and for none.
func TestSpan(t *testing.T) {
	const size = 10*block + 512
	for _, tc := range []struct {
		name     string
		off, n   int64
		from, to int64
	}{
		{"nothing", block, 0, 0, 0},
		{"less than nothing", block, -1, 0, 0},
		{"much less than nothing", -1, math.MinInt64, 0, 0},
		{"one byte", block, 1, 1, 2},
		{"two bytes in two blocks", block - 1, 2, 0, 2},
		{"a block", block, block, 1, 2},
		{"the last block", 10 * block, 512, 10, 11},
		{"all", 0, size, 0, 11},
		{"beyond the end", 9 * block, math.MaxInt64, 9, 11},
		{"behind the end", size, 1, 0, 0},
		{"before the beginning", -block, 2 * block, 0, 1},
		{"only before the beginning", -2 * block, block, 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tr := tree{shift: minShift, size: size}
			if from, to := tr.span(tc.off, tc.n); from != tc.from || to != tc.to {
				t.Errorf("span(%d, %d)\n got %d, %d\nwant %d, %d", tc.off, tc.n, from, to, tc.from, tc.to)
			}
			m := newTestMap(t, newHeap(1<<20), size)
			m.Mark(tc.off, tc.n)
			f := freeze(t, m)
			var want [][2]int64
			if tc.to > tc.from {
				want = append(want, [2]int64{tc.from * block, min(tc.to*block, size) - tc.from*block})
			}
			wantChanged(t, &f.View, 0, want...)
			f.Mark(tc.off, tc.n, 1)
			wantChanged(t, &f.View, 0, want...)
			// The map has changed everywhere: a question is cut to its range.
			m.Mark(0, size)
			v := m.View()
			defer v.Release()
			for _, run := range changedIn(t, v, tc.off, tc.n, 1) {
				if off, end := max(tc.off, 0), min(tc.off, size-tc.n)+tc.n; run != [2]int64{off, end - off} {
					t.Errorf("changed in %d:%d: %v, want up to %d", tc.off, tc.n, run, end)
				}
			}
		})
	}
}

// TestMarkAt marks with all kinds of numbers.
func TestMarkAt(t *testing.T) {
	m, err := New(newHeap(1<<20), 1<<30, block, uuid.New(), 10)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMap(t, m) })
	for range 5 {
		freeze(t, m)
	}
	for i, tc := range []struct {
		number uint64
		want   byte
	}{{0, 0}, {10, 0}, {11, 1}, {15, 5}, {16, 6}, {17, 6}, {math.MaxUint64, 6}, {12, 2}} {
		off := int64(i) * block
		m.MarkAt(off, 1, tc.number)
		m.MarkAt(off, 1, 11) // a lower one changes nothing
		v := m.View()
		var p [1]byte
		if v.ReadMap(p[:], int64(i)); p[0] != max(tc.want, 1) {
			t.Errorf("marked with %d of base 10: byte %d, want %d", tc.number, p[0], max(tc.want, 1))
		}
		v.Release()
	}
}

// TestMarkedIsNotCopied marks what is marked already in leaves that others use,
// too: that takes no memory.
func TestMarkedIsNotCopied(t *testing.T) {
	m := newTestMap(t, newHeap(1<<20), leafSpan)
	m.Mark(0, 20*block)
	f := freeze(t, m)
	m.View().Release()
	m.MarkAt(2*block, 9*block, 1)
	f.Mark(2*block, 9*block, 1)
	if m.made != 0 {
		t.Errorf("%d nodes were copied for nothing", m.made)
	}
	m.MarkAt(2*block, 19*block, 1) // one block more than was marked
	if m.made != 1 {
		t.Errorf("%d nodes were copied, want 1", m.made)
	}
}

// TestEmptyMapIsSmall makes a map of the largest device with the smallest
// tracking blocks.
func TestEmptyMapIsSmall(t *testing.T) {
	mem := newMapped(t, 1<<30)
	m, err := New(mem, math.MaxInt64-511, 4096, uuid.New(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	freeze(t, m)
	if mem.Len() > 128<<10 {
		t.Errorf("empty map takes %d bytes", mem.Len())
	}
	m.Mark(1<<62, 4096)
	if mem.Len() > 256<<10 {
		t.Errorf("map with one mark takes %d bytes", mem.Len())
	}
}

// TestRestore makes a map with a history, also with one that is too long.
func TestRestore(t *testing.T) {
	generation := uuid.New()
	for _, tc := range []struct {
		name               string
		number, base, want uint64 // want: the new base
	}{
		{"no history", 7, 7, 7},
		{"a history", 7, 3, 3},
		{"all that a byte can count", 300, 46, 46},
		{"one more than that", 300, 45, 46},
		{"much more than that", 1000, 0, 746},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m, err := Restore(newHeap(1<<20), 1<<30, block, generation, tc.number, tc.base)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { closeMap(t, m) })
			m.MarkAt(0, 1, tc.want+1)
			m.Mark(block, 1)
			if m.Number() != tc.number || m.Base() != tc.want || m.Generation() != generation {
				t.Errorf("number %d, base %d, generation %v\nwant %d, %d, %v",
					m.Number(), m.Base(), m.Generation(), tc.number, tc.want, generation)
			}
			f := freeze(t, m)
			wantChanged(t, &f.View, tc.number, changedAfter(tc.want+1 > tc.number)...)
			wantChanged(t, &f.View, tc.want, changedAfter(true)...)
		})
	}
	for name, numbers := range map[string][2]uint64{
		"base above number":         {3, 4},
		"number without a next one": {math.MaxUint64, 3},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Restore(newHeap(1<<20), 1<<30, block, generation, numbers[0], numbers[1]); err == nil {
				t.Error("no error")
			}
		})
	}
}

// changedAfter is what TestRestore marked: its second block, and its first one.
func changedAfter(both bool) [][2]int64 {
	if both {
		return [][2]int64{{0, 2 * block}}
	}
	return [][2]int64{{block, block}}
}

// TestMemoryIsUsedAgain goes through many snapshots, of which few are kept.
func TestMemoryIsUsedAgain(t *testing.T) {
	mem := newHeap(64 << 20)
	m := newTestMap(t, mem, 16*leafSpan)
	var kept []*Frozen
	for i := range 500 {
		for off := int64(0); off < m.Size(); off += leafSpan {
			m.Mark(off, 1)
		}
		m.View().Release()
		if kept = append(kept, freeze(t, m)); len(kept) > 3 {
			kept[0].Release()
			kept = kept[1:]
		}
		// Live map, frozen ones, and what was replaced in the live one: 17
		// nodes each.
		if n := mem.Len() / nodeSize; n > 17*10 {
			t.Fatalf("%d nodes after %d snapshots", n, i+1)
		}
	}
}

// TestAccessors compares what map, view and frozen map say about themselves.
func TestAccessors(t *testing.T) {
	generation := uuid.New()
	m, err := New(newHeap(1<<20), 3*DefaultBlock+512, DefaultBlock, generation, 41)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMap(t, m) })
	f := freeze(t, m)
	v := m.View()
	defer v.Release()
	type facts struct {
		number, base uint64
		generation   uuid.UUID
		size, block  int64
		blocks       int64
	}
	want := facts{42, 41, generation, 3*DefaultBlock + 512, DefaultBlock, 4}
	for what, got := range map[string]facts{
		"map":    {m.Number(), m.Base(), m.Generation(), m.Size(), m.BlockSize(), 4},
		"view":   {v.Number(), v.Base(), v.Generation(), v.Size(), v.BlockSize(), v.Blocks()},
		"frozen": {f.Number(), f.Base(), f.Generation(), f.Size(), f.BlockSize(), f.Blocks()},
	} {
		if got != want {
			t.Errorf("%s\n got %+v\nwant %+v", what, got, want)
		}
	}
}

// TestFacts compares what costs nothing with a view.
func TestFacts(t *testing.T) {
	m, err := New(newHeap(8<<20), 1<<30+512, DefaultBlock, uuid.New(), 41)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMap(t, m) })
	m.limit = 2
	for k, do := range []func(){
		func() {},
		func() { freeze(t, m).Release() },
		func() { m.Mark(0, 1); freeze(t, m).Release(); freeze(t, m).Release() }, // the base moves
		func() { m.Reset(uuid.New()) },
		func() {
			if err := m.Resize(3 << 30); err != nil {
				t.Fatal(err)
			}
		},
	} {
		do()
		v := m.View()
		want := Facts{v.Generation(), v.Number(), v.Base(), v.Blocks(), v.BlockSize()}
		if got := m.Facts(); got != want {
			t.Errorf("step %d\n got %+v\nwant %+v", k, got, want)
		}
		v.Release()
	}
}
