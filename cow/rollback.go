// Rolling a device back to one of its images.
//
// What the image has otherwise than the origin is in the image's layers: all of it is
// written back the way that every write takes, so older and newer images stay right
// and the change map knows of it. What was written to the image does not count.
//
//  1. The rollback is pending from here on, and nobody else changes the device. A
//     write that came later, or was made to wait, would be one to a content that its
//     sender has never seen.
//  2. Everything that will be overwritten is preserved for newer images. From then
//     on the rollback needs no space and breaks no image.
//  3. It is noted that the device is between two states (tear.go).
//  4. What the image's layers hold is written to the origin.
//  5. The origin is flushed, the note taken back, and the rollback not pending any
//     more.
//
// Where 2 or 3 fail, all is as it was. What a killed process leaves is a pending
// rollback: the device takes no writes before Rollback was called again, which begins
// from the start, and finds that some is preserved and written back already. Where 4
// fails because the origin or the image does, the device is torn, and says so. The
// rollback is not pending any more then: a snapshot must not keep a device from
// being used for ever.

package cow

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"syscall"
	"time"

	"blksnap/store"
)

// Rollback makes the device what it was at the image's instant. While it runs,
// writes to the device, taking snapshots of it, resizing it and destroying the
// image's snapshot fail with ErrRollback; reads go on. It fails, and has changed
// nothing, with store.ErrFull where the snapstore has no room for what newer
// images need, with EINVAL where the device has become smaller than the image, with
// ETIMEDOUT where writes in flight do not end, with ErrRollback where the device is
// being rolled back already, and with the error of the state directory where that
// cannot be written. With ErrStopping it goes on when the device is opened and Rollback
// called again. Any other error leaves a device that is neither what it was nor what
// the image is: its State and an event say so.
//
// When Rollback returns nil the device is durably what the image was. It waits for
// as long as the disks under origin, snapstore and state do.
func (i *Image) Rollback() error {
	if err := i.rollBack(); err != nil {
		return fmt.Errorf("roll %s back to %s: %w", i.device.name, i.snapshot.name, err)
	}
	return nil
}

// RollingBack is the image that the device is being rolled back to, or, after a
// start, has to be rolled back to further; nil where there is none.
func (d *Device) RollingBack() *Image { return d.rollback.Load() }

func (i *Image) rollBack() error {
	d := i.device
	if d.stopped() {
		return ErrStopping
	}
	if !d.rolling.TryLock() {
		return ErrRollback
	}
	defer d.rolling.Unlock()
	if err := i.beginRollback(); err != nil {
		return err
	}
	d.cfg.Log.Info("rolling back", "snapshot", i.snapshot.name)
	err := i.endRollback(i.runRollback())
	switch {
	case err == nil:
		d.cfg.Log.Info("rolled back", "snapshot", i.snapshot.name)
	case !errors.Is(err, ErrStopping):
		d.tellTear()
	}
	return err
}

// runRollback does what a pending rollback is for.
func (i *Image) runRollback() error {
	d := i.device
	added, err := i.preserveForRollback()
	if err == nil {
		err = i.beginTear()
	}
	if err != nil {
		d.unpreserve(added)
		return err
	}
	if err := i.writeBack(); err != nil {
		return err
	}
	if err := d.Flush(); err != nil {
		return err
	}
	i.endTear()
	return nil
}

// endRollback makes a rollback that ended with err not pending any more, unless it
// goes on when the device is opened again, and returns why it ended.
func (i *Image) endRollback(err error) error {
	if err != nil {
		err = cmp.Or(i.Err(), err) // a lost image is the reason for whatever else failed
	}
	if !errors.Is(err, ErrStopping) {
		i.device.mu.Lock()
		defer i.device.mu.Unlock()
		i.device.setRollbackLocked(nil)
	}
	return err
}

