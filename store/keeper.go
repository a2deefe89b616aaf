// The keeper: a goroutine for each part that has backing ready where it will be
// asked for, and gives back what is spare.

package store

import "time"

const (
	// unitSlots is how many slots are prepared at a time: 2 MiB, which is a
	// huge page where memory comes in them.
	unitSlots = 32

	// maxAhead bounds how many warm slots are prepared, 16 MiB.
	maxAhead = 8 * unitSlots
)

// idleAfter is for how long nothing is given out before what is spare in a
// part is given back.
const idleAfter = time.Second

// keep runs until the pool is closed. Errors of the part are noted where they
// are found.
func (p *Pool) keep(l *ledger) {
	defer close(l.gone)
	tick := time.NewTicker(idleAfter)
	defer tick.Stop()
	for {
		idle := false
		select {
		case <-p.done:
			return
		case <-l.kick:
		case <-tick.C:
			p.survey(l)
			p.mu.Lock()
			idle = l.allocs == l.seen
			l.seen = l.allocs
			p.mu.Unlock()
		}
		p.tend(l, idle)
	}
}

// tend prepares and punches until neither is needed. To prepare comes first:
// somebody is writing.
func (p *Pool) tend(l *ledger, idle bool) {
	for {
		p.mu.Lock()
		allocs, target := l.allocs, l.maxSpare()
		if idle && allocs == l.seen {
			target, l.ahead, l.noAhead = 0, 0, false
		}
		p.mu.Unlock()
		began := time.Now()
		if !p.prepare(l) && !p.trimStep(l, target) {
			break
		}
		p.mu.Lock()
		busy := l.allocs != allocs
		p.mu.Unlock()
		pause := time.Duration(0)
		if busy {
			// Most file systems let nobody write to a file while it is
			// punched: leave most of the time to those who do.
			pause = 3 * time.Since(began)
		}
		select {
		case <-p.done:
			return
		case <-time.After(pause):
		}
	}
	p.lookAgain(l)
}

// wantAhead notes that n slots are asked for of which some are whole: as many
// again are likely to be, so the keeper has them ready.
func (l *ledger) wantAhead(n int) {
	l.ahead = min(l.ahead+int64(n), maxAhead)
	if l.warm.n < (l.ahead+1)/2 && l.canPrepare() {
		l.wake()
	}
}

// canPrepare says whether a unit may be prepared.
func (l *ledger) canPrepare() bool {
	return !l.traits.Coarse && !l.noAhead && l.state() == nil && l.spare+unitSlots*slotBlocks <= l.maxSpare()
}

// prepare makes one unit of warm slots and says whether it did.
func (p *Pool) prepare(l *ledger) bool {
	l.punch.Lock()
	defer l.punch.Unlock()
	p.mu.Lock()
	first, ok := l.claimUnit()
	p.mu.Unlock()
	if !ok {
		return false
	}
	err := l.part.Prepare(first*SlotSize, unitSlots*SlotSize)
	p.mu.Lock()
	defer p.mu.Unlock()
	l.claim.end()
	for i := first; i < first+unitSlots; i++ {
		// Some of it may be there after an error, too.
		l.setSpare(i, l.slot(i), AllBlocks)
		if err == nil {
			l.dirty.remove(i)
			l.warm.add(i)
		}
	}
	p.noteFreed()
	// Where it does not work, writers make backing as they go.
	l.noAhead = err != nil
	return err == nil
}

// claimUnit claims clean slots to be prepared, if more are wanted.
func (l *ledger) claimUnit() (first int64, ok bool) {
	if l.warm.n >= l.ahead || !l.canPrepare() {
		return 0, false
	}
	if first, ok = l.clean.findUnit(); !ok {
		first = (l.fresh + unitSlots - 1) / unitSlots * unitSlots
		if first+unitSlots > l.traits.Slots {
			return 0, false
		}
		for ; l.fresh < first; l.fresh++ {
			l.clean.add(l.fresh)
		}
		l.fresh += unitSlots
	}
	l.claim.begin(first)
	for i := first; i < first+unitSlots; i++ {
		l.clean.remove(i)
		l.claim.masks = append(l.claim.masks, AllBlocks)
	}
	return first, true
}
