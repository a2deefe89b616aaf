package cow

import (
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
)

func emptyTable(t *testing.T, end chunkNo) *table {
	t.Helper()
	tab, err := newTable(end)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tab.close(); err != nil {
			t.Errorf("close table: %v", err)
		}
	})
	return tab
}

// set stores a word where there may be no place for it yet.
func set(t *testing.T, tab *table, c chunkNo, w word) {
	t.Helper()
	if err := tab.reserve(c, 1); err != nil {
		t.Fatalf("reserve chunk %d: %v", c, err)
	}
	tab.store(c, w)
}

// sizes of devices in chunks: around a leaf, around each level, and beyond all
// that exist.
var tableEnds = []chunkNo{1, 31, 32, 33, 1 << 13, 1<<13 + 1, 1 << 21, 1<<21 + 1, 1 << 28, 1<<28 + 1, 1 << 34, 1 << 44}

// TestTableModel compares tables with a map: random words, many of them close
// together, some taken out again.
func TestTableModel(t *testing.T) {
	rng := newRand(t)
	for _, end := range tableEnds {
		tab, model := emptyTable(t, end), make(map[chunkNo]word)
		for range 4000 {
			c := chunkNo(rng.Uint64N(uint64(end)))
			if rng.IntN(2) == 0 { // near the start, near the end
				c = min(c&63, end-1)
				if rng.IntN(2) == 0 {
					c = end - 1 - c
				}
			}
			w := word(rng.Uint64()) &^ checkBits
			if rng.IntN(4) == 0 {
				w = 0
			}
			set(t, tab, c, w)
			if model[c] = w; w == 0 {
				delete(model, c)
			}
		}
		compareTable(t, tab, model, rng)
	}
}

// compareTable looks the model's chunks and their neighbours up, and iterates from
// the start and from anywhere.
func compareTable(t *testing.T, tab *table, model map[chunkNo]word, rng *rand.Rand) {
	t.Helper()
	for c, want := range model {
		if got := tab.load(c); got != want {
			t.Errorf("%d chunks: word of chunk %d: got %x, want %x", tab.end, c, got, want)
		}
		if next := c + 1; next < tab.end && tab.load(next) != model[next] {
			t.Errorf("%d chunks: word of chunk %d: got %x, want %x", tab.end, next, tab.load(next), model[next])
		}
	}
	sorted := slices.Sorted(maps.Keys(model))
	froms := []chunkNo{0, tab.end - 1, tab.end}
	for range 20 {
		froms = append(froms, chunkNo(rng.Uint64N(uint64(tab.end))))
	}
	for _, from := range froms {
		k, _ := slices.BinarySearch(sorted, from)
		want := sorted[k:]
		var got []chunkNo
		for c, w := range tab.from(from) {
			if w != model[c] {
				t.Errorf("%d chunks: from %d: word of chunk %d: got %x, want %x", tab.end, from, c, w, model[c])
			}
			if got = append(got, c); len(got) == 50 && from != 0 {
				want = want[:min(50, len(want))]
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%d chunks: from %d\n got %d chunks\nwant %d", tab.end, from, len(got), len(want))
		}
	}
}

// TestTableHoldsWholeDevice fills tables: what was reserved for them is enough to
// the last word.
func TestTableHoldsWholeDevice(t *testing.T) {
	for _, end := range []chunkNo{1, 32, 33, 8191, 8192, 8193, 1<<20 + 7} {
		tab := emptyTable(t, end)
		for c := chunkNo(0); c < end; c += 1000 {
			if err := tab.reserve(c, int(min(1000, end-c))); err != nil {
				t.Fatalf("%d chunks: reserve from %d: %v", end, c, err)
			}
		}
		for c := range end {
			tab.store(c, word(c+1))
		}
		next := chunkNo(0)
		for c, w := range tab.from(0) {
			if c != next || w != word(c+1) {
				t.Fatalf("%d chunks: got chunk %d, word %d; want chunk %d, word %d", end, c, w, next, next+1)
			}
			next++
		}
		if next != end {
			t.Errorf("%d chunks: iteration ended at %d", end, next)
		}
	}
}

func TestTableReserveIsExact(t *testing.T) {
	tab := emptyTable(t, 1<<20)
	if err := tab.reserve(31, 2); err != nil { // in two leaves
		t.Fatal(err)
	}
	for c, want := range map[chunkNo]bool{0: true, 31: true, 32: true, 63: true, 64: false, 1<<20 - 1: false} {
		if got := tab.find(c) != nil; got != want {
			t.Errorf("a place for chunk %d: got %v, want %v", c, got, want)
		}
	}
	if got := tab.load(64); got != 0 {
		t.Errorf("word of a chunk without a place: got %x, want 0", got)
	}
}

// TestTableMemory bounds what tables take: the leaves that are needed, the nodes
// above them, and what growing allocates ahead.
func TestTableMemory(t *testing.T) {
	const end = 16 << 40 / chunkSize
	for _, tc := range []struct {
		name   string
		chunks func(yield func(chunkNo) bool)
		limit  int64
	}{
		{"empty", func(func(chunkNo) bool) {}, memoryStep},
		{"1 GiB in one piece", func(yield func(chunkNo) bool) {
			for c := chunkNo(end / 3); c < end/3+1<<30/chunkSize && yield(c); c++ {
			}
		}, 192 << 10},
		{"262,144 random blocks", func(yield func(chunkNo) bool) {
			rng := newRand(t)
			for range 262144 {
				if !yield(chunkNo(rng.Uint64N(end))) {
					return
				}
			}
		}, 100 << 20},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tab := emptyTable(t, end)
			for c := range tc.chunks {
				set(t, tab, c, 1)
			}
			t.Logf("%d KiB", tab.bytes()>>10)
			if got := tab.bytes(); got > tc.limit {
				t.Errorf("memory: got %d bytes, want at most %d", got, tc.limit)
			}
			if slack := tab.bytes() - tab.used; slack > maxGrowth {
				t.Errorf("%d bytes were allocated ahead, want at most %d", slack, maxGrowth)
			}
		})
	}
}

