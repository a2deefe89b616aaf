// The workers of a connection.

package intercept

import (
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxWorkers = 16  // requests of a connection in its Device at once, where none hangs
	maxQueue   = 128 // requests that wait for a worker

	// maxSpares is how many workers a connection has beyond these at most, when
	// they do not come back: as many as requests of Linux's client can hang,
	// 128, and one that does not.
	maxSpares = 128 + 1 - maxWorkers

	// totalSpares is how many of them all connections have. A worker that hangs
	// in a system call keeps a thread, of which Go allows 10,000.
	totalSpares = 1024

	// lateAfter is how long a job may wait for a worker before there are more,
	// give or take as much again.
	lateAfter = 100 * time.Millisecond
)

// pool runs jobs on goroutines of its own. They are started when they are
// needed and stay, because to wake one allocates nothing. Each connection has
// a pool, so that requests that hang hold up their own connection at most; and
// spare workers, so that they do not hold up that one either: writes may wait
// for space in the snapstore while reads need none.
type pool struct {
	spares *atomic.Int64 // that the pools of all connections may still start

	// mu protects the fields below. Never held across I/O.
	mu      sync.Mutex
	work    sync.Cond      // a job was queued, or closed became true
	taken   sync.Cond      // a job was taken from the queue, or a worker has ended
	queue   [maxQueue]*job // a ring
	first   int            // jobs that were taken; the next is queue[first%maxQueue]
	n       int            // jobs that wait
	workers int            // spares included
	idle    int            // workers that wait for work
	closed  bool

	// clock calls look, again and again while watched is true. due is what
	// first should be by then.
	clock   *time.Timer // nil until a job had to wait
	watched bool
	due     int
}

// newPool returns a pool without workers. spares is shared with other pools.
func newPool(spares *atomic.Int64) *pool {
	p := &pool{spares: spares}
	p.work.L, p.taken.L = &p.mu, &p.mu
	return p
}

// do hands j to a worker, now or when one is free. It returns false, and has
// not taken j, where too many wait already.
func (p *pool) do(j *job) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.n == maxQueue {
		return false
	}
	p.queue[(p.first+p.n)%maxQueue] = j
	p.n++
	switch {
	case p.n <= p.idle:
		p.work.Signal()
	case p.workers < maxWorkers:
		p.startLocked()
	default:
		p.watchLocked()
	}
	return true
}

func (p *pool) startLocked() {
	p.workers++
	go p.run()
}

// doNow hands j to a worker of its own, beyond all bounds: others may wait for what it
// holds. It does not wait.
func (p *pool) doNow(j *job) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.workers >= maxWorkers {
		p.spares.Add(-1)
	}
	p.workers++
	go func() {
		j.run()
		p.run()
	}()
}

// doWait is do, but waits where too many wait already.
func (p *pool) doWait(j *job) {
	for !p.do(j) {
		p.mu.Lock()
		for p.n == maxQueue {
			p.taken.Wait()
		}
		p.mu.Unlock()
	}
}

// watchLocked has look called when the jobs that wait now should have been
// taken.
func (p *pool) watchLocked() {
	if p.watched {
		return
	}
	p.watched, p.due = true, p.first+p.n
	if p.clock == nil {
		p.clock = time.AfterFunc(lateAfter, p.look)
	} else {
		p.clock.Reset(lateAfter)
	}
}

// look starts spare workers for the jobs that are late.
func (p *pool) look() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for late := p.due - p.first; late > 0 && p.workers < maxWorkers+maxSpares && p.spare(); late-- {
		p.startLocked()
	}
	if p.watched = false; p.n > 0 {
		p.watchLocked()
	}
}

// spare says whether one more worker may be started beyond maxWorkers, and
// counts it.
func (p *pool) spare() bool {
	if p.spares.Add(-1) >= 0 {
		return true
	}
	p.spares.Add(1)
	return false
}

// run is a worker.
func (p *pool) run() {
	for j := p.next(); j != nil; j = p.next() {
		j.run()
	}
}

// next waits for a job. It returns nil, and the worker has to end, when nothing
// is left and the pool is closed, or as many workers wait as it has of its own:
// spares stay as long as others hang.
func (p *pool) next() *job {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.n == 0 && !p.closed && p.idle < maxWorkers {
		p.idle++
		p.work.Wait()
		p.idle--
	}
	if p.n == 0 {
		if p.workers > maxWorkers {
			p.spares.Add(1)
		}
		p.workers--
		p.taken.Signal()
		return nil
	}
	slot := &p.queue[p.first%maxQueue]
	j := *slot
	*slot = nil
	p.first++
	p.n--
	p.taken.Signal()
	return j
}

// close ends the workers when no job is left, and waits for them. No job may be
// added any more.
func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.work.Broadcast()
	for p.workers > 0 {
		p.taken.Wait()
	}
}
