package store

import (
	"errors"
	"testing"
	"time"
)

// TestPunchKeepsNeighbours: what is punched is what is spare, to the block.
func TestPunchKeepsNeighbours(t *testing.T) {
	f := newFaulty(t, 64<<20)
	var got [][2]int64
	p := openPool(t, f)
	slots := alloc(t, p, 0xffff, 0x7ffe, 0xffff, 0x0ff0)
	p.Shrink(slots[0], 0x8001)
	p.Free(slots[1], 0x7ffe)
	p.Shrink(slots[2], 0x0003)
	f.set(func(op string, off, n int64) error {
		if op == "punch" {
			got = append(got, [2]int64{off / BlockSize, n / BlockSize})
		}
		return nil
	})
	if err := p.Discard(); err != nil {
		t.Fatal(err)
	}
	f.set(nil)
	first := slots[0].index() * slotBlocks
	want := [][2]int64{{first, 1}, {first + 15, 1 + 16 + 2}}
	if len(got) < 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("blocks punched\n got %v\nwant %v", got, want)
	}
}

// TestNobodyUsesWhatIsPunched holds a punch and sees that the block that is
// being punched is given to nobody, in any way, and that nobody waits for it.
func TestNobodyUsesWhatIsPunched(t *testing.T) {
	for _, tc := range []struct {
		name  string
		slots int64 // that the part has
		mask  uint16
	}{
		{"two blocks", 1024, 0b11},
		{"a whole slot", 1024, AllBlocks},
		{"the last slot", 1, AllBlocks},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFaulty(t, 4<<20)
			f.traits.Slots = tc.slots
			p := openPool(t, f)
			slot := []Slot{NoSlot}
			if _, err := p.AllocReserve(slot, []uint16{tc.mask}); err != nil {
				t.Fatal(err)
			}
			s := slot[0]
			p.Shrink(s, 0b10)
			hook, entered, release := gate("punch")
			f.set(hook)
			done := make(chan error)
			go func() { done <- p.Discard() }()
			<-entered
			if err := p.ExtendReserve(s, 0b10); !errors.Is(err, ErrFull) {
				t.Errorf("Extend by a block that is being punched\n got %v\nwant %v", err, ErrFull)
			}
			if err := p.ExtendReserve(s, AllBlocks&^0b10); err != nil {
				t.Errorf("Extend by the other blocks: %v", err)
			}
			p.Free(s, AllBlocks&^0b10)
			if n, _ := p.AllocReserve(slot, []uint16{AllBlocks}); n > 0 && slot[0] == s {
				t.Errorf("slot %v was given out while it was punched", s)
			}
			close(release)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestTryAllocWaitsForNothing: where Alloc would wait for what is being punched, TryAlloc
// gives nothing.
func TestTryAllocWaitsForNothing(t *testing.T) {
	f := newFaulty(t, 4<<20)
	f.traits.Slots, f.traits.Limit = 1, SlotSize
	p := openPool(t, f)
	slot, masks := []Slot{NoSlot}, []uint16{1}
	if n := p.TryAlloc(slot, masks); n != 1 {
		t.Fatalf("TryAlloc\n got %d slots\nwant 1", n)
	}
	p.Free(slot[0], 1)
	hook, entered, release := gate("punch")
	f.set(hook)
	discarded := make(chan error)
	go func() { discarded <- p.Discard() }()
	<-entered
	if _, _, err := p.tryAlloc(slot, masks, false); !errors.Is(err, errPunching) {
		t.Errorf("what Alloc finds\n got %v\nwant %v", err, errPunching)
	}
	begun := time.Now()
	if n := p.TryAlloc(slot, masks); n != 0 {
		t.Errorf("TryAlloc beside a punch\n got %d slots\nwant none", n)
	}
	if got := time.Since(begun); got >= punchWait {
		t.Errorf("TryAlloc took %v", got)
	}
	close(release)
	if err := <-discarded; err != nil {
		t.Error(err)
	}
	if n := p.TryAlloc(slot, masks); n != 1 {
		t.Fatalf("TryAlloc after the punch\n got %d slots\nwant 1", n)
	}
	p.Free(slot[0], 1)
}

// TestAllocWaitsForPunch: where nothing else is left, slots that are being
// punched are worth waiting for, but not for ever, and not by everybody.
func TestAllocWaitsForPunch(t *testing.T) {
	f := newFaulty(t, 4<<20)
	f.traits.Coarse, f.traits.Slots = true, 1
	p := openPool(t, f)
	slot, masks := []Slot{NoSlot}, []uint16{1}
	for _, late := range []bool{false, true} {
		if _, err := p.AllocReserve(slot, masks); err != nil {
			t.Fatal(err)
		}
		p.Free(slot[0], 1)
		hook, entered, release := gate("punch")
		f.set(hook)
		discarded := make(chan error)
		go func() { discarded <- p.Discard() }()
		<-entered
		if late {
			if _, err := p.AllocReserve(slot, masks); !errors.Is(err, ErrFull) {
				t.Errorf("AllocReserve beside a punch that hangs\n got %v\nwant %v", err, ErrFull)
			}
			if _, _, err := p.tryAlloc(slot, masks, true); !errors.Is(err, ErrFull) {
				t.Errorf("the next one\n got %v\nwant %v at once", err, ErrFull)
			}
			close(release)
		} else {
			since := p.Freed()
			allocated := make(chan error)
			go func() {
				_, err := p.AllocReserve(slot, masks)
				allocated <- err
			}()
			eventually(t, "somebody waits", func() bool {
				p.mu.Lock()
				defer p.mu.Unlock()
				return p.wake != nil && p.freed == since
			})
			close(release)
			if err := <-allocated; err != nil {
				t.Errorf("AllocReserve beside a punch: %v", err)
			}
			p.Free(slot[0], 1)
		}
		if err := <-discarded; err != nil {
			t.Fatal(err)
		}
	}
}

// TestDiscardLeavesSome: slots that are being discarded are out of reach for a
// moment, but never all that a device has.
func TestDiscardLeavesSome(t *testing.T) {
	f := newFaulty(t, 8*SlotSize)
	f.traits.Coarse, f.traits.Slots = true, 8
	p := openPool(t, f)
	s := allocOne(t, p, 1)
	for _, other := range alloc(t, p, repeat(5, 1)...) {
		p.Free(other, 1)
	}
	hook, entered, release := gate("punch")
	f.set(hook)
	done := make(chan error)
	go func() { done <- p.Discard() }()
	<-entered
	for n := range 4 {
		if len(alloc1(p, 1)) == 0 {
			t.Fatalf("slots while some are discarded, of seven and a reserve of two\n got %d\nwant 4", n)
		}
	}
	close(release)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	p.Free(s, 1)
}
