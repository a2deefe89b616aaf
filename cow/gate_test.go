package cow

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func mustEnter(t *testing.T, g *gate) pass {
	t.Helper()
	p, ok := g.tryEnter()
	if !ok {
		t.Fatal("an open gate let nobody in")
	}
	return p
}

// beginWait is begin for what says whether it has waited to the end.
func beginWait(f func() bool) chan error {
	return begin(func() error {
		if !f() {
			return ErrStopping
		}
		return nil
	})
}

// inBubble runs a test in which time is not real and passes only when everybody
// waits, so that order needs no sleeps.
func inBubble(f func(t *testing.T)) func(t *testing.T) {
	return func(t *testing.T) { synctest.Test(t, f) }
}

// waitsOn checks that what c reports goes on waiting when everybody in the bubble
// has come as far as they can.
func waitsOn(t *testing.T, c chan error, what string) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-c:
		t.Errorf("%s ended too early, with %v", what, err)
		c <- err
	default:
	}
}

// ends checks that what c reports ends, without an error, before time passes.
func ends(t *testing.T, c chan error, what string) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-c:
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	default:
		t.Fatalf("%s goes on waiting", what)
	}
}

func TestGateShut(t *testing.T) {
	for _, tc := range []struct {
		name  string
		turns int // before; they decide which counter is used
	}{{"first counter", 0}, {"second counter", 1}} {
		t.Run(tc.name, inBubble(func(t *testing.T) {
			g := newGate()
			for range tc.turns {
				g.turn(nil)
			}
			inside := mustEnter(t, g)
			g.shut()
			if _, ok := g.tryEnter(); ok {
				t.Error("a shut gate let somebody in")
			}
			entered := beginWait(func() bool {
				_, ok := g.enter(nil)
				return ok
			})
			emptied := beginWait(func() bool { return g.empty(time.Now().Add(time.Minute)) })
			waitsOn(t, emptied, "waiting for who is inside")
			waitsOn(t, entered, "entering a shut gate")
			g.leave(inside)
			ends(t, emptied, "waiting for nobody")
			waitsOn(t, entered, "entering a shut gate that is empty")
			g.open()
			ends(t, entered, "entering a gate that was opened")
			mustEnter(t, g)
		}))
	}
}

func TestGateGivesUpAtDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		inside := mustEnter(t, g)
		g.shut()
		if g.empty(time.Now().Add(-time.Second)) {
			t.Error("a gate with somebody inside is empty, says one whose time is up")
		}
		start := time.Now()
		if g.empty(start.Add(2 * time.Second)) {
			t.Error("a gate with somebody inside is empty")
		}
		if got := time.Since(start); got != 2*time.Second {
			t.Errorf("gave up after %v, want 2s", got)
		}
		g.open()
		g.leave(mustEnter(t, g)) // goes on as before
		g.shut()
		g.leave(inside)
		if !g.empty(time.Now().Add(-time.Second)) {
			t.Error("an empty gate is not, says one whose time is up")
		}
	})
}

func TestGateStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		g.shut()
		stop := make(chan struct{})
		entered := beginWait(func() bool {
			_, ok := g.enter(stop)
			return ok
		})
		waitsOn(t, entered, "entering a shut gate")
		close(stop)
		if err := <-entered; err != ErrStopping {
			t.Errorf("enter after the stop: got %v, want ErrStopping", err)
		}
		if !g.empty(time.Now()) {
			t.Error("who gave up is inside")
		}
	})
}

func TestGateTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		before := mustEnter(t, g)
		turned := beginWait(func() bool { return g.turn(nil) })
		waitsOn(t, turned, "a turn with somebody inside")
		after := mustEnter(t, g) // newcomers are not held up, and not waited for
		g.leave(mustEnter(t, g))
		waitsOn(t, turned, "a turn after a newcomer left")
		g.leave(before)
		ends(t, turned, "a turn with only a newcomer inside")
		// The next turn waits for who came during the one before.
		turned = beginWait(func() bool { return g.turn(nil) })
		waitsOn(t, turned, "the next turn")
		g.leave(after)
		ends(t, turned, "the next turn with nobody inside")
		for range 3 {
			if !g.turn(nil) {
				t.Error("a turn of an empty gate stopped")
			}
		}
	})
}

func TestGateTurnWhileShut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		inside := mustEnter(t, g)
		g.shut()
		turned := beginWait(func() bool { return g.turn(nil) })
		emptied := beginWait(func() bool { return g.empty(time.Now().Add(time.Minute)) })
		waitsOn(t, turned, "a turn with somebody inside")
		waitsOn(t, emptied, "waiting for who is inside")
		if _, ok := g.tryEnter(); ok {
			t.Error("a turn opened a shut gate")
		}
		g.leave(inside)
		ends(t, turned, "a turn with nobody inside")
		ends(t, emptied, "waiting for nobody")
		g.open()
		mustEnter(t, g)
	})
}

