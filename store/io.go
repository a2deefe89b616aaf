// Reading and writing slots.

package store

import (
	"errors"
	"fmt"
	"syscall"
)

// ReadAt fills b with what was written at byte off of slot s, or returns an
// error. off may exceed SlotSize, and so may off+len(b): the slots that follow
// are neighbours.
func (p *Pool) ReadAt(s Slot, b []byte, off int64) error {
	l := p.byNo[s.Part()].Load()
	if l == nil {
		return fmt.Errorf("read slot %v: there is no such part", s)
	}
	if err := l.do(l.part.ReadAt, b, s.index()*SlotSize+off); err != nil {
		p.noteFailure(l, err)
		return fmt.Errorf("read slot %v of snapstore %v: %w", s, l.traits.Spec, err)
	}
	return nil
}

// WriteAt writes b at byte off of slot s, as ReadAt reads it. Where it returns
// an error for which errors.Is(err, syscall.ENOSPC) holds, the part gave out
// more than its file system could hold: it counts as full until there is room
// in it again, so that who frees the slot and allocates one gets it elsewhere.
func (p *Pool) WriteAt(s Slot, b []byte, off int64) error {
	l := p.byNo[s.Part()].Load()
	if l == nil {
		return fmt.Errorf("write slot %v: there is no such part", s)
	}
	err := l.do(l.part.WriteAt, b, s.index()*SlotSize+off)
	for errors.Is(err, syscall.ENOSPC) && p.trimStep(l, 0) {
		// What waited to be used again may be what is missing here.
		err = l.do(l.part.WriteAt, b, s.index()*SlotSize+off)
	}
	if err == nil {
		return nil
	}
	if errors.Is(err, syscall.ENOSPC) {
		p.noteNoBacking(l, int64(len(b)+BlockSize-1)/BlockSize)
	} else {
		p.noteFailure(l, err)
	}
	return fmt.Errorf("write slot %v of snapstore %v: %w", s, l.traits.Spec, err)
}

// do reads or writes, and keeps count where that may hang.
func (l *ledger) do(op func([]byte, int64) (int, error), b []byte, off int64) error {
	if l.traits.MayHang {
		l.begun.Add(1)
		defer l.ended.Add(1)
	}
	_, err := op(b, off)
	return err
}

// MayHang says whether reading or writing s can hang.
func (p *Pool) MayHang(s Slot) bool {
	l := p.byNo[s.Part()].Load()
	return l != nil && l.traits.MayHang
}

// noteFailure ends the use of a part for anything new.
func (p *Pool) noteFailure(l *ledger, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l.fail(err)
	p.noteSpace()
}

// noteNoBacking counts a part as full for now that could not hold n blocks.
func (p *Pool) noteNoBacking(l *ledger, n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l.noteNoBacking(n)
	p.noteSpace()
}
