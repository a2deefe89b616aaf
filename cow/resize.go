// Changing a device's size.
//
// An image keeps the size that the device had. Where a device has become larger,
// no image needs what is new, and writers preserve nothing there: a shield has an
// end. Where it has become smaller, an image that reaches further finds everything
// beyond the device's end in its layers, or it is broken. So nobody ever looks in
// the origin for what was cut from it, also if that becomes larger again and has
// something else there.
//
// The size changes while nobody is inside the gate. Whoever was told the old one,
// as clients are when they connect, is refused what is not there any more.
//
// What a killed process leaves: the size is noted before it is used, and the next
// start finishes what was begun (recoverChanges, recoverState). An origin that has
// another size than was noted was changed behind our back.

package cow

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"syscall"
	"time"
)

// Resize makes the device as long as its origin has become. What a larger one
// gained counts as changed. Of one that was cut short, the images that need a block
// that is gone break, and no others. It fails, and has changed nothing, where the
// origin's new size is none for an origin (EINVAL), where writes in flight do not
// end in time (ETIMEDOUT), while the origin's size goes on changing, and while the
// device is rolled back (EBUSY).
func (d *Device) Resize() error {
	release, err := d.holdSize()
	if err != nil {
		return fmt.Errorf("resize %s: %w", d.name, err)
	}
	defer release()
	size, err := d.file.size()
	if err != nil {
		return d.originError("find the size of", 0, err)
	}
	if err := checkSize(size); err != nil {
		return fmt.Errorf("resize %s: its origin %w: %w", d.name, err, syscall.EINVAL)
	}
	was := d.Size()
	if size > was {
		err = d.grow(size)
	} else if size < was {
		err = d.cut(size, func() error { return nil })
	}
	if err != nil {
		return fmt.Errorf("resize %s from %d to %d bytes: %w", d.name, was, size, err)
	}
	d.cfg.Log.Info("device resized", "from", was, "to", size)
	return nil
}

// Shrink cuts the device and its origin, which must be a file, to size bytes, after
// everything was preserved that images need of the rest. It fails as Resize does,
// and with store.ErrFull where the snapstore has no room; then nothing was cut, and
// what was preserved until then stays preserved.
func (d *Device) Shrink(size int64) error {
	release, err := d.holdSize()
	if err != nil {
		return fmt.Errorf("shrink %s: %w", d.name, err)
	}
	defer release()
	was := d.Size()
	if size <= 0 || size >= was || size%SectorSize != 0 {
		return fmt.Errorf("shrink %s from %d to %d bytes, which are not less, or no multiple of %d: %w", d.name, was, size, SectorSize, syscall.EINVAL)
	}
	if err = d.preserveTail(size); err == nil {
		err = d.cut(size, func() error {
			d.noteCut(size)
			d.cat.did("note a cut")
			err := d.stamp(func() error { return d.file.truncate(size) })
			d.cat.did("cut an origin")
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("shrink %s from %d to %d bytes: %w", d.name, was, size, err)
	}
	d.cfg.Log.Info("device shrunk", "from", was, "to", size)
	return nil
}

// holdSize sees to it that nothing happens until release that depends on the size,
// but for reads and writes.
func (d *Device) holdSize() (release func(), err error) {
	free, err := d.holdDurable()
	if err != nil {
		return nil, err
	}
	d.taking.Lock()
	release = func() {
		d.taking.Unlock()
		free()
	}
	switch {
	case d.stopped():
		err = ErrStopping
	case d.rollback.Load() != nil:
		err = ErrRollback
	default:
		return release, nil
	}
	release()
	return nil, err
}

// grow makes the device larger. The caller holds the size.
func (d *Device) grow(size int64) error {
	// Everything new is marked before anybody can write to it.
	if err := d.resizeChanges(size); err != nil {
		return err
	}
	err := d.setSize(size, func() error { return nil })
	if err != nil {
		err = errors.Join(err, d.resizeChanges(d.Size()))
	}
	return err
}

// cut makes the device smaller. truncate, which may fail, is called while nobody
// writes. The caller holds the size.
func (d *Device) cut(size int64, truncate func() error) error {
	err := d.setSize(size, func() error {
		if err := truncate(); err != nil {
			d.noteCut(0)
			return err
		}
		// The last block may go on being written in part, and must not be
		// preserved then by what is left of it.
		d.loseCut(size, roundUp(size, blockSize))
		return nil
	})
	if err != nil {
		return err
	}
	d.loseCut(size, math.MaxInt64)
	return d.resizeChanges(size)
}

func (d *Device) resizeChanges(size int64) (err error) {
	d.always(func() { err = d.changes().Resize(size) })
	return err
}

// setSize publishes the size, after f succeeded with nobody inside the gate.
func (d *Device) setSize(size int64, f func() error) error {
	d.dropDurable() // it has room for the old size
	d.writers.shut()
	defer d.writers.open()
	if !d.writers.empty(time.Now().Add(takeLimit)) {
		return fmt.Errorf("writes in flight did not end within %v: %w", takeLimit, syscall.ETIMEDOUT)
	}
	if err := f(); err != nil {
		return err
	}
	// A write in flight may have made a file longer again.
	if now, err := d.file.size(); err != nil || now != size {
		return fmt.Errorf("the origin has %d bytes meanwhile: %w", now, cmp.Or(err, error(syscall.EBUSY)))
	}
	d.noteSize(size)
	d.size.Store(size)
	return nil
}

// preserveTail preserves everything from size on that any image needs, and waits
// until no reader looks for it in the origin any more.
func (d *Device) preserveTail(size int64) error {
	for off, end := size, d.Size(); off < end; {
		n := min(end-off, piece)
		g, ok := d.writers.enter(d.stop)
		if !ok {
			return ErrStopping
		}
		err := d.preserveGuarded(off, n, spareImages)
		d.writers.leave(g)
		if err != nil {
			return err
		}
		off += n
	}
	if !d.readers.turn(d.stop) {
		return ErrStopping
	}
	return nil
}

// loseCut breaks the images that need a block that [from, to) touches, which the
// origin does not have any more.
func (d *Device) loseCut(from, to int64) {
	d.mu.Lock()
	images := slices.Clone(d.images)
	d.mu.Unlock()
	for _, i := range images {
		if i.needs(from, min(to, i.size)) {
			err := fmt.Errorf("the origin was cut to %d bytes", from)
			d.breakImage(i, failed(err.Error()), err)
		}
	}
}

// needs says whether the image has a block that [from, to) touches from the origin.
func (i *Image) needs(from, to int64) bool {
	l := lookups.Get().(*lookup)
	defer lookups.Put(l)
	for ; from < to; from += readWindow {
		n := min(to-from, readWindow)
		places := l.is[:(from+n-1)>>blockShift-from>>blockShift+1]
		if i.find(l, places, from, n) != nil {
			return false // it needs nothing any more
		}
		if slices.Contains(places, inOrigin) {
			return true
		}
	}
	return false
}

// find finds the places of the blocks that [off, off+n) touches, as the device was
// at the instant. It fails where the image is not healthy.
func (i *Image) find(l *lookup, places []place, off, n int64) error {
	g, _ := i.device.readers.tryEnter()
	defer i.device.readers.leave(g)
	if err := i.Err(); err != nil {
		return err
	}
	l.chain = i.chain(nil, l.chain[:0])
	return i.guarded(func() error {
		locate(l.chain, places, off, n)
		return i.Err()
	})
}
