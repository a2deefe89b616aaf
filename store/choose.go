// Choosing slots: which of those that are free suits a request.

package store

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
