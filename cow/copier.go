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
	"time"

	"blksnap/store"
)

var (
	// errSlotIO says that the snapstore, not the origin, failed.
	errSlotIO = errors.New("snapstore")

	// errStuck says that a request was given up: it may still change its slot,
	// or look at its buffer, at any later time.
	errStuck = errors.New("snapstore does not answer")
)

// copier reads and writes slots for those who wait until a deadline.
type copier struct {
	pool *store.Pool
	jobs chan *slotIO // unbuffered: a send succeeds if a worker is free
	quit chan struct{}
	free sync.Pool // of *slotIO
}

// slotIO is one request and who waits for it.
type slotIO struct {
	write bool
	slot  store.Slot
	p     []byte
	off   int64
	done  chan error // buffered
	timer *time.Timer
}

func newCopier(pool *store.Pool) *copier {
	c := &copier{pool: pool, jobs: make(chan *slotIO), quit: make(chan struct{})}
	c.free.New = func() any {
		t := time.NewTimer(time.Hour)
		t.Stop()
		return &slotIO{done: make(chan error, 1), timer: t}
	}
	return c
}

// close ends the idle workers. One that hangs ends when its call returns.
func (c *copier) close() { close(c.quit) }

// read fills p from byte off of the slot; p may reach into the slots after it.
// Where it returns errStuck, p must never be used again.
func (c *copier) read(s store.Slot, p []byte, off int64, deadline time.Time) error {
	return c.do(false, s, p, off, deadline)
}

// write is the same in the other direction.
func (c *copier) write(s store.Slot, p []byte, off int64, deadline time.Time) error {
	return c.do(true, s, p, off, deadline)
}

func (c *copier) do(write bool, s store.Slot, p []byte, off int64, deadline time.Time) error {
	if !c.pool.MayHang(s) {
		return c.told(s, c.call(write, s, p, off))
	}
	io := c.free.Get().(*slotIO)
	io.write, io.slot, io.p, io.off = write, s, p, off
	select {
	case c.jobs <- io:
	default:
		go c.work(io)
	}
	io.timer.Reset(time.Until(deadline))
	select {
	case err := <-io.done:
		io.timer.Stop()
		io.p = nil
		c.free.Put(io)
		return c.told(s, err)
	case <-io.timer.C:
		return fmt.Errorf("%w: slot %v: %w", errSlotIO, s, errStuck)
	}
}

func (c *copier) told(s store.Slot, err error) error {
	if err != nil {
		return fmt.Errorf("%w: slot %v: %w", errSlotIO, s, err)
	}
	return nil
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
