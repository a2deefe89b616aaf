// Preserving by those who must not wait.
//
// To preserve a block costs less than to hand its write to another goroutine, which is
// there to hang where the snapstore does. So whoever must not hang makes the one call
// that may, in a flight, and a watchdog takes over what it cannot go on with:
//
//	flying -> landed          the call came back first: go on, as if nothing were
//	       -> taken -> given up or not
//	                          the watchdog was first: whoever was in the call leaves
//	                          what comes of it to the one who calls rest, and touches
//	                          nothing any more
//
// One compare-and-swap decides. Up to there the flight holds the gate, the locks of its
// chunks, and slots that nobody knows; all of that goes over to rest, which waits for the
// call as the copier does for those who may wait, and then does what they do. Everything
// that is not the straight way (no slots at hand, a lock that somebody holds, blocks of
// the origin that are not in memory, a call that fails) ends the flight before it has
// changed anything, with EAGAIN: then the write takes the long way.

package cow

import (
	"bytes"
	"math/bits"
	"sync/atomic"
	"syscall"
	"time"

	"blksnap/store"
)

// errTaken is what TryWrite returns from a flight that was taken over.
var errTaken error = syscall.EINPROGRESS

// flightLooks is how many looks of the watchdog a flight lasts before it is taken over,
// 30 ms. For as long as the watchdog's patience no other begins then: a store that is
// slow over and over would hold its callers up each time.
const flightLooks = 6

// flightChunks is how many chunks a flight has at most.
const flightChunks = tryWriteLimit/chunkSize + 1

// flight is a write on its way. Flights are reused by their device, except those that
// were taken over.
type flight struct {
	batch
	device  *Device
	io      *slotIO
	pass    pass
	p       []byte // goes to the origin at off
	off     int64
	head    *table
	charged []charge
	taken   func(rest func() error)

	looks atomic.Int32 // of the watchdog at it
}

func newFlight(d *Device) *flight {
	return &flight{
		batch:  batch{missing: make([]missing, 0, flightChunks), buf: make([]byte, tryWriteLimit)},
		device: d,
		io:     &slotIO{write: true, done: make(chan error, 2)},
	}
}

// canFly says whether a write is one that tryPreserve and tryWriteAt are for.
func canFly(off, n int64) bool { return n <= tryWriteLimit && (off|n)&(blockSize-1) == 0 }

// tryPreserve preserves what the write of p at off touches, or does nothing and returns
// EAGAIN, or errTaken: then the gate and the write belong to another goroutine. The
// caller is inside the gate, which passed g.
func (d *Device) tryPreserve(g pass, p []byte, off int64, taken func(rest func() error)) error {
	if d.copier.resting.Load() {
		return syscall.EAGAIN
	}
	first, last := chunkRange(off, int64(len(p)))
	if !d.chunkLocks.tryLock(first, last) {
		return syscall.EAGAIN
	}
	f := d.flights.Get().(*flight)
	f.pass, f.p, f.off, f.taken = g, p, off, taken
	// Who had the locks before may have preserved the blocks.
	err := error(nil)
	if s := d.shield.Load(); s != nil {
		if !d.guarded(func() {
			f.look(s, off, int64(len(p)))
			f.head = s.head().table
			err = f.preserve()
		}) {
			err = syscall.EAGAIN
		}
	}
	if err == errTaken {
		return err
	}
	d.chunkLocks.unlock(first, last)
	f.p, f.head, f.charged, f.taken = nil, nil, nil, nil
	d.flights.Put(f)
	return err
}

// chunkRange is the first and the last chunk that [off, off+n) touches.
func chunkRange(off, n int64) (first, last chunkNo) {
	return chunkNo(off >> chunkShift), chunkNo((off + n - 1) >> chunkShift)
}

// preserve preserves what is missing.
func (f *flight) preserve() error {
	if len(f.missing) == 0 {
		return nil
	}
	d := f.device
	first, last := f.missing[0].chunk, f.missing[len(f.missing)-1].chunk
	if f.head.tryReserve(first, int(last-first)+1) != nil {
		return syscall.EAGAIN
	}
	from, to := extent(f.missing)
	buf := f.buf[:to-from]
	err := d.tryReadBlocks(buf, from)
	if err != nil || f.mayBeHoles(buf, from) {
		left := len(f.missing)
		if d.preserveHoles(f.head, &f.batch) != nil {
			return syscall.EAGAIN // and the long way finds out
		}
		if len(f.missing) == 0 {
			return nil
		}
		if err != nil || len(f.missing) < left {
			return syscall.EAGAIN
		}
	}
	if !f.tryTakeSlots(to - from) {
		return syscall.EAGAIN
	}
	if f.charged, err = d.chargeMissing(f.missing); err == nil {
		err = f.fly(buf, from&(chunkSize-1))
	}
	switch {
	case err == errTaken:
		return err
	case err != nil:
		f.undo(err)
		return syscall.EAGAIN
	}
	d.publish(f.head, f.missing)
	return nil
}

