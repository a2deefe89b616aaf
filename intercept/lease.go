// A connection's use of an export, counted.

package intercept

import (
	"math"
	"sync"
	"sync/atomic"
)

// lease counts the requests that a connection has in its Device, and releases
// the export when it was closed and the last of them has left (invariant 5).
// Its methods may be called from any goroutine.
type lease struct {
	// state is the number of requests in flight; closed is added to it once,
	// which makes it negative for good.
	state   atomic.Int64
	once    sync.Once
	release func()
}

const closed = math.MinInt64 / 2

// enter says that a request goes to the Device; it returns false, and there is
// nothing to leave, if the lease is closed.
func (l *lease) enter() bool {
	if l.state.Add(1) > 0 {
		return true
	}
	l.leave()
	return false
}

// leave says that a request that entered has come back.
func (l *lease) leave() {
	if l.state.Add(-1) == closed {
		l.once.Do(l.release)
	}
}

// close lets no further request in. It may be called more than once and does
// not wait.
func (l *lease) close() {
	for {
		n := l.state.Load()
		if n < 0 {
			return
		}
		if l.state.CompareAndSwap(n, n+closed) {
			if n == 0 {
				l.once.Do(l.release)
			}
			return
		}
	}
}

// idle says that no request is in flight.
func (l *lease) idle() bool {
	n := l.state.Load()
	return n == 0 || n == closed
}

// isClosed says that no further request gets in.
func (l *lease) isClosed() bool { return l.state.Load() < 0 }
