// I/O on slots with a deadline.
//
// A system call on a disk that hangs does not come back, so who must not hang
// with it lets another goroutine make it, and stops waiting after a while. The
// buffer of a call that was given up is never used again.

package cow

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"blksnap/store"
)

var (
	// errSlotWrite says that a slot could not be written: another part of the
	// snapstore may take what it was for.
	errSlotWrite = errors.New("snapstore")

	// errStuck says that a request was given up: it may still change its slot,
	// or look at its buffer, at any later time.
	errStuck = errors.New("snapstore does not answer")
)

// writeHangs says that a slot may still change after err: who only waited in vain for
// what was to be written has not touched it.
func writeHangs(err error) bool { return errors.Is(err, errStuck) && errors.Is(err, errSlotWrite) }

// The watchdog looks at the clock every watchInterval: no request is given up before
// its deadline, and none much later. After watchPatience looks it ends, as soon as
// nobody waits. A timer for each request would cost as much as the copy of a block.
const (
	watchInterval = 5 * time.Millisecond
	watchPatience = 200 // looks
)

// copier reads and writes slots for those who wait until a deadline.
type copier struct {
	pool *store.Pool
	jobs chan *slotIO // unbuffered: a send succeeds if a worker is free
	quit chan struct{}
	free sync.Pool // of *slotIO

	// flights are the calls that are made by those who must not wait, each in the
	// place of a lock that it holds (flight.go).
	flights [stripes]atomic.Pointer[flight]

	watching atomic.Bool // the watchdog runs; stored under mu
	resting  atomic.Bool // nobody who must not wait shall call; the watchdog's

	// mu protects the ring below. Never held across I/O.
	mu      sync.Mutex
	waiting slotIO // the head of a ring of those whose deadline may pass
}

// slotIO is one request and who waits for it.
type slotIO struct {
	write    bool
	slot     store.Slot
	p        []byte
	off      int64
	deadline time.Time
	half     time.Time // when half of the time is over

	// done has room for both, the result and errStuck, which is sent at most once
	// and only while the request is in the ring.
	done chan error

	next, prev *slotIO // in copier.waiting; nil: not there
}

func newCopier(pool *store.Pool) *copier {
	c := &copier{pool: pool, jobs: make(chan *slotIO), quit: make(chan struct{})}
	c.waiting.next, c.waiting.prev = &c.waiting, &c.waiting
	c.free.New = func() any { return &slotIO{done: make(chan error, 2)} }
	return c
}

// close ends the idle workers. One that hangs ends when its call returns.
func (c *copier) close() { close(c.quit) }

// read fills p from byte off of the slot; p may reach into the slots after it.
// Where it returns errStuck, p must never be used again.
func (c *copier) read(s store.Slot, p []byte, off int64, deadline time.Time) error {
	return c.do(false, s, p, off, deadline)
}

// write is the same in the other direction. It gives up when half of the time is
// over if the bytes may go to another part of the snapstore: the other half is for
// that.
func (c *copier) write(s store.Slot, p []byte, off int64, deadline time.Time) error {
	return c.do(true, s, p, off, deadline)
}

func (c *copier) do(write bool, s store.Slot, p []byte, off int64, deadline time.Time) error {
	if !c.pool.MayHang(s) {
		return slotError(write, s, c.call(write, s, p, off))
	}
	io := c.free.Get().(*slotIO)
	io.write, io.slot, io.p, io.off = write, s, p, off
	io.deadline, io.half = deadline, deadline.Add(-time.Until(deadline)/2)
	c.watch(io)
	select {
	case c.jobs <- io:
	default:
		go c.work(io)
	}
	return c.await(io)
}

// await returns the result of io, which is in the ring, or errStuck when its time is
// over.
func (c *copier) await(io *slotIO) error {
	write, s := io.write, io.slot
	err := <-io.done
	if err != errStuck {
		c.unwatch(io)
		io.p = nil
		c.free.Put(io)
	}
	return slotError(write, s, err)
}

// watch puts io into the ring.
func (c *copier) watch(io *slotIO) {
	c.mu.Lock()
	defer c.mu.Unlock()
	last := c.waiting.prev
	io.prev, io.next = last, &c.waiting
	last.next, c.waiting.prev = io, io
	c.wakeLocked()
}

// wakeLocked has the watchdog run.
func (c *copier) wakeLocked() {
	if !c.watching.Load() {
		c.watching.Store(true)
		go c.watchdog()
	}
}

// unwatch takes io, which has its result, out of the ring, or else what the
// watchdog has told it at the same time.
func (c *copier) unwatch(io *slotIO) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if io.next != nil {
		io.unlink()
	} else {
		<-io.done
	}
}

func (io *slotIO) unlink() {
	io.prev.next, io.next.prev = io.next, io.prev
	io.next, io.prev = nil, nil
}

// watchdog tells those whose deadline has passed, and takes flights over, until
// there has been nothing to do for a while.
func (c *copier) watchdog() {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	quit, patience := c.quit, watchPatience
	for idle := 0; ; idle++ {
		if c.takeLate() {
			idle = 0
			c.resting.Store(true)
		}
		if idle >= patience {
			c.resting.Store(false)
		}
		if c.look(idle >= patience) {
			return
		}
		select {
		case <-tick.C:
		case <-quit:
			quit, patience = nil, 0
		}
	}
}

// look tells those whose deadline has passed. It returns true, and the watchdog must
// end, if nobody waits and end is set.
func (c *copier) look(end bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	for io := c.waiting.next; io != &c.waiting; {
		next := io.next
		if c.late(io, now) {
			io.unlink()
			io.done <- errStuck
		}
		io = next
	}
	if !end || c.waiting.next != &c.waiting {
		return false
	}
	// Who takes off looks at watching after it is in its place, so one of us two
	// sees the other.
	c.watching.Store(false)
	if c.flying() {
		c.watching.Store(true)
		return false
	}
	return true
}

// late says whether io is to be given up.
func (c *copier) late(io *slotIO, now time.Time) bool {
	if !now.Before(io.deadline) {
		return true
	}
	return io.write && !now.Before(io.half) && c.pool.RoomBeside(io.slot, int64(len(io.p)))
}

func slotError(write bool, s store.Slot, err error) error {
	switch {
	case err == nil:
		return nil
	case write:
		return fmt.Errorf("%w: slot %v: %w", errSlotWrite, s, err)
	}
	return fmt.Errorf("snapstore: slot %v: %w", s, err)
}

func (c *copier) call(write bool, s store.Slot, p []byte, off int64) error {
	if write {
		return c.pool.WriteAt(s, p, off)
	}
	return c.pool.ReadAt(s, p, off)
}

// work does one request and then others, until the copier closes.
func (c *copier) work(io *slotIO) {
	for {
		io.done <- c.call(io.write, io.slot, io.p, io.off)
		select {
		case io = <-c.jobs:
		case <-c.quit:
			return
		}
	}
}
