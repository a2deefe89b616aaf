// The workers of a connection.

package intercept

import "sync"

const (
	maxWorkers = 16  // requests of a connection in its Device at once
	maxQueue   = 128 // requests that wait for a worker
)

// pool runs jobs on goroutines of its own: started when there is work, ended
// when there is none. Each connection has one, so that requests that hang hold
// up their own connection at most.
type pool struct {
	// mu protects the fields below. Never held across I/O.
	mu      sync.Mutex
	changed sync.Cond // workers or the queue became fewer
	workers int
	queue   [maxQueue]*job // a ring
	first   int
	n       int
}

func newPool() *pool {
	p := &pool{}
	p.changed.L = &p.mu
	return p
}

// do runs j on a worker, now or when one is free. It returns false, and has
// not taken j, where too many wait already.
func (p *pool) do(j *job) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.workers < maxWorkers:
		p.workers++
		go p.work(j)
	case p.n < maxQueue:
		p.queue[(p.first+p.n)%maxQueue] = j
		p.n++
	default:
		return false
	}
	return true
}

// doWait is do, but waits where too many wait already.
func (p *pool) doWait(j *job) {
	for !p.do(j) {
		p.mu.Lock()
		for p.n == maxQueue {
			p.changed.Wait()
		}
		p.mu.Unlock()
	}
}

// work runs j and then what waits, until nothing does.
func (p *pool) work(j *job) {
	for j != nil {
		j.run()

		p.mu.Lock()
		if j = nil; p.n > 0 {
			j, p.queue[p.first] = p.queue[p.first], nil
			p.first = (p.first + 1) % maxQueue
			p.n--
		} else {
			p.workers--
		}
		p.changed.Signal()
		p.mu.Unlock()
	}
}

// wait returns when no job is left; none may be added meanwhile.
func (p *pool) wait() {
	p.mu.Lock()
	for p.workers > 0 {
		p.changed.Wait()
	}
	p.mu.Unlock()
}
