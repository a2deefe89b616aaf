// The gate that lets a snapshot fall between two writes.
//
// Whoever changes a device is inside its gate while it does. The gate counts
// those inside in one of two counters; which one, the phase says. Two things are
// done with that:
//
//   - close shuts the gate and waits until both counters are zero, at most until
//     a deadline: nobody is inside, and who wants to enter waits for open.
//   - turn changes the phase and waits until the other phase's counter is zero:
//     everybody who was inside when turn was called has left, while others came
//     and went. This is how memory that writers or readers may still be looking
//     at is known to be unused.
//
// A counter is raised before the state is looked at again, and the state is
// changed before the counters are looked at, so one of the two sides always sees
// the other. sync.RWMutex can do neither: its Lock cannot give up, and holds up
// newcomers while it waits.

package cow

import (
	"sync"
	"sync/atomic"
	"time"
)

// gateClosed is the bit of gate.state that shuts the gate; the bits above it
// count the phases.
const (
	gateClosed = 1
	gatePhase  = 2
)

// pass is what enter gives and leave takes back: the counter that was raised.
type pass uint32

// gate is open when it is new. It must not be copied.
type gate struct {
	state  atomic.Uint32
	inside [2]struct {
		n atomic.Int64
		_ [56]byte // a cache line each
	}

	// waiting is how many wait in drain for a counter to become zero.
	waiting atomic.Int32

	// turning serializes turns. Held until those inside have left.
	turning sync.Mutex

	// mu protects the channels below. Never held for long.
	mu     sync.Mutex
	opened chan struct{} // closed when the gate opens; nil while it is open
	left   chan struct{} // closed, and replaced, when a counter becomes zero
}

func newGate() *gate {
	return &gate{left: make(chan struct{})}
}

// tryEnter enters if the gate is open.
func (g *gate) tryEnter() (pass, bool) {
	for {
		s := g.state.Load()
		if s&gateClosed != 0 {
			return 0, false
		}
		p := pass(s / gatePhase & 1)
		g.inside[p].n.Add(1)
		if g.state.Load() == s {
			return p, true
		}
		g.leave(p)
	}
}

// enter waits until the gate is open and goes in. It returns false, outside,
// when stop was closed first.
func (g *gate) enter(stop <-chan struct{}) (pass, bool) {
	for {
		if p, ok := g.tryEnter(); ok {
			return p, true
		}
		g.mu.Lock()
		opened := g.opened
		g.mu.Unlock()
		if opened == nil {
			continue // opened meanwhile
		}
		select {
		case <-opened:
		case <-stop:
			return 0, false
		}
	}
}

func (g *gate) leave(p pass) {
	if g.inside[p].n.Add(-1) == 0 && g.waiting.Load() > 0 {
		g.mu.Lock()
		close(g.left)
		g.left = make(chan struct{})
		g.mu.Unlock()
	}
}

// occupied says whether anybody is inside.
func (g *gate) occupied() bool { return g.inside[0].n.Load() != 0 || g.inside[1].n.Load() != 0 }

// shut keeps newcomers out from now on. Each shut is followed by one open; the
// caller sees to it that nobody else shuts the gate in between.
func (g *gate) shut() {
	g.mu.Lock()
	g.opened = make(chan struct{})
	g.mu.Unlock()
	g.state.Or(gateClosed)
}

// open lets everybody in again.
func (g *gate) open() {
	g.state.And(^uint32(gateClosed))
	g.mu.Lock()
	close(g.opened)
	g.opened = nil
	g.mu.Unlock()
}

// empty waits until nobody is inside a shut gate, and gives up at the deadline.
func (g *gate) empty(deadline time.Time) bool {
	timeout := time.NewTimer(time.Until(deadline))
	defer timeout.Stop()
	return g.drain(timeout.C, nil, func() bool { return !g.occupied() })
}

// turn waits until everybody who is inside now has left. It returns false when
// stop was closed first.
func (g *gate) turn(stop <-chan struct{}) bool {
	g.turning.Lock()
	defer g.turning.Unlock()
	next := pass(g.state.Load()/gatePhase&1) ^ 1
	// Left over only where a turn was stopped.
	if !g.drain(nil, stop, func() bool { return g.inside[next].n.Load() == 0 }) {
		return false
	}
	g.state.Add(gatePhase)
	return g.drain(nil, stop, func() bool { return g.inside[next^1].n.Load() == 0 })
}

// drain waits until empty, a time-out or a stop.
func (g *gate) drain(timeout <-chan time.Time, stop <-chan struct{}, empty func() bool) bool {
	g.waiting.Add(1)
	defer g.waiting.Add(-1)
	for {
		g.mu.Lock()
		left := g.left
		g.mu.Unlock()
		if empty() {
			return true
		}
		select {
		case <-left:
		case <-timeout:
			return empty()
		case <-stop:
			return false
		}
	}
}
