// What of a device or image is data and what is a hole.

package cow

import (
	"fmt"
	"iter"
	"slices"
	"sort"
	"sync"
	"syscall"
)

// Run is a run of bytes. Zero says that it is a hole: it reads as zeroes, and a
// copy of it need not be read. It is an alias so that others need not name this
// package.
type Run = struct {
	Off, N int64
	Zero   bool
}

// extents are the data runs of an image: found when first asked for, and kept,
// because the origin's own holes may drift. What is data for one reader must not
// be a hole for the next.
type extents struct {
	mu    sync.Mutex
	known bool
	data  []dataRun // ascending, with gaps between
	size  int64     // sum of the runs
}

type dataRun struct{ off, end int64 }

// find computes the runs at the first call.
func (e *extents) find(i *Image) ([]dataRun, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.known {
		return e.data, nil
	}
	data, err := i.scan()
	if err != nil {
		return nil, fmt.Errorf("find holes of %s@%s: %w", i.device.name, i.snapshot.name, err)
	}
	e.data, e.known = data, true
	for _, r := range data {
		e.size += r.end - r.off
	}
	return data, nil
}

// scanWindow bounds how long one look at the tables takes.
const scanWindow = 1 << 30

// scan finds the data of the image. For each run it asks the origin first and
// looks at the tables afterwards: a block that was changed since the image's
// instant is in a table before the origin's answer can be wrong about it.
func (i *Image) scan() ([]dataRun, error) {
	var data []dataRun
	add := func(off, end int64) {
		end = min(end, i.Size())
		if n := len(data); n > 0 && data[n-1].end == off {
			data[n-1].end = end
			return
		}
		data = append(data, dataRun{off, end})
	}
	for off := int64(0); off < i.Size(); {
		hole, end, err := i.device.file.next(off, min(off+scanWindow, i.Size()))
		if err != nil {
			return nil, i.device.originError("find holes of", off, err)
		}
		if err := i.scanRun(off, end, hole, add); err != nil {
			return nil, err
		}
		off = end
	}
	return slices.Clip(data), i.Err()
}

// scanRun adds the data in [off, end), which the origin says is all hole or all
// data. Both are multiples of a block but for the end of the image, or the
// origin's file system has smaller blocks: then the block counts as data.
func (i *Image) scanRun(off, end int64, hole bool, add func(off, end int64)) error {
	g, _ := i.device.readers.tryEnter()
	defer i.device.readers.leave(g)
	if err := i.Err(); err != nil {
		return err
	}
	chain := i.chain(nil)
	at := off // everything before was added
	for c := range preserved(chain, chunkNo(off>>chunkShift), chunks(end)) {
		var places [blocksPerChunk]place
		locate(chain, places[:], c.off(), chunkSize)
		for b, p := range places {
			from, to := max(c.off()+int64(b)<<blockShift, off), min(c.off()+int64(b+1)<<blockShift, end)
			if from >= to || p == inOrigin {
				continue
			}
			if !hole && at < from {
				add(at, from)
			}
			if p != isZero {
				add(from, to)
			}
			at = to
		}
	}
	if !hole && at < end {
		add(at, end)
	}
	return nil
}

// preserved yields the chunks of [c, end) that any layer of the chain has a word
// for, in ascending order. It looks at newer layers first, as locate does.
func preserved(chain []*layer, c, end chunkNo) iter.Seq[chunkNo] {
	return func(yield func(chunkNo) bool) {
		for c < end {
			next := end
			for _, l := range slices.Backward(chain) {
				for first := range l.table.from(c) {
					next = min(next, first)
					break
				}
				if next == c {
					break
				}
			}
			if next >= end || !yield(next) {
				return
			}
			c = next + 1
		}
	}
}

// Allocated is how many bytes of the image are not a hole.
func (i *Image) Allocated() (int64, error) {
	if _, err := i.extent.find(i); err != nil {
		return 0, err
	}
	return i.extent.size, nil
}

// NextData returns the first offset from off on that is data; ENXIO where none
// follows.
func (i *Image) NextData(off int64) (int64, error) {
	data, err := i.extent.find(i)
	if err != nil {
		return 0, err
	}
	k := runAt(data, off)
	if off < 0 || k == len(data) {
		return 0, fmt.Errorf("no data from %d on: %w", off, syscall.ENXIO)
	}
	return max(off, data[k].off), nil
}

// NextHole returns the first offset from off on that is a hole; the end of the
// image counts as one. ENXIO beyond it.
func (i *Image) NextHole(off int64) (int64, error) {
	data, err := i.extent.find(i)
	if err != nil {
		return 0, err
	}
	if off < 0 || off >= i.Size() {
		return 0, fmt.Errorf("no byte at %d: %w", off, syscall.ENXIO)
	}
	if k := runAt(data, off); k < len(data) && data[k].off <= off {
		return data[k].end, nil
	}
	return off, nil
}

// Runs yields the image's runs of data and hole from off on, without gaps, to
// off+n.
func (i *Image) Runs(off, n int64) iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		data, err := i.extent.find(i)
		if err != nil {
			yield(Run{}, err)
			return
		}
		end := off + n
		for k := runAt(data, off); off < end; k++ {
			from, to := end, end
			if k < len(data) {
				from, to = min(data[k].off, end), min(data[k].end, end)
			}
			if off < from && !yield(Run{off, from - off, true}, nil) {
				return
			}
			off = max(off, from)
			if off < to && !yield(Run{off, to - off, false}, nil) {
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

// Runs yields the device's runs of data and hole from off on, without gaps, to
// off+n, as the origin has them now.
func (d *Device) Runs(off, n int64) iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		for end := off + n; off < end; {
			hole, to, err := d.file.next(off, end)
			if err != nil {
				yield(Run{}, d.originError("find holes of", off, err))
				return
			}
			if !yield(Run{off, to - off, hole}, nil) {
				return
			}
			off = to
		}
	}
}
