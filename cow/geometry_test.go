package cow

import (
	"math"
	"slices"
	"testing"

	"blksnap/store"
)

// huge is the size of the largest origin that a file system can hold.
const huge = math.MaxInt64 &^ (SectorSize - 1)

func TestSpans(t *testing.T) {
	const last = huge - chunkSize + SectorSize // 512 bytes before its last whole chunk ends
	for _, tc := range []struct {
		name   string
		off, n int64
		want   []span
	}{
		{"nothing", 4096, 0, nil},
		{"one byte", 65535, 1, []span{{0, 65535, 1}}},
		{"a whole chunk", 65536, 65536, []span{{1, 0, 65536}}},
		{"across an edge", 65535, 2, []span{{0, 65535, 1}, {1, 0, 1}}},
		{"with a whole chunk inside", 60000, 80000, []span{{0, 60000, 5536}, {1, 0, 65536}, {2, 0, 8928}}},
		{"beyond 16 TiB", 16<<40 + 512, 1024, []span{{1 << 28, 512, 1024}}},
		{"the end of the largest origin", last, huge - last, []span{{last >> chunkShift, last & (chunkSize - 1), huge - last}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := slices.Collect(spans(tc.off, tc.n))
			if !slices.Equal(got, tc.want) {
				t.Errorf("spans(%d, %d)\n got %v\nwant %v", tc.off, tc.n, got, tc.want)
			}
		})
	}
}

func TestSpansEndEarly(t *testing.T) {
	for sp := range spans(0, 3*chunkSize) {
		if sp.chunk == 1 {
			return
		}
	}
	t.Error("a loop over spans went on after its end")
}

func TestMasks(t *testing.T) {
	const size = 20*chunkSize + 5*blockSize + SectorSize // ends in the sixth block of chunk 20
	for _, tc := range []struct {
		name  string
		sp    span
		mask  uint16 // touched
		whole uint16 // covered whole
	}{
		{"the first byte", span{0, 0, 1}, 1, 0},
		{"the last byte", span{0, chunkSize - 1, 1}, 1 << 15, 0},
		{"one block", span{0, 3 * blockSize, blockSize}, 1 << 3, 1 << 3},
		{"all but the first byte of two blocks", span{0, 1, 2*blockSize - 1}, 3, 2},
		{"across an edge of blocks", span{0, blockSize - 1, 2}, 3, 0},
		{"all", span{0, 0, chunkSize}, allBlocks, allBlocks},
		{"the last sector of the device", span{20, 5 * blockSize, SectorSize}, 1 << 5, 1 << 5},
		{"to the end of the device", span{20, 4*blockSize + 1, blockSize + SectorSize - 1}, 3 << 4, 1 << 5},
		{"the same elsewhere", span{19, 4*blockSize + 1, blockSize + SectorSize - 1}, 3 << 4, 0},
		{"within the last block", span{15, chunkSize - 100, 50}, 1 << 15, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := tc.sp.mask(); got != tc.mask {
				t.Errorf("touched\n got %016b\nwant %016b", got, tc.mask)
			}
			if got := tc.sp.wholeMask(size); got != tc.whole {
				t.Errorf("whole\n got %016b\nwant %016b", got, tc.whole)
			}
		})
	}
}

func TestRunsOfAMask(t *testing.T) {
	for mask := range 1 << blocksPerChunk {
		var got uint16
		end := -1 // where the run before ended
		for first, n := range runs(uint16(mask)) {
			if first <= end || n < 1 || first+n > blocksPerChunk {
				t.Fatalf("mask %016b: run of %d from %d after one that ends at %d", mask, n, first, end)
			}
			got |= blockRange(first, n)
			end = first + n
		}
		if got != uint16(mask) {
			t.Fatalf("runs of a mask\n got %016b\nwant %016b", got, mask)
		}
	}
}

func TestChunks(t *testing.T) {
	for _, tc := range []struct {
		size int64
		want chunkNo
	}{
		{SectorSize, 1},
		{chunkSize, 1},
		{chunkSize + SectorSize, 2},
		{16 << 40, 1 << 28},
		{16<<40 + SectorSize, 1<<28 + 1},
		{huge, 1 << 47},
	} {
		got := chunks(tc.size)
		if got != tc.want {
			t.Errorf("chunks(%d): got %d, want %d", tc.size, got, tc.want)
		}
		if at := (got - 1).off(); at < 0 || at >= tc.size {
			t.Errorf("the last chunk of %d bytes begins at %d", tc.size, at)
		}
	}
}

func TestWords(t *testing.T) {
	highest := store.Slot(1<<48 - 1)
	w := makeWord(highest, 1<<15)
	if w.slot() != highest || w.mask() != 1<<15 || !w.hasSlot() {
		t.Errorf("word of slot %v, block 15: got slot %v, blocks %016b", highest, w.slot(), w.mask())
	}
	if w := w.with(1); w.slot() != highest || w.mask() != 1<<15|1 {
		t.Errorf("with block 0: got slot %v, blocks %016b", w.slot(), w.mask())
	}
	if zeroWord.hasSlot() || zeroWord.mask() != allBlocks {
		t.Errorf("the word of a hole: got slot %v, blocks %016b", zeroWord.slot(), zeroWord.mask())
	}
	if word(0).hasSlot() || word(0).mask() != 0 {
		t.Error("the empty word is not empty")
	}
}

// TestPlacesOfNeighbours checks that blocks are read together exactly where they
// are neighbours: across the edge of a slot too, but never as part of the origin.
func TestPlacesOfNeighbours(t *testing.T) {
	s := store.Slot(1<<40 | 7)
	for _, tc := range []struct {
		name string
		p, q place
		want bool
	}{
		{"both in the origin", inOrigin, inOrigin, true},
		{"both zero", isZero, isZero, true},
		{"origin, then zero", inOrigin, isZero, false},
		{"zero, then the first slot", isZero, placeIn(s, 0), false},
		{"one block after the other", placeIn(s, 3), placeIn(s, 4), true},
		{"the same block", placeIn(s, 3), placeIn(s, 3), false},
		{"the next slot", placeIn(s, 15), placeIn(s+1, 0), true},
		{"the same slot again", placeIn(s, 15), placeIn(s, 0), false},
		{"a slot, then the origin", placeIn(s, 15), inOrigin, false},
	} {
		if got := tc.p.follows(tc.q); got != tc.want {
			t.Errorf("%s: got %v, want %v", tc.name, got, tc.want)
		}
	}
}

func TestStripes(t *testing.T) {
	var k chunkLocks
	for _, tc := range []struct {
		name        string
		first, last chunkNo
		want        []chunkNo
	}{
		{"one chunk", 3, 3, []chunkNo{3}},
		{"a few", 254, 255, []chunkNo{254, 255}},
		{"around the end", 254, 257, []chunkNo{0, 1, 254, 255}},
		{"a window far up", 1<<47 - window, 1<<47 - 1, []chunkNo{240, 241, 242, 243, 244, 245, 246, 247, 248, 249, 250, 251, 252, 253, 254, 255}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []chunkNo
			for i := range stripesOf(tc.first, tc.last) {
				got = append(got, i)
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("locks of chunks %d to %d\n got %v\nwant %v", tc.first, tc.last, got, tc.want)
			}
			k.lock(tc.first, tc.last)
			k.unlock(tc.first, tc.last)
		})
	}
}
