package store

import (
	"encoding/binary"
	"errors"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"
)

// A model is a plain account of what a pool gave out and what was written
// there: each block says which slot it is for and in which turn it was written.
type model struct {
	t     *testing.T
	rng   *rand.Rand
	p     *Pool
	slots []Slot
	used  map[Slot]*[slotBlocks]uint64 // turn, 0: not in use
	turn  uint64
}

func newModel(t *testing.T, rng *rand.Rand, p *Pool) *model {
	return &model{t: t, rng: rng, p: p, used: make(map[Slot]*[slotBlocks]uint64)}
}

// randomMask is whole, of one block, or anything.
func (m *model) randomMask() uint16 {
	switch m.rng.IntN(4) {
	case 0:
		return AllBlocks
	case 1:
		return 1 << m.rng.IntN(16)
	case 2:
		first := m.rng.IntN(16)
		return AllBlocks << first & (AllBlocks >> m.rng.IntN(16-first))
	}
	return uint16(m.rng.Uint32())
}

func (m *model) mask(s Slot) (mask uint16) {
	for k, turn := range m.used[s] {
		if turn != 0 {
			mask |= 1 << k
		}
	}
	return mask
}

// write writes the blocks of mask to s.
func (m *model) write(s Slot, mask uint16) {
	b := make([]byte, BlockSize)
	for k := range slotBlocks {
		if mask>>k&1 == 0 {
			continue
		}
		m.turn++
		for i := 0; i < BlockSize; i += 64 {
			binary.LittleEndian.PutUint64(b[i:], uint64(s)<<4|uint64(k))
			binary.LittleEndian.PutUint64(b[i+8:], m.turn)
		}
		if err := m.p.WriteAt(s, b, int64(k)*BlockSize); err != nil {
			m.t.Fatalf("write block %d of slot %v: %v", k, s, err)
		}
		m.used[s][k] = m.turn
	}
}

// read compares every block in use of s.
func (m *model) read(s Slot) {
	b := make([]byte, BlockSize)
	for k, turn := range m.used[s] {
		if turn == 0 {
			continue
		}
		if err := m.p.ReadAt(s, b, int64(k)*BlockSize); err != nil {
			m.t.Fatalf("read block %d of slot %v: %v", k, s, err)
		}
		for i := 0; i < BlockSize; i += 64 {
			where, when := binary.LittleEndian.Uint64(b[i:]), binary.LittleEndian.Uint64(b[i+8:])
			if where != uint64(s)<<4|uint64(k) || when != turn {
				m.t.Fatalf("block %d of slot %v at byte %d\n got block %d of slot %v as of turn %d\nwant turn %d",
					k, s, i, where&15, Slot(where>>4), when, turn)
			}
		}
	}
}

func (m *model) alloc() {
	masks := make([]uint16, 1)
	if m.rng.IntN(3) == 0 {
		masks = make([]uint16, 1+m.rng.IntN(20))
	}
	for i := range masks {
		masks[i] = m.randomMask()
	}
	dst := make([]Slot, len(masks))
	n, err := m.p.Alloc(dst, masks)
	if errors.Is(err, ErrFull) {
		_, _, free := m.p.Space()
		if free-m.p.reserve*BlockSize >= slotBlocks*BlockSize {
			m.t.Fatalf("Alloc of %016b\n got %v\nwant a slot: %d bytes are free", masks[0], err, free)
		}
		m.free()
		return
	}
	if err != nil || n < 1 {
		m.t.Fatalf("Alloc of %d slots\n got %d, %v", len(masks), n, err)
	}
	for i, s := range dst[:n] {
		if m.used[s] != nil {
			m.t.Fatalf("slot %v was given out twice", s)
		}
		m.used[s] = new([slotBlocks]uint64)
		m.slots = append(m.slots, s)
		m.write(s, masks[i])
	}
}

func (m *model) pick() (int, Slot) {
	i := m.rng.IntN(len(m.slots))
	return i, m.slots[i]
}

func (m *model) free() {
	i, s := m.pick()
	m.read(s)
	m.p.Free(s, m.mask(s))
	delete(m.used, s)
	m.slots[i] = m.slots[len(m.slots)-1]
	m.slots = m.slots[:len(m.slots)-1]
}

func (m *model) extend() {
	_, s := m.pick()
	add := m.randomMask() &^ m.mask(s)
	err := m.p.Extend(s, add|m.mask(s))
	switch {
	case errors.Is(err, ErrFull):
	case err != nil:
		m.t.Fatalf("Extend of slot %v: %v", s, err)
	default:
		m.write(s, add)
	}
}

