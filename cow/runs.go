// What of a device or image is data and what is a hole, as its users see it.

package cow

import (
	"fmt"
	"iter"
	"sort"
	"syscall"
)

// Run is a run of bytes. Zero says that it is a hole: it reads as zeroes, and a
// copy of it need not be read. It is an alias so that others need not name this
// package.
type Run = struct {
	Off, N int64
	Zero   bool
}

// Runs yields the device's runs of data and hole from off on, without gaps, to
// off+n, as the origin has them now. EINVAL where the device is not so large.
func (d *Device) Runs(off, n int64) iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		if err := d.within("find holes of", off, n, syscall.EINVAL); err != nil {
			yield(Run{}, err)
			return
		}
		for end := off + n; off < end; {
			hole, to, err := d.nextRun(off, end)
			if err != nil {
				yield(Run{}, err)
				return
			}
			if !yield(Run{off, to - off, hole}, nil) {
				return
			}
			off = to
		}
	}
}

// nextRun is next of the origin's file, with the error to answer. EINVAL where the
// device does not reach as far as end.
func (d *Device) nextRun(off, end int64) (hole bool, to int64, err error) {
	if hole, to, err = d.file.next(off, end); err == nil {
		return hole, to, nil
	}
	if err := d.within("find holes of", off, end-off, syscall.EINVAL); err != nil {
		return false, off, err
	}
	return false, off, d.originError("find holes of", off, err)
}

// Runs yields the image's runs of data and hole from off on, without gaps, to
// off+n. What was never written to the image is the same each time.
func (i *Image) Runs(off, n int64) iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		data, err := i.extent.find(i)
		if err != nil {
			yield(Run{}, err)
			return
		}
		var run Run // collects neighbours of a kind
		for r, err := range i.pieces(data, off, off+n) {
			switch {
			case err != nil:
				yield(Run{}, err)
				return
			case run.N == 0:
				run = r
			case r.Zero == run.Zero:
				run.N += r.N
			case !yield(run, nil):
				return
			default:
				run = r
			}
		}
		if run.N > 0 {
			yield(run, nil)
		}
	}
}

// pieces yields runs without gaps from off to end, neighbours perhaps of the same
// kind. data are the data runs of the image as it was at its instant.
func (i *Image) pieces(data []dataRun, off, end int64) iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		fixed := func(to int64) bool {
			for r := range runsOf(data, off, to) {
				if !yield(r, nil) {
					return false
				}
			}
			off = max(off, to)
			return true
		}
		if i.overlay != nil {
			for r, err := range i.written(off, end) {
				if err != nil {
					yield(Run{}, err)
					return
				}
				if !fixed(r.Off) || !yield(r, nil) {
					return
				}
				off = r.Off + r.N
			}
		}
		fixed(end)
	}
}

// written yields what of [off, end) the overlay holds. It looks again for each
// chunk, and between two lets the reclaimer pass.
func (i *Image) written(off, end int64) iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		for off < end {
			c, w, err := i.nextWritten(chunkNo(off >> chunkShift))
			if err != nil {
				yield(Run{}, err)
				return
			}
			for first, n := range runs(w.mask()) {
				from := c.off() + int64(first)<<blockShift
				from, to := max(from, off), min(from+int64(n)<<blockShift, end)
				if from < to && !yield(Run{from, to - from, !w.hasSlot()}, nil) {
					return
				}
			}
			off = (c + 1).off()
		}
	}
}

// nextWritten returns the first chunk from c on that the overlay has a word for; the
// one after the image's last, and no word, where none follows.
func (i *Image) nextWritten(c chunkNo) (at chunkNo, w word, err error) {
	err = i.guarded(func() (err error) {
		at, w, err = i.nextInOverlay(c)
		return err
	})
	return at, w, err
}

func (i *Image) nextInOverlay(c chunkNo) (chunkNo, word, error) {
	g, _ := i.device.readers.tryEnter()
	defer i.device.readers.leave(g)
	if err := i.Err(); err != nil {
		return 0, 0, err
	}
	for c, w := range i.overlay.table.from(c) {
		return c, w, nil
	}
	return chunks(i.size), 0, nil
}

// runsOf yields the runs of data and hole from off to end.
func runsOf(data []dataRun, off, end int64) iter.Seq[Run] {
	return func(yield func(Run) bool) {
		for k := runAt(data, off); off < end; k++ {
			from, to := end, end
			if k < len(data) {
				from, to = min(data[k].off, end), min(data[k].end, end)
			}
			if off < from && !yield(Run{off, from - off, true}) {
				return
			}
			off = max(off, from)
			if off < to && !yield(Run{off, to - off, false}) {
				return
			}
			off = max(off, to)
		}
	}
}

// runAt is the index of the first run that ends after off.
func runAt(data []dataRun, off int64) int {
	return sort.Search(len(data), func(k int) bool { return data[k].end > off })
}

// Allocated is how many bytes of the image are not a hole.
func (i *Image) Allocated() (int64, error) {
	if i.overlay == nil {
		_, err := i.extent.find(i)
		return i.extent.size, err
	}
	var n int64
	for r, err := range i.Runs(0, i.size) {
		if err != nil {
			return 0, err
		}
		if !r.Zero {
			n += r.N
		}
	}
	return n, nil
}

// NextData returns the first offset from off on that is data; ENXIO where none
// follows.
func (i *Image) NextData(off int64) (int64, error) {
	if off >= 0 {
		for r, err := range i.Runs(off, i.size-off) {
			if err != nil || !r.Zero {
				return r.Off, err
			}
		}
	}
	return 0, fmt.Errorf("no data from %d on: %w", off, syscall.ENXIO)
}

// NextHole returns the first offset from off on that is a hole; the end of the
// image counts as one. ENXIO beyond it.
func (i *Image) NextHole(off int64) (int64, error) {
	if off < 0 || off >= i.size {
		return 0, fmt.Errorf("no byte at %d: %w", off, syscall.ENXIO)
	}
	for r, err := range i.Runs(off, i.size-off) {
		if err != nil || r.Zero {
			return r.Off, err
		}
	}
	return i.size, nil
}
