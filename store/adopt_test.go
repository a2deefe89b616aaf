package store

import (
	"errors"
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestAdopt stops a pool, opens its parts again and finds what tables name; the
// rest is given back.
func TestAdopt(t *testing.T) {
	for _, kind := range []Kind{File, Dev} {
		t.Run(string(kind), func(t *testing.T) {
			backing := filepath.Join(t.TempDir(), "store")
			reopen := func() Part { return openFile(t, backing, 64<<20) }
			if kind == Dev {
				backing = sparseFile(t, t.TempDir(), 64<<20)
				dev := loopDevice(t, backing)
				reopen = func() Part {
					part, err := OpenDev(dev, false)
					if err != nil {
						t.Fatal(err)
					}
					return part
				}
			}
			rng := newRand(t)
			p := NewPool()
			if err := p.AddAs(5, reopen()); err != nil {
				t.Fatal(err)
			}
			m := newModel(t, rng, p)
			for range 800 {
				m.step()
			}
			id := p.ledgers[0].traits.ID
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}

			m.p = openPool(t)
			part := reopen()
			if err := m.p.AddAs(5, part); err != nil {
				t.Fatal(err)
			}
			if part.Traits().ID != id {
				t.Errorf("ID\n got %v\nwant %v", part.Traits().ID, id)
			}
			for i, s := range m.slots {
				if i%2 == 0 {
					if err := m.p.Adopt(s, m.mask(s)); err != nil {
						t.Fatalf("Adopt of slot %v: %v", s, err)
					}
				} else {
					delete(m.used, s)
				}
			}
			m.slots = nil
			for s := range maps.Keys(m.used) {
				m.slots = append(m.slots, s)
			}
			m.check()
			if got := m.p.Outlook().Rate; got != 0 {
				t.Errorf("rate after slots were adopted\n got %d\nwant 0", got)
			}
			if kind == File {
				// Before Discard there are only new slots.
				s := allocOne(t, m.p, AllBlocks)
				if s.index() < part.Traits().Held {
					t.Errorf("slot before Discard\n got %v\nwant one from %d on", s, part.Traits().Held)
				}
				m.p.Free(s, AllBlocks)
			}
			if err := m.p.Discard(); err != nil {
				t.Fatal(err)
			}
			m.check()
			syncFile(t, part)
			_, used, _ := m.p.Space()
			if got := backingOf(t, backing); kind == File && got < used || got > used+used/20+256<<10 {
				t.Errorf("bytes on disk\n got %d\nwant %d or little more", got, used)
			}
			for range 400 {
				m.step()
			}
			for len(m.slots) > 0 {
				m.free()
			}
			m.check()
		})
	}
}

// TestDiscardEmpties: a store whose tables are lost starts empty.
func TestDiscardEmpties(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	p := NewPool(openFile(t, path, 64<<20))
	for range 10 {
		s := allocOne(t, p, 0x0ff0)
		if err := p.WriteAt(s, make([]byte, SlotSize/2), SlotSize/4); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if got := backingOf(t, path); got < 10*SlotSize/2 {
		t.Fatalf("bytes on disk after Close\n got %d\nwant what was written: a successor may adopt it", got)
	}
	p = openPool(t, openFile(t, path, 0))
	if err := p.Discard(); err != nil {
		t.Fatal(err)
	}
	if got := backingOf(t, path); got > 8192 {
		t.Errorf("bytes on disk after Discard\n got %d\nwant the header", got)
	}
	wantSpace(t, p, "after Discard", 0, 64<<20)
	if s := allocOne(t, p, 1); s.index() != 0 {
		t.Errorf("slot after Discard\n got %v\nwant the first", s)
	}
}

// TestDiscardEmptiesWhatWasPrepared: a process that was killed leaves backing that it
// had prepared and never used, before, between and behind what is in use.
func TestDiscardEmptiesWhatWasPrepared(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	p := NewPool(openFile(t, path, 64<<20))
	s := allocOne(t, p, AllBlocks)
	if err := p.WriteAt(s, make([]byte, SlotSize), 0); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	part := openFile(t, path, 0)
	for _, off := range []int64{1 * SlotSize, 200 * SlotSize, 700 * SlotSize} {
		if err := part.Prepare(off, unitSlots*SlotSize); err != nil {
			t.Fatal(err)
		}
	}
	if err := part.Close(); err != nil {
		t.Fatal(err)
	}
	if got := backingOf(t, path); got < 3*unitSlots*SlotSize {
		t.Fatalf("bytes on disk\n got %d\nwant what was prepared", got)
	}
	p = openPool(t, openFile(t, path, 0))
	if err := p.Adopt(s, AllBlocks); err != nil {
		t.Fatal(err)
	}
	if err := p.Discard(); err != nil {
		t.Fatal(err)
	}
	if got := backingOf(t, path); got > SlotSize+8192 {
		t.Errorf("bytes on disk after Discard\n got %d\nwant the header and what was adopted", got)
	}
}

func TestAdoptRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	p := NewPool(openFile(t, path, 64<<20))
	s := allocOne(t, p, 1)
	if err := p.WriteAt(s, []byte{1}, 0); err != nil {
		t.Fatal(err)
	}
	p.Close()
	part := openFile(t, path, 0)
	held := part.Traits().Held
	mem, err := OpenMem(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	p = openPool(t, part, mem)
	if err := p.Adopt(s, 1); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		slot Slot
		want string
	}{
		{"no slot", NoSlot, "part 0 of the snapstore is not there"},
		{"no part", makeSlot(3, 0), "part 3 of the snapstore is not there"},
		{"memory", makeSlot(2, 0), "part 2 of the snapstore was in memory"},
		{"twice", s, "it is in use already"},
		{"beyond the end", makeSlot(1, held), "its part held only"},
		{"far beyond the end", makeSlot(1, 1<<40-1), "its part held only"},
		{"after Discard", s + 1, "it was discarded"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.name == "after Discard" {
				if err := p.Discard(); err != nil {
					t.Fatal(err)
				}
			}
			if err := p.Adopt(tc.slot, 1); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Adopt of slot %v\n got %v\nwant %s", tc.slot, err, tc.want)
			}
		})
	}
	if err := p.Check(); err != nil {
		t.Error(err)
	}
}

