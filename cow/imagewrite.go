// What changes a writable image: write, write-zeroes, trim.

package cow

import (
	"errors"
	"fmt"
	"slices"
	"syscall"

	"blksnap/store"
)

// Write makes p visible to reads that start after it returns. It fails with ENOSPC
// where the snapstore has no room: that breaks nothing, and each block of the
// range is as it was or as it was to become. fua means nothing: nothing that is
// written to an image outlives the machine.
func (i *Image) Write(p []byte, off int64, fua bool) error {
	return i.amend("write", off, int64(len(p)), func(at, n int64) error {
		return i.writeWindow(p[at-off:at-off+n], at)
	})
}

// WriteAt is Write by the rules of io.WriterAt, but that it writes all of p or
// says that it wrote nothing.
func (i *Image) WriteAt(p []byte, off int64) (int, error) {
	if err := i.Write(p, off, false); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Zero makes the range read as zeroes, and gives the space of whole chunks back.
func (i *Image) Zero(off, n int64) error { return i.WriteZeroes(off, n, zeroFlags{}) }

// WriteZeroes is Zero; with NoHole set the range takes space in the snapstore, so
// that later writes find some. With Fast set it fails with ENOTSUP, and has changed
// nothing, where that would need plain writes.
func (i *Image) WriteZeroes(off, n int64, f zeroFlags) error {
	if f.Fast && i.Writable() && (f.NoHole || !i.wholeChunks(off, n)) {
		return fmt.Errorf("zero %s@%s at %d: %w", i.device.name, i.snapshot.name, off, syscall.ENOTSUP)
	}
	return i.amend("zero", off, n, func(off, n int64) error {
		for sp := range spans(off, n) {
			at := sp.chunk.off() + sp.skip
			var err error
			switch {
			case f.NoHole:
				err = i.writeWindow(zeroes[:sp.n], at)
			case i.isHole(sp.chunk):
			case i.wholeChunks(at, sp.n):
				err = i.zeroChunk(sp.chunk)
			default:
				err = i.writeWindow(zeroes[:sp.n], at)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// Trim says that the range's content is no longer needed. It is advice: whole
// chunks that were written to the image become zeroes and give their space back;
// all else is left as it is, because to zero it would take space.
func (i *Image) Trim(off, n int64, fua bool) error {
	return i.amend("trim", off, n, func(off, n int64) error {
		for sp := range spans(off, n) {
			if !i.wholeChunks(sp.chunk.off()+sp.skip, sp.n) || !i.overlay.table.load(sp.chunk).hasSlot() {
				continue
			}
			if err := i.zeroChunk(sp.chunk); err != nil {
				return err
			}
		}
		return nil
	})
}

// amend calls f for each window of [off, off+n), inside readers.
func (i *Image) amend(what string, off, n int64, f func(off, n int64) error) error {
	err := i.Err()
	switch {
	case err != nil:
	case !i.Writable():
		err = syscall.EROFS
	case off < 0 || n < 0 || off > i.size-n:
		err = fmt.Errorf("%d bytes are not within its %d: %w", n, i.size, syscall.ENOSPC)
	}
	for end := off + n; err == nil && off < end; {
		to := min(end, (chunkNo(off>>chunkShift) + window).off())
		err = i.amendWindow(off, to-off, f)
		if errors.Is(err, store.ErrFull) && i.device.settle(settleLimit) {
			// There may be room in what was given back a moment ago.
			err = i.amendWindow(off, to-off, f)
		}
		if err == nil {
			off = to
		}
	}
	if err != nil {
		return fmt.Errorf("%s %s@%s at %d: %w", what, i.device.name, i.snapshot.name, off, err)
	}
	return i.Err()
}

func (i *Image) amendWindow(off, n int64, f func(off, n int64) error) error {
	g, _ := i.device.readers.tryEnter() // never shut
	defer i.device.readers.leave(g)
	if err := i.Err(); err != nil {
		return err
	}
	return i.guarded(func() error { return f(off, n) })
}

// mark notes that [off, off+n) of the image changes: a backup of it may hold other
// bytes there than newer images and the device do. So the image's own frozen map
// is marked, and all newer maps, as if the next snapshot had brought the change.
func (i *Image) mark(off, n int64) error {
	d := i.device
	// Inside the gate no snapshot comes about: each newer map is either in the
	// list, or will be made from the live one after it was marked. What the live
	// map must not forget when power is lost is recorded as for a write to the
	// device.
	g, err := d.letIn(off, n)
	if err != nil {
		return err
	}
	defer d.writers.leave(g)
	d.mu.Lock()
	images := slices.Clone(d.images)
	d.mu.Unlock()
	own := i.frozen.Number()
	for _, j := range images {
		if j.frozen.Number() >= own {
			j.frozen.Mark(off, n, own+1) // where that is too much its own number counts
		}
	}
	d.changes().MarkAt(off, n, own+1)
	return nil
}

// wholeChunks says whether the range begins and ends with a chunk; the end of the
// image counts as the end of one.
func (i *Image) wholeChunks(off, n int64) bool {
	return off&(chunkSize-1) == 0 && ((off+n)&(chunkSize-1) == 0 || off+n == i.size)
}

// isHole says whether the chunk is known to read as zeroes and to take no space.
func (i *Image) isHole(c chunkNo) bool {
	if w := i.overlay.table.load(c); w != 0 {
		return w == zeroWord
	}
	data, err := i.extent.find(i)
	if err != nil {
		return false
	}
	k := runAt(data, c.off())
	return k == len(data) || data[k].off >= c.off()+chunkSize
}
