// Alloc: which of the slots that are free suit a request.

package store

import (
	"context"
	"errors"
	"time"
)

// Alloc gives up to len(dst) slots, at least one being asked for. masks, as long
// as dst, says which blocks of each will be written: only these count. All come
// from one part, the first in order of preference with room for the first of
// them, and are neighbours wherever that is possible. It returns how many it
// gave: 0 with ErrFull when there is room for none.
func (p *Pool) Alloc(dst []Slot, masks []uint16) (int, error) {
	return p.alloc(dst, masks, false)
}

// TryAlloc is Alloc that does not wait: it returns 0 also where slots are being
// punched that Alloc would wait for.
func (p *Pool) TryAlloc(dst []Slot, masks []uint16) int {
	n, _, _ := p.tryAlloc(dst, masks, false)
	return n
}

// AllocReserve is Alloc for those who must not fail: it may also use the
// reserve. That is a matter of counting: nothing is kept free in a file system
// that others fill.
func (p *Pool) AllocReserve(dst []Slot, masks []uint16) (int, error) {
	return p.alloc(dst, masks, true)
}

// punchWait is how long Alloc waits for slots that are being punched where no
// others are left. To say that the pool is full would cost a snapshot.
const punchWait = time.Second

var errPunching = errors.New("slots are being punched")

func (p *Pool) alloc(dst []Slot, masks []uint16, reserve bool) (int, error) {
	n, since, err := p.tryAlloc(dst, masks, reserve)
	if err != errPunching {
		return n, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), punchWait)
	defer cancel()
	for err == errPunching && p.Wait(ctx, since) == nil {
		n, since, err = p.tryAlloc(dst, masks, reserve)
	}
	if err == errPunching {
		p.noteLatePunch()
		return 0, ErrFull
	}
	return n, err
}

// tryAlloc also returns the count for Wait.
func (p *Pool) tryAlloc(dst []Slot, masks []uint16, reserve bool) (n int, since uint64, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return 0, 0, errClosed
	}
	err = ErrFull
	room := p.sum((*ledger).room) - p.kept(reserve)
	for _, l := range p.ledgers {
		room := min(room, l.room())
		if n := l.alloc(dst, masks, room); n > 0 {
			p.noteSpace()
			return n, 0, nil
		}
		if l.cost(masks[0]) <= room && len(l.claim.masks) > 0 && !l.claim.late {
			err = errPunching
		}
	}
	return 0, p.freed, err
}

// noteLatePunch keeps others from waiting for the same punches.
func (p *Pool) noteLatePunch() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.ledgers {
		l.claim.late = true
	}
}

// alloc gives slots for masks that cost no more than room, and says how many.
func (l *ledger) alloc(dst []Slot, masks []uint16, room int64) int {
	fit := 0
	for fit < len(dst) {
		if room -= l.cost(masks[fit]); room < 0 {
			break
		}
		fit++
	}
	given := 0
	for given < fit {
		i, n := l.pick(masks[given:fit])
		if n == 0 {
			break
		}
		for k := range int64(n) {
			l.take(i+k, masks[given])
			dst[given] = makeSlot(l.no, i+k)
			given++
		}
	}
	l.allocs++
	return given
}

// pick chooses up to len(masks) neighbours that may be given out. n is 0 when
// there is no address left.
func (l *ledger) pick(masks []uint16) (i int64, n int) {
	want := len(masks)
	if l.wantsWarm(masks) {
		l.wantAhead(want)
		if i, n = l.warm.findRun(want); n > 0 {
			return i, n
		}
	}
	if want == 1 {
		if i, ok := l.popSingle(masks[0]); ok {
			return i, 1
		}
	}
	if i, n = l.clean.findRun(want); n == want {
		return i, n
	}
	if m := min(l.traits.Slots-l.fresh, int64(want)); m > int64(n) {
		l.fresh += m
		return l.fresh - m, int(m)
	}
	if n > 0 {
		return i, n
	}
	return l.scrape()
}

// scrape finds a free slot where those with an address of their own have run
// out: one that waits for somebody else, or to be punched.
func (l *ledger) scrape() (int64, int) {
	if i, n := l.warm.findRun(1); n > 0 {
		return i, n
	}
	for k := range l.single {
		if i, ok := l.popSingle(1 << k); ok {
			return i, 1
		}
	}
	i, ok := l.dirty.next(0)
	for ok && (l.inUse.has(i) || l.slot(i).stuck || l.claim.has(i, AllBlocks)) {
		i, ok = l.dirty.next(i + 1)
	}
	if !ok {
		return 0, 0
	}
	return i, 1
}

// wantsWarm says whether slots with backing for all blocks suit masks: where
// one of them is whole, the others are its neighbours in one write, and the
// next writes are likely to fill them.
func (l *ledger) wantsWarm(masks []uint16) bool {
	if l.traits.Coarse {
		return true
	}
	for _, m := range masks {
		if m == AllBlocks {
			return true
		}
	}
	return false
}

func (l *ledger) popSingle(mask uint16) (int64, bool) {
	if blocks(mask) != 1 {
		return 0, false
	}
	stack := &l.single[firstBlock(mask)]
	n := len(*stack)
	if n == 0 {
		return 0, false
	}
	i := (*stack)[n-1]
	*stack = (*stack)[:n-1]
	return int64(i), true
}
