// Punching: how spare blocks lose their backing.

package store

import "time"

// A claim is what is being punched at the moment: for a run of slots, the
// blocks that nobody may begin to use before it is over. The pool's mu
// protects it.
type claim struct {
	first int64
	masks []uint16 // AllBlocks for a free slot
	late  bool     // somebody waited for it in vain
}

// begin starts a claim at slot first.
func (c *claim) begin(first int64) {
	c.first, c.masks, c.late = first, c.masks[:0], false
}

// end gives up what was claimed.
func (c *claim) end() { c.begin(0) }

// maxClaim bounds how many slots are held back at a time, and with it for how
// long a writer may find the file locked: about 0.2 ms for 4 MiB.
const maxClaim = 64

// has says whether one of the blocks of slot i is being punched.
func (c *claim) has(i int64, mask uint16) bool {
	k := i - c.first
	return k >= 0 && k < int64(len(c.masks)) && c.masks[k]&mask != 0
}

// extents calls fn for each run of claimed blocks, in bytes of the part, until
// fn fails.
func (c *claim) extents(fn func(off, n int64) error) error {
	start, end := int64(0), int64(0)
	for b := range int64(len(c.masks)) * slotBlocks {
		if c.masks[b/slotBlocks]>>(b%slotBlocks)&1 == 0 {
			continue
		}
		off := c.first*SlotSize + b*BlockSize
		if off != end && start != end {
			if err := fn(start, end-start); err != nil {
				return err
			}
		}
		if off != end || start == end {
			start = off
		}
		end = off + BlockSize
	}
	if start == end {
		return nil
	}
	return fn(start, end-start)
}

// trim punches until no more than target blocks are spare.
func (p *Pool) trim(l *ledger, target int64) error {
	for p.trimStep(l, target) {
	}
	p.lookAgain(l)
	p.mu.Lock()
	defer p.mu.Unlock()
	return l.state()
}

// trimStep punches a run of slots if more than target blocks are spare, and
// says whether it did.
func (p *Pool) trimStep(l *ledger, target int64) bool {
	l.punch.Lock()
	defer l.punch.Unlock()
	p.mu.Lock()
	more := l.claimSpare(target)
	p.mu.Unlock()
	if !more {
		return false
	}
	err := l.claim.extents(l.part.Punch)
	p.mu.Lock()
	defer p.mu.Unlock()
	l.settle(err)
	p.noteFreed()
	return err == nil
}

// claimSpare claims the next run of dirty slots if more than target blocks are
// spare.
func (l *ledger) claimSpare(target int64) bool {
	if l.spare <= target || l.state() != nil {
		return false
	}
	// Who asks for slots meanwhile must find some, also where there are just
	// as many as have room.
	most := int(min(maxClaim, (l.warm.n+l.clean.n+l.traits.Slots-l.fresh+3)/4))
	if l.dirty.n == 0 {
		l.cool(most)
	}
	first, _ := l.dirty.next(0)
	n := l.dirty.run(first, max(most, 1))
	l.claim.begin(first)
	for i := first; i < first+int64(n); i++ {
		mask := AllBlocks
		if l.inUse.has(i) {
			mask = l.slot(i).spare
		}
		l.claim.masks = append(l.claim.masks, mask)
		l.dirty.remove(i)
	}
	return n > 0
}

// cool makes some of the slots dirty that waited to be used again.
func (l *ledger) cool(most int) {
	if i, n := l.warm.findRun(most); n > 0 {
		for k := i; k < i+int64(n); k++ {
			l.warm.remove(k)
			l.dirty.add(k)
		}
		return
	}
	for k, stack := range l.single {
		for _, i := range stack {
			l.dirty.add(int64(i))
		}
		l.single[k] = nil
	}
}

// settle ends the claim: what was punched has no backing any more.
func (l *ledger) settle(err error) {
	for k, mask := range l.claim.masks {
		i := l.claim.first + int64(k)
		st := l.slot(i)
		if err != nil {
			l.dirty.add(i)
			continue
		}
		l.spare -= blocks(st.spare & mask)
		if st.spare &^= mask; st.spare == 0 {
			l.dirty.remove(i)
			if !l.inUse.has(i) && !st.stuck {
				l.clean.add(i)
			}
		}
	}
	l.claim.end()
	l.backing.punched = time.Now()
	if err != nil {
		l.fail(err)
	}
}
