// What happened: a bounded log of events that clients can read and follow.

package control

import (
	"context"
	"iter"
	"sync"
	"time"
)

// keptEvents is how many events are remembered for those who ask later.
const keptEvents = 1000

// Event is one thing that happened, for people and scripts.
type Event struct {
	Seq      uint64    `json:"seq"` // counts events from 1, without gaps
	Time     time.Time `json:"time"`
	Kind     string    `json:"kind"`
	Device   string    `json:"device,omitempty"`
	Snapshot string    `json:"snapshot,omitempty"`
	Text     string    `json:"text,omitempty"`
}

// events keeps the last keptEvents events. Its methods may be called at once.
type events struct {
	mu   sync.Mutex
	last uint64            // number of the newest event, 0 before the first
	ring [keptEvents]Event // event n is at n % keptEvents
	more chan struct{}     // closed and replaced by every event
}

func newEvents() *events { return &events{more: make(chan struct{})} }

// add numbers e, remembers it and wakes those who follow. It never waits for
// any of them.
func (l *events) add(e Event) Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last++
	e.Seq = l.last
	l.ring[l.last%keptEvents] = e
	close(l.more)
	l.more = make(chan struct{})
	return e
}

// after returns the remembered events numbered above seq, oldest first, and a
// channel that is closed by the next event.
func (l *events) after(seq uint64) ([]Event, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last > keptEvents {
		seq = max(seq, l.last-keptEvents)
	}
	var found []Event
	for n := seq + 1; n <= l.last; n++ {
		found = append(found, l.ring[n%keptEvents])
	}
	return found, l.more
}

// follow yields the remembered events and then every new one until ctx ends. A
// caller too slow to keep up misses the oldest, which shows as a gap in Seq.
func (l *events) follow(ctx context.Context) iter.Seq[Event] {
	return func(yield func(Event) bool) {
		var seq uint64
		for {
			found, more := l.after(seq)
			for _, e := range found {
				if !yield(e) {
					return
				}
				seq = e.Seq
			}
			select {
			case <-ctx.Done():
				return
			case <-more:
			}
		}
	}
}
