// The workers of a connection.

package intercept

import "sync"

const (
	maxWorkers = 16  // requests of a connection in its Device at once
	maxQueue   = 128 // requests that wait for a worker
)

// pool runs jobs on goroutines of its own. They are started when they are
// needed and stay, because to wake one allocates nothing. Each connection has
// a pool, so that requests that hang hold up their own connection at most.
type pool struct {
	// mu protects the fields below. Never held across I/O.
	mu      sync.Mutex
	work    sync.Cond      // a job was queued, or closed became true
	taken   sync.Cond      // a job was taken from the queue, or a worker has ended
	queue   [maxQueue]*job // a ring
	first   int
	n       int
	workers int
	idle    int // workers that wait for work
	closed  bool
}

func newPool() *pool {
	p := &pool{}
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
	if p.n > p.idle && p.workers < maxWorkers {
		p.workers++
		go p.run()
	} else {
		p.work.Signal()
	}
	return true
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

// run is a worker.
func (p *pool) run() {
	for j := p.next(); j != nil; j = p.next() {
		j.run()
	}
}

// next waits for a job. It returns nil, and the worker has to end, when the
// pool is closed and nothing is left.
func (p *pool) next() *job {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.n == 0 && !p.closed {
		p.idle++
		p.work.Wait()
		p.idle--
	}
	if p.n == 0 {
		p.workers--
		p.taken.Signal()
		return nil
	}
	j := p.queue[p.first]
	p.queue[p.first] = nil
	p.first = (p.first + 1) % maxQueue
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
