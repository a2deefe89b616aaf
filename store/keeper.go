// The keeper: a goroutine for each part that gives back what is spare.

package store

import "time"

// keep runs until the pool is closed. Errors of the part are noted where they
// are found.
func (p *Pool) keep(l *ledger) {
	tick := time.NewTicker(idleAfter)
	defer tick.Stop()
	seen := uint64(0)
	for {
		idle := false
		select {
		case <-p.done:
			return
		case <-l.kick:
		case <-tick.C:
			p.mu.Lock()
			idle, seen = l.allocs == seen, l.allocs
			p.mu.Unlock()
			p.survey(l)
		}
		p.mu.Lock()
		target := l.maxSpare()
		p.mu.Unlock()
		if idle {
			target = 0
		}
		_ = p.trim(l, target)
	}
}

// survey asks the part how much backing it can still have.
func (p *Pool) survey(l *ledger) {
	avail, err := l.part.Avail()
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		l.fail(err)
		return
	}
	before := l.room()
	l.ceiling = l.used + l.spare + min(avail/BlockSize, l.limit)
	if l.room() > before {
		p.noteFreed()
	}
}
