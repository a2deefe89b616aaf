// Space: how much there is, and waiting for more.

package store

import "context"

// Space returns how many bytes the pool can hold, how many are in use and how
// many more can be. They count whole blocks, and free includes the reserve.
func (p *Pool) Space() (size, used, free int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	used, free = p.sum((*ledger).inUseBlocks), p.sum((*ledger).room)
	return (used + free) * BlockSize, used * BlockSize, free * BlockSize
}

// Room returns how many more bytes Alloc and Extend can put in use: what is free
// without the reserve, in whole blocks. Which slots can have them is a matter of the
// parts.
func (p *Pool) Room() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return max(0, p.sum((*ledger).room)-p.kept(false)) * BlockSize
}

// RoomBeside says whether a part other than that of s has room for n bytes, one slot
// at most, that Alloc would give.
func (p *Pool) RoomBeside(s Slot, n int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	room := p.sum((*ledger).room) - p.kept(false)
	mask := AllBlocks >> (slotBlocks - min(slotBlocks, (n+BlockSize-1)/BlockSize))
	for _, l := range p.ledgers {
		if l.no != s.Part() && l.cost(mask) <= min(room, l.room()) {
			return true
		}
	}
	return false
}

// Freed counts how often space was freed or added, or may have been. It is for
// Wait.
func (p *Pool) Freed() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.freed
}

// noteFreed lets those go on who wait for space. The caller holds mu.
func (p *Pool) noteFreed() {
	p.noteSpace()
	p.freed++
	if p.wake != nil {
		close(p.wake)
		p.wake = nil
	}
}

// Wait returns nil once Freed is not since any more, or the error of ctx, or
// an error when the pool is closed.
func (p *Pool) Wait(ctx context.Context, since uint64) error {
	for {
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			return errClosed
		}
		if p.freed != since {
			p.mu.Unlock()
			return nil
		}
		if p.wake == nil {
			p.wake = make(chan struct{})
		}
		wake := p.wake
		p.mu.Unlock()
		select {
		case <-wake:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// PartInfo is how a part looks to a user. Sizes are in bytes.
type PartInfo struct {
	No    uint8
	Spec  Spec
	Limit int64
	Used  int64
	Free  int64
	State string // ok, or failed: and why
}

// Parts returns what there is to say of each part, in order of preference.
func (p *Pool) Parts() []PartInfo {
	p.mu.Lock()
	defer p.mu.Unlock()
	var infos []PartInfo
	for _, l := range p.ledgers {
		info := PartInfo{
			No:    l.no,
			Spec:  l.traits.Spec,
			Limit: l.limit * BlockSize,
			Used:  l.used * BlockSize,
			Free:  l.room() * BlockSize,
			State: "ok",
		}
		if err := l.state(); err != nil {
			info.State = "failed: " + err.Error()
		}
		infos = append(infos, info)
	}
	return infos
}