// TestGateStoppedTurn checks that a turn that was given up makes no later one end
// too early, whoever leaves first.
func TestGateStoppedTurn(t *testing.T) {
	for _, tc := range []struct {
		name  string
		order [2]int // 0: who came before the stopped turn; 1: who came after it
	}{
		{"the older one leaves first", [2]int{0, 1}},
		{"the newer one leaves first", [2]int{1, 0}},
	} {
		t.Run(tc.name, inBubble(func(t *testing.T) {
			g := newGate()
			before := mustEnter(t, g)
			stop := make(chan struct{})
			stopped := beginWait(func() bool { return g.turn(stop) })
			waitsOn(t, stopped, "a turn with somebody inside")
			close(stop)
			if err := <-stopped; err == nil {
				t.Error("a stopped turn ended as if nobody were inside")
			}
			passes := [2]pass{before, mustEnter(t, g)}
			turned := beginWait(func() bool { return g.turn(nil) })
			waitsOn(t, turned, "a turn after one that was stopped")
			g.leave(passes[tc.order[0]])
			waitsOn(t, turned, "a turn with one still inside")
			g.leave(passes[tc.order[1]])
			ends(t, turned, "a turn with nobody inside")
		}))
	}
}

// TestGateWakesUp has the last one leave after the counter was looked at and before
// the wait begins.
func TestGateWakesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		inside := mustEnter(t, g)
		looks := 0
		drained := beginWait(func() bool {
			return g.drain(nil, nil, func() bool {
				if looks++; looks == 1 {
					g.leave(inside)
				}
				return looks > 1 // the first look was a moment before
			})
		})
		ends(t, drained, "waiting for one who left just before the wait")
	})
}

// TestGateStress has many enter and leave while the gate is shut and turned. What
// is changed while the gate is empty, and what is spoilt after a turn, is not
// synchronized by anything else, so that the race detector sees a gate that leaks.
func TestGateStress(t *testing.T) {
	type box struct{ spoilt bool }
	var (
		g      = newGate()
		state  int // changed only while the gate is empty
		shared atomic.Pointer[box]
		over   atomic.Bool
		users  sync.WaitGroup
		others sync.WaitGroup
	)
	shared.Store(new(box))
	rng := newRand(t)
	for range 6 {
		r := rand.New(rand.NewPCG(rng.Uint64(), 0))
		users.Go(func() {
			for !over.Load() {
				p, ok := g.tryEnter()
				if !ok {
					p, _ = g.enter(nil)
				}
				was, b := state, shared.Load()
				for range r.IntN(40) {
					if b.spoilt {
						t.Error("spoilt while somebody was inside")
						over.Store(true)
						break
					}
				}
				if state != was {
					t.Errorf("state changed from %d to %d while somebody was inside", was, state)
					over.Store(true)
				}
				g.leave(p)
			}
		})
	}
	const times = 3000
	others.Go(func() {
		for n := 0; n < times && !over.Load(); n++ {
			g.shut()
			if n%8 == 0 { // some give up at once
				g.empty(time.Now())
			} else if g.empty(time.Now().Add(time.Minute)) {
				state++
			} else {
				t.Error("the gate did not become empty")
			}
			g.open()
		}
	})
	others.Go(func() {
		for n := 0; n < times && !over.Load(); n++ {
			old := shared.Swap(new(box))
			if !g.turn(nil) {
				t.Error("a turn stopped")
			}
			old.spoilt = true
		}
	})
	others.Wait()
	over.Store(true)
	users.Wait()
	if p, ok := g.tryEnter(); !ok {
		t.Error("the gate stayed shut")
	} else {
		g.leave(p)
	}
	g.shut()
	if !g.empty(time.Now()) {
		t.Error("somebody stayed inside")
	}
}

// TestGateLooksTwice tries to shut the gate between the two looks of those who
// enter: who is not counted yet when the gate is found empty must stay outside.
// Nothing can hold that moment open, so a gate that looks once may pass.
func TestGateLooksTwice(t *testing.T) {
	g := newGate()
	var inside atomic.Int32
	var entries atomic.Int64
	var over atomic.Bool
	var users sync.WaitGroup
	for range 2 {
		users.Go(func() {
			for !over.Load() {
				if p, ok := g.tryEnter(); ok {
					entries.Add(1)
					inside.Add(1)
					inside.Add(-1)
					g.leave(p)
				}
			}
		})
	}
	for late := time.Now().Add(time.Second); entries.Load() < 1_000_000 && time.Now().Before(late); {
		g.state.Or(gateClosed)
		if g.inside[0].n.Load() == 0 && g.inside[1].n.Load() == 0 {
			for range 20 {
				if inside.Load() != 0 {
					over.Store(true)
				}
			}
		}
		g.state.And(^uint32(gateClosed))
		if over.Load() {
			t.Error("somebody went into a gate that was shut and empty")
			break
		}
	}
	over.Store(true)
	users.Wait()
}

func TestGateAllocatesNothing(t *testing.T) {
	g := newGate()
	if n := testing.AllocsPerRun(100, func() {
		p, _ := g.enter(nil)
		g.leave(p)
	}); n != 0 {
		t.Errorf("entering and leaving: got %v allocations, want 0", n)
	}
}