// TestTableWithoutMemory lets the memory end in mid-growth: what is in the table
// stays, and what fits later still gets in.
func TestTableWithoutMemory(t *testing.T) {
	tab := emptyTable(t, 1<<28)
	reserved := tab.mem.reserved
	tab.mem.reserved = reserved[:2*memoryStep]
	defer func() { tab.mem.reserved = reserved }()
	var c chunkNo
	for ; ; c += 1 << 16 {
		err := tab.reserve(c, 1)
		if errors.Is(err, syscall.ENOSPC) {
			break
		}
		if err != nil {
			t.Fatalf("reserve without memory: got %v, want ENOSPC", err)
		}
		tab.store(c, word(c+1))
	}
	if c == 0 {
		t.Fatal("nothing fitted in")
	}
	if err := tab.reserve(0, 32); err != nil {
		t.Errorf("reserve what has a place: %v", err)
	}
	tab.mem.reserved = reserved
	set(t, tab, c, word(c+1))
	for k := chunkNo(0); k <= c; k += 1 << 16 {
		if got := tab.load(k); got != word(k+1) {
			t.Errorf("word of chunk %d: got %x, want %x", k, got, k+1)
		}
	}
}

// TestTableGrowsUnderReaders has writers in the same nodes and readers that see a
// word or none, never a part of one.
func TestTableGrowsUnderReaders(t *testing.T) {
	const end, writers, each = 1 << 22, 4, 5000
	tab := emptyTable(t, end)
	// Neighbours go to different writers, so that they meet in every leaf.
	chunk := func(w, k int) chunkNo { return chunkNo(k*writers+w) * 37 }
	wordOf := func(c chunkNo) word { return word(c+1) * 0x1_0001_0001 &^ checkBits }
	var wrote, read sync.WaitGroup
	for w := range writers {
		wrote.Go(func() {
			for k := range each {
				c := chunk(w, k)
				if err := tab.reserve(c, 1); err != nil {
					t.Error(err)
					return
				}
				tab.store(c, wordOf(c))
			}
		})
	}
	over := make(chan struct{})
	for range 2 {
		read.Go(func() {
			for {
				last := chunkNo(0)
				for c, w := range tab.from(0) {
					if c%37 != 0 || w != wordOf(c) || c < last {
						t.Errorf("chunk %d after %d: got %x, want %x", c, last, w, wordOf(c))
						return
					}
					last = c
				}
				select {
				case <-over:
					return
				default:
				}
			}
		})
	}
	wrote.Wait()
	close(over)
	read.Wait()
	for w := range writers {
		for k := range each {
			if c := chunk(w, k); tab.load(c) != wordOf(c) {
				t.Fatalf("chunk %d: got %x, want %x", c, tab.load(c), wordOf(c))
			}
		}
	}
}

// TestTableEnds looks for chunks beyond the table's, as images do that reach further
// than a newer layer.
func TestTableEnds(t *testing.T) {
	for _, end := range []chunkNo{1, 33, 9000} {
		tab, err := newTable(end)
		if err != nil {
			t.Fatal(err)
		}
		if err := tab.reserve(0, 1); err != nil {
			t.Fatal(err)
		}
		tab.store(0, zeroWord)
		for c := end; c < 1<<24; c += c {
			if w := tab.load(c); w != 0 {
				t.Errorf("a table of %d chunks has %x for chunk %d", end, w, c)
			}
		}
		if w := tab.load(1 << 24); w != 0 {
			t.Errorf("a table of %d chunks has %x for chunk %d", end, w, 1<<24)
		}
		if err := tab.close(); err != nil {
			t.Error(err)
		}
	}
}
