// The pool: parts in order of preference, and the slots that are given out.

package store

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// ErrFull is returned where a pool has no room.
var ErrFull = fmt.Errorf("snapstore is full: %w", syscall.ENOSPC)

// A Pool gives out slots of its parts. All of its methods may be called from
// many goroutines at once. What a slot holds is the business of whoever got it:
// two of them never get the same.
type Pool struct {
	// byNo finds a part without a lock. An entry is set once, under mu.
	byNo [256]atomic.Pointer[ledger]

	done      chan struct{} // closed by Close
	watched   chan struct{} // closed when watch is over
	watchKick chan struct{} // wakes watch
	closeWait time.Duration // how long Close waits for parts that may hang

	// mu protects what follows and the ledgers. It is never held across
	// I/O, nor while a function of somebody else is called.
	mu      sync.Mutex
	ledgers []*ledger // in order of preference
	size    int64     // blocks that fit in all of them
	reserve int64     // blocks that only AllocReserve may use
	freed   uint64
	wake    chan struct{} // closed when freed changes; nil if nobody waits
	misuse  error         // the first breach of a method's contract
	low     bool          // free space is under the mark
	lowSaid bool          // and that was said
	onLow   func(LowSpace)
	samples []sample // the latest last; never empty
	closed  bool
}

// NewPool makes a pool of parts, which it closes when it is closed. They are
// numbered from 1 on. More than 255 of them are a mistake that panics.
func NewPool(parts ...Part) *Pool {
	p := &Pool{
		done:      make(chan struct{}),
		watched:   make(chan struct{}),
		watchKick: make(chan struct{}, 1),
		closeWait: 10 * time.Second,
		samples:   []sample{{at: time.Now()}},
	}
	go p.watch()
	for _, part := range parts {
		if err := p.Add(part); err != nil {
			panic("store: NewPool: " + err.Error())
		}
	}
	return p
}

// Add adds a part, the least preferred so far, under the lowest number that is
// free. After an error the part still belongs to the caller. What a predecessor
// left in it is in the way until Discard is called.
func (p *Pool) Add(part Part) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for no := 1; no < len(p.byNo); no++ {
		if p.byNo[no].Load() == nil {
			return p.addLocked(uint8(no), part)
		}
	}
	return errors.New("add to the snapstore: it has 255 parts already")
}

// AddAs is Add under a number of the caller's choice, from 1 to 255, that no
// part of the pool has.
func (p *Pool) AddAs(no uint8, part Part) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if no == 0 || p.byNo[no].Load() != nil {
		return fmt.Errorf("add to the snapstore: the number %d is not free", no)
	}
	return p.addLocked(no, part)
}

func (p *Pool) addLocked(no uint8, part Part) error {
	if p.closed {
		return errClosed
	}
	l := newLedger(no, part)
	p.ledgers = append(p.ledgers, l)
	p.byNo[no].Store(l)
	p.size += l.limit
	p.reserve = reserveOf(p.size)
	p.noteFreed()
	p.noteAdded()
	go p.keep(l)
	return nil
}

// reserveOf is how many blocks of a pool of size blocks are kept for
// AllocReserve: 1 %, between 256 KiB and 1 MiB, but no more than a quarter.
func reserveOf(size int64) int64 {
	return min(max(size/100, 4*slotBlocks), 1<<20/BlockSize, size/4)
}

// sum adds up what f says of each part. The caller holds mu.
func (p *Pool) sum(f func(*ledger) int64) (n int64) {
	for _, l := range p.ledgers {
		n += f(l)
	}
	return n
}

// kept is how many blocks are kept from those who may not use the reserve.
func (p *Pool) kept(reserve bool) int64 {
	if reserve {
		return 0
	}
	return p.reserve
}

// Extend counts more blocks of a slot in use; those that count already stay as
// they are. ErrFull says that they must be written to another slot: there is
// no room in this part, or the blocks were shrunk away a moment ago.
func (p *Pool) Extend(s Slot, mask uint16) error { return p.extend(s, mask, false) }

// ExtendReserve is Extend for those who may use the reserve.
func (p *Pool) ExtendReserve(s Slot, mask uint16) error { return p.extend(s, mask, true) }

func (p *Pool) extend(s Slot, mask uint16, reserve bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.inUse(s, "extend")
	if l == nil {
		return fmt.Errorf("extend slot %v: it is not in use", s)
	}
	err := l.extend(s.index(), mask, min(p.sum((*ledger).left)-p.kept(reserve), l.left()))
	p.noteSpace()
	return err
}

// Free takes a slot out of use; mask is its blocks in use. The caller
// guarantees that nobody reads or writes it any more.
func (p *Pool) Free(s Slot, mask uint16) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.inUse(s, "free")
	if l == nil {
		return
	}
	if used := l.slot(s.index()).used; used != mask {
		p.noteMisuse(fmt.Errorf("free of slot %v with blocks %016b in use: they are %016b", s, mask, used))
	}
	l.free(s.index())
	p.noteFreed()
}

// Shrink takes blocks of a slot out of use that goes on being used for others.
func (p *Pool) Shrink(s Slot, mask uint16) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.inUse(s, "shrink")
	if l == nil {
		return
	}
	if used := l.slot(s.index()).used; mask&^used != 0 {
		p.noteMisuse(fmt.Errorf("shrink of slot %v by blocks %016b: those in use are %016b", s, mask, used))
	}
	l.shrink(s.index(), mask)
	p.noteFreed()
}

// Quarantine takes a slot out of use and never gives it out again, because a
// write that hangs may still reach it. Its blocks go on counting. Its part gives
// out nothing until I/O to it ends again.
func (p *Pool) Quarantine(s Slot) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.inUse(s, "quarantine")
	if l == nil {
		return
	}
	l.inUse.remove(s.index())
	l.slot(s.index()).stuck = true
	l.stuck++
	l.noteHang()
	p.noteSpace()
}

// Hangs says that a write to a slot that stays in use was given up: as after
// Quarantine, its part gives out nothing until I/O to it ends again.
func (p *Pool) Hangs(s Slot) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l := p.inUse(s, "note of a hang"); l != nil {
		l.noteHang()
		p.noteSpace()
	}
}

// inUse returns the ledger of a slot that is in use; nil, and a note for Check,
// for any other. The caller holds mu.
func (p *Pool) inUse(s Slot, what string) *ledger {
	l := p.byNo[s.Part()].Load()
	if l == nil || !l.inUse.has(s.index()) {
		p.noteMisuse(fmt.Errorf("%s of slot %v, which is not in use", what, s))
		return nil
	}
	return l
}

// noteMisuse keeps the first breach of a contract for Check. To panic would
// take the origin's service down for a fault of its snapshots.
func (p *Pool) noteMisuse(err error) {
	if p.misuse == nil {
		p.misuse = err
	}
}
