package intercept

import (
	"math/rand/v2"
	"sync"
	"testing"
)

func nothing() {}

// TestBudgetRule takes as much as one connection after another gets: half of
// what is left, and the floor at least.
func TestBudgetRule(t *testing.T) {
	const unit = 64 << 10
	b := newBudget(32<<20+100*floorSize, 100)
	free := int64(32 << 20)
	for i := range 100 {
		a := b.open(nothing)
		for a.takeNow(unit) {
		}
		want := floorSize + max(0, free/2/unit*unit)
		if a.held != want {
			t.Fatalf("connection %d could take\n got %d\nwant %d", i, a.held, want)
		}
		free -= want - floorSize
		if b.free != free {
			t.Fatalf("free after connection %d\n got %d\nwant %d", i, b.free, free)
		}
	}
}

// takeNow is take without waiting.
func (a *account) takeNow(n int64) bool {
	a.budget.mu.Lock()
	defer a.budget.mu.Unlock()
	return a.takeLocked(n)
}

// TestTakeFallsBack wants more than there is and gets a floor's worth; what
// cannot be split is refused, but only where waiting would not help.
func TestTakeFallsBack(t *testing.T) {
	b := newBudget(0, 1)
	a := b.open(nothing)
	if a.takeWhole(1 << 20) {
		t.Error("takeWhole of more than the floor succeeded without a shared part")
	}
	if got := a.take(1 << 20); got != floorSize {
		t.Errorf("take of 1 MiB\n got %d\nwant %d", got, floorSize)
	}
	a.give(floorSize)
	if got := a.take(5000); got != 8192 {
		t.Errorf("take of 5000 bytes\n got %d\nwant a buffer's 8192", got)
	}
	a.give(8192)
	if b.free != 0 || a.held != 0 {
		t.Errorf("at the end: free %d, held %d, want 0, 0", b.free, a.held)
	}
}

// TestTakeWaits has a connection at its limit wait: it says so first, and goes
// on when it gives something back, or when another one does.
func TestTakeWaits(t *testing.T) {
	b := newBudget(2*floorSize+4<<20, 2)
	other := b.open(nothing)
	stuck := make(chan struct{}, 10)
	a := b.open(func() { stuck <- struct{}{} })
	for other.takeNow(1 << 20) {
	}
	for a.takeNow(floorSize) {
	}
	got := make(chan int64)
	for name, free := range map[string]func(){
		"its own":      func() { a.give(floorSize) },
		"the other's ": func() { other.give(other.held) },
	} {
		go func() { got <- a.take(floorSize) }()
		<-stuck
		select {
		case n := <-got:
			t.Fatalf("take returned %d before anything was given back", n)
		default:
		}
		free()
		if n := <-got; n != floorSize {
			t.Errorf("after %s\n got %d\nwant %d", name, n, floorSize)
		}
		for a.takeNow(floorSize) {
		}
	}
}

// TestTakeWaitsForItself has a connection wait behind one that will never give
// anything back: what it gives back itself is enough for it.
func TestTakeWaitsForItself(t *testing.T) {
	b := newBudget(2*floorSize, 2)
	stuck, got := make(chan struct{}, 10), make(chan int64)
	for range 2 {
		a := b.open(func() { stuck <- struct{}{} })
		a.takeNow(floorSize)
		go func() { got <- a.take(floorSize) }()
		<-stuck
		defer func() {
			a.give(floorSize)
			if n := <-got; n != floorSize {
				t.Errorf("take\n got %d\nwant %d", n, floorSize)
			}
		}()
	}
}

// TestBudgetNeverStops has many connections take, hold and give back at random,
// with far less memory than they want: all of them come to their end, never
// more than the budget is held, and nothing is lost.
func TestBudgetNeverStops(t *testing.T) {
	const conns = 20
	const total = conns*floorSize + 3<<20
	b := newBudget(total, conns)
	rng := random(t)
	var wg sync.WaitGroup
	for range conns {
		a := b.open(nothing)
		rng := rand.New(rand.NewPCG(rng.Uint64(), 1))
		held := make(chan int64, 20)
		wg.Go(func() { // the reader
			defer close(held)
			for range 2000 {
				n := 1 + rng.Int64N(1<<20)
				if rng.IntN(4) > 0 {
					held <- a.take(n)
				} else if a.takeWhole(n) {
					_, n = sizeClass(n)
					held <- n
				}
			}
		})
		wg.Go(func() { // its workers
			for n := range held {
				a.give(n)
			}
		})
	}
	wg.Wait()
	if b.free != 3<<20 || len(b.waiting) != 0 {
		t.Errorf("at the end: free %d, %d waiting, want %d, 0", b.free, len(b.waiting), 3<<20)
	}
}
