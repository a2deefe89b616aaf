// Adopting: slots that a predecessor used are found again.

package store

import (
	"errors"
	"fmt"
)

// ErrAdopted is returned for a slot that was adopted before.
var ErrAdopted = errors.New("it is in use already")

// Adopt puts a slot in use that a predecessor of this pool used, with its
// blocks mask. It fails for a slot that was never given out or is adopted
// already, and after Discard. A part gives out only slots beyond those that it
// held when it was opened until Discard is called.
func (p *Pool) Adopt(s Slot, mask uint16) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.byNo[s.Part()].Load()
	if l == nil {
		return fmt.Errorf("part %d of the snapstore is not there", s.Part())
	}
	if l.traits.Spec.Kind == Mem && l.traits.Held == 0 {
		return fmt.Errorf("part %d of the snapstore was in memory, which ended with the process before", s.Part())
	}
	before := l.used
	if err := l.adopt(s.index(), mask); err != nil {
		return fmt.Errorf("adopt slot %v: %w", s, err)
	}
	// That it is used is nothing new: it is no part of the present rate.
	for i := range p.samples {
		p.samples[i].used += l.used - before
	}
	return nil
}

func (l *ledger) adopt(i int64, mask uint16) error {
	switch {
	case i >= l.traits.Held:
		return fmt.Errorf("its part held only %d slots", l.traits.Held)
	case l.inUse.has(i):
		return ErrAdopted
	case i < l.swept:
		return errors.New("it was discarded")
	}
	l.take(i, mask)
	return nil
}

// Discard gives back the backing of every block that is not in use: what a
// predecessor left and nobody adopted, and what is kept to be used again. A
// start calls it after the last Adopt; without any the parts are empty then.
// It returns when that is done.
func (p *Pool) Discard() error {
	p.mu.Lock()
	ledgers := p.ledgers
	for _, l := range ledgers {
		l.ahead = 0
	}
	p.mu.Unlock()
	var errs []error
	for _, l := range ledgers {
		err := p.sweep(l)
		if err == nil {
			err = p.trim(l, 0)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("empty snapstore %v: %w", l.traits.Spec, err))
		}
	}
	return errors.Join(errs...)
}

// sweep makes the slots that the part held when it was opened and nobody
// adopted available, step by step.
func (p *Pool) sweep(l *ledger) error {
	for more := true; more; {
		var err error
		if more, err = p.sweepStep(l); err != nil {
			return err
		}
	}
	return nil
}

// sweepStep says whether there is more to sweep.
func (p *Pool) sweepStep(l *ledger) (more bool, err error) {
	l.punch.Lock()
	defer l.punch.Unlock()
	p.mu.Lock()
	from := l.swept
	p.mu.Unlock()
	if from == l.traits.Held {
		return false, nil
	}
	data, err := l.part.NextData(from * SlotSize)
	if err != nil {
		return false, err
	}
	p.mu.Lock()
	l.claimHeld(data / SlotSize)
	p.mu.Unlock()
	err = l.claim.extents(l.part.Punch)
	p.mu.Lock()
	defer p.mu.Unlock()
	l.settle(err)
	p.noteFreed()
	return true, err
}

// claimHeld moves swept on. What is not in use is claimed: a few slots where there
// may be data, many at once before data, where there is at most backing that was
// prepared and never written. Where slots keep their backing anyway they can be used
// at once.
func (l *ledger) claimHeld(data int64) {
	end := min(l.traits.Held, l.swept+pageSlots)
	l.claim.end()
	switch {
	case l.traits.Coarse:
		for ; l.swept < end; l.swept++ {
			if !l.inUse.has(l.swept) {
				l.setSpare(l.swept, l.slot(l.swept), AllBlocks)
				l.dirty.remove(l.swept)
				l.warm.add(l.swept)
			}
		}
	case l.swept < data:
		l.claimNext(min(end, data))
	default:
		l.claimNext(min(end, l.swept+maxClaim))
	}
}

// claimNext claims what is not in use of the slots from swept to end.
func (l *ledger) claimNext(end int64) {
	l.claim.begin(l.swept)
	for ; l.swept < end; l.swept++ {
		l.claim.masks = append(l.claim.masks, ^l.slot(l.swept).used)
	}
}