// TestDiscardBesideUse lets adopted slots be freed, shrunk and extended, and
// others be given out, at each step of Discard.
func TestDiscardBesideUse(t *testing.T) {
	const n = 2*maxClaim + 10
	for step := 1; ; step += 1 + step/20 {
		f := newFaulty(t, 256<<20)
		f.traits.Held = n
		p := openPool(t, f)
		for i := range int64(n / 2) {
			if err := p.Adopt(makeSlot(1, 2*i), 0b11); err != nil {
				t.Fatal(err)
			}
		}
		punches := 0
		taken := make(map[Slot]uint16)
		f.set(func(op string, _, _ int64) error {
			if op != "punch" {
				return nil
			}
			if punches++; punches != step {
				return nil
			}
			for _, i := range []int64{0, maxClaim - 2, maxClaim, 2*maxClaim - 2, 2 * maxClaim} {
				s := makeSlot(1, i)
				p.Shrink(s, 0b01)
				if err := p.Extend(s, 0b100); err != nil && !errors.Is(err, ErrFull) {
					t.Errorf("Extend of slot %v: %v", s, err)
				} else if err == nil {
					p.Shrink(s, 0b100)
				}
				p.Free(s, 0b10)
			}
			for range 20 {
				for _, mask := range []uint16{0b10, AllBlocks} {
					s := allocOne(t, p, mask)
					if err := p.WriteAt(s, []byte{byte(s)}, BlockSize); err != nil {
						t.Error(err)
					}
					taken[s] = mask
				}
			}
			return nil
		})
		if err := p.Discard(); err != nil {
			t.Fatal(err)
		}
		f.set(nil)
		if err := p.Check(); err != nil {
			t.Fatalf("step %d: %v", step, err)
		}
		for s := range taken {
			b := make([]byte, 1)
			if err := p.ReadAt(s, b, BlockSize); err != nil || b[0] != byte(s) {
				t.Fatalf("step %d: block 1 of slot %v: %v\n got %d\nwant %d", step, s, err, b[0], byte(s))
			}
		}
		if punches < step {
			t.Logf("the last punch was number %d", punches)
			return
		}
	}
}

// TestSweepFails: a part that cannot be swept gives out nothing of what it held.
func TestSweepFails(t *testing.T) {
	f := newFaulty(t, 64<<20)
	f.traits.Held = f.traits.Slots
	p := openPool(t, f)
	f.set(failing("punch", unix.EIO))
	if err := p.Discard(); !errors.Is(err, unix.EIO) {
		t.Errorf("Discard\n got %v\nwant %v", err, unix.EIO)
	}
	f.set(nil)
	if got := alloc1(p, 1); len(got) != 0 {
		t.Errorf("slots of a part that failed\n got %v\nwant none", got)
	}
}
