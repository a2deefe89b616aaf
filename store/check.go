// Checks: what tests and a running program ask to prove the books right.

package store

import (
	"fmt"
	"iter"
)

// InUse yields every slot in use and its blocks, part by part in ascending
// order, quarantined ones excepted. What is given out or freed meanwhile may
// or may not be among them.
func (p *Pool) InUse() iter.Seq2[Slot, uint16] {
	return func(yield func(Slot, uint16) bool) {
		p.mu.Lock()
		ledgers := p.ledgers
		p.mu.Unlock()
		for _, l := range ledgers {
			for at := int64(0); at >= 0; {
				var slots []Slot
				var masks []uint16
				p.mu.Lock()
				slots, masks, at = l.listFrom(at)
				p.mu.Unlock()
				for k, s := range slots {
					if !yield(s, masks[k]) {
						return
					}
				}
			}
		}
	}
}

// listFrom returns up to a page of slots in use, and where to go on, -1 at the
// end.
func (l *ledger) listFrom(at int64) (slots []Slot, masks []uint16, next int64) {
	for range pageSlots {
		i, ok := l.inUse.next(at)
		if !ok {
			return slots, masks, -1
		}
		slots = append(slots, makeSlot(l.no, i))
		masks = append(masks, l.slot(i).used)
		at = i + 1
	}
	return slots, masks, at
}

// Check compares the books of the pool with each other and returns the first
// difference, or the first call that broke a method's contract.
func (p *Pool) Check() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.misuse != nil {
		return fmt.Errorf("snapstore: %w", p.misuse)
	}
	for _, l := range p.ledgers {
		if err := l.check(); err != nil {
			return fmt.Errorf("snapstore %v: %w", l.traits.Spec, err)
		}
	}
	return nil
}

// check goes through all slots that were ever given out.
func (l *ledger) check() error {
	single := make(map[int64]bool)
	for _, stack := range l.single {
		for _, i := range stack {
			single[int64(i)] = true
		}
	}
	var used, spare int64
	for i := range l.fresh {
		st := l.slot(i)
		held := l.inUse.has(i)
		if held || st.stuck {
			used += l.cost(st.used)
		}
		spare += blocks(st.spare)
		if st.used&st.spare != 0 {
			return fmt.Errorf("slot %d: blocks %016b are in use and spare", i, st.used&st.spare)
		}
		places := count(held, st.stuck, l.clean.has(i), l.warm.has(i), single[i])
		if places == 0 && (l.dirty.has(i) || l.claim.has(i, AllBlocks) || i >= l.swept && i < l.traits.Held) {
			places = 1
		}
		if places != 1 {
			return fmt.Errorf("slot %d is in %d places instead of one: in use %v, quarantined %v, clean %v, warm %v, single %v, dirty %v",
				i, places, held, st.stuck, l.clean.has(i), l.warm.has(i), single[i], l.dirty.has(i))
		}
	}
	if used != l.used || spare != l.spare {
		return fmt.Errorf("%d blocks are in use and %d spare, counted as %d and %d", used, spare, l.used, l.spare)
	}
	return nil
}

func count(conditions ...bool) (n int) {
	for _, c := range conditions {
		if c {
			n++
		}
	}
	return n
}
