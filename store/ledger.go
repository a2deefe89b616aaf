// The ledger of a part: which of its slots are in use, and for which blocks.

package store

import (
	"errors"
	"sync"
	"sync/atomic"
)

// A ledger is what a pool knows of one part. The pool's mu protects it, but
// for what is said otherwise. Space is counted in blocks.
type ledger struct {
	part   Part   // never changes
	traits Traits // never changes
	no     uint8  // never changes

	// punch is held across I/O by whoever punches, so that claim is one
	// range at a time. It is taken before the pool's mu.
	punch sync.Mutex

	kick   chan struct{} // wakes the keeper
	gone   chan struct{} // closed when the keeper is gone
	closed chan struct{} // closed when the part is, with closeErr set

	closeErr error

	// begun and ended count reads and writes where these may hang.
	begun, ended atomic.Int64

	limit   int64  // blocks in use at most
	used    int64  // blocks in use, those of quarantined slots included
	spare   int64  // blocks
	stuck   int64  // slots in quarantine
	allocs  uint64 // counts alloc and extend: tells the keeper what is idle
	seen    uint64 // allocs when the keeper last looked
	ahead   int64  // warm slots that the keeper has ready
	noAhead bool   // it cannot
	failed  error  // why no slot is given out any more
	hungAt  int64  // ended when I/O was found to hang, -1 if it was not
	backing backing

	pages  []*[pageSlots]slotState
	fresh  int64 // slots from this one on were never given out
	swept  int64 // slots from here to traits.Held are in use, adopted, or unknown
	inUse  slotSet
	clean  slotSet
	warm   slotSet
	dirty  slotSet
	single [slotBlocks][]uint32 // free slots of which one block is spare

	claim claim
}

// slotState is what is known of a slot below fresh.
type slotState struct {
	used  uint16
	spare uint16
	stuck bool // quarantined
}

// maxSingles bounds how many slots with the same single block are kept.
const maxSingles = 4096

func newLedger(no uint8, part Part) *ledger {
	t := part.Traits()
	limit := t.Limit / BlockSize
	return &ledger{
		part:    part,
		traits:  t,
		no:      no,
		kick:    make(chan struct{}, 1),
		gone:    make(chan struct{}),
		closed:  make(chan struct{}),
		limit:   limit,
		backing: backing{ceiling: limit},
		fresh:   t.Held,
		hungAt:  -1,
	}
}

func (l *ledger) slot(i int64) *slotState {
	p := i / pageSlots
	for int64(len(l.pages)) <= p {
		l.pages = append(l.pages, nil)
	}
	if l.pages[p] == nil {
		l.pages[p] = new([pageSlots]slotState)
	}
	return &l.pages[p][i%pageSlots]
}

// cost is how many blocks a slot takes in which mask is in use.
func (l *ledger) cost(mask uint16) int64 {
	if l.traits.Coarse {
		return slotBlocks
	}
	return blocks(mask)
}

// left is how many more blocks can be in use.
func (l *ledger) left() int64 {
	if l.backing.short || l.state() != nil {
		return 0
	}
	return max(0, min(l.limit, l.backing.ceiling)-l.used)
}

// room is how many of them can be in slots that are free now.
func (l *ledger) room() int64 {
	return min(l.left(), (l.traits.Slots-l.inUse.n-l.stuck)*slotBlocks)
}

func (l *ledger) inUseBlocks() int64 { return l.used }

var errHangs = errors.New("it hangs")

// state says why the part gives out no slots, if it does not.
func (l *ledger) state() error {
	if l.failed == nil && l.hungAt >= 0 && l.ended.Load() == l.hungAt {
		return errHangs
	}
	return l.failed
}

// noteHang is called when I/O to the part has not ended for so long that
// somebody gave up waiting for it. The part is left alone until some ends.
func (l *ledger) noteHang() {
	ended := l.ended.Load()
	if l.begun.Load() != ended {
		l.hungAt = ended
	}
}

// take puts the free slot i in use.
func (l *ledger) take(i int64, mask uint16) {
	st := l.slot(i)
	l.clean.remove(i)
	l.warm.remove(i)
	l.inUse.add(i)
	l.used += l.cost(mask)
	st.used = mask
	keep := st.spare &^ mask
	if l.traits.Coarse {
		keep = 0
	}
	l.setSpare(i, st, keep)
}

// setSpare also sees to it that what is spare in a slot in use is given back
// some time.
func (l *ledger) setSpare(i int64, st *slotState, spare uint16) {
	l.spare += blocks(spare) - blocks(st.spare)
	st.spare = spare
	if spare != 0 {
		l.dirty.add(i)
	} else {
		l.dirty.remove(i)
	}
}

// extend counts more blocks of a slot in use, if they cost no more than room.
func (l *ledger) extend(i int64, mask uint16, room int64) error {
	st := l.slot(i)
	add := mask &^ st.used
	if l.claim.has(i, add) {
		return ErrFull
	}
	if !l.traits.Coarse {
		if blocks(add) > room {
			return ErrFull
		}
		l.used += blocks(add)
	}
	st.used |= add
	l.setSpare(i, st, st.spare&^add)
	l.allocs++
	return nil
}

// shrink makes blocks of a slot in use spare.
func (l *ledger) shrink(i int64, mask uint16) {
	st := l.slot(i)
	drop := mask & st.used
	st.used &^= drop
	if !l.traits.Coarse {
		l.unuse(blocks(drop))
		l.setSpare(i, st, st.spare|drop)
	}
}

// free takes slot i out of use, to where it can be used again.
func (l *ledger) free(i int64) {
	st := l.slot(i)
	l.inUse.remove(i)
	l.unuse(l.cost(st.used))
	if i >= l.swept && i < l.traits.Held {
		st.used = 0
		l.setSpare(i, st, 0) // sweep will find it
		return
	}
	spare := st.spare | st.used
	if l.traits.Coarse {
		spare = AllBlocks
	}
	st.used = 0
	l.setSpare(i, st, spare)
	switch k := firstBlock(spare); {
	case l.claim.has(i, AllBlocks):
		// Part of it is being punched: settle finds its place.
	case spare == 0:
		l.clean.add(i)
	case spare == AllBlocks:
		l.dirty.remove(i)
		l.warm.add(i)
	case spare == 1<<k && len(l.single[k]) < maxSingles:
		l.dirty.remove(i)
		l.single[k] = append(l.single[k], uint32(i))
	}
	if l.spare > l.maxSpare() {
		l.wake()
	}
}

// maxSpare is how much backing is kept for those who will ask for it next: the
// less, the less room there is.
func (l *ledger) maxSpare() int64 {
	return min(256<<20/BlockSize, l.left()/4)
}

func (l *ledger) wake() {
	select {
	case l.kick <- struct{}{}:
	default: // it is awake
	}
}

// fail notes why the part gives out no more slots.
func (l *ledger) fail(err error) {
	if l.failed == nil {
		l.failed = err
	}
}
