// Low space: announced before it is too late.

package store

import (
	"math"
	"time"
)

// LowSpace is what there is to say of a pool's space, in bytes.
type LowSpace struct {
	Size int64
	Free int64
	Rate int64         // how much more is in use each second, of late; at least 0
	Left time.Duration // until it is full at this rate; 0 if Rate is
}

// sample is how many blocks were in use at a time.
type sample struct {
	at   time.Time
	used int64
}

// maxSamples is how many seconds the present rate looks back.
const maxSamples = 8

// OnLow has f called each time that free space falls under a mark, a tenth of
// the pool but at least 64 MiB, or half of a smaller one; and again only after
// an eighth more than that was free meanwhile, or when a part was added that is not
// enough. f is called from a goroutine of the pool, no two calls at once; it replaces
// an earlier f, and nil means nobody. Close waits for it to return.
func (p *Pool) OnLow(f func(LowSpace)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.onLow, p.lowSaid = f, false
	p.wakeWatch()
}

// lowMark is under how many free blocks a pool of size blocks is low.
func lowMark(size int64) int64 {
	return max(size/10, min(64<<20/BlockSize, size/2))
}

// noteSpace is called whenever there may be less space, or more. The caller
// holds mu.
func (p *Pool) noteSpace() {
	free, mark := p.sum((*ledger).room), lowMark(p.size)
	switch {
	case !p.low && free < mark:
		p.low = true
		p.wakeWatch()
	case p.low && free >= mark+mark/8:
		p.low, p.lowSaid = false, false
	}
}

// noteAdded has low space announced again where a part that was added is not enough:
// whoever adds parts when told must not believe that it was. The caller holds mu.
func (p *Pool) noteAdded() {
	if p.low {
		p.lowSaid = false
		p.wakeWatch()
	}
}

func (p *Pool) wakeWatch() {
	select {
	case p.watchKick <- struct{}{}:
	default:
	}
}

// watch calls what OnLow was given and samples what is in use, until the pool
// is closed.
func (p *Pool) watch() {
	defer close(p.watched)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-p.done:
			return
		case now := <-tick.C:
			p.mu.Lock()
			p.sampleUsed(now)
			p.mu.Unlock()
		case <-p.watchKick:
			p.announce()
		}
	}
}

// announce calls what OnLow was given, unless that heard of it already or space
// came back meanwhile.
func (p *Pool) announce() {
	p.mu.Lock()
	f, due, outlook := p.onLow, p.low && !p.lowSaid, p.outlook(time.Now())
	p.lowSaid = p.low
	p.mu.Unlock()
	if f != nil && due {
		f(outlook)
	}
}

func (p *Pool) sampleUsed(now time.Time) {
	if len(p.samples) == maxSamples {
		copy(p.samples, p.samples[1:])
		p.samples = p.samples[:maxSamples-1]
	}
	p.samples = append(p.samples, sample{now, p.sum((*ledger).inUseBlocks)})
}

// Outlook says how much space there is and how long it will last.
func (p *Pool) Outlook() LowSpace {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.outlook(time.Now())
}

func (p *Pool) outlook(now time.Time) LowSpace {
	used, free := p.sum((*ledger).inUseBlocks), p.sum((*ledger).room)
	o := LowSpace{Size: (used + free) * BlockSize, Free: free * BlockSize}
	then := p.samples[0]
	if more := used - then.used; more > 0 {
		seconds := max(now.Sub(then.at).Seconds(), 1e-3)
		o.Rate = max(1, int64(float64(more*BlockSize)/seconds))
		left := float64(o.Free) / float64(o.Rate) * float64(time.Second)
		o.Left = time.Duration(min(left, math.MaxInt64/2))
	}
	return o
}
