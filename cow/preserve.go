// Preserving: copying old content to the snapstore before it is overwritten.
//
// A write that finds blocks unpreserved takes the locks of their chunks, looks
// again, and for what is still missing: takes slots, reads the origin, writes the
// slots, publishes the words. Then, and only then, the origin may change.
// Neighbouring chunks get neighbouring slots where the pool can, so that a large
// write is preserved by one read and one write.
//
// Everything that can go wrong here ends in the same way: the images that needed
// the block break (overflow.go), and the write goes on.

package cow

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"time"

	"blksnap/store"
)

// maxAttempts is how many parts of the snapstore are tried for one window. There are
// no more; a file system that runs full and not full again would go on for ever.
const maxAttempts = 255

// window is how many chunks are locked, and copied, at a time.
const window = 16

// onFailure is what becomes of a block that cannot be preserved.
type onFailure int

const (
	loseImages  onFailure = iota // the images that need it break
	waitIfFull                   // the same, unless the snapstore is full
	spareImages                  // they do not: it will not be changed then
)

// preserve preserves what [off, off+n) touches. The caller is inside the gate. It
// returns an error where f says that no image breaks for it; then some of the
// range may be preserved. A snapstore that hangs holds it up for
// Config.PreserveLimit at most, and as long again where another write of the same
// chunks was there first.
func (d *Device) preserve(off, n int64, f onFailure) error {
	deadline := time.Now().Add(d.cfg.PreserveLimit)
	for n > 0 {
		c := chunkNo(off >> chunkShift)
		m := min(n, (c+window).off()-off)
		if err := d.preserveWindow(off, m, deadline, f); err != nil {
			return err
		}
		off, n = off+m, n-m
	}
	return nil
}

// missing is what must be preserved of one chunk.
type missing struct {
	chunk chunkNo
	mask  uint16 // blocks to copy
	word  word   // the head's word as it is
	slot  store.Slot
}

// batch is the work of one window. Batches are reused: they hold the buffer.
type batch struct {
	missing  []missing
	deadline time.Time
	slots    [window]store.Slot
	masks    [window]uint16
	buf      []byte // nil: to be made
}

var batches = sync.Pool{New: func() any { return &batch{missing: make([]missing, 0, window)} }}

// buffer is n bytes, which are the batch's until the next call.
func (b *batch) buffer(n int64) []byte {
	if b.buf == nil {
		b.buf = make([]byte, window*chunkSize)
	}
	return b.buf[:n]
}

// spare is called after a use of the buffer ended with err. What hangs may look at it at
// any later time: it is not used again.
func (b *batch) spare(err error) {
	if errors.Is(err, errStuck) {
		b.buf = nil
	}
}

// preserveWindow is preserve for at most window chunks.
func (d *Device) preserveWindow(off, n int64, deadline time.Time, f onFailure) error {
	if d.shielded(off, n) {
		return nil
	}
	first, last := chunkNo(off>>chunkShift), chunkNo((off+n-1)>>chunkShift)
	d.chunkLocks.lock(first, last)
	defer d.chunkLocks.unlock(first, last)

	b := batches.Get().(*batch)
	defer batches.Put(b)
	b.deadline = deadline
	return d.preserveLocked(b, off, n, f)
}

// preserveLocked is preserveWindow for who holds the chunks' locks.
func (d *Device) preserveLocked(b *batch, off, n int64, f onFailure) error {
	// Who had the locks before may have preserved the blocks, or may have waited
	// in vain for the snapstore and broken the images: nobody needs them then.
	for s := d.shield.Load(); s != nil; s = d.shield.Load() {
		b.look(s, off, n)
		err := d.preserveBatch(s.head().table, b)
		var over *overLimit
		switch {
		case err == nil || f == spareImages:
			return err
		case errors.As(err, &over):
			d.breakOver(over)
		case !errors.Is(err, store.ErrFull):
			for _, m := range b.missing {
				d.lose(m.chunk, m.mask, err)
			}
			return nil
		case f == waitIfFull:
			return err
		default:
			// Only the first found no room.
			d.lose(b.missing[0].chunk, b.missing[0].mask, err)
		}
		// Look what is missing for those who are left: it may be less, and find room.
	}
	return nil
}

