package cow

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
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

// entering returns where it is told that somebody has entered.
func entering(g *gate, stop <-chan struct{}) (in chan pass, out chan error) {
	in, out = make(chan pass, 1), make(chan error, 1)
	go func() {
		p, ok := g.enter(stop)
		if !ok {
			out <- ErrStopping
			return
		}
		in <- p
		out <- nil
	}()
	return in, out
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

// awaitChange returns when v is not was any more.
func awaitChange(t *testing.T, v *atomic.Uint32, was uint32) {
	t.Helper()
	for late := time.Now().Add(10 * time.Second); v.Load() == was; {
		if time.Now().After(late) {
			t.Fatalf("after 10 s: still %d", was)
		}
		time.Sleep(100 * time.Microsecond)
	}
}

func TestGateShut(t *testing.T) {
	for _, tc := range []struct {
		name  string
		turns int // before; they decide which counter is used
	}{{"first counter", 0}, {"second counter", 1}} {
		t.Run(tc.name, func(t *testing.T) { testGateShut(t, tc.turns) })
	}
}

func testGateShut(t *testing.T, turns int) {
	g := newGate()
	for range turns {
		g.turn(nil)
	}
	inside := mustEnter(t, g)
	g.shut()
	if _, ok := g.tryEnter(); ok {
		t.Error("a shut gate let somebody in")
	}
	_, waits := entering(g, nil)
	emptied := beginWait(func() bool { return g.empty(time.Now().Add(time.Minute)) })
	stillWaits(t, emptied, "waiting for who is inside")
	stillWaits(t, waits, "entering a shut gate")
	g.leave(inside)
	if err := <-emptied; err != nil {
		t.Error("the gate did not become empty")
	}
	stillWaits(t, waits, "entering a shut gate that is empty")
	g.open()
	if err := <-waits; err != nil {
		t.Errorf("enter after the gate opened: %v", err)
	}
	mustEnter(t, g)
}

func TestGateGivesUpAtDeadline(t *testing.T) {
	g := newGate()
	inside := mustEnter(t, g)
	g.shut()
	if g.empty(time.Now().Add(-time.Second)) {
		t.Error("a gate with somebody inside is empty, says one whose time is up")
	}
	start := time.Now()
	if g.empty(start.Add(20 * time.Millisecond)) {
		t.Error("a gate with somebody inside is empty")
	}
	if d := time.Since(start); d < 20*time.Millisecond || d > 5*time.Second {
		t.Errorf("gave up after %v, want 20ms", d)
	}
	g.open()
	g.leave(mustEnter(t, g)) // goes on as before
	g.shut()
	g.leave(inside)
	if !g.empty(time.Now().Add(-time.Second)) {
		t.Error("an empty gate is not, says one whose time is up")
	}
	g.open()
}

func TestGateStops(t *testing.T) {
	g := newGate()
	g.shut()
	stop := make(chan struct{})
	_, waits := entering(g, stop)
	stillWaits(t, waits, "entering a shut gate")
	close(stop)
	if err := <-waits; err != ErrStopping {
		t.Errorf("enter after the stop: got %v, want ErrStopping", err)
	}
	if !g.empty(time.Now()) {
		t.Error("who gave up is inside")
	}
	g.open()
}

func TestGateTurn(t *testing.T) {
	g := newGate()
	before := mustEnter(t, g)
	phase := g.state.Load()
	turned := beginWait(func() bool { return g.turn(nil) })
	awaitChange(t, &g.state, phase)
	stillWaits(t, turned, "a turn with somebody inside")
	after := mustEnter(t, g) // newcomers are not held up, and not waited for
	g.leave(mustEnter(t, g))
	stillWaits(t, turned, "a turn after newcomers left")
	g.leave(before)
	if err := <-turned; err != nil {
		t.Error("the turn stopped")
	}
	// The next turn waits for who came during the one before.
	turned = beginWait(func() bool { return g.turn(nil) })
	stillWaits(t, turned, "the next turn")
	g.leave(after)
	if err := <-turned; err != nil {
		t.Error("the turn stopped")
	}
	for range 3 { // nobody is inside
		if !g.turn(nil) {
			t.Error("a turn of an empty gate stopped")
		}
	}
}

func TestGateTurnWhileShut(t *testing.T) {
	g := newGate()
	inside := mustEnter(t, g)
	g.shut()
	turned := beginWait(func() bool { return g.turn(nil) })
	emptied := beginWait(func() bool { return g.empty(time.Now().Add(time.Minute)) })
	stillWaits(t, turned, "a turn with somebody inside")
	if _, ok := g.tryEnter(); ok {
		t.Error("a turn opened a shut gate")
	}
	g.leave(inside)
	if err1, err2 := <-turned, <-emptied; err1 != nil || err2 != nil {
		t.Errorf("after the last one left: got %v, %v", err1, err2)
	}
	g.open()
	mustEnter(t, g)
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
		t.Run(tc.name, func(t *testing.T) {
			g := newGate()
			before := mustEnter(t, g)
			stop := make(chan struct{})
			phase := g.state.Load()
			stopped := beginWait(func() bool { return g.turn(stop) })
			awaitChange(t, &g.state, phase)
			close(stop)
			if err := <-stopped; err == nil {
				t.Error("a stopped turn ended as if nobody were inside")
			}
			passes := [2]pass{before, mustEnter(t, g)}
			turned := beginWait(func() bool { return g.turn(nil) })
			stillWaits(t, turned, "a turn after one that was stopped")
			g.leave(passes[tc.order[0]])
			stillWaits(t, turned, "a turn with one still inside")
			g.leave(passes[tc.order[1]])
			if err := <-turned; err != nil {
				t.Error("the turn stopped")
			}
		})
	}
}

func TestGateTurnsOneAfterTheOther(t *testing.T) {
	g := newGate()
	inside := mustEnter(t, g)
	first := beginWait(func() bool { return g.turn(nil) })
	second := beginWait(func() bool { return g.turn(nil) })
	stillWaits(t, first, "a turn with somebody inside")
	stillWaits(t, second, "another turn with somebody inside")
	g.leave(inside)
	if err1, err2 := <-first, <-second; err1 != nil || err2 != nil {
		t.Errorf("turns after the last one left: got %v, %v", err1, err2)
	}
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

// TestGateWakesUp has the last one leave after the counter was looked at and before
// the wait begins.
func TestGateWakesUp(t *testing.T) {
	g := newGate()
	inside := mustEnter(t, g)
	stop := make(chan struct{})
	late := time.AfterFunc(5*time.Second, func() { close(stop) })
	defer late.Stop()
	looks := 0
	if !g.drain(nil, stop, func() bool {
		if looks++; looks == 1 {
			g.leave(inside)
		}
		return looks > 1 // the first look was a moment before
	}) {
		t.Error("who left just before the wait was missed")
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