// tryReadBlocks is readBlocks where that waits for no disk.
func (d *Device) tryReadBlocks(p []byte, off int64) error {
	if beyond := off + int64(len(p)) - d.Size(); beyond > 0 {
		n := int64(len(p)) - beyond
		clear(p[n:])
		p = p[:n]
	}
	return d.file.tryReadAt(p, off)
}

// mayBeHoles says whether one of the chunks of which nothing is preserved yet may be a
// hole in the origin, by its bytes, which buf holds from from on.
func (f *flight) mayBeHoles(buf []byte, from int64) bool {
	for _, m := range f.missing {
		if m.word != 0 {
			continue
		}
		at, to := extent([]missing{m})
		if b := buf[at-from : to-from]; bytes.Equal(b, zeroes[:len(b)]) {
			return true
		}
	}
	return false
}

// tryTakeSlots takes slots that one call can write, and that are at hand, for all that
// is missing, which is n bytes long with what lies between. It returns false, and has
// taken none, where there are none.
func (f *flight) tryTakeSlots(n int64) bool {
	d, blocks := f.device, 0
	for i, m := range f.missing {
		blocks += bits.OnesCount16(m.mask)
		f.masks[i] = m.mask
		if m.word.hasSlot() && len(f.missing) > 1 {
			return false
		}
	}
	if int64(blocks)<<blockShift != n {
		return false
	}
	if m := &f.missing[0]; m.word.hasSlot() {
		m.slot = m.word.slot()
		return d.pool.Extend(m.slot, m.mask) == nil
	}
	k := len(f.missing)
	got := d.pool.TryAlloc(f.slots[:k], f.masks[:k])
	neighbours := got == k
	for i := range got {
		f.missing[i].slot = f.slots[i]
		neighbours = neighbours && f.slots[i] == f.slots[0]+store.Slot(i)
	}
	if !neighbours {
		d.giveBack(&f.batch, got, nil)
	}
	return neighbours
}

// undo forgets what was done for a copy that failed.
func (f *flight) undo(err error) {
	f.device.refund(f.charged)
	f.device.giveBack(&f.batch, len(f.missing), err)
}

// fly writes buf to the slots, from byte skip of the first on.
func (f *flight) fly(buf []byte, skip int64) error {
	c, slot := f.device.copier, f.missing[0].slot
	if !c.pool.MayHang(slot) {
		return slotError(true, slot, c.pool.WriteAt(slot, buf, skip))
	}
	f.io.slot, f.io.p = slot, buf
	f.looks.Store(0)
	place := &c.flights[f.missing[0].chunk%stripes]
	place.Store(f)
	if !c.watching.Load() {
		c.wake()
	}
	err := c.pool.WriteAt(slot, buf, skip)
	if !place.CompareAndSwap(f, nil) {
		f.io.done <- err
		return errTaken
	}
	return slotError(true, slot, err)
}

// wake has the watchdog run.
func (c *copier) wake() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wakeLocked()
}

// flying says whether there is a flight.
func (c *copier) flying() bool {
	for i := range c.flights {
		if c.flights[i].Load() != nil {
			return true
		}
	}
	return false
}

// takeLate takes over the flights that have lasted for too long, and says whether there
// were any. It is the watchdog's.
func (c *copier) takeLate() (took bool) {
	for i := range c.flights {
		place := &c.flights[i]
		f := place.Load()
		if f == nil || f.looks.Add(1) <= flightLooks || !place.CompareAndSwap(f, nil) {
			continue
		}
		took = true
		// It has lasted for less than that many looks.
		limit := f.device.cfg.PreserveLimit
		f.deadline = time.Now().Add(limit - (flightLooks+1)*watchInterval)
		f.io.deadline, f.io.half = f.deadline, f.deadline.Add(-limit/2)
		f.taken(f.rest)
	}
	return took
}

// rest waits for the call of a flight that was taken over and goes on as those do who
// may wait (preserveWindow, Write).
func (f *flight) rest() error {
	d, n := f.device, int64(len(f.p))
	d.copier.watch(f.io)
	err := d.copier.await(f.io)
	if err == nil {
		d.guarded(func() { d.publish(f.head, f.missing) })
	} else {
		f.undo(err)
		if broken := err; !d.guarded(func() { err = f.elsewhere(broken) }) {
			err = nil // no image needs it any more
		}
	}
	d.chunkLocks.unlock(chunkRange(f.off, n))
	if err != nil { // a full store, and the write may wait for space, outside the gate
		d.writers.leave(f.pass)
		return d.Write(f.p, f.off, false)
	}
	defer d.writers.leave(f.pass)
	if _, err := d.file.WriteAt(f.p, f.off); err != nil {
		return d.originError("write", f.off, err)
	}
	return nil
}

// elsewhere tries other parts of the snapstore after err, while there is time. It
// returns an error only where the write shall wait for space.
func (f *flight) elsewhere(err error) error {
	d := f.device
	if !time.Now().Before(f.deadline) {
		for _, m := range f.missing {
			d.lose(m.chunk, m.mask, err)
		}
		return nil
	}
	mode := loseImages
	if d.cfg.StoreWait > 0 {
		mode = waitIfFull
	}
	return d.preserveLocked(&f.batch, f.off, int64(len(f.p)), mode)
}