// beginRollback makes the rollback pending and waits for writes in flight.
func (i *Image) beginRollback() error {
	d := i.device
	d.taking.Lock()
	defer d.taking.Unlock()
	was := d.rollback.Load()
	switch {
	case was != nil && was != i:
		return ErrRollback
	case i.size > d.Size():
		return fmt.Errorf("the device has %d bytes, the image %d: %w", d.Size(), i.size, syscall.EINVAL)
	}
	if err := i.pend(); err != nil {
		return err
	}
	d.writers.shut()
	ended := d.writers.empty(time.Now().Add(takeLimit))
	d.writers.open()
	if ended {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if was == nil {
		d.setRollbackLocked(nil)
	}
	return fmt.Errorf("writes in flight did not end within %v: %w", takeLimit, syscall.ETIMEDOUT)
}

// pend makes the rollback pending, unless the image ends before.
func (i *Image) pend() error {
	i.snapshot.mu.Lock() // against who wants to destroy it
	defer i.snapshot.mu.Unlock()
	i.device.mu.Lock()
	defer i.device.mu.Unlock()
	if err := i.Err(); err != nil {
		return err
	}
	i.device.setRollbackLocked(i)
	return nil
}

// setRollbackLocked notes which rollback is pending, nil for none, here and where a
// killed process leaves it. An image that ends is not pending from then on
// (retireImageLocked), so the layer of the one that is cannot have gone.
func (d *Device) setRollbackLocked(to *Image) {
	was := d.rollback.Swap(to)
	if was == to {
		return // it goes on
	}
	if was != nil {
		d.guardedLocked(func() { was.layer.setRollback(rollbackNone) })
	}
	if to != nil {
		d.guardedLocked(func() { to.layer.setRollback(rollbackPending) }) // or it has ended
	}
	d.cat.did("note a rollback")
}

// addition is which blocks of a chunk were preserved that nobody had written to.
type addition struct {
	chunk chunkNo
	mask  uint16
}

// preserveForRollback preserves what will be overwritten, and returns what has come
// to the head by that, also where it fails.
func (i *Image) preserveForRollback() (added []addition, err error) {
	d := i.device
	need, err := i.rollbackNeeds()
	if err != nil {
		return nil, err
	}
	// To find out by trying would leave no room for other devices meanwhile.
	if room := d.pool.Room(); need > room {
		return nil, fmt.Errorf("it takes %d bytes to preserve what newer images need, there is room for %d: %w", need, room, store.ErrFull)
	}
	for r, err := range i.preservedRuns() {
		if err == nil {
			added, err = d.preserveRun(r, added)
		}
		if err != nil {
			return added, err
		}
	}
	return added, nil
}

// rollbackNeeds is how many bytes it takes to preserve what will be overwritten.
func (i *Image) rollbackNeeds() (n int64, err error) {
	d := i.device
	for r, err := range i.preservedRuns() {
		if err == nil {
			err = d.withShield(func(s *shield) error {
				for _, a := range s.missing(nil, r) {
					if s.head().table.load(a.chunk) == 0 {
						hole, err := d.isHole(a.chunk)
						if err != nil {
							return err
						}
						if hole {
							continue // it takes no slot
						}
					}
					n += int64(bits.OnesCount16(a.mask)) * blockSize
				}
				return nil
			})
		}
		if err != nil {
			return 0, err
		}
	}
	return n, nil
}

// preserveRun preserves a run, and appends what the head did not have of it.
func (d *Device) preserveRun(r Run, added []addition) ([]addition, error) {
	err := d.withShield(func(s *shield) error {
		added = s.missing(added, r)
		return d.preserve(r.Off, r.N, spareImages)
	})
	return added, err
}

// missing appends what has to be preserved of a run.
func (s *shield) missing(list []addition, r Run) []addition {
	for sp := range spans(r.Off, r.N) {
		if m := sp.mask() &^ s.mask(sp.chunk); m != 0 {
			list = append(list, addition{sp.chunk, m})
		}
	}
	return list
}

// withShield calls f as a writer, inside the gate, if any image needs it to preserve
// something.
func (d *Device) withShield(f func(*shield) error) error {
	g, ok := d.writers.enter(d.stop)
	if !ok {
		return ErrStopping
	}
	defer d.writers.leave(g)
	if s := d.shield.Load(); s != nil {
		err := errFaulted
		d.guarded(func() { err = f(s) })
		return err
	}
	return nil
}

// unpreserve has the reclaimer take additions out of the head again, as far as they
// came about, and waits for it: the next write that is let in may preserve the same
// blocks in the same slots. The origin still has the same, and nobody else writes to
// it. Where the device stops they stay, and are right.
func (d *Device) unpreserve(added []addition) {
	d.mu.Lock()
	d.unwanted = added
	d.askLocked()
	d.mu.Unlock()
	for !d.settle(time.Hour) && !d.stopped() {
	}
}

// writeBack writes what the image's layers hold to the origin.
func (i *Image) writeBack() error {
	d := i.device
	b := batches.Get().(*batch)
	defer batches.Put(b)
	for r, err := range i.preservedRuns() {
		if err != nil {
			return err
		}
		if r.Zero {
			err = d.zero(r.Off, r.N, zeroFlags{}, i)
		} else if err = i.guarded(func() error { return i.readThrough(nil, b.buffer(r.N), r.Off) }); err == nil {
			err = d.write(b.buffer(r.N), r.Off, i)
		}
		if err != nil {
			return err
		}
		d.cat.did("write back")
	}
	return nil
}

// preservedRuns yields what the image does not find in the origin, in ascending
// order: runs of data or of zeroes, of at most a window.
func (i *Image) preservedRuns() iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		l := lookups.Get().(*lookup)
		defer lookups.Put(l)
		for off := int64(0); off < i.size; {
			at, places, err := i.nextPreserved(l, off)
			if err != nil {
				yield(Run{}, err)
				return
			}
			for from := 0; from < len(places); {
				// All slots are the same here.
				kind, to := min(places[from], isZero+1), from+1
				for to < len(places) && min(places[to], isZero+1) == kind {
					to++
				}
				r := Run{Off: at + int64(from)<<blockShift, Zero: kind == isZero}
				r.N = min(at+int64(to)<<blockShift, i.size) - r.Off
				if kind != inOrigin && !yield(r, nil) {
					return
				}
				from = to
			}
			off = at + readWindow
		}
	}
}

// nextPreserved finds the places of the window that begins with the first chunk from
// off on that a layer has a word for; where there is none, it begins at the end.
func (i *Image) nextPreserved(l *lookup, off int64) (at int64, places []place, err error) {
	err = i.guarded(func() (err error) {
		at, places, err = i.nextInLayers(l, off)
		return cmp.Or(err, i.Err()) // what was found may have been zeroes by then
	})
	return at, places, err
}

func (i *Image) nextInLayers(l *lookup, off int64) (at int64, places []place, err error) {
	if i.device.stopped() {
		return 0, nil, ErrStopping
	}
	g, _ := i.device.readers.tryEnter()
	defer i.device.readers.leave(g)
	if err := i.Err(); err != nil {
		return 0, nil, err
	}
	l.chain = i.chain(nil, l.chain[:0])
	for c := range preserved(l.chain, chunkNo(off>>chunkShift), chunks(i.size)) {
		n := min(readWindow, i.size-c.off())
		places = l.is[:(n+blockSize-1)>>blockShift]
		locate(l.chain, places, c.off(), n)
		return c.off(), places, nil
	}
	return i.size, nil, nil
}
