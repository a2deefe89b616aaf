package store

import (
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// alloc returns slots for masks, as many as there are.
func alloc(t testing.TB, p *Pool, masks ...uint16) []Slot {
	t.Helper()
	dst := make([]Slot, len(masks))
	n, err := p.Alloc(dst, masks)
	if err != nil {
		t.Fatalf("Alloc of %d slots: %v", len(masks), err)
	}
	return dst[:n]
}

// repeat returns n times mask.
func repeat(n int, mask uint16) []uint16 { return slices.Repeat([]uint16{mask}, n) }

func wantSpace(t testing.TB, p *Pool, what string, used, free int64) {
	t.Helper()
	size, u, f := p.Space()
	if u != used || f != free || size != used+free {
		t.Errorf("space %s\n got size %d, %d used, %d free\nwant size %d, %d used, %d free", what, size, u, f, used+free, used, free)
	}
}

func TestSlotNumbers(t *testing.T) {
	s := makeSlot(255, 1<<32-1)
	if s.Part() != 255 || s.index() != 1<<32-1 || s >= 1<<48 {
		t.Errorf("slot %v\n got part %d, index %d, number %#x\nwant 255, %d, less than 48 bits", s, s.Part(), s.index(), uint64(s), int64(1<<32-1))
	}
	if got, want := makeSlot(3, 7)+1, makeSlot(3, 8); got != want {
		t.Errorf("the neighbour of 3:7\n got %v\nwant %v", got, want)
	}
}

// TestAllocGivesNeighbours: a large write is copied with one call.
func TestAllocGivesNeighbours(t *testing.T) {
	for _, tc := range []struct {
		name  string
		masks []uint16
	}{
		{"whole", repeat(16, AllBlocks)},
		{"with a head and a tail", append(append([]uint16{0xff00}, repeat(14, AllBlocks)...), 0x000f)},
		{"parts alone", []uint16{0xfff0, 0x00ff}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := openPool(t, openMem(t, 64<<20))
			for range 20 {
				slots := alloc(t, p, tc.masks...)
				for i, s := range slots {
					if s != slots[0]+Slot(i) {
						t.Fatalf("slots\n got %v\nwant neighbours", slots)
					}
				}
				if len(slots) != len(tc.masks) {
					t.Fatalf("slots given\n got %d\nwant %d", len(slots), len(tc.masks))
				}
			}
		})
	}
}

// TestAllocPassesGapsBy: single slots that were freed here and there do not make
// a large write one of many pieces.
func TestAllocPassesGapsBy(t *testing.T) {
	p := openPool(t, openMem(t, 64<<20))
	slots := alloc(t, p, repeat(64, 0b101)...)
	for i := 0; i < len(slots); i += 2 {
		p.Free(slots[i], 0b101)
	}
	if err := p.Discard(); err != nil {
		t.Fatal(err)
	}
	if got := allocOne(t, p, 0b101); got != slots[0] {
		t.Errorf("a single slot\n got %v\nwant the first gap, %v", got, slots[0])
	}
	got := alloc(t, p, repeat(8, 0b1111)...)
	for i, s := range got {
		if s != got[0]+Slot(i) {
			t.Fatalf("slots\n got %v\nwant neighbours", got)
		}
	}
}

// TestSpaceCountsBlocks follows the space of a pool through every change.
func TestSpaceCountsBlocks(t *testing.T) {
	const limit = 4 << 20
	p := openPool(t, openMem(t, limit))
	wantSpace(t, p, "at first", 0, limit)
	s := allocOne(t, p, 0b101)
	wantSpace(t, p, "after Alloc of two blocks", 8192, limit-8192)
	if err := p.Extend(s, 0b1110); err != nil {
		t.Fatal(err)
	}
	wantSpace(t, p, "after Extend by two, one of which was there", 4*4096, limit-4*4096)
	p.Shrink(s, 0b110)
	wantSpace(t, p, "after Shrink by two", 8192, limit-8192)
	if got, want := slices.Collect(masksInUse(p)), []uint16{0b1001}; !slices.Equal(got, want) {
		t.Errorf("blocks in use\n got %016b\nwant %016b", got, want)
	}
	p.Free(s, 0b1001)
	wantSpace(t, p, "after Free", 0, limit)
}

func masksInUse(p *Pool) func(func(uint16) bool) {
	return func(yield func(uint16) bool) {
		for _, m := range p.InUse() {
			if !yield(m) {
				return
			}
		}
	}
}

