// What changes a device: write, write-zeroes, trim.

package cow

import (
	"errors"
	"fmt"
	"syscall"
	"time"
)

// piece is how much of a request is preserved and applied at a time. A request
// of gigabytes would hold up a snapshot otherwise; NBD does not promise that a
// request is atomic.
const piece = 8 << 20

// Write makes p visible to reads that start after it returns; durable on return
// if fua is set, else after a Flush. It fails only where the origin does, and while
// the device is rolled back.
func (d *Device) Write(p []byte, off int64, fua bool) error {
	for at := off; len(p) > 0; {
		n := min(len(p), piece)
		if err := d.write(p[:n], at, nil); err != nil {
			return err
		}
		p, at = p[n:], at+int64(n)
	}
	if fua {
		return d.Flush()
	}
	return nil
}

// write is Write for the rollback to an image; nil: for everybody else.
func (d *Device) write(p []byte, off int64, to *Image) error {
	g, err := d.admit(off, int64(len(p)), to)
	if err != nil {
		return err
	}
	defer d.writers.leave(g)
	if _, err := d.file.WriteAt(p, off); err != nil {
		return d.originError("write", off, err)
	}
	return nil
}

// TryWrite is Write where nothing must be waited for: no snapshot is being taken,
// the page cache takes it, and what is not preserved yet is so at once. Else EAGAIN.
//
// Where taken is not nil, blocks are preserved by a call on the snapstore that may hang.
// When it has not come back for a while, taken is called, from another goroutine: the
// write goes on without the one that called TryWrite, which gets EINPROGRESS when the
// snapstore lets it go, and must leave alone by then what it shares with others. What is
// left of the write, and its result, is up to whoever calls rest: once, soon, and from a
// goroutine that may wait. p is the caller's again when rest has returned. taken must
// not wait.
func (d *Device) TryWrite(p []byte, off int64, taken func(rest func() error)) error {
	g, ok := d.writers.tryEnter()
	if !ok {
		return syscall.EAGAIN
	}
	err := d.tryWrite(g, p, off, taken)
	if err != errTaken {
		d.writers.leave(g)
	}
	return err
}

func (d *Device) tryWrite(g pass, p []byte, off int64, taken func(rest func() error)) error {
	n := int64(len(p))
	if d.refuse("write", off, n, nil) != nil || !d.covered(off, n) {
		return syscall.EAGAIN
	}
	shielded, ok := false, false
	if !d.guarded(func() {
		shielded = d.shielded(off, n)
		if ok = shielded || taken != nil && canFly(off, n); ok {
			d.changes().Mark(off, n)
		}
	}) || !ok {
		return syscall.EAGAIN
	}
	if !shielded {
		if err := d.tryPreserve(g, p, off, taken); err != nil {
			return err
		}
	}
	err := d.file.tryWriteAt(p, off)
	if err != nil && err != syscall.EAGAIN {
		return d.originError("write", off, err)
	}
	return err
}

// zeroFlags are the flags of a write-zeroes request.
type zeroFlags = struct {
	FUA    bool
	NoHole bool
	Fast   bool
}

// WriteZeroes makes the range read as zeroes. With Fast set it fails with
// ENOTSUP, and has changed nothing, where that would need plain writes.
func (d *Device) WriteZeroes(off, n int64, f zeroFlags) error {
	for n > 0 {
		m := min(n, piece)
		if err := d.zero(off, m, f, nil); err != nil {
			return err
		}
		off, n = off+m, n-m
	}
	if f.FUA {
		return d.Flush()
	}
	return nil
}

// zero is WriteZeroes for the rollback to an image; nil: for everybody else.
func (d *Device) zero(off, n int64, f zeroFlags, to *Image) error {
	g, err := d.admit(off, n, to)
	if err != nil {
		return err
	}
	defer d.writers.leave(g)
	err = d.file.zero(off, n, !f.NoHole)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		if f.Fast {
			return fmt.Errorf("zero %s at %d: %w", d.name, off, syscall.ENOTSUP)
		}
		err = d.writeZeroes(off, n)
	}
	if err != nil {
		return d.originError("zero", off, err)
	}
	return nil
}

var zeroes [1 << 20]byte

func (d *Device) writeZeroes(off, n int64) error {
	for n > 0 {
		m := min(n, int64(len(zeroes)))
		if _, err := d.file.WriteAt(zeroes[:m], off); err != nil {
			return err
		}
		off, n = off+m, n-m
	}
	return nil
}

