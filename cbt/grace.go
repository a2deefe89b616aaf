// Grace periods: when nodes that no tree links to any more may be used again.

package cbt

import "sync/atomic"

// grace is a period of time. What trees give up while it is the current one
// keeps its counts until every reader that entered in it, or earlier, has
// left: only those can still hold a link to it.
type grace struct {
	// holders counts the readers inside, plus one while the period is the
	// current one, plus one while the period before it has not ended. At 0
	// it has ended and stays at 0.
	holders atomic.Int64

	// Protected by nodes.mu.
	next    *grace // nil while it is the current one
	dropped [][]node
}

// enter returns the current period with the caller counted in it.
func (s *nodes) enter() *grace {
	for {
		g := s.period.Load()
		if h := g.holders.Load(); h > 0 && g.holders.CompareAndSwap(h, h+1) {
			return g
		}
	}
}

// leave ends the caller's stay in g. What g kept goes to the dead once it has
// ended; reap does the rest.
func (s *nodes) leave(g *grace) {
	for g != nil && g.holders.Add(-1) == 0 {
		s.mu.Lock()
		s.dead = append(s.dead, g.dropped...)
		g = g.next
		s.mu.Unlock()
	}
}

// dropLocked gives up one count of each node in list once no reader can hold
// a link to it.
func (s *nodes) dropLocked(list []node) {
	if len(list) > 0 {
		g := s.period.Load()
		g.dropped = append(g.dropped, list)
	}
}

// turn begins a new period if the current one keeps anything.
func (s *nodes) turn() {
	s.mu.Lock()
	old := s.period.Load()
	if len(old.dropped) == 0 {
		s.mu.Unlock()
		return
	}
	next := new(grace)
	next.holders.Store(2)
	old.next = next
	s.period.Store(next)
	s.mu.Unlock()
	s.leave(old)
}