// look finds what is missing of [off, off+n).
func (b *batch) look(s *shield, off, n int64) {
	b.missing = b.missing[:0]
	head := s.head().table
	for sp := range spans(off, n) {
		if m := sp.mask() &^ s.mask(sp.chunk); m != 0 {
			b.missing = append(b.missing, missing{chunk: sp.chunk, mask: m, word: head.load(sp.chunk)})
		}
	}
}

// shielded says whether no healthy image needs [off, off+n) to be preserved any
// more. The caller is inside the gate.
func (d *Device) shielded(off, n int64) bool {
	s := d.shield.Load()
	return s == nil || s.covers(off, n)
}

// preserveBatch preserves b.missing in head and removes from it what it has
// preserved.
func (d *Device) preserveBatch(head *table, b *batch) error {
	if len(b.missing) == 0 {
		return nil
	}
	first, last := b.missing[0].chunk, b.missing[len(b.missing)-1].chunk
	if err := head.reserve(first, int(last-first)+1); err != nil {
		return fmt.Errorf("%w: %w", store.ErrFull, err)
	}
	if err := d.preserveHoles(head, b); err != nil {
		return err
	}
	for failed := 0; len(b.missing) > 0; {
		k, err := d.takeSlots(b)
		if err != nil {
			return err
		}
		err = d.copyOut(head, b, k)
		if err == nil {
			b.missing = append(b.missing[:0], b.missing[k:]...)
			continue
		}
		// The pool gives no slots of a part that failed or hangs: try the next.
		if failed++; failed == maxAttempts || !errors.Is(err, errSlotWrite) || !time.Now().Before(b.deadline) {
			return err
		}
	}
	return nil
}

// preserveHoles publishes zeroWord for the chunks that are a hole in the origin
// and of which nothing is preserved yet: they need no slot and no copy. Nobody
// can fill the hole meanwhile: a write to any block of such a chunk needs the
// chunk's lock, unless an older layer of the shield has the block, and then
// nobody looks for it here.
func (d *Device) preserveHoles(head *table, b *batch) error {
	rest := b.missing[:0]
	for _, m := range b.missing {
		if m.word == 0 {
			hole, err := d.isHole(m.chunk)
			if err != nil {
				return err
			}
			if hole {
				head.store(m.chunk, zeroWord)
				d.cat.did("publish a hole")
				continue
			}
		}
		rest = append(rest, m)
	}
	b.missing = rest
	return nil
}

// isHole says whether all of the chunk is a hole in the origin.
func (d *Device) isHole(c chunkNo) (bool, error) {
	from, end := c.off(), min(c.off()+chunkSize, d.Size())
	hole, to, err := d.file.next(from, end)
	if err != nil {
		return false, d.originError("find holes of", from, err)
	}
	return hole && to == end, nil
}

// takeSlots finds a slot for the first k >= 1 of b.missing.
func (d *Device) takeSlots(b *batch) (k int, err error) {
	if m := &b.missing[0]; m.word.hasSlot() {
		// Some of this chunk is preserved: the rest belongs to the same slot.
		m.slot = m.word.slot()
		if err := d.pool.Extend(m.slot, m.mask); err == nil {
			return 1, nil
		}
		return 1, d.moveChunk(b)
	}
	for k < len(b.missing) && !b.missing[k].word.hasSlot() && (k == 0 || b.missing[k].chunk == b.missing[k-1].chunk+1) {
		b.masks[k] = b.missing[k].mask
		k++
	}
	k, err = d.pool.Alloc(b.slots[:k], b.masks[:k])
	for i := range k {
		b.missing[i].slot = b.slots[i]
	}
	return k, err
}

// moveChunk takes a new slot for the first of b.missing, whose part has no room
// for more blocks, and asks for all of its blocks to be copied there. The old
// slot is given back when no reader can be using it.
func (d *Device) moveChunk(b *batch) error {
	m := &b.missing[0]
	b.masks[0] = m.mask | m.word.mask()
	if _, err := d.pool.Alloc(b.slots[:1], b.masks[:1]); err != nil {
		return err
	}
	m.slot = b.slots[0]
	return nil
}

// copyOut copies the first k of b.missing to their slots and publishes their
// words. If it fails the slots are given back, and nothing was published.
func (d *Device) copyOut(head *table, b *batch, k int) error {
	charged, err := d.chargeMissing(b.missing[:k])
	if err == nil {
		err = d.fill(b, k)
	}
	if err != nil {
		d.refund(charged)
		d.giveBack(b, k, err)
		return err
	}
	d.publish(head, b.missing[:k])
	return nil
}