// Trim says that the range's content is no longer needed. It is advice: where an
// image still needs a block of it, the block is left as it is, because giving
// space back is no reason to spend space in the snapstore.
func (d *Device) Trim(off, n int64, fua bool) error {
	for n > 0 {
		m := min(n, piece)
		if err := d.trim(off, m); err != nil {
			return err
		}
		off, n = off+m, n-m
	}
	if fua {
		return d.Flush()
	}
	return nil
}

func (d *Device) trim(off, n int64) error {
	g, err := d.letIn(off, n)
	if err != nil {
		return err
	}
	defer d.writers.leave(g)
	if err := d.refuse("trim", off, n, nil); err != nil {
		return err
	}
	s := d.shield.Load()
	if s == nil {
		return d.punch(off, n)
	}
	// Runs of whole blocks that are preserved, joined across chunks.
	var from, to int64
	for sp := range spans(off, n) {
		var whole uint16 // none, where memory faults
		d.guarded(func() { whole = sp.wholeMask(d.Size()) & s.mask(sp.chunk) })
		for first, blocks := range runs(whole) {
			at := sp.chunk.off() + int64(first)<<blockShift
			if at != to {
				if err := d.punch(from, to-from); err != nil {
					return err
				}
				from = at
			}
			to = at + int64(blocks)<<blockShift
		}
	}
	return d.punch(from, min(to, d.Size())-from)
}

// punch frees a range that nobody needs any more. A file system that cannot do
// that is no error.
func (d *Device) punch(off, n int64) error {
	if n <= 0 {
		return nil
	}
	d.mark(off, n)
	err := d.file.zero(off, n, true)
	if err != nil && !errors.Is(err, syscall.EOPNOTSUPP) {
		return d.originError("trim", off, err)
	}
	return nil
}

// wholeMask has a bit for each block that the span covers whole, also where the
// end of a device of size bytes cuts the block.
func (s span) wholeMask(size int64) uint16 {
	end := s.skip + s.n
	if s.chunk.off()+end == size {
		end = roundUp(end, blockSize)
	}
	first := (s.skip + blockSize - 1) >> blockShift
	return blockRange(int(first), max(0, int(end>>blockShift-first)))
}

// admit lets a change of [off, off+n) in: it returns inside the gate, with the
// range marked and everything preserved that a healthy image still needs. What
// could not be preserved has broken its images by then, so admit fails only where
// the device is stopping, or does not take the change (refuse).
func (d *Device) admit(off, n int64, to *Image) (pass, error) {
	var full time.Time // when the snapstore was first found full
	for {
		g, err := d.letIn(off, n)
		if err != nil {
			return 0, err
		}
		if err := d.refuse("write", off, n, to); err != nil {
			d.writers.leave(g)
			return 0, err
		}
		var shielded bool
		d.always(func() {
			d.changes().Mark(off, n)
			shielded = d.shielded(off, n)
		})
		if shielded {
			return g, nil
		}
		f := loseImages
		if d.cfg.StoreWait > 0 && (full.IsZero() || time.Since(full) < d.cfg.StoreWait) {
			f = waitIfFull
		}
		freed := d.pool.Freed()
		if d.preserveGuarded(off, n, f) == nil {
			return g, nil
		}
		// Waiting inside the gate would hold up every snapshot.
		d.writers.leave(g)
		if full.IsZero() {
			full = time.Now()
		}
		d.waitForSpace(freed, full.Add(d.cfg.StoreWait))
	}
}

// preserveGuarded is preserve. Where memory faults no image needs anything any more.
func (d *Device) preserveGuarded(off, n int64, f onFailure) (err error) {
	if !d.guarded(func() { err = d.preserve(off, n, f) }) {
		return nil
	}
	return err
}

// mark notes that [off, off+n) changes. The caller is inside the gate.
func (d *Device) mark(off, n int64) {
	d.always(func() { d.changes().Mark(off, n) })
}

// refuse says why a change of [off, off+n), for the rollback to an image or, nil,
// for anybody else, is not to be made. The caller is inside the gate.
func (d *Device) refuse(op string, off, n int64, to *Image) error {
	if d.rollback.Load() != to {
		return fmt.Errorf("%s %s at %d: %w", op, d.name, off, ErrRollback)
	}
	return d.within(op, off, n, syscall.ENOSPC)
}

// letIn enters the gate for a change of [off, off+n), with everything noted that
// must be before an origin changes (durable.go).
func (d *Device) letIn(off, n int64) (pass, error) {
	for {
		g, ok := d.writers.enter(d.stop)
		if !ok {
			return 0, ErrStopping
		}
		if d.covered(off, n) {
			return g, nil
		}
		d.writers.leave(g)
		d.cover(off, n)
	}
}