func (m *model) shrink() {
	_, s := m.pick()
	drop := m.randomMask() & m.mask(s)
	m.p.Shrink(s, drop)
	for k := range slotBlocks {
		if drop>>k&1 != 0 {
			m.used[s][k] = 0
		}
	}
}

// step does one thing, or a lot of one thing.
func (m *model) step() {
	op := m.rng.IntN(20)
	if len(m.slots) == 0 {
		op = 0
	}
	switch {
	case op < 8:
		m.alloc()
	case op < 12:
		m.extend()
	case op < 14:
		m.shrink()
	case op < 18:
		m.free()
	case op < 19:
		_, s := m.pick()
		m.read(s)
	case m.rng.IntN(100) == 0:
		for range m.rng.IntN(len(m.slots)) {
			m.free()
		}
	}
}

// check compares the pool's space and its slots in use with the model's.
func (m *model) check() {
	if err := m.p.Check(); err != nil {
		m.t.Fatal(err)
	}
	got := maps.Collect(m.p.InUse())
	want := make(map[Slot]uint16)
	for s := range m.used {
		want[s] = m.mask(s)
	}
	if !maps.Equal(got, want) {
		m.t.Fatalf("slots in use\n got %v\nwant %v", got, want)
	}
	_, used, _ := m.p.Space()
	sum := int64(0)
	for s, mask := range want {
		sum += m.p.byNo[s.Part()].Load().cost(mask) * BlockSize
	}
	if used != sum {
		m.t.Fatalf("bytes in use\n got %d\nwant %d", used, sum)
	}
}

// TestPoolModel does random things to pools of every kind of part while their
// keepers punch and prepare.
func TestPoolModel(t *testing.T) {
	rng := newRand(t)
	coarse := func(t *testing.T) Part {
		f := newFaulty(t, 8<<20)
		f.traits.Coarse, f.traits.Slots = true, 8<<20/SlotSize
		return f
	}
	narrow := func(t *testing.T) Part {
		f := newFaulty(t, 8<<20)
		f.traits.Slots = 200 // fewer addresses than blocks
		return f
	}
	for _, tc := range []struct {
		name  string
		parts func(t *testing.T) []Part
	}{
		{"memory", func(t *testing.T) []Part { return []Part{openMem(t, 16<<20)} }},
		{"file", func(t *testing.T) []Part { return []Part{openFile(t, t.TempDir()+"/store", 16<<20)} }},
		{"whole slots", func(t *testing.T) []Part { return []Part{coarse(t)} }},
		{"several", func(t *testing.T) []Part {
			return []Part{openMem(t, 1<<20), coarse(t), openFile(t, filepath.Join(t.TempDir(), "store"), 4<<20)}
		}},
		{"few addresses", func(t *testing.T) []Part { return []Part{narrow(t), openMem(t, 4<<20)} }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := openPool(t, tc.parts(t)...)
			m := newModel(t, rng, p)
			for i := range 6000 {
				m.step()
				if i%500 == 0 {
					m.check()
				}
				if i%1500 == 700 {
					if err := p.Discard(); err != nil {
						t.Fatal(err)
					}
					m.check()
				}
				if i%100 == 0 {
					for _, l := range p.ledgers {
						l.wake()
					}
				}
			}
			for len(m.slots) > 0 {
				m.free()
			}
			m.check()
		})
	}
}

// TestFileIsAsLargeAsTheModel compares the backing of a file with what is in
// use, when nothing is kept to be used again, and when all is free.
func TestFileIsAsLargeAsTheModel(t *testing.T) {
	rng := newRand(t)
	path := filepath.Join(t.TempDir(), "store")
	part := openFile(t, path, 64<<20)
	p := openPool(t, part)
	m := newModel(t, rng, p)
	empty := backingOf(t, path)
	for round := range 4 {
		for range 800 {
			m.step()
		}
		if round == 3 {
			for len(m.slots) > 0 {
				m.free()
			}
		}
		if err := p.Discard(); err != nil {
			t.Fatal(err)
		}
		syncFile(t, part)
		_, used, _ := p.Space()
		// Each 4 KiB block on its own may need some room in the file
		// system's own tables.
		got, want := backingOf(t, path)-empty, used
		if got < want || got > want+want/50+256<<10 {
			t.Errorf("round %d: bytes on disk\n got %d\nwant %d or little more", round, got, want)
		}
	}
	for _, s := range slices.Sorted(maps.Keys(m.used)) {
		m.read(s)
	}
}