// TestFull fills a pool to the reserve, and the reserve to the last block.
func TestFull(t *testing.T) {
	const limit = 4 << 20 // of which 256 KiB are the reserve
	p := openPool(t, openMem(t, limit))
	n := 0
	for ; ; n++ {
		if _, err := p.Alloc(make([]Slot, 1), []uint16{1}); err != nil {
			if !errors.Is(err, ErrFull) || !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("Alloc in a full pool\n got %v\nwant %v", err, ErrFull)
			}
			break
		}
	}
	if want := (limit - 256<<10) / BlockSize; n != want {
		t.Errorf("slots with one block\n got %d\nwant %d", n, want)
	}
	for k := range 5 {
		_, err := p.AllocReserve(make([]Slot, 1), []uint16{AllBlocks})
		if got, want := err == nil, k < 4; got != want {
			t.Errorf("AllocReserve number %d of a reserve of four\n got %v\nwant it to work: %v", k+1, err, want)
		}
		if _, err := p.Alloc(make([]Slot, 1), []uint16{1}); !errors.Is(err, ErrFull) {
			t.Errorf("Alloc beside the reserve\n got %v\nwant %v", err, ErrFull)
		}
	}
	wantSpace(t, p, "when full", limit, 0)
}

// TestExtendLeavesTheReserve: only ExtendReserve may use it.
func TestExtendLeavesTheReserve(t *testing.T) {
	p := openPool(t, openMem(t, 1<<20))
	s := allocOne(t, p, 1)
	for len(alloc1(p, 1)) > 0 {
	}
	if err := p.Extend(s, 2); !errors.Is(err, ErrFull) {
		t.Errorf("Extend in a full pool\n got %v\nwant %v", err, ErrFull)
	}
	if err := p.ExtendReserve(s, 2); err != nil {
		t.Errorf("ExtendReserve in a full pool: %v", err)
	}
}

// alloc1 returns one slot, or none when there is no room.
func alloc1(p *Pool, mask uint16) []Slot {
	dst := make([]Slot, 1)
	n, _ := p.Alloc(dst, []uint16{mask})
	return dst[:n]
}

// TestPartsInOrder spills from the first part to the second and comes back to
// the first once there is room.
func TestPartsInOrder(t *testing.T) {
	p := openPool(t, openMem(t, 256<<10), openMem(t, 4<<20))
	masks := repeat(3, AllBlocks)
	first := alloc(t, p, masks...)
	second := alloc(t, p, masks...)
	third := alloc(t, p, masks...)
	for _, tc := range []struct {
		name  string
		slots []Slot
		part  uint8
		n     int
	}{
		{"while there is room", first, 1, 3},
		{"what still fits", second, 1, 1},
		{"spilled", third, 2, 3},
	} {
		if len(tc.slots) != tc.n || tc.slots[0].Part() != tc.part {
			t.Errorf("%s\n got %v\nwant %d slots of part %d", tc.name, tc.slots, tc.n, tc.part)
		}
	}
	if err := p.Extend(second[0], 0); err != nil {
		t.Errorf("Extend by nothing: %v", err)
	}
	p.Free(first[0], AllBlocks)
	if s := allocOne(t, p, 1); s.Part() != 1 {
		t.Errorf("after Free\n got %v\nwant a slot of part 1", s)
	}
}

// TestExtendInAFullPart: another part has room, but the slot's has not.
func TestExtendInAFullPart(t *testing.T) {
	p := openPool(t, openMem(t, SlotSize), openMem(t, 4<<20))
	s := allocOne(t, p, 0x3fff)
	if err := p.Extend(s, 0x7fff); err != nil {
		t.Errorf("Extend by one of two blocks: %v", err)
	}
	allocOne(t, p, 1)
	if err := p.Extend(s, AllBlocks); !errors.Is(err, ErrFull) {
		t.Errorf("Extend in a full part\n got %v\nwant %v", err, ErrFull)
	}
	if s := allocOne(t, p, 1); s.Part() != 2 {
		t.Errorf("slot beside a full part\n got %v\nwant one of part 2", s)
	}
}

func TestCoarsePartsCountWholeSlots(t *testing.T) {
	f := newFaulty(t, 4<<20)
	f.traits.Coarse, f.traits.Slots = true, 64
	p := openPool(t, f)
	s := allocOne(t, p, 1)
	wantSpace(t, p, "after Alloc of a block", SlotSize, 63*SlotSize)
	if err := p.Extend(s, 0b111); err != nil {
		t.Fatal(err)
	}
	p.Shrink(s, 0b001)
	wantSpace(t, p, "after Extend and Shrink", SlotSize, 63*SlotSize)
	p.Free(s, 0b110)
	wantSpace(t, p, "after Free", 0, 64*SlotSize)
	for n := 0; ; n++ {
		if len(alloc1(p, 1)) == 0 {
			if n != 60 {
				t.Errorf("slots beside a reserve of four\n got %d\nwant 60", n)
			}
			break
		}
	}
}