// publish makes what was copied known to those who look for it.
func (d *Device) publish(head *table, list []missing) {
	for _, m := range list {
		head.store(m.chunk, makeWord(m.slot, m.word.mask()|m.mask))
		d.cat.did("publish a word")
		if m.word.hasSlot() && m.slot != m.word.slot() {
			d.retire(m.word)
		}
	}
}

// giveBack undoes takeSlots for the first k of b.missing after their copy failed.
func (d *Device) giveBack(b *batch, k int, err error) {
	for _, m := range b.missing[:k] {
		if m.slot == m.word.slot() {
			d.unextend(m.slot, m.mask, err)
		} else {
			d.unalloc(m.slot, m.word.mask()|m.mask, err)
		}
	}
	b.spare(err)
}

// unextend takes blocks out of a slot again, which stays in use for others, after
// an attempt to write them ended with err.
func (d *Device) unextend(s store.Slot, mask uint16, err error) {
	if writeHangs(err) {
		d.markStuck(s)
	}
	d.pool.Shrink(s, mask)
}

// unalloc does the same with a slot that is in use for nothing else.
func (d *Device) unalloc(s store.Slot, mask uint16, err error) {
	if writeHangs(err) {
		d.pool.Quarantine(s)
		return
	}
	d.pool.Free(s, mask)
}

// fill writes the missing blocks of b.missing[:k] into their slots.
func (d *Device) fill(b *batch, k int) error {
	if m := b.missing[0]; m.word.hasSlot() && m.slot != m.word.slot() {
		if err := d.fillMoved(m, b); err != nil {
			return err
		}
	}
	// One read for all, from the first missing block to the last: what lies
	// between is read along, which costs less than another read.
	from, to := extent(b.missing[:k])
	buf := b.buffer(to - from)
	if err := d.readBlocks(buf, from); err != nil {
		return err
	}
	// One write for each run that is contiguous in origin and slots alike.
	var start, end int64 // of the run, in the origin
	var slot store.Slot  // of the chunk that the run starts in
	write := func() error {
		if end == start {
			return nil
		}
		return d.copier.write(slot, buf[start-from:end-from], start&(chunkSize-1), b.deadline)
	}
	for i, m := range b.missing[:k] {
		for f, n := range runs(m.mask) {
			at := m.chunk.off() + int64(f)<<blockShift
			joins := i > 0 && at == end && m.slot == b.missing[i-1].slot+1
			if !joins {
				if err := write(); err != nil {
					return err
				}
				start, slot = at, m.slot
			}
			end = at + int64(n)<<blockShift
		}
	}
	return write()
}

// extent is where in the origin the blocks of list, at least one chunk, begin and end.
func extent(list []missing) (from, to int64) {
	first, last := &list[0], &list[len(list)-1]
	from = first.chunk.off() + int64(bits.TrailingZeros16(first.mask))<<blockShift
	return from, last.chunk.off() + int64(bits.Len16(last.mask))<<blockShift
}

// fillMoved copies what is preserved of a chunk that moves to another slot.
func (d *Device) fillMoved(m missing, b *batch) error {
	for f, n := range runs(m.word.mask()) {
		p, at := b.buffer(int64(n)<<blockShift), int64(f)<<blockShift
		if err := d.copier.read(m.word.slot(), p, at, b.deadline); err != nil {
			return err
		}
		if err := d.copier.write(m.slot, p, at, b.deadline); err != nil {
			return err
		}
	}
	return nil
}

// readBlocks reads whole blocks of the origin; what is beyond its end reads as
// zeroes.
func (d *Device) readBlocks(p []byte, off int64) error {
	if beyond := off + int64(len(p)) - d.Size(); beyond > 0 {
		n := int64(len(p)) - beyond
		clear(p[n:])
		p = p[:n]
	}
	if _, err := d.file.ReadAt(p, off); err != nil {
		return d.originError("preserve", off, err)
	}
	return nil
}

// waitForSpace waits until space was freed or added in the snapstore since the
// pool's counter was freed, the deadline, or the device's end.
func (d *Device) waitForSpace(freed uint64, deadline time.Time) {
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	go func() {
		select {
		case <-d.stop:
			cancel()
		case <-ctx.Done():
		}
	}()
	d.pool.Wait(ctx, freed) // whatever ended the wait, the caller looks again
}
