// How much memory the requests of all connections may hold.
//
// The budget is in two parts. Each connection has a floor that is its own:
// nobody can take it, so that each can always go on, whatever the others hold
// and however long. The rest is shared, and a connection may take of it at
// most as much as it leaves free: one that stops reading its replies, or whose
// origin hangs, holds half of it, the next such a quarter, and so on, while
// those that work divide it evenly. (The rule is known from the buffers of
// network switches as dynamic thresholds.)
//
// A request is split into pieces that fit into the floor where no more can be
// had; what cannot be split is streamed (job.stream) or refused.

package intercept

import (
	"slices"
	"sync"
)

// floorSize is what each connection may always hold, in bytes.
const floorSize = 128 << 10

// budget is what the connections of a server share.
type budget struct {
	// mu protects the fields below and those of the accounts. Never held
	// across I/O.
	mu      sync.Mutex
	free    int64      // bytes of the shared part that nobody holds
	waiting []*account // whose readers wait, the longest first
}

// newBudget divides total bytes among at most conns connections.
func newBudget(total int64, conns int) *budget {
	return &budget{free: max(0, total-int64(conns)*floorSize)}
}

// account is what one connection holds. take and takeWhole are for one
// goroutine at a time, the connection's reader; give may be called from any.
type account struct {
	budget *budget
	held   int64         // bytes
	stuck  func()        // called before the reader waits
	wake   chan struct{} // one token for each time that it leaves budget.waiting
}

func (b *budget) open(stuck func()) *account {
	return &account{budget: b, stuck: stuck, wake: make(chan struct{}, 1)}
}

// take waits until the connection may hold more and returns how much of want
// it got, in bytes of buffers: want itself, or what fits into the floor.
func (a *account) take(want int64) int64 {
	_, want = sizeClass(want)
	for {
		a.budget.mu.Lock()
		for _, n := range [...]int64{want, min(want, floorSize)} {
			if a.takeLocked(n) {
				a.budget.mu.Unlock()
				return n
			}
		}
		a.waitLocked()
	}
}

// takeWhole is take for what cannot be split. It returns false where the
// connection holds nothing that it could wait for and still may not have n
// bytes.
func (a *account) takeWhole(n int64) bool {
	_, n = sizeClass(n)
	for {
		a.budget.mu.Lock()
		if a.takeLocked(n) {
			a.budget.mu.Unlock()
			return true
		}
		if a.held == 0 {
			a.budget.mu.Unlock()
			return false
		}
		a.waitLocked()
	}
}

// takeLocked takes n bytes if the rule allows it.
func (a *account) takeLocked(n int64) bool {
	over := max(0, a.held+n-floorSize) // of the shared part, afterwards
	more := over - max(0, a.held-floorSize)
	if more > 0 && over > a.budget.free-more {
		return false
	}
	a.held += n
	a.budget.free -= more
	return true
}

// waitLocked waits until something was given back, and unlocks. The caller
// then looks again: whoever holds something is woken at the latest when it
// gives that back, and who holds nothing need not wait for its floor.
func (a *account) waitLocked() {
	a.budget.waiting = append(a.budget.waiting, a)
	a.budget.mu.Unlock()
	a.stuck()
	<-a.wake
}

// give returns n bytes and wakes the connection's own reader, if it waits, and
// the reader that waits longest.
func (a *account) give(n int64) {
	b := a.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free += max(0, a.held-floorSize) - max(0, a.held-n-floorSize)
	a.held -= n
	first := true
	b.waiting = slices.DeleteFunc(b.waiting, func(w *account) bool {
		woken := first || w == a
		first = false
		if woken {
			w.wake <- struct{}{}
		}
		return woken
	})
}