func TestQuarantine(t *testing.T) {
	p := openPool(t, openMem(t, SlotSize*4))
	s := allocOne(t, p, AllBlocks)
	p.Shrink(s, 0x00ff)
	p.Quarantine(s)
	wantSpace(t, p, "with a slot in quarantine", SlotSize/2, 4*SlotSize-SlotSize/2)
	if got := len(slices.Collect(masksInUse(p))); got != 0 {
		t.Errorf("slots in use\n got %d\nwant 0", got)
	}
	for range 100 {
		for _, s2 := range alloc1(p, AllBlocks) {
			if s2 == s {
				t.Fatalf("slot %v was given out again", s)
			}
			p.Free(s2, AllBlocks)
		}
		if err := p.Discard(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestReadWrite(t *testing.T) {
	mem, file := openMem(t, 1<<20), openFile(t, t.TempDir()+"/store", 1<<20)
	p := openPool(t, mem, file)
	for _, part := range []uint8{1, 2} {
		dst := make([]Slot, 2)
		for dst[0].Part() != part {
			dst = alloc(t, p, AllBlocks, AllBlocks)
		}
		// A write over two slots, at an odd place.
		want := []byte(strings.Repeat("0123456789", 7000))
		if err := p.WriteAt(dst[0], want, 12345); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if err := p.ReadAt(dst[0], got, 12345); err != nil || string(got) != string(want) {
			t.Errorf("part %d: ReadAt over two slots: %v, or other bytes", part, err)
		}
		tail := make([]byte, 12345+70000-SlotSize)
		if err := p.ReadAt(dst[1], tail, 0); err != nil || string(tail) != string(want[SlotSize-12345:]) {
			t.Errorf("part %d: ReadAt of the second slot: %v, or other bytes", part, err)
		}
		if got, want := p.MayHang(dst[0]), part == 2; got != want {
			t.Errorf("MayHang of part %d\n got %v\nwant %v", part, got, want)
		}
	}
	if err := p.ReadAt(NoSlot, make([]byte, 1), 0); err == nil {
		t.Errorf("ReadAt of NoSlot: no error")
	}
	if err := p.WriteAt(makeSlot(9, 1), make([]byte, 1), 0); err == nil {
		t.Errorf("WriteAt of a part that is not there: no error")
	}
}

func TestAddNumbersParts(t *testing.T) {
	p := openPool(t)
	if _, err := p.Alloc(make([]Slot, 1), []uint16{1}); !errors.Is(err, ErrFull) {
		t.Errorf("Alloc without parts\n got %v\nwant %v", err, ErrFull)
	}
	if err := p.AddAs(7, openMem(t, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if s := allocOne(t, p, 1); s.Part() != 7 {
		t.Errorf("slot of the only part\n got %v\nwant one of part 7", s)
	}
	spare := openMem(t, 1<<20)
	defer spare.Close()
	for _, no := range []uint8{0, 7} {
		if err := p.AddAs(no, spare); err == nil {
			t.Errorf("AddAs(%d): no error", no)
		}
	}
	var got []uint8
	for range 254 {
		if err := p.Add(openMem(t, 1<<20)); err != nil {
			t.Fatal(err)
		}
	}
	for _, info := range p.Parts() {
		got = append(got, info.No)
	}
	if got[0] != 7 || got[1] != 1 || got[7] != 8 || len(got) != 255 || got[254] != 255 {
		t.Errorf("numbers\n got %v\nwant 7, 1 to 6, 8 to 255", got)
	}
	if err := p.Add(spare); err == nil {
		t.Errorf("Add of the 256th part: no error")
	}
}

// TestMisuseIsNoted: a caller that breaks the contract is told by Check and
// breaks nothing else.
func TestMisuseIsNoted(t *testing.T) {
	for _, tc := range []struct {
		name string
		call func(p *Pool, s Slot)
		want string
	}{
		{"freed twice", func(p *Pool, s Slot) { p.Free(s, 3); p.Free(s, 3) }, "snapstore: free of slot 1:0, which is not in use"},
		{"freed with other blocks", func(p *Pool, s Slot) { p.Free(s, 1) }, "snapstore: free of slot 1:0 with blocks 0000000000000001 in use: they are 0000000000000011"},
		{"shrunk by others", func(p *Pool, s Slot) { p.Shrink(s, 4) }, "snapstore: shrink of slot 1:0 by blocks 0000000000000100: those in use are 0000000000000011"},
		{"extended when free", func(p *Pool, s Slot) { p.Extend(s+1, 4) }, "snapstore: extend of slot 1:1, which is not in use"},
		{"quarantined twice", func(p *Pool, s Slot) { p.Quarantine(s); p.Quarantine(s) }, "snapstore: quarantine of slot 1:0, which is not in use"},
		{"no part", func(p *Pool, s Slot) { p.Free(makeSlot(2, 0), 3) }, "snapstore: free of slot 2:0, which is not in use"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := NewPool(openMem(t, 1<<20))
			defer p.Close()
			tc.call(p, allocOne(t, p, 3))
			err := p.Check()
			if err == nil || err.Error() != tc.want {
				t.Errorf("Check\n got %v\nwant %s", err, tc.want)
			}
			p.misuse = nil
			if err := p.Check(); err != nil {
				t.Errorf("books after misuse: %v", err)
			}
		})
	}
}

func TestClosed(t *testing.T) {
	p := NewPool(openMem(t, 1<<20))
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err == nil {
		t.Errorf("second Close: no error")
	}
	if _, err := p.Alloc(make([]Slot, 1), []uint16{1}); err == nil {
		t.Errorf("Alloc after Close: no error")
	}
	if err := p.Wait(t.Context(), p.Freed()); err == nil {
		t.Errorf("Wait after Close: no error")
	}
}
